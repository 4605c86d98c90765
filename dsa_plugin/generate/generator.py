"""Prompts in, tokens out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from dsa_plugin.env import Env
from dsa_plugin.generate.caches import LayerCache, PagedRequests
from dsa_plugin.generate.model import Model
from dsa_plugin.generate.sampling import Sampler, Sampling
from dsa_plugin.training.rope import angles, inverse_frequencies

Prompt = Sequence[int]


@dataclass(frozen=True)
class Limits:
    """Of one run.

    Attributes:
        new_tokens: most tokens of an answer, its end token among them.
        batch: prompts that are answered together.
        prefill_rows: tokens of a prompt that are read at once; bounds memory, changes no answer.
    """

    new_tokens: int = 256
    batch: int = 8
    prefill_rows: int = 1024


@dataclass
class Spent:
    """Tokens and seconds, of prompts and of answers."""

    read: int = 0
    read_seconds: float = 0.0
    written: int = 0
    write_seconds: float = 0.0

    def __str__(self) -> str:
        rates = (
            f"{self.read} tokens read at {self.read / max(self.read_seconds, 1e-9):.1f} a second",
            f"{self.written} written at {self.written / max(self.write_seconds, 1e-9):.1f}",
        )
        return ", ".join(rates)


class Generator:
    """A model and how it is asked. Of several ranks all call the same methods in one order."""

    def __init__(self, model: Model, sampling: Sampling, limits: Limits) -> None:
        self.model, self.sampling, self.limits = model, sampling, limits
        self.config, self.ranks = model.config, model.ranks
        self.dtype = model.lm_head.weight.dtype
        self.spent = Spent()
        env, device = Env.load(), self.ranks.device
        self._workspace_bytes = env.logits_workspace_mb << 20
        self._fp8_keys = env.index_cache_is_fp8(device.type)
        self._cos_sin = torch.empty(0, device=device)

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError unless a prompt and its answer fit the model."""
        sizes = self.config.sizes
        longest = sizes.max_position_embeddings
        if not 0 < len(prompt) <= longest - self.limits.new_tokens:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens; with {self.limits.new_tokens} new ones it may "
                f"have 1 to {longest - self.limits.new_tokens}: the model has {longest} positions"
            )
        if max(prompt) >= sizes.vocab_size:
            raise ValueError(
                f"token {max(prompt)}; the model has {sizes.vocab_size}: is the tokenizer its own?"
            )

    def follow(self) -> None:
        """Help rank 0 answer until it has no more; for all other ranks."""
        while prompts := self.ranks.agree_on_prompts([]):
            for _ in self._stream(prompts):
                pass

    def dismiss(self) -> None:
        """End `follow` on the other ranks."""
        self.ranks.agree_on_prompts([])

    def generate(self, prompts: Sequence[Prompt], first: int = 0) -> list[list[int]]:
        """The new tokens of each prompt, with the end token where there is one; see `stream`."""
        answers: list[list[int]] = [[] for _ in prompts]
        for request, token in self.stream(prompts, first):
            answers[request].append(token)
        return answers

    def stream(self, prompts: Sequence[Prompt], first: int = 0) -> Iterator[tuple[int, int]]:
        """(prompt's number, token) as they come, of prompts that are answered together.

        Args:
            prompts: numbered from 0.
            first: what is added to their numbers for the seed.
        """
        for prompt in prompts:
            self.check(prompt)
        return self._stream(self.ranks.agree_on_prompts(prompts), first)

    @torch.inference_mode()
    def _stream(self, prompts: list[list[int]], first: int = 0) -> Iterator[tuple[int, int]]:
        config, device = self.config.attention, self.ranks.device
        lengths = [len(prompt) + self.limits.new_tokens for prompt in prompts]
        self._cover(max(lengths))
        pages = PagedRequests(config, lengths, device, self._workspace_bytes)
        caches = pages.caches(config, self.dtype, fp8_keys=self._fp8_keys)
        sampler = Sampler(self.sampling, range(first, first + len(prompts)))
        began = perf_counter()
        newest: dict[int, int] = {}  # the last token of each request that goes on
        for request, prompt in enumerate(prompts):
            logits = self._prefill(pages, caches, request, prompt)
            [newest[request]] = self._draw(sampler, logits, [request])
        self.spent.read += sum(map(len, prompts))
        self.spent.read_seconds += perf_counter() - began
        for step in range(self.limits.new_tokens):
            yield from newest.items()
            newest = {r: t for r, t in newest.items() if t not in self.config.end_tokens}
            if not newest or step + 1 == self.limits.new_tokens:
                return
            began, going = perf_counter(), list(newest)
            starts = [len(prompts[request]) + step for request in going]
            batch = pages.decode(going, list(newest.values()), starts)
            logits = self.model(batch, self._cos_sin, caches)
            newest = dict(zip(going, self._draw(sampler, logits, going), strict=True))
            self.spent.written += len(going)
            self.spent.write_seconds += perf_counter() - began

    def _prefill(
        self, pages: PagedRequests, caches: list[LayerCache], request: int, prompt: list[int]
    ) -> Tensor:
        """Logits [1, vocab] of the prompt's last token."""
        logits = torch.empty(0)
        for start in range(0, len(prompt), self.limits.prefill_rows):
            part = prompt[start : start + self.limits.prefill_rows]
            logits = self.model(pages.prefill(request, part, start), self._cos_sin, caches)
        return logits

    def _draw(self, sampler: Sampler, logits: Tensor, requests: list[int]) -> list[int]:
        """The same tokens on every rank."""
        tokens: list[int] = self.ranks.agree(sampler.draw(logits, requests)).tolist()
        return tokens

    def _cover(self, positions: int) -> None:
        """Have RoPE's angles for so many."""
        if len(self._cos_sin) >= positions:
            return
        sizes = self.config.sizes
        frequencies = inverse_frequencies(
            sizes.qk_rope_head_dim, sizes.rope_theta, sizes.rope_scaling
        )
        cos_sin = torch.cat(angles(torch.arange(positions), frequencies), dim=-1)
        self._cos_sin = cos_sin.to(self.ranks.device)
