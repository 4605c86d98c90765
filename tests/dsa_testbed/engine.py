"""vLLM's engine in one process, which starts faster than a server and whose layers can be seen.

`in_engine` starts this file in a process of its own: an engine leaves much behind in its process.
stdin is a JSON object with the work's name, the engine's arguments and the work's; the last line of
stdout is the answer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsa_testbed.child import ask_child
from dsa_testbed.footprint import Said, classes, replaced

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
_ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 4,
}
Tokens = list[int]
Start = Callable[[], Any]
"""Starts the engine."""


def through_a_store(store: Path) -> dict[str, Any]:
    """Of an engine that stores a prompt's caches in a folder, and loads those that are there."""
    return {
        "enable_prefix_caching": False,
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(store)},
        },
        "max_num_batched_tokens": 1024,  # it stores of a prompt what its first chunk wrote
    }


def in_engine(
    work: Callable[..., Any],
    model: Path,
    engine: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    **arguments: Any,
) -> Any:
    """What `work(start, **arguments)`, a function of this file, returns; all of it is JSON.

    Raises:
        RuntimeError: the engine did not start or the work failed; the message is its last output.
    """
    request = {
        "work": work.__name__,
        "engine": {**_ENGINE, "model": str(model), **(engine or {})},
        "arguments": arguments,
    }
    return ask_child(
        [sys.executable, "-P", __file__], request, {**_ENVIRONMENT, **os.environ, **(env or {})}
    )


def generate(start: Start, prompts: list[Tokens], max_tokens: int, **options: Any) -> list[Tokens]:
    """Greedy tokens of each prompt, all asked at once."""
    return _answers(start(), prompts, max_tokens, **options)


def generate_loaded_through_one_buffer(
    start: Start, prompts: list[Tokens], max_tokens: int
) -> list[Tokens]:
    """As `generate`; the loader hands out views of one buffer, which the next tensor overwrites."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from_files = DefaultModelLoader.get_all_weights

    def through_one_buffer(*args: Any) -> Iterator[tuple[str, Tensor]]:
        buffer = torch.empty(1 << 24, dtype=torch.uint8)
        for name, tensor in from_files(*args):
            view = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            yield name, view.copy_(tensor)
            buffer.fill_(0x7F)

    with patch.object(DefaultModelLoader, "get_all_weights", through_one_buffer):
        return _answers(start(), prompts, max_tokens)


def generate_after_reload(
    start: Start, prompts: list[Tokens], max_tokens: int, checkpoint: str
) -> list[Tokens]:
    """Tokens of another checkpoint, by the tensors that the layers had before it was loaded.

    A captured graph holds their addresses, and so reads what they hold when it is replayed.
    """
    from dsa_plugin.hosts.vllm.attention import DSAAttention

    engine = start()
    _answers(engine, prompts, max_tokens)
    captured = {}

    def capture(model: Any) -> None:
        for layer in model.modules():
            if isinstance(layer, DSAAttention):
                captured[layer.prefix] = layer.bound(torch.float32)

    engine.apply_model(capture)
    engine.collective_rpc("reload_weights", kwargs={"weights_path": checkpoint})
    engine.reset_prefix_cache()
    with patch.object(DSAAttention, "bound", lambda layer, _: captured[layer.prefix]):
        return _answers(engine, prompts, max_tokens)


def generate_through_a_store(
    start: Start, prompt: Tokens, max_tokens: int, store: str
) -> list[Any]:
    """Tokens when the caches are stored, when loaded, and when the index keys are others' there.

    And the bytes stored of each layer's cache.
    """
    engine = start()
    answers = [_answers(engine, [prompt], max_tokens)[0] for _ in range(2)]
    files = {path.stem: path for path in Path(store).rglob("*.safetensors")}
    stored = {name: load_file(path)["kv_cache"] for name, path in files.items()}
    for name, path in files.items():
        if "indexer" in name:
            save_file({"kv_cache": stored[name].flip(0).contiguous()}, path)
    answers += _answers(engine, [prompt], max_tokens)
    return [answers, {name: tensor.nbytes for name, tensor in stored.items()}]


def generate_with_adapter(
    start: Start, prompts: list[Tokens], max_tokens: int, adapter: str, others: list[str]
) -> list[Any]:
    """Tokens with a LoRA adapter, and what the engine says to each of the others."""
    from vllm.lora.request import LoRARequest

    engine = start()
    request = LoRARequest("adapter", 1, adapter)
    answers = _answers(engine, prompts, max_tokens, lora_request=request)
    said = []
    for number, path in enumerate(others):
        try:
            engine.llm_engine.add_lora(LoRARequest(path, 2 + number, path))
        except ValueError as error:
            said.append(str(error))
    return [answers, said]


def generate_in_stages(start: Start, prompts: list[Tokens], max_tokens: int) -> list[Tokens]:
    """As `generate`, of an engine with pipeline stages."""
    engine = start()
    # It makes what a later stage receives into. vLLM 0.32 leaves it out on a CPU where nothing is
    # compiled, and any model's first request then ends the engine.
    engine.collective_rpc(lambda worker: worker.model_runner.profile_run())
    return _answers(engine, prompts, max_tokens)


def counting_drafts(start: Start, then: str, **arguments: Any) -> list[Any]:
    """What another work returns, and how many tokens were drafted and how many of them accepted.

    The engine has to have its statistics.
    """
    engine = start()
    answer = globals()[then](lambda: engine, **arguments)
    names = [f"vllm:spec_decode_num_{kind}_tokens" for kind in ("draft", "accepted")]
    totals = {metric.name: metric.value for metric in engine.get_metrics() if metric.name in names}
    return [answer, *(totals[name] for name in names)]


def seen_beside_another_model(
    start: Start, prompts: list[Tokens], max_tokens: int
) -> tuple[list[Tokens], list[str], list[str], list[str]]:
    """Its tokens, its layers' classes, what of vLLM is ours, and what we said."""
    said = Said()
    engine = start()
    tokens = _answers(engine, prompts, max_tokens)
    [found] = engine.apply_model(classes)
    return tokens, found, replaced("vllm"), said.lines


def _answers(engine: Any, prompts: list[Tokens], max_tokens: int, **options: Any) -> list[Tokens]:
    from vllm import SamplingParams

    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
        use_tqdm=False,
        **options,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    from vllm import LLM

    request = json.load(sys.stdin)
    work = globals()[request["work"]]
    answer = work(lambda: LLM(**request["engine"]), **request["arguments"])
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
