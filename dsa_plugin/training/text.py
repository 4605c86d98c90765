"""Batches of a user's own texts, by a checkpoint's own tokenizer."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsa_plugin.training.batches import Batch
from dsa_plugin.training.lessons import Lesson

SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class TextSource:
    """Windows of one long row of tokens [n]: all texts, each with its end."""

    tokens: Tensor
    seed: int

    def batch(self, lesson: Lesson, step: int) -> Batch:
        """Batch number `step`: windows from random places."""
        last = len(self.tokens) - lesson.tokens
        if last < 0:
            raise ValueError(
                f"the data has {len(self.tokens)} tokens; windows of {lesson.tokens} need more: "
                "give more files, or fewer --tokens"
            )
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        starts = torch.randint(0, last + 1, (lesson.batch,), generator=generator).tolist()
        return Batch(
            tokens=torch.stack([self.tokens[start : start + lesson.tokens] for start in starts]),
            positions=torch.arange(lesson.tokens).expand(lesson.batch, -1),
            lengths=(lesson.tokens,) * lesson.batch,
            answers=(),
            copies=torch.empty(0, 3, dtype=torch.long),
        )


def read_tokens(files: Sequence[Path], tokenizer: Tokenizer, end_of_text: int) -> Tensor:
    """All texts of .txt files and of the key "text" of .jsonl files, each before `end_of_text`."""
    ids: list[int] = []
    for file in files:
        for text in _texts(file):
            ids += tokenizer.encode(text, add_special_tokens=False).ids
            ids.append(end_of_text)
    return torch.tensor(ids, dtype=torch.long)


def _texts(file: Path) -> Iterator[str]:
    if file.suffix not in SUFFIXES:
        raise ValueError(
            f"{file} is neither of {' and '.join(SUFFIXES)}; convert it to one of them"
        )
    content = file.read_text("utf-8")
    if file.suffix == ".txt":
        yield content
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(
                f'line {number} of {file} has no "text"; each line is a JSON object with one'
            )
        yield record["text"]
