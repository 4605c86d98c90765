"""A whole recipe in one file: sizes, seeds, and the lessons of all three stages."""

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from dsa_plugin.training.batches import DocumentSource
from dsa_plugin.training.export import export_demo
from dsa_plugin.training.initialise import initialise
from dsa_plugin.training.lessons import Lesson
from dsa_plugin.training.model import DsaModel
from dsa_plugin.training.run import Settings, Stage, run_stage
from dsa_plugin.training.sizes import ModelSizes
from dsa_plugin.training.stages import STAGES, StageName
from dsa_plugin.training.state import STATE_FILE, Place, load_state, restore_model, save_state
from dsa_plugin.training.tokenizer import build_tokenizer

RECIPE_FILE = "recipe.json"
HELD_OUT_SEED = 1000


@dataclass(frozen=True)
class Recipe:
    """What a model is made from; the same recipe, versions and device give the same model."""

    seed: int
    sizes: dict[str, Any]
    reach: int
    stages: dict[StageName, tuple[Lesson, ...]]


def demo_recipe() -> Path:
    """The recipe of the demo model."""
    return Path(str(files("dsa_plugin.training") / "demo_recipe.json"))


def read_recipe(path: Path) -> Recipe:
    """A recipe from its JSON."""
    content = json.loads(path.read_text("utf-8"))
    unknown = sorted(set(content["stages"]) - set(STAGES))
    if unknown:
        raise ValueError(f"{path} has stages {unknown}; there are {', '.join(STAGES)}")
    return Recipe(
        seed=content["seed"],
        sizes=content["sizes"],
        reach=content["reach"],
        stages={
            stage: tuple(Lesson(**lesson) for lesson in content["stages"][stage])
            for stage in STAGES
            if stage in content["stages"]
        },
    )


def run_recipe(path: Path, settings: Settings) -> DsaModel:
    """Trains a model by the recipe at `path`, or goes on where settings.folder's state is.

    After each stage a checkpoint is exported into the folder of that name.
    """
    recipe, folder = read_recipe(path), settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(folder)
    record = {"recipe": json.loads(path.read_text("utf-8")), "made_with": versions()}
    (folder / RECIPE_FILE).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    sizes = ModelSizes(vocab_size=tokenizer.get_vocab_size(), **recipe.sizes)
    model = DsaModel(sizes)
    tensors: dict[str, torch.Tensor] = {}
    if (folder / STATE_FILE).exists():
        saved, place, tensors = load_state(folder)
        if saved != sizes:
            raise ValueError(f"{folder} holds a model of {saved}; the recipe is of {sizes}")
        restore_model(model, tensors)
    else:
        initialise(model, recipe.seed)
        place = Place(next(iter(recipe.stages)), 0)
    model.to(settings.device)
    for stage in _stages_from(recipe, tokenizer, place.stage):
        if stage.name != place.stage:
            place, tensors = replace(place, stage=stage.name, step=0), {}
            save_state(folder, model, None, place)
        place = run_stage(model, stage, replace(settings, seed=recipe.seed), place, tensors)
        export_demo(model, folder, folder / stage.name)
    return model


def _stages_from(recipe: Recipe, tokenizer: Tokenizer, first: str) -> Iterator[Stage]:
    names = list(recipe.stages)
    for name in names[names.index(first) :]:  # type: ignore[arg-type]
        yield Stage(
            name,
            recipe.stages[name],
            # Each stage reads texts of its own.
            DocumentSource(tokenizer, recipe.seed * 8 + STAGES.index(name), recipe.reach),
            DocumentSource(tokenizer, HELD_OUT_SEED, held_out=True),
        )


def versions() -> dict[str, str]:
    """Of all that a run's numbers depend on."""
    packages = ("dsa-plugin", "torch", "safetensors", "tokenizers")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "threads": str(torch.get_num_threads()),
    }
