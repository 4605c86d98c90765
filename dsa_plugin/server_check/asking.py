"""One question to the server, with all that its answer tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dsa_plugin.evaluation.completions import Completions
from dsa_plugin.server_check.questions import MAX_TOKENS, STOP


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        completion: the text, up to the end of its line.
        model: that the server says has answered.
        prompt_tokens: as the server counts them; None: it does not say.
        cached_tokens: of them, from the prefix cache; None: it does not say.
        generated: token ids; empty where none were asked for or sent.
        logprobs: of these tokens.
    """

    completion: str
    model: str | None
    prompt_tokens: int | None
    cached_tokens: int | None
    generated: tuple[int, ...]
    logprobs: tuple[float, ...]


def ask(server: Completions, prompt: str | list[int], *, logprobs: bool) -> Reply:
    """The greedy answer to a prompt, as text or as token ids. Errors: see `Completions.ask`."""
    wanted = {"logprobs": 1, "return_token_ids": True} if logprobs else {}
    found = server.ask(prompt=prompt, max_tokens=MAX_TOKENS, stop=[STOP], **wanted)
    choice, usage = found["choices"][0], found.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    known = (choice.get("logprobs") or {}).get("token_logprobs") or []
    tokens = choice.get("token_ids") or []
    return Reply(
        completion=_text(server, choice),
        model=found.get("model"),
        prompt_tokens=usage.get("prompt_tokens"),
        cached_tokens=details.get("cached_tokens"),
        generated=tuple(tokens[: len(known)]),
        logprobs=tuple(float(value) for value in known[: len(tokens)]),
    )


def ask_all(
    server: Completions, prompts: Sequence[str | list[int]], at_once: int, *, logprobs: bool
) -> Iterator[Reply]:
    """Replies to prompts in their order, `at_once` of them asked at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        waiting = [pool.submit(ask, server, prompt, logprobs=logprobs) for prompt in prompts]
        try:
            for reply in waiting:
                yield reply.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _text(server: Completions, choice: Any) -> str:
    text = choice.get("text") if isinstance(choice, dict) else None
    if not isinstance(text, str):
        raise ConnectionError(f"{server.url}/v1/completions answered without a text: {choice}")
    return text
