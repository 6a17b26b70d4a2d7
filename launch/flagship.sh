# What the scripts run_<model>_math*.sh share; to be sourced.
#
#   flagship CONFIG [a.b=value ...] [--dry-run]
#
# From the environment, all optional:
#   MODEL_PATH     Hugging Face directory of the model (as the configuration says)
#   DATA_DIR       folder of the parquet files, made when they are missing         (data)
#   DATA_SOURCE    local folder with the raw data sets; without it, Hugging Face
#   OUTPUT_DIR     run directory                       (as the configuration says)
#   DEVICE         auto, cuda, or cpu: CONFIG with _cpu in its name, for small models   (auto)
#   GPG_PYTHON     interpreter of the environment to use         (python; with DEVICE=cpu
#                  the environment that setup_cpu_env.sh makes)
#   NNODES, NODE_RANK, MASTER_ADDR     several hosts: the script runs on each of them, with the
#                  same command line; docs/launch.md has these and more

root="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"

fail() {
  printf '%s\n' "$1" >&2
  exit 2
}

find_python() {
  if [[ -z "${GPG_PYTHON:-}" && "${DEVICE:-auto}" == cpu ]]; then
    GPG_VENV="$(realpath -m "${GPG_VENV:-$root/.venv}")"
    export GPG_VENV
    "$root/launch/setup_cpu_env.sh"
    GPG_PYTHON="$GPG_VENV/bin/python"
  fi
  python="$(command -v "${GPG_PYTHON:-python}")" ||
    fail "${GPG_PYTHON:-python}: no such program; docs/install-gpu.md tells how to install"
  python="$(realpath -s "$python")"
  PATH="$(dirname "$python"):$PATH"
  export PATH
}

find_hosts() {
  ((${NNODES:-1} > 1)) || return 0
  : "${MASTER_ADDR:?NNODES is $NNODES: MASTER_ADDR must name the first host}"
  : "${NODE_RANK:?NNODES is $NNODES: NODE_RANK must be 0 on the first host, 1 on the next ...}"
  hosts=(
    --nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR"
    ${MASTER_PORT:+--master-port "$MASTER_PORT"} ${RAY_PORT:+--ray-port "$RAY_PORT"}
    ${NPROC_PER_NODE:+--nproc-per-node "$NPROC_PER_NODE"}
  )
}

prepare_data() {
  local name
  for name in gsm8k math; do
    [[ -f "$data/$name/train.parquet" && -f "$data/$name/test.parquet" ]] && continue
    "$python" -m gpg_megatron.data.cli "$name" --out "$data/$name" \
      ${DATA_SOURCE:+--source "$DATA_SOURCE"}
  done
}

flagship() {
  local config="$1" data="${DATA_DIR:-$root/data}" python hosts=()
  shift
  data="$(realpath -m "$data")"
  [[ -z "${DATA_SOURCE:-}" ]] || DATA_SOURCE="$(realpath -m "$DATA_SOURCE")"
  # Paths and the device: everything else is the configuration's.
  local keys=()
  [[ -z "${DATA_DIR:-}" ]] || keys+=(
    "data.train_files=[$data/gsm8k/train.parquet,$data/math/train.parquet]"
    "data.val_files=[$data/gsm8k/test.parquet,$data/math/test.parquet]"
  )
  [[ -z "${DEVICE:-}" ]] || keys+=("trainer.device=$DEVICE")
  [[ -z "${MODEL_PATH:-}" ]] || keys+=("model.path=$(realpath -m "$MODEL_PATH")")
  [[ -z "${OUTPUT_DIR:-}" ]] || keys+=("trainer.output_dir=$(realpath -m "$OUTPUT_DIR")")
  [[ "${DEVICE:-auto}" != cpu ]] || config="${config%.yaml}_cpu.yaml"
  find_python
  find_hosts
  cd "$root" || exit
  # Megatron overlaps communication with computation by the order of kernel launches.
  export CUDA_DEVICE_MAX_CONNECTIONS=1
  if [[ "${NODE_RANK:-0}" == 0 ]]; then
    prepare_data
  fi
  exec "$python" -m gpg_megatron.start.train --config "$config" "${hosts[@]}" "${keys[@]}" "$@"
}
