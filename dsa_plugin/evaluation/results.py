"""What a run found: a JSON file that grows cell by cell, and that a later run can go on with."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Key = tuple[str, int, int]
"""Variant, length and document: what no other cell of a run has."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Setting(_Strict):
    """What two runs must have in common for their cells to be of one kind."""

    model: str
    through: str = Field(description="transformers, vllm, sglang or a URL.")
    dtype: str
    kv_cache_dtype: str
    seed: int
    kinds: list[str]
    max_gen_toks: int = Field(description="Tokens of the longest answer.")
    flags: list[str] = Field(description="Further ones of the host.")


class Answer(_Strict):
    """One question, answered."""

    kind: str
    depth: float = Field(description="Of the fact asked for: 0 is the text's start, 1 its end.")
    expected: str
    completion: str
    right: bool


class Cell(_Strict):
    """One text and its questions under one variant, and as much of other prose."""

    variant: str
    length: int = Field(description="Tokens, about, of the text and a question.")
    document: int = Field(description="Number of the text among those of its length.")
    answers: list[Answer]
    nll: float | None = Field(description="Nats, summed over the prose's tokens but the first.")
    nll_tokens: int
    seconds: float

    @property
    def key(self) -> Key:
        """Which cell of a run this is."""
        return self.variant, self.length, self.document


class Results(_Strict):
    """All cells of a run so far."""

    setting: Setting
    cells: list[Cell]

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises ValueError where the file is none that `save` wrote."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"{path} holds no results of `dsa eval` ({where}: {first['msg']}); "
                "name another file"
            ) from None

    def save(self, path: Path) -> None:
        """Write the file in one step: who is cut off leaves the former one whole."""
        part = path.with_name(f".{os.getpid()}-{path.name}")
        part.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    def with_cell(self, cell: Cell) -> Results:
        """These and one more."""
        return self.model_copy(update={"cells": [*self.cells, cell]})

    def check_continues(self, setting: Setting) -> None:
        """Raises ValueError where a run of `setting` would add cells of another kind."""
        for name, value in setting:
            had = getattr(self.setting, name)
            if had != value:
                raise ValueError(
                    f"--resume: the results are of {name} {had!r}, not {value!r}; "
                    "say the same again, or name another --out"
                )
