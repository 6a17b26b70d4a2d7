"""One rank of the world that torchrun made, from its start to its last words."""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from gpg_megatron.config.sections import Config
from gpg_megatron.errors import EXIT_STOPPED, RunError, UserError, reason_of
from gpg_megatron.host.reaper import RUN_ID_VARIABLE, new_run_id, start_reaper
from gpg_megatron.host.words import leave_words

if TYPE_CHECKING:
    from gpg_megatron.host.device import Device
    from gpg_megatron.shapes import ModelShape

RANK0_GRACE_S = 30.0
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """From now on this process is killed when the agent that started it, the launcher's or another
    torchrun, is gone, however that ended. Linux only."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone by then
        os.kill(os.getpid(), signal.SIGKILL)


def run_rank(config: Config) -> int:
    """Returns the exit code. Raises UserError."""
    import torch.distributed as dist

    from gpg_megatron.host.allocator import keep_freed_memory
    from gpg_megatron.host.collectives import on_rank0
    from gpg_megatron.host.device import (
        init_process_group,
        is_lost_peer,
        resolve_device,
        set_threads,
    )
    from gpg_megatron.policy.on_cpu import hide_gpu_libraries, quiet_megatron

    die_with_parent()
    device = resolve_device(config.trainer.device)
    quiet_megatron()
    if device == "cpu":
        hide_gpu_libraries()
    from gpg_megatron.loop.inputs import check_model
    from gpg_megatron.start.dry_run import settled

    set_threads(config.policy.num_threads)
    if device == "cpu":
        keep_freed_memory()
    world = int(os.environ["WORLD_SIZE"])
    if world != config.policy.world_size:
        raise UserError(
            f"torchrun started {world} processes, but TP x PP x DP of the policy section is "
            f"{config.policy.world_size}; expected equal numbers"
        )
    is_launched = RUN_ID_VARIABLE in os.environ
    shape = check_model(config)
    init_process_group(device, config.policy.timeout_s)
    try:
        return _train(on_rank0(lambda: settled(config, device)), shape, device)
    except (RunError, TimeoutError) as error:
        if dist.get_rank() and getattr(error, "everywhere", False):
            time.sleep(RANK0_GRACE_S)  # rank 0 says it; the launcher ends this rank then
        else:
            _say_why(str(error), is_last=not is_launched)
        return 1
    except UserError:
        raise
    except Exception as error:
        if not (isinstance(error, RuntimeError) and is_lost_peer(error)):
            leave_words(f"policy rank {dist.get_rank()} ended: {reason_of(error)}")
            raise
        print(f"policy rank {dist.get_rank()} lost its connection to another", file=sys.stderr)
        return 1
    finally:
        dist.destroy_process_group()


def _train(config: Config, shape: ModelShape, device: Device) -> int:
    import torch.distributed as dist

    from gpg_megatron.host.collectives import kept_on_rank0, on_rank0
    from gpg_megatron.host.lock import locked
    from gpg_megatron.loop.engines import start_engines

    run_id = on_rank0(_own_run)
    with ExitStack() as held:
        on_rank0(lambda: held.enter_context(locked(config.trainer.output_dir)))
        # Megatron's import takes seconds: those of rank 0 pass while the engines start, those of
        # the others while Ray does.
        if dist.get_rank():
            importlib.import_module("gpg_megatron.loop.build")
        engines = kept_on_rank0(
            lambda: held.enter_context(closing(start_engines(config, shape, device, run_id))),
            on_rank0,
        )
        from gpg_megatron.loop.build import build_run
        from gpg_megatron.loop.trainer import train

        left = train(held.enter_context(build_run(config, shape, device, run_id, engines)))
    if not left:
        return 0
    # The first rank that ends so is the end of all others: rank 0 has closed everything by now.
    on_rank0(lambda: None)
    return EXIT_STOPPED


def _say_why(text: str, *, is_last: bool) -> None:
    """What ended the run: what belongs to it at once, and the reason for the launcher to print at
    the very end; or here, where torchrun itself is the launcher."""
    reason, *details = text.splitlines()
    leave_words(reason)
    for line in (*details, *([f"error: {reason}"] if is_last else [])):
        print(line, file=sys.stderr)


def _own_run() -> str:
    """The run that the launcher opened, or, under somebody else's torchrun, a new one."""
    if RUN_ID_VARIABLE not in os.environ:
        os.environ[RUN_ID_VARIABLE] = new_run_id()
        start_reaper(os.environ[RUN_ID_VARIABLE])
    return os.environ[RUN_ID_VARIABLE]
