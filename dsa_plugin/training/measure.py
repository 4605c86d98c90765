"""Judges a checkpoint of this package's tokenizer: dense against top-k, length by length."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from dsa_plugin.training.attention import Asked
from dsa_plugin.training.batches import Batch, DocumentSource
from dsa_plugin.training.checkpoint import IndexerSizes, load_checkpoint
from dsa_plugin.training.facts import KINDS
from dsa_plugin.training.lessons import Lesson
from dsa_plugin.training.losses import comparison_rows, exact_answers, language_loss
from dsa_plugin.training.model import DsaModel
from dsa_plugin.training.prose import held_out_prose
from dsa_plugin.training.text import TextSource

# No training run reads documents of this seed.
SEED = 2000
DENSITY = 0.5


@dataclass(frozen=True)
class Measured:
    """Of texts of one length, dense and over the top-k.

    ``exact`` and ``exact_topk``: by kind, the share of held-out answers said exactly; ``answers``:
    how many were asked; ``perplexity``: of held-out prose; ``kl`` and ``recall``: each layer's.
    """

    length: int
    answers: dict[str, int]
    exact: dict[str, float]
    exact_topk: dict[str, float]
    perplexity: float
    perplexity_topk: float
    kl: list[float]
    recall: list[float]


@torch.no_grad()
def measure(folder: Path, lengths: Sequence[int], tokens: int) -> Iterator[dict[str, Any]]:
    """One Measured a length, as JSON holds it, of documents of together about `tokens` tokens."""
    model = load_checkpoint(folder, IndexerSizes(), seed=0).model.eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prose = torch.tensor(tokenizer.encode(held_out_prose()).ids)
    for length in lengths:
        count = max(1, tokens // length)
        lesson = Lesson(length, 1, count, 0.0, dict.fromkeys(KINDS, 1.0), DENSITY)
        documents = DocumentSource(tokenizer, SEED, held_out=True)
        batches = [documents.batch(lesson, step) for step in range(count)]
        dense, answers = _exact(model, batches, sparse=False)
        selected, _ = _exact(model, batches, sparse=True)
        texts = TextSource(prose, SEED)
        windows = [texts.batch(lesson, step) for step in range(min(4, count))]
        kl, recall = _fit(model, batches[: max(1, 4096 // length)])
        yield asdict(
            Measured(
                length=length,
                answers=answers,
                exact=dense,
                exact_topk=selected,
                perplexity=_perplexity(model, windows, sparse=False),
                perplexity_topk=_perplexity(model, windows, sparse=True),
                kl=kl,
                recall=recall,
            )
        )


def _exact(
    model: DsaModel, batches: Sequence[Batch], *, sparse: bool
) -> tuple[dict[str, float], dict[str, int]]:
    right = exact_answers(model, batches, sparse=sparse)
    asked = {kind: right[kind] for kind in KINDS if kind in right}
    shares = {kind: sum(answers) / len(answers) for kind, answers in asked.items()}
    return shares, {kind: len(answers) for kind, answers in asked.items()}


def _perplexity(model: DsaModel, windows: Sequence[Batch], *, sparse: bool) -> float:
    losses = [
        language_loss(
            model,
            model(batch.tokens, sparse=sparse).hidden,
            batch,
            torch.Generator().manual_seed(SEED),
        ).prose.item()
        for batch in windows
    ]
    return math.exp(sum(losses) / len(losses))


def _fit(model: DsaModel, batches: Sequence[Batch]) -> tuple[list[float], list[float]]:
    """KL and recall, layer by layer, the means over texts."""
    generator = torch.Generator().manual_seed(SEED)
    told = [
        model(batch.tokens, asked=Asked(rows=comparison_rows(batch, generator))).told
        for batch in batches
    ]
    fits = [[reply.fit for reply in replies if reply.fit is not None] for replies in told]
    kl, recall = (
        [
            sum(getattr(f, name).item() for f in layer) / len(layer)
            for layer in zip(*fits, strict=True)
        ]
        for name in ("kl", "recall")
    )
    return kl, recall
