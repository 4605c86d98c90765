"""`dsa train` from the command line, at sizes of seconds."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsa_plugin.cli import app
from dsa_plugin.training.recipe import demo_recipe, read_recipe
from dsa_plugin.training.stages import STAGES

SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "q_lora_rank": 64}
LESSON = {"tokens": 128, "batch": 1, "steps": 2, "learning_rate": 1e-3, "mix": {"single": 1.0}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole recipe in bf16."""
    folder = tmp_path_factory.mktemp("demo")
    stages = {stage: [LESSON] for stage in STAGES}
    recipe = {"seed": 1, "sizes": SIZES, "reach": 0, "stages": stages}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    out = folder / "run"
    arguments = ["--recipe", str(folder / "recipe.json"), "--out", str(out), "--dtype", "bf16"]
    result = CliRunner().invoke(app, ["train", "demo", *arguments])
    assert result.exit_code == 0, result.output
    return out


def test_demo_leaves_all_there_is_to_know(run: Path) -> None:
    record = json.loads((run / "recipe.json").read_text())
    assert record["recipe"]["sizes"] == SIZES
    assert {"torch", "python", "dsa-plugin"} <= record["made_with"].keys()
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    for stage in STAGES:
        names = {path.name for path in (run / stage).iterdir()}
        assert {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "chat_template.jinja",
        } <= names
    ends = json.loads((run / "sparse" / "generation_config.json").read_text())["eos_token_id"]
    assert len(ends) == 2


def test_measure_prints_a_line_a_length(run: Path) -> None:
    arguments = ["--model", str(run / "sparse"), "--length", "1024", "--tokens", "1024"]
    result = CliRunner().invoke(app, ["train", "measure", *arguments])
    assert result.exit_code == 0, result.output
    measured = json.loads(result.output)
    assert measured["length"] == 1024
    assert len(measured["kl"]) == len(measured["recall"]) == 2
    assert all(0 <= recall <= 1 for recall in measured["recall"])
    assert measured["perplexity"] > 1


def test_a_stage_that_there_is_not(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"stages": {"distil": []}}))
    with pytest.raises(ValueError, match=r"distil.*pretrain, warmup, sparse"):
        read_recipe(path)


def test_the_demo_recipe_has_all_stages() -> None:
    assert tuple(read_recipe(demo_recipe()).stages) == STAGES
