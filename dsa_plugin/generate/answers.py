"""Conversations in, answers out: the generator behind the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsa_plugin.chat.pieces import THINK, Message, Piece, split_reasoning
from dsa_plugin.generate.generator import Generator
from dsa_plugin.generate.prompts import Asked
from dsa_plugin.generate.text import Text, texts


@dataclass(frozen=True)
class Assistant:
    """What rank 0 asks.

    Attributes:
        generator: of all ranks.
        text: of the same checkpoint.
        thinking: whether to reason first; None: the template's own default.
    """

    generator: Generator
    text: Text
    thinking: bool | None = None

    def answer(self, messages: list[Message]) -> Iterator[Piece]:
        """The answer to a conversation, as it comes."""
        chat = self.text.chat(messages, self.thinking)
        stream = self.generator.stream([self.text.tokens_of_chat(chat)])
        tokens = (token for _, token in stream if token not in self.generator.config.end_tokens)
        starts_thinking = chat.rstrip().endswith(THINK)
        yield from split_reasoning(texts(tokens, self.text.decode), thinking=starts_thinking)

    def complete(self, prompts: Sequence[Asked]) -> Iterator[dict[str, Any]]:
        """Of each prompt: `text`, `tokens`, `finish_reason`, and of a whole answer `message`."""
        chats = [self._written(prompt) for prompt in prompts]
        tokens = [
            self.text.tokens(chat) if prompt.text is not None else self.text.tokens_of_chat(chat)
            for prompt, chat in zip(prompts, chats, strict=True)
        ]
        for each in tokens:
            self.generator.check(each)
        size = self.generator.limits.batch
        for first in range(0, len(tokens), size):
            some = slice(first, first + size)
            answers = self.generator.generate(tokens[some], first)
            for prompt, chat, answer in zip(prompts[some], chats[some], answers, strict=True):
                yield self._told(prompt, chat, answer)

    def _written(self, prompt: Asked) -> str:
        if prompt.text is not None:
            return prompt.text
        return self.text.chat(prompt.messages, self.thinking, prompt.tools)

    def _told(self, prompt: Asked, chat: str, answer: list[int]) -> dict[str, Any]:
        ended = answer[-1] in self.generator.config.end_tokens
        text = self.text.decode(answer[:-1] if ended else answer)
        told: dict[str, Any] = {
            "text": text,
            "tokens": answer,
            "finish_reason": "stop" if ended else "length",
        }
        if prompt.text is None and ended:
            try:
                told["message"] = self.text.message(text, chat)
            except ValueError as error:
                told["no_message"] = str(error)
        return told
