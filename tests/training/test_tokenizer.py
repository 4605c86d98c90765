"""The tokenizer as it is built, and as the environments of both hosts load it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dsa_plugin.training.documents import make_document
from dsa_plugin.training.exam import make_exam
from dsa_plugin.training.facts import KINDS
from dsa_plugin.training.lexicon import ADJECTIVES, NAMES, NOTE_WORDS, NOUNS, PLACES
from dsa_plugin.training.prose import held_out_prose
from dsa_plugin.training.tokenizer import VOCAB_SIZE, build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SGLANG = Path(os.environ.get("DSA_TEST_SGLANG", ROOT / ".venv/sglang")) / "bin/python"
ALL = dict.fromkeys(KINDS, 1.0)
# Prints how transformers encodes and decodes a text, and how it renders a chat.
LOAD = """
import json, sys
from transformers import PreTrainedTokenizerFast  # AutoTokenizer takes 30 s to import
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
text, chat = json.load(sys.stdin)
ids = tokenizer.encode(text)
json.dump({
    "ids": ids,
    "decoded": tokenizer.decode(ids),
    "chat": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
    "eos": tokenizer.eos_token_id,
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_it_is_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    build_tokenizer(tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_each_word_of_the_facts_is_one_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    words = [*ADJECTIVES, *NOUNS, *NAMES, *PLACES, *NOTE_WORDS]
    assert len(words) == len(set(words))
    assert [word for word in words if len(tokenizer.encode(f" {word}").ids) != 1] == []
    assert len(tokenizer.encode(" 473").ids) == 3
    document = make_document(1, 2048, ALL, density=1.0)
    encoded = tokenizer.encode(document.text)
    starts = {start for start, _ in encoded.offsets}
    for answer in document.answers:
        assert {answer.graded_start, answer.graded_end, answer.end} <= starts
        for a, s, n in answer.copies:
            copied, source = (
                [
                    i
                    for i, (b, e) in zip(encoded.ids, encoded.offsets, strict=True)
                    if x <= b < x + n
                ]
                for x in (a, s)
            )
            assert copied == source


@pytest.mark.parametrize(
    ("tokens", "density", "error"),
    [(128, 1.0, 0.06), (1024, 0.3, 0.04), (4096, 1.0, 0.04), (8192, 0.1, 0.04), (16384, 0.1, 0.04)],
)
def test_lengths_are_as_asked(
    tokenizer: Tokenizer, tokens: int, density: float, error: float
) -> None:
    for seed in range(4):
        texts = [make_document(seed, tokens, ALL, density=density).text]
        if tokens >= 1024:
            texts.append(make_exam(seed, tokens, KINDS, depths=[0.5], density=density).text)
        for text in texts:
            assert len(tokenizer.encode(text).ids) == pytest.approx(tokens, rel=error)


def test_any_text_comes_back(tokenizer: Tokenizer) -> None:
    text = held_out_prose()[:5000] + "  Zoë\tpaid 12 € \n\n(twice) — 'twas <b>…"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("host", ["vllm", "sglang"])
def test_both_hosts_environments_read_it_alike(
    folder: Path, tokenizer: Tokenizer, host: str
) -> None:
    python = Path(sys.executable) if host == "vllm" else SGLANG
    if not python.exists():
        pytest.skip(f"no environment of SGLang at {python}; see CONTRIBUTING.md")
    exam = make_exam(1, 1024, ["single"], depths=[0.2, 0.8])
    first, second = (question.ask.removesuffix("\nAnswer:") for question in exam.questions)
    answer = exam.questions[0].answer
    chat = [
        {"role": "user", "content": exam.text + first},
        {"role": "assistant", "content": answer.strip()},
        {"role": "user", "content": second},
    ]
    done = subprocess.run(
        [python, "-c", LOAD, folder],
        input=json.dumps([exam.text, chat]),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ids"] == tokenizer.encode(exam.text).ids
    assert found["decoded"] == exam.text
    assert found["eos"] == tokenizer.token_to_id("<|endoftext|>") == 0
    rendered = exam.text + exam.questions[0].ask + answer + "\n" + exam.questions[1].ask
    assert found["chat"] == rendered
