"""The numbers of a checkpoint that a model is built from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

from dsa_plugin.config import DSAConfig
from dsa_plugin.config_file import read_config
from dsa_plugin.fp8_weights import WEIGHT_BLOCK
from dsa_plugin.training.sizes import ModelSizes


@dataclass(frozen=True)
class ModelConfig:
    """What the model's code asks for.

    Attributes:
        sizes: numbers of the whole model.
        attention: which layers have an indexer, and its RoPE style.
        tied_head: the head is the embedding.
        end_tokens: each ends an answer.
    """

    sizes: ModelSizes
    attention: DSAConfig
    tied_head: bool
    end_tokens: frozenset[int]

    @classmethod
    def of_folder(cls, folder: Path) -> ModelConfig:
        """Read and check config.json and generation_config.json.

        Raises:
            ValueError: no DSA model, or something of it that this code cannot run; says what can.
        """
        config = read_config(folder)
        _check_quantisation(config.get("quantization_config"))
        unquantised = {k: v for k, v in config.items() if k != "quantization_config"}
        attention = DSAConfig.from_hf(config)
        return cls(
            sizes=ModelSizes.from_config(unquantised),
            attention=attention,
            tied_head=bool(config.get("tie_word_embeddings")),
            end_tokens=_end_tokens(folder, config),
        )

    def check_ranks(self, ranks: int) -> None:
        """Raises ValueError unless everything that is split divides evenly over the ranks.

        Whole experts are dealt out, so their number does not matter.
        """
        sizes = self.sizes
        split = {
            "num_attention_heads": sizes.num_attention_heads,
            "vocab_size": sizes.vocab_size,
            "intermediate_size": sizes.intermediate_size,
            "moe_intermediate_size * n_shared_experts": sizes.moe_intermediate_size
            * sizes.n_shared_experts,
        }
        wrong = [f"{name} = {value}" for name, value in split.items() if value % ranks]
        if wrong:
            common = gcd(*split.values())
            works = [str(n) for n in range(1, min(common, 64) + 1) if common % n == 0]
            raise ValueError(
                f"{ranks} ranks do not divide {', '.join(wrong)}; what works is {', '.join(works)}"
            )


def _check_quantisation(quantised: Any) -> None:
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
    block = quantised.get("weight_block_size") if isinstance(quantised, Mapping) else None
    if method != "fp8" or block != [WEIGHT_BLOCK] * 2:
        raise ValueError(
            f"the weights are quantised by {method!r} in blocks of {block}; read are bf16, fp32 "
            f"and fp8 in blocks of {[WEIGHT_BLOCK] * 2}: take the release in one of these"
        )


def _end_tokens(folder: Path, config: Mapping[str, Any]) -> frozenset[int]:
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    if isinstance(ends, int):
        return frozenset((ends,))
    return frozenset(ends or ())
