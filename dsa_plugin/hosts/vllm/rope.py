"""How many positions the host's cos/sin table has, which requests must not pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def context_faults(model_config: ModelConfig) -> list[str]:
    """Why the model's RoPE has no positions for all of --max-model-len; empty where it has.

    YaRN's table ends where its stretched range does, and a longer one would need another factor,
    thus other angles at every position.
    """
    rope = _yarn(model_config)
    if rope is None:
        return []
    trained, factor = rope["original_max_position_embeddings"], rope["factor"]
    positions = int(trained * factor)
    wanted = model_config.max_model_len
    if wanted <= positions:
        return []
    fault = (
        f"--max-model-len {wanted}: the model's RoPE, {trained} positions times YaRN factor "
        f"{factor:g}, ends at {positions}; use --max-model-len {positions}, or a config.json whose "
        f"factor is at least {wanted / trained:g}, which changes the model's answers"
    )
    return [fault]


def cover_context(model_config: ModelConfig) -> None:
    """Have the host build its table for all that it will accept.

    It builds max_position_embeddings rows, and accepts longer requests where
    VLLM_ALLOW_LONG_MAX_MODEL_LEN or the config's model_max_length says so. Unscaled RoPE has the
    same angles however long the table is.
    """
    if _yarn(model_config) is None:
        config = model_config.hf_config
        config.max_position_embeddings = max(
            config.max_position_embeddings, model_config.max_model_len
        )


def _yarn(model_config: ModelConfig) -> dict[str, Any] | None:
    """The RoPE's parameters; None where it is not scaled. The host takes all scaling for YaRN."""
    rope: dict[str, Any] = model_config.hf_config.rope_parameters
    return None if rope["rope_type"] == "default" else rope
