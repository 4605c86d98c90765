"""Run a real server in its own process group, talk to it over HTTP, stop it cleanly.

Server is what every host has in common; VllmServer is ``vllm serve``; SGLang's is in
sglang_server.py.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import httpx

_TESTS = Path(__file__).resolve().parents[1]
# Nothing in a test may reach for the network.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
_TAIL_LINES = 60
_ERROR = re.compile(r"\b\w+(?:Error|Exception): .*")
_ADDED = "Added request "  # vLLM's log, of each request once its engine has been sent it
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})?\s+(\S+)")


class ServerError(RuntimeError):
    """The server died or did not start; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Completion:
    """One answer. ``logprobs[i]`` maps token id to log-probability at output position i."""

    tokens: list[int]
    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    logprobs: list[dict[int, float]]
    raw: dict[str, Any]


@dataclass(frozen=True)
class Counters:
    """What a server counted since it started."""

    cached_tokens: float
    """Prompt tokens that came from the prefix cache."""
    preemptions: float
    """Requests whose cache was taken away for others'; vLLM preempts, SGLang retracts."""
    draft_tokens: float
    """Tokens that the MTP layer proposed."""
    accepted_draft_tokens: float


class Server:
    """Context manager around a server of ``model``; a host's class says how it is started.

    env: added to this process's environment. mutation: one of mutations.MUTATIONS, applied in
    every process of the server. Entering waits until /health answers and raises ServerError if the
    server exits first or ``start_timeout`` seconds pass; leaving stops the whole process group.
    on_wait: called while waiting, with the seconds so far and the last line of the log.
    """

    host = ""
    """The host's name."""
    plugins = ""
    """Entry-point group of the host's general plugins."""
    environment: ClassVar[dict[str, str]] = {}
    """Defaults of environment variables."""

    def __init__(
        self,
        model: Path | str,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        *,
        mutation: str | None = None,
        log: Path | None = None,
        start_timeout: float = 300,
        request_timeout: float = 900,
        on_wait: Callable[[float, str], None] | None = None,
    ) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="dsa-server-")
        self.log = log or Path(self._scratch.name) / "server.log"
        self.port = _free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.model = str(model)
        listen = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.command = [*self.launcher(self.model), *listen, *args]
        self._env = {**_ENVIRONMENT, **self.environment, **os.environ, **(env or {})}
        if mutation:
            self._add_mutation(mutation)
        self._start_timeout = start_timeout
        self._on_wait = on_wait
        self._client = httpx.Client(
            base_url=self.base_url,
            timeout=request_timeout,
            limits=httpx.Limits(max_connections=256),
            trust_env=False,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.startup_seconds = 0.0

    @classmethod
    def launcher(cls, model: str) -> list[str]:
        """The command that serves ``model``, without further arguments."""
        raise NotImplementedError

    def counters(self) -> Counters:
        """What the server has counted so far."""
        raise NotImplementedError

    def complete(
        self, prompt: list[int] | str, max_tokens: int, *, logprobs: int | None = None, **body: Any
    ) -> Completion:
        """One greedy completion; ``body`` adds or replaces fields of the host's request.

        Raises httpx.HTTPStatusError on a refused request and ServerError if the server died.
        """
        raise NotImplementedError

    def prompt_logprobs(self, prompt: list[int]) -> list[float]:
        """Log-probability of each token of the prompt but the first."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.stop()
        if error is not None and not isinstance(error, ServerError):
            error.add_note(f"last lines of the server's log:\n{self.log_tail()}")
        self._scratch.cleanup()

    def start(self) -> None:
        """Start the process; it is not ready yet."""
        with self.log.open("wb") as stream:
            self._process = subprocess.Popen(
                self.command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # Whatever becomes of this process, its end of the pipe closes and the group goes with it.
        kill_group = f"read _; kill -9 -{self._process.pid}"
        self._watchdog = subprocess.Popen(
            ["sh", "-c", kill_group], stdin=subprocess.PIPE, start_new_session=True
        )
        self._started = time.monotonic()

    def wait_until_ready(self) -> None:
        """Return when /health answers 200."""
        while not self.is_ready():
            self.check_alive()
            seconds = time.monotonic() - self._started
            if seconds > self._start_timeout:
                raise ServerError(f"not ready after {seconds:.0f} s: {self._describe()}")
            if self._on_wait:
                self._on_wait(seconds, self.log_tail(1))
            time.sleep(0.25)
        self.startup_seconds = time.monotonic() - self._started

    def is_ready(self) -> bool:
        """Whether /health answers 200 now."""
        try:
            return self._client.get("/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def check_alive(self) -> None:
        """Raise ServerError if the server's main process has ended."""
        code = self.returncode
        if code is not None:
            raise ServerError(f"exited with code {code}: {self._describe()}")

    @property
    def returncode(self) -> int | None:
        """Exit code of the server, None while it runs."""
        return self._process.poll() if self._process else None

    def interrupt(self, timeout: float = 45) -> int:
        """Ctrl-C, as a terminal sends it to all of the foreground; the exit code."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGINT)
        return self._process.wait(timeout)

    def stop(self, timeout: float = 45) -> int | None:
        """SIGTERM, then SIGKILL to the whole group; the exit code, -9 where it had to be killed."""
        process = self._process
        if process is None:
            return None
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
        # Workers that outlive the main process would hold cores and memory.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self._watchdog.kill()
        self._watchdog.communicate()
        self._client.close()
        return process.wait()

    def log_text(self) -> str:
        """All the server has written so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """The last lines of the log."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def metrics(self) -> dict[str, float]:
        """/metrics, each name summed over its labels, e.g. ``vllm:num_preemptions_total``."""
        totals: dict[str, float] = {}
        for line in self._client.get("/metrics").text.splitlines():
            if match := _SAMPLE.match(line):
                totals[match[1]] = totals.get(match[1], 0.0) + float(match[2])
        return totals

    def post(self, path: str, request: dict[str, Any]) -> Any:
        """The JSON answer to a request; what is None is left out."""
        request = {key: value for key, value in request.items() if value is not None}
        try:
            response = self._client.post(path, json=request)
        except httpx.TransportError:
            self.check_alive()
            raise
        if response.is_error:
            self.check_alive()
            raise httpx.HTTPStatusError(
                f"{response.status_code}: {response.text}",
                request=response.request,
                response=response,
            )
        return response.json()

    def generate_all(
        self, prompts: Sequence[list[int]], max_tokens: int, concurrency: int = 16, **body: Any
    ) -> list[Completion]:
        """Complete all prompts, ``concurrency`` at a time, started in their order."""
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(lambda p: self.complete(p, max_tokens, **body), prompts))

    def generate_at_once(
        self, prompts: Sequence[list[int]], max_tokens: int, **body: Any
    ) -> list[Completion]:
        """Complete all prompts, which the scheduler has before it admits the first.

        However slowly they arrive, so that what it takes away from whom does not depend on that.
        """
        raise NotImplementedError

    def errors(self) -> list[str]:
        """The distinct ``SomeError: message`` ends of the log's lines, the root cause first."""
        return list(dict.fromkeys(_ERROR.findall(self.log_text())))

    def _describe(self) -> str:
        parts = [shlex.join(self.command), self.log_tail(), "errors in the log:", *self.errors()]
        return "\n".join(parts)

    def _add_mutation(self, mutation: str) -> None:
        from dsa_testbed.mutations import ENTRY_POINT, VARIABLE

        # Servers find plugins through installed metadata; this one exists for this run only.
        info = Path(self._scratch.name) / "dsa_test_mutations-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: dsa-test-mutations\nVersion: 0\n"
        )
        (info / "entry_points.txt").write_text(
            f"[{self.plugins}]\ndsa_test_mutations = {ENTRY_POINT}\n"
        )
        search = [self._scratch.name, str(_TESTS), self._env.get("PYTHONPATH", "")]
        self._env["PYTHONPATH"] = os.pathsep.join(filter(None, search))
        self._env[VARIABLE] = mutation


class VllmServer(Server):
    """``vllm serve MODEL --host 127.0.0.1 --port <free> *args``, of this process's environment."""

    host = "vllm"
    plugins = "vllm.general_plugins"
    environment: ClassVar[dict[str, str]] = {
        "VLLM_NO_USAGE_STATS": "1",
        # GiB. vLLM's default is 92 % of all memory, and it refuses to start where less is free.
        "VLLM_CPU_KVCACHE_SPACE": "2",
    }

    @classmethod
    def launcher(cls, model: str) -> list[str]:
        return [str(Path(sys.executable).parent / "vllm"), "serve", model]

    def counters(self) -> Counters:
        metrics = self.metrics()
        return Counters(
            cached_tokens=metrics["vllm:prefix_cache_hits_total"],
            preemptions=metrics["vllm:num_preemptions_total"],
            draft_tokens=metrics.get("vllm:spec_decode_num_draft_tokens_total", 0),
            accepted_draft_tokens=metrics.get("vllm:spec_decode_num_accepted_tokens_total", 0),
        )

    def complete(
        self, prompt: list[int] | str, max_tokens: int, *, logprobs: int | None = None, **body: Any
    ) -> Completion:
        request = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "return_token_ids": True,
            "logprobs": logprobs,
            "return_tokens_as_token_ids": logprobs is not None or None,
        }
        return _parse(self.post("/v1/completions", request | body))

    def generate_at_once(
        self, prompts: Sequence[list[int]], max_tokens: int, **body: Any
    ) -> list[Completion]:
        """Needs --enable-log-requests and VLLM_SERVER_DEV_MODE=1, as the `tight` setting has."""
        self._client.post("/pause", params={"mode": "keep"}).raise_for_status()
        arrived = self.log_text().count(_ADDED) + len(prompts)
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = [pool.submit(self.complete, p, max_tokens, **body) for p in prompts]
            try:
                # The engine takes what it is sent in order: these requests before the resumption.
                while self.log_text().count(_ADDED) < arrived:
                    self.check_alive()
                    if failed := next((a for a in answers if a.done()), None):
                        failed.result()
                    time.sleep(0.05)
            finally:
                self._client.post("/resume").raise_for_status()
            return [answer.result() for answer in answers]

    def prompt_logprobs(self, prompt: list[int]) -> list[float]:
        raw = self.complete(prompt, 1, prompt_logprobs=0).raw
        entries = raw["choices"][0]["prompt_logprobs"][1:]
        return [
            entry[str(token)]["logprob"] for entry, token in zip(entries, prompt[1:], strict=True)
        ]


def op_counts(path: Path) -> Counter[str]:
    """Calls of each op so far, over all processes of the server."""
    total: Counter[str] = Counter()
    for file in path.parent.glob(path.name + ".*"):
        for line in file.read_text().splitlines():
            name, count = line.split()
            total[name] += int(count)
    return total


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _parse(raw: dict[str, Any]) -> Completion:
    choice, usage = raw["choices"][0], raw["usage"]
    top = (choice.get("logprobs") or {}).get("top_logprobs") or []
    return Completion(
        tokens=choice["token_ids"],
        text=choice["text"],
        finish_reason=choice["finish_reason"],
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        # Keys are "token_id:123".
        logprobs=[{int(k.partition(":")[2]): v for k, v in at.items()} for at in top],
        raw=raw,
    )
