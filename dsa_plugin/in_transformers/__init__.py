"""DSA models in transformers, eager: what `dsa eval` and `dsa explain` run without a host."""
