"""Recipes: what their files may say, and the commands, files and sizes made from them."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dsa_plugin.recipes import FOLDER, load_recipe, recipe_names
from dsa_plugin.recipes.check import check_recipes
from dsa_plugin.recipes.command import Node, command
from dsa_plugin.recipes.describe import describe
from dsa_plugin.recipes.needs import compute_needs
from dsa_plugin.recipes.render import render
from dsa_plugin.recipes.schema import Recipe, json_schema, parse_recipe

ROOT = Path(__file__).resolve().parents[2]
NAMES = recipe_names()
SMALL_GPUS = ("a100-80g", "rtx-pro-6000")
MULTI_NODE = [name for name in NAMES if load_recipe(name).hardware.nodes > 1]
MINIMAL: dict[str, Any] = {
    "model": "zai-org/GLM-5.2-FP8",
    "weights": "fp8",
    "host": "vllm>=0.32,<0.34",
    "hardware": {"gpu": "h200", "count": 8},
    "image": None,
    "args": {"tensor-parallel-size": 8},
    "expected": "unmeasured",
    "notes": "",
}


def test_every_deployment_is_there() -> None:
    hardware = ("h200-2x8", "mi355x-x8", "a100-80g-x8", "a100-80g-x16", "rtx-pro-6000-x8")
    places = [
        *(f"{host}-{where}" for host in ("vllm", "sglang") for where in hardware),
        *("vllm-h200-x8-dp8", "vllm-h200-x8-tp8", "sglang-h200-x8"),
    ]
    models = ("deepseek-v3.2-exp", "deepseek-v3.2", "glm-5.2")
    expected = {f"{model}/{place}" for model in models for place in places}
    # Of GLM-5.3 there are fp8 weights alone that can be sized: no 4 bits for GPUs without fp8.
    fp8 = {place.replace("glm-5.2", "glm-5.3") for place in expected if "glm-5.2/" in place}
    fp8 -= {f"glm-5.3/{host}-{gpu}-x8" for host in ("vllm", "sglang") for gpu in SMALL_GPUS}
    expected |= fp8 - {"glm-5.3/sglang-a100-80g-x16"}
    assert set(NAMES) == expected | {"demo/vllm-cpu", "demo/sglang-cpu"}


@pytest.mark.parametrize("name", NAMES)
def test_name_and_content_agree(name: str) -> None:
    recipe = load_recipe(name)
    place = name.partition("/")[2]
    gpu = recipe.hardware.gpu
    assert place.startswith(f"{recipe.host_name}-{gpu}")
    if gpu != "cpu":
        assert f"x{recipe.gpus}" in place or f"{recipe.hardware.nodes}x8" in place


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_what_dsa_plan_says(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.needs == compute_needs(recipe), "run ci/recipes"


PUBLISHED = json.loads((FOLDER / "recipe.schema.json").read_text(encoding="utf-8"))


def test_the_published_schema_is_the_one_in_force() -> None:
    assert json.loads(json_schema()) == PUBLISHED, "run ci/recipes"


@pytest.mark.parametrize("name", NAMES)
def test_the_published_schema_validates(name: str) -> None:
    data = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(data, PUBLISHED)
    with pytest.raises(jsonschema.ValidationError, match="modle"):
        jsonschema.validate({**data, "modle": "x"}, PUBLISHED)


def test_the_list_has_every_recipe() -> None:
    spec = spec_from_file_location("ci_recipes", ROOT / "ci" / "recipes.py")
    assert spec
    assert spec.loader
    script: Any = module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert page == script.with_table(page), "run ci/recipes"
    assert all(f"({name}.yaml)" in page for name in NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, "modle: no such key; did you mean model?"),
        ({"hardware": {"gpu": "h200", "counts": 8}}, "hardware.counts: no such key; did you mean "),
        ({"args": {"--tensor-parallel-size": 8}}, "args.--tensor-parallel-size"),
        ({"args": {"enable-prefix-caching": False}}, "enable-prefix-caching is false"),
        ({"hardware": {"gpu": "h2000", "count": 8}}, "hardware.gpu: GPU 'h2000' is not known"),
        ({"host": "vllm"}, "give vllm or sglang and a version range"),
        ({"host": "ollama>=1"}, "give vllm or sglang and a version range"),
        ({"env": {"NCCL_DEBUG": "a b"}}, "env.NCCL_DEBUG"),
        ({"expected": "fast"}, "expected"),
        ({"needs": {"weights_gb_per_gpu": "many"}}, "needs.weights_gb_per_gpu"),
    ],
)
def test_a_bad_key_or_value_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="is not a recipe") as caught:
        parse_recipe(MINIMAL | change, "mine.yaml")
    assert message in str(caught.value)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ValueError, match="is not a recipe") as caught:
        parse_recipe(MINIMAL | {"modle": "x", "weights": "int3"}, "mine.yaml")
    assert "modle" in str(caught.value)
    assert "weights" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("glm-5.2/vllm-h200-8x", "did you mean glm-5.2/vllm-h200-2x8?"),
        ("demo/sglang", "did you mean demo/sglang-cpu?"),
    ],
)
def test_an_unknown_recipe_names_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match="there is no recipe") as caught:
        load_recipe(name)
    assert message in str(caught.value)


def test_a_file_that_is_not_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: [")
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(str(path))


def test_a_file_that_is_not_there_or_empty(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with pytest.raises(
        FileNotFoundError, match=r"there is no file .*mine\.yaml; .*dsa recipe list"
    ):
        load_recipe(str(path))
    path.touch()
    with pytest.raises(ValueError, match=r"mine\.yaml holds nothing, .*start from a copy"):
        load_recipe(str(path))


def test_check_asks_only_a_host_that_the_recipe_is_for(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"host": "vllm>=99"}))
    [finding] = check_recipes([str(path)])
    assert finding.verdict == "keys"
    assert finding.text.startswith("flags not checked: for vllm>=99, and here vllm ")


def test_a_context_that_does_not_fit_is_refused() -> None:
    recipe = parse_recipe(MINIMAL, "mine.yaml")  # all of GLM-5.2's 1,048,576 tokens
    with pytest.raises(ValueError, match="lower --max-model-len"):
        compute_needs(recipe)


def _minimal(**change: Any) -> Recipe:
    return parse_recipe(MINIMAL | change, "mine.yaml")


def test_command_of_one_node() -> None:
    recipe = _minimal(
        args={"enable-expert-parallel": True, "speculative-config": {"method": "mtp"}}
    )
    line = command(recipe, model="/checkpoint", overrides=["--port", "1"])
    assert line == [
        *("vllm", "serve", "/checkpoint", "--enable-expert-parallel"),
        *("--speculative-config", '{"method": "mtp"}', "--port", "1"),
    ]


def test_command_of_several_nodes() -> None:
    several = {"gpu": "h200", "count": 8, "nodes": 2}
    vllm = command(_minimal(hardware=several), node=Node(1, "head"))
    assert vllm[-7:] == [
        *("--nnodes", "2", "--node-rank", "1", "--master-addr", "head", "--headless")
    ]
    assert "--headless" not in command(_minimal(hardware=several), node=Node(0, "head"))
    sglang = _minimal(hardware=several, host="sglang>=0.5.23")
    assert command(sglang, node=Node(1, "head"))[-4:] == [
        *("--node-rank", "1", "--dist-init-addr", "head:20000")
    ]


@pytest.mark.parametrize(
    ("nodes", "node", "message"),
    [
        (2, None, "run it on each, with --node-rank 0 to 1"),
        (2, Node(2, "head"), "--node-rank 2; allowed: 0 to 1"),
        (1, Node(0, "head"), "are for recipes of several nodes"),
    ],
)
def test_a_node_is_named_where_there_are_several(
    nodes: int, node: Node | None, message: str
) -> None:
    recipe = _minimal(hardware={"gpu": "h200", "count": 8, "nodes": nodes})
    with pytest.raises(ValueError, match=message):
        command(recipe, node=node)


def test_render_writes_what_the_host_reads(tmp_path: Path) -> None:
    recipe = load_recipe("glm-5.2/vllm-mi355x-x8")
    text = render(recipe, "glm-5.2/vllm-mi355x-x8", tmp_path, model="/checkpoint")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config == {"model": "/checkpoint", **recipe.args}
    assert "VLLM_ROCM_USE_AITER=1\n" in (tmp_path / "env").read_text()
    assert f"vllm serve --config {tmp_path / 'config.yaml'}" in text
    assert not (tmp_path / "lws.yaml").exists()


@pytest.mark.parametrize("name", NAMES)
def test_show_says_what_was_measured_and_how_to_start(name: str) -> None:
    recipe = load_recipe(name)
    text = describe(recipe, name)
    assert ("unmeasured" in text) == (recipe.expected == "unmeasured")
    assert recipe.model in text
    assert text.count("--node-rank") == (recipe.hardware.nodes if name in MULTI_NODE else 0)
