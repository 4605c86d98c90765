"""A Plan as tables for a terminal."""

from __future__ import annotations

import re

from rich import box
from rich.console import Console
from rich.table import Table

from dsa_plugin.planning.cost import BASIS
from dsa_plugin.planning.deployment import GIB
from dsa_plugin.planning.plan import Caches, Plan

Titled = tuple[str, Table]  # rich would wrap a table's own title at the table's width

_SIZES = re.compile(r"\d+K|\d+ rows")  # of a case's name
_ESTIMATE = (
    "Exact: parameters, weights, cache bytes. Estimated: activations, and every time and cost, "
    "which are sums over ops. Not counted: CUDA context and graphs, communication between GPUs, "
    "and what a host does between these ops."
)


def show(plan: Plan) -> None:
    """Print it to standard output."""
    console = Console(highlight=False, markup=False)
    console.print(_headline(plan), soft_wrap=True)
    if plan.weights_note:
        console.print(f"Note: {plan.weights_note}.", soft_wrap=True)
    for title, table in (
        _memory(plan),
        _decode(plan),
        _prefill(plan),
        _cost(plan),
        _published(plan),
        _kernels(plan),
    ):
        console.print(f"\n{title}")
        console.print(table)
    console.print(f"\n{BASIS}.", soft_wrap=True)
    for sentence in plan.figures:
        console.print(f"{sentence}.", soft_wrap=True)
    console.print(_ESTIMATE, soft_wrap=True)


def _headline(plan: Plan) -> str:
    model, caches = plan.model, plan.caches
    what = (
        f"{model.name}: {model.parameters / 1e9:.1f}B parameters "
        f"({model.parameters_with_mtp / 1e9:.1f}B with MTP, {model.active_parameters / 1e9:.1f}B "
        f"active), {model.checkpoint_bytes / 1e9:.1f} GB in {model.weights_dtype}; "
        f"{model.layers} layers, {model.indexers} with an indexer\n"
    )
    where = f"{plan.count} x {plan.gpu} (tp {plan.tp}, dp {plan.dp}, ep {plan.ep})"
    if caches.requests:
        return (
            f"{what}{where}: fits {caches.tokens:,} tokens, {caches.requests} request(s) of "
            f"{plan.context:,} tokens"
        )
    remedy = "another --gpu, or smaller --weights-dtype, --kv-dtype or --context"
    if more := plan.fits_with:
        flags = f"--count {more.count} --tp {more.tp} --dp {more.dp} --ep {more.ep}"
        remedy = f"{flags} would do; or {remedy}"
    return f"{what}{where}: DOES NOT FIT one request of {plan.context:,} tokens; {remedy}"


def _memory(plan: Plan) -> Titled:
    memory, caches = plan.memory, plan.caches
    title = f"Memory of one GPU, GiB ({plan.kv_dtype} latents, {plan.index_dtype} index)"
    table = _table()
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    rows = [
        ("the host may take", memory.usable, ""),
        ("weights", memory.weights, plan.model.weights_dtype),
        ("W_UK, W_UV", memory.absorbed, "bf16, beside kv_b_proj"),
        ("indexer's logits", memory.workspace, "at most: DSA_LOGITS_WORKSPACE_MB"),
        ("activations", memory.activations, "estimate"),
        (
            "caches",
            memory.caches,
            f"{caches.tokens_per_rank:,} tokens of {_token(caches)}",
        ),
    ]
    for name, nbytes, note in rows:
        table.add_row(name, f"{nbytes / GIB:.1f}", note)
    return title, table


def _decode(plan: Plan) -> Titled:
    title = "Decode, DSA | dense MLA (requests: of an attention rank)"
    table = _table()
    _columns(table, "context", "requests", "attention us/layer", "ms/token", "tokens/s, all GPUs")
    for row in plan.decode:
        table.add_row(
            f"{row.context:,}",
            str(row.requests_per_rank),
            _pair(row.attention_us, row.attention_us_dense),
            _pair(row.step_ms, row.step_ms_dense),
            _pair(row.tokens_per_second, row.tokens_per_second_dense),
        )
    return title, table


def _prefill(plan: Plan) -> Titled:
    title = "Prefill, DSA | dense MLA"
    table = _table()
    _columns(table, "context", "attention us/layer, token", "us/token, last chunk", "first token s")
    for row in plan.prefill:
        table.add_row(
            f"{row.context:,}",
            _pair(row.attention_us, row.attention_us_dense),
            _pair(row.us_per_token, row.us_per_token_dense),
            _pair(row.first_token_seconds, row.first_token_seconds_dense),
        )
    return title, table


def _cost(plan: Plan) -> Titled:
    title = f"Dollars a million tokens at {plan.gpu_hour_price:g} a GPU-hour, DSA | dense MLA"
    table = _table()
    _columns(table, "context", "prefill", "decode")
    for row in (plan.cost[n - 1] for n in (1, 2, 4, 8, 16)):
        table.add_row(
            f"{row.context:,}",
            _pair(row.prefill, row.prefill_dense),
            _pair(row.decode, row.decode_dense),
        )
    return title, table


def _published(plan: Plan) -> Titled:
    title = "DeepSeek's published dollars (V3.2, H800 at 2), and the roofline's of them"
    table = _table()
    _columns(table, "stage", "attention", "position", "published", "roofline", "published is")
    for row in plan.published:
        table.add_row(
            row.stage,
            row.attention,
            f"{row.position:,}",
            f"{row.dollars:.3f}",
            f"{row.estimate:.3f}",
            f"{row.dollars / row.estimate:.1f} x",
        )
    return title, table


def _kernels(plan: Plan) -> Titled:
    decode, prefill = (
        next(row for row in plan.kernels if row.stage == stage) for stage in ("decode", "prefill")
    )
    title = f"One layer at {plan.context:,}: {decode.requests} decode(s), a prompt's last chunk"
    table = _table()
    table.add_column()
    table.add_column("us", justify="right")
    table.add_column("of roofline", justify="right")
    table.add_column("by")
    table.add_column("cases")
    for row in plan.kernels:
        if row in (decode, prefill):
            table.add_row(f"{row.stage}:")
        cases = (", ".join(_SIZES.findall(each.case)) or each.case for each in row.measured)
        share = f"{row.roofline_fraction:.1%}"
        table.add_row(f"  {row.op}", _short(row.us), share, row.basis, "; ".join(cases))
    return title, table


def _token(caches: Caches) -> str:
    return f"{caches.latent_bytes_per_token:,} + {caches.index_bytes_per_token:,} bytes"


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False)


def _columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right")


def _pair(*values: float | None) -> str:
    return " | ".join("-" if value is None else _short(value) for value in values)


def _short(value: float) -> str:
    """Three significant digits, without exponents."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
