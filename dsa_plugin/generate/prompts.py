"""Files of prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsa_plugin.chat.pieces import Message


@dataclass(frozen=True)
class Asked:
    """One prompt: a conversation, or text to continue.

    Attributes:
        messages: as OpenAI's API has them; empty for text.
        tools: that the assistant may call.
        text: to continue as it is; None for a conversation.
    """

    messages: list[Message] = field(default_factory=list)
    tools: list[Message] = field(default_factory=list)
    text: str | None = None


def read_prompts(path: Path, system: str | None = None) -> list[Asked]:
    """The prompts of a file, in order; empty lines are left out.

    Args:
        path: .jsonl: a line holds {"messages": [...]}, with "tools" or not, or {"prompt": text};
            of any other name: a line is a user's message.
        system: a system message before each user's message of such a line.

    Raises:
        ValueError: a line that is neither, or no line at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it") from None
    is_json = path.suffix == ".jsonl"
    prompts = [
        _parse(line, f"{path}, line {number}") if is_json else user_says(line, system)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise ValueError(f"{path} holds no prompt: a line is one")
    return prompts


def user_says(text: str, system: str | None = None) -> Asked:
    """A conversation of one question."""
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return Asked([*first, {"role": "user", "content": text}])


def _parse(line: str, where: str) -> Asked:
    try:
        given: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if isinstance(given, dict):
        messages, tools = given.get("messages"), given.get("tools", [])
        if set(given) == {"prompt"} and isinstance(given["prompt"], str):
            return Asked(text=given["prompt"])
        if set(given) <= {"messages", "tools"} and messages and _are_objects(messages, tools):
            return Asked(messages, tools)
    raise ValueError(
        f'{where} is {line[:60]!r}; allowed: {{"messages": [...]}}, with "tools": [...] or not, '
        'or {"prompt": "text"}'
    )


def _are_objects(*lists: Any) -> bool:
    return all(isinstance(each, list) and all(isinstance(o, dict) for o in each) for each in lists)
