"""sm120: RTX 5090, RTX PRO 6000, GB10.

Not measured. Chosen by registers, spills and shared memory of the compiled kernels, as
docs/compile_matrix.md lists them.
"""

from __future__ import annotations
