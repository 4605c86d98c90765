"""A server's log-probabilities beside a reference's, token by token."""

from __future__ import annotations

from collections.abc import Sequence

from dsa_plugin.evaluation.completions import Completions
from dsa_plugin.server_check.asking import Reply
from dsa_plugin.server_check.grid import ALONE_COLD, Mode
from dsa_plugin.server_check.reference import Reference


class Comparison:
    """Attributes:
    errors: by way of asking, position and distance in nats of each token.
    rounding: the same of bf16, on some of the prompts.
    notes: what could not be compared.
    """

    def __init__(self, server: Completions, reference: Reference) -> None:
        self._server, self._reference = server, reference
        self._echoes = True
        self.errors: dict[Mode, list[tuple[int, float]]] = {}
        self.rounding: list[tuple[int, float]] = []
        self.notes: list[str] = []

    def tokens(self, text: str) -> list[int]:
        """What to send for a text, so that no other tokenizer is in between."""
        return self._reference.tokens(text)

    def add(self, mode: Mode, prompt: list[int], reply: Reply) -> None:
        """The tokens that the server generated."""
        if reply.prompt_tokens not in (None, len(prompt)):
            self._note(f"the server counts other tokens than the {len(prompt)} that it was sent")
        if not reply.generated:
            self._note("the server sends no token ids of its answers (return_token_ids)")
            return
        expected = self._reference.logprobs([*prompt, *reply.generated])[len(prompt) - 1 :]
        self._keep(mode, len(prompt), reply.logprobs, expected)

    def add_prompt(self, prompt: list[int]) -> None:
        """A prompt's own tokens, which hosts compute anew whatever is cached."""
        self.rounding += enumerate(self._reference.rounding(prompt), 1)
        if not self._echoes:
            return
        try:
            found = self._server.token_logprobs(prompt)
        except ValueError:
            self._echoes = False
            self._note("the server gives no log-probabilities of prompts (echo with logprobs)")
            return
        self._keep(ALONE_COLD, 1, found, self._reference.logprobs(prompt))

    def _keep(
        self, mode: Mode, start: int, ours: Sequence[float], expected: Sequence[float]
    ) -> None:
        pairs = enumerate(zip(ours, expected, strict=False), start)
        errors = self.errors.setdefault(mode, [])
        errors += [(at, abs(found - wanted)) for at, (found, wanted) in pairs]

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
