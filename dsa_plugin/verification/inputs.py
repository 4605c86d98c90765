"""What layers read: hidden states of a text, as far as they can be had, and their projections.

The layers before the first with experts are run, in fp32 and by the reference; what that first one
reads stands in for the input of all layers above it, through their own norms. Running experts would
read the whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa_kernels.dims import INDEX_HEAD_DIM
from dsa_plugin.config import DSAConfig
from dsa_plugin.training.prose import training_prose
from dsa_plugin.verification import reference
from dsa_plugin.verification.headers import Headers, can_run, readable
from dsa_plugin.verification.reference import Maths, Norms
from dsa_plugin.verification.weights import LayerWeights, Tensors, read_layer

MAX_TOKENS = 4096
"""Of the text; what is longer repeats it, at new positions."""
_EMBEDDING = "model.embed_tokens.weight"
_FLOATS = {"F32", "F16", "BF16"}
_SEED = 20251117
_CHARACTERS_A_TOKEN = 6
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Request:
    """One request of L tokens in one layer, in the dtype that is served, before norm and RoPE.

    Attributes:
        kv: [L, 576].
        keys: [L, 128], None without an indexer.
        rows: [R] int64, positions that are looked at: the last ones.
        q: [R, heads, nope + 64].
        index_q, index_weights: [R, index heads, 128] and [R, index heads].
    """

    kv: Tensor
    keys: Tensor | None
    rows: Tensor
    q: Tensor
    index_q: Tensor | None
    index_weights: Tensor | None


def text_ids(folder: Path, vocab: int, count: int) -> tuple[Tensor, str]:
    """Token ids [count], and where they are from.

    Raises:
        ValueError: the tokenizer knows tokens that the embedding has not.
    """
    if not (folder / "tokenizer.json").is_file():
        generator = torch.Generator().manual_seed(_SEED)
        ids = torch.randint(0, vocab, (count,), generator=generator)
        return ids, "random tokens, as there is no tokenizer.json"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = training_prose()[: count * _CHARACTERS_A_TOKEN]
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    if int(ids.max()) >= vocab:
        raise ValueError(
            f"tokenizer.json has token {int(ids.max())} and the embedding {vocab} rows; take both "
            "from the same checkpoint"
        )
    return ids.repeat(-(-count // len(ids)))[:count], "prose by the checkpoint's tokenizer"


class HiddenStates:
    """The residual stream, layer by layer upwards.

    Attributes:
        origin: where the tokens are from.
        layer: the last whose true input is known.
    """

    def __init__(
        self, tensors: Tensors, headers: Headers, dsa: DSAConfig, maths: Maths, table: Tensor
    ) -> None:
        self._tensors, self._headers, self._dsa = tensors, headers, dsa
        self._maths, self._table = maths, table
        self._residual = torch.empty(0)
        self._mask: Tensor | None = None
        self.origin, self.layer = "", 0

    def begin(self, folder: Path, tokens: int) -> None:
        """Embed a text of so many tokens, at most MAX_TOKENS.

        Raises:
            ValueError: the checkpoint has no plain embedding.
        """
        header = self._headers.tensors.get(_EMBEDDING)
        if header is None or header["dtype"] not in _FLOATS:
            raise ValueError(
                f"{folder} has no unquantised {_EMBEDDING}, from which inputs are made; "
                "check its files alone: --quick"
            )
        ids, self.origin = text_ids(folder, header["shape"][0], min(tokens, MAX_TOKENS))
        self._residual = self._tensors.rows(_EMBEDDING, ids.tolist())

    def of(self, layer: int, weights: LayerWeights, config: Mapping[str, Any]) -> Tensor:
        """What a layer's attention reads, [tokens, hidden_size] fp32; layers come in order."""
        dense = int(config.get("first_k_dense_replace") or 0)
        while self.layer < min(layer, dense) and self._can_run(self.layer):
            self._run(self.layer)
            self.layer += 1
        return self._normed(weights.input_layernorm)

    def is_true(self, layer: int) -> bool:
        """Whether `of` gives the layer's own input, and not that of a layer below it."""
        return layer == self.layer

    def _normed(self, weight: Tensor) -> Tensor:
        return reference.rms_norm(self._residual, weight, self._maths.rms_norm_eps)

    def _can_run(self, layer: int) -> bool:
        names = [f"model.layers.{layer}.mlp.{name}.weight" for name in _MLP]
        return can_run(self._headers, self._dsa, layer) and all(
            readable(self._headers, name) for name in names
        )

    def _run(self, layer: int) -> None:
        prefix, tensors = f"model.layers.{layer}.", self._tensors
        weights = read_layer(tensors, self._dsa, layer)
        x = self._normed(weights.input_layernorm)
        o_proj = tensors.read(f"{prefix}self_attn.o_proj.weight")
        self._residual = self._residual + self._attend(weights, x) @ o_proj.T
        x = self._normed(tensors.read(f"{prefix}post_attention_layernorm.weight"))
        gate, up = (x @ tensors.read(f"{prefix}mlp.{name}.weight").T for name in _MLP[:2])
        down = tensors.read(f"{prefix}mlp.down_proj.weight")
        self._residual = self._residual + (F.silu(gate) * up) @ down.T

    def _attend(self, weights: LayerWeights, x: Tensor) -> Tensor:
        maths, table = self._maths, self._table
        rows = torch.arange(len(x), device=x.device)
        request = project(weights, x, len(x), rows, self._dsa, maths.rms_norm_eps)
        norms = norms_of(weights)
        latents = reference.latents(request.kv, norms, rows, table, maths)
        if request.keys is not None:
            self._mask = selected(request, norms, table, maths)
        assert self._mask is not None
        w_uk, w_uv = split_kv_b(weights.kv_b_proj, self._dsa)
        query = reference.absorbed(request.q, w_uk, rows, table, maths)
        return reference.attend(query, latents, self._mask, w_uv, maths).flatten(1)


def project(
    weights: LayerWeights, x: Tensor, length: int, rows: Tensor, dsa: DSAConfig, eps: float
) -> Request:
    """A request of `length` tokens whose inputs are x [T, hidden], again and again; fp32."""
    place = torch.arange(length, device=x.device) % len(x)
    queried = x[place[rows]]
    q_latent = reference.rms_norm(queried @ weights.q_a_proj.T, weights.q_a_layernorm, eps)
    q = (q_latent @ weights.q_b_proj.T).unflatten(-1, (dsa.num_attention_heads, -1))
    kv = (x[:length] @ weights.kv_a_proj.T)[place]
    indexer = weights.indexer
    if indexer is None:
        return Request(kv, None, rows, q, None, None)
    return Request(
        kv=kv,
        keys=(x[:length] @ indexer.wk.T)[place],
        rows=rows,
        q=q,
        index_q=(q_latent @ indexer.wq_b.T).unflatten(-1, (-1, INDEX_HEAD_DIM)),
        index_weights=queried @ indexer.weights_proj.T,
    )


def converted(request: Request, dtype: torch.dtype) -> Request:
    """In another dtype, positions as they are."""

    def of(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.to(dtype)

    return Request(
        kv=request.kv.to(dtype),
        keys=of(request.keys),
        rows=request.rows,
        q=request.q.to(dtype),
        index_q=of(request.index_q),
        index_weights=of(request.index_weights),
    )


def norms_of(weights: LayerWeights) -> Norms:
    """Of latents and index keys."""
    if weights.indexer is None:
        return Norms(weights.kv_a_layernorm)
    return Norms(weights.kv_a_layernorm, weights.indexer.k_norm, weights.indexer.k_norm_bias)


def split_kv_b(kv_b_proj: Tensor, dsa: DSAConfig) -> tuple[Tensor, Tensor]:
    """w_uk [heads, nope, 512] and w_uv [heads, 512, v_head_dim]."""
    heads = kv_b_proj.unflatten(0, (dsa.num_attention_heads, -1))
    w_uk, w_uv = heads.split((dsa.qk_nope_head_dim, dsa.v_head_dim), 1)
    return w_uk, w_uv.transpose(1, 2)


def scored(request: Request, norms: Norms, table: Tensor, maths: Maths) -> Tensor:
    """Index scores [R, L] of the request's rows."""
    assert request.keys is not None
    assert request.index_q is not None
    assert request.index_weights is not None
    everything = torch.arange(len(request.keys), device=request.keys.device)
    keys = reference.index_keys(request.keys, norms, everything, table, maths)
    query, weights = reference.index_queries(
        request.index_q, request.index_weights, request.rows, table, maths
    )
    return reference.scores(query, weights, keys, request.rows, maths)


def selected(request: Request, norms: Norms, table: Tensor, maths: Maths) -> Tensor:
    """[R, L] bool."""
    return reference.top(scored(request, norms, table, maths), maths.index_topk)
