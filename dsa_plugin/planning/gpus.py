"""Published figures of GPUs: memory, bandwidth, and dense peaks with fp32 accumulation.

Vendors' "GB" of device memory are GiB; what a driver reports is up to 1 % less, on L40S (ECC) 6 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_GA100 = (
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/"
    "nvidia-ampere-architecture-whitepaper.pdf"
)
_GA102 = (
    "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
)
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_RTX_BLACKWELL = (
    "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/"
    "nvidia-rtx-blackwell-gpu-architecture.pdf"
)
_AMD = "https://www.amd.com/en/products/accelerators/instinct/"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: what `--gpu` takes.
        device: part of the name that torch.cuda.get_device_name() gives it.
        arch: sm80 ..., gfx942 ...
        memory_gib: device memory.
        gb_per_second: memory bandwidth.
        bf16_tflops: dense bf16 matrix products.
        fp8_tflops: the same in fp8; None: has no fp8 units.
        source: where these are published.
    """

    name: str
    device: str
    arch: str
    memory_gib: int
    gb_per_second: float
    bf16_tflops: float
    fp8_tflops: float | None
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", "A100-SXM4-40GB", "sm80", 40, 1555, 312, None, _GA100),
        Gpu("a100-80g", "A100-SXM4-80GB", "sm80", 80, 2039, 312, None, _NVIDIA + "a100/"),
        # As the A100 but for NVLink.
        Gpu("a800", "A800-SXM4-80GB", "sm80", 80, 2039, 312, None, _NVIDIA + "a100/"),
        Gpu("rtx-3090", "RTX 3090", "sm86", 24, 936, 71, None, _GA102),
        Gpu("rtx-4090", "RTX 4090", "sm89", 24, 1008, 165.2, 330.3, _ADA),
        Gpu("l40s", "L40S", "sm89", 48, 864, 362, 733, _NVIDIA + "l40s/"),
        # NVIDIA publishes no data sheet for export; these are its resellers'.
        Gpu("h20", "H20", "sm90", 96, 4000, 148, 296, "https://willitrunai.com/gpus/h20-96gb"),
        Gpu("h100", "H100", "sm90", 80, 3350, 989, 1979, _NVIDIA + "h100/"),
        # As the H100 but for NVLink and fp64.
        Gpu("h800", "H800", "sm90", 80, 3350, 989, 1979, "https://aiwiki.ai/wiki/nvidia_h800"),
        Gpu("h200", "H200", "sm90", 141, 4800, 989, 1979, _NVIDIA + "h200/"),
        # 8 TB/s are published too; a bus of 7680 bits at 3996 MHz, as the driver has it, gives 7.7:
        # https://github.com/pytorch/ao/pull/4002
        Gpu(
            "b200",
            "B200",
            "sm100",
            180,
            7700,
            2250,
            4500,
            "https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703",
        ),
        Gpu("rtx-5090", "RTX 5090", "sm120", 32, 1792, 209.5, 419, _RTX_BLACKWELL),
        Gpu(
            "rtx-pro-6000",
            "RTX PRO 6000",
            "sm120",
            96,
            1792,
            503.8,
            1007.6,
            "https://www.nvidia.com/content/dam/en-zz/Solutions/design-visualization/"
            "quadro-product-literature/NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf",
        ),
        # Of its peaks only 1000 sparse fp4 are published: an eighth is dense bf16 in the RTX PRO
        # 6000, and a sixteenth in GeForce chips. The memory is the CPU's too.
        Gpu(
            "gb10",
            "GB10",
            "sm121",
            128,
            273,
            125,
            250,
            "https://www.nvidia.com/en-us/products/workstations/dgx-spark/",
        ),
        Gpu("mi300x", "MI300X", "gfx942", 192, 5300, 1307.4, 2614.9, _AMD + "mi300/mi300x.html"),
        Gpu("mi325x", "MI325X", "gfx942", 256, 6000, 1307.4, 2614.9, _AMD + "mi300/mi325x.html"),
        Gpu("mi350x", "MI350X", "gfx950", 288, 8000, 2300, 4600, _AMD + "mi350/mi350x.html"),
        Gpu(
            "mi355x",
            "MI355X",
            "gfx950",
            288,
            8000,
            2516.6,
            5033.2,
            "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/product-briefs/"
            "amd-instinct-mi355x-gpu-brochure.pdf",
        ),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name; a100, mi300 and the like are the largest or only one so called.

    Raises:
        ValueError: unknown; names the nearest and all known.
    """
    key = name.lower().replace("_", "-").replace(" ", "-")
    key = next((known for known in (key, f"{key}-80g", f"{key}x") if known in GPUS), key)
    if key not in GPUS:
        longer = [known for known in GPUS if known.startswith(key)]
        near = longer or get_close_matches(key, GPUS, n=1, cutoff=0.0)
        raise ValueError(
            f"GPU {name!r} is not known; did you mean {' or '.join(near)}? Known: "
            f"{', '.join(GPUS)}. Another is one line in dsa_plugin/planning/gpus.py"
        )
    return GPUS[key]
