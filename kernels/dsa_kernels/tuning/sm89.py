"""sm89: RTX 4090, L4, L40S.

Not measured. Chosen by registers, spills and shared memory of the compiled kernels, as
docs/compile_matrix.md lists them.
"""

from __future__ import annotations
