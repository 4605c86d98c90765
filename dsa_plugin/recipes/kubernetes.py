"""A recipe of several nodes as a LeaderWorkerSet (https://lws.sigs.k8s.io), and its Service.

The Kubernetes controller starts one pod a node and tells each its number and the leader's address
in environment variables; https://lws.sigs.k8s.io/docs/reference/labels-annotations-and-environment-variables
"""

from __future__ import annotations

import re
from typing import Any

from dsa_plugin.recipes.command import PORTS, Node, command
from dsa_plugin.recipes.schema import Recipe

_LEADER = "$(LWS_LEADER_ADDRESS)"
_INDEX = "$(LWS_WORKER_INDEX)"
_ROLE = "role"


def manifests(
    recipe: Recipe, name: str, image: str, *, model: str | None = None
) -> list[dict[str, Any]]:
    """The LeaderWorkerSet, and the Service that leads to its leader.

    Args:
        name: the recipe's, from which the objects' name is made.
        image: of the containers: the host's with the plugin in it.
        model: in place of the recipe's.
    """
    object_name = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    leader = _pod(recipe, image, model, Node(0, _LEADER))
    leader["metadata"] = {"labels": {_ROLE: "leader"}}
    lws = {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": object_name},
        "spec": {
            "replicas": 1,
            "leaderWorkerTemplate": {
                "size": recipe.hardware.nodes,
                # One rank that dies takes the process group with it.
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": leader,
                "workerTemplate": _pod(recipe, image, model, Node(_INDEX, _LEADER)),
            },
        },
    }
    port = PORTS[recipe.host_name]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": object_name},
        "spec": {
            "selector": {"leaderworkerset.sigs.k8s.io/name": object_name, _ROLE: "leader"},
            "ports": [{"name": "http", "port": port, "targetPort": port}],
        },
    }
    return [lws, service]


def _pod(recipe: Recipe, image: str, model: str | None, node: Node) -> dict[str, Any]:
    port = PORTS[recipe.host_name]
    listen = ["--host", "0.0.0.0", "--port", str(port)]
    container: dict[str, Any] = {
        "name": recipe.host_name,
        "image": image,
        "command": command(recipe, model=model, node=node, overrides=listen),
        "env": [{"name": name, "value": value} for name, value in recipe.env.items()],
        "resources": {"limits": {_resource(recipe): recipe.hardware.count}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    if node.rank == 0:
        container["ports"] = [{"containerPort": port}]
        container["readinessProbe"] = {
            "httpGet": {"path": "/health", "port": port},
            "periodSeconds": 10,
        }
    # NCCL between a node's GPUs goes through shared memory; the default is 64 MiB.
    memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}
    return {"spec": {"containers": [container], "volumes": [memory]}}


def _resource(recipe: Recipe) -> str:
    return "amd.com/gpu" if recipe.hardware.gpu.startswith("mi") else "nvidia.com/gpu"
