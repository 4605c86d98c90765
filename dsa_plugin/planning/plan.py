"""A Plan: everything that is said of one deployment, as plain numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsa_plugin.planning import sizes
from dsa_plugin.planning.cost import (
    MOST_REQUESTS,
    PUBLISHED,
    decode_dollars,
    prefill_dollars,
    published_estimate,
)
from dsa_plugin.planning.deployment import Deployment
from dsa_plugin.planning.gpus import Gpu
from dsa_plugin.planning.measured import MeasuredCase
from dsa_plugin.planning.roofline import (
    Rates,
    StepTime,
    Timed,
    peak_seconds,
    prompt_seconds,
    step_time,
)
from dsa_plugin.planning.weight_kernels import weights_note
from dsa_plugin.planning.work import Batch, Stage, Work, layer_work

CONTEXTS = tuple(2048 * 4**n for n in range(5))
BATCHES = (1, 16)
COSTS = 16  # contexts that costs are computed at, evenly spaced


@dataclass(frozen=True, kw_only=True)
class Model:
    """Parameters of the checkpoint, and its bytes in the weights' dtype, MTP layers included."""

    name: str
    parameters: int
    parameters_with_mtp: int
    active_parameters: float
    checkpoint_bytes: float
    weights_dtype: str
    layers: int
    indexers: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU; `caches` is what remains, and negative where the rest does not fit."""

    usable: float
    weights: float
    absorbed: float
    workspace: float
    activations: float
    caches: float


@dataclass(frozen=True, kw_only=True)
class Caches:
    """Bytes of one token in all layers, and what fits into `Memory.caches`."""

    latent_bytes_per_token: int
    index_bytes_per_token: int
    tokens_per_rank: int
    tokens: int
    requests_per_rank: int
    requests: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How GPUs share the model: as a Deployment has it, and as `dsa plan` takes it."""

    count: int
    tp: int
    dp: int
    ep: int


@dataclass(frozen=True, kw_only=True)
class Decode:
    """One step with so many requests of one context on each attention rank.

    Attributes:
        attention_us: of one layer: indexer, selection and MLA; averaged over the layers.
        step_ms: all layers: the time between a request's tokens.
        tokens_per_second: of all GPUs.
    """

    context: int
    requests_per_rank: int
    attention_us: float
    attention_us_dense: float
    step_ms: float
    step_ms_dense: float
    tokens_per_second: float
    tokens_per_second_dense: float


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """Prompts of one context.

    Attributes:
        attention_us: a token, in one layer, in the prompt's last chunk.
        first_token_seconds: the whole prompt, alone on its attention rank.
    """

    context: int
    attention_us: float
    attention_us_dense: float
    us_per_token: float
    us_per_token_dense: float
    first_token_seconds: float
    first_token_seconds_dense: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Dollars a million tokens at a context; None: not one request fits."""

    context: int
    prefill: float
    prefill_dense: float
    decode: float | None
    decode_dense: float | None


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One op of one layer that has an indexer, in a decode step or a prompt's last chunk.

    Attributes:
        requests: of an attention rank; decode: as many as fit, up to the most that run at once.
        form: which of its kernels, where it has several.
        us: all its calls.
        roofline_fraction: of the GPU's published peaks.
        basis: measured, estimate or roofline.
        measured: the cases that it is from.
    """

    stage: str
    context: int
    requests: int
    op: str
    form: str
    us: float
    roofline_fraction: float
    basis: str
    measured: list[MeasuredCase]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A cost that DeepSeek published, and the roofline's for its machines, load and price."""

    stage: str
    attention: str
    position: int
    dollars: float
    estimate: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `dsa plan` prints.

    Attributes:
        weights_note: what hosts do with weights that the GPU cannot multiply as they are.
        fits_with: GPUs that would do: these, or more of them; None: not with many more either.
        kernels: where the time goes, and what each op's is computed from.
        figures: the sources of times, in words.
    """

    model: Model
    gpu: str
    count: int
    tp: int
    dp: int
    ep: int
    context: int
    kv_dtype: str
    index_dtype: str
    gpu_hour_price: float
    weights_note: str | None
    memory: Memory
    caches: Caches
    fits_with: Layout | None
    decode: list[Decode]
    prefill: list[Prefill]
    cost: list[Cost]
    published: list[Published]
    kernels: list[Kernel]
    figures: list[str]


def make_plan(d: Deployment, rates: Rates, gpu_hour_price: float) -> Plan:
    """Plan a deployment; where nothing fits, `fits_with` is what would."""
    contexts = [*(c for c in CONTEXTS if c < d.context), d.context]
    return Plan(
        model=_model(d),
        gpu=d.gpu.name,
        count=d.count,
        tp=d.tp,
        dp=d.dp,
        ep=d.ep,
        context=d.context,
        kv_dtype=d.kv_dtype,
        index_dtype=d.index_dtype,
        gpu_hour_price=gpu_hour_price,
        weights_note=weights_note(d.gpu, d.weights_dtype),
        memory=_memory(d),
        caches=_caches(d),
        fits_with=_fits_with(d),
        decode=[row for context in contexts for row in _decode(d, rates, context)],
        prefill=[_prefill(d, rates, context) for context in contexts],
        cost=[
            _cost(d, rates, -(-d.context * n // COSTS), gpu_hour_price) for n in range(1, COSTS + 1)
        ],
        published=[
            Published(
                stage=point.stage,
                attention=point.attention,
                position=point.position,
                dollars=point.dollars,
                estimate=published_estimate(point.stage, point.attention, point.position),
            )
            for point in PUBLISHED
        ],
        kernels=[*_kernels(d, rates, "decode"), *_kernels(d, rates, "prefill")],
        figures=rates.describe(),
    )


def _model(d: Deployment) -> Model:
    return Model(
        name=d.model.name,
        parameters=sizes.parameters(d.model, mtp=False),
        parameters_with_mtp=sizes.parameters(d.model, mtp=True),
        active_parameters=sizes.active_parameters(d.model),
        checkpoint_bytes=sizes.weight_bytes(d.model, d.weights_dtype, mtp=True),
        weights_dtype=d.weights_dtype,
        layers=d.model.num_hidden_layers,
        indexers=d.model.num_indexers,
    )


def _memory(d: Deployment) -> Memory:
    return Memory(
        usable=d.usable_bytes,
        weights=d.weight_bytes,
        absorbed=d.absorbed_bytes,
        workspace=d.workspace_bytes,
        activations=d.activation_bytes,
        caches=d.cache_space,
    )


def _caches(d: Deployment) -> Caches:
    latent, index = d.cache_bytes_per_token
    tokens, requests = d.tokens_per_rank(), d.requests_per_rank(d.context)
    return Caches(
        latent_bytes_per_token=latent,
        index_bytes_per_token=index,
        tokens_per_rank=tokens,
        tokens=tokens * d.dp,
        requests_per_rank=requests,
        requests=requests * d.dp,
    )


def _fits_with(d: Deployment) -> Layout | None:
    grown = d.grown_to_fit()
    if grown is None:
        return None
    return Layout(count=grown.count, tp=grown.tp, dp=grown.dp, ep=grown.ep)


def _decode(d: Deployment, rates: Rates, context: int) -> Iterator[Decode]:
    most = min(MOST_REQUESTS, d.requests_per_rank(context))
    for requests in sorted({*(b for b in BATCHES if b < most), most} - {0}):
        batch = Batch("decode", requests, 1, context)
        dsa, dense = _both(d, rates, batch)
        yield Decode(
            context=context,
            requests_per_rank=requests,
            attention_us=dsa.attention_per_layer * 1e6,
            attention_us_dense=dense.attention_per_layer * 1e6,
            step_ms=dsa.total * 1e3,
            step_ms_dense=dense.total * 1e3,
            tokens_per_second=requests * d.dp / dsa.total,
            tokens_per_second_dense=requests * d.dp / dense.total,
        )


def _prefill(d: Deployment, rates: Rates, context: int) -> Prefill:
    queries = min(d.prefill_chunk, context)
    dsa, dense = _both(d, rates, Batch("prefill", 1, queries, context))
    return Prefill(
        context=context,
        attention_us=dsa.attention_per_layer / queries * 1e6,
        attention_us_dense=dense.attention_per_layer / queries * 1e6,
        us_per_token=dsa.total / queries * 1e6,
        us_per_token_dense=dense.total / queries * 1e6,
        first_token_seconds=prompt_seconds(d, rates, context, "dsa"),
        first_token_seconds_dense=prompt_seconds(d, rates, context, "dense"),
    )


def _cost(d: Deployment, rates: Rates, context: int, price: float) -> Cost:
    return Cost(
        context=context,
        prefill=prefill_dollars(d, rates, context, "dsa", price),
        prefill_dense=prefill_dollars(d, rates, context, "dense", price),
        decode=decode_dollars(d, rates, context, "dsa", price),
        decode_dense=decode_dollars(d, rates, context, "dense", price),
    )


def _kernels(d: Deployment, rates: Rates, stage: Stage) -> list[Kernel]:
    requests, queries = 1, min(d.prefill_chunk, d.context)
    if stage == "decode":
        requests, queries = max(1, min(MOST_REQUESTS, d.requests_per_rank(d.context))), 1
    batch = Batch(stage, requests, queries, d.context)
    indexing = [layer for layer, kind in enumerate(d.model.indexer_types) if kind == "full"]
    dense_mlp = indexing[-1] < d.model.first_k_dense_replace
    found: dict[tuple[str, str], list[tuple[Work, Timed]]] = {}
    for work in layer_work(d, batch, "dsa", dense_mlp=dense_mlp, indexer=True):
        found.setdefault((work.op, work.form), []).append((work, rates.time(work)))
    return [
        _kernel(batch, d.gpu, [work for work, _ in timed], [time for _, time in timed])
        for timed in found.values()
    ]


def _kernel(batch: Batch, gpu: Gpu, works: list[Work], times: list[Timed]) -> Kernel:
    seconds = sum(time.seconds for time in times)
    rows = dict.fromkeys(row for time in times for row in time.rows)
    bases = {time.basis for time in times}
    return Kernel(
        stage=batch.stage,
        context=batch.context,
        requests=batch.requests,
        op=works[0].op,
        form=works[0].form,
        us=seconds * 1e6,
        roofline_fraction=sum(work.calls * peak_seconds(gpu, work) for work in works) / seconds,
        basis=bases.pop() if len(bases) == 1 else "estimate",
        measured=[row.measured for row in rows],
    )


def _both(d: Deployment, rates: Rates, batch: Batch) -> tuple[StepTime, StepTime]:
    return step_time(d, rates, batch, "dsa"), step_time(d, rates, batch, "dense")
