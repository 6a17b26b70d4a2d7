"""gpg-train: check everything, start torchrun with the world that the configuration asks for
(launcher.py).

Under torchrun it joins that world instead.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gpg_megatron.errors import UserError, exit_codes, torchrun_rank

if TYPE_CHECKING:
    import argparse

    from gpg_megatron.config.sections import Config


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input or configuration, 75 left in order, 1 anything
    else."""
    # A batch system sends it to all processes of a job; it is the launcher's alone, see leaving.py.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    rank = torchrun_rank()
    if rank is not None:
        # The launcher passes Ctrl-C on; a rank ends by it without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Here, because they take seconds, and Ctrl-C is one line then, too.
    from gpg_megatron.config.loading import load_config
    from gpg_megatron.model.hub import fetched, shape_directory
    from gpg_megatron.start.hosts import hosts_of
    from gpg_megatron.start.launcher import launch

    arguments = _parser().parse_intermixed_args(argv)
    config, hosts = load_config(arguments.config, arguments.overrides), hosts_of(arguments)
    if arguments.dry_run:
        directory = shape_directory(config.model)
        config = replace(config, model=replace(config.model, path=str(directory), revision=None))
    elif rank is None:
        config = replace(config, model=fetched(config.model))
    if not rank and hosts.rank == 0:
        _warn(config)
    if arguments.dry_run:
        return dry_run(config, arguments)
    if rank is not None:
        from gpg_megatron.start.rank import run_rank

        return run_rank(config)
    if arguments.check:
        return check(config, hosts.ranks_of_a_host(config.policy.world_size))
    given = [f"--config={arguments.config}", *arguments.overrides]
    if config.model.revision:
        given.append(f"model.revision={config.model.revision}")
    return launch(config, given, hosts)


def _parser() -> argparse.ArgumentParser:
    import argparse

    from gpg_megatron import __version__
    from gpg_megatron.start.hosts import add_host_options

    parser = argparse.ArgumentParser(prog="gpg-train", description="Train a model with GPG.")
    parser.add_argument("--version", action="version", version=__version__)
    text = "YAML, or the name of one that comes with the package"
    parser.add_argument("--config", required=True, metavar="FILE", help=text)
    parser.add_argument(
        "--check", action="store_true", help="say what would keep the run from starting"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what the run will do; needs config.json only"
    )
    parser.add_argument(
        "--gpu-memory-gb", type=float, default=80.0, help="of each GPU, GiB, for --dry-run"
    )
    parser.add_argument(
        "--host-memory-gb", type=float, default=2048.0, help="of each host, GiB, for --dry-run"
    )
    parser.add_argument(
        "--gpus-per-host", type=int, default=8, help="GPUs of each host, for --dry-run"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="replaces a key")
    add_host_options(parser)
    return parser


def _warn(config: Config) -> None:
    """What is legal and yet likely not meant, once for a run."""
    from gpg_megatron.config.rules import config_warnings
    from gpg_megatron.host.reaper import RUN_ID_VARIABLE
    from gpg_megatron.loop.inputs import model_files
    from gpg_megatron.model.shape import shape_warnings

    if RUN_ID_VARIABLE not in os.environ:
        for line in (*config_warnings(config), *shape_warnings(model_files(config))):
            print(f"warning: {line}", file=sys.stderr)


def check(config: Config, n_ranks: int) -> int:
    """Everything that a start would check on this host, without one. Raises UserError."""
    from gpg_megatron.start.preflight import check_devices, preflight, summary

    check_devices(config, n_ranks)
    print("\n".join(summary(config, preflight(config, n_ranks))))
    return 0


def dry_run(config: Config, arguments: argparse.Namespace) -> int:
    """Print the plan of a run. Without a GPU here, trainer.device=auto is planned for CPU."""
    from gpg_megatron.host.device import resolve_device
    from gpg_megatron.start.dry_run import plan_run
    from gpg_megatron.start.dry_run_text import lines
    from gpg_megatron.start.run_plan import Machine

    device = config.trainer.device
    if device == "auto":
        device = resolve_device("auto")
    if arguments.gpus_per_host < 1:
        raise UserError(f"--gpus-per-host is {arguments.gpus_per_host}; expected at least 1")
    machine = Machine(
        gpu_gib=arguments.gpu_memory_gb,
        gpus=arguments.gpus_per_host,
        host_gib=arguments.host_memory_gb,
    )
    print("\n".join(lines(plan_run(config, device=device, machine=machine))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
