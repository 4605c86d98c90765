"""Variants of transformers' DSA models: what their indexers select, changed from outside.

An indexer's `forward` returns topk_indices [B, S, <= index_topk], positions in the request; entries
of the future are masked by the caller. B is 1 here, and positions count from 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsa_kernels.cache_write.reference import hadamard_matrix
from dsa_plugin.evaluation.variants import Variant

PAGE = 64
"""Tokens of a page of index keys, as stale_index_page has them."""
_STALE_EVERY = 4
Rule = Callable[[Tensor, int], Tensor]
"""Positions [S] and k -> selected positions [S, k]; one may be named twice."""


@contextmanager
def applied(model: Any, variant: Variant, context: int, seed: int = 0) -> Iterator[None]:
    """Have a model select by a variant until the block ends.

    Args:
        model: DeepseekV32ForCausalLM or GlmMoeDsaForCausalLM of transformers.
        variant: one of VARIANTS.
        context: tokens of the longest request.
        seed: of what is chosen at random.

    Raises:
        ValueError: the model shares no selection, so none can be lost.
    """
    with ExitStack() as undo:
        for number, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            if attention.indexer is not None:
                k = variant.index_topk(model.config.index_topk, context)
                _change(undo, attention.indexer, variant.name, k, seed + number)
            elif variant.name == "shared_selection_lost":
                _replace(undo, attention, "forward", partial(_unshared, attention, seed + number))
        if variant.name == "shared_selection_lost" and not shares_selection(model.config):
            raise ValueError(
                "shared_selection_lost: each layer of this model selects for itself; leave it out"
            )
        yield


def shares_selection(config: Any) -> bool:
    """Whether some layer reuses the selection of the one before."""
    return "shared" in (getattr(config, "indexer_types", None) or ())


def _change(undo: ExitStack, indexer: Any, variant: str, k: int, seed: int) -> None:
    _replace(undo, indexer, "index_topk", k)
    rules: dict[str, Rule] = {
        "dense": _everything,
        "window": last_tokens,
        "random": partial(random_tokens, seed=seed),
    }
    keys: dict[str, type[ChangedKeys]] = {
        "hadamard_one_side": RotatedKeys,
        "stale_index_page": StaleKeys,
    }
    if variant in rules:
        _replace(undo, indexer, "forward", partial(_ruled, rules[variant], k))
    elif variant in keys:
        _replace(undo, indexer, "forward", partial(_with_keys, indexer.forward, keys[variant]))
    elif variant == "indexer_rope_style":
        order = _as_other_style(indexer)
        queries = indexer.wq_b.weight.unflatten(0, (-1, indexer.head_dim)).transpose(0, 1)
        norm = indexer.k_norm
        for rows in (queries, indexer.wk.weight, norm.weight, norm.bias):
            data, kept = rows.data, rows.data.clone()
            undo.callback(data.copy_, kept)
            data.copy_(kept[order])


def _replace(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of a module, which was its class's or its own, until `undo` closes."""
    if name in vars(owner):
        undo.callback(setattr, owner, name, getattr(owner, name))
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def _as_other_style(indexer: Any) -> Tensor:
    """Order of a head's dimensions in which its own style rotates the pairs of the other style.

    Queries and keys stay in that order, which their dot products do not see.
    """
    order = torch.arange(indexer.head_dim)
    pairs = order[: indexer.qk_rope_head_dim]
    # transformers fixes the style of each family: V3.2's indexer rotates halves, GLM's pairs.
    shape = (-1, 2) if indexer.config.model_type == "deepseek_v32" else (2, -1)
    return torch.cat((pairs.view(shape).T.flatten(), order[len(pairs) :]))


def _everything(positions: Tensor, k: int) -> Tensor:
    return torch.arange(min(k, int(positions[-1]) + 1)).expand(len(positions), -1)


def last_tokens(positions: Tensor, k: int) -> Tensor:
    """A sliding window: each row's own token and the k - 1 before it."""
    return (positions[:, None] - torch.arange(k)).clamp(min=0)


def random_tokens(positions: Tensor, k: int, *, seed: int) -> Tensor:
    """k of each row's visible tokens; the same at a position whatever is computed beside it."""
    generator = torch.Generator()
    selected = positions[:, None].repeat(1, k)
    for row, position in zip(selected, positions.tolist(), strict=True):
        # It takes 32 bits of a seed.
        generator.manual_seed((seed * 1_000_003 + position) % 2**32)
        drawn = torch.randperm(position + 1, generator=generator)[:k]
        row[: len(drawn)] = drawn
    return selected


def _ruled(
    rule: Rule,
    k: int,
    _hidden_states: Tensor,
    _q_resid: Tensor,
    _position_embeddings: Any,
    _attention_mask: Tensor,
    position_ids: Tensor,
    *,
    past_key_values: Any,  # noqa: ARG001  the indexer's signature; a rule needs no keys
) -> Tensor:
    return rule(position_ids[0], k)[None].int()


def _with_keys(
    forward: Callable[..., Tensor], changed: type[ChangedKeys], *args: Any, past_key_values: Any
) -> Tensor:
    return forward(*args, past_key_values=changed(past_key_values))


def _unshared(attention: Any, seed: int, *args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
    k = attention.config.index_topk
    selected = random_tokens(position_ids[0], k, seed=seed)[None].int()
    kwargs["prev_topk_indices"] = selected
    return type(attention).forward(attention, *args, position_ids=position_ids, **kwargs)


class ChangedKeys(ABC):
    """The part of a cache that an indexer uses, with other keys in it."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    @abstractmethod
    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        """Store keys [1, S, D]; returns all keys [1, T, D]."""


class RotatedKeys(ChangedKeys):
    """Keys times Hadamard's matrix."""

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        matrix = hadamard_matrix(keys.device).to(keys.dtype)
        stored: Tensor = self.cache.update_indexer(keys @ matrix, layer_idx)
        return stored


class StaleKeys(ChangedKeys):
    """Keys of which every fourth page is the one before it."""

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        stored: Tensor = self.cache.update_indexer(keys, layer_idx)
        at = torch.arange(stored.shape[1])
        stale = at // PAGE % _STALE_EVERY == _STALE_EVERY - 1
        return stored[:, torch.where(stale, at - PAGE, at)]
