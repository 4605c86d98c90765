"""The process that oracle.py starts: runs a request file through transformers.

Never import it beside vLLM.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from dsa_testbed.checkpoint import load_config
from dsa_testbed.rounding import Fp8Cache

# Named, not AutoModel: see oracle.py.
_CLASSES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}
# The eager indexer holds scores [rows, index heads, context] in fp32, a few at a time.
_SCORE_BYTES = 512 << 20
_MAX_ROWS = 1024


def load(checkpoint: Path, dtype: torch.dtype) -> Any:
    """The reference model; an error if any weight was missing, left over or misshapen."""
    config = load_config(checkpoint)
    model, report = getattr(transformers, _CLASSES[config["model_type"]]).from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    # transformers has no MTP layer.
    draft = f"model.layers.{config['num_hidden_layers']}."
    problems = {kind: [k for k in keys if draft not in str(k)] for kind, keys in report.items()}
    if any(problems.values()):
        raise ValueError(f"{checkpoint} does not load cleanly: {problems}")
    return model.eval()


class Run:
    """One sequence: prefill in chunks, then token by token, with transformers' own cache."""

    def __init__(self, model: Any, *, fp8_caches: bool = False) -> None:
        self.model = model
        self.cache = (Fp8Cache if fp8_caches else DynamicCache)(config=model.config)
        self.length = 0

    def __call__(self, tokens: list[int], progress: Callable[[int], None] | None = None) -> Tensor:
        """Logits of the last token, [vocab]."""
        logits = torch.empty(0)
        for chunk in self._chunks(tokens):
            logits = self._step(chunk, logits_to_keep=1)[-1]
            if progress:
                progress(self.length)
        return logits

    def all_logits(self, tokens: list[int], progress: Callable[[int], None]) -> Tensor:
        """Logits of every token, [T, vocab]."""
        logits = []
        for chunk in self._chunks(tokens):
            logits.append(self._step(chunk, logits_to_keep=0))
            progress(self.length)
        return torch.cat(logits)

    def _chunks(self, tokens: list[int]) -> list[list[int]]:
        heads = getattr(self.model.config, "index_n_heads", self.model.config.num_attention_heads)
        rows = _SCORE_BYTES // (4 * heads * (self.length + len(tokens)))
        rows = max(1, min(_MAX_ROWS, rows))
        return [tokens[i : i + rows] for i in range(0, len(tokens), rows)]

    def _step(self, tokens: list[int], logits_to_keep: int) -> Tensor:
        output = self.model(
            torch.tensor([tokens]),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        self.length += len(tokens)
        logits: Tensor = output.logits[0]
        return logits


def generate(
    model: Any, job: dict[str, Any], progress: Callable[[int], None]
) -> dict[str, list[Any]]:
    """Greedy tokens (the smaller id among equals) and their lead over the second best."""
    run, tokens, gaps = Run(model), [], []
    logits = run(job["tokens"], progress)
    while True:
        best = int(logits.argmax())
        first, second = logits.double().topk(2).values.tolist()
        tokens.append(best)
        gaps.append(first - second)
        if len(tokens) == job["max_tokens"]:
            return {"tokens": tokens, "gaps": gaps}
        logits = run([best])


def forward(
    model: Any, job: dict[str, Any], progress: Callable[[int], None]
) -> dict[str, np.ndarray[Any, Any]]:
    """Teacher-forced log-probabilities and the indexers' selections."""
    topk: dict[int, list[Tensor]] = {}
    run = Run(model, fp8_caches=bool(job["fp8_caches"]))

    def record(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            rows, width = output.shape[1:]
            positions = torch.arange(run.length, run.length + rows)[:, None]
            # Rows with fewer visible keys than index_topk also list keys of the future.
            seen = torch.where(output[0] <= positions, output[0], -1)
            pad = model.config.index_topk - width
            topk.setdefault(layer, []).append(torch.nn.functional.pad(seen, (0, pad), value=-1))

        return hook

    hooks = [
        layer.self_attn.indexer.register_forward_hook(record(index))
        for index, layer in enumerate(model.model.layers)
        if getattr(layer.self_attn, "indexer", None) is not None
    ]
    logits = run.all_logits(job["tokens"], progress)
    for hook in hooks:
        hook.remove()
    arrays = {f"topk_{layer}": torch.cat(rows).int().numpy() for layer, rows in topk.items()}
    return arrays | {"logprobs": logits.float().log_softmax(-1).numpy()}


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(f".{os.getpid()}-{path.name}")
    if path.suffix == ".json":
        part.write_text(json.dumps(content))
    else:
        with part.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **content)
    part.rename(path)


class Progress:
    """A line on stderr at most every five seconds."""

    def __init__(self, name: str, jobs: list[dict[str, Any]]) -> None:
        self.name, self.jobs = name, len(jobs)
        self.total = sum(len(job["tokens"]) for job in jobs)
        self.start = time.monotonic()
        self.index, self.done, self.shown = 0, 0, 0.0

    def __call__(self, tokens: int) -> None:
        """``tokens`` of the present job's prompt are done."""
        seconds = time.monotonic() - self.start
        if seconds - self.shown >= 5:
            self.shown = seconds
            line = (
                f"reference {self.name}: prompt {self.index + 1}/{self.jobs}, "
                f"{self.done + tokens}/{self.total} prompt tokens, {seconds:.0f} s"
            )
            print(line, file=sys.stderr, flush=True)

    def finish(self, tokens: int) -> None:
        """A job with a prompt of ``tokens`` is done."""
        self.index += 1
        self.done += tokens


def main() -> None:
    """Run every job of the request file, writing each result as it is ready."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    request = json.loads(Path(sys.argv[1]).read_text())
    checkpoint = Path(request["checkpoint"])
    model = load(checkpoint, getattr(torch, request["dtype"]))
    progress = Progress(checkpoint.name, request["jobs"])
    for job in request["jobs"]:
        compute = generate if job["mode"] == "generate" else forward
        # Another run may have answered it meanwhile.
        if not Path(job["file"]).exists():
            _write(Path(job["file"]), compute(model, job, progress))
        progress.finish(len(job["tokens"]))


if __name__ == "__main__":
    main()
