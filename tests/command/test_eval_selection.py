"""Each variant of `dsa eval` changes in transformers what it says, and nothing once it is over."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from torch import Tensor

from dsa_plugin.evaluation import selection
from dsa_plugin.evaluation.selection import PAGE, StaleKeys
from dsa_plugin.evaluation.transformers_model import TransformersModel
from dsa_plugin.evaluation.variants import VARIANTS, find_variants
from dsa_plugin.in_transformers.cached_sequence import CachedSequence
from dsa_testbed.cache_entries import hadamard_truth
from dsa_testbed.checkpoint import make_checkpoint

TOKENS = 400
K = 64
CONTEXT = 512
MODULE = "transformers.models.deepseek_v32.modeling_deepseek_v32"
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 0,
}
Forward = tuple[Tensor, list[Tensor]]
"""Logits of the last token, and the selection of each indexer, [T, k]."""


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return make_checkpoint("v32", **SMALL)


@pytest.fixture(scope="module")
def v32(checkpoint: Path) -> TransformersModel:
    return TransformersModel(checkpoint, "float32", CONTEXT)


@pytest.fixture(scope="module")
def glm52() -> TransformersModel:
    return TransformersModel(make_checkpoint("glm52"), "float32", CONTEXT)


@pytest.fixture(scope="module")
def plain(v32: TransformersModel) -> Forward:
    return forward(v32, "dsa")


def prompt() -> Tensor:
    return torch.randint(3, 2048, (1, TOKENS), generator=torch.Generator().manual_seed(0))


@contextmanager
def recorded(model: Any) -> Iterator[list[Tensor]]:
    """Selections of the indexers as they are made."""
    made: list[Tensor] = []
    indexers = [layer.self_attn.indexer for layer in model.model.layers]
    hooks = [
        indexer.register_forward_hook(lambda *call: made.append(call[2][0]))
        for indexer in indexers
        if indexer is not None
    ]
    yield made
    for hook in hooks:
        hook.remove()


@torch.inference_mode()
def forward(model: TransformersModel, variant: str) -> Forward:
    with model.under(VARIANTS[variant]), recorded(model.model) as made:
        for layer in model.model.model.layers:
            layer.self_attn.expand_kv.length = 0
        logits = model.model(prompt(), use_cache=True).logits[0, -1]
    return logits, made


def sets(selected: Tensor) -> list[set[int]]:
    """What each row selects among the tokens that it sees."""
    rows = selected.tolist()
    return [{at for at in row if at <= position} for position, row in enumerate(rows)]


def test_the_model_itself_is_transformers(checkpoint: Path, plain: Forward) -> None:
    untouched = transformers.DeepseekV32ForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode(), recorded(untouched) as made:
        logits = untouched(prompt()).logits[0, -1]
    assert torch.equal(logits, plain[0])
    assert all(map(torch.equal, made, plain[1]))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "shared_selection_lost"])
def test_a_variant_changes_the_answer_and_is_undone(
    variant: str, v32: TransformersModel, plain: Forward
) -> None:
    changed, _ = forward(v32, variant)
    assert torch.equal(changed, plain[0]) == (variant == "dsa")
    again, made = forward(v32, "dsa")
    assert torch.equal(again, plain[0])
    assert all(map(torch.equal, made, plain[1]))


def test_dense_selects_everything(v32: TransformersModel, checkpoint: Path) -> None:
    logits, made = forward(v32, "dense")
    every = [set(range(row + 1)) for row in range(TOKENS)]
    assert [sets(selected) for selected in made] == [every] * 2
    wide = transformers.DeepseekV32ForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", index_topk=CONTEXT
    )
    with torch.inference_mode():
        assert torch.allclose(wide(prompt()).logits[0, -1], logits, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "k"), [("topk_half", 32), ("topk_quarter", 16), ("topk_minus_one", 63)]
)
def test_fewer_are_the_best_of_more(
    variant: str, k: int, v32: TransformersModel, plain: Forward
) -> None:
    """In the first layer, whose input is the same. transformers sorts what it selects."""
    _, made = forward(v32, variant)
    assert [selected.shape[1] for selected in made] == [k, k]
    assert sets(made[0]) == sets(plain[1][0][:, :k])


def test_a_window_is_the_last_tokens(v32: TransformersModel) -> None:
    _, made = forward(v32, "window")
    expected = [set(range(max(0, row + 1 - K), row + 1)) for row in range(TOKENS)]
    assert [sets(selected) for selected in made] == [expected] * 2


def test_random_tokens_are_as_many_visible_ones(v32: TransformersModel) -> None:
    _, (first, second) = forward(v32, "random")
    for selected in (first, second):
        assert [len(row) for row in sets(selected)] == [min(row + 1, K) for row in range(TOKENS)]
        assert (selected <= torch.arange(TOKENS)[:, None]).all()
    assert not torch.equal(first, second)
    assert torch.equal(forward(v32, "random")[1][0], first)
    part = selection.random_tokens(torch.arange(300, TOKENS), K, seed=0)
    assert torch.equal(part.int(), first[300:])
    # All are as likely: the standard error of the mean of these 12,800 shares is below 0.003.
    rows = torch.arange(TOKENS, 600)
    shares = selection.random_tokens(rows, K, seed=1) / rows[:, None]
    assert abs(shares.mean() - 0.5) < 0.01


def test_the_other_rope_style_is_the_other_familys(v32: TransformersModel) -> None:
    logits, made = forward(v32, "indexer_rope_style")
    with patch(f"{MODULE}.apply_rotary_pos_emb", _interleaved):
        expected, selected = forward(v32, "dsa")
    assert torch.allclose(logits, expected, atol=1e-5)
    assert sets(made[0]) == sets(selected[0])


def _interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> Any:
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as module

    return module.apply_rotary_pos_emb_interleave(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


def test_glms_other_rope_style_is_v32s(glm52: TransformersModel) -> None:
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as halves
    from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as module

    rotate = module.apply_rotary_pos_emb_interleave

    def by_halves(*args: Any, **kwargs: Any) -> Any:
        # Attention itself does not name the dimension of heads.
        return (halves.apply_rotary_pos_emb if kwargs else rotate)(*args, **kwargs)

    _, made = forward(glm52, "indexer_rope_style")
    with patch.object(module, "apply_rotary_pos_emb_interleave", by_halves):
        _, selected = forward(glm52, "dsa")
    assert sets(made[0]) == sets(selected[0])


@torch.inference_mode()
def stored_keys(model: TransformersModel, variant: str) -> Tensor:
    """The first indexer's keys in the cache, [T, 128]."""
    with model.under(VARIANTS[variant]):
        for layer in model.model.model.layers:
            layer.self_attn.expand_kv.length = 0
        keys: Tensor = model.model(prompt(), use_cache=True).past_key_values.layers[0].indexer_keys
    return keys[0]


def test_keys_alone_are_rotated_by_hadamards_matrix(v32: TransformersModel) -> None:
    keys, rotated = (stored_keys(v32, name) for name in ("dsa", "hadamard_one_side"))
    matrix = hadamard_truth().float()
    assert torch.allclose(rotated, keys @ matrix, atol=1e-4)
    assert torch.allclose(matrix @ matrix.T, torch.eye(128), atol=1e-5)


def test_each_fourth_page_is_the_one_before() -> None:
    class Cache:
        def update_indexer(self, keys: Tensor, _layer: int) -> Tensor:
            return keys

    keys = torch.arange(9.0 * PAGE).view(1, -1, 1)
    pages = StaleKeys(Cache()).update_indexer(keys, 0).view(9, PAGE)
    expected = keys.view(9, PAGE)[[0, 1, 2, 2, 4, 5, 6, 6, 8]]
    assert torch.equal(pages, expected)


def test_shared_layers_lose_their_selection(glm52: TransformersModel) -> None:
    kept, made = forward(glm52, "dsa")
    lost, others = forward(glm52, "shared_selection_lost")
    assert not torch.equal(kept, lost)
    # Three layers with an indexer, two that share the third's selection, and one more indexer.
    assert [torch.equal(*pair) for pair in zip(made, others, strict=True)] == [True] * 3 + [False]
    with patch.object(selection, "random_tokens", lambda *_args, **_kwargs: made[2]):
        same, _ = forward(glm52, "shared_selection_lost")
    assert torch.equal(kept, same)


def test_a_model_that_shares_nothing_loses_nothing(v32: TransformersModel) -> None:
    with (
        pytest.raises(ValueError, match="each layer of this model selects for itself"),
        v32.under(VARIANTS["shared_selection_lost"]),
    ):
        pass


def test_a_question_does_not_see_the_ones_before(v32: TransformersModel) -> None:
    text = "the queen " * 60
    asks = ["said", "said the hatter", "was"]
    together = v32.complete(text, asks, 8, "\n")
    alone = [v32.complete(text, [ask], 8, "\n")[0] for ask in asks]
    assert together == alone
    assert len(set(together)) == 3


def test_log_probabilities_do_not_depend_on_chunks(v32: TransformersModel) -> None:
    text = "the queen of hearts said that she would have his head. " * 12
    whole = v32.token_logprobs(text)
    with patch(f"{CachedSequence.__module__}._MAX_ROWS", 7):
        parts = v32.token_logprobs(text)
    assert len(whole) == len(v32.tokenizer(text)["input_ids"]) - 1
    assert torch.allclose(torch.tensor(whole), torch.tensor(parts), atol=1e-4)


def test_a_request_longer_than_the_context_is_refused(v32: TransformersModel) -> None:
    with pytest.raises(ValueError, match="choose smaller --lengths"):
        v32.complete("word " * 600, ["?"], 8, "\n")


def test_unknown_variants_are_named() -> None:
    with pytest.raises(ValueError, match="no variant windows; known: dense, dsa"):
        find_variants(["dsa", "windows"])
    with pytest.raises(ValueError, match="selects nothing"):
        VARIANTS["topk_quarter"].index_topk(3, 100)
