"""`dsa explain`: what it records, whatever the chunks, and what it refuses before loading."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dsa_plugin import cli
from dsa_plugin.explain.checkpoint import load_model, weight_elements
from dsa_plugin.explain.figure import draw
from dsa_plugin.explain.pieces import find_passage, token_pieces
from dsa_plugin.explain.selections import LayerSelections, Selections, record_selections
from dsa_plugin.in_transformers import cached_sequence
from dsa_plugin.in_transformers.checkpoint import load_tokenizer
from dsa_testbed.checkpoint import make_checkpoint
from dsa_testbed.tokenizer import shipped_text

CPU = torch.device("cpu")
PROMPT_TOKENS, NEW_TOKENS = 110, 6


@pytest.fixture(scope="module", params=["v32-bf16", "glm52-bf16"])
def folder(request: pytest.FixtureRequest) -> Path:
    return make_checkpoint(request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder, CPU, PROMPT_TOKENS + NEW_TOKENS)


@pytest.fixture(scope="module")
def prompt(folder: Path) -> list[int]:
    ids: list[int] = load_tokenizer(folder)(shipped_text()[:600])["input_ids"]
    return ids[:PROMPT_TOKENS]


@torch.inference_mode()
def at_once(model: Any, tokens: tuple[int, ...]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Layer -> what its own indexer chose in one pass without a cache; and the best next tokens."""
    found: dict[int, torch.Tensor] = {}

    def hook(layer: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: found.update({layer: output[0]})

    hooks = [
        layer.self_attn.indexer.register_forward_hook(hook(index))
        for index, layer in enumerate(model.model.layers)
        if layer.self_attn.indexer is not None
    ]
    best = model(torch.tensor([tokens]), use_cache=False).logits[0].argmax(-1)
    for handle in hooks:
        handle.remove()
    return found, best


def test_selections_are_those_of_one_pass(
    model: Any, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_sequence, "_MAX_ROWS", 37)
    done: list[int] = []
    found = record_selections(model, prompt, NEW_TOKENS, progress=done.append)
    assert done == [37, 74, 110, *range(111, 117)]
    assert found.tokens[:PROMPT_TOKENS] == tuple(prompt)
    assert (len(found.tokens), found.index_topk, found.first_row) == (116, 64, 64)
    expected, best = at_once(model, found.tokens)
    assert found.tokens[PROMPT_TOKENS:] == tuple(best[PROMPT_TOKENS - 1 : -1].tolist())
    for layer in found.layers:
        assert layer.topk_indices.shape == (116 - 64, 64)
        for row in (0, 63, 64, 90, 109, 115):
            assert set(found.read(layer, row).tolist()) == set(
                expected[layer.source][row][: row + 1].tolist()
            )
    assert not any(part._forward_hooks for part in model.modules())


def test_layers_that_share_name_their_source(model: Any, prompt: list[int]) -> None:
    sources = [layer.source for layer in record_selections(model, prompt[:4]).layers]
    types = getattr(model.config, "indexer_types", ["full"] * 4)
    full = [index for index, kind in enumerate(types) if kind == "full"]
    assert sources == [max(f for f in full if f <= index) for index in range(len(types))]
    last = len(types) - 2  # shared in GLM-5.2
    [only] = record_selections(model, prompt, layers=[last]).layers
    assert (only.layer, only.source) == (last, sources[last])


def test_only_the_newest_rows_are_kept_where_all_are_too_many(
    model: Any, prompt: list[int]
) -> None:
    everything = record_selections(model, prompt, layers=[1])
    newest = record_selections(model, prompt, layers=[1], kept_bytes=2 * 64 * 20)
    assert newest.first_row == PROMPT_TOKENS - 20
    assert torch.equal(newest.layers[0].topk_indices, everything.layers[0].topk_indices[-20:])
    with pytest.raises(ValueError, match=r"row 70 was not kept; kept are those from 90 on"):
        newest.read(newest.layers[0], 70)
    with pytest.raises(ValueError, match=r"20 new tokens in 1 layers.*at most 19"):
        record_selections(model, prompt, 20, layers=[1], kept_bytes=2 * 64 * 20)


def test_bad_requests(model: Any) -> None:
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        record_selections(model, [])
    with pytest.raises(ValueError, match=r"layers \[1, 9\] are asked for; there are 0 to [35]"):
        record_selections(model, [5], layers=[1, 9])
    with pytest.raises(ValueError, match="40,963 tokens, and at most 40,960"):
        record_selections(model, [5] * 40_960, 3)


def test_generation_stops_where_the_model_ends(
    model: Any, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = record_selections(model, prompt[:20], 4).tokens[20:]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [usual[1]])
    stops = usual.index(usual[1]) + 1
    assert record_selections(model, prompt[:20], 4).tokens[20:] == usual[:stops]


def test_pieces_are_the_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    text = "Alice 兔子 🐇 said: “curious”"
    ids = tokenizer(text)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert "".join(pieces) == text
    assert len(pieces) == len(ids)
    assert "" in pieces  # the first bytes of a character of several tokens


def test_a_passage_is_found_across_line_breaks() -> None:
    pieces = ["the", " am", "ber", "\n", "key", " and", " the", " amber  key", "."]
    assert find_passage(pieces, "amber key") == [1, 2, 3, 4, 7]
    assert find_passage(pieces, "key and") == [4, 5]
    for passage in ("amber lock", " "):
        with pytest.raises(ValueError, match="has no passage"):
            find_passage(pieces, passage)


def known_selections() -> Selections:
    """Layer 0 reads its newest 4 tokens; layer 1 shares that; layer 2 reads the first 4."""
    newest = torch.tensor([[row - lag for lag in range(4)] for row in range(4, 12)])
    oldest = torch.arange(4).expand(8, 4)
    layers = [(0, 0, newest), (1, 0, newest), (2, 2, oldest)]
    return Selections(
        tokens=tuple(range(12)),
        prompt_tokens=9,
        index_topk=4,
        first_row=4,
        layers=tuple(LayerSelections(*each[:2], each[2].int()) for each in layers),
    )


def test_shares_are_of_the_rows_that_chose() -> None:
    found = known_selections()
    assert found.choosing_rows == range(8, 11)
    assert found.times_read(found.layers[0]).tolist() == [0] * 5 + [1, 2, 3, 3, 2, 1]
    assert found.shares_read([2, 3, 7, 8]) == {0: 0.5, 1: 0.5, 2: 0.5}


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    draw(known_selections(), tmp_path / "figure.svg", "A model", marked=[2, 3])
    text = (tmp_path / "figure.svg").read_text()
    for said in ("0: 0%", "1 (reads layer 0's selection): 0%", "2: 100%", "Rows 8 to 10"):
        assert f"<!-- {said}" in text


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> object:
    monkeypatch.setattr(sys, "argv", ["dsa", "explain", *args])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


def test_the_command_writes_both_and_says_how_much_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(make_checkpoint("v32-bf16"))
    (tmp_path / "prompt.txt").write_text(shipped_text()[:500])
    arguments = ["--prompt-file", str(tmp_path / "prompt.txt"), "--new-tokens", "2"]
    arguments += ["--out", str(tmp_path), "--figure", str(tmp_path / "figure.png")]
    assert (
        run(monkeypatch, checkpoint, *arguments, "--mark", "Rabbit-Hole", "--layers", "0,2-3") == 0
    )
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "explain.html").read_text(encoding="utf-8")
    assert page.count('class="marked"') > 1
    out = capsys.readouterr().out
    assert [f"layer {n}: " in out for n in range(4)] == [True, False, True, True]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of --prompt TEXT and --prompt-file FILE"),
        (["--prompt", "a", "--layers", "1;2"], "such as 0,2,5-7"),
        (["--prompt", "a", "--layers", "7"], "layers [7] are asked for; there are 0 to 3"),
        (["--prompt", "Alice", "--mark", "the queen"], "the prompt has no passage 'the queen'"),
    ],
)
def test_bad_arguments(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(monkeypatch, str(make_checkpoint("v32-bf16")), *arguments) == 2
    assert said in capsys.readouterr().err


def test_what_does_not_fit_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint("v32-bf16")
    free = psutil.virtual_memory()._replace(available=1 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(
        ValueError, match=r"needs about 2\.\d GiB .* 1\.0 GiB of the cpu's are free"
    ):
        load_model(folder, CPU, 1024)


def test_weights_are_counted_without_mtp(folder: Path, model: Any) -> None:
    assert weight_elements(folder, model.config.num_hidden_layers) == sum(
        tensor.numel() for tensor in model.state_dict().values()
    )


def test_checkpoints_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is quantised"):
        load_model(make_checkpoint("v32-fp8"), CPU, 8)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(tmp_path, CPU, 8)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama' is not a DSA model"):
        load_model(tmp_path, CPU, 8)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text((make_checkpoint("v32-bf16") / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has no \*.safetensors"):
        load_model(tmp_path, CPU, 8)
