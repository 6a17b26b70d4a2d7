#!/usr/bin/env bash
# The whole job on a machine without a GPU: environment, demo model and data, GPG training.
#
#   launch/run_demo_cpu.sh [a.b=value ...]     overrides of configs/demo_cpu.yaml
#
# Relative paths in the configuration and in overrides start at the repository.
# GPG_VENV=DIR chooses the environment's folder, see setup_cpu_env.sh.
set -euo pipefail

root="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
venv="$(realpath -m "${GPG_VENV:-$root/.venv}")"
export GPG_VENV="$venv" PATH="$venv/bin:$PATH"
unset PYTHONPATH PYTHONHOME
cd "$root"

phase() {
  local name="$1" begin=$SECONDS code=0
  shift
  "$@" || code=$?
  printf '[demo] %s: %s s%s\n' "$name" "$((SECONDS - begin))" "$( ((code)) && echo ", failed")"
  return "$code"
}

phase "set-up" launch/setup_cpu_env.sh
phase "model and data" python -m gpg_megatron.demo.make --out runs/demo_model
phase "training" gpg-train --config configs/demo_cpu.yaml "$@"
