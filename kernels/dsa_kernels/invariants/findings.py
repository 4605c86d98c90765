"""What a check may find, and how it is noted."""

from __future__ import annotations

from enum import IntEnum


class Check(IntEnum):
    """The checks of a row in their order: of several that failed the least is told."""

    PLACE = 1
    LATENT = 2
    KEY = 3
    QUERY = 4
    READ = 5
    COUNT = 6
    USED = 7
    OUT = 8


class Kind(IntEnum):
    """What was violated; 0 is nothing. Of one check of a row the greatest is told."""

    PLACE = 1
    LATENT_UNWRITTEN = 2
    LATENT_NAN = 3
    KEY_UNWRITTEN = 4
    KEY_NAN = 5
    QUERY_NAN = 6
    STALE = 7
    READ_KEY_NAN = 8
    PAGES = 9
    ORDER = 10
    RANGE = 11
    COUNT = 12
    OUT_NAN = 13


FIELDS = ("kind", "layer", "pass", "row", "request", "position", "at", "seen")
"""Of a violation, [8] int64; `at` and `seen` are numbers whose meaning the kind says:

PLACE: the slot, the length. COUNT: how many, how many there should be. STALE, READ_KEY_NAN, ORDER,
RANGE: a position, and for which one its slot was last written. PAGES: a position, and the slot that
it was looked for in. All others: the slot, twice.
"""

NOTES = 4
"""Numbers noted of a row, int64: check, kind, at, seen; 0 where nothing was found."""
