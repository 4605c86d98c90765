"""DeepSeek Sparse Attention of one layer, whatever host it came from.

layer.py      what a layer and a pass are made of
forward.py    the way of the data: caches written, tokens selected, attended to
selection.py  scores, and the top k of them
sparse.py     MLA over the selected latents
metadata.py   one batch
invariants.py what `DSA_CHECK` checks; latest_rows.py and violation.py are parts
warm_up.py    what the first request would otherwise wait for
ops.py        the kernels' ops, each call counted for `DSA_OP_COUNTS` (op_counts.py)
"""

from dsa_plugin.attention.forward import forward
from dsa_plugin.attention.invariants import LayerCheck, layer_check, pass_record
from dsa_plugin.attention.layer import Indexer, IndexProjections, Layer, MLAWeights, Projections
from dsa_plugin.attention.sparse import reserve
from dsa_plugin.attention.warm_up import warm_up_cpu

__all__ = [
    "IndexProjections",
    "Indexer",
    "Layer",
    "LayerCheck",
    "MLAWeights",
    "Projections",
    "forward",
    "layer_check",
    "pass_record",
    "reserve",
    "warm_up_cpu",
]
