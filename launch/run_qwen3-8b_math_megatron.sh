#!/usr/bin/env bash
# Trains Qwen3-8B on GSM8K and MATH with configs/qwen3-8b_math_megatron.yaml.
#
#   MODEL_PATH=DIR launch/run_qwen3-8b_math_megatron.sh [a.b=value ...]   overrides of the configuration
#   MODEL_PATH=DIR launch/run_qwen3-8b_math_megatron.sh --dry-run         says what it would do
#
# The environment variables are described in launch/flagship.sh.
set -euo pipefail

source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/flagship.sh"
flagship configs/qwen3-8b_math_megatron.yaml "$@"
