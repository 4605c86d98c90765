"""DeepSeek Sparse Attention (DSA) for LLM serving hosts, out of tree.

Imports nothing: a host loads this package in each of its processes, whichever model it serves.
"""

__version__ = "0.1.0"
