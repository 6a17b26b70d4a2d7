# What the *.sbatch files share; to be sourced by a batch script in the submission's folder.
#
#   slurm_job [SCRIPT [a.b=value ...]]     SCRIPT runs once on each node of the job
#
# docs/launch.md says how to submit, and what happens at the time limit.

# What other launchers leave in a shell that submits, or what is true on the login node alone.
sanitise_environment() {
  local name
  for name in $(compgen -e); do
    case "$name" in
      RANK | WORLD_SIZE | LOCAL_RANK | LOCAL_WORLD_SIZE | GROUP_* | ROLE_* | TORCHELASTIC_* | \
        MASTER_ADDR | MASTER_PORT | NNODES | NODE_RANK | NPROC_PER_NODE | RAY_ADDRESS | RAY_PORT | \
        GPG_RUN_ID | GPG_SCRATCH | GPG_BEGAN | GPG_SUSPECT_STEP | GLOO_SOCKET_IFNAME | NCCL_SOCKET_IFNAME | \
        PYTHONPATH | PYTHONHOME | XDG_RUNTIME_DIR | ROCR_VISIBLE_DEVICES | HIP_VISIBLE_DEVICES)
        unset "$name"
        ;;
    esac
  done
}

# Each node's script finds its place in these; ports differ between jobs that share a node.
export_hosts() {
  local first
  ((SLURM_JOB_NUM_NODES > 1)) || return 0
  first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
  NNODES="$SLURM_JOB_NUM_NODES"
  MASTER_ADDR="$(scontrol -o show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)"
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 6000))
  RAY_PORT=$((26000 + SLURM_JOB_ID % 6000))
  export NNODES MASTER_ADDR MASTER_PORT RAY_PORT
}

# The launchers hear of it, and leave in order; srun passes the signal on.
leave() {
  printf '[slurm] the time limit of job %s is near: it leaves in order\n' "$SLURM_JOB_ID"
  leaves=1
  kill -USR1 "$step"
}

slurm_job() {
  local script="${1:-launch/run_qwen2-7b_math_megatron.sh}" step code=0 leaves=0
  shift || true
  if [[ ! -x "$script" ]]; then
    printf '%s: no such script in %s; submit from the repository\n' "$script" "$PWD" >&2
    exit 2
  fi
  sanitise_environment
  export_hosts
  printf '[slurm] job %s, restart %s, nodes %s\n' \
    "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "$SLURM_JOB_NODELIST"
  # srun takes the CPUs of a task from neither the job nor the batch script. The launchers end one
  # another and clean up, so srun must not kill them at once when one fails.
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=0 --wait=60 --export=ALL \
    bash -c 'NODE_RANK="$SLURM_NODEID" exec "$@"' _ "$script" "$@" &
  step=$!
  trap leave USR1
  # A trapped signal ends `wait`, not the step.
  while kill -0 "$step" 2>/dev/null; do
    code=0
    wait "$step" || code=$?
  done
  # 75: the run left in order before its end, for whatever reason.
  if ((code == 75 || (leaves && code != 0))); then
    printf '[slurm] job %s is queued again\n' "$SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}
