#!/usr/bin/env bash
# Makes the CPU environment, exactly as requirements-cpu.lock pins it, or returns at once when it
# is already there.
#
#   launch/setup_cpu_env.sh        the environment is <repository>/.venv
#   GPG_VENV=DIR launch/...        the environment is DIR
#
# Safe to interrupt and to run twice at the same time. Exit code 2: the machine cannot do it and
# one line says why; 1: an installation failed.
set -euo pipefail

root="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
venv="$(realpath -m "${GPG_VENV:-$root/.venv}")"
lock="$root/requirements-cpu.lock"
lock_wait_s=3600
# The one index that carries the +cpu builds of torch when the configured sources do not.
torch_index="https://download.pytorch.org/whl/cpu"

# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

fingerprint() {
  { printf '%s\n%s\n' "$root" "$venv" && cat "$lock" "$root/setup.py"; } | sha256sum | cut -d' ' -f1
}

find_python() {
  local candidate
  for candidate in python3.11 python3 python3.12; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
      2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

make_venv() {
  local python
  [[ "$(uname -s)-$(uname -m)" == Linux-x86_64 ]] ||
    fail 2 "this is $(uname -s) $(uname -m); requirements-cpu.lock is for Linux x86_64"
  python="$(find_python)" ||
    fail 2 "no Python >=3.11,<3.13 found as python3.11, python3 or python3.12; install Python 3.11"
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail 2 "$python has no venv module; install it (on Debian and Ubuntu: python3.11-venv)"
  new_venv "$python" "3 GB"
}

# Byte code is left to warm_up: most of these modules are never imported.
pip_install() { pip_quietly --no-deps --no-compile "$@"; }

install_torch() {
  local torch
  torch="$(grep '^torch==' "$lock")"
  pip_install "$torch" || {
    say "the configured package sources did not give $torch; trying $torch_index too"
    pip_install --extra-index-url "$torch_index" "$torch"
  }
}

# Imports what a run imports: shows that the pieces fit together, and leaves their byte code, also
# where PYTHONDONTWRITEBYTECODE would make every process of a run compile them again.
warm_up() {
  env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -P - >>"$log" 2>&1 <<'PYTHON'
import importlib

for name in (
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "ray._private.worker",
    "vllm.v1.engine.async_llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen2",
    "vllm.model_executor.models.qwen3",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "datasets",
    "matplotlib.pyplot",
    "pytest",
    "hypothesis",
    "gpg_megatron.loop.build",
    "gpg_megatron.rollout.engine",
    "gpg_megatron.start.preflight",
    "gpg_megatron.start.rank",
):
    importlib.import_module(name)
PYTHON
}

build() {
  local begin=$SECONDS
  if [[ -f "$stamp" ]] && is_ours; then
    say "updating $venv"
    rm "$stamp"
  else
    make_venv
  fi
  require "torch" install_torch
  say "torch: $((SECONDS - begin)) s"
  require "requirements-cpu.lock" pip_install -r "$lock"
  require "gpg_megatron" pip_install --no-build-isolation -e "$root"
  say "packages: $((SECONDS - begin)) s"
  require "a fitting set of packages" warm_up
  mark_complete
  say "environment ready in $((SECONDS - begin)) s"
}

main() {
  if is_complete; then
    return
  fi
  # pip would take packages found through these for installed ones.
  unset PYTHONPATH PYTHONHOME
  mkdir -p "$(dirname "$venv")"
  exec 9>"$venv.lock"
  flock --nonblock 9 || {
    say "waiting for another set-up of $venv"
    flock --wait "$lock_wait_s" 9 ||
      fail 1 "waited $lock_wait_s s for another set-up that holds $venv.lock"
  }
  is_complete || build
}

main
