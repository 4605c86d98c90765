"""What a device can do. The only place that asks a device, and that knows architecture numbers."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

KIB = 1024


@dataclass(frozen=True)
class Arch:
    """One GPU architecture, in the terms that kernels and launch configurations need.

    Attributes:
        name: key of `ARCHS`, and name of the module of `dsa_kernels.tuning`.
        backend: Triton's: cuda (NVIDIA) or hip (AMD).
        number: Triton's: compute capability * 10, or the gfx name.
        smem_bytes: shared memory (LDS on AMD) that one block may use, at most.
        warp_size: threads a warp (wavefront).
        num_sms: streaming multiprocessors (compute units); typical here, exact from `arch_of`.
        matrix_instruction: the best one that multiplies tiles, as assembly spells it.
        has_e4m3: converts and multiplies float8_e4m3fn; elsewhere bytes are decoded by integers.
    """

    name: str
    backend: Literal["cuda", "hip"]
    number: int | str
    smem_bytes: int
    warp_size: int
    num_sms: int
    matrix_instruction: str
    has_e4m3: bool

    @property
    def target(self) -> GPUTarget:
        """For `triton.compile`, which needs no GPU."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.number, self.warp_size)


# gfx942 multiplies e4m3fnuz only: the same bits mean half the value there.
ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm80", "cuda", 80, 163 * KIB, 32, 108, "mma.sync", has_e4m3=False),
        Arch("sm86", "cuda", 86, 99 * KIB, 32, 82, "mma.sync", has_e4m3=False),
        Arch("sm89", "cuda", 89, 99 * KIB, 32, 128, "mma.sync", has_e4m3=True),
        Arch("sm90", "cuda", 90, 227 * KIB, 32, 132, "wgmma", has_e4m3=True),
        Arch("sm100", "cuda", 100, 227 * KIB, 32, 148, "tcgen05.mma", has_e4m3=True),
        Arch("sm120", "cuda", 120, 99 * KIB, 32, 170, "mma.sync", has_e4m3=True),
        Arch("gfx942", "hip", "gfx942", 64 * KIB, 64, 304, "v_mfma", has_e4m3=False),
        Arch("gfx950", "hip", "gfx950", 160 * KIB, 64, 256, "v_mfma", has_e4m3=True),
    )
}
INTERPRETED = ARCHS["sm80"]  # what Triton's interpreter stands for: the portable way through each


@cache
def arch_of(device: torch.device) -> Arch:
    """The architecture of a device that Triton kernels run on.

    A chip of the same generation that has no entry (sm87, sm103, sm121) counts as the nearest older
    one. On a CPU, under TRITON_INTERPRET=1, it is `INTERPRETED`.

    Raises:
        ValueError: no kernel runs there; says what would work.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            name = properties.gcnArchName.split(":")[0]
        else:
            name = _nearest(properties.major, properties.minor)
        if name in ARCHS:
            return replace(ARCHS[name], num_sms=properties.multi_processor_count)
        what = f"{properties.name} ({name})"
    elif device.type == "cpu" and is_interpreting():
        return INTERPRETED
    else:
        what = f"device {device}"
    raise ValueError(
        f"no Triton kernel for {what}; there are some for {', '.join(ARCHS)}, and under "
        "TRITON_INTERPRET=1 for a CPU. DSA_KERNELS=torch runs everywhere."
    )


def is_interpreting() -> bool:
    """Whether Triton runs kernels on the CPU, to test them; read when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _nearest(major: int, minor: int) -> str:
    known = [
        arch.number
        for arch in ARCHS.values()
        if isinstance(arch.number, int) and 10 * major <= arch.number <= 10 * major + minor
    ]
    return f"sm{max(known, default=10 * major + minor)}"
