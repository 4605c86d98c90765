"""A checkpoint in transformers, eager: the reference, which needs no host and no GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dsa_plugin.evaluation.selection import applied
from dsa_plugin.evaluation.variants import Variant

# By name, not AutoModel: importing vLLM maps deepseek_v32 to another class.
_CLASSES = {
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}
# The eager indexer holds scores [rows, index heads, context] in fp32, three at a time.
_SCORE_BYTES = 128 << 20
_MAX_ROWS = 512
Dtype = Literal["auto", "float32", "bfloat16"]


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
        self.model, self.tokenizer = _load(checkpoint, dtype)
        self.context = context
        self._ends = _end_tokens(self.model)
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
        tokens = self._tokens(text, 0)
        run = _Run(self.model)
        found: list[float] = []
        for chunk, logits in run.chunks(tokens[:-1]):
            following = torch.tensor(tokens[len(found) + 1 : len(found) + 1 + len(chunk)])
            logprobs = logits.float().log_softmax(-1)
            found += logprobs.gather(1, following[:, None])[:, 0].tolist()
        return found

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


class _Run:
    """One sequence in transformers' own cache."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.length = 0
        self.crop(0)

    def logits(self, tokens: list[int]) -> Tensor:
        """Of the last token, [vocab]."""
        found = torch.empty(0)
        for _, logits in self.chunks(tokens, logits_to_keep=1):
            found = logits[-1]
        return found

    def chunks(
        self, tokens: list[int], logits_to_keep: int = 0
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Read tokens; yields each chunk of them with its logits, [chunk, vocab]."""
        heads = max(self.model.config.index_n_heads, self.model.config.num_attention_heads)
        rows = _SCORE_BYTES // (4 * heads * (self.length + len(tokens)))
        rows = max(1, min(_MAX_ROWS, rows))
        for start in range(0, len(tokens), rows):
            chunk = tokens[start : start + rows]
            output = self.model(
                torch.tensor([chunk]),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            )
            self.length += len(chunk)
            yield chunk, output.logits[0]

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


def _load(checkpoint: Path, dtype: Dtype) -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "--through transformers needs transformers: pip install it, or ask a server"
        ) from None
    family = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("model_type")
    if family not in _CLASSES:
        raise ValueError(
            f"{checkpoint} is of model_type {family}; --through transformers takes "
            f"{' and '.join(_CLASSES)}"
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, report = getattr(transformers, _CLASSES[family]).from_pretrained(
        checkpoint,
        dtype=dtype,
        attn_implementation="eager",
        output_loading_info=True,
        use_safetensors=True,
    )
    # transformers has no MTP layer.
    draft = f"model.layers.{model.config.num_hidden_layers}."
    wrong = {kind: [k for k in keys if draft not in str(k)] for kind, keys in report.items()}
    if any(wrong.values()):
        raise ValueError(f"{checkpoint} does not load cleanly: {wrong}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    return model.eval(), tokenizer


def _end_tokens(model: Any) -> set[int]:
    end = model.generation_config.eos_token_id
    return set(end) if isinstance(end, list) else {end}


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    length = 0
    for column in zip(*prompts, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length
