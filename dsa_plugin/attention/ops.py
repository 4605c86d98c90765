"""The kernels' ops as this package calls them: each call is counted."""

import dsa_kernels.cache_write as cache_write_ops
import dsa_kernels.indexer_logits as indexer_logits_ops
import dsa_kernels.sparse_mla as sparse_mla_ops
import dsa_kernels.topk_select as topk_select_ops
from dsa_plugin.attention.op_counts import counted

one_launch = cache_write_ops.one_launch

latent_cache_write = counted(cache_write_ops.latent_cache_write)
index_cache_write = counted(cache_write_ops.index_cache_write)
index_query = counted(cache_write_ops.index_query)
apply_rope = counted(cache_write_ops.apply_rope)

indexer_logits = counted(indexer_logits_ops.indexer_logits)
indexer_logits_paged = counted(indexer_logits_ops.indexer_logits_paged)
gather_index_keys = counted(indexer_logits_ops.gather_index_keys)

topk_select = counted(topk_select_ops.topk_select)
topk_select_slots = counted(topk_select_ops.topk_select_slots)
topk_slots = counted(topk_select_ops.topk_slots)

sparse_mla = counted(sparse_mla_ops.sparse_mla)
masked_mha = counted(sparse_mla_ops.masked_mha)
gather_latents = counted(sparse_mla_ops.gather_latents)
