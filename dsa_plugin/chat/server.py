"""Any server with OpenAI's chat completions: /v1/models and /v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from dsa_plugin.chat.pieces import Message, Piece

_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class Asking:
    """How each answer is asked for; None leaves it to the server.

    Attributes:
        temperature: of sampling.
        max_tokens: of an answer.
        thinking: whether to reason first, told to the server's chat template.
    """

    temperature: float | None = None
    max_tokens: int | None = None
    thinking: bool | None = None

    def request(self) -> dict[str, Any]:
        """The fields of a request."""
        given = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        found: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.thinking is not None:
            # DeepSeek's name of it and GLM's; templates ignore what they do not know.
            wanted = {"thinking": self.thinking, "enable_thinking": self.thinking}
            found["extra_body"] = {"chat_template_kwargs": wanted}
        return found


class Server:
    """One model of a server. Errors of its methods: see `_told`."""

    def __init__(
        self, url: str, model: str | None, api_key: str | None, asking: Asking | None = None
    ) -> None:
        """Find the model.

        Args:
            url: of the server, without /v1.
            model: as the server names it; needed where it has several.
            api_key: of servers that want one.
            asking: for its answers.

        Raises:
            ValueError: the server has no such model, or several and none is named.
        """
        try:
            import openai
        except ImportError:
            raise ValueError(
                "the openai package, which asks the server, is not installed: "
                "pip install 'dsa-plugin[chat]'"
            ) from None

        self.url, self.asking = url, asking or Asking()
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=f"{url}/v1",
            api_key=api_key or "none",  # the library wants one
            max_retries=0,
            timeout=openai.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
            # A server of this machine is not to be looked for behind a proxy.
            http_client=openai.DefaultHttpxClient(trust_env=False),
        )
        self.model = self._find(model)

    def answer(self, messages: list[Message]) -> Iterator[Piece]:
        """The answer to a conversation, as it comes; closing the iterator stops the server."""
        request: Any = {"model": self.model, "messages": messages, **self.asking.request()}
        with self._told(), self._client.chat.completions.create(stream=True, **request) as chunks:
            for chunk in chunks:
                for choice in chunk.choices:
                    # SGLang, DeepSeek and older vLLM say reasoning_content, newer vLLM reasoning.
                    for name in ("reasoning_content", "reasoning"):
                        if text := getattr(choice.delta, name, None):
                            yield "reasoning", text
                            break
                    if choice.delta.content:
                        yield "answer", choice.delta.content

    def _find(self, model: str | None) -> str:
        with self._told():
            # Not by its models.list(), which fails on what is no list.
            listed: Any = self._client.get("/models", cast_to=object)
        try:
            names = [str(found["id"]) for found in listed["data"]]
        except (KeyError, TypeError):
            raise ConnectionError(
                f"{self.url}/v1/models lists no models; name a server of OpenAI's API"
            ) from None
        if model is None and len(names) == 1:
            return names[0]
        if model is None or model not in names:
            wrong = f"has no model {model!r}" if model else f"has {len(names)} models"
            raise ValueError(f"{self.url} {wrong}; give one with --model: {', '.join(names)}")
        return model

    @contextmanager
    def _told(self) -> Iterator[None]:
        """The library's errors as this package's.

        Raises:
            TimeoutError: no answer in time.
            ConnectionError: the server cannot be reached, breaks off, fails (5xx) or is none of
                OpenAI's API.
            ValueError: it refuses the request (4xx).
        """
        openai = self._openai
        try:
            yield
        # openai 2 lets httpx's own through where an answer breaks off.
        except (openai.APITimeoutError, httpx.TimeoutException):
            raise TimeoutError(f"{self.url} did not answer in {_ANSWER_SECONDS:g} s") from None
        except (openai.APIConnectionError, httpx.TransportError) as error:
            raise ConnectionError(
                f"{self.url} gives no answer ({error.__cause__ or error}); is the server up? "
                "`dsa serve RECIPE` starts one"
            ) from None
        except openai.APIStatusError as error:
            said = f"with {error.status_code}: {' '.join(error.response.text.split())[:500]}"
            if error.status_code >= 500:
                raise ConnectionError(f"{self.url} failed {said}; its log says more") from None
            raise ValueError(f"{self.url} refused the request {said}") from None
        except openai.APIError as error:
            raise ConnectionError(f"{self.url} failed within its answer: {error.message}") from None
        except json.JSONDecodeError as error:
            raise ConnectionError(f"{self.url} answers what is not JSON: {error}") from None
