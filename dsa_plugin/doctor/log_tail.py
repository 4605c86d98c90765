"""The end of a server's log, without what its users asked."""

from __future__ import annotations

import re
from pathlib import Path

LINES = 200
_BYTES = 1 << 20  # of the end of a file, in which the lines are looked for
REQUEST = "<of a request, left out>"

# Where a record starts: vLLM's level, behind the process's name; SGLang's time; uvicorn's level.
_RECORD = re.compile(
    r"(\(\w+(?: \w+)? pid=\d+\) ?)?"
    r"((DEBUG|INFO|WARNING|ERROR|CRITICAL)\b|\[\d{4}-\d\d-\d\d|(?P<traceback>Traceback \(most))"
)
_ASKED = re.compile(
    r"(?i)\b(?:prompts?|prompt_token_ids|prompt_embeds|(?:input|output|origin_input|generated)_?"
    r"(?:text|ids|tokens)|text|input|inputs|messages|content|query|documents?|token_ids|body)"
    r"['\"]?\s*[:=]|\b(?:GenerateReqInput|ChatCompletionRequest|CompletionRequest|EmbeddingReq)\w*\("
)


def log_tail(path: Path) -> str:
    """The last lines; of a record that shows a request, what comes before it.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            start = max(0, file.tell() - _BYTES)
            file.seek(start)
            text = file.read().decode(errors="replace")
    except OSError as error:
        raise OSError(
            f"--log {path} cannot be read ({error.strerror}); name the file that the server's "
            "output went to"
        ) from None
    lines = text.splitlines()[1 if start else 0 :]
    return "\n".join(without_requests(lines)[-LINES:])


def without_requests(lines: list[str]) -> list[str]:
    """The lines of a log; a request may go on over several, up to the next record.

    A traceback's lines are of code, which is none: of these only the one that shows one is cut.
    """
    kept: list[str] = []
    asked = traceback = False
    for line in lines:
        if record := _RECORD.match(line):
            asked, traceback = False, record["traceback"] is not None
        if asked:
            continue
        match = _ASKED.search(line)
        asked = match is not None and not traceback
        kept.append(f"{line[: match.start()]}{REQUEST}" if match else line)
    return kept
