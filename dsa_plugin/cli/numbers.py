"""Lists of numbers as flags take them."""

from __future__ import annotations


def layer_list(text: str) -> list[int]:
    """Indices and ranges, such as 0,2,5-7.

    Raises:
        ValueError: it is something else.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--layers is {text!r}; allowed: indices and ranges, such as 0,2,5-7")
        found += range(int(first), int(last if dash else first) + 1)
    return found


def length_list(text: str) -> list[int]:
    """Tokens, such as 2048,65536 or 2K,64K.

    Raises:
        ValueError: it is something else.
    """
    found = []
    for part in text.split(","):
        digits = part.strip().upper().removesuffix("K")
        if not digits.isdecimal() or not int(digits):
            raise ValueError(
                f"--lengths is {text!r}; allowed: tokens, such as 2048,65536 or 2K,64K"
            )
        found.append(int(digits) * (1024 if part.strip().upper().endswith("K") else 1))
    return found
