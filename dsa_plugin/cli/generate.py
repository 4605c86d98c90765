"""`dsa generate`: a checkpoint without a host."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from dsa_plugin.generate.answers import Assistant
    from dsa_plugin.generate.prompts import Asked

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "fp32", "bf16"]


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a DSA checkpoint.", exists=True, file_okay=False)
    ],
    prompt: Annotated[str | None, typer.Option(help="One question, answered as it comes.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A question a line; .jsonl: {messages, tools} or {prompt}.", exists=True),
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="A prompt line.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message before questions.")] = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="Reason first; the template's default."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest of this sum.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 8,
    prefill_rows: Annotated[int, typer.Option(min=1, help="Prompt tokens read at once.")] = 1024,
    device: Annotated[Device, typer.Option(help="auto: a GPU that PyTorch sees.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="auto: bf16 on a GPU, fp32 on a CPU.")] = "auto",
) -> None:
    """Answer by CHECKPOINT in this process, without a host.

    Several ranks share the model: torchrun --nproc-per-node N -m dsa_plugin.cli generate ...
    A file's answers are JSON lines, and how fast they came is the last line on stderr.
    """
    if sum((prompt is not None, prompts is not None, interactive)) != 1:
        raise ValueError("give one of --prompt TEXT, --prompts FILE and --interactive")
    import torch

    from dsa_plugin.generate.answers import Assistant
    from dsa_plugin.generate.generator import Generator, Limits
    from dsa_plugin.generate.prompts import read_prompts
    from dsa_plugin.generate.ranks import join, leave
    from dsa_plugin.generate.sampling import Sampling
    from dsa_plugin.generate.text import Text
    from dsa_plugin.generate.weights import load_model

    sampling = Sampling(temperature, top_p, seed)
    limits = Limits(max_new_tokens, batch, prefill_rows)
    asked = [] if prompts is None else read_prompts(prompts, system)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bf16" if device == "cuda" else "fp32"
    ranks = join(device)
    try:
        model = load_model(checkpoint, ranks, torch.float32 if dtype == "fp32" else torch.bfloat16)
        generator = Generator(model, sampling, limits)
        if ranks.rank:
            generator.follow()
            return
        _answer(Assistant(generator, Text(checkpoint), thinking), prompt, asked, system)
        generator.dismiss()
    finally:
        leave(ranks)


def _answer(
    assistant: Assistant, prompt: str | None, asked: list[Asked], system: str | None
) -> None:
    """One question, those of a file, or, where there is none, a prompt line."""
    from dsa_plugin.cli.prompt_line import converse, show
    from dsa_plugin.generate.prompts import user_says

    if prompt is not None:
        show(assistant.answer(user_says(prompt, system).messages))
    elif asked:
        for told in assistant.complete(asked):
            print(json.dumps(told, ensure_ascii=False), flush=True)
    else:
        converse(assistant.answer, system)
        return
    print(assistant.generator.spent, file=sys.stderr)
