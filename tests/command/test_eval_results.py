"""What `dsa eval` makes of answers: tables, figures, gates, and a file that a run goes on with."""

import math
from pathlib import Path

import pytest

from dsa_plugin.cli.evaluate_figure import draw
from dsa_plugin.cli.evaluate_tables import grids, markdown
from dsa_plugin.evaluation.gates import Gates
from dsa_plugin.evaluation.results import Answer, Cell, Results, Setting

KINDS = ["single", "count"]
LENGTHS = (1024, 2048)
DEPTHS = (0.1, 0.9)


def setting(**changes: object) -> Setting:
    given: dict[str, object] = {
        "model": "model",
        "through": "transformers",
        "dtype": "float32",
        "kv_cache_dtype": "auto",
        "seed": 0,
        "kinds": KINDS,
        "max_gen_toks": 48,
        "flags": [],
    }
    return Setting.model_validate(given | changes)


def cell(variant: str, length: int, wrong: tuple[str, ...] = (), nll: float | None = 200.0) -> Cell:
    """One question of each kind and depth; all of the `wrong` kinds are."""
    answers = [
        Answer(
            kind=kind,
            depth=depth,
            expected=" Nora",
            completion=" Someone." if kind in wrong else " Nora.",
            right=kind not in wrong,
        )
        for kind in KINDS
        for depth in DEPTHS
    ]
    return Cell(
        variant=variant,
        length=length,
        document=0,
        answers=answers,
        nll=nll,
        nll_tokens=100,
        seconds=1.5,
    )


def results(*wrong_at_2048: str) -> Results:
    """dense is all right; dsa is wrong in these kinds at 2048."""
    cells = [cell("dense", length) for length in LENGTHS]
    cells += [cell("dsa", 1024), cell("dsa", 2048, wrong_at_2048, nll=300.0)]
    return Results(setting=setting(), cells=cells)


def test_tables_add_cells_up() -> None:
    by_kind, by_length, perplexity = grids(results("count"))
    assert by_kind.columns == [*KINDS, "all"]
    assert by_kind.title.endswith("8 questions a variant")
    assert by_kind.rows == [["dense", "100.0", "100.0", "100.0"], ["dsa", "100.0", "50.0", "75.0"]]
    assert by_length.columns == ["1024", "2048"]
    assert by_length.rows == [["dense", "100.0", "100.0"], ["dsa", "100.0", "50.0"]]
    two, three = (f"{math.exp(nats):.3f}" for nats in (2, 3))
    assert perplexity.rows == [["dense", two, two], ["dsa", two, three]]


def test_a_table_shows_what_is_not_there_yet() -> None:
    partial = Results(setting=setting(), cells=[cell("dense", 1024), cell("dsa", 2048, nll=None)])
    assert "| dsa | - | 100.0 |" in markdown(partial)
    assert markdown(Results(setting=setting(), cells=[])).startswith("Recall")


def test_a_figure_is_drawn(tmp_path: Path) -> None:
    draw(results("count"), tmp_path / "heat.png")
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="xyz"):
        draw(results(), tmp_path / "heat.xyz")


def failures(gates: Gates, found: Results) -> list[str]:
    gates.check(found.setting, [cell.key for cell in found.cells])
    return list(gates.failures(found))


def test_dsa_may_lose_so_much_against_dense() -> None:
    assert failures(Gates(max_recall_loss=0), results()) == []
    assert failures(Gates(max_recall_loss=50), results("count")) == []
    [line] = failures(Gates(max_recall_loss=49), results("count"))
    assert line.startswith("count: dsa recalls 50.0 of 100, dense 100.0")
    only_dsa = Results(setting=setting(), cells=[cell("dsa", 1024)])
    with pytest.raises(ValueError, match="--variants lacks one"):
        failures(Gates(max_recall_loss=1), only_dsa)


def test_dsa_needs_so_much() -> None:
    assert failures(Gates(min_recall=100), results()) == []
    [line] = failures(Gates(min_recall=1), results("single"))
    assert line == "single at 2048: dsa recalls 0.0 of 100, under 1"
    with pytest.raises(ValueError, match="lacks"):
        failures(Gates(min_recall=1), Results(setting=setting(), cells=[cell("dense", 1024)]))


def test_another_runs_answers_have_to_be_the_same() -> None:
    assert failures(Gates(reference=results("count")), results("count")) == []
    [line] = failures(Gates(reference=results()), results("count"))
    assert line.startswith("dsa at 2048, text 0: 2 of 4 answers differ, first a count")
    same, other = (
        Results(setting=setting(), cells=[cell("dsa", 1024, nll=200 * (1 + error))])
        for error in (1e-7, 2e-6)
    )
    assert failures(Gates(reference=results()), same) == []
    [line] = failures(Gates(reference=results()), other)
    assert "nats a token of prose" in line


def test_what_was_not_the_same_question_is_not_the_same() -> None:
    whole = cell("dsa", 1024)
    fewer = Results(
        setting=setting(), cells=[whole.model_copy(update={"answers": whole.answers[:2]})]
    )
    assert failures(Gates(reference=results()), fewer) == [
        "dsa at 1024, text 0: 2 questions, not 4"
    ]
    longer = Results(setting=setting(), cells=[whole.model_copy(update={"nll_tokens": 99})])
    [line] = failures(Gates(reference=results()), longer)
    assert "prose of 99 tokens, not 100" in line


@pytest.mark.parametrize("change", [{"seed": 1}, {"kinds": ["single"]}, {"max_gen_toks": 8}])
def test_what_was_asked_otherwise_is_not_compared(change: dict[str, object]) -> None:
    other = Results(setting=setting(**change), cells=results().cells)
    with pytest.raises(ValueError, match=f"its {next(iter(change))} is"):
        failures(Gates(reference=other), results())


def test_a_cell_without_a_counterpart_is_an_error() -> None:
    window = Results(setting=setting(), cells=[cell("window", 1024)])
    with pytest.raises(ValueError, match="it has no window at 1024"):
        failures(Gates(reference=results()), window)


def test_results_are_kept_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results("count").save(path)
    assert Results.load(path) == results("count")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{}", '{"setting": 3, "cells": []}', "[1, 2"])
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no results of `dsa eval`"):
        Results.load(path)


def test_a_run_goes_on_only_as_it_began() -> None:
    results().check_continues(setting())
    with pytest.raises(ValueError, match="are of dtype 'float32', not 'bfloat16'"):
        results().check_continues(setting(dtype="bfloat16"))
