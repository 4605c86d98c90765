"""Every recipe's flags go through its host's own parser and configuration, as on the recipe's GPUs.

A flag that a release of a host renames or drops turns these red. One process a host asks for all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from dsa_plugin.planning.gpus import GPUS
from dsa_plugin.probe.ask import Answer, Question, Target, ask
from dsa_plugin.recipes import load_recipe, recipe_names
from dsa_plugin.recipes.check import host_arguments
from dsa_plugin.recipes.schema import HostName, Recipe
from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.released import write_config
from dsa_testbed.sglang_server import sglang_python

pytestmark = pytest.mark.serving

RECIPES = {name: load_recipe(name) for name in recipe_names()}
PYTHON: dict[HostName, Callable[[], str]] = {
    "vllm": lambda: sys.executable,
    "sglang": lambda: str(sglang_python()),
}
# What must not get through: a misspelt flag; one that the host had once; a value of another host.
REFUSED: dict[HostName, dict[str, list[str]]] = {
    "vllm": {
        "--tensor-paralel-size is not a flag of vLLM": ["--tensor-paralel-size", "8"],
        "--enable-reasoning is not a flag of vLLM": ["--enable-reasoning"],
        "argument --tool-call-parser": ["--tool-call-parser"],
        "argument --kv-cache-dtype: invalid choice": ["--kv-cache-dtype", "fp8_e4m3_blocks"],
    },
    "sglang": {
        "--tensor-paralel-size is not a flag of SGLang": ["--tensor-paralel-size", "8"],
        "--cuda-graph-max-bs is not a flag of SGLang": ["--cuda-graph-max-bs", "8"],
        "--enable-dp-attention is deprecated": ["--enable-dp-attention"],
        "argument --kv-cache-dtype: invalid choice": ["--kv-cache-dtype", "fp8_ds_mla"],
    },
}


def target(recipe: Recipe) -> Target:
    machine = recipe.hardware
    return Target.here() if machine.gpu == "cpu" else Target.of(GPUS[machine.gpu], machine.count)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[HostName], dict[str, Answer]]:
    """By host: what it says of each of its recipes, by name, and of each refusal, by message."""
    root = tmp_path_factory.mktemp("checkpoints")
    asked: dict[HostName, dict[str, Answer]] = {}

    def checkpoint(recipe: Recipe) -> str:
        if recipe.weights == "fp32":
            return str(make_checkpoint("v32"))
        model_type = "glm_moe_dsa" if "GLM" in recipe.model else "deepseek_v32"
        folder = root / f"{model_type}-{recipe.weights}"
        return str(folder if folder.exists() else write_config(folder, model_type, recipe.weights))

    def questions(host: HostName) -> dict[str, Question]:
        recipes = {name: recipe for name, recipe in RECIPES.items() if recipe.host_name == host}
        resolved = {
            name: Question(
                host_arguments(recipe, model=checkpoint(recipe)), target(recipe), recipe.env
            )
            for name, recipe in recipes.items()
        }
        demo = host_arguments(recipes[f"demo/{host}-cpu"])
        return resolved | {
            message: Question([*demo, *flags]) for message, flags in REFUSED[host].items()
        }

    def of_host(host: HostName) -> dict[str, Answer]:
        if host not in asked:
            of = questions(host)
            asked[host] = dict(zip(of, ask(PYTHON[host](), host, of.values()), strict=True))
        return asked[host]

    return of_host


@pytest.mark.parametrize("name", RECIPES)
def test_the_host_takes_it(name: str, answers: Callable[[HostName], dict[str, Answer]]) -> None:
    recipe = RECIPES[name]
    answer = answers(recipe.host_name)[name]
    assert answer.error is None
    assert answer.settled.items() >= WANTED[recipe.host_name](recipe).items()


def serves(recipe: Recipe) -> bool:
    """Whether the plugin serves it with DSA_PLUGIN=auto, as its notes say."""
    alone = recipe.host_name == "sglang" and recipe.model.startswith("QuantTrio/DeepSeek")
    return recipe.hardware.gpu in ("cpu", "a100-80g") or (
        alone and recipe.hardware.gpu == "rtx-pro-6000"
    )


def vllm_settles(recipe: Recipe) -> dict[str, Any]:
    args = recipe.args
    return {
        "served_by": "dsa_plugin" if serves(recipe) else "vllm",
        "kv_cache_dtype": args.get("kv-cache-dtype", "auto"),
        "max_model_len": recipe.needs.max_context if recipe.needs else args["max-model-len"],
        "tensor_parallel_size": args.get("tensor-parallel-size", 1),
        "data_parallel_size": args.get("data-parallel-size", 1),
        "enable_expert_parallel": args.get("enable-expert-parallel", False),
    }


def sglang_settles(recipe: Recipe) -> dict[str, Any]:
    args = recipe.args
    return {
        "served_by": "dsa_plugin" if serves(recipe) else "sglang",
        "context_length": args.get("context-length"),
        "tp_size": args.get("tensor-parallel-size", 1),
        "attn_dp_size": args.get("attention-data-parallel-size", 1),
    }


WANTED: dict[HostName, Callable[[Recipe], dict[str, Any]]] = {
    "vllm": vllm_settles,
    "sglang": sglang_settles,
}


@pytest.mark.parametrize(
    ("host", "message"), [(host, message) for host, of in REFUSED.items() for message in of]
)
def test_the_host_refuses_what_is_wrong(
    host: HostName, message: str, answers: Callable[[HostName], dict[str, Answer]]
) -> None:
    assert message in (answers(host)[message].error or "")
