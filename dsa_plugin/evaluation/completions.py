"""Any server with OpenAI's completions: /v1/models and /v1/completions."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

_TRIES = 3
_PAUSE_SECONDS = 1.0
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Patience:
    """How a server is asked.

    Attributes:
        timeout: seconds for one answer.
        concurrency: questions that are asked at once.
        deadline: of `time.monotonic`; nothing is waited for beyond it.
    """

    timeout: float = 600
    concurrency: int = 4
    deadline: float = math.inf

    def seconds(self) -> float:
        """How long to wait for an answer now. Raises OutOfTimeError past the deadline."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise OutOfTimeError("the time that all questions may take is over")
        return min(self.timeout, left)


class OutOfTimeError(TimeoutError):
    """The deadline has passed."""


class Completions:
    """One model of a server. Errors of its methods: see `ask`."""

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Find the model, and `max_model_len`, its longest request, where the server tells.

        Args:
            url: of the server, with or without /v1.
            model: as the server names it; needed where it has several.
            api_key: of servers that want one.
            patience: seconds for an answer, and questions at once.

        Raises:
            ValueError: the server has no such model, or several and none is named.
            OSError: it cannot be reached.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        self.patience = patience or Patience()
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # A server of this machine is not to be looked for behind a proxy.
            trust_env=False,
        )
        self.max_model_len: int | None = None
        self.model = self._find(model)

    def complete(self, text: str, asks: Sequence[str], max_tokens: int, stop: str) -> list[str]:
        """What the model says after `text + ask`, for each ask, up to `stop`; greedy."""

        def answer(ask: str) -> str:
            found = self.ask(prompt=text + ask, max_tokens=max_tokens, stop=[stop])
            said: str = found["choices"][0]["text"]
            return said

        # The first one fills the server's prefix cache for all others.
        first = answer(asks[0])
        with ThreadPoolExecutor(self.patience.concurrency) as pool:
            return [first, *pool.map(answer, asks[1:])]

    def token_logprobs(self, text: str | list[int]) -> list[float]:
        """Log-probability of each token but the first of a text, or of token ids.

        Raises:
            ValueError: the server answers without them.
        """
        found = self.ask(prompt=text, max_tokens=1, echo=True, logprobs=1)
        logprobs = (found["choices"][0].get("logprobs") or {}).get("token_logprobs") or []
        known = logprobs[1 : found["usage"]["prompt_tokens"]]
        if not known or None in known:
            raise ValueError(
                f"{self.url} gives no log-probabilities of a prompt (echo with logprobs); "
                "leave them out with --no-perplexity"
            )
        return [float(value) for value in known]

    def _find(self, model: str | None) -> str:
        answer = self._request("GET", "/v1/models")
        try:
            served = {str(found["id"]): found for found in answer["data"]}
        except (KeyError, TypeError):
            raise ConnectionError(f"{self.url}/v1/models lists no models: {answer}") from None
        if model is None and len(served) == 1:
            [model] = served
        if model not in served:
            wrong = f"has no model {model!r}" if model else "has several models"
            raise ValueError(f"{self.url} {wrong}; give one with --model: {', '.join(served)}")
        self.max_model_len = served[model].get("max_model_len")
        return model

    def ask(self, **request: Any) -> Any:
        """The answer to a greedy completion, as OpenAI's API has it.

        Raises:
            TimeoutError: none came in time; nor did a further try's.
            ConnectionError: the server cannot be reached, dropped each try or failed at each.
            ValueError: it refuses the request.
        """
        asked = {"model": self.model, "temperature": 0, **request}
        found = self._request("POST", "/v1/completions", asked)
        if not isinstance(found, dict) or not found.get("choices"):
            raise ConnectionError(f"{self.url}/v1/completions answered without choices: {found}")
        return found

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        problem: OSError = ConnectionError()
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE_SECONDS)
            try:
                return self._request_once(method, path, body)
            except TimeoutError:
                # Another try would wait as long; a server that is too slow stays so.
                raise
            except OSError as error:
                problem = error
        raise ConnectionError(f"{problem}; tried {_TRIES} times")

    def _request_once(self, method: str, path: str, body: Any) -> Any:
        where = f"{self.url}{path}"
        seconds = self.patience.seconds()
        limits = httpx.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))
        try:
            response = self._client.request(method, path, json=body, timeout=limits)
        except httpx.TimeoutException:
            if seconds < self.patience.timeout:
                self.patience.seconds()
            raise TimeoutError(
                f"{where} did not answer within {seconds:.3g} s; give it longer with "
                "--timeout, or ask less at once with --num-concurrent"
            ) from None
        except httpx.TransportError as error:
            raise ConnectionError(
                f"{where} cannot be asked ({type(error).__name__}: {error}); is the server up?"
            ) from None
        said = " ".join(response.text.split())[:500]
        if response.status_code >= 500 or response.status_code == 429:
            raise ConnectionError(f"{where} failed with {response.status_code}: {said}")
        if response.is_error:
            raise ValueError(f"{where} refused the request with {response.status_code}: {said}")
        try:
            return response.json()
        except ValueError:
            raise ConnectionError(f"{where} answered what is not JSON: {said}") from None
