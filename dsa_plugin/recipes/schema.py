"""Recipe: one deployment, as a YAML file says it; recipe.schema.json is the same for editors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from packaging.requirements import Requirement
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dsa_plugin.planning.gpus import find_gpu

HostName = Literal["vllm", "sglang"]
Weights = Literal["fp8", "bf16", "w4a16", "fp32"]
Flag = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]+$")]
FlagValue = Literal[True] | int | float | str | dict[str, Any]
# An env file is read by shells and by docker, which quote differently: nothing to quote.
EnvName = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]
EnvValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:/=|+-]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Hardware(_Strict):
    """Where it runs."""

    gpu: str = Field(description="A name that `dsa plan --gpu` knows, or cpu.")
    count: int = Field(ge=1, description="GPUs of one node; for cpu, 1.")
    nodes: int = Field(default=1, ge=1, description="Machines of the deployment.")

    @field_validator("gpu")
    @classmethod
    def _is_known(cls, value: str) -> str:
        return value if value == "cpu" else find_gpu(value).name


class Needs(_Strict):
    """What `dsa plan` says of it; `ci/recipes` writes these."""

    weights_gb_per_gpu: float = Field(description="GB (1e9 bytes) of weights on each GPU.")
    kv_gb_per_gpu: float = Field(description="GB left to the caches of latents and index keys.")
    max_context: int = Field(description="Tokens of the longest request.")
    concurrency: int = Field(description="Requests of that length that fit at once, over all GPUs.")


class Figure(_Strict):
    """Something measured, by whom, and on what."""

    what: str
    value: float
    unit: str
    source: str = Field(pattern=r"^https://", description="Where it was published.")
    by: str = Field(description="Versions and settings, and how they differ from this recipe.")


class Recipe(_Strict):
    """One deployment of one model by one host on one kind of hardware."""

    model: str = Field(description="Hugging Face id, or a folder.")
    quantised_from: str | None = Field(
        default=None, description="The release that the checkpoint was made from by somebody else."
    )
    weights: Weights = Field(description="Precision of the weights in that checkpoint.")
    host: str = Field(description="The host and its versions, e.g. vllm>=0.32,<0.34.")
    hardware: Hardware
    image: str | None = Field(
        description="The host's image, to which the plugin is added; null where there is none."
    )
    env: dict[EnvName, EnvValue] = Field(default={}, description="Environment variables.")
    args: dict[Flag, FlagValue] = Field(
        description="The host's own long flags without dashes; true is a flag without a value."
    )
    needs: Needs | None = Field(
        default=None, description="Sizes, computed; null where there is no GPU to size for."
    )
    expected: Literal["unmeasured"] | list[Figure] = Field(description="Measured figures.")
    notes: str = Field(description="What to know before and when it does not work.")

    @field_validator("host")
    @classmethod
    def _names_a_host(cls, value: str) -> str:
        requirement = Requirement(value)
        if requirement.name not in get_args(HostName) or not requirement.specifier:
            raise ValueError(f"{value!r}: give vllm or sglang and a version range")
        return value

    @field_validator("args", mode="before")
    @classmethod
    def _no_flag_is_false(cls, value: Any) -> Any:
        for flag in (f for f, v in value.items() if v is False) if isinstance(value, dict) else ():
            raise ValueError(f"{flag} is false: leave it out, or use the host's no-{flag}: true")
        return value

    @property
    def host_name(self) -> HostName:
        name: HostName = Requirement(self.host).name  # type: ignore[assignment]  # validated
        return name

    @property
    def gpus(self) -> int:
        return self.hardware.count * self.hardware.nodes


def json_schema() -> str:
    """The JSON Schema of recipes, for editors: recipe.schema.json, which `ci/recipes` writes."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"


def parse_recipe(data: Any, where: str) -> Recipe:
    """A recipe from what a YAML file holds.

    Raises:
        ValueError: every fault at once, each with its key; an unknown key with the nearest known.
    """
    if not isinstance(data, Mapping):
        holds = "nothing" if data is None else f"a {type(data).__name__}"
        raise ValueError(
            f"{where} holds {holds}, and a recipe is a mapping of keys; start from a copy of the "
            "nearest, of those that `dsa recipe list` names"
        )
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        faults = "\n- ".join(_describe(fault) for fault in error.errors())
        raise ValueError(f"{where} is not a recipe:\n- {faults}") from None


def _describe(fault: Any) -> str:
    *parents, key = fault["loc"]
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = list(_model_at(parents).model_fields)
        near = get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
        return f"{path}: no such key; did you mean {near}? Known: {', '.join(known)}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{path}: {message}; given: {fault['input']!r}"


def _model_at(path: list[Any]) -> type[BaseModel]:
    """The model whose keys lie at a path of the recipe."""
    inner: dict[str, type[BaseModel]] = {
        "hardware": Hardware,
        "needs": Needs,
        "expected": Figure,
    }
    return inner[path[0]] if path else Recipe
