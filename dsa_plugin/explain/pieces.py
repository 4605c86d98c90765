"""The text of single tokens, and which of them a passage covers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any


def token_pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds; together they are the whole text.

    A character of several tokens is the last one's; the others add "".
    """
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, token) or "" for token in tokens]


def find_passage(pieces: Sequence[str], passage: str) -> list[int]:
    """Positions of the tokens that overlap a passage, everywhere in the text where it stands.

    Any white space in the one is any in the other, line breaks too.

    Raises:
        ValueError: it does not stand there.
    """
    pattern = r"\s+".join(map(re.escape, passage.split()))
    found = list(re.finditer(pattern, "".join(pieces))) if pattern else []
    if not found:
        raise ValueError(f"the prompt has no passage {passage!r}; give words as they stand there")
    ends = list(accumulate(map(len, pieces)))
    return [
        position
        for position, (piece, end) in enumerate(zip(pieces, ends, strict=True))
        if any(end > match.start() and end - len(piece) < match.end() for match in found)
    ]
