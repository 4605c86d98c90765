"""Ask a host, in its own process, what it makes of a command line on some machine.

`ask` runs `python -m dsa_plugin.hosts.<host>.probe.resolve`, which calls `answer` with what it does
for one question. Hosts decide once for a process which machine it is on, so each question has a
child process of its own, forked after the host was imported: that costs seconds, a child
milliseconds.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsa_plugin.planning.gpus import Gpu

_PREFIX = "answer: "
_DIED = "died: "
_LINES = 40  # of a process's output that an error keeps: a trace of C++ takes 25


@dataclass(frozen=True)
class Target:
    """The machine that a host is asked about, which need not be this one.

    Attributes:
        device: what torch.cuda.get_device_name() says there.
        arch: sm80 ..., gfx942 ...; empty for this machine.
        memory_bytes: of one GPU.
        count: GPUs of the machine.
    """

    device: str
    arch: str
    memory_bytes: int
    count: int

    @classmethod
    def here(cls) -> Target:
        """This machine, whatever it has."""
        return cls("", "", 0, 0)

    @classmethod
    def of(cls, gpu: Gpu, count: int) -> Target:
        """A machine with so many of a GPU."""
        return cls(gpu.device, gpu.arch, gpu.memory_gib << 30, count)

    @property
    def is_rocm(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA's, or what HIP gives for it: gfx942 is (9, 4)."""
        digits = self.arch.removeprefix("sm").removeprefix("gfx")
        if self.is_rocm:
            return int(digits[0]), int(digits[1])
        return int(digits[:-1]), int(digits[-1])


@dataclass(frozen=True)
class Question:
    """A command line of the host's, without the program.

    Attributes:
        target: None: only whether the host knows the flags and their values.
        env: set for it.
        kernels: also what would run each op of DSA there: `native` and `ours` of the answer.
    """

    arguments: list[str]
    target: Target | None = None
    env: dict[str, str] = field(default_factory=dict)
    kernels: bool = False


@dataclass(frozen=True)
class Answer:
    """What the host said.

    Attributes:
        error: what it ended with; None: it takes the command line.
        settled: values that it settled on, by name.
    """

    error: str | None
    settled: dict[str, Any] = field(default_factory=dict)


class ProbeDiedError(ValueError):
    """A process that asked a host ended without an answer, which says nothing of the machine.

    Attributes:
        what: which question, and how the process ended.
        output: the end of what was written.
    """

    REMEDY = "report it with what was written: a fault of dsa-plugin's, and no host's refusal"

    def __init__(self, what: str, output: str) -> None:
        super().__init__(f"{what}; {self.REMEDY}:\n{output}")
        self.what = what
        self.output = output


def ask(python: str, host: str, questions: Iterable[Question]) -> list[Answer]:
    """One answer a question, in order.

    Raises:
        ProbeDiedError: a process that asked one of them did not live to answer.
        ValueError: the host cannot be asked at all; with the end of what it wrote.
    """
    sent = list(questions)
    done = subprocess.run(
        [python, "-P", "-m", f"dsa_plugin.hosts.{host}.probe.resolve"],
        input=json.dumps([asdict(question) for question in sent]),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    answers, written = [], []
    ending = _ending(done.returncode) if done.returncode < 0 else None
    for line in done.stdout.splitlines():
        if line.startswith(_PREFIX):
            answers.append(Answer(**json.loads(line.removeprefix(_PREFIX))))
        elif line.startswith(_DIED):
            ending = line.removeprefix(_DIED)
        elif line:
            written.append(line)
    if len(answers) == len(sent):
        return answers
    tail = "\n".join([*written, *done.stderr.rstrip().splitlines()][-_LINES:])
    if ending:
        unanswered = _in_words(host, sent[len(answers)])
        raise ProbeDiedError(f"the probe of {unanswered} ended with {ending}", tail)
    raise ValueError(f"{host} did not answer ({_ending(done.returncode)}):\n{tail}")


def _in_words(host: str, question: Question) -> str:
    words = [f"{name}={value}" for name, value in question.env.items()] + [host]
    command = shlex.join([*words, *question.arguments])
    target = question.target
    if target is None or target == Target.here():
        return f"`{command}` on this machine"
    return f"`{command}` on {target.count} x {target.device} ({target.arch})"


def _ending(code: int) -> str:
    """An exit code of subprocess or os.waitstatus_to_exitcode in words."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def answer(resolve: Callable[[Question], Answer]) -> None:
    """Host side: answer the questions on stdin, each in a child of this process.

    Ends with the first child that dies: what it wrote is then the end of the output.
    """
    for item in json.load(sys.stdin):
        target = Target(**item["target"]) if item["target"] else None
        question = Question(item["arguments"], target, item["env"], item["kernels"])
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _answer_and_exit(resolve, question)
        _, status = os.waitpid(child, 0)
        if status != 0:
            _write_line(_DIED + _ending(os.waitstatus_to_exitcode(status)))
            return


def _answer_and_exit(resolve: Callable[[Question], Answer], question: Question) -> None:
    os.environ.update(question.env)
    try:
        _write(resolve(question))
    except ValueError as error:
        _write(Answer(str(error)))
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it is, it is the answer
        _write(Answer(f"{type(error).__name__}: {error}"))
    # Neither the host's threads nor its exit handlers are this child's.
    os._exit(0)


def _write(answer: Answer) -> None:
    _write_line(_PREFIX + json.dumps(asdict(answer), default=str))


def _write_line(line: str) -> None:
    # A host may have left one unfinished.
    sys.stdout.write(f"\n{line}\n")
    sys.stdout.flush()


def check_flags(arguments: Sequence[str], known: Mapping[str, Any], program: str) -> None:
    """Refuse flags that the host does not have under just this name.

    argparse itself also takes a flag's beginning, which a new flag can make ambiguous.

    Args:
        known: by flag, with its dashes.

    Raises:
        ValueError: naming the nearest known flag.
    """
    for argument in arguments:
        flag = argument.partition("=")[0].partition(".")[0]  # --flag.field of an object
        if flag.startswith("--") and flag not in known:
            near = get_close_matches(flag, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{flag} is not a flag of {program}: misspelt (the nearest is {near}), or of "
                "another release"
            )
