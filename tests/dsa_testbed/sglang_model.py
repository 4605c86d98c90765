"""Runs in SGLang's environment: a model that SGLang's loader has loaded, seen in its process.

`with_model` starts this file. stdin is a JSON object with the name of a function below, the
server's flags and the function's arguments; the last line of stdout is its answer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from dsa_testbed.child import ask_child
from dsa_testbed.footprint import Said, classes, replaced

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
_FLAGS = [
    *("--dtype", "float32", "--max-total-tokens", "4096", "--mem-fraction-static", "0.5"),
    *("--context-length", "2048", "--max-running-requests", "4"),
]


def with_model(work: str, model: Path, *flags: str, **arguments: Any) -> Any:
    """What the function of that name below returns.

    Raises:
        RuntimeError: it or the load failed; the message is the process's last output.
    """
    from dsa_testbed.sglang_server import sglang_python

    return ask_child(
        [str(sglang_python()), "-m", "dsa_testbed.sglang_model"],
        {
            "work": work,
            "args": ["--model-path", str(model), *_FLAGS, *flags],
            "arguments": arguments,
        },
        {**_ENVIRONMENT, **os.environ},
    )


def load(args: list[str]) -> Any:
    """The model runner of a server with these flags."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.benchmark import one_batch
    from sglang.srt.server_args import PortArgs, ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    server_args = ServerArgs.from_cli_args(parser.parse_args(args))
    server_args.resolve_once()
    ports = PortArgs.init_new(server_args)
    ranks = one_batch.SpawnRanks(
        world_rank=one_batch.spawn_world_rank(server_args, tp_rank=0, pp_rank=0), gpu_id=0
    )
    one_batch.publish(server_args, role="scheduler", ranks=ranks)
    one_batch._init_process_global_configs()
    loaded: Any = one_batch.load_model(server_args, ports, 0, 0)[0]
    return loaded.torch_runner


def after_updates(args: list[str], updates: list[str], folder: str) -> list[Any]:
    """Load files of weights, each after the other, as a weight update does.

    Returns what each was refused with, and whether the tensors that attention reads stayed where
    they were. Layer 1's are left in the folder as N.safetensors, after N updates.
    """
    runner = load(args)
    layer = runner.model.model.layers[1].self_attn

    def save(number: int) -> list[int]:
        weights = {name: value.data for name, value in layer.indexer.named_parameters()}
        weights |= {"w_uk": layer.mla.w_uk, "w_uv": layer.mla.w_uv}
        save_file(
            {name: w.clone().contiguous() for name, w in weights.items()},
            f"{folder}/{number}.safetensors",
        )
        return [weight.data_ptr() for weight in weights.values()]

    addresses = save(0)
    refusals: list[str | None] = []
    stayed = True
    for number, update in enumerate(updates, 1):
        try:
            runner.model.load_weights(list(load_file(update).items()))
            refusals.append(None)
        except ValueError as error:
            refusals.append(str(error))
        stayed &= save(number) == addresses
    return [refusals, stayed]


def save_indexers(args: list[str], file: str) -> None:
    """Leave every parameter of an indexer in a file."""
    parameters = load(args).model.named_parameters()
    save_file({name: value.data for name, value in parameters if ".indexer." in name}, file)


def seen_beside_another_model(
    args: list[str], prompts: list[list[int]], max_tokens: int
) -> tuple[list[list[int]], list[str], list[str], list[str]]:
    """Its tokens, its layers' classes, what of SGLang is ours, and what we said."""
    said = Said()
    runner = load(args)
    from sglang.benchmark import one_batch

    wrapped = one_batch._TorchBenchRunner(runner)
    tokens = []
    for prompt in prompts:
        requests = one_batch.prepare_synthetic_inputs_for_latency_test(1, 0, [prompt])
        token, _, batch = wrapped.extend(requests)
        answer = [int(token)]
        while len(answer) < max_tokens:
            token, _ = wrapped.decode(token, batch)
            answer.append(int(token))
        tokens.append(answer)
    return tokens, classes(runner.model), replaced("sglang"), said.lines


def main() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    answer = globals()[request["work"]](request["args"], **request["arguments"])
    print("\n" + json.dumps(answer), flush=True)
    os._exit(0)  # the host's threads would keep the process


if __name__ == "__main__":
    main()
