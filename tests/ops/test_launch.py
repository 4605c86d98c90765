"""Launches as values: tables are complete, grids legal, and what ci/compile reads is what runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import chain, product
from pathlib import Path

import pytest
import torch
import triton

import dsa_kernels
from dsa_kernels import tuning
from dsa_kernels.arch import ARCHS, Arch
from dsa_kernels.launch import Launch, launch_config
from dsa_kernels.tuning import Changes, ChangesByTriton
from dsa_kernels.tuning.base import BASE

ROOT = Path(__file__).resolve().parents[2]

KERNELS = sorted(
    f"{path.parent.name}.{path.stem}"
    for path in Path(dsa_kernels.__file__).parent.glob("*/*kernel.py")
)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ARCHS.values(), ids=list(ARCHS))
def test_every_chip_has_every_configuration(kernel: str, arch: Arch) -> None:
    cases = list(import_module(f"dsa_kernels.{kernel}").compile_cases(arch))
    assert cases
    names = [name for name, _ in cases]
    assert len(set(names)) == len(names)
    for _, launch in cases:
        given = {**launch.arguments, **launch.config.blocks}
        assert set(given) == set(launch.kernel.arg_names)
        assert all(0 < size < 2**31 for size in launch.grid[:1])
        assert all(0 < size < 2**16 for size in launch.grid[1:])


def changes_of(arch: Arch) -> Changes:
    changes: Changes = import_module(f"dsa_kernels.tuning.{arch.name}").CHANGES
    return changes


def changes_by_triton(arch: Arch) -> ChangesByTriton:
    return getattr(import_module(f"dsa_kernels.tuning.{arch.name}"), "BY_TRITON", {})


@pytest.fixture
def triton_version(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A function that makes launch_config see another version of Triton."""

    def pretend(version: str) -> None:
        monkeypatch.setattr(triton, "__version__", version)
        launch_config.cache_clear()

    yield pretend
    launch_config.cache_clear()


def test_every_module_of_tuning_is_a_chip_or_the_base() -> None:
    modules = {path.stem for path in Path(tuning.__file__).parent.glob("*.py")}
    assert modules == {"__init__", "base", *ARCHS}


@pytest.mark.parametrize("arch", ARCHS.values(), ids=list(ARCHS))
def test_a_chip_launches_its_own_configuration_or_the_base(
    arch: Arch, triton_version: Callable[[str], None]
) -> None:
    triton_version("0.0.1")
    changes = changes_of(arch)
    assert set(changes) <= set(BASE)
    for op, table in BASE.items():
        own = changes.get(op, {})
        assert set(own) <= set(table), "a change of what the base lacks"
        for key, (config, _) in own.items():
            assert config != table[key], f"{op} {key}: a change that changes nothing"
            assert launch_config(op, arch, key) is config
        for key in set(table) - set(own):
            assert launch_config(op, arch, key) is table[key]


def test_a_version_of_triton_has_configurations_of_its_own(
    triton_version: Callable[[str], None],
) -> None:
    found = 0
    for arch in ARCHS.values():
        for version, changes in changes_by_triton(arch).items():
            for op, own in changes.items():
                for key, (config, source) in own.items():
                    assert source.triton.startswith(f"{version}.")
                    triton_version("0.0.1")
                    assert launch_config(op, arch, key) != config, "a change that changes nothing"
                    triton_version(f"{version}.9+other")
                    assert launch_config(op, arch, key) is config
                    assert launch_config(op, arch, key, "0.0.1") != config
                    triton_version("0.0.1")
                    assert launch_config(op, arch, key, f"{version}.0") is config
                    found += 1
    assert found


@pytest.mark.parametrize("arch", ARCHS.values(), ids=list(ARCHS))
def test_a_change_names_data_that_show_it(arch: Arch) -> None:
    tables = [changes_of(arch), *changes_by_triton(arch).values()]
    for own in chain.from_iterable(table.values() for table in tables):
        for _, source in own.values():
            assert not source.inferred or source.gpu
            data = (ROOT / source.data).read_text(encoding="utf-8")
            assert bool(source.gpu) == bool(source.triton)
            assert source.gpu in data
            assert source.triton in data


def test_compile_cases_need_every_configuration() -> None:
    launch_config.cache_clear()
    for kernel in KERNELS:
        list(import_module(f"dsa_kernels.{kernel}").compile_cases(ARCHS["sm80"]))
    assert launch_config.cache_info().currsize == sum(len(table) for table in BASE.values())


def sparse_mla_launches(
    rows: int, heads: int, k: int, arch: Arch, fp8: bool = False
) -> list[Launch]:
    from dsa_kernels.sparse_mla import kernel

    width, cache_dtype = (656, torch.uint8) if fp8 else (576, torch.bfloat16)
    with torch.device("meta"):
        return kernel.launches(
            torch.empty(rows, heads, 576, dtype=torch.bfloat16),
            torch.empty(9, 64, width, dtype=cache_dtype),
            torch.empty(rows, k, dtype=torch.int64),
            None,
            1.0,
            torch.empty(rows, heads, 512, dtype=torch.bfloat16),
            torch.empty(rows, heads),
            arch,
        )


@pytest.mark.parametrize("arch", ARCHS.values(), ids=list(ARCHS))
def test_sparse_mla_fills_a_chip_with_few_rows(arch: Arch) -> None:
    """Few rows are split over most of the chip, many not at all; no part is without a tile."""
    for heads, k in product((16, 128), (1, 100, 2048)):
        for rows in (1, 3, 8, 70, 70_000):
            attend, *merge = sparse_mla_launches(rows, heads, k, arch)
            programs, parts = attend.grid
            tiles = -(-k // attend.config.blocks["BLOCK_K"])
            assert parts <= 64
            assert (parts - 1) * -(-tiles // parts) < tiles
            assert parts == 1 or rows < 70_000
            if tiles >= 32 and rows <= 8:
                assert 2 * programs * parts > min(arch.num_sms, 32 * programs)
            assert bool(merge) == (parts > 1)
            for launch in merge:
                assert launch.arguments["splits"] == parts
                assert launch.grid[0] == rows * heads


def test_few_rows_of_many_heads_take_smaller_blocks_of_them(
    triton_version: Callable[[str], None],
) -> None:
    """Those whose blocks of 64 heads could not fill half a chip, over a cache that is no fp8."""
    triton_version("3.6.0")
    found = {
        (rows, heads, fp8): sparse_mla_launches(rows, heads, 2048, ARCHS["sm90"], fp8)[0]
        for rows, heads, fp8 in product((1, 2, 3, 32, 1024), (64, 128), (False, True))
    }
    small = {case for case, launch in found.items() if launch.config.blocks["BLOCK_H"] == 32}
    assert small == {(1, 64, False), (2, 64, False), (1, 128, False)}
    for case in small:
        programs, parts = found[case].grid
        assert ARCHS["sm90"].num_sms // 2 < 2 * programs * parts
    (attend,) = sparse_mla_launches(1, 128, 64, ARCHS["sm90"])
    assert attend.grid == (4, 1)


def test_parts_of_sparse_mla_take_least_time() -> None:
    """By a count of each program's tiles, on a chip where ten run at once."""
    from dsa_kernels.sparse_mla.kernel import _splits

    assert [_splits(1, tiles, 10) for tiles in (0, 1, 2, 5, 8, 20)] == [1, 1, 1, 5, 8, 10]
    assert [_splits(programs, 40, 10) for programs in (2, 3, 5, 6, 9, 10)] == [5, 3, 2, 3, 1, 1]


def test_sparse_mla_of_nothing_launches_nothing() -> None:
    assert sparse_mla_launches(0, 16, 2048, ARCHS["sm90"]) == []
    assert sparse_mla_launches(2, 0, 2048, ARCHS["sm90"]) == []


@pytest.mark.parametrize("arch", ARCHS.values(), ids=list(ARCHS))
def test_only_the_first_axis_grows_with_the_rows(arch: Arch) -> None:
    """The others end at 65,535, which Triton's interpreter does not know."""
    from dsa_kernels.cache_write import Norm, Rope
    from dsa_kernels.cache_write import kernel as cache_write
    from dsa_kernels.indexer_logits import gather_kernel as gather_keys
    from dsa_kernels.indexer_logits import kernel as indexer
    from dsa_kernels.invariants import LayerMemory, Rows, Used
    from dsa_kernels.invariants import kernel as invariants
    from dsa_kernels.sparse_mla import gather_kernel as gather_latents
    from dsa_kernels.sparse_mla import masked_kernel
    from dsa_kernels.topk_select import kernel as topk
    from dsa_kernels.topk_select import slots_kernel as topk_slots

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = 1_000_000
    ids, slots = meta(rows, dtype=torch.int32), meta(rows, dtype=torch.int64)
    indices, table = meta(rows, 2048, dtype=torch.int32), meta(rows, 2560, dtype=torch.int32)
    logits, weights = (meta(rows, n, dtype=torch.float32) for n in (160_000, 64))
    latents, keys = meta(9, 64, 576), meta(9, 64, 128)
    q, k, index_q = meta(rows, 128, 192), meta(128, 8192, 192), meta(rows, 64, 128)
    rms, layer = Norm(meta(512), 1e-6), Norm(meta(128), 1e-6, meta(128))
    rope = Rope(meta(4096, 64), interleaved=True)
    pages = topk_slots.Pages(table, ids, 64, meta(rows, 2048, dtype=torch.int64))
    checked = Rows(ids, slots, ids, slots, table, 64, 9)
    memory = LayerMemory(latents, keys, meta(10, 64, dtype=torch.int32), ours_alone=True)
    used = Used(slice(0, rows), indices, pages.slots, True, (index_q, weights))
    record = slots[:1], slots[:1], slots[:8]
    launches = {
        "latents": cache_write.launches(
            [cache_write.latent_job(meta(rows, 576), rms, rope, slots, latents, slots)], arch
        ),
        "index keys": cache_write.launches(
            [cache_write.key_job(meta(rows, 128), layer, rope, slots, keys, slots, True, arch)],
            arch,
        ),
        "queries": cache_write.launches(
            [cache_write.query_job(index_q, rope, slots, index_q, arch, hadamard=True)], arch
        ),
        "scores": indexer.launches(
            index_q, weights, meta(160_000, 128), ids, ids, None, logits, arch
        ),
        "paged scores": indexer.paged_launches(
            index_q[:, None], weights[:, None], keys, table, ids[:, None], logits, arch
        ),
        "gathered keys": gather_keys.launches(keys, table[0], meta(rows, 128), None, arch),
        "selection": topk.launches(logits, 2048, None, ids, indices, arch, pages),
        "slots": topk_slots.launches(indices, table, ids, 64, pages.slots, arch),
        "attention": sparse_mla_launches(rows, 128, 2048, arch),
        "masked attention": masked_kernel.launches(
            q, k, k[..., :128], indices, 1.0, q[..., :128], arch
        ),
        "marks": invariants.mark_launches(checked, memory, pages.slots, arch),
        "checks": invariants.launches(checked, memory, used, pages.slots, arch),
        "first finding": invariants.keep_launches(checked, pages.slots, q, record, arch),
        "gathered latents": gather_latents.launches(latents, table[0], meta(rows, 576), arch),
    }
    for name, of_op in launches.items():
        assert of_op, name
        for launch in of_op:
            assert all(size < 2**16 for size in launch.grid[1:]), name
            assert launch.grid[0] < 2**31, name
