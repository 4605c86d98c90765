"""`dsa plan`: will it fit, how fast may it be, what may it cost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsa_plugin.planning.deployment import VLLM_MEMORY
from dsa_plugin.planning.model import WeightsDtype
from dsa_plugin.planning.sizes import CacheDtype

if TYPE_CHECKING:
    from dsa_plugin.planning.gpus import Gpu
    from dsa_plugin.planning.measured import MeasuredKernels

# Of a clone; an installed package has none.
_MEASURED = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def plan(
    model: Annotated[
        str,
        typer.Argument(help="Folder, repository on the Hugging Face Hub, or registered release."),
    ],
    gpu: Annotated[str, typer.Option(help="Kind of GPU, such as h200; a wrong one lists all.")],
    count: Annotated[int, typer.Option(help="GPUs, over all machines.")],
    tp: Annotated[
        int | None, typer.Option(help="GPUs that share an attention rank: count / dp.")
    ] = None,
    dp: Annotated[int, typer.Option(help="Attention ranks, each with requests of its own.")] = 1,
    ep: Annotated[
        int | None,
        typer.Option(help="GPUs that hold different experts: count if --dp > 1, else 1."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of the longest request.")] = 131_072,
    kv_dtype: Annotated[
        CacheDtype, typer.Option(help="Of cached latents; bf16 is what a host's auto means.")
    ] = "bf16",
    index_dtype: Annotated[CacheDtype, typer.Option(help="Of cached index keys.")] = "fp8",
    weights_dtype: Annotated[
        WeightsDtype | None, typer.Option(help="Of the weights: the checkpoint's own.")
    ] = None,
    mtp: Annotated[bool, typer.Option(help="Load the MTP layers too.")] = False,
    memory_utilization: Annotated[
        float, typer.Option(help="Share of a GPU's memory that the host takes.")
    ] = VLLM_MEMORY,
    prefill_chunk: Annotated[
        int, typer.Option(help="Tokens of a prompt that are computed at once.")
    ] = 8192,
    gpu_hour_price: Annotated[float, typer.Option(help="Dollars a GPU-hour.")] = 2.0,
    kernels: Annotated[
        Path | None,
        typer.Option(
            help="Results that benchmarks/kernels.py wrote on such a GPU.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the costs into this PNG.")] = None,
) -> None:
    """Size, time and cost of serving MODEL, from its config.json alone.

    Exact: parameters, weight and cache bytes. Estimated: activations, and all times, from kernels
    that were measured on an H100, or by the roofline, without communication or overhead.

    Exits with 1 where not one request of --context fits.
    """
    from dsa_plugin.cli.model_config import find_model
    from dsa_plugin.planning.deployment import Deployment
    from dsa_plugin.planning.gpus import find_gpu
    from dsa_plugin.planning.plan import make_plan
    from dsa_plugin.planning.roofline import Rates

    kind, shape = find_gpu(gpu), find_model(model)
    weights = weights_dtype or shape.weights_dtype
    if weights is None:
        raise ValueError(
            f"the quantization_config of {model} is none that can be sized; say which is nearest: "
            "--weights-dtype fp8, bf16, w8a16 or w4a16"
        )
    if gpu_hour_price <= 0:
        raise ValueError(f"--gpu-hour-price is {gpu_hour_price}; allowed: above 0")
    deployment = Deployment(
        model=shape,
        gpu=kind,
        count=count,
        tp=tp if tp is not None else max(1, count // max(1, dp)),
        dp=dp,
        ep=ep if ep is not None else (count if dp > 1 else 1),
        context=context,
        kv_dtype=kv_dtype,
        index_dtype=index_dtype,
        weights_dtype=weights,
        mtp=mtp,
        memory_utilization=memory_utilization,
        prefill_chunk=prefill_chunk,
    )
    result = make_plan(deployment, Rates(kind, _figures(kind, kernels)), gpu_hour_price)
    if plot is not None:
        from dsa_plugin.cli.plan_figure import draw

        draw(result, plot)
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=1))
    else:
        from dsa_plugin.cli.plan_tables import show

        show(result)
    if not result.caches.requests:
        raise typer.Exit(1)


def _figures(gpu: Gpu, path: Path | None) -> tuple[MeasuredKernels, ...]:
    """Measured kernels: `path`, or the repository's that are of that GPU; then the shipped.

    Raises:
        ValueError: `path` was measured on another.
    """
    from dsa_plugin.planning.measured import SHIPPED, MeasuredKernels

    shipped = MeasuredKernels.load(SHIPPED)
    if path is None:
        files = [file for file in sorted(_MEASURED.glob("*.json")) if MeasuredKernels.are_in(file)]
        every = map(MeasuredKernels.load, files)
        return *(each for each in every if each.fits(gpu)), shipped
    measured = MeasuredKernels.load(path)
    if measured.fits(gpu):
        return measured, shipped
    raise ValueError(
        f"{path} was measured on {measured.device}, not on {gpu.name} ({gpu.device}); leave "
        "--kernels out, or name the --gpu that it is of"
    )
