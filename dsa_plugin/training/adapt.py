"""Adds an indexer to a checkpoint and trains it on a user's texts: section 2.1.1's two stages."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from dsa_plugin.training.checkpoint import IndexerSizes, load_checkpoint
from dsa_plugin.training.export import copy_files, export
from dsa_plugin.training.lessons import Lesson
from dsa_plugin.training.run import Settings, Stage, run_stage
from dsa_plugin.training.stages import StageName
from dsa_plugin.training.state import (
    STATE_FILE,
    Place,
    load_state,
    restore_model,
)
from dsa_plugin.training.text import TextSource, read_tokens

EXPORTED = "model"
# What a host reads beside weights and config.
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Adaptation:
    """A stage on a checkpoint: what is read, and how long it goes on."""

    stage: StageName
    checkpoint: Path
    data: Sequence[Path]
    lesson: Lesson
    indexer: IndexerSizes = field(default_factory=IndexerSizes)


def adapt(work: Adaptation, settings: Settings) -> Path:
    """Runs the stage, going on where settings.folder's state is; the folder of the new checkpoint.

    Raises:
        ValueError: see load_checkpoint; no tokenizer.json; no indexer where the stage needs one.
    """
    folder = settings.folder
    vocabulary = work.checkpoint / "tokenizer.json"
    loaded = load_checkpoint(work.checkpoint, work.indexer, settings.seed)
    if work.stage == "sparse" and not loaded.has_indexer:
        raise ValueError(
            f"{work.checkpoint} has no indexer to select by: run `dsa train warmup` on it first"
        )
    if not vocabulary.is_file():
        raise ValueError(f"{work.checkpoint} has no tokenizer.json, by which texts become tokens")
    end = loaded.config.get("eos_token_id", 0)
    tokens = read_tokens(
        work.data, Tokenizer.from_file(str(vocabulary)), end[0] if isinstance(end, list) else end
    )
    place, moments = Place(work.stage, 0), dict[str, Tensor]()
    if (folder / STATE_FILE).exists():
        sizes, place, moments = load_state(folder)
        if (place.stage, sizes) != (work.stage, loaded.model.sizes):
            raise ValueError(
                f"{folder} holds a {place.stage} run of {sizes}; give another folder to this "
                f"{work.stage} run of {loaded.model.sizes}"
            )
        restore_model(loaded.model, moments)
    folder.mkdir(parents=True, exist_ok=True)
    loaded.model.to(settings.device)
    stage = Stage(work.stage, (work.lesson,), TextSource(tokens, settings.seed))
    run_stage(loaded.model, stage, settings, place, moments)
    export(loaded.model, loaded.config, folder / EXPORTED)
    copy_files(work.checkpoint, folder / EXPORTED, BESIDE)
    return folder / EXPORTED
