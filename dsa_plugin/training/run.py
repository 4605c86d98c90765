"""Runs a stage from where it is to its end, saving as it goes."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dsa_plugin.training.batches import Source
from dsa_plugin.training.history import History
from dsa_plugin.training.lessons import Lesson, lesson_at, total_steps
from dsa_plugin.training.losses import exact_answers
from dsa_plugin.training.model import DsaModel
from dsa_plugin.training.stages import (
    CLIP,
    LOSSES,
    Figures,
    StageName,
    make_optimizer,
    trained_parameters,
)
from dsa_plugin.training.state import Place, restore_optimizer, save_state


@dataclass(frozen=True)
class Settings:
    """Where and how a stage runs; none of it changes which steps are made."""

    folder: Path
    device: torch.device
    dtype: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    save_seconds: float = 60.0
    evaluate_every: int = 50
    evaluated_tokens: int = 8192
    report: Callable[[Place, Lesson, Figures], None] = lambda *_: None

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 products over fp32 weights, or nothing."""
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


@dataclass(frozen=True)
class Stage:
    """One stage: its lessons, where its batches come from, and held-out ones to judge it by."""

    name: StageName
    lessons: tuple[Lesson, ...]
    source: Source
    held_out: Source | None = None


def run_stage(
    model: DsaModel,
    stage: Stage,
    settings: Settings,
    place: Place,
    moments: dict[str, Tensor],
) -> Place:
    """Trains `model` from `place` to the stage's end; returns the place reached.

    `moments` are a state's tensors, empty at a stage's start. A step depends on the seed, its
    number and the weights alone, so a run that was cut goes on as if it had not been.
    """
    trained = trained_parameters(model, stage.name)
    optimizer = make_optimizer(trained)
    restore_optimizer(optimizer, model, moments)
    history = History(settings.folder, place)
    started, saved = time.monotonic() - place.seconds, time.monotonic()
    for step in range(place.step, total_steps(stage.lessons)):
        lesson, number = lesson_at(stage.lessons, step)
        batch = stage.source.batch(lesson, step).to(settings.device)
        generator = torch.Generator().manual_seed((settings.seed << 32) + step)
        with settings.autocast():
            loss, figures = LOSSES[stage.name](model, batch, generator)
        optimizer.zero_grad()
        loss.backward()
        for parameters in (trained.model, trained.indexer):
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = lesson.rate(number) * group["gain"]
        optimizer.step()
        place = replace(place, step=step + 1, seconds=time.monotonic() - started)
        ends = number + 1 == lesson.steps
        if stage.held_out and (ends or (step + 1) % settings.evaluate_every == 0):
            figures |= evaluate(model, stage.held_out, lesson, stage.name, settings)
        history.add(place, lesson.tokens, figures)
        settings.report(place, lesson, figures)
        if ends or time.monotonic() - saved > settings.save_seconds:
            save_state(settings.folder, model, optimizer, place)
            saved = time.monotonic()
    return place


def evaluate(
    model: DsaModel, held_out: Source, lesson: Lesson, stage: StageName, settings: Settings
) -> Figures:
    """Shares of held-out answers that greedy decoding says exactly: dense, and over the top-k."""
    batch = max(1, min(16, settings.evaluated_tokens // lesson.tokens))
    count = max(1, settings.evaluated_tokens // lesson.tokens // batch)
    figures: Figures = {}
    for sparse in (False, True) if stage != "pretrain" else (False,):
        texts = (
            held_out.batch(replace(lesson, batch=batch), step).to(settings.device)
            for step in range(count)
        )
        with settings.autocast():
            right = exact_answers(model, texts, sparse=sparse)
        name = "exact_sparse" if sparse else "exact"
        both = [answer for answers in right.values() for answer in answers]
        figures |= {f"{name}_{kind}": sum(a) / len(a) for kind, a in right.items()}
        figures[name] = sum(both) / max(1, len(both))
    return figures
