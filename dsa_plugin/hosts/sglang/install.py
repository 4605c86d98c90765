"""What has no hook in SGLang, patched in the processes of a model that the plugin serves."""

from __future__ import annotations

from functools import cache, wraps
from typing import Any, cast

from dsa_plugin.hosts.sglang.backend import DSABackend, DSADraftBackend
from dsa_plugin.hosts.sglang.names import BACKEND
from dsa_plugin.hosts.sglang.pool import size_index_cache


@cache
def install() -> None:
    """Apply what a worker needs before it builds cache pools and the MTP draft."""
    offer_draft_backends()
    size_index_cache()


def offer_draft_backends() -> None:
    """Let the MTP draft run on our backend.

    What: adds our name to the two maps from backend name to draft backend.
    Why: they are local variables of DraftBackendFactory's methods, without a registry.
    Upstream: speculative/draft_utils.py. Remove when: an attention backend can register its draft.
    """
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    original = DraftBackendFactory._create_backend

    @wraps(original)
    def create(self: Any, kind: str, backend_map: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        runner, steps = self.draft_model_runner, self.speculative_num_steps

        def ours() -> tuple[str, Any]:
            decode = kind == "decode_attention_backend" and kwargs.get("stamps_children")
            return BACKEND, DSADraftBackend(runner, steps) if decode else DSABackend(runner)

        return original(self, kind, backend_map | {BACKEND: ours}, *args, **kwargs)

    cast(Any, DraftBackendFactory)._create_backend = create
