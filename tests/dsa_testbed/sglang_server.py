"""``python -m sglang.launch_server``, with the face of server.Server."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsa_testbed.server import Completion, Counters, Server

# OpenAI's name -> SGLang's.
_SAMPLING = {"seed": "sampling_seed"}
_REPO = Path(__file__).resolve().parents[2]


def sglang_python() -> Path:
    """The interpreter of SGLang's environment; FileNotFoundError where there is none."""
    venv = Path(os.environ.get("DSA_TEST_SGLANG", _REPO / ".venv" / "sglang"))
    python = venv / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"{python} does not exist: run `make sglang`")
    return python


class SglangServer(Server):
    """``python -m sglang.launch_server --model-path MODEL``, of the environment of `make sglang`.

    SGLang pins another torch than vLLM, so that is not this process's environment: only HTTP and
    the log lie between them. ``DSA_TEST_SGLANG`` names another environment's folder.
    """

    host = "sglang"
    plugins = "sglang.srt.plugins"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # SGLang tells of drafts in each answer alone.
        self._answers: list[dict[str, Any]] = []

    @classmethod
    def launcher(cls, model: str) -> list[str]:
        serve = [str(sglang_python()), "-m", "sglang.launch_server", "--model-path", model]
        # Its idle scheduler otherwise takes a core that whoever asks may need.
        return [*serve, "--enable-metrics", "--sleep-on-idle"]

    def counters(self) -> Counters:
        metrics = self.metrics()
        return Counters(
            cached_tokens=metrics.get("sglang:cached_tokens_total", 0),
            preemptions=metrics.get("sglang:num_retracted_requests_total", 0),
            draft_tokens=sum(a.get("spec_num_proposed_drafts", 0) for a in self._answers),
            accepted_draft_tokens=sum(a.get("spec_num_correct_drafts", 0) for a in self._answers),
        )

    def complete(
        self, prompt: list[int] | str, max_tokens: int, *, logprobs: int | None = None, **body: Any
    ) -> Completion:
        return _parse(self._generate(prompt, max_tokens, body, logprobs=logprobs))

    def generate_all(
        self, prompts: Sequence[list[int]], max_tokens: int, concurrency: int = 16, **body: Any
    ) -> list[Completion]:
        if concurrency < len(prompts):
            return super().generate_all(prompts, max_tokens, concurrency, **body)
        return self.generate_at_once(prompts, max_tokens, **body)

    def generate_at_once(
        self, prompts: Sequence[list[int]], max_tokens: int, **body: Any
    ) -> list[Completion]:
        # In one request: its scheduler gets them all in one message.
        return [_parse(raw) for raw in self._generate(prompts, max_tokens, body, logprobs=None)]

    def prompt_logprobs(self, prompt: list[int]) -> list[float]:
        raw = self._generate(prompt, 1, {}, logprobs=0, logprob_start_len=0)
        return [value for value, *_ in raw["meta_info"]["input_token_logprobs"][1:]]

    def _generate(
        self,
        prompt: list[int] | str | Sequence[list[int]],
        max_tokens: int,
        sampling: dict[str, Any],
        *,
        logprobs: int | None,
        logprob_start_len: int | None = None,
    ) -> Any:
        """SGLang's answer; to several prompts a list of answers."""
        request = {
            "text" if isinstance(prompt, str) else "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": max_tokens}
            | {_SAMPLING.get(key, key): value for key, value in sampling.items()},
            "return_logprob": logprobs is not None or None,
            "top_logprobs_num": logprobs,
            "logprob_start_len": logprob_start_len,
        }
        raw = self.post("/generate", request)
        self._answers += [one["meta_info"] for one in (raw if isinstance(raw, list) else [raw])]
        return raw


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
