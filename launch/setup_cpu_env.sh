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
mark="$venv/.gpg-made-here"  # written first; holds the path, since environments cannot be moved
stamp="$venv/.gpg-complete"  # written last; holds the fingerprint of what was installed
log="$venv/install.log"
lock_wait_s=3600
# The one index that carries the +cpu builds of torch when the configured sources do not.
torch_index="https://download.pytorch.org/whl/cpu"

say() { printf '[setup] %s\n' "$*"; }

fail() {
  printf '[setup] %s\n' "$2" >&2
  exit "$1"
}

fingerprint() {
  { printf '%s\n%s\n' "$root" "$venv" && cat "$lock" "$root/setup.py"; } | sha256sum | cut -d' ' -f1
}

is_complete() {
  [[ -x "$venv/bin/python" && -f "$stamp" && "$(<"$stamp")" == "$(fingerprint)" ]]
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
  say "making $venv (about 3 GB; log: install.log in it)"
  # An environment that was interrupted half-way or copied from elsewhere is made anew, but a
  # folder that this script did not make is never touched.
  if [[ -f "$mark" ]]; then
    rm -rf "$venv"
  elif [[ -d "$venv" && -n "$(ls -A "$venv")" ]]; then
    fail 2 "$venv exists and was not made by this script; move it away or set GPG_VENV"
  fi
  mkdir -p "$venv"
  printf '%s\n' "$venv" >"$mark"
  "$python" -m venv "$venv"
}

# Installs quietly; what pip says goes to the log. Byte code is left to warm_up: most of these
# modules are never imported.
pip_install() {
  "$venv/bin/python" -P -m pip install --no-deps --no-compile --no-input \
    --disable-pip-version-check --progress-bar off "$@" >>"$log" 2>&1
}

require() {
  local what="$1"
  shift
  "$@" || {
    tail -n 15 "$log" >&2
    fail 1 "installing $what failed; the lines above are the end of $log"
  }
}

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
    "transformers.models.qwen2.modeling_qwen2",
    "datasets",
    "matplotlib.pyplot",
    "pytest",
    "hypothesis",
):
    importlib.import_module(name)
PYTHON
}

build() {
  local begin=$SECONDS
  if [[ -f "$stamp" && -f "$mark" && "$(<"$mark")" == "$venv" && -x "$venv/bin/python" ]]; then
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
  fingerprint >"$stamp.new"
  mv "$stamp.new" "$stamp"
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
