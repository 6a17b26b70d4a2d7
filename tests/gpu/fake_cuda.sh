#!/usr/bin/env bash
# tests/gpu/fake_cuda.py in an environment of its own, which has torch's CUDA build; no GPU is needed.
#
#   tests/gpu/fake_cuda.sh DIR [CONFIG:RANK ...]    DIR: the environment, made there if there is none
set -euo pipefail

root="$(dirname "$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")")"
[[ $# -ge 1 ]] || {
  printf 'usage: %s DIR [CONFIG:RANK ...]\n' "$0" >&2
  exit 2
}
venv="$(realpath -m "$1")"
shift
if [[ ! -x "$venv/bin/python" ]]; then
  python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet torch==2.13.0 megatron-core==0.16.1 \
    transformers omegaconf psutil pyarrow datasets
fi
"$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || {
  printf '%s: its torch is not a CUDA build; install one there\n' "$venv" >&2
  exit 2
}
cd "$root"
export TORCHDYNAMO_DISABLE=1  # it would ask the driver for a stream
PYTHONPATH="$root" exec "$venv/bin/python" -m tests.gpu.fake_cuda "$@"
