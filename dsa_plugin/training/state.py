"""A training run on disk: one safetensors file from which it goes on bit for bit.

The file holds the weights, the optimizer's moments, and as JSON in its header the place in the
recipe. It is replaced in one step of the file system: a run killed at any moment has a whole one.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsa_plugin.training.model import DsaModel
from dsa_plugin.training.sizes import ModelSizes

STATE_FILE = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Place:
    """Where a run stands: `step` steps of stage `stage` are done. Batches follow from these."""

    stage: str
    step: int
    seconds: float = 0.0


def write_atomically(path: Path, write: Any) -> None:
    """Calls write(temporary path) and puts the result in `path`'s place once it is on the disk."""
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_state(
    folder: Path, model: DsaModel, optimizer: torch.optim.Optimizer | None, place: Place
) -> None:
    """Writes the run's state into `folder`, over an earlier one."""
    tensors: dict[str, Tensor] = {
        f"model.{name}": p.detach() for name, p in model.named_parameters()
    }
    if optimizer is not None:
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        for parameter, moments in optimizer.state.items():
            for moment in MOMENTS:
                tensors[f"{moment}.{names[parameter]}"] = moments[moment]
    header = {"place": json.dumps(asdict(place)), "sizes": json.dumps(model.sizes.to_json())}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / STATE_FILE,
        lambda path: save_file({k: v.contiguous() for k, v in tensors.items()}, path, header),
    )


def load_state(folder: Path) -> tuple[ModelSizes, Place, dict[str, Tensor]]:
    """Sizes, place and tensors of a run's state."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {STATE_FILE}; start a run there before resuming it")
    with safe_open(path, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return (
        ModelSizes(**json.loads(header["sizes"])),
        Place(**json.loads(header["place"])),
        tensors,
    )


@torch.no_grad()
def restore_model(model: DsaModel, tensors: dict[str, Tensor]) -> None:
    """Copies a state's weights into a model; a head that the state lacks is tied."""
    if "model.lm_head.weight" not in tensors:
        model.lm_head.weight = model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"model.{name}"])


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: DsaModel, tensors: dict[str, Tensor]
) -> None:
    """Gives an optimizer the moments that a state has for its parameters."""
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            if f"step.{name}" in tensors:
                optimizer.state[parameter] = {
                    moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS
                }
