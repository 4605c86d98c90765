"""sm100: B200, GB200, B300.

Not measured. Chosen by registers, spills and shared memory of the compiled kernels, as
docs/compile_matrix.md lists them.
"""

from __future__ import annotations
