"""Documents as tensors: tokens, where answers are, and positions that jump."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from dsa_plugin.training.documents import Document, make_document
from dsa_plugin.training.lessons import Lesson

END_OF_TEXT = 0
JUMPS = 4


@dataclass(frozen=True)
class TokenSpan:
    """Tokens start ... end - 1 of row `row`: an answer, and within it the graded part."""

    kind: str
    row: int
    start: int
    end: int
    graded_start: int
    graded_end: int


@dataclass(frozen=True)
class Batch:
    """``tokens`` and ``positions`` [B, T]; rows shorter than T end in END_OF_TEXT from ``lengths``.

    ``copies`` [n, 3]: the token after (row, query) is a copy of that at key.
    """

    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    answers: tuple[TokenSpan, ...]
    copies: Tensor
    prose_weight: float = 1.0

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            positions=self.positions.to(device),
            copies=self.copies.to(device),
        )


class Source(Protocol):
    """Where batches come from; the same arguments always give the same batch."""

    def batch(self, lesson: Lesson, step: int) -> Batch: ...


@dataclass(frozen=True)
class DocumentSource:
    """Batches of made documents. ``reach`` is the last position that jumps may lead to."""

    tokenizer: Tokenizer
    seed: int
    reach: int = 0
    held_out: bool = False

    def batch(self, lesson: Lesson, step: int) -> Batch:
        """Batch number `step` of a lesson."""
        seeds = [(self.seed << 48) + (step << 16) + row for row in range(lesson.batch)]
        documents = [
            make_document(
                seed, lesson.tokens, lesson.mix, self.held_out, lesson.density, lesson.likeness
            )
            for seed in seeds
        ]
        encodings = [self.tokenizer.encode(document.text) for document in documents]
        both = list(zip(documents, encodings, strict=True))
        generator = torch.Generator().manual_seed(seeds[0])
        copies = [
            (row, answer - 1, source)
            for row, (document, encoding) in enumerate(both)
            for answer, source in copied_tokens(document, encoding)
            if answer < lesson.tokens
        ]
        return Batch(
            tokens=torch.stack([_padded(encoding.ids, lesson.tokens) for encoding in encodings]),
            positions=torch.stack(
                [jumping_positions(e, lesson.tokens, self.reach, generator) for e in encodings]
            ),
            lengths=tuple(min(len(e.ids) + 1, lesson.tokens) for e in encodings),
            answers=tuple(
                span
                for row, (document, encoding) in enumerate(both)
                for span in answer_spans(document, encoding, row)
                if span.end <= lesson.tokens
            ),
            copies=torch.tensor(copies, dtype=torch.long).reshape(-1, 3),
            prose_weight=lesson.prose_weight,
        )


def answer_spans(document: Document, encoding: Encoding, row: int) -> list[TokenSpan]:
    """The answers of a document in tokens; each goes on to the line break that ends it."""
    return [
        TokenSpan(
            answer.kind,
            row,
            *_covering(encoding, answer.start, answer.end + 1),
            *_covering(encoding, answer.graded_start, answer.graded_end),
        )
        for answer in document.answers
    ]


def copied_tokens(document: Document, encoding: Encoding) -> list[tuple[int, int]]:
    """(token of an answer, token of a fact that it copies), of all answers of a document."""
    return [
        pair
        for answer in document.answers
        for start, source, length in answer.copies
        for pair in zip(
            range(*_covering(encoding, start, start + length)),
            range(*_covering(encoding, source, source + length)),
            strict=True,
        )
    ]


def _covering(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is None or last is None:
        raise ValueError(f"characters {start} to {end} of a document are not in its tokens")
    return first, last + 1


def _padded(ids: Sequence[int], length: int) -> Tensor:
    return torch.tensor([*ids, *[END_OF_TEXT] * length][:length])


def jumping_positions(
    encoding: Encoding, length: int, reach: int, generator: torch.Generator
) -> Tensor:
    """0 to length - 1; half the time with jumps after up to JUMPS full stops, up to `reach`.

    So short documents train far distances (PoSE, arXiv 2309.10400).
    """
    positions = torch.arange(length)
    room = reach - length
    stops = [i + 1 for i, token in enumerate(encoding.tokens[: length - 1]) if token == "."]
    if room <= 0 or not stops or torch.rand((), generator=generator) < 0.5:
        return positions
    count = int(torch.randint(1, JUMPS + 1, (), generator=generator))
    chosen = torch.randperm(len(stops), generator=generator)[:count]
    shares = torch.rand(len(chosen) + 1, generator=generator).log()
    jumps = (shares / shares.sum() * torch.rand((), generator=generator) * room).long()
    for place, jump in zip(chosen.tolist(), jumps[:-1].tolist(), strict=True):
        positions[stops[place] :] += jump
    return positions
