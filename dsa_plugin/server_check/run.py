"""Ask a server the whole grid within a budget, and judge what came back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from dsa_plugin.evaluation.completions import Completions, OutOfTimeError, Patience
from dsa_plugin.server_check import by_answers, by_logprobs, notes
from dsa_plugin.server_check.asking import Reply, ask_all
from dsa_plugin.server_check.by_answers import Answer
from dsa_plugin.server_check.comparison import Comparison
from dsa_plugin.server_check.faults import Fault, Finding, in_order
from dsa_plugin.server_check.grid import (
    ALONE_COLD,
    MODES,
    Mode,
    concurrency,
    default_lengths,
    edges,
    that_fit,
)
from dsa_plugin.server_check.questions import Prompt, draw_nonce, is_right, make_prompts
from dsa_plugin.server_check.reference import Reference
from dsa_plugin.server_check.report import Report
from dsa_plugin.server_check.settings import Settings

Progress = Callable[[int, int, str], None]
"""Told how many of how many questions are answered, and which comes next."""


def check_server(settings: Settings, progress: Progress) -> Report:
    """What is wrong with a server.

    Raises:
        ValueError: a setting or the checkpoint is not usable, or the server has no such model; what
            else is wrong with the server is in the report.
    """
    start = time.monotonic()
    reference = Reference(settings.checkpoint) if settings.checkpoint else None
    report = Report(url=settings.url, chunk=settings.chunk, seed=settings.seed)
    patience = Patience(
        settings.timeout, settings.num_concurrent, time.monotonic() + settings.budget_s
    )
    try:
        server = Completions(settings.url, settings.model, settings.api_key, patience)
    except OSError as error:
        report.problem, report.unusable = str(error), True
    else:
        report.model = server.model
        report.index_topk = settings.find_index_topk(server.model)
        comparison = Comparison(server, reference) if reference else None
        lengths = _lengths(settings, report.index_topk, server.max_model_len, report.notes)
        replies = _Asking(server, comparison, settings, report, progress).run(lengths)
        _judge(report, report.index_topk, lengths, comparison)
        report.notes += notes.of_replies(report, replies)
    report.seconds = time.monotonic() - start
    return report


def _lengths(
    settings: Settings, index_topk: int, max_model_len: int | None, told: list[str]
) -> list[int]:
    """Those to ask. Raises ValueError where none can show a fault of DSA."""
    wanted = sorted(settings.lengths or default_lengths(index_topk, settings.chunk))
    lengths = that_fit(wanted, max_model_len)
    if left_out := [f"{length:,}" for length in wanted if length not in lengths]:
        told.append(f"not asked, as the server takes {max_model_len:,}: {', '.join(left_out)}")
    if not lengths or lengths[-1] <= index_topk or lengths[0] > index_topk:
        raise ValueError(
            f"lengths {lengths} lie all on one side of index_topk {index_topk}: DSA shows by the "
            "contrast; name shorter and longer ones with --lengths, and serve the model with a "
            "context longer than that"
        )
    return lengths


class _Asking:
    """Asks one server; what it says goes into the report and the comparison."""

    def __init__(
        self,
        server: Completions,
        comparison: Comparison | None,
        settings: Settings,
        report: Report,
        progress: Progress,
    ) -> None:
        self._server, self._comparison = server, comparison
        self._settings, self._report, self._progress = settings, report, progress
        self._replies: list[Reply] = []
        self._total = 0

    def run(self, lengths: Sequence[int]) -> list[Reply]:
        """All replies, until the budget ends or the server fails; the report says so."""
        settings, at, mode = self._settings, 0, ALONE_COLD
        self._total = len(lengths) * len(MODES) * settings.questions
        try:
            for at in lengths:
                prompts = make_prompts(settings.seed, at, settings.questions)
                nonces = {batch: [draw_nonce() for _ in prompts] for batch in (False, True)}
                for mode in MODES:
                    self._ask(mode, prompts, nonces[mode.batch])
        except OutOfTimeError:
            self._out_of_time(f"{at:,} tokens, {mode.name}")
        except (OSError, ValueError) as error:
            self._failed(error, at, mode)
        return self._replies

    def _ask(self, mode: Mode, prompts: Sequence[Prompt], nonces: Sequence[str]) -> None:
        texts = [nonce + prompt.text for nonce, prompt in zip(nonces, prompts, strict=True)]
        comparison, length = self._comparison, prompts[0].length
        tokens = [comparison.tokens(text) for text in texts] if comparison else []
        at_once = concurrency(self._settings.num_concurrent, length) if mode.batch else 1
        replies = ask_all(self._server, tokens or texts, at_once, logprobs=comparison is not None)
        for number, prompt in enumerate(prompts):
            self._progress(len(self._replies), self._total, f"{length:,} tokens, {mode.name}")
            reply = next(replies)
            self._replies.append(reply)
            self._report.answers.append(_answer(prompt, mode, reply))
            if comparison:
                comparison.add(mode, tokens[number], reply)
        if comparison and mode == ALONE_COLD:
            comparison.add_prompt(tokens[0])
        self._progress(len(self._replies), self._total, f"{length:,} tokens, {mode.name}")

    def _out_of_time(self, at: str) -> None:
        self._report.problem = (
            f"the budget of {self._settings.budget_s:g} s ended at {at}; give it longer with "
            "--budget-s, or ask less with --lengths"
        )
        # A server that has not even answered the first questions is too slow for anything.
        self._report.unusable = len(self._replies) < self._settings.questions

    def _failed(self, error: Exception, length: int, mode: Mode) -> None:
        at = f"{length:,} tokens, {mode.name}"
        longest = max((answer.tokens for answer in self._report.answers), default=0)
        refused = isinstance(error, ValueError) and mode == ALONE_COLD
        if refused and longest > (self._report.index_topk or 0):
            self._report.notes.append(f"not asked from {length:,} tokens on: {error}")
        else:
            self._report.problem, self._report.unusable = f"at {at}: {error}", True


def _answer(prompt: Prompt, mode: Mode, reply: Reply) -> Answer:
    return Answer(
        length=prompt.length,
        number=prompt.number,
        mode=mode,
        tokens=reply.prompt_tokens or prompt.length,
        cached_tokens=reply.cached_tokens,
        completion=reply.completion,
        right=is_right(prompt.question, reply.completion),
    )


def _judge(
    report: Report, index_topk: int, lengths: Sequence[int], comparison: Comparison | None
) -> None:
    """Fill in what was found."""
    findings: list[Finding] = []
    compared = comparison is not None and bool(comparison.errors)
    if comparison is not None and compared:
        limits = edges(lengths, index_topk, report.chunk)
        report.bands = by_logprobs.bands(comparison.errors, comparison.rounding, index_topk, limits)
        findings += by_logprobs.find_faults(report.bands, index_topk, report.chunk)
    known = [finding.fault for finding in findings]
    if compared and not by_answers.answers_short_questions(report.answers):
        report.notes.append(
            "the model hardly answers the shortest questions: judged by log-probabilities alone"
        )
    elif report.answers and Fault.EVERYWHERE not in known:
        found = by_answers.find_faults(report.answers, index_topk, report.chunk)
        findings += [finding for finding in found if finding.fault not in known]
    report.findings = in_order(findings)
    report.notes += comparison.notes if comparison else []
