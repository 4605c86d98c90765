"""What to check, and how hard to ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsa_plugin.config_file import read_config
from dsa_plugin.planning.model import find_registered
from dsa_plugin.server_check.grid import SHORTEST

MIN_QUESTIONS = 4


@dataclass(frozen=True)
class Settings:
    """Attributes:
    url: the server's, with or without /v1.
    model: as the server names it; None: its only one.
    api_key: of servers that want one.
    checkpoint: folder of what it serves, small enough to run here; for log-probabilities.
    index_topk: the model's; None: of the checkpoint or the registered model of that name.
    chunk: tokens of a chunk of the server's prefill; None: not known.
    lengths: tokens of requests; None: by index_topk and chunk.
    questions: at each length, each asked in four ways.
    num_concurrent: requests of a batch.
    timeout: seconds for one answer.
    budget_s: seconds for all of it.
    seed: of texts and questions.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    checkpoint: Path | None = None
    index_topk: int | None = None
    chunk: int | None = None
    lengths: Sequence[int] | None = None
    questions: int = 8
    num_concurrent: int = 4
    timeout: float = 300
    budget_s: float = 900
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url {self.url}; give it as http://HOST:PORT or https://...")
        if self.questions < MIN_QUESTIONS:
            raise ValueError(
                f"--questions {self.questions}; fewer than {MIN_QUESTIONS} show little"
            )
        if self.num_concurrent < 2:
            raise ValueError(f"--num-concurrent {self.num_concurrent}; a batch has 2 at least")
        if self.timeout <= 0 or self.budget_s <= 0:
            raise ValueError("--timeout and --budget-s are seconds above 0")
        for name, value in (("--index-topk", self.index_topk), ("--chunk", self.chunk)):
            if value is not None and value < SHORTEST:
                raise ValueError(f"{name} {value}; allowed: tokens, at least {SHORTEST}")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < SHORTEST):
            raise ValueError(
                f"--lengths {list(self.lengths)}; allowed: tokens, each at least {SHORTEST}"
            )

    def find_index_topk(self, served: str) -> int:
        """index_topk of a model that the server calls `served`.

        Raises:
            ValueError: nothing says it.
        """
        if self.index_topk is not None:
            return self.index_topk
        if self.checkpoint is not None:
            found = read_config(self.checkpoint).get("index_topk")
            if isinstance(found, int):
                return found
            raise ValueError(f"config.json of {self.checkpoint} has no index_topk: is it DSA's?")
        registered = find_registered(served) or find_registered(served.rpartition("/")[2])
        if registered is None:
            raise ValueError(
                f"{served} is no model that is known here: say its index_topk with --index-topk "
                "(config.json has it), or name its CHECKPOINT's folder"
            )
        return registered.index_topk
