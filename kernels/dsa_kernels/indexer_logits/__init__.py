"""The lightning indexer's scores of a request's keys."""

from dsa_kernels.indexer_logits.api import (
    gather_index_keys,
    indexer_logits,
    indexer_logits_paged,
    warm_up_indexer,
)

__all__ = ["gather_index_keys", "indexer_logits", "indexer_logits_paged", "warm_up_indexer"]
