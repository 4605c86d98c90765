"""What the stages minimise, and what they are judged by."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa_plugin.training.attention import Told
from dsa_plugin.training.batches import Batch
from dsa_plugin.training.model import DsaModel

# Of tokens outside answers, one in so many is predicted.
PROSE_SAMPLE = 8
# What an answer restates of its question is easy; only the graded part needs the text.
RESTATED_WEIGHT = 0.3
# Queries a step at which indexer and attention are compared.
ROWS = 256


@dataclass(frozen=True)
class LanguageLoss:
    """Cross-entropies in nats, and their weighted sum."""

    total: Tensor
    graded: Tensor
    prose: Tensor


def language_loss(
    model: DsaModel, hidden: Tensor, batch: Batch, generator: torch.Generator
) -> LanguageLoss:
    """Loss of hidden states [B, T, hidden] on a batch.

    Of documents, that of answers and of a sample of all other tokens; of other texts, of
    all tokens.
    """
    graded, restated = target_masks(batch)
    taken = torch.zeros_like(graded)
    for row, length in enumerate(batch.lengths):
        taken[row, 1:length] = True
    if not batch.answers:
        prose = _cross_entropy(model, hidden, batch.tokens, taken)
        return LanguageLoss(prose, hidden.new_zeros(()), prose.detach())
    sample = torch.rand(taken.shape, generator=generator) < 1 / PROSE_SAMPLE
    sample &= taken & ~graded & ~restated
    parts = [_cross_entropy(model, hidden, batch.tokens, m) for m in (graded, restated, sample)]
    total = parts[0] + RESTATED_WEIGHT * parts[1] + batch.prose_weight * parts[2]
    return LanguageLoss(total, parts[0].detach(), parts[2].detach())


def target_masks(batch: Batch) -> tuple[Tensor, Tensor]:
    """Masks [B, T] on the CPU of tokens in the graded parts and in the rest of answers."""
    graded = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    answers = torch.zeros_like(graded)
    for span in batch.answers:
        answers[span.row, span.start : span.end] = True
        graded[span.row, span.graded_start : span.graded_end] = True
    return graded, answers & ~graded


def _cross_entropy(model: DsaModel, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens under `mask`, each predicted from the one before; 0 without any."""
    if not mask.any():
        return hidden.new_zeros(())
    mask = mask.to(tokens.device)[:, 1:]
    loss: Tensor = F.cross_entropy(model.lm_head(hidden[:, :-1][mask]).float(), tokens[:, 1:][mask])
    return loss


def comparison_rows(batch: Batch, generator: torch.Generator) -> Tensor:
    """Up to ROWS queries [n], half of them where answers are said and half anywhere."""
    graded, restated = target_masks(batch)
    said = (graded | restated).any(0).nonzero()[:, 0] - 1
    said = said[torch.randperm(len(said), generator=generator)[: ROWS // 2]]
    length = batch.tokens.shape[1]
    anywhere = torch.randperm(length, generator=generator)[: ROWS - len(said)]
    rows: Tensor = torch.cat((said, anywhere)).unique()
    return rows


def indexer_fit(told: Sequence[Told]) -> tuple[Tensor, Tensor]:
    """KL and recall, the mean over layers that were asked for them."""
    fits = [reply.fit for reply in told if reply.fit is not None]
    kl, recall = ([getattr(fit, name) for fit in fits] for name in ("kl", "recall"))
    return torch.stack(kl).mean(), torch.stack(recall).mean()


def copy_loss(told: Sequence[Told]) -> Tensor:
    """-log of attention at what is to be copied, the mean over all layers but the first.

    The first cannot know what a token's neighbours are.
    """
    losses = [reply.copy_loss for reply in told[1:] if reply.copy_loss is not None]
    return torch.stack(losses).mean()


@torch.no_grad()
def exact_answers(
    model: DsaModel, batches: Iterable[Batch], *, sparse: bool
) -> dict[str, list[bool]]:
    """By kind, whether each answer would be said exactly by greedy decoding.

    One pass tells: decoding says an answer if each of its tokens is likeliest after those before.
    """
    right: dict[str, list[bool]] = {}
    for batch in batches:
        hidden = model(batch.tokens, batch.positions, sparse=sparse).hidden
        for span in batch.answers:
            logits = model.lm_head(hidden[span.row, span.start - 1 : span.end - 1])
            said = logits.argmax(-1) == batch.tokens[span.row, span.start : span.end]
            right.setdefault(span.kind, []).append(bool(said.all()))
    return right
