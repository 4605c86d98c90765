"""Text to tokens and back: a checkpoint's tokenizer, and how it writes conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dsa_plugin.chat.pieces import THINK, Message
from dsa_plugin.config_file import read_config
from dsa_plugin.generate import deepseek_v32_messages
from dsa_plugin.in_transformers.checkpoint import load_tokenizer
from dsa_registry.reader import read_entry

_BROKEN = "\ufffd"  # how a character decodes whose bytes are not all there


class Text:
    """One checkpoint's."""

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer of a checkpoint's folder."""
        self.folder, self.tokenizer = folder, load_tokenizer(folder)
        self.encoding = read_entry(read_config(folder)).message_encoding

    def chat(
        self,
        messages: Sequence[Message],
        thinking: bool | None = None,
        tools: Sequence[Message] = (),
    ) -> str:
        """A conversation as the model reads it, up to where it is to go on.

        By the checkpoint's chat template; where it has none, by the encoding that its model is
        known to have.

        Args:
            messages: as OpenAI's API has them.
            thinking: whether to reason first; None: the template's own default, else not.
            tools: that may be called, as OpenAI's API has them.

        Raises:
            ValueError: there is neither template nor encoding, or a message that does not fit it.
        """
        if self.tokenizer.chat_template is None:
            if self.encoding is None:
                raise ValueError(
                    f"{self.folder} has no chat template (chat_template.jinja); add one, or give "
                    'text to continue as {"prompt": ...} in a .jsonl file'
                )
            return deepseek_v32_messages.encode_messages(
                messages, thinking=bool(thinking), tools=tools
            )
        # DeepSeek's name of it and GLM's.
        switch = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
        text: str = self.tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=True,
            tokenize=False,
            **switch,
        )
        return text

    def tokens_of_chat(self, text: str) -> list[int]:
        """Tokens of what `chat` made; special ones stand in it."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def tokens(self, text: str) -> list[int]:
        """Tokens of plain text, with what the tokenizer begins it with."""
        tokens: list[int] = self.tokenizer(text)["input_ids"]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, marks such as </think> among it."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def message(self, answer: str, chat: str) -> Message:
        """An answer as a message, with its reasoning and tool calls where the encoding is known.

        Args:
            answer: whole, without its end token.
            chat: the prompt of it.

        Raises:
            ValueError: the answer is not of that form.
        """
        if self.tokenizer.chat_template is None and self.encoding is not None:
            thinking = chat.endswith(THINK)
            return deepseek_v32_messages.parse_answer(answer, thinking=thinking)
        return {"role": "assistant", "content": answer}


def texts(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Text as its tokens come; one that ends within a character waits for the next.

    Pieces may be decoded one by one, as both families' tokenizers are of bytes.
    """
    waiting: list[int] = []
    for token in tokens:
        waiting.append(token)
        text = decode(waiting)
        if text and not text.endswith(_BROKEN):
            yield text
            waiting = []
    if waiting:
        yield decode(waiting)
