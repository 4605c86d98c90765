"""Log-probabilities of a small checkpoint in transformers, and how far rounding moves them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dsa_plugin.in_transformers.cached_sequence import CachedSequence
from dsa_plugin.in_transformers.checkpoint import load_pretrained, load_tokenizer

_MAX_BYTES = 8 << 30


class Reference:
    """A checkpoint, in fp32 and in bf16."""

    def __init__(self, checkpoint: Path) -> None:
        """Load it.

        Raises:
            ValueError: it is no DSA checkpoint, incomplete, or too large to be run here.
        """
        size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        if size > _MAX_BYTES:
            raise ValueError(
                f"{checkpoint} has {size / 2**30:.0f} GiB, more than the {_MAX_BYTES >> 30} that "
                "are run here as a reference; leave CHECKPOINT out and give --index-topk"
            )
        self._checkpoint = checkpoint
        self._tokenizer = load_tokenizer(checkpoint)
        self._exact = load_pretrained(checkpoint, torch.float32)
        self._known: dict[tuple[int, ...], list[float]] = {}

    @cached_property
    def _rounded(self) -> Any:
        return load_pretrained(self._checkpoint, torch.bfloat16)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text."""
        found: list[int] = self._tokenizer(text)["input_ids"]
        return found

    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Of each token but the first, in fp32."""
        key = tuple(tokens)
        if key not in self._known:
            self._known[key] = _logprobs(self._exact, tokens)
        return self._known[key]

    def rounding(self, tokens: Sequence[int]) -> list[float]:
        """How far bf16 moves each of them."""
        rounded, exact = _logprobs(self._rounded, tokens), self.logprobs(tokens)
        return [abs(a - b) for a, b in zip(rounded, exact, strict=True)]


@torch.inference_mode()
def _logprobs(model: Any, tokens: Sequence[int]) -> list[float]:
    return CachedSequence(model).token_logprobs(tokens)
