"""What servers do in place of an answer; each takes the handler and the request's number."""

import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

Fail = Callable[[Any, int], bool]


def drop(handler: BaseHTTPRequestHandler, _number: int) -> bool:
    """Close the connection."""
    handler.close_connection = True
    return True


def status(code: int) -> Fail:
    """An HTTP status, with a text that is no JSON."""

    def fail(handler: Any, _number: int) -> bool:
        handler.reply(b"CUDA error: out of luck", code)
        return True

    return fail


def late(seconds: float) -> Fail:
    """Nothing for so long, then the end of the connection."""

    def fail(handler: BaseHTTPRequestHandler, number: int) -> bool:
        time.sleep(seconds)
        return drop(handler, number)

    return fail
