"""One sequence in transformers' own cache, read in chunks that bound the memory of scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# The eager indexer holds scores [rows, index heads, context] in fp32, three at a time.
_SCORE_BYTES = 128 << 20
_MAX_ROWS = 512


class CachedSequence:
    """Attributes: `length`, tokens that were read; in a layer's forward pass, those before it."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.length = 0

    def chunks(
        self, tokens: Sequence[int], logits_to_keep: int = 0
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Read tokens; yields each chunk of them with its logits, [chunk, vocab].

        Args:
            tokens: that follow those read.
            logits_to_keep: of each chunk, the last; 0: all.
        """
        config = self.model.config
        heads = max(config.index_n_heads, config.num_attention_heads)
        rows = _SCORE_BYTES // (4 * heads * (self.length + len(tokens)))
        rows = max(1, min(_MAX_ROWS, rows))
        for start in range(0, len(tokens), rows):
            chunk = tokens[start : start + rows]
            output = self.model(
                torch.tensor([list(chunk)], device=self.model.device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            )
            self.length += len(chunk)
            yield chunk, output.logits[0]

    def token_logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Read all tokens but the last; log-probability of each but the first, in fp32."""
        found: list[float] = []
        for chunk, logits in self.chunks(tokens[:-1]):
            following = torch.tensor(tokens[len(found) + 1 : len(found) + 1 + len(chunk)])
            logprobs = logits.float().log_softmax(-1)
            found += logprobs.gather(1, following[:, None])[:, 0].tolist()
        return found


def end_tokens(model: Any) -> set[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())
