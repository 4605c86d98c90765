"""``python -m sglang.launch_server``, with the face of server.Server."""

import os
from pathlib import Path
from typing import Any

from dsa_testbed.server import Completion, Counters, Server

_REPO = Path(__file__).resolve().parents[2]


class SglangServer(Server):
    """``python -m sglang.launch_server --model-path MODEL``, of the environment of `make sglang`.

    SGLang pins another torch than vLLM, so that is not this process's environment: only HTTP and
    the log lie between them. ``DSA_TEST_SGLANG`` names another environment's folder.
    """

    host = "sglang"
    plugins = "sglang.srt.plugins"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # SGLang tells how much was drafted in each answer alone.
        self._drafts: list[int] = []

    @classmethod
    def launcher(cls, model: str) -> list[str]:
        venv = Path(os.environ.get("DSA_TEST_SGLANG", _REPO / ".venv" / "sglang"))
        python = venv / "bin" / "python"
        if not python.exists():
            raise FileNotFoundError(f"{python} does not exist: run `make sglang`")
        return [str(python), "-m", "sglang.launch_server", "--model-path", model]

    def counters(self) -> Counters:
        metrics = self.metrics()  # needs --enable-metrics
        return Counters(
            cached_tokens=metrics.get("sglang:cached_tokens_total", 0),
            preemptions=metrics.get("sglang:num_retracted_requests_total", 0),
            draft_tokens=sum(self._drafts),
        )

    def complete(
        self, prompt: list[int] | str, max_tokens: int, *, logprobs: int | None = None, **body: Any
    ) -> Completion:
        sampling = {"temperature": 0, "max_new_tokens": max_tokens} | body
        request = {
            "text" if isinstance(prompt, str) else "input_ids": prompt,
            "sampling_params": sampling,
            "return_logprob": logprobs is not None or None,
            "top_logprobs_num": logprobs,
        }
        raw = self.post("/generate", request)
        self._drafts.append(raw["meta_info"].get("spec_num_proposed_drafts", 0))
        return _parse(raw)


def _parse(raw: dict[str, Any]) -> Completion:
    meta = raw["meta_info"]
    top = meta.get("output_top_logprobs") or []
    return Completion(
        tokens=raw["output_ids"],
        text=raw["text"],
        finish_reason=meta["finish_reason"]["type"],
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
        logprobs=[{token: value for value, token, _ in at} for at in top],
        raw=raw,
    )
