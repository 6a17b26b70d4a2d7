# The GPU environment and this repository.
#
#   docker build -t gpg_megatron .
#   docker build -t gpg_megatron --build-arg SETUP_OPTIONS=--transformer-engine .
#   docker run --gpus all --ipc host --ulimit nofile=65536 -v MODELS:/models gpg_megatron gpg-doctor
#
# --ipc host: engines, Ray and the bridge use /dev/shm. docs/install-gpu.md says what of this was
# never run.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
  && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    build-essential git iproute2 numactl python3.12 python3.12-dev python3.12-venv \
  && rm -rf /var/lib/apt/lists/*

WORKDIR /gpg_megatron
COPY . .
ENV GPG_VENV=/opt/gpg PATH=/opt/gpg/bin:$PATH PIP_NO_CACHE_DIR=1
ARG SETUP_OPTIONS=""
RUN launch/setup_gpu_env.sh ${SETUP_OPTIONS}
