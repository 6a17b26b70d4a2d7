"""The rows of docs/gpu-status.md, in the order in which the kit runs them."""

from __future__ import annotations

from tests.gpu.kit_process import Row

AT = "tests.gpu.rows."

ROWS = (
    Row(
        name="device",
        what="the device, its process groups, what it can do at best",
        function=f"{AT}device:device_and_groups",
    ),
    Row(
        name="step-fp32",
        what="updates of seven small models against transformers in float64 on the CPU",
        function=f"{AT}step:fp32",
    ),
    Row(
        name="step-bf16",
        what="small updates in bf16: gradients and master weights in fp32",
        function=f"{AT}step:bf16",
    ),
    Row(
        name="optimizer-sharded",
        what="the same with the distributed optimizer of one rank",
        function=f"{AT}step:sharded_optimizer",
    ),
    Row(
        name="recompute",
        what="the gradient of an update under each policy.recompute",
        function=f"{AT}step:recompute",
    ),
    Row(
        name="memory",
        what="the allocator's peak of an update against the dry run",
        function=f"{AT}memory:peak",
        needs=("a GPU",),
    ),
    Row(
        name="attention",
        what="packed attention by span and in one call, forward and backward, against the CPU",
        function=f"{AT}attention:equal",
    ),
    Row(
        name="attention-shapes",
        what="seconds for 30 rows of new shapes, with cuDNN and without",
        function=f"{AT}attention:new_shapes",
    ),
    Row(
        name="attention-speed",
        what="tokens/s of a 7B layer's attention, and the share of the peak",
        function=f"{AT}attention:speed",
    ),
    Row(
        name="logprobs",
        what="log-probs of a 7B model's vocabulary, in one chunk and in many",
        function=f"{AT}logprobs:chunks",
    ),
    Row(
        name="resume",
        what="a run cut in half and resumed against one that is not, bit by bit",
        function=f"{AT}saving:resume",
    ),
    Row(
        name="offload",
        what="memory that offloading gives back, what it pins, how fast, and that nothing changes",
        function=f"{AT}memory:offload",
    ),
    Row(
        name="publish-shm",
        what="from a policy into another process's parameters over shared memory",
        function=f"{AT}publish:shm",
    ),
    Row(
        name="publish-ipc",
        what="the same over CUDA memory, the GPU under another number; with expandable segments",
        function=f"{AT}publish:cuda_ipc",
        needs=("a GPU",),
    ),
    Row(
        name="publish-killed",
        what="a sender dies between two buckets: the worker gives up, the next sender succeeds",
        function=f"{AT}publish:killed",
    ),
    Row(
        name="engine",
        what="publishing into vLLM engines, which then compute with the weights",
        function=f"{AT}engines:engine",
        needs=("a GPU", "vLLM"),
        limit_s=450.0,
    ),
    Row(
        name="sleep",
        what="an engine's sleep and wake",
        function=f"{AT}engines:sleep",
        needs=("a GPU", "vLLM"),
        limit_s=300.0,
    ),
    Row(
        name="colocated",
        what="a whole job, colocated",
        function=f"{AT}engines:colocated",
        needs=("a GPU", "vLLM"),
        limit_s=450.0,
    ),
    Row(
        name="tp2",
        what="step-fp32 under tensor parallelism of two ranks",
        function=f"{AT}step:tp2",
        needs=("two GPUs",),
    ),
    Row(
        name="pp2",
        what="step-fp32 under pipeline parallelism of two ranks",
        function=f"{AT}step:pp2",
        needs=("two GPUs",),
    ),
    Row(
        name="vpp2",
        what="the same with two interleaved runs of layers on each rank",
        function=f"{AT}step:vpp2",
        needs=("two GPUs",),
    ),
    Row(
        name="dp2",
        what="step-fp32 under data parallelism of two ranks",
        function=f"{AT}step:dp2",
        needs=("two GPUs",),
    ),
    Row(
        name="publish-peers",
        what="publishing to another GPU of the host",
        function=f"{AT}publish:peers",
        needs=("a GPU", "two GPUs"),
    ),
    Row(
        name="publish-network",
        what="publishing as between hosts: over NCCL, on a CPU over gloo",
        function=f"{AT}publish:network",
        needs=("two GPUs",),
    ),
)
