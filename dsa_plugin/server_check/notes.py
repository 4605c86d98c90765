"""What a verdict could not rest on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dsa_plugin.server_check.asking import Reply
from dsa_plugin.server_check.report import Report

# Of a prompt, what its cold and its cached request have from the cache: a nonce's tokens, and all
# but the last page.
_COLD, _CACHED = 0.2, 0.5
# A prompt shorter than a page or two is in no cache.
_PAGES = 256


def of_replies(report: Report, replies: Sequence[Reply]) -> Iterator[str]:
    """Notes on who answered, and on what came from a cache."""
    others = {reply.model for reply in replies if reply.model} - {report.model}
    if others:
        yield (
            f"asked for {report.model}, the server says that it answered as "
            f"{', '.join(sorted(map(str, others)))}"
        )
    known = [answer for answer in report.answers if answer.cached_tokens is not None]
    if report.answers and not known:
        yield (
            "the server does not say what came from its prefix cache, so cold and cached are what "
            "was asked for (vLLM: --enable-prompt-tokens-details, SGLang: --enable-cache-report)"
        )
    cold = [a for a in known if not a.mode.cached and (a.cached_tokens or 0) > _COLD * a.tokens]
    if cold:
        yield f"{len(cold)} cold requests were answered from the prefix cache in part"
    asked = [a for a in known if a.mode.cached and a.tokens >= _PAGES]
    hits = [a for a in asked if (a.cached_tokens or 0) > _CACHED * a.tokens]
    if len(hits) < len(asked):
        missed = len(asked) - len(hits)
        yield f"{missed} of {len(asked)} cached requests hardly hit the cache: it is small or off"
