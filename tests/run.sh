#!/usr/bin/env bash
# Static checks, then the tests that need neither minutes nor a GPU. Stops at the first stage
# that fails.
#
#   tests/run.sh [pytest arguments]     for example: tests/run.sh -m gpu, tests/run.sh -k config
#   GPG_PYTHON=PYTHON tests/run.sh      uses this interpreter's environment as it is, instead of
#                                       making the CPU environment (for machines with a GPU)
set -euo pipefail

root="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
unset PYTHONPATH PYTHONHOME
if [[ -n "${GPG_PYTHON:-}" ]]; then
  python="$(command -v "$GPG_PYTHON")" || {
    printf '[check] GPG_PYTHON=%s: no such program\n' "$GPG_PYTHON" >&2
    exit 2
  }
  python="$(realpath -s "$python")"
  export PATH="$(dirname "$python"):$PATH"
else
  GPG_VENV="$(realpath -m "${GPG_VENV:-$root/.venv}")"
  export GPG_VENV PATH="$GPG_VENV/bin:$PATH"
  "$root/launch/setup_cpu_env.sh"
  python="$GPG_VENV/bin/python"
fi
cd "$root"

stage() {
  local name="$1" begin=$SECONDS
  shift
  printf '[check] %s\n' "$name"
  "$@" || {
    local code=$?
    printf '[check] %s failed with exit code %s\n' "$name" "$code" >&2
    exit "$code"
  }
  printf '[check] %s: %s s\n' "$name" "$((SECONDS - begin))"
}

stage "ruff check" "$python" -m ruff check .
stage "ruff format" "$python" -m ruff format --check .
stage "mypy" "$python" -m mypy
stage "pytest" "$python" -m pytest -n 2 --no-loadscope-reorder \
  -m "not slow and not gpu" --durations=20 "$@"
