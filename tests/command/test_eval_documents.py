"""What is written of `dsa eval`: its document is up to date and complete, and so is its task."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_group

from dsa_plugin.cli import app
from dsa_plugin.evaluation.results import Results, Setting
from dsa_plugin.evaluation.variants import VARIANTS
from dsa_plugin.training.facts import KINDS

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "benchmarks" / "lm_eval_tasks"


def load(path: Path) -> Any:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script() -> Any:
    return load(ROOT / "ci" / "evaluation.py")


def test_the_document_is_what_it_writes(script: Any) -> None:
    text = script.DOCUMENT.read_text(encoding="utf-8")
    assert text == script.with_section(text), "run ci/evaluation PYTHON"


def test_it_writes_a_section_for_each_way(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    for through in ("transformers", "sglang"):
        setting = Setting(
            model="model",
            through=through,
            dtype="float32",
            kv_cache_dtype="auto",
            seed=0,
            kinds=["single"],
            max_gen_toks=48,
            flags=[],
        )
        Results(setting=setting, cells=[]).save(tmp_path / f"{through}.json")
    text = script.with_section("before\n" + script.START + "old\n" + script.END + "after\n")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.index("Through transformers") < text.index("Through sglang")


def test_every_variant_kind_and_gate_is_described(script: Any) -> None:
    text = script.DOCUMENT.read_text(encoding="utf-8")
    missing = [name for name in (*VARIANTS, *KINDS) if name not in text]
    assert missing == []
    options = {option for p in get_group(app).commands["eval"].params for option in p.opts}
    assert {"--max-recall-loss", "--min-recall", "--same-as", "--resume"} <= options


def test_the_task_asks_and_grades_alike() -> None:
    task = load(TASKS / "dsa_recall.py")
    # lm-evaluation-harness reads !function by a constructor of its own.
    text = (TASKS / "dsa_recall.yaml").read_text().replace("!function ", "")
    named = yaml.safe_load(text)
    for key in ("custom_dataset", "process_results"):
        module, _, function = named[key].partition(".")
        assert module == "dsa_recall"
        assert callable(getattr(task, function))
    rows = task.rows([1024], 1, 0)
    assert [row["kind"] for row in rows] == list(KINDS)
    assert {named["doc_to_text"], named["doc_to_target"]} <= set(rows[0])
    assert [task.grade(row, [row["answer"]]) for row in rows] == [{"recall": 1.0}] * len(rows)
    assert [task.grade(row, [" Nobody."]) for row in rows] == [{"recall": 0.0}] * len(rows)
