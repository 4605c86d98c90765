"""Which device gets which form, where the masked one is faster, and what a chip can do."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from dsa_kernels import dispatch
from dsa_kernels.arch import ARCHS, INTERPRETED, arch_of
from dsa_kernels.prefill_forms import selected_keys
from dsa_kernels.sparse_mla import decoding_first_is_faster, masked_is_faster
from dsa_plugin.env import Kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Both answers are cached for the life of a process."""
    dispatch.use_triton.cache_clear()
    arch_of.cache_clear()
    yield
    dispatch.use_triton.cache_clear()
    arch_of.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """cuda:0 has the compute capability, or is the gfx chip, of the test's parameter."""
    chip: Any = request.param
    fake = SimpleNamespace(name="a GPU", multi_processor_count=7)
    if isinstance(chip, str):
        fake.gcnArchName = chip
        monkeypatch.setattr(torch.version, "hip", "7.2")
    else:
        fake.major, fake.minor = chip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: fake)


def choose(monkeypatch: pytest.MonkeyPatch, device: torch.device, **environ: str) -> bool:
    for name in ("DSA_KERNELS", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return dispatch.use_triton(device)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"DSA_KERNELS": "auto"}, False),
        ({"DSA_KERNELS": "torch"}, False),
        ({"TRITON_INTERPRET": "1"}, True),
        ({"TRITON_INTERPRET": "1", "DSA_KERNELS": "triton"}, True),
        ({"TRITON_INTERPRET": "1", "DSA_KERNELS": "torch"}, False),
    ],
)
def test_cpu(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected: bool) -> None:
    assert choose(monkeypatch, CPU, **environ) is expected


@pytest.mark.parametrize("gpu", [(9, 0)], indirect=True)
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("mode", "expected"), [("auto", True), ("triton", True), ("torch", False)])
def test_gpu(monkeypatch: pytest.MonkeyPatch, mode: str, expected: bool) -> None:
    assert choose(monkeypatch, GPU, DSA_KERNELS=mode) is expected


@pytest.mark.parametrize("gpu", [(7, 5)], indirect=True)
@pytest.mark.usefixtures("gpu")
def test_gpu_without_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose(monkeypatch, GPU) is False
    assert "no Triton kernel for a GPU (sm75)" in caplog.text
    dispatch.use_triton.cache_clear()
    with pytest.raises(ValueError, match=r"=triton: no Triton kernel.*DSA_KERNELS=torch"):
        choose(monkeypatch, GPU, DSA_KERNELS="triton")


def test_triton_on_a_cpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"device cpu.*TRITON_INTERPRET=1"):
        choose(monkeypatch, CPU, DSA_KERNELS="triton")


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        choose(monkeypatch, CPU, DSA_KERNELS="triton", TRITON_INTERPRET="1")


def test_unknown_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="DSA_KERNELS='cuda'; allowed: auto, triton, torch"):
        choose(monkeypatch, CPU, DSA_KERNELS="cuda")


def test_the_plugin_allows_the_same_modes() -> None:
    assert get_args(Kernels) == dispatch.MODES


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ((8, 0), "sm80"),
        ((8, 7), "sm86"),
        ((8, 9), "sm89"),
        ((9, 0), "sm90"),
        ((10, 3), "sm100"),
        ((12, 1), "sm120"),
        ("gfx942:sramecc+:xnack-", "gfx942"),
        ("gfx950", "gfx950"),
    ],
    indirect=["gpu"],
)
@pytest.mark.usefixtures("gpu")
def test_arch(name: str) -> None:
    arch = arch_of(GPU)
    assert arch.name == name
    assert arch.num_sms == 7
    assert arch.smem_bytes == ARCHS[name].smem_bytes


@pytest.mark.parametrize("gpu", [(7, 5), (11, 0), (13, 0), "gfx90a", "gfx1100"], indirect=True)
@pytest.mark.usefixtures("gpu")
def test_unknown_chips_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"(sm75|sm110|sm130|gfx90a|gfx1100)\).*sm80, sm86"):
        arch_of(GPU)


def test_the_interpreter_stands_for_a_stated_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert arch_of(CPU) is INTERPRETED


def test_masked_where_it_is_faster_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not choose(monkeypatch, CPU)
    on_cpu = partial(
        masked_is_faster,
        CPU,
        topk=2048,
        heads=16,
        width=192,
        v_width=128,
    )
    assert on_cpu(rows=2048, keys=6000)
    assert not on_cpu(rows=2048, keys=16384)
    assert not on_cpu(rows=8, keys=4096), "expanding costs too much"


@pytest.mark.parametrize("device", [CPU, GPU], ids=["interpreted", "gpu"])
def test_masked_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """By an H100's times of both forms, once it outweighs the launches."""
    if device == CPU:
        assert choose(monkeypatch, CPU, TRITON_INTERPRET="1")
    v32 = partial(masked_is_faster, device, topk=2048, width=192, v_width=128)
    assert v32(rows=4096, keys=4096, heads=128)
    assert v32(rows=4096, keys=11_000, heads=128)
    assert not v32(rows=4096, keys=11_500, heads=128)
    assert v32(rows=8192, keys=13_000, heads=128), "the average row sees fewer keys"
    assert v32(rows=4096, keys=15_000, heads=16), "gathering takes longer than its products"
    assert not v32(rows=4096, keys=15_500, heads=16)
    assert not v32(rows=60, keys=2048, heads=128), "expanding costs too much"
    assert not v32(rows=300, keys=300, heads=16), "launching costs too much"
    glm = partial(masked_is_faster, device, topk=2048, width=256, v_width=256)
    assert glm(rows=4096, keys=7500, heads=64)
    assert not glm(rows=4096, keys=8000, heads=64), "its heads are wider"


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 9), (3, 8), (4, 11), (5, 5), (12, 12)])
def test_what_causal_rows_select(rows: int, keys: int) -> None:
    expected = sum(min(8, seen) for seen in range(keys - rows + 1, keys + 1))
    assert selected_keys(rows, keys, 8) == expected


def test_a_cpu_decodes_nothing_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not choose(monkeypatch, CPU)
    fp8 = torch.empty(1, 64, 656, dtype=torch.uint8)
    assert not decoding_first_is_faster(fp8, 512, 32_768, 2048)


def test_decoded_first_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows that select 2048 as pay for the keys; never of a float cache."""
    assert choose(monkeypatch, CPU, TRITON_INTERPRET="1")
    fp8, bf16 = torch.empty(1, 64, 656, dtype=torch.uint8), torch.empty(1, 64, 576).bfloat16()
    assert not decoding_first_is_faster(bf16, 512, 32_768, 2048)
    assert decoding_first_is_faster(fp8, 512, 32_768, 2048)
    assert decoding_first_is_faster(fp8, 45, 32_768, 2048)
    assert not decoding_first_is_faster(fp8, 44, 32_768, 2048), "5 x 36,864 against 2 x 90,112"
    assert not decoding_first_is_faster(fp8, 16, 131_072, 2048)
