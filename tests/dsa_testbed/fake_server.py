"""A server with OpenAI's API in this process, that can be told to answer wrong, or not at all.

Who answers is a Brain; which requests get a wrong answer is a rule on what a real server would know
of them: how long they are, whether they were asked before, whether others are asked meanwhile.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from dsa_plugin.evaluation.selection import applied
from dsa_plugin.evaluation.variants import VARIANTS
from dsa_plugin.in_transformers.cached_sequence import CachedSequence, end_tokens
from dsa_plugin.in_transformers.checkpoint import load_pretrained, load_tokenizer
from dsa_plugin.server_check.questions import make_prompts

Json = dict[str, Any]
# Requests that are asked at once have all come by then.
_ARRIVAL_SECONDS = 0.01
_CONTEXT, _MAX_TOKENS = 4096, 48


@dataclass(frozen=True)
class Seen:
    """What a rule may look at."""

    tokens: int
    cached: bool
    batch: bool


Rule = Callable[[Seen], bool]
Failure = Callable[[BaseHTTPRequestHandler, int], bool]
"""Told the handler and the request's number; True where it has dealt with the request."""


class Brain(Protocol):
    """What answers."""

    def count(self, prompt: str | list[int]) -> int:
        """Tokens of a prompt."""
        ...

    def answer(self, prompt: str | list[int], body: Json, *, wrong: bool) -> Json:
        """A choice of OpenAI's API."""
        ...


class KnowsAll:
    """Has every answer of the questions of a seed; a wrong answer is that nobody knows."""

    def __init__(self, seed: int, lengths: tuple[int, ...], questions: int) -> None:
        self.answers = {
            prompt.text: prompt.question.answer
            for length in lengths
            for prompt in make_prompts(seed, length, questions)
        }

    def count(self, prompt: str | list[int]) -> int:
        return len(prompt) // 4 if isinstance(prompt, str) else len(prompt)

    def answer(self, prompt: str | list[int], body: Json, *, wrong: bool) -> Json:
        assert isinstance(prompt, str)
        assert body["temperature"] == 0
        _nonce, _, text = prompt.partition(". ")
        return {"text": " Nobody knows." if wrong else self.answers[text]}


class Checkpoint:
    """A checkpoint in transformers; where wrong it selects by a variant of `dsa eval`.

    Attributes: `variant`, and `wrong_from`, the position from which on it holds.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = load_pretrained(folder, dtype)
        self.tokenizer = load_tokenizer(folder)
        self.variant, self.wrong_from = "dsa", 0
        self._known: dict[tuple[object, ...], Any] = {}

    def count(self, prompt: str | list[int]) -> int:
        return len(self._tokens(prompt))

    @torch.inference_mode()
    def answer(self, prompt: str | list[int], body: Json, *, wrong: bool) -> Json:
        variant = self.variant if wrong else "dsa"
        key = (variant, self.wrong_from, str(prompt), body.get("echo"))
        if key not in self._known:
            tokens = self._tokens(prompt)
            run = CachedSequence(self.model)
            right = tokens[: self.wrong_from] if wrong else []
            logits = [found for _, found in run.chunks(right)] if right else []
            with applied(self.model, VARIANTS[variant], _CONTEXT):
                logits += [found for _, found in run.chunks(tokens[len(right) :])]
                done = _read(tokens, torch.cat(logits)) if body.get("echo") else None
                self._known[key] = done or self._go_on(run, logits[-1])
        tokens, logprobs = self._known[key]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        choice: Json = {"text": text.partition("\n")[0]}
        if body.get("logprobs"):
            choice["logprobs"] = {"token_logprobs": logprobs}
            choice["token_ids"] = tokens
        return choice

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        found: list[int] = self.tokenizer(prompt)["input_ids"]
        return found

    def _go_on(self, run: CachedSequence, logits: Tensor) -> tuple[list[int], list[float]]:
        ends = end_tokens(self.model)
        said: list[int] = []
        logprobs: list[float] = []
        while len(said) < _MAX_TOKENS and "\n" not in self.tokenizer.decode(said):
            best = logits[-1].float().log_softmax(-1).max(-1)
            logprobs.append(float(best.values))
            said.append(int(best.indices))
            if said[-1] in ends:
                break
            [(_, logits)] = run.chunks(said[-1:])
        return said, logprobs


def _read(tokens: list[int], logits: Tensor) -> tuple[list[int], list[float | None]]:
    after = torch.tensor(tokens[1:])
    found = logits[:-1].float().log_softmax(-1).gather(1, after[:, None])
    return tokens, [None, *found[:, 0].tolist()]


class FakeServer:
    """`with FakeServer(brain) as server`, then `server.url`.

    Attributes: `wrong`, the rule; `fail`, what it does in place of answering; `model`, its name,
    `answers_as`, the name in its answers; `max_model_len`; `tells_cached`, whether usage has it.
    """

    def __init__(self, brain: Brain, wrong: Rule = lambda _seen: False) -> None:
        self.brain, self.wrong = brain, wrong
        self.fail: Failure = lambda _handler, _number: False
        self.model = self.answers_as = "DeepSeek-V3.2"
        self.max_model_len: int | None = None
        self.tells_cached = True
        self.asked: list[Json] = []
        self.most_at_once = 0
        self._prompts: set[str] = set()
        self._lock = threading.Lock()
        self._busy: list[set[int]] = []

    def __enter__(self) -> Self:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def models(self) -> Json:
        return {"data": [{"id": self.model, "max_model_len": self.max_model_len}]}

    def complete(self, body: Json) -> Json:
        with self._meanwhile() as others, self._lock:
            prompt = body["prompt"]
            echo = bool(body.get("echo"))
            cached = str(prompt) in self._prompts and not echo
            self._prompts.add(str(prompt))
            tokens = self.brain.count(prompt)
            seen = Seen(tokens, cached, len(others) > 1)
            choice = self.brain.answer(prompt, body, wrong=self.wrong(seen))
        usage: Json = {"prompt_tokens": tokens}
        if self.tells_cached:
            usage["prompt_tokens_details"] = {"cached_tokens": tokens - 1 if cached else 0}
        return {"model": self.answers_as, "choices": [choice], "usage": usage}

    @contextmanager
    def _meanwhile(self) -> Iterator[set[int]]:
        """Requests that are there together with this one, itself among them."""
        mine = {threading.get_ident()}
        with self._lock:
            for others in self._busy:
                others |= mine
            mine |= {ident for others in self._busy for ident in others}
            self._busy.append(mine)
            self.most_at_once = max(self.most_at_once, len(self._busy))
        time.sleep(_ARRIVAL_SECONDS)
        try:
            yield mine
        finally:
            with self._lock:
                self._busy = [others for others in self._busy if others is not mine]


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections

        def do_GET(self) -> None:
            self.reply(server.models())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            if not server.fail(self, len(server.asked) - 1):
                self.reply(server.complete(body))

        def reply(self, content: Any, status: int = 200) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    return Handler
