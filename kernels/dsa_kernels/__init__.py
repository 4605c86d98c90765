"""DeepSeek Sparse Attention in four ops: cache_write, indexer_logits, topk_select, sparse_mla."""
