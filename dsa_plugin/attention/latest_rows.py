"""What the checks of all layers of a pass have in common: its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dsa_kernels.invariants import Rows

if TYPE_CHECKING:
    from dsa_plugin.attention.metadata import DSAMetadata


class LatestRows:
    """Keeps the last pass's rows for its other layers."""

    def __init__(self) -> None:
        self._of: tuple[DSAMetadata, int] | None = None
        self._rows: Rows | None = None
        self._layers: set[object] = set()

    def of(self, layer: object, metadata: DSAMetadata, positions: Tensor, num_blocks: int) -> Rows:
        """Of a pass with these positions [T], over caches of `num_blocks`.

        A `layer` that asks twice is in another pass, if of the same metadata.
        """
        known = self._of is not None and self._of[0] is metadata and self._of[1] == num_blocks
        if not known or self._rows is None or layer in self._layers:
            self._of = metadata, num_blocks
            self._rows = Rows(
                requests=metadata.request_ids,
                positions=positions,
                lens=metadata.context_lens,
                slots=metadata.slot_mapping,
                block_table=metadata.block_table,
                block_size=metadata.block_size,
                num_blocks=num_blocks,
            )
            self._layers = set()
        self._layers.add(layer)
        return self._rows
