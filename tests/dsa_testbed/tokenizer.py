"""A small byte-level BPE tokenizer, trained on the shipped text. No host or model is imported."""

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT_PATH = Path(__file__).parent / "data" / "alice.txt"
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>")


def shipped_text() -> str:
    """Alice's Adventures in Wonderland; data/README.md says where it comes from."""
    return TEXT_PATH.read_text(encoding="utf-8")


@cache
def train(vocab_size: int) -> Tokenizer:
    """The same text and size always give the same merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([shipped_text()], trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}: "
            "use a smaller vocabulary"
        )
    return tokenizer


def encode(text: str, vocab_size: int) -> list[int]:
    """Token ids of a text, without special tokens."""
    return train(vocab_size).encode(text, add_special_tokens=False).ids


def save(directory: Path, vocab_size: int, model_max_length: int) -> None:
    """tokenizer.json and tokenizer_config.json."""
    train(vocab_size).save(str(directory / "tokenizer.json"))
    begin, end, pad = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "pad_token": pad,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
