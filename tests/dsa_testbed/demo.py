"""`make demo`: serve the small trained DeepSeek-V3.2, ask it about a long text, check its answers.

Its answers are right or wrong by the text, and equal to transformers' or not. It is served in fp32:
in bf16 two correct implementations round differently and may choose another of two close tokens.
"""

import argparse
import shlex
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from dsa_plugin.evaluation.transformers_model import TransformersModel
from dsa_plugin.evaluation.variants import VARIANTS
from dsa_plugin.training.exam import Exam, Question, graded_right, make_exam
from dsa_testbed.server import Server, ServerError, VllmServer, op_counts
from dsa_testbed.sglang_server import SglangServer

HOSTS: dict[str, type[Server]] = {"vllm": VllmServer, "sglang": SglangServer}
# By its architecture vLLM would take the model for DeepSeek's own release, and use its chat format.
FLAGS = {"vllm": ["--tokenizer-mode", "hf"], "sglang": []}
CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
TEXT_TOKENS = 16_000
KINDS = ("single", "several", "chain", "latest", "quote", "third")
DEPTHS = (0.2, 0.8)
MAX_TOKENS = 40
_LINE_SECONDS = 10


@dataclass(frozen=True)
class Answer:
    """What a server streamed, and the seconds until its first token and its last."""

    text: str
    first: float
    last: float


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
    """Exit code 0 if every answer equals transformers'."""
    parser = argparse.ArgumentParser(description="serve a small DeepSeek-V3.2 and ask it")
    parser.add_argument("--host", choices=HOSTS, default="vllm", help="inference server to use")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="what `dsa train` made")
    args = parser.parse_args()
    console = Console(soft_wrap=False)

    console.rule("1. checkpoint and text")
    exam = make_exam(0, TEXT_TOKENS, KINDS, DEPTHS)
    console.print(f"DeepSeek-V3.2, trained to find facts: {args.checkpoint}", soft_wrap=True)
    console.print(f"a text of {len(exam.text):,} characters: prose, with facts strewn in")

    with tempfile.TemporaryDirectory(prefix="dsa-demo-") as scratch, Progress(console) as progress:
        counts = Path(scratch) / "op_counts"
        flags = ["--dtype", "float32", *FLAGS[args.host]]
        server = HOSTS[args.host](
            args.checkpoint, flags, {"DSA_OP_COUNTS": str(counts)}, on_wait=progress
        )
        console.rule(f"2. {args.host}")
        console.print(
            shlex.join([Path(server.command[0]).name, *server.command[1:]]), soft_wrap=True
        )
        try:
            with server:
                console.print(f"ready after {server.startup_seconds:.0f} s at {server.base_url}/v1")
                console.rule("3. questions")
                warm_up = op_counts(counts)
                answers = ask_all(console, progress, server, exam)
                calls = op_counts(counts) - warm_up
            console.print(f"server stopped, exit code {server.returncode}")
        except ServerError as error:
            console.print(str(error), markup=False, highlight=False, soft_wrap=True)
            return 1
        show_calls(console, calls)

        console.rule("4. reference")
        console.print("transformers, eager fp32: the same text and questions")
        expected = in_background(
            progress, "reading", lambda: reference_answers(args.checkpoint, exam)
        )
    return report(console, exam.questions, [answer.text for answer in answers], expected)


def ask_all(console: Console, progress: Progress, server: Server, exam: Exam) -> list[Answer]:
    """One chat a question; the first reads the text, the others find it in the prefix cache."""
    answers = []
    for question in exam.questions:
        asked = question.ask.removesuffix("\nAnswer:")
        answer = in_background(progress, asked, lambda asked=asked: ask(server, exam.text + asked))
        console.print(f"[bold]{asked}[/]\n {answer.text}", highlight=False)
        console.print(f"   first token {answer.first:.2f} s, last {answer.last:.2f} s", style="dim")
        answers.append(answer)
    return answers


def ask(server: Server, message: str) -> Answer:
    """Stream the greedy answer to one chat message."""
    client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=1800)
    start = time.monotonic()
    first, pieces = 0.0, []
    for chunk in client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": message}],
        max_tokens=MAX_TOKENS,
        temperature=0,
        stop="\n",
        stream=True,
    ):
        for choice in chunk.choices:
            if choice.delta.content:
                first = first or time.monotonic() - start
                pieces.append(choice.delta.content)
    return Answer("".join(pieces).strip(), first, time.monotonic() - start)


def reference_answers(checkpoint: Path, exam: Exam) -> list[str]:
    """What transformers answers, greedily."""
    context = TEXT_TOKENS + 512
    with TransformersModel(checkpoint, "float32", context).under(VARIANTS["dsa"]) as model:
        asks = [question.ask for question in exam.questions]
        return [text.strip() for text in model.complete(exam.text, asks, MAX_TOKENS, "\n")]


def in_background(progress: Progress, text: str, work: Any) -> Any:
    """What some work returns, with progress while it goes on; raises what it raises."""
    done: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # noqa: BLE001  raised again by the caller
            failed.append(error)

    start, thread = time.monotonic(), threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        progress(time.monotonic() - start, text)
        thread.join(0.25)
    if failed:
        raise failed[0]
    return done[0]


def show_calls(console: Console, calls: Counter[str]) -> None:
    """How often each of our ops ran."""
    table = Table("op of dsa_plugin", "calls")
    table.columns[1].justify = "right"
    for name, count in calls.items():
        table.add_row(name, str(count))
    console.print(table)


def report(
    console: Console, questions: Sequence[Question], answers: Sequence[str], expected: Sequence[str]
) -> int:
    """Print each answer beside the text's and transformers'; 0 if all equal transformers'."""
    table = Table("kind", "what the text says", "right", "as transformers")
    for question, answer, reference in zip(questions, answers, expected, strict=True):
        right = "yes" if graded_right(question, answer) else f"no: {answer}"
        same = "yes" if answer == reference else f"no: {reference}"
        table.add_row(question.kind, question.answer.strip(), right, same)
    console.print(table)
    right_count = sum(map(graded_right, questions, answers))
    equal_count = sum(map(str.__eq__, answers, expected))
    console.print(f"{right_count} of {len(answers)} right, {equal_count} equal to transformers'")
    return 0 if equal_count == len(answers) else 1


if __name__ == "__main__":
    sys.exit(main())
