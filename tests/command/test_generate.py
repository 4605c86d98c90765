"""`dsa generate`: transformers' tokens, by one rank and by two."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsa_plugin import attention
from dsa_plugin.generate.generator import Generator, Limits
from dsa_plugin.generate.model import Indexer
from dsa_plugin.generate.ranks import Ranks
from dsa_plugin.generate.sampling import Sampling, nucleus
from dsa_plugin.generate.weights import load_model
from dsa_testbed.checkpoint import load_config, make_checkpoint
from dsa_testbed.exactness import MAX_TOKENS
from dsa_testbed.oracle import oracle_generate
from dsa_testbed.prompts import ci_set
from dsa_testbed.tokenizer import encode, shipped_text

ALONE = Ranks(0, 1, torch.device("cpu"))
# Below, at and past index_topk (64) and a page (64), over several pages.
NAMES = ("text-1", "text-17", "text-63", "text-64", "text-65", "text-129", "text-257")
PROMPTS = [p.tokens for p in ci_set() if p.name in (*NAMES, "prefix-256+64", "random-400")]
LONG = [max(PROMPTS, key=len)]


def generator(
    folder: Path, limits: Limits | None = None, sampling: Sampling | None = None
) -> Generator:
    model = load_model(folder, ALONE, torch.float32)
    return Generator(model, sampling or Sampling(), limits or Limits(MAX_TOKENS))


@pytest.mark.parametrize("name", ["v32", "glm5", "glm52"])
def test_tokens_are_those_of_transformers(name: str) -> None:
    """In one batch, prompts in chunks that end within a page."""
    folder = make_checkpoint(name)
    mine = generator(folder, Limits(MAX_TOKENS, prefill_rows=100)).generate(PROMPTS)
    assert mine == oracle_generate(folder, PROMPTS, MAX_TOKENS)


@pytest.mark.parametrize("name", ["v32", "glm5"])
def test_the_other_rope_style_changes_tokens(name: str) -> None:
    folder = make_checkpoint(name)
    mine = generator(folder)
    for module in mine.model.modules():
        if isinstance(module, Indexer):
            module.interleaved = not module.interleaved
    assert mine.generate(LONG) != oracle_generate(folder, LONG, MAX_TOKENS)


def test_layers_that_share_a_selection_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint("glm52")
    forward: Callable[..., None] = attention.forward

    def forgetful(
        layer: Any, projections: Any, metadata: Any, topk: Any, out: Any, **how: bool
    ) -> None:
        if how["reuse_selection"]:
            topk.copy_(torch.arange(topk.shape[1]).where(topk >= 0, -1))
        forward(layer, projections, metadata, topk, out, **how)

    monkeypatch.setattr(attention, "forward", forgetful)
    assert generator(folder).generate(LONG) != oracle_generate(folder, LONG, MAX_TOKENS)


def test_two_ranks_give_the_same_tokens(tmp_path: Path) -> None:
    """By torchrun and gloo, from text in a file, with layers that share selections."""
    folder = make_checkpoint("glm52")
    text = shipped_text()
    passages = [text[1000 : 1000 + length] for length in (30, 400, 1200)]
    lines = "".join(json.dumps({"prompt": passage}) + "\n" for passage in passages)
    (tmp_path / "prompts.jsonl").write_text(lines)
    run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dsa_plugin.cli"]
    asked = [str(folder), "--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "12"]
    done = subprocess.run(
        [sys.executable, *run, "generate", *asked, "--batch", "2", "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    tokens = [encode(passage, load_config(folder)["vocab_size"]) for passage in passages]
    assert [each["tokens"] for each in told] == oracle_generate(folder, tokens, 12)
    assert "tokens read at" in done.stderr


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 4)])
def test_fp8_weights_are_what_they_mean(rank: int, size: int) -> None:
    """Whole, and as a rank whose heads begin within a block of 128."""
    ranks = Ranks(rank, size, torch.device("cpu"))
    stored, meant = (
        load_model(make_checkpoint(name), ranks, torch.float32).state_dict()
        for name in ("v32-fp8", "v32-fp8_dequant")
    )
    assert stored.keys() == meant.keys()
    for name, value in stored.items():
        torch.testing.assert_close(value, meant[name], atol=0, rtol=0, msg=name)


def test_ranks_share_all_there_is_once() -> None:
    """Each tensor of four ranks: whole, one part of four, or one rank's own."""
    folder = make_checkpoint("v32")
    stored = load_file(folder / "model.safetensors")
    ranks = [
        load_model(folder, Ranks(rank, 4, torch.device("cpu")), torch.float32).state_dict()
        for rank in range(4)
    ]
    seen = set().union(*ranks)
    assert seen == {name for name in stored if ".layers.4." not in name}  # without its MTP layer
    for name in seen:
        parts = [rank[name] for rank in ranks if name in rank]
        if len(parts) == 1:
            assert ".experts." in name
        ways = [parts[0], *(torch.cat(parts, dim) for dim in range(parts[0].dim()))]
        assert any(torch.equal(way, stored[name]) for way in ways), name


def edited(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint whose tensors are others."""
    copy = Path(shutil.copytree(folder, tmp_path / "edited"))
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    folder = edited(make_checkpoint("v32"), tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"has no tensor {name}"):
        load_model(folder, ALONE, torch.float32)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"

    def cut(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name][:, :100].contiguous()

    folder = edited(make_checkpoint("v32"), tmp_path, cut)
    with pytest.raises(ValueError, match=rf"{name} has shape \[256, 100\]"):
        load_model(folder, ALONE, torch.float32)


def test_a_checkpoint_in_files_with_a_tied_head(tmp_path: Path) -> None:
    source = make_checkpoint("v32")
    folder = Path(shutil.copytree(source, tmp_path / "files"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    del tensors["lm_head.weight"]
    names = sorted(tensors)
    where: dict[str, str] = {}
    for number in (0, 1):
        file = f"model-{number}.safetensors"
        part = {name: tensors[name] for name in names[number::2]}
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    config = load_config(folder) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder, ALONE, torch.float32)
    torch.testing.assert_close(model.lm_head.weight, tensors["model.embed_tokens.weight"])
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1.safetensors is named in the index and missing"):
        load_model(folder, ALONE, torch.float32)


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("v32")
    with pytest.raises(ValueError, match="3 ranks do not divide num_attention_heads = 4"):
        load_model(folder, Ranks(0, 3, torch.device("cpu")), torch.float32)
    config = load_config(folder) | {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised by 'awq'"):
        load_model(tmp_path, ALONE, torch.float32)
    mine = generator(folder)
    with pytest.raises(ValueError, match=r"40960 positions"):
        mine.generate([[5] * 40950])
    with pytest.raises(ValueError, match=r"token 9999"):
        mine.generate([[9999]])
    with pytest.raises(ValueError, match=r"a prompt of 0 tokens"):
        mine.generate([[]])


def test_draws_depend_on_seed_and_prompt_alone() -> None:
    """Not on what else is in the batch; the third prompt of a file is the third in any."""
    folder, prompts = make_checkpoint("v32"), PROMPTS[:3]
    mine = generator(folder, Limits(8), Sampling(temperature=1.0, top_p=0.9, seed=3))
    together = mine.generate(prompts)
    assert [mine.generate([prompt], first)[0] for first, prompt in enumerate(prompts)] == together
    mine.sampling = replace(mine.sampling, seed=4)
    assert mine.generate(prompts) != together
    mine.sampling = Sampling(temperature=1e-4, seed=4)
    assert mine.generate(prompts) == generator(folder, Limits(8)).generate(prompts)


def test_the_nucleus_is_the_likeliest_that_reach_top_p() -> None:
    found = nucleus(torch.tensor([0.1, 0.5, 0.15, 0.25]), 0.7)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 0.0, 0.25]))


@pytest.mark.parametrize(("setting", "value"), [("temperature", -1.0), ("top_p", 0.0)])
def test_bad_sampling_is_refused(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=setting):
        replace(Sampling(), **{setting: value})  # type: ignore[arg-type]


def test_an_end_token_ends_its_answer_alone() -> None:
    folder, prompts = make_checkpoint("v32"), PROMPTS[:3]
    mine = generator(folder, Limits(8))
    free = mine.generate(prompts)
    end = free[1][2]
    mine.config = replace(mine.config, end_tokens=frozenset((end,)))
    cut = [answer[: answer.index(end) + 1] if end in answer else answer for answer in free]
    assert mine.generate(prompts) == cut != free
