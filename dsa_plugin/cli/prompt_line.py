"""The prompt line of `dsa generate --interactive` and `dsa chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsa_plugin.chat.pieces import Answer, Message, Piece

PROMPT = ">>> "
HELP = "/reset forgets the conversation, /quit ends it, Ctrl-C stops an answer"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def converse(answer: Answer, system: str | None) -> None:
    """Ask line by line until /quit or the end of input; an error costs its question alone."""
    import readline  # noqa: F401  # gives input() its history and arrow keys

    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    if sys.stdin.isatty():
        print(HELP)
    for line in _lines():
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            messages = list(start)
            print("forgotten")
            continue
        if line.startswith("/"):
            print(f"{line} is no command: {HELP}")
            continue
        asked: list[Message] = [*messages, {"role": "user", "content": line}]
        try:
            messages = [*asked, show(answer(asked))]
        except (ValueError, OSError) as error:
            print(f"Error: {error}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """What is typed, without empty lines; Ctrl-C leaves a line, Ctrl-D all."""
    while True:
        try:
            line = input(PROMPT).strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if line:
            yield line


def show(pieces: Iterator[Piece]) -> Message:
    """Print an answer as it comes, its reasoning dimmed; the message that it makes."""
    said = {"reasoning": "", "answer": ""}
    last = "answer"
    with closing(pieces):  # type: ignore[type-var]  # they come from generators
        try:
            for kind, text in pieces:
                if kind != last and said[last].strip():
                    print("\n")
                if not said[kind]:
                    text = text.lstrip()
                said[kind] += text
                last = kind
                print(_dimmed(text) if kind == "reasoning" else text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
    print()
    message: Message = {"role": "assistant", "content": said["answer"].rstrip()}
    if said["reasoning"]:
        message["reasoning_content"] = said["reasoning"].rstrip()
    return message


def _dimmed(text: str) -> str:
    return f"{_DIM}{text}{_PLAIN}" if sys.stdout.isatty() else text
