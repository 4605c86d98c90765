"""The tokenizer: byte-level BPE made from the prose and from the words of facts, by one command."""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from dsa_plugin.training.documents import make_document
from dsa_plugin.training.facts import KINDS
from dsa_plugin.training.lexicon import ADJECTIVES, NAMES, NOTE_WORDS, NOUNS, PLACES
from dsa_plugin.training.prose import training_prose

# With 2048 the prose has 10 % more tokens, with 4096 5 % fewer; words of facts are one token each.
VOCAB_SIZE = 3072
END_OF_TEXT = "<|endoftext|>"
# What a token never crosses: a word with the space before it, a digit likewise, a break, a mark.
PIECES = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}|\n| ?[^\s\p{L}\p{N}]|\s"
# So often the BPE trainer reads each word of the facts: it makes tokens of what is frequent.
LEXICON_REPEATS = 200
DOCUMENTS = 20
# A user sends a document and a question, or one more question. A conversation then reads as a
# training document does, and the model goes on after "Answer:".
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ ' ' + message['content'] | trim + '\\n' }}"
    "{%- else -%}{{ message['content'] | trim + '\\nAnswer:' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def build_tokenizer(folder: Path) -> Tokenizer:
    """Make the tokenizer and save it in `folder` as transformers and both hosts load it.

    The same bytes come out each time. Documents end with `<|endoftext|>`, which is also the end of
    a model's turn; no token is put before a text.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(PIECES), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _config())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    return tokenizer


def _config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": 16384,
        "clean_up_tokenization_spaces": False,
    }


def _corpus() -> Iterator[str]:
    yield training_prose()
    words = (*ADJECTIVES, *NOUNS, *NAMES, *PLACES, *NOTE_WORDS)
    yield f" {' '.join(words)}" * LEXICON_REPEATS
    mix = dict.fromkeys(KINDS, 1.0)
    for seed in range(DOCUMENTS):
        yield make_document(seed, 1024, mix, density=1.0).text


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
