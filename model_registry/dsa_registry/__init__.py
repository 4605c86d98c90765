"""Which model wants which variant of DSA. Standard library only.

One file a model in `models/`: the file's name is the Hugging Face `model_type`, it exports `ENTRY`.
`reader.py` reads and checks a config.json.
"""

from importlib import import_module
from pkgutil import iter_modules

from dsa_registry import models
from dsa_registry.schema import Checkpoint, IndexerType, ModelEntry, resolve_indexer_types

__all__ = [
    "Checkpoint",
    "IndexerType",
    "ModelEntry",
    "all_entries",
    "lookup",
    "lookup_architecture",
    "resolve_indexer_types",
    "why_not",
]

_OTHERS = {
    "glm5_next": "GLM-5.3-Flash is not served by this plugin: it scores pools of keys instead of "
    "keys, has layers of linear attention (KDA) between its sparse ones, and reads images. It "
    "needs an indexer, caches and a model of its own, which its host may have. GLM-5.3 itself is "
    "served",
    "deepseek_v4": "DeepSeek-V4 is not served by this plugin: it attends to compressed keys, by "
    "another ratio in each layer. It needs caches and a model of its own, which its host may have",
}
# What their names on the Hub begin with.
_OTHER_RELEASES = {"glm-5.3-flash": "glm5_next", "deepseek-v4": "deepseek_v4"}


def why_not(name: str) -> str | None:
    """Why a model that is taken for a DSA model is not served, and what it would need.

    Args:
        name: its model_type, or its name on the Hugging Face Hub. None is returned for any other.
    """
    if name in _OTHERS:
        return _OTHERS[name]
    release = name.rpartition("/")[2].lower()
    found = (kind for prefix, kind in _OTHER_RELEASES.items() if release.startswith(prefix))
    return _OTHERS.get(next(found, ""))


def all_entries() -> tuple[ModelEntry, ...]:
    """Every known model, ordered by model_type."""
    return tuple(lookup(name) for name in _model_types())


def lookup(model_type: str) -> ModelEntry:
    """The entry of a Hugging Face `model_type`.

    Raises:
        ValueError: no such model; names the known ones, or says what this one would need.
    """
    if why := why_not(model_type):
        raise ValueError(why)
    if model_type not in _model_types():
        raise ValueError(
            f"model_type {model_type!r} is not a DSA model that this plugin knows; known: "
            f"{', '.join(_model_types())}. A new model is one file in dsa_registry/models/."
        )
    entry: ModelEntry = import_module(f"dsa_registry.models.{model_type}").ENTRY
    return entry


def lookup_architecture(architecture: str) -> ModelEntry:
    """The entry of a model by its class name in config.json's `architectures`.

    Raises:
        ValueError: no model has it, or several do. Hosts give the MTP layers of every DSA model one
            class name and overwrite the draft's model_type, so a draft is looked up by the
            model_type of its target.
    """
    found = [e for e in all_entries() if architecture in (*e.architectures, *e.mtp_architectures)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"architecture {architecture!r} is shared by {', '.join(e.model_type for e in found)}; "
            "look the model up by the model_type of its target: lookup(model_type)"
        )
    known = ", ".join(name for e in all_entries() for name in e.architectures)
    raise ValueError(
        f"architecture {architecture!r} is not a DSA model that this plugin knows; known: {known}"
    )


def _model_types() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in iter_modules(models.__path__)))
