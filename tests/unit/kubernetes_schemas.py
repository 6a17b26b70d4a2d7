"""What the two custom resources may say, as far as the files in examples/kubernetes say it.

Field names, types and what is required are those of the OpenAPI schemas in
    kubeflow/training-operator c20bf65, manifests/base/crds/kubeflow.org_pytorchjobs.yaml
    ray-project/kuberay 017710c, helm-chart/kuberay-operator/crds/ray.io_rayclusters.yaml
An object has no other fields than those listed here, so that a new one has to be looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer"}
QUANTITY: Schema = {"anyOf": [NUMBER, {**TEXT, "pattern": r"^\d+(\.\d+)?([KMGTPE]i?|[munk])?$"}]}


def record(required: Sequence[str] = (), **fields: Schema) -> Schema:
    """An object with these fields."""
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


def some(item: Schema) -> Schema:
    """An array."""
    return {"type": "array", "items": item}


def table(value: Schema) -> Schema:
    """An object with any keys."""
    return {"type": "object", "additionalProperties": value}


def resource(api_version: str, kind: str, spec: Schema) -> Schema:
    """A whole document."""
    return record(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=record(["name"], name={**TEXT, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}),
        spec=spec,
    )


CONTAINER = record(
    ["name"],
    name=TEXT,
    image=TEXT,
    command=some(TEXT),
    args=some(TEXT),
    env=some(
        record(
            ["name"],
            name=TEXT,
            value=TEXT,
            valueFrom=record(secretKeyRef=record(["key"], name=TEXT, key=TEXT)),
        )
    ),
    resources=record(limits=table(QUANTITY), requests=table(QUANTITY)),
    volumeMounts=some(record(["name", "mountPath"], name=TEXT, mountPath=TEXT)),
)
VOLUME = record(
    ["name"],
    name=TEXT,
    persistentVolumeClaim=record(["claimName"], claimName=TEXT),
    emptyDir=record(medium=TEXT, sizeLimit=QUANTITY),
)
POD = record(spec=record(["containers"], containers=some(CONTAINER), volumes=some(VOLUME)))

REPLICAS = record(
    replicas=NUMBER,
    # The schema has any text; its description names these four.
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template=POD,
)
PYTORCHJOB = resource(
    "kubeflow.org/v1",
    "PyTorchJob",
    record(
        ["pytorchReplicaSpecs"],
        nprocPerNode=TEXT,
        runPolicy=record(backoffLimit=NUMBER, cleanPodPolicy=TEXT, ttlSecondsAfterFinished=NUMBER),
        # The schema allows any name; the operator knows these two.
        pytorchReplicaSpecs=record(Master=REPLICAS, Worker=REPLICAS),
    ),
)
RAYCLUSTER = resource(
    "ray.io/v1",
    "RayCluster",
    record(
        ["headGroupSpec"],
        rayVersion=TEXT,
        headGroupSpec=record(["template"], rayStartParams=table(TEXT), template=POD),
        workerGroupSpecs=some(
            record(
                ["groupName", "minReplicas", "maxReplicas", "template"],
                groupName=TEXT,
                replicas=NUMBER,
                minReplicas=NUMBER,
                maxReplicas=NUMBER,
                rayStartParams=table(TEXT),
                template=POD,
            )
        ),
    ),
)
SCHEMAS: dict[str, Schema] = {"PyTorchJob": PYTORCHJOB, "RayCluster": RAYCLUSTER}
