"""A checkpoint in transformers, eager: the reference, which needs no host and no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dsa_plugin.evaluation.selection import applied
from dsa_plugin.evaluation.variants import Variant
from dsa_plugin.in_transformers.cached_sequence import CachedSequence, end_tokens
from dsa_plugin.in_transformers.checkpoint import load_pretrained, load_tokenizer

Dtype = Literal["auto", "float32", "bfloat16"]
_DTYPES: dict[Dtype, torch.dtype | Literal["auto"]] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}


class TransformersModel:
    """Greedy answers and log-probabilities, one request at a time.

    Questions about one text share its caches: latents, index keys, and their expanded keys and
    values, which transformers alone would compute again for each token.
    """

    def __init__(self, checkpoint: Path, dtype: Dtype, context: int) -> None:
        """Load a checkpoint.

        Args:
            checkpoint: its folder, with a tokenizer.
            dtype: of weights and caches; auto: as stored.
            context: tokens of the longest request.

        Raises:
            ValueError: transformers is not installed, or weights are missing or left over.
        """
        self.model = load_pretrained(checkpoint, _DTYPES[dtype])
        self.tokenizer = load_tokenizer(checkpoint)
        self.context = context
        self._ends = end_tokens(self.model)
        for layer in self.model.model.layers:
            expanded = _Expanded(layer.self_attn, context)
            layer.self_attn.expand_kv = expanded

    @contextmanager
    def under(self, variant: Variant) -> Iterator[TransformersModel]:
        """The model, selecting by a variant until the block ends."""
        with applied(self.model, variant, self.context):
            yield self

    @torch.inference_mode()
    def complete(self, text: str, asks: Sequence[str], max_tokens: int, stop: str) -> list[str]:
        """What the model says after `text + ask`, for each ask, up to `stop`.

        Raises:
            ValueError: a request is longer than the context.
        """
        prompts = [self._tokens(text + ask, max_tokens) for ask in asks]
        # Where the text ends a token may reach into the question. Each question keeps one at least.
        shared = min(_common_prefix(prompts), *(len(prompt) - 1 for prompt in prompts))
        run = _Run(self.model)
        if shared:
            run.logits(prompts[0][:shared])
        answers = []
        for prompt in prompts:
            answers.append(self._continue(run, prompt[shared:], max_tokens, stop))
            run.crop(shared)
        return answers

    @torch.inference_mode()
    def token_logprobs(self, text: str) -> list[float]:
        """Log-probability of each token of a text but the first."""
        return _Run(self.model).token_logprobs(self._tokens(text, 0))

    def _continue(self, run: _Run, tokens: list[int], max_tokens: int, stop: str) -> str:
        answer: list[int] = []
        text: str = ""
        while len(answer) < max_tokens:
            token = int(run.logits(tokens).argmax())
            if token in self._ends:
                break
            answer.append(token)
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            if stop in text:
                break
            tokens = [token]
        # A server holds back a character that is cut off; decoded it is this one.
        return text.partition(stop)[0].rstrip("\N{REPLACEMENT CHARACTER}")

    def _tokens(self, text: str, room: int) -> list[int]:
        tokens: list[int] = self.tokenizer(text)["input_ids"]
        if len(tokens) + room > self.context:
            raise ValueError(
                f"a request has {len(tokens)} tokens and {room} of its answer, and the longest of "
                f"--lengths leaves room for {self.context}: this tokenizer needs more tokens for "
                "the exam's words than its own; choose smaller --lengths"
            )
        return tokens


class _Run(CachedSequence):
    """One sequence that can forget its end."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.crop(0)

    def logits(self, tokens: list[int]) -> Tensor:
        """Of the last token, [vocab]."""
        found = torch.empty(0)
        for _, logits in self.chunks(tokens, logits_to_keep=1):
            found = logits[-1]
        return found

    def crop(self, length: int) -> None:
        """Forget what comes after the first `length` tokens."""
        if self.length > length:
            self.cache.crop(length - self.length)
        self.length = length
        for layer in self.model.model.layers:
            layer.self_attn.expand_kv.length = length


class _Expanded:
    """Attention's expand_kv that expands each latent once."""

    def __init__(self, attention: Any, context: int) -> None:
        self.expand, self.context = attention.expand_kv, context
        self.length = 0
        self.states: tuple[Tensor, ...] = ()

    def __call__(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, ...]:
        """Keys and values [1, heads, T, head dim] of all T latents [1, 1, T, kv_lora_rank]."""
        new = self.expand(kv_nope[:, :, self.length :], k_rot[:, :, self.length :])
        if not self.states:
            self.states = tuple(x.new_empty(*x.shape[:2], self.context, x.shape[3]) for x in new)
        end = kv_nope.shape[2]
        for states, added in zip(self.states, new, strict=True):
            states[:, :, self.length : end] = added
        self.length = end
        return tuple(states[:, :, :end] for states in self.states)


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    length = 0
    for column in zip(*prompts, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length
