"""Runs in SGLang's environment: the host's own writer of index keys, by Triton's interpreter.

``python -m dsa_testbed.sglang_pages IN.npz OUT.npy``: IN holds keys [T, 128] fp32, slots [T] int64
and pages; OUT the pages' bytes, [pages, 64 * 132] uint8.
"""

import sys
from types import SimpleNamespace

import numpy as np
import torch
from sglang.kernels.ops.kvcache.dsa_index_k_cache import SetKAndS
from sglang.kernels.ops.quantization.act_quant_triton import act_quant


def main() -> None:
    source, target = sys.argv[1:]
    with np.load(source, allow_pickle=False) as arrays:
        keys, slots, pages = (arrays[name] for name in ("keys", "slots", "pages"))
    pool = SimpleNamespace(index_page_size=64)
    buffer = torch.zeros(int(pages), 64 * 132, dtype=torch.uint8)
    values = torch.from_numpy(keys)
    _, scales = act_quant(values, 128, "ue8m0")
    # The interpreter's own cast to e4m3 is wrong where a value rounds up to a power of two.
    quantised = (values / scales).to(torch.float8_e4m3fn)
    SetKAndS.execute(
        pool, buf=buffer, loc=torch.from_numpy(slots), index_k=quantised, index_k_scale=scales
    )
    np.save(target, buffer.numpy(), allow_pickle=False)


if __name__ == "__main__":
    main()
