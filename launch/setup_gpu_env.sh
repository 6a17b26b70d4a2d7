#!/usr/bin/env bash
# Makes the GPU environment, exactly as requirements-gpu.lock pins it, or returns at once when it
# is already there.
#
#   launch/setup_gpu_env.sh                        the environment is <repository>/.venv-gpu
#   GPG_VENV=DIR launch/setup_gpu_env.sh           the environment is DIR
#   launch/setup_gpu_env.sh --transformer-engine   also builds Transformer Engine against its torch;
#                                                  takes long, needs nvcc and a C++ compiler
#
# Safe to interrupt and to run again. Exit code 2: the machine cannot do it and one line says why;
# 1: an installation failed.
set -euo pipefail

root="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
venv="$(realpath -m "${GPG_VENV:-$root/.venv-gpu}")"
lock="$root/requirements-gpu.lock"
min_driver=580 # of CUDA 13, which this torch is built with
# Megatron-Core 0.16.1 asks for 2.9 up to, not including, 2.12.
transformer_engine="transformer-engine[pytorch,core_cu13]==2.11.0"
with_transformer_engine=

# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"

fingerprint() {
  {
    printf '%s\n' "$root" "$venv" "$with_transformer_engine"
    cat "$lock" "$root/setup.py"
  } | sha256sum | cut -d' ' -f1
}

check_machine() {
  local driver
  [[ "$(uname -s)-$(uname -m)" == Linux-x86_64 ]] ||
    fail 2 "this is $(uname -s) $(uname -m); requirements-gpu.lock is for Linux x86_64"
  python3.12 -c 'import venv, ensurepip' 2>/dev/null ||
    fail 2 "no python3.12 with its venv module; install both (on Ubuntu: python3.12-venv)"
  # While an image is built there is no driver; a container gets its host's.
  if command -v nvidia-smi >/dev/null; then
    driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)"
    ((${driver%%.*} >= min_driver)) ||
      fail 2 "the NVIDIA driver is $driver; CUDA 13 needs $min_driver or newer"
  fi
  [[ -z "$with_transformer_engine" ]] || command -v nvcc >/dev/null ||
    fail 2 "no nvcc: Transformer Engine is compiled; install the toolkit of CUDA 13.0"
}

build() {
  local begin=$SECONDS
  check_machine
  rm -f "$stamp"
  is_ours || new_venv python3.12 "12 GB"
  # The lock is whole: nothing is left to resolve.
  require "requirements-gpu.lock" pip_quietly --no-deps -r "$lock"
  require "gpg_megatron" pip_quietly --no-deps --no-build-isolation -e "$root"
  say "packages: $((SECONDS - begin)) s"
  if [[ -n "$with_transformer_engine" ]]; then
    # Its build asks for the torch that it will run with.
    require "$transformer_engine" \
      pip_quietly --no-build-isolation --constraint "$lock" "$transformer_engine"
    say "Transformer Engine: $((SECONDS - begin)) s"
  fi
  mark_complete
  say "environment ready in $((SECONDS - begin)) s"
}

main() {
  case "${1:-}" in
    "") ;;
    --transformer-engine) with_transformer_engine=yes ;;
    *) fail 2 "$1: no such option; expected --transformer-engine, or none" ;;
  esac
  # pip would take packages found through these for installed ones.
  unset PYTHONPATH PYTHONHOME
  is_complete || build
  "$venv/bin/gpg-doctor"
}

main "$@"
