"""The steps of DeepSeek-V3.2-Exp's recipe (section 2.1.1), after dense pre-training.

1. ``pretrain``: dense attention, language loss; the indexer is not trained.
2. ``warmup``: attention stays dense, all but the indexer is frozen; the indexer learns from
   KL(attention summed over heads, L1-normalised || softmax of index scores) over all earlier keys.
3. ``sparse``: attention is over the indexer's top-k; the model learns from the language loss alone,
   the indexer from the KL over the selected keys alone, on an input detached from the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dsa_plugin.training.attention import Asked
from dsa_plugin.training.batches import Batch
from dsa_plugin.training.losses import (
    LanguageLoss,
    comparison_rows,
    copy_loss,
    indexer_fit,
    language_loss,
)
from dsa_plugin.training.model import DsaModel

StageName = Literal["pretrain", "warmup", "sparse"]
STAGES: tuple[StageName, ...] = get_args(StageName)
CLIP = 1.0
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
# In the sparse stage the indexer follows a model that moves: it learns so much faster.
INDEXER_RATE = 3.0
Figures = dict[str, float]


@dataclass(frozen=True)
class Trained:
    """A stage's parameters, those of the model and those of the indexer, each clipped by itself."""

    model: list[torch.nn.Parameter]
    indexer: list[torch.nn.Parameter]


def trained_parameters(model: DsaModel, stage: StageName) -> Trained:
    """What a stage trains; all else is frozen."""
    trained = Trained(
        model.attention_parameters() if stage != "warmup" else [],
        model.indexer_parameters() if stage != "pretrain" else [],
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in (*trained.model, *trained.indexer):
        parameter.requires_grad_(True)
    return trained


def make_optimizer(trained: Trained) -> torch.optim.AdamW:
    """AdamW; matrices of the model alone decay."""
    groups = [
        {"params": [p for p in trained.model if p.dim() == 2], "decay": WEIGHT_DECAY, "gain": 1.0},
        {"params": [p for p in trained.model if p.dim() != 2], "decay": 0.0, "gain": 1.0},
        {
            "params": trained.indexer,
            "decay": 0.0,
            "gain": INDEXER_RATE if trained.model else 1.0,
        },
    ]
    return torch.optim.AdamW(
        [
            {"params": group["params"], "weight_decay": group["decay"], "gain": group["gain"]}
            for group in groups
            if group["params"]
        ],
        betas=BETAS,
        eps=1e-9,
        fused=True,
    )


def pretrain_loss(
    model: DsaModel, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, Figures]:
    """Language loss of the dense model; where copies are known, two heads a layer learn to look."""
    copies = batch.copies if len(batch.copies) else None
    out = model(batch.tokens, batch.positions, asked=Asked(copies=copies))
    loss = language_loss(model, out.hidden, batch, generator)
    figures = _language_figures(loss)
    if copies is None:
        return loss.total, figures
    looked = copy_loss(out.told)
    return loss.total + looked, figures | {"copies": looked.item()}


def warmup_loss(
    model: DsaModel, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, Figures]:
    """KL of all layers' indexers against dense attention."""
    rows = comparison_rows(batch, generator).to(batch.tokens.device)
    told = model(batch.tokens, batch.positions, asked=Asked(rows=rows)).told
    kl, recall = indexer_fit(told)
    return kl * len(told), {"kl": kl.item(), "recall": recall.item()}


def sparse_loss(
    model: DsaModel, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, Figures]:
    """Language loss of the sparse model and KL over the selected keys: two graphs in one sum."""
    rows = comparison_rows(batch, generator).to(batch.tokens.device)
    out = model(batch.tokens, batch.positions, sparse=True, asked=Asked(rows=rows))
    loss = language_loss(model, out.hidden, batch, generator)
    kl, recall = indexer_fit(out.told)
    figures = {"kl": kl.item(), "recall": recall.item()}
    return loss.total + kl * len(out.told), _language_figures(loss) | figures


LOSSES: dict[StageName, Callable[[DsaModel, Batch, torch.Generator], tuple[Tensor, Figures]]] = {
    "pretrain": pretrain_loss,
    "warmup": warmup_loss,
    "sparse": sparse_loss,
}


def _language_figures(loss: LanguageLoss) -> Figures:
    return {"loss": loss.total.item(), "answers": loss.graded.item(), "prose": loss.prose.item()}
