"""What each stage moves and by which loss; how a batch and its masks are made."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from dsa_plugin.training.attention import Asked
from dsa_plugin.training.batches import Batch, DocumentSource
from dsa_plugin.training.facts import KINDS
from dsa_plugin.training.initialise import initialise
from dsa_plugin.training.lessons import Lesson, lesson_at
from dsa_plugin.training.losses import copy_loss
from dsa_plugin.training.model import DsaModel
from dsa_plugin.training.sizes import ModelSizes
from dsa_plugin.training.stages import LOSSES, STAGES, StageName, trained_parameters
from dsa_plugin.training.tokenizer import VOCAB_SIZE, build_tokenizer

TOPK = 32
LESSON = Lesson(160, 2, 10, 1e-3, dict.fromkeys(KINDS, 1.0))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return build_tokenizer(folder)


@pytest.fixture(scope="module")
def batch(tokenizer: Tokenizer) -> Batch:
    return DocumentSource(tokenizer, seed=4, reach=4096).batch(LESSON, 0)


@pytest.fixture(scope="module")
def model() -> DsaModel:
    model = DsaModel(ModelSizes(vocab_size=VOCAB_SIZE, num_hidden_layers=2, index_topk=TOPK))
    initialise(model, 0)
    return model


def test_answers_are_where_they_are_said(tokenizer: Tokenizer, batch: Batch) -> None:
    assert batch.answers
    for span in batch.answers:
        ids = batch.tokens[span.row].tolist()
        before = tokenizer.decode(ids[: span.start])
        said = tokenizer.decode(ids[span.start : span.end])
        graded = tokenizer.decode(ids[span.graded_start : span.graded_end])
        assert before.endswith("Answer:")
        assert said.endswith(".\n")
        assert graded in said


def test_copies_are_equal_tokens(batch: Batch) -> None:
    rows, queries, keys = batch.copies.T
    assert len(rows) > 4
    assert torch.equal(batch.tokens[rows, queries + 1], batch.tokens[rows, keys])
    assert bool((keys <= queries).all())


def test_positions_jump_forward_within_reach(tokenizer: Tokenizer) -> None:
    source = DocumentSource(tokenizer, seed=4, reach=4096)
    positions = torch.cat([source.batch(LESSON, step).positions for step in range(8)])
    steps = positions.diff(dim=1)
    assert int(steps.min()) == 1
    assert int(positions.max()) < 4096
    jumped = (steps > 1).any(1)
    assert 2 < int(jumped.sum()) < 14
    still = replace(source, reach=0).batch(LESSON, 0).positions
    assert bool((still == torch.arange(LESSON.tokens)).all())


def test_the_same_step_gives_the_same_batch(tokenizer: Tokenizer, batch: Batch) -> None:
    again = DocumentSource(tokenizer, seed=4, reach=4096).batch(LESSON, 0)
    other = DocumentSource(tokenizer, seed=4, reach=4096).batch(LESSON, 1)
    assert torch.equal(again.tokens, batch.tokens)
    assert torch.equal(again.positions, batch.positions)
    assert not torch.equal(other.tokens, batch.tokens)


def test_it_starts_by_looking_at_what_is_to_be_copied(tokenizer: Tokenizer) -> None:
    """Before any training: even attention has 5 nats, three starts on four batches .75 to 1.47."""
    easy = Lesson(128, 4, 1, 1e-3, {"single": 1.0}, likeness=0.3)
    batch = DocumentSource(tokenizer, seed=1).batch(easy, 0)
    fresh = DsaModel(ModelSizes(vocab_size=VOCAB_SIZE))
    initialise(fresh, 0)
    with torch.no_grad():
        told = fresh(batch.tokens, asked=Asked(copies=batch.copies)).told
    assert float(copy_loss(told)) < 2.0


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_its_own(model: DsaModel, batch: Batch, stage: StageName) -> None:
    """Gradients reach all that a stage trains and nothing else."""
    trained = trained_parameters(model, stage)
    model.zero_grad()
    loss, _ = LOSSES[stage](model, batch, torch.Generator().manual_seed(0))
    loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    indexer = {name for name in moved if ".indexer." in name}
    assert bool(indexer) == (stage != "pretrain") == bool(trained.indexer)
    assert bool(moved - indexer) == (stage != "warmup") == bool(trained.model)


def test_language_teaches_the_indexer_nothing(model: DsaModel, batch: Batch) -> None:
    """And KL teaches nothing but the indexer: each in the sum of the sparse stage by itself."""
    trained_parameters(model, "sparse")
    rows = torch.arange(100, 160)
    out = model(batch.tokens, batch.positions, sparse=True, asked=Asked(rows=rows))
    kl = torch.stack([told.fit.kl for told in out.told if told.fit is not None]).sum()
    for loss, wants_indexer in ((out.hidden.square().mean(), False), (kl, True)):
        model.zero_grad()
        loss.backward(retain_graph=True)
        moved = [name for name, p in model.named_parameters() if p.grad is not None]
        assert moved
        assert all((".indexer." in name) == wants_indexer for name in moved)


def test_selection_is_the_top_k_of_what_came_before(model: DsaModel) -> None:
    """In chunks as at once; each query selects index_topk keys, or all there are."""
    attention = model.attentions()[0]
    x = torch.randn(1, 1100, model.sizes.hidden_size)
    latent = torch.randn(1, 1100, model.sizes.q_lora_rank)
    rope = (torch.ones(1, 1100, 32), torch.zeros(1, 1100, 32))
    mask = attention.indexer.selected(x, latent, rope)
    counts = mask.sum(-1)[0]
    assert torch.equal(counts, (torch.arange(1100) + 1).clamp(max=TOPK))
    assert not bool(mask.triu(1).any())
    with torch.no_grad():
        scores = attention.indexer.scores(x, latent, rope, attention.indexer.keys(x, rope))
    row = 1050
    best = scores[0, row, : row + 1].topk(TOPK).indices
    assert set(best.tolist()) == set(mask[0, row].nonzero()[:, 0].tolist())


def test_kl_and_recall(model: DsaModel) -> None:
    """By their definitions, in fp64, at one query."""
    attention, row = model.attentions()[1], 150
    x = torch.randn(1, 160, model.sizes.hidden_size)
    rope = (torch.ones(1, 160, 32), torch.zeros(1, 160, 32))
    with torch.no_grad():
        _, told = attention(x, rope, False, Asked(rows=torch.tensor([row])))
        latent = attention.q_a_layernorm(attention.q_a_proj(x))
        q, k, _ = attention._heads(x, latent, rope)
        scores = attention.indexer.scores(x, latent, rope, attention.indexer.keys(x, rope))
    logits = torch.stack([q[0, h, row] @ k[0, h, : row + 1].T for h in range(4)])
    heads = (logits.double() * attention.scale).softmax(-1).sum(0)
    target, guess = heads / heads.sum(), scores[0, row, : row + 1].double().softmax(-1)
    fit = told.fit
    assert fit is not None
    torch.testing.assert_close(
        fit.kl.double(), (target * (target / guess).log()).sum(), rtol=1e-4, atol=1e-4
    )
    recall = target[scores[0, row, : row + 1].topk(TOPK).indices].sum()
    torch.testing.assert_close(fit.recall.double(), recall, rtol=1e-4, atol=1e-4)


def test_rates_and_lessons() -> None:
    first, second = Lesson(8, 1, 10, 1.0), Lesson(16, 1, 5, 1.0, warm_up=1)
    assert [round(first.rate(step), 1) for step in (0, 4, 7, 8, 9)] == [0.1, 0.5, 0.8, 0.9, 0.5]
    assert lesson_at((first, second), 9) == (first, 9)
    assert lesson_at((first, second), 12) == (second, 2)
    with pytest.raises(ValueError, match="ends"):
        lesson_at((first, second), 15)
