"""The keys by which a document's facts are told apart."""

import math
from functools import cache

from dsa_plugin.training.draws import Draws
from dsa_plugin.training.lexicon import ADJECTIVES, NOUNS, held_out_key


class Keys:
    """Keys of a document, none twice; with likeness 1 of few words, so all are near each other."""

    def __init__(self, draws: Draws, count: int, held_out: bool, likeness: float = 1.0) -> None:
        share = 1 / 8 if held_out else 7 / 8
        side = math.ceil(math.sqrt(1.2 * count / share)) + 1

        def some(words: tuple[str, ...]) -> list[str]:
            few = min(side, len(words))
            return draws.sample(words, few + int((1 - likeness) * (len(words) - few)))

        adjectives, nouns = some(ADJECTIVES), some(NOUNS)
        pairs = [(adjective, noun) for adjective in adjectives for noun in nouns]
        pairs = draws.sample(pairs, len(pairs))
        self._held_out = held_out
        self._free = {
            held: [f"{a} {n}" for a, n in pairs if _held_out_keys()[a, n] == held]
            for held in (False, True)
        }

    def take(self) -> str:
        """A key to be asked for."""
        return self._pop(self._held_out)

    def take_unasked(self) -> str:
        """A key that training documents may hold, for facts nobody asks for."""
        return self._pop(False)

    def _pop(self, held: bool) -> str:
        if not self._free[held]:
            raise ValueError("no keys are left; make the document shorter or less dense")
        return self._free[held].pop()


@cache
def _held_out_keys() -> dict[tuple[str, str], bool]:
    return {(a, n): held_out_key(a, n) for a in ADJECTIVES for n in NOUNS}
