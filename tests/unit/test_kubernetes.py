"""The manifests in examples/kubernetes: their fields, and what the commands in them do."""

from __future__ import annotations

import os
import re
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from gpg_megatron.config.loading import load_config
from gpg_megatron.config.sections import Config
from tests.unit.kubernetes_schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "examples" / "kubernetes").glob("*.yaml"))
GPU = "nvidia.com/gpu"


def documents(file: Path) -> dict[str, Any]:
    """Kind -> resource."""
    return {one["kind"]: one for one in yaml.safe_load_all(file.read_text())}


def check(document: Any) -> None:
    Draft202012Validator(SCHEMAS[document["kind"]]).validate(document)


def container(template: Any) -> Any:
    (only,) = template["spec"]["containers"]
    return only


def replicas(file: Path) -> dict[str, Any]:
    spec: dict[str, Any] = documents(file)["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
    return spec


def config_of(file: Path) -> Config:
    """As every rank loads it."""
    given, *overrides = container(replicas(file)["Master"]["template"])["args"]
    return load_config(given.removeprefix("--config="), overrides)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_resource_has_the_fields_of_its_schema(file: Path) -> None:
    assert documents(file).keys() <= SCHEMAS.keys()
    for document in documents(file).values():
        check(document)
        wrong = deepcopy(document)
        wrong["spec"]["nprocPerHost"] = "8"
        with pytest.raises(ValidationError, match="nprocPerHost"):
            check(wrong)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_torchrun_starts_as_many_ranks_as_the_configuration_has(file: Path, tmp_path: Path) -> None:
    """The pod's own command, with a torchrun that prints what torch reads from its arguments and
    from what the operator sets."""
    from torch.distributed.run import get_args_parser

    for name, script in (
        ("torchrun", 'printf "%s\\n" "$@"'),
        ("ray", 'test "$1" = start; printf "%s\\n" "$2" >&2'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    spec = documents(file)["PyTorchJob"]["spec"]
    n_pods = sum(one["replicas"] for one in spec["pytorchReplicaSpecs"].values())
    operator = {
        "MASTER_ADDR": "gpg-master-0", "MASTER_PORT": "23456", "PET_NNODES": str(n_pods),
        "PET_NPROC_PER_NODE": spec["nprocPerNode"], "PET_NODE_RANK": str(n_pods - 1),
    }  # fmt: skip
    pod = container(spec["pytorchReplicaSpecs"]["Master"]["template"])
    done = subprocess.run(
        [*pod["command"], *pod["args"]],
        env=operator | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in operator.items():
            patch.setenv(name, value)
        found = get_args_parser().parse_args(done.stdout.splitlines())
    assert (found.module, found.training_script) == (True, "gpg_megatron.start.train")
    assert found.training_script_args == pod["args"]
    assert int(found.nnodes) * int(found.nproc_per_node) == config_of(file).policy.world_size
    assert int(found.node_rank) == n_pods - 1
    if n_pods > 1:
        assert found.master_addr == "gpg-master-0" and int(found.master_port) == 23456
        assert done.stderr == f"--address={config_of(file).rollout.ray_address}\n"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_pods_have_the_gpus_and_the_folders_of_the_run(file: Path) -> None:
    config, found = config_of(file), documents(file)
    rollout, n_ranks = config.rollout, int(found["PyTorchJob"]["spec"]["nprocPerNode"])
    templates = [one["template"] for one in replicas(file).values()]
    for template in templates:
        assert container(template)["resources"]["limits"][GPU] == n_ranks
    n_for_engines = rollout.num_engines * rollout.tensor_model_parallel_size
    if "RayCluster" in found:
        assert config.trainer.placement == "disaggregated"
        spec = found["RayCluster"]["spec"]
        (group,) = spec["workerGroupSpecs"]
        limits = container(group["template"])["resources"]["limits"]
        assert group["replicas"] * limits[GPU] == n_for_engines
        assert int(limits["cpu"]) >= limits[GPU], "an engine asks Ray for one"
        name = found["RayCluster"]["metadata"]["name"]
        assert rollout.ray_address == f"{name}-head-svc:6379"
        locked = re.search("^ray==(.+)$", (ROOT / "requirements-gpu.lock").read_text(), re.M)
        assert locked and spec["rayVersion"] == locked[1], "all nodes of a cluster need the same"
        tokens = [container(x)["env"] for x in (*templates, spec["headGroupSpec"]["template"])]
        templates.append(group["template"])
        assert all(env == container(group["template"])["env"] for env in tokens)
    else:
        assert config.trainer.placement == "colocated" and n_for_engines <= n_ranks
        assert rollout.ray_address is None
    paths = [*config.data.train_files, config.model.path, config.trainer.output_dir]
    for template in templates:
        names = {volume["name"] for volume in template["spec"]["volumes"]}
        mounts = {x["mountPath"]: x["name"] for x in container(template)["volumeMounts"]}
        assert "/dev/shm" in mounts and set(mounts.values()) == names
        assert all(path.startswith(tuple(f"{place}/" for place in mounts)) for path in paths)
