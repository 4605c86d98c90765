"""Start vLLM or SGLang of this environment on a checkpoint, ask it, and stop it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from dsa_plugin.evaluation.completions import Completions, Patience
from dsa_plugin.evaluation.variants import Variant
from dsa_plugin.recipes.needs import CONTEXT_FLAG

HostName = Literal["vllm", "sglang"]
KvCacheDtype = Literal["auto", "fp8"]
# What each host calls it.
_FP8 = {"vllm": "fp8_ds_mla", "sglang": "fp8_e4m3"}
_OVERRIDES = {"vllm": "--hf-overrides", "sglang": "--json-model-override-args"}
_STOP_SECONDS = 45
_TAIL_LINES = 25
_ERROR = re.compile(r"\b[A-Z]\w*(Error|Exception): ")


@dataclass(frozen=True)
class Deployment:
    """How a checkpoint is served.

    Attributes:
        host: which is started.
        checkpoint: a folder.
        dtype: the host's name of it.
        kv_cache_dtype: of latents and, where fp8, of index keys.
        index_topk: the checkpoint's own.
        context: tokens of the longest request.
        flags: further ones of the host, which win.
        start_timeout: seconds until it has to be ready.
    """

    host: HostName
    checkpoint: Path
    dtype: str
    kv_cache_dtype: KvCacheDtype
    index_topk: int
    context: int
    flags: Sequence[str] = ()
    start_timeout: float = 600

    @contextmanager
    def under(self, variant: Variant, patience: Patience) -> Iterator[Completions]:
        """A server that selects by a variant, until the block ends.

        Raises:
            ValueError: no flag of the host makes the variant.
            OSError: it does not start, or fails while it is asked.
        """
        with (
            tempfile.TemporaryDirectory(prefix="dsa-eval-") as folder,
            (Path(folder) / "log").open("w+b") as log,
        ):
            port = _free_port()
            process = subprocess.Popen(
                self.command(variant, port),
                env=os.environ | self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            url = f"http://127.0.0.1:{port}"
            try:
                self._wait(process, url)
                yield Completions(url, patience=patience)
            except OSError as error:
                raise ConnectionError(
                    f"{self.host}, serving {variant.name}: {error}\n{_said(Path(log.name))}"
                ) from None
            finally:
                _stop(process)

    def command(self, variant: Variant, port: int) -> list[str]:
        """The host's command line. Raises ValueError where no flag makes the variant."""
        if not variant.by_flag:
            raise ValueError(
                f"{variant.name} is in no flag of {self.host}: --through transformers has it"
            )
        if self.host == "vllm":
            start = [_beside_interpreter("vllm"), "serve", str(self.checkpoint)]
        else:
            launcher = [sys.executable, "-m", "sglang.launch_server"]
            start = [*launcher, "--model-path", str(self.checkpoint)]
        found = [*start, "--host", "127.0.0.1", "--port", str(port), "--dtype", self.dtype]
        found += [f"--{CONTEXT_FLAG[self.host]}", str(self.context)]
        if self.kv_cache_dtype == "fp8":
            found += ["--kv-cache-dtype", _FP8[self.host]]
        index_topk = variant.index_topk(self.index_topk, self.context)
        if index_topk != self.index_topk:
            found += [_OVERRIDES[self.host], json.dumps({"index_topk": index_topk})]
        return [*found, *self.flags]

    def _environment(self) -> dict[str, str]:
        return {"DSA_INDEX_CACHE_DTYPE": "fp8"} if self.kv_cache_dtype == "fp8" else {}

    def _wait(self, process: subprocess.Popen[bytes], url: str) -> None:
        start = time.monotonic()
        while not _is_ready(url):
            if (code := process.poll()) is not None:
                raise ConnectionError(f"it ended with exit code {code} before it was ready")
            if time.monotonic() - start > self.start_timeout:
                raise TimeoutError(f"it was not ready after {self.start_timeout:g} s")
            time.sleep(0.5)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    # Workers that outlive the main process would hold the device.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _said(log: Path) -> str:
    """The first error that a log names, which later ones may only refer to, and its last lines."""
    lines = log.read_text(errors="replace").splitlines()
    causes = [line for line in lines[:-_TAIL_LINES] if _ERROR.search(line)]
    return "\n".join([*causes[:1], *lines[-_TAIL_LINES:]])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _beside_interpreter(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: run dsa in an environment that has {name}, or ask a server "
            "that runs elsewhere with --url"
        )
    return str(path)
