"""Pages of the fp8 index cache: ours are, byte for byte, what SGLang's own writer stores.

SGLang's pool, its HiCache and its PD transfer then need not know who wrote them.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dsa_kernels.cache_write import Norm, Rope, index_cache_write
from dsa_kernels.dims import INDEX_FP8_BYTES
from dsa_testbed.sglang_server import sglang_python

PAGES, PAGE, DIM = 5, 64, 128
TOKENS = 150
Bytes = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def slots() -> torch.Tensor:
    return torch.randperm(PAGES * PAGE)[:TOKENS]


def write(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The same seeded keys, normalised and rotated, into `cache`."""
    draw = torch.Generator().manual_seed(7)
    keys = torch.randn(TOKENS, DIM, generator=draw)
    weight, bias = torch.randn(2, DIM, generator=draw)
    # A key of zeros has the least scale, 2^-22; one of tiny values is all subnormals.
    keys[0] = 0
    weight = weight * torch.logspace(-6, 3, DIM)
    angles = torch.rand(TOKENS, 32, generator=draw) * 6.3
    index_cache_write(
        keys,
        Norm(weight, 1e-6, bias * 1e-7),
        Rope(torch.cat((angles.cos(), angles.sin()), -1), interleaved=False),
        torch.arange(TOKENS),
        cache,
        slots,
        hadamard=True,
    )
    return cache


@pytest.fixture(scope="module")
def keys(slots: torch.Tensor) -> npt.NDArray[np.float32]:
    """What gets quantised: the unquantised cache holds it."""
    cache = write(torch.zeros(PAGES, PAGE, DIM), slots)
    values: npt.NDArray[np.float32] = cache.view(-1, DIM)[slots].numpy()
    return values


@pytest.fixture(scope="module")
def ours(slots: torch.Tensor) -> Bytes:
    cache = torch.zeros(PAGES, PAGE, INDEX_FP8_BYTES, dtype=torch.uint8)
    pages: Bytes = write(cache, slots).view(PAGES, -1).numpy()
    return pages


def test_as_the_layout_is_defined(
    keys: npt.NDArray[np.float32], slots: torch.Tensor, ours: Bytes
) -> None:
    """64 x 128 e4m3, then 64 fp32 scales 2^ceil(log2(max(amax, 1e-4) / 448))."""
    expected = np.zeros((PAGES, PAGE * (DIM + 4)), np.uint8)
    for key, slot in zip(keys, slots.tolist(), strict=True):
        page, offset = divmod(slot, PAGE)
        least = max(float(np.abs(key).max()), 1e-4) / 448
        exponent = next(e for e in range(-126, 128) if 2.0**e >= least)
        values = torch.from_numpy(key * 2.0**-exponent).to(torch.float8_e4m3fn)
        expected[page, offset * DIM : (offset + 1) * DIM] = values.view(torch.uint8).numpy()
        scale = np.frombuffer(np.float32(2.0**exponent).tobytes(), np.uint8)
        expected[page, PAGE * DIM + 4 * offset :][:4] = scale
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.serving
def test_as_sglang_writes_them(
    keys: npt.NDArray[np.float32], slots: torch.Tensor, ours: Bytes, tmp_path: Path
) -> None:
    source, target = tmp_path / "keys.npz", tmp_path / "pages.npy"
    np.savez(source, keys=keys, slots=slots.numpy(), pages=PAGES)
    environ = os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "TRITON_INTERPRET": "1",
    }
    command = [str(sglang_python()), "-m", "dsa_testbed.sglang_pages", str(source), str(target)]
    subprocess.run(command, env=environ, check=True)
    np.testing.assert_array_equal(ours, np.load(target, allow_pickle=False))
