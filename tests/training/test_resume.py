"""A run that is killed and resumed makes the weights of one that was not, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dsa_plugin.training.history import read_history
from dsa_plugin.training.recipe import run_recipe
from dsa_plugin.training.run import Settings
from dsa_plugin.training.state import STATE_FILE, load_state

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 64,
    "q_lora_rank": 64,
    "index_topk": 32,
}
LESSON = {"tokens": 96, "batch": 2, "steps": 4, "learning_rate": 1e-3, "mix": {"single": 1.0}}
RUNNER = """
import sys, torch
from pathlib import Path
from dsa_plugin.training.recipe import run_recipe
from dsa_plugin.training.run import Settings
torch.set_num_threads(1)
def report(place, lesson, figures):
    print("step", flush=True)
run_recipe(Path(sys.argv[1]), Settings(Path(sys.argv[2]), torch.device("cpu"), save_seconds=0,
           evaluate_every=3, evaluated_tokens=256, report=report))
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    stages = {
        "pretrain": [LESSON, LESSON | {"tokens": 128}],
        "warmup": [LESSON],
        "sparse": [LESSON],
    }
    path.write_text(json.dumps({"seed": 5, "sizes": TINY, "reach": 512, "stages": stages}))
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a break, which saves at the ends of lessons alone."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    run_recipe(
        recipe,
        Settings(
            folder, torch.device("cpu"), save_seconds=1e9, evaluate_every=3, evaluated_tokens=256
        ),
    )
    return folder


def test_killed_at_any_moment(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """Killed again and again, some ms after another step each time, until it is through."""
    kills = 0
    for delay in (0.0, 0.011, 0.003):
        process = subprocess.Popen(
            [sys.executable, "-c", RUNNER, str(recipe), str(tmp_path)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        for _ in range(4):
            process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills > 1
    run_recipe(
        recipe, Settings(tmp_path, torch.device("cpu"), evaluate_every=3, evaluated_tokens=256)
    )
    _, place, resumed = load_state(tmp_path)
    _, other, uncut = load_state(whole)
    assert (place.stage, place.step) == (other.stage, other.step) == ("sparse", 4)
    assert resumed.keys() == uncut.keys()
    assert all(torch.equal(resumed[name], uncut[name]) for name in uncut)
    rows, expected = ([_without_time(row) for row in read_history(f)] for f in (tmp_path, whole))
    assert rows == expected


def test_all_stages_learn(whole: Path) -> None:
    """Each stage moved what it trains, and the history has its figures."""
    rows = read_history(whole)
    assert [row["stage"] for row in rows] == ["pretrain"] * 8 + ["warmup"] * 4 + ["sparse"] * 4
    assert all(row["kl"] for row in rows if row["stage"] != "pretrain")
    assert all(row["exact"] for row in rows if int(row["step"]) == 4)


def test_another_model_is_refused(recipe: Path, whole: Path, tmp_path: Path) -> None:
    other = json.loads(recipe.read_text())
    other["sizes"] = TINY | {"hidden_size": 128}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="hidden_size=64"):
        run_recipe(path, Settings(whole, torch.device("cpu")))


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=STATE_FILE):
        load_state(tmp_path)


def _without_time(row: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in row.items() if name != "seconds"}
