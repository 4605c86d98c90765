"""Recipes of several nodes on Kubernetes: the LeaderWorkerSet made from them.

The API's published schema is not ours to keep. DSA_TEST_LWS_CRD names a copy, and the manifests are
then checked against all of it:
https://github.com/kubernetes-sigs/lws/blob/main/config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dsa_plugin.recipes import load_recipe, recipe_names
from dsa_plugin.recipes.kubernetes import manifests

NAMES = [name for name in recipe_names() if load_recipe(name).hardware.nodes > 1]
IMAGE = "registry.example/dsa:1"


@pytest.mark.parametrize("name", NAMES)
def test_leader_and_workers_run_the_recipe(name: str) -> None:
    recipe = load_recipe(name)
    lws, service = manifests(recipe, name, IMAGE)
    template = lws["spec"]["leaderWorkerTemplate"]
    assert template["size"] == recipe.hardware.nodes
    pods = [template["leaderTemplate"], template["workerTemplate"]]
    containers = [pod["spec"]["containers"][0] for pod in pods]
    ranks = [c["command"][c["command"].index("--node-rank") + 1] for c in containers]
    assert ranks == ["0", "$(LWS_WORKER_INDEX)"]
    for container in containers:
        assert container["image"] == IMAGE
        assert any("$(LWS_LEADER_ADDRESS)" in word for word in container["command"])
        assert container["resources"]["limits"] == {"nvidia.com/gpu": recipe.hardware.count}
    labels = template["leaderTemplate"]["metadata"]["labels"]
    assert labels.items() <= service["spec"]["selector"].items()
    port = containers[0]["ports"][0]["containerPort"]
    assert service["spec"]["ports"][0]["targetPort"] == port
    assert containers[0]["readinessProbe"]["httpGet"]["port"] == port


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    """The published schema, in which a key that it does not name is a fault."""
    path = os.environ.get("DSA_TEST_LWS_CRD")
    if not path:
        pytest.skip("DSA_TEST_LWS_CRD names no copy of the published schema")
    definition = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    [version] = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    _close(schema)
    return schema


@pytest.mark.parametrize("name", NAMES)
def test_the_published_schema_takes_it(name: str, published: dict[str, Any]) -> None:
    jsonschema.validate(manifests(load_recipe(name), name, IMAGE)[0], published)


def _close(schema: Any) -> None:
    if isinstance(schema, list):
        for item in schema:
            _close(item)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if key != "metadata":  # whose keys every kind of object shares, and which has none here
                _close(value)
        if isinstance(schema.get("properties"), dict):
            schema.setdefault("additionalProperties", False)
