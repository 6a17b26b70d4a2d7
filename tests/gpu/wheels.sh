#!/usr/bin/env bash
# Collects the wheels that the kit needs beside torch, triton and transformers, for a machine with
# Python 3.12 and no internet. Versions are those of requirements-cpu.lock. About 5 MB.
#
#   tests/gpu/wheels.sh DIR
#   there: python3 -m pip install --no-index --no-deps --target SITE DIR/*.whl
#          PYTHONPATH=SITE python3 -m tests.gpu.kit
set -euo pipefail

[[ $# == 1 ]] || {
  printf 'usage: tests/gpu/wheels.sh DIR\n' >&2
  exit 2
}
root="$(dirname "$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")")"
packages=(
  antlr4-python3-runtime megatron-core omegaconf psutil xxhash                    # the rows
  hypothesis iniconfig pluggy pygments pytest pytest-timeout sortedcontainers     # tests/unit
)
pinned=()
for package in "${packages[@]}"; do
  pinned+=("$(grep -ix "$package==.*" "$root/requirements-cpu.lock")")
done
platforms=()
for version in 2_28 2_27 2_24 2_17 2_12 2_5; do
  platforms+=(--platform "manylinux_${version}_x86_64")
done
for version in 2014 2010 1; do
  platforms+=(--platform "manylinux${version}_x86_64")
done
"${GPG_PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
  "${platforms[@]}" --dest "$1" "${pinned[@]}"
du -sh "$1"
