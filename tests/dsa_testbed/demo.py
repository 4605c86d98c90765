"""`make demo`: serve a small DeepSeek-V3.2, ask it about a long text, check the answer.

The answer is compared with transformers', token by token, so the model is served in fp32: in bf16
two correct implementations round differently and may choose another of two close tokens.
"""

import argparse
import shlex
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from dsa_testbed import tokenizer
from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.oracle import oracle_generate
from dsa_testbed.server import Server, ServerError, VllmServer, op_counts
from dsa_testbed.sglang_server import SglangServer
from dsa_testbed.small_models import VOCAB_SIZE

HOSTS: dict[str, type[Server]] = {"vllm": VllmServer, "sglang": SglangServer}
CHECKPOINT = "v32"
PROMPT_TOKENS = 16_384
CHECKED_TOKENS = 32
_LINE_SECONDS = 10


@dataclass
class Stream:
    """What a streamed completion has brought so far."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    error: Exception | None = None

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first."""
        return (self.times[-1] - self.times[0]) / max(1, len(self.tokens) - 1)


class Progress:
    """One changing line on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, console: Console) -> None:
        self.console, self.status, self.shown = console, console.status(""), 0.0

    def __enter__(self) -> Self:
        self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def __call__(self, seconds: float, text: str) -> None:
        """Show a text and how long this step has taken."""
        line = f"  {seconds:4.0f} s  {text}"[: self.console.width - 4]
        if self.console.is_terminal:
            self.status.update(line, spinner="dots")
        elif seconds < self.shown or seconds - self.shown >= _LINE_SECONDS:
            self.shown = seconds
            self.console.print(line, markup=False, highlight=False)


def main() -> int:
    """Exit code 0 if the first tokens equal the reference's."""
    parser = argparse.ArgumentParser(description="serve a small DeepSeek-V3.2 and check its answer")
    parser.add_argument("--host", choices=HOSTS, default="vllm", help="inference server to use")
    parser.add_argument("--max-tokens", type=int, default=64, help="length of the completion")
    args = parser.parse_args()
    console = Console(soft_wrap=False)

    console.rule("1. checkpoint and text")
    checkpoint = make_checkpoint(CHECKPOINT)
    ids = tokenizer.encode(tokenizer.shipped_text(), VOCAB_SIZE)[:PROMPT_TOKENS]
    prompt = tokenizer.train(VOCAB_SIZE).decode(ids)
    console.print(f"DeepSeek-V3.2, 4 layers, random weights: {checkpoint}", soft_wrap=True)
    console.print(f"{tokenizer.TEXT_PATH.name}: the first {len(prompt):,} characters")

    with tempfile.TemporaryDirectory(prefix="dsa-demo-") as scratch, Progress(console) as progress:
        counts = Path(scratch) / "op_counts"
        # dtype: "auto" serves an fp32 checkpoint in bf16.
        server = HOSTS[args.host](
            checkpoint, ["--dtype", "float32"], {"DSA_OP_COUNTS": str(counts)}, on_wait=progress
        )
        console.rule(f"2. {args.host}")
        console.print(
            shlex.join([Path(server.command[0]).name, *server.command[1:]]), soft_wrap=True
        )
        try:
            with server:
                console.print(f"ready after {server.startup_seconds:.0f} s at {server.base_url}/v1")
                console.rule("3. completion")
                warm_up = op_counts(counts)
                start = time.monotonic()
                stream = ask(server, prompt, args.max_tokens, progress, start)
                calls = op_counts(counts) - warm_up
            console.print(f"server stopped, exit code {server.returncode}")
        except ServerError as error:
            console.print(str(error), markup=False, highlight=False, soft_wrap=True)
            return 1

    if stream.error or not stream.tokens:
        console.print(f"the request failed: {stream.error}", markup=False)
        return 1
    report(console, stream, stream.times[0] - start, calls)

    console.rule("4. reference")
    console.print("transformers, eager fp32 (minutes once, then kept in .cache/oracle)")
    checked = min(CHECKED_TOKENS, args.max_tokens)
    [expected] = oracle_generate(checkpoint, [ids], checked)
    equal = stream.tokens[:checked] == expected
    console.print(f"first {checked} tokens equal: {equal}")
    if not equal:
        console.print(f"served:    {stream.tokens[:checked]}\nreference: {expected}")
    return 0 if equal else 1


def ask(server: Server, prompt: str, max_tokens: int, progress: Progress, start: float) -> Stream:
    """Stream a greedy completion of the prompt; a failure is in the result's ``error``."""
    stream = Stream()

    def receive() -> None:
        try:
            client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=1800)
            for chunk in client.completions.create(
                model=server.model,
                prompt=prompt,
                max_tokens=max_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"return_token_ids": True},
            ):
                _add(stream, chunk)
        except Exception as error:  # noqa: BLE001  shown by the caller, whatever it is
            stream.error = error

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    while thread.is_alive():
        state = f"{len(stream.tokens)} tokens" if stream.tokens else "prefill"
        progress(time.monotonic() - start, f"{state} {stream.text[-60:]!r}")
        thread.join(0.25)
    return stream


def _add(stream: Stream, chunk: Any) -> None:
    if chunk.usage:
        stream.prompt_tokens = chunk.usage.prompt_tokens
    for choice in chunk.choices:
        tokens = (choice.model_extra or {}).get("token_ids") or []
        if tokens:
            stream.times.append(time.monotonic())
        stream.tokens += tokens
        stream.text += choice.text


def report(console: Console, stream: Stream, ttft: float, calls: Counter[str]) -> None:
    """Print the completion, its figures and the table of calls."""
    console.print(repr(stream.text), markup=False, highlight=False, soft_wrap=True)
    figures = {
        "prompt tokens": f"{stream.prompt_tokens:,}",
        "completion tokens": str(len(stream.tokens)),
        "TTFT": f"{ttft:.2f} s",
        "TPOT": f"{1e3 * stream.tpot:.1f} ms",
    }
    console.print("   ".join(f"{name} {value}" for name, value in figures.items()))
    table = Table("op of dsa_plugin", "calls")
    table.columns[1].justify = "right"
    for name, count in calls.items():
        table.add_row(name, str(count))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
