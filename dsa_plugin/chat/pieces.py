"""An answer as it comes: pieces of reasoning and of the answer itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

Message = dict[str, Any]
"""As OpenAI's API has it: role, content, and of an assistant perhaps reasoning_content."""
Piece = tuple[Literal["reasoning", "answer"], str]
Answer = Callable[[list[Message]], Iterator[Piece]]
"""What answers a conversation."""

THINK, END_THINK = "<think>", "</think>"


def split_reasoning(texts: Iterable[str], *, thinking: bool) -> Iterator[Piece]:
    """Pieces of an answer whose reasoning stands between <think> and </think>.

    Args:
        texts: the answer, in order; a mark may be spread over several.
        thinking: whether it begins as reasoning, where the prompt ended with <think>.
    """
    held = ""
    for text in texts:
        held += text
        while True:
            mark = END_THINK if thinking else THINK
            before, found, after = held.partition(mark)
            if not found:
                break
            if before:
                yield ("reasoning" if thinking else "answer"), before
            held, thinking = after, not thinking
        ready = len(held) - _begun(held, mark)
        if ready:
            yield ("reasoning" if thinking else "answer"), held[:ready]
            held = held[ready:]
    if held:
        yield ("reasoning" if thinking else "answer"), held


def _begun(text: str, mark: str) -> int:
    """How many of the last characters may be the mark's first ones."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
