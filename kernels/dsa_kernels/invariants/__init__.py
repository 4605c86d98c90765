"""What holds of every sound pass, checked in it: `DSA_CHECK`."""

from dsa_kernels.invariants.api import check_rows, keep_first, mark_rows
from dsa_kernels.invariants.findings import FIELDS, Kind
from dsa_kernels.invariants.inputs import LayerMemory, Rows, Used

__all__ = [
    "FIELDS",
    "Kind",
    "LayerMemory",
    "Rows",
    "Used",
    "check_rows",
    "keep_first",
    "mark_rows",
]
