"""history.csv of a run: a row a step and a row an evaluation, in the order they happened."""

import csv
from pathlib import Path

from dsa_plugin.training.facts import KINDS
from dsa_plugin.training.stages import STAGES, Figures
from dsa_plugin.training.state import Place, write_atomically

HISTORY_FILE = "history.csv"
# loss to recall are of the step's batch; exact are shares of held-out answers, dense or top-k.
COLUMNS = (
    "stage",
    "step",
    "seconds",
    "length",
    "loss",
    "answers",
    "prose",
    "copies",
    "kl",
    "recall",
    "exact",
    *(f"exact_{kind}" for kind in KINDS),
    "exact_sparse",
    *(f"exact_sparse_{kind}" for kind in KINDS),
)


class History:
    """Appends to a run's history; of an earlier history it keeps what came up to `place`."""

    def __init__(self, folder: Path, place: Place | None) -> None:
        self.path = folder / HISTORY_FILE
        rows = [] if place is None or not self.path.exists() else read_history(folder)
        kept = [row for row in rows if place is not None and _order(row) <= _place_order(place)]

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(kept)

        write_atomically(self.path, write)

    def add(self, place: Place, length: int, figures: Figures) -> None:
        """One row: the step before which `place` is, on texts of `length` tokens."""
        row = {
            "stage": place.stage,
            "step": place.step,
            "seconds": f"{place.seconds:.1f}",
            "length": length,
            **{name: f"{value:.5g}" for name, value in figures.items()},
        }
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)


def read_history(folder: Path) -> list[dict[str, str]]:
    """All rows of a run; a last row that was cut short by a kill is left out."""
    with (folder / HISTORY_FILE).open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def _order(row: dict[str, str]) -> tuple[int, int]:
    return STAGES.index(row["stage"]), int(row["step"])


def _place_order(place: Place) -> tuple[int, int]:
    return STAGES.index(place.stage), place.step
