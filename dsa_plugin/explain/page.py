"""One self-contained HTML page: hovering a token, or moving to it, shows what it read."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Collection, Iterator, Sequence
from importlib.resources import files
from string import Template

from dsa_plugin.explain.selections import LayerSelections, Selections

_SCRIPTS = ("reads.js", "map.js", "view.js")
# Blocks of text are laid out when they are scrolled to; one ends at the first line break past this.
_BLOCK = 200
_LONGEST_BLOCK = 2000
# Controls, which HTML drops or forbids, and those that turn the direction of all that follows.
_UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def render(
    selections: Selections, pieces: Sequence[str], title: str, marked: Collection[int] = ()
) -> str:
    """The page's HTML.

    Args:
        selections: what to show.
        pieces: the text of each of its tokens.
        title: the page's.
        marked: positions of tokens to mark, of which the page counts how many were read.
    """
    positions = frozenset(marked)
    style = _source("page.css")
    script = "\n".join(map(_source, _SCRIPTS))
    spans = [_span(piece, marked=position in positions) for position, piece in enumerate(pieces)]
    answer = spans[selections.prompt_tokens :]
    return Template(_source("page.html")).substitute(
        title=html.escape(title),
        summary=html.escape(_summary(selections)),
        policy=html.escape(_policy(style, script)),
        style=style,
        script=script,
        layers="".join(_options(selections)),
        prompt="".join(_blocks(pieces, spans[: selections.prompt_tokens])),
        answer="".join(_blocks(pieces[selections.prompt_tokens :], answer)),
        answer_hidden="" if answer else "hidden",
        marked_hidden="" if marked else "hidden",
        data="\n".join(_data(selections, sorted(marked))),
    )


def _source(name: str) -> str:
    return files("dsa_plugin.explain").joinpath(name).read_text(encoding="utf-8")


def _policy(*inline: str) -> str:
    """Nothing is loaded from anywhere, and no script runs but the page's own."""
    style, script = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inline
    )
    return f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'"


def _summary(selections: Selections) -> str:
    tokens, k, first = len(selections.tokens), selections.index_topk, selections.first_row
    said = tokens - selections.prompt_tokens
    text = f"{selections.prompt_tokens:,} tokens of prompt, {said:,} generated. "
    if tokens <= k:
        return f"{text}No token sees more than index_topk {k:,}: each read all it sees."
    text += f"Tokens before position {k:,} (index_topk) read all they see, later ones {k:,}"
    if first > k:
        return f"{text}; what those before {min(first, tokens):,} read is not on this page."
    return f"{text}."


def _options(selections: Selections) -> Iterator[str]:
    yield '<option value="-1">all layers</option>'
    for index, layer in enumerate(selections.layers):
        yield f'<option value="{index}">{layer_name(layer)}</option>'


def layer_name(layer: LayerSelections) -> str:
    """With whose selection it reads, if not its own."""
    if layer.layer == layer.source:
        return str(layer.layer)
    return f"{layer.layer} (reads layer {layer.source}'s selection)"


def _span(piece: str, *, marked: bool) -> str:
    classes = " ".join(
        name
        for name, applies in (("newline", "\n" in piece), ("part", not piece), ("marked", marked))
        if applies
    )
    text = html.escape(_UNSHOWN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", piece))
    return f'<span class="{classes}">{text}</span>' if classes else f"<span>{text}</span>"


def _blocks(pieces: Sequence[str], spans: Sequence[str]) -> Iterator[str]:
    block: list[str] = []
    for piece, span in zip(pieces, spans, strict=False):
        block.append(span)
        ends = len(block) >= _BLOCK and piece.endswith("\n")
        if ends or len(block) >= _LONGEST_BLOCK:
            yield f'<div class="block">{"".join(block)}</div>'
            block = []
    if block:
        yield f'<div class="block">{"".join(block)}</div>'


def _data(selections: Selections, marked: Sequence[int]) -> Iterator[str]:
    """What reads.js reads: numbers as JSON, and 16-bit little-endian positions in base64."""
    numbers = {
        "tokens": len(selections.tokens),
        "prompt_tokens": selections.prompt_tokens,
        "index_topk": selections.index_topk,
        "first_row": selections.first_row,
        "layers": [{"layer": each.layer, "source": each.source} for each in selections.layers],
        "marked": marked,
    }
    yield f'<script type="application/json" id="data">{json.dumps(numbers)}</script>'
    for source, layer in {each.source: each for each in selections.layers}.items():
        packed = base64.b64encode(layer.topk_indices.numpy().astype("<u2").tobytes()).decode()
        yield f'<script type="text/plain" id="rows-{source}">{packed}</script>'
