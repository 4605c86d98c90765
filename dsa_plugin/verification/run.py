"""Verifies a checkpoint: its files, then chosen layers at chosen lengths on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsa_plugin.config import DSAConfig
from dsa_plugin.config_file import read_config
from dsa_plugin.safetensors_header import read_weight_map
from dsa_plugin.verification.compare import Cell
from dsa_plugin.verification.exact import Exact
from dsa_plugin.verification.facts import facts_of
from dsa_plugin.verification.findings import Finding, layers_text
from dsa_plugin.verification.headers import (
    Headers,
    can_run,
    check_tensors,
    missing_shards,
    read_folder,
)
from dsa_plugin.verification.inputs import MAX_TOKENS, HiddenStates
from dsa_plugin.verification.layers import BoundLayer, Place, Setting, source_of
from dsa_plugin.verification.recall import Recall, recall_of, style_finding
from dsa_plugin.verification.report import Report, cell_findings
from dsa_plugin.verification.settings import check_settings
from dsa_plugin.verification.weights import Tensors, read_layer

LONGEST = 32
"""Times index_topk: the longest of the lengths by default, 65,536 for the releases."""
_TELLING = 2  # times index_topk: from there on a selection leaves out enough to tell styles apart
Progress = Callable[[int, int, str], None]
"""Cells done, cells there are, and what comes next."""


@dataclass(frozen=True)
class Plan:
    """Layers in order, and lengths."""

    layers: tuple[int, ...]
    lengths: tuple[int, ...]


def check_files(
    name: str, config: Mapping[str, Any], headers: Headers, weight_map: Mapping[str, str] | None
) -> Report:
    """What config.json and the files' headers say, wherever they were read.

    Args:
        name: of the checkpoint.
        config: its config.json.
        headers: of all its files.
        weight_map: of model.safetensors.index.json, if it has one.

    Raises:
        ValueError: config.json is not a DSA model's.
    """
    dsa = DSAConfig.from_hf(config)
    quantised = bool(config.get("quantization_config"))
    findings = [*check_settings(config, dsa), *check_tensors(headers, dsa, quantised=quantised)]
    if weight_map is not None:
        findings += missing_shards(headers, weight_map)
    return Report(name, facts_of(config, headers), tuple(findings))


def check_folder(folder: Path) -> Report:
    """`check_files` of a local checkpoint.

    Raises:
        ValueError: it is none, or not a DSA model's.
    """
    return check_files(
        str(folder), read_config(folder), read_folder(folder), read_weight_map(folder)
    )


@torch.no_grad()
def verify(
    folder: Path,
    layers: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    progress: Progress = lambda *_: None,
) -> Report:
    """Check the files, then run layers as a host does, and compare each step with fp64.

    Args:
        folder: a local checkpoint.
        layers: indices; the first, the first that shares a selection, the middle and the last.
        lengths: of requests, in tokens; around index_topk, and the longest 32 times it.
        progress: is told of each cell.

    Raises:
        ValueError: not a DSA checkpoint, or a layer or length that it has not.
    """
    config, headers = read_config(folder), read_folder(folder)
    report = check_files(str(folder), config, headers, read_weight_map(folder))
    dsa = DSAConfig.from_hf(config)
    plan = _plan(config, dsa, layers, lengths)
    skipped = [n for n in plan.layers if not can_run(headers, dsa, source_of(dsa, n))]
    skipped += [n for n in plan.layers if n not in skipped and not can_run(headers, dsa, n)]
    run = _Run(folder, config, headers, replace(plan, layers=_without(plan.layers, skipped)))
    for cells, recalls in run.layers(progress):
        report = replace(report, cells=(*report.cells, *cells), recalls=(*report.recalls, *recalls))
    findings = [*report.findings, *run.tensors.findings.values()]
    if skipped:
        where = f"layers {layers_text(skipped)}"
        findings.append(Finding("note", where, "are not run: see what is said of their tensors"))
    style = style_finding(report.recalls, run.setting.maths)
    findings += [] if style is None else [style]
    findings += cell_findings(report.cells)
    return replace(report, findings=tuple(findings), inputs=run.described())


def _plan(
    config: Mapping[str, Any],
    dsa: DSAConfig,
    layers: Sequence[int] | None,
    lengths: Sequence[int] | None,
) -> Plan:
    last = dsa.num_hidden_layers - 1
    most = last + dsa.num_nextn_predict_layers
    if layers is None:
        shared = [n for n in range(dsa.num_hidden_layers) if not dsa.has_indexer(n)]
        layers = [0, *shared[:1], dsa.num_hidden_layers // 2, last]
    if not layers or not all(0 <= layer <= most for layer in layers):
        raise ValueError(f"layers {list(layers)} are asked for; this model has 0 to {most}")
    topk, limit = dsa.index_topk, int(config.get("max_position_embeddings") or 1 << 30)
    if lengths is None:
        longest = min(LONGEST * topk, limit)
        lengths = [n for n in (topk, topk + 1, 4 * topk) if n < longest] + [longest]
    if not lengths or not all(1 <= length <= limit for length in lengths):
        raise ValueError(
            f"lengths {list(lengths)} are asked for; this model takes 1 to {limit:,} tokens "
            "(max_position_embeddings)"
        )
    return Plan(tuple(sorted(set(layers))), tuple(sorted(set(lengths))))


def _without(layers: Sequence[int], skipped: Sequence[int]) -> tuple[int, ...]:
    return tuple(layer for layer in layers if layer not in skipped)


class _Run:
    """The layers of a plan, one in memory at a time."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], headers: Headers, plan: Plan
    ) -> None:
        self.plan, self._folder, self._config = plan, folder, config
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.setting = Setting.of(config, max(*plan.lengths, MAX_TOKENS), device)
        self.tensors = Tensors(folder, headers, device)
        self._hidden = HiddenStates(
            self.tensors, headers, self.setting.dsa, self.setting.maths, self.setting.table
        )
        self._selected: dict[tuple[int, int, bool], Tensor] = {}
        self._done = 0

    def described(self) -> str:
        """What was read and where it ran; empty where nothing was."""
        if not self._done:
            return ""
        read = min(max(self.plan.lengths), MAX_TOKENS)
        tail = f", repeated after {read:,} tokens" if max(self.plan.lengths) > read else ""
        return (
            f"{self._hidden.origin}{tail}; true hidden states up to layer {self._hidden.layer}, "
            f"what that layer reads for those above; on {self.setting.table.device.type}, "
            f"{self.setting.dtype_name}"
        )

    def layers(self, progress: Progress) -> Iterator[tuple[list[Cell], list[Recall]]]:
        """Each layer's cells and recalls."""
        if self.plan.layers:
            self._hidden.begin(self._folder, max(self.plan.lengths))
        for layer in self.plan.layers:
            source = source_of(self.setting.dsa, layer)
            if source != layer and not any(key[0] == source for key in self._selected):
                self._select(source)
            yield self._layer(layer, source, progress)
            self._selected = {key: v for key, v in self._selected.items() if key[0] == source}

    def _bound(self, layer: int) -> BoundLayer:
        weights = read_layer(self.tensors, self.setting.dsa, layer)
        return BoundLayer(weights, self._hidden.of(layer, weights, self._config), self.setting)

    def _select(self, layer: int) -> None:
        """Run a layer for its selections alone."""
        bound = self._bound(layer)
        for length, fp8 in product(self.plan.lengths, (False, True)):
            served = bound.serve(bound.request(length), None, fp8=fp8)
            self._selected[layer, length, fp8] = served.topk_indices

    def _layer(
        self, layer: int, source: int, progress: Progress
    ) -> tuple[list[Cell], list[Recall]]:
        cells, recalls, bound = [], [], self._bound(layer)
        total = 2 * len(self.plan.layers) * len(self.plan.lengths)
        for length in self.plan.lengths:
            request = bound.request(length)
            exact = Exact(bound.weights, request, self.setting.dsa, self.setting.table)
            for fp8 in (False, True):
                progress(self._done, total, f"layer {layer}, {length:,} tokens")
                place = Place(layer, source, length, layer == self._hidden.layer)
                shared = None if source == layer else self._selected[source, length, fp8]
                cell, selected = bound.cell(place, exact, request, shared, fp8=fp8)
                cells.append(cell)
                self._selected.setdefault((layer, length, fp8), selected)
                self._done += 1
            if request.keys is not None and length >= _TELLING * self.setting.maths.index_topk:
                recalls.append(recall_of(exact, layer, self.setting.maths))
        progress(self._done, total, "")
        return cells, recalls
