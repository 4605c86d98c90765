"""Where a small model starts, so that it learns retrieval in minutes and not in days.

From a usual start a small model sits on a plateau where it guesses among the words of all facts.
It leaves it once it can look a key up: heads of layer 0 that see the tokens before, heads of later
layers that match what came before them with what came before others, and copy. These are put into
the weights here, roughly; training makes them exact and does the rest.
"""

import math

import torch
from torch import Tensor

from dsa_plugin.training.attention import COPY_HEADS, Attention
from dsa_plugin.training.model import DsaModel

EMBEDDING_STD = 0.5
# Of the o and down projections, so that layers start near the identity.
OUTPUT_GAIN = 0.1
COPY_GAIN = 0.5
# Peak of a look-back head's logits, and the power of their frequencies that weighs them: of the
# attention 3/4 is where it should be, and none is far away in 16384 tokens.
POSITION_LOGIT = 24.0
FREQUENCY_POWER = 0.25
# Distances that the heads of layer 0 look back at, one each.
DISTANCES = (1, 2, 3, 4)
CODE_STD = 1.0
# Logits that one matching token adds.
MATCH_LOGIT = 10.0


@torch.no_grad()
def initialise(model: DsaModel, seed: int) -> None:
    """Fills all parameters; the head is tied to the embedding."""
    generator = torch.Generator().manual_seed(seed)
    hidden = model.sizes.hidden_size
    model.lm_head.weight = model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        if name == "model.embed_tokens.weight":
            parameter.normal_(std=EMBEDDING_STD, generator=generator)
        elif parameter.dim() == 2:
            gain = OUTPUT_GAIN if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            parameter.normal_(std=gain * parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    # Row 0 of every embedding is one constant: projections have no bias, and attention by position
    # alone needs a query that does not depend on the token.
    constant = EMBEDDING_STD * math.sqrt(hidden) / 2
    model.model.embed_tokens.weight[:, 0] = constant
    model.model.norm.weight.fill_(10 / (EMBEDDING_STD * hidden))
    layers = model.attentions()
    normed = constant / math.sqrt(EMBEDDING_STD**2 + constant**2 / hidden)
    # Layer 0 writes what stood at each distance into dimensions of their own.
    code = hidden // len(DISTANCES)
    reader = torch.randn(code, hidden, generator=generator) * hidden**-0.5
    reader[:, 0] = 0
    places = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator)).Q
    codes = places.split(code, dim=1)[: len(DISTANCES)]
    turns = [torch.linalg.qr(torch.randn(code, code, generator=generator)).Q for _ in DISTANCES]
    # What the copying heads add up: the place before in a query is the same place in a key.
    before = (reader, *(place.T for place in codes[:-1]))
    query = torch.stack([turn @ rows for turn, rows in zip(turns, before, strict=True)]).sum(0)
    key = torch.stack([turn @ place.T for turn, place in zip(turns, codes, strict=True)]).sum(0)
    _look_back(layers[0], model.get_buffer("inverse_frequencies"), normed)
    _write_codes(layers[0], reader, codes)
    for attention in layers[1:]:
        _match(attention, query, key)
        _copy_what_is_attended(attention)


def _look_back(attention: Attention, inverse_frequencies: Tensor, constant: float) -> None:
    """Lets each head of layer 0 attend to one distance, by the rows under RoPE.

    ``constant`` is hidden row 0 after the layer's norm. A key carries 1 in the first row of each
    pair, a query cos and -sin of its distance, and RoPE turns the product into a sum over
    frequencies of cos(frequency * (distance - wanted)), which peaks where it should.
    """
    sizes = attention.sizes
    k_pe = attention.kv_a_proj_with_mqa.weight[sizes.kv_lora_rank :]
    k_pe.mul_(0.1)
    k_pe[0::2, 0] = 1 / constant
    # One row of the query's latent is the constant and 3 times the size of the others.
    latent = attention.q_a_proj.weight
    latent[0] = 0
    latent[0, 0] = 3 / constant
    rows = attention.q_b_proj.weight.unflatten(0, (attention.heads, -1))
    weights = inverse_frequencies**FREQUENCY_POWER
    weights = POSITION_LOGIT / 3 * math.sqrt(sizes.qk_head_dim) * weights / weights.sum()
    for head, distance in enumerate(DISTANCES[: attention.heads]):
        q_pe = rows[head, sizes.qk_nope_head_dim :]
        q_pe.mul_(0.1)
        q_pe[0::2, 0] = weights * torch.cos(inverse_frequencies * distance)
        q_pe[1::2, 0] = -weights * torch.sin(inverse_frequencies * distance)


def _write_codes(attention: Attention, reader: Tensor, codes: tuple[Tensor, ...]) -> None:
    """Lets each head of layer 0 write `reader` of the token it sees into its own dimensions."""
    sizes, width = attention.sizes, len(reader)
    attention.kv_a_proj_with_mqa.weight[:width] = reader
    up = attention.kv_b_proj.weight.unflatten(0, (attention.heads, -1))
    out = attention.o_proj.weight.unflatten(1, (attention.heads, -1))
    for head, code in enumerate(codes[: attention.heads]):
        up[head, sizes.qk_nope_head_dim :][:width] = torch.eye(width, sizes.kv_lora_rank)
        out[:, head, :width] = CODE_STD * code


def _match(attention: Attention, query: Tensor, key: Tensor) -> None:
    """Lets the copying heads attend to what followed when the same tokens stood there before.

    ``query`` and ``key`` [width, hidden] read what such a head compares.
    """
    sizes, width = attention.sizes, len(query)
    attention.q_a_proj.weight[:width] = query
    attention.kv_a_proj_with_mqa.weight[:width] = key
    gain = MATCH_LOGIT * math.sqrt(sizes.qk_head_dim) / width
    q_rows = attention.q_b_proj.weight.unflatten(0, (attention.heads, -1))
    up = attention.kv_b_proj.weight.unflatten(0, (attention.heads, -1))
    for head in range(COPY_HEADS):
        q_rows[head].mul_(0.1)
        q_rows[head, :width] = gain * torch.eye(width, sizes.q_lora_rank)
        up[head, :width] = torch.eye(width, sizes.kv_lora_rank)
    up[:, sizes.qk_nope_head_dim :, :width] = 0


def _copy_what_is_attended(attention: Attention) -> None:
    """Sets o_proj to a multiple of (W_v W_kv_a)^T, so that a head's output is what it looked at."""
    sizes = attention.sizes
    down = attention.kv_a_proj_with_mqa.weight[: sizes.kv_lora_rank]
    up = attention.kv_b_proj.weight.unflatten(0, (attention.heads, -1))
    for head in range(attention.heads):
        value = up[head, sizes.qk_nope_head_dim :] @ down
        gain = COPY_GAIN * EMBEDDING_STD * sizes.hidden_size / value.norm() ** 2
        columns = slice(head * sizes.v_head_dim, (head + 1) * sizes.v_head_dim)
        attention.o_proj.weight[:, columns] = value.T * gain
