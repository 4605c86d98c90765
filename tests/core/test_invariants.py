"""DSA_CHECK: silent over batches as hosts make them, and each planted fault is found and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dsa_kernels.cache_write.api as cache_write
import dsa_kernels.indexer_logits.api as indexer_logits
import dsa_kernels.invariants.api as checks
import dsa_kernels.sparse_mla.api as sparse_mla
import dsa_kernels.topk_select.api as topk_select
from dsa_kernels.invariants import entries
from dsa_kernels.launch import Launch
from dsa_kernels.topk_select.reference import topk_slots
from dsa_plugin import attention
from dsa_plugin.attention import invariants, ops, sparse
from dsa_plugin.attention.metadata import DSAMetadata
from dsa_plugin.attention.violation import Record
from dsa_testbed.checked_host import BLOCKS, HEADS, TOPK, V_HEAD_DIM, Host
from dsa_testbed.kernel_runs import DEVICE, KERNEL, unless_interpreted
from dsa_testbed.mutations import MUTATIONS

FORWARD = import_module("dsa_plugin.attention.forward")  # the package has a function of that name
PLANTED = "layer under test, request b "


@pytest.fixture(params=["reference", KERNEL])
def record(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    """Of checks by their specification or by their kernels; all else is torch's.

    Interpreted, a row takes a kernel a tenth of a second: passes of many rows, which fill the
    caches, are then checked by the specification, which leaves the same behind.
    """
    by_kernels, kernels = request.param == "kernel", set[str]()
    most_rows = unless_interpreted(1 << 20, 4) if by_kernels else 0
    run, forward = Launch.run, attention.forward

    def recorded(launch: Launch) -> None:
        kernels.add(launch.kernel.__name__)
        run(launch)

    def by_rows(
        layer: Any, projections: Any, metadata: DSAMetadata, *args: Any, **kwargs: Any
    ) -> None:
        few = metadata.num_tokens <= most_rows
        monkeypatch.setattr(checks, "use_triton", lambda _device: few)
        forward(layer, projections, metadata, *args, **kwargs)

    for api in (cache_write, indexer_logits, sparse_mla, topk_select):
        monkeypatch.setattr(api, "use_triton", lambda _device: False)
    monkeypatch.setattr(Launch, "run", recorded)
    monkeypatch.setattr(attention, "forward", by_rows)
    with torch.device(DEVICE if by_kernels else "cpu"):
        yield use_record(monkeypatch, at_once=True)
    assert kernels == ({"_mark_rows", "_check_rows", "_keep_first"} if by_kernels else set())


def use_record(monkeypatch: pytest.MonkeyPatch, *, at_once: bool) -> Record:
    monkeypatch.setenv("DSA_CHECK", "1")
    one = Record(torch.get_default_device(), at_once=at_once)
    monkeypatch.setattr(invariants, "record_of", lambda _device: one)
    return one


@pytest.fixture(autouse=True)
def compile_nothing() -> Iterator[None]:
    """Of the indexer's form for CPUs, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.uint8], ids=["fp32", "fp8"])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("padding", [(), (-1, -1), (0, 0)], ids=["none", "vLLM's", "SGLang's"])
def test_a_sound_host_gives_no_alarm(
    monkeypatch: pytest.MonkeyPatch,
    cache_dtype: torch.dtype,
    block_size: int,
    padding: tuple[int, ...],
) -> None:
    """Chunks, decodes, drafts that are taken back, and pages that change hands."""
    record = use_record(monkeypatch, at_once=True)
    host = Host(record, cache_dtype, block_size, query_len=3, padding=padding)
    host.prefill(40, 5)
    host.prefill(30, 50)
    host.decode(4)
    host.lens = [length - 2 for length in host.lens]
    host.decode(3)
    host.end(0)
    host.prefill(90, 1)
    host.decode(3)


@pytest.mark.parametrize(
    ("cache_dtype", "padding"), [(torch.float32, (0, 0)), (torch.uint8, (-1, -1))]
)
def test_few_rows_of_a_sound_host_give_no_alarm(
    record: Record, cache_dtype: torch.dtype, padding: tuple[int, ...]
) -> None:
    host = Host(record, cache_dtype, padding=padding)
    host.prefill(40, 15)
    host.decode(2)
    host.end(0)
    host.prefill(1, 2)
    host.decode()


def test_a_shared_prefix_gives_no_alarm(record: Record) -> None:
    host = Host(record)
    host.prefill(48, 5)
    host.end(1)
    host.lens[1], host.pages[1] = 32, host.pages[0][:2]
    host.prefill(1, 20)
    host.decode(5)


def test_tensors_that_a_host_writes_anew_give_no_alarm(record: Record) -> None:
    host = Host(record)
    host.prefill(40, 18)
    batch, positions = host.metadata([1, 1], decode=True)
    for _ in range(3):
        host.run(batch, positions)
        for tensor in (positions, batch.context_lens, batch.slot_mapping):
            tensor += 1


def test_off_costs_nothing_and_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    record = use_record(monkeypatch, at_once=True)
    monkeypatch.setenv("DSA_CHECK", "0")
    assert attention.layer_check("under test", written_by_us_alone=True) is None
    assert attention.pass_record(torch.device("cpu")) is None
    host = Host(record)
    monkeypatch.setattr(ops, "index_cache_write", lambda *_args, **_kwargs: None)
    host.prefill(8, 8)


def of_row(row: int, change: Callable[[Tensor], None]) -> Callable[[Any], Any]:
    """A wrapper of a selecting op that changes one row of what it selected, counted from the end.

    So that it is one of request b's.
    """

    def wrap(function: Any) -> Any:
        def changed(*args: Any, out: Tensor, **kwargs: Any) -> Any:
            result = function(*args, out=out, **kwargs)
            change(out[-row])
            return result

        return changed

    return wrap


def other_slots(function: Any) -> Any:
    def changed(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        slots = result[1] if isinstance(result, tuple) else result
        slots[-1, 3] += 16
        return result

    return changed


def copy_second_to_first(row: Tensor) -> None:
    row[0] = row[1]


def reverse(row: Tensor) -> None:
    row.copy_(row.flip(0))


def beyond(row: Tensor) -> None:
    row[-1] = 300


def hole(row: Tensor) -> None:
    row[4] = -1


SELECTIONS = {
    "twice": (copy_second_to_first, r"position \d+ of its selection does not come after"),
    "not sorted": (reverse, r"position \d+ of its selection does not come after"),
    "beyond": (beyond, r"position 300 of its selection is none that it sees"),
    "too few": (hole, r"its selection has 15 tokens, and has to have 16"),
}


@pytest.mark.parametrize(("change", "said"), SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("op", ["topk_select", "topk_select_slots"])
def test_a_wrong_selection(
    record: Record,
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    change: Callable[[Tensor], None],
    said: str,
) -> None:
    host = Host(record)
    host.prefill(40, 50)
    monkeypatch.setattr(ops, op, of_row(1, change)(getattr(ops, op)))
    with pytest.raises(RuntimeError, match=PLANTED + rf"\(row 1 .*position 5[01]: {said}"):
        host.prefill(0, 2) if op == "topk_select" else host.decode()


@pytest.mark.parametrize("op", ["topk_slots", "topk_select_slots"])
def test_slots_outside_of_the_request(
    record: Record, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    host = Host(record)
    host.prefill(40, 50)
    monkeypatch.setattr("dsa_plugin.attention.sparse.masked_is_faster", lambda *_, **__: False)
    monkeypatch.setattr(ops, op, other_slots(getattr(ops, op)))
    with pytest.raises(RuntimeError, match=PLANTED + r".*which it selected, was looked for in"):
        host.prefill(0, 2) if op == "topk_slots" else host.decode()


@pytest.mark.parametrize(
    "name", ["topk_minus_one", "index_key_not_written_short_prompt", "stale_index_page"]
)
def test_faults_of_the_power_tests(
    record: Record, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    host = Host(record)
    host.prefill(0, 62)
    for target, wrap in MUTATIONS[name].items():
        module, colon, attribute = target.rpartition(":")
        owner = import_module(module if colon else "dsa_plugin.attention.ops")
        monkeypatch.setattr(owner, attribute, wrap(getattr(owner, attribute)))
    said = "15 tokens, and has to have 16" if name == "topk_minus_one" else "index key was not"
    with pytest.raises(RuntimeError, match=said):
        host.prefill(0, 2)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.uint8], ids=["fp32", "fp8"])
@pytest.mark.parametrize(("op", "what"), [("latent", "latent"), ("index", "index key")])
def test_a_write_that_writes_nothing(
    record: Record,
    monkeypatch: pytest.MonkeyPatch,
    cache_dtype: torch.dtype,
    op: str,
    what: str,
) -> None:
    host = Host(record, cache_dtype)
    host.prefill(0, 20)
    monkeypatch.setattr(ops, f"{op}_cache_write", lambda *_args, **_kwargs: None)
    said = rf"token row 0, position 20: its {what} was not written to slot \d+"
    with pytest.raises(RuntimeError, match=PLANTED + ".*" + said):
        host.prefill(0, 1)


def nan_latent(projections: attention.Projections) -> None:
    projections.kv[-1, 100] = torch.nan


def nan_key(projections: attention.Projections) -> None:
    assert projections.index is not None
    projections.index.k[-1, 100] = torch.nan


def nan_query(projections: attention.Projections) -> None:
    assert projections.index is not None
    projections.index.q[-1, 1, 100] = torch.nan


def nan_attention_query(projections: attention.Projections) -> None:
    projections.q[-1, 1, 10] = torch.nan


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.uint8], ids=["fp32", "fp8"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (nan_latent, r"its latent was written to slot \d+ as NaN"),
        (nan_key, r"its index key was written to slot \d+ as NaN"),
        (nan_query, "its index query is NaN"),
        (nan_attention_query, "its attention gave NaN"),
    ],
)
def test_nan_in_what_a_pass_brings(
    record: Record,
    cache_dtype: torch.dtype,
    spoil: Callable[[attention.Projections], None],
    said: str,
) -> None:
    host = Host(record, cache_dtype)
    host.prefill(20, 30)
    host.spoil = spoil
    with pytest.raises(RuntimeError, match=PLANTED + rf".*token row 1, position 30: {said}"):
        host.decode()


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.uint8], ids=["fp32", "fp8"])
@pytest.mark.parametrize(
    ("cache", "said"),
    [("latent_cache", "its attention gave NaN"), ("key_cache", "cached index key of position 7 ")],
)
def test_nan_in_what_is_read(
    record: Record, cache_dtype: torch.dtype, cache: str, said: str
) -> None:
    """Within as many passes as the request has pages."""
    host = Host(record, cache_dtype)
    host.prefill(40, 12)
    owner = host.layer if cache == "latent_cache" else host.indexer
    entries.fill(
        getattr(owner, cache),
        torch.tensor([host.pages[1][0]]),
        torch.tensor([7]),
        torch.tensor([True]),
    )
    with pytest.raises(RuntimeError, match=PLANTED + rf".*{said}"):
        host.decode(2)


def test_pages_that_changed_places(record: Record) -> None:
    host = Host(record)
    host.prefill(40, 70)
    pages = host.pages[1]
    pages[0], pages[2] = pages[2], pages[0]
    said = r"position (\d+) of its request lies in a slot that was last written for position \d+"
    with pytest.raises(RuntimeError, match=PLANTED + rf".*{said}"):
        host.decode(2)


@pytest.mark.parametrize("page", [5, 0, BLOCKS, -1], ids=["new", "kept free", "none", "negative"])
def test_a_page_that_nobody_wrote(record: Record, page: int) -> None:
    host = Host(record)
    host.prefill(40, 20)
    host.pages[1][0] = host.free[0] if page == 5 else page
    said = "was last written for position -1|looked for in slot"
    with pytest.raises(RuntimeError, match=PLANTED + f".*({said})"):
        host.decode(2)


def test_a_row_that_goes_elsewhere(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(record)
    host.prefill(40, 12)
    metadata = host.metadata

    def shifted(*args: Any, **kwargs: Any) -> tuple[DSAMetadata, Tensor]:
        batch, positions = metadata(*args, **kwargs)
        batch.slot_mapping[-1] += 1
        return batch, positions

    monkeypatch.setattr(host, "metadata", shifted)
    with pytest.raises(RuntimeError, match=PLANTED + r".*it goes to slot \d+ and sees 13 tokens"):
        host.decode()


def test_a_shared_selection_that_is_not_one(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(record)
    host.prefill(40, 50)
    attend = sparse.attend

    def lost(*args: Any) -> None:
        attend(*args)
        indices: Tensor = args[3]
        indices[-1] = 100

    monkeypatch.setattr(FORWARD, "attend", lost)
    said = r"layer sharing, request b .*position (50|100) of its selection"
    with pytest.raises(RuntimeError, match=said):
        host.decode()


def test_what_a_connector_loads_is_not_stale(record: Record) -> None:
    """It writes pages that we have not; what is checked of them is that there are such pages."""
    host = Host(record, written_by_us_alone=False)
    host.prefill(40, 40)
    pages = host.pages[1]
    for owner in (host.layer.latent_cache, host.sharing.latent_cache, host.indexer.key_cache):
        owner[host.free[0]] = owner[pages[0]]
    pages[0] = host.free.pop(0)
    host.decode(3)
    pages[1] = BLOCKS
    with pytest.raises(RuntimeError, match=PLANTED):
        host.decode(3)


def test_read_once_a_pass_the_first_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: no pass waits, and later violations do not replace the first."""
    record = use_record(monkeypatch, at_once=False)
    host = Host(record)
    host.prefill(20, 30)
    host.spoil = nan_query
    host.decode()
    host.spoil = nan_latent
    with pytest.raises(RuntimeError, match=PLANTED + r".*position 30: its index query is NaN"):
        host.decode(2)


class Watched(TorchDispatchMode):
    """Notes what torch launches; refuses what waits for the device or has a shape of its values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
    VIEWS = ("view", "detach", "slice", "select", "expand", "unsqueeze", "as_strided", "split")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launched: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, f"{func} cannot be captured"
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert all(index is None or index.dtype != torch.bool for index in indices)
        if name not in self.VIEWS:
            self.launched.append(name)
        return func(*args, **(kwargs or {}))


def launched(host: Host, check: attention.LayerCheck | None, metadata: DSAMetadata) -> list[str]:
    """What torch launches for the checks of a layer's decode of two requests."""
    indices = torch.arange(TOPK, dtype=torch.int32).expand(2, -1)
    slots = topk_slots(indices, metadata.block_table, metadata.request_ids, 16)
    query, positions = (torch.randn(2, 4, 128), torch.randn(2, 4)), metadata.context_lens - 1
    out = torch.randn(2, HEADS, V_HEAD_DIM)
    assert check is not None
    watched = Watched()
    with watched:
        of_pass = check.begin(host.layer.latent_cache, host.indexer.key_cache, metadata, positions)
        of_pass.selected(query)
        of_pass.used(indices, slice(0, 2), slots)
        of_pass.attended(out)
    return watched.launched


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.uint8], ids=["fp32", "fp8"])
def test_checks_can_be_captured(monkeypatch: pytest.MonkeyPatch, cache_dtype: torch.dtype) -> None:
    """In a CUDA graph; and torch's are not many launches, of which a pass's layers share some."""
    record = use_record(monkeypatch, at_once=False)
    host = Host(record, cache_dtype)
    host.prefill(40, 50)
    other = attention.layer_check("other", written_by_us_alone=True)
    metadata, _ = host.metadata([1, 1], decode=True)
    first, second = (len(launched(host, check, metadata)) for check in (host.layer.check, other))
    print(f"{cache_dtype}: {first - second} launches a pass, {second} a layer")
    assert first < 220
    assert second < 180


@pytest.mark.triton
def test_kernels_are_three_launches_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a decode; torch allocates what they write, and launches nothing."""
    kernels: list[str] = []
    record = use_record(monkeypatch, at_once=False)
    monkeypatch.setattr(checks, "use_triton", lambda _device: False)
    with torch.device(DEVICE):
        host = Host(record, torch.uint8)
        host.metadata([30, 20], decode=False)
        metadata, _ = host.metadata([1, 1], decode=True)
        launched(host, host.layer.check, metadata)
        monkeypatch.setattr(checks, "use_triton", lambda _device: True)
        monkeypatch.setattr(Launch, "run", lambda launch: kernels.append(launch.kernel.__name__))
        metadata, _ = host.metadata([1, 1], decode=True)
        assert set(launched(host, host.layer.check, metadata)) == {"empty"}
    assert kernels == ["_mark_rows", "_check_rows", "_keep_first"]
