"""DeepSeek Sparse Attention of one layer, whatever host it came from."""
