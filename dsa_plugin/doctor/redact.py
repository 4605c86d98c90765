"""Secrets, requests, and names of people and machines, taken out of what a bug report shows.

By name: the value of what is called a key, a token or a password, wherever a name stands beside a
value. By look: keys that have a known form, URLs, addresses, home folders. By content: what this
process's environment holds under such a name, wherever it turns up again.
"""

from __future__ import annotations

import getpass
import ipaddress
import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SECRET = "<redacted>"
HOST = "<host>"
USER = "<user>"
_LONGEST = 300  # characters of a value that says something of a setting

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_SECRET_PARTS = re.compile(
    r"(?i)passw|passphrase|secret|api_?key|credential|authori[sz]ation|cookie"
)
_SECRET_WORDS = {"auth", "bearer", "key", "keys", "pat", "pwd", "token", "tokens"}
# Beside these, even a number is a secret.
_ALWAYS = {"access", "admin", "api", "auth", "hf", "private", "pwd"}
_HOST_WORDS = {"addr", "address", "addresses", "endpoint", "endpoints", "host", "hostname", "hosts"}
_HOST_WORDS |= {"ip", "ips", "uri", "url", "urls"}
_PROMPT_WORDS = {"message", "messages", "prompt", "prompts", "template"}
_NUMBERS = re.compile(r"(?i)true|false|none|null|auto|on|off|[-+\d.,:\[\](){}\s_ekmg]*")

_FORMS = re.compile(
    r"hf_\w{6,}|\b[spr]k-[\w-]{8,}|\bgh[pousr]_\w{10,}|\bgithub_pat_\w+|\bglpat-[\w-]+"
    r"|\bxox[a-z]-[\w-]+|\b(?:AKIA|ASIA)[A-Z0-9]{12,}|\bAIza[\w-]{20,}|\bnvapi-[\w-]+"
    r"|\beyJ[\w-]+\.[\w-]+(?:\.[\w-]*)?"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
_HEADER = re.compile(r"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie)(['\"]?\s*[:=]\s*)[^\n]+")
_BEARER = re.compile(r"(?i)\b(bearer) +[\w.+/=~-]{6,}")
_VALUE = r"(?P<value>\[[^\]\n]*\]|\"[^\"\n]*\"|'[^'\n]*'|[^\s,;)}\]]+)"
_FLAG = re.compile(rf"(?P<name>--[A-Za-z][\w.-]*)(?P<between>[ =]){_VALUE}")
_PAIR = re.compile(
    r"(?i)(?P<name>[\w.-]*(?:passw|passphrase|secret|key|credential|token|pwd|auth)[\w.-]*)"
    rf"(?P<between>['\"]?\s*[:=]\s*){_VALUE}"
)
# What stands behind a name in running text, where "key" is often one of a mapping.
_OPAQUE = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w+/=-]{8,}")
_URL = re.compile(r"\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s\"'<>`,)\]}]+")
_PUBLIC = {"docs.sglang.ai", "docs.vllm.ai", "github.com", "huggingface.co", "pytorch.org"}
_LOCAL = {"localhost", "127.0.0.1", "0.0.0.0", "::1", "::"}
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:.])")
_MACHINE = re.compile(
    r"\b(?=[\w.-]*[\d-])[a-zA-Z0-9][\w-]*(?:\.[\w-]+)*"
    r"\.(?:corp|internal|intranet|lan|local|localdomain|svc)\b"
)
_EMAIL = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")
_HOMES = re.compile(r"(?i)(/home/|/users/|\\users\\)[^/\\\s:'\",]+")
# Names that many have, and that stand for other things too.
_COMMON = {"admin", "docker", "gpu", "host", "main", "node", "nobody", "root", "server", "sglang"}
_COMMON |= {"localhost", "ubuntu", "user", "vllm", "worker", ""}


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def is_secret(name: str, value: str) -> bool:
    """Whether what is called so is a secret; a count of tokens is none."""
    if _SECRET_PARTS.search(name):
        return True
    words = set(_words(name))
    if words.isdisjoint(_SECRET_WORDS):
        return False
    return not _NUMBERS.fullmatch(value) or not words.isdisjoint(_ALWAYS)


def _is_secret_in_text(name: str, value: str) -> bool:
    if _SECRET_PARTS.search(name):
        return True
    words = _words(name)
    if not words or words[-1] not in _SECRET_WORDS:
        return False
    is_named = words[-1] in ("auth", "pat", "pwd", "token") and not _NUMBERS.fullmatch(value)
    return is_named or not _ALWAYS.isdisjoint(words) or _OPAQUE.fullmatch(value) is not None


class Redactor:
    """Takes out what one environment has to hide; a secret of under 6 characters only by name."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._known: list[tuple[str, str]] = []
        for name, value in environ.items():
            if is_secret(name, value) and name not in ("PWD", "OLDPWD"):
                self.learn(value)
        home = str(Path.home())
        if home != "/":
            self.learn(home, "~", shortest=2)
        for name in {environ.get("HOSTNAME", ""), socket.gethostname()} - _COMMON:
            self.learn(name, HOST, shortest=3)
        for name in {environ.get("USER", ""), environ.get("LOGNAME", ""), _user()} - _COMMON:
            self.learn(name, USER, shortest=3)

    def learn(self, text: str, instead: str = SECRET, shortest: int = 6) -> None:
        """From here on this text, as a word of its own, is replaced wherever it stands."""
        if len(text) >= shortest:
            self._known.append((text, instead))
            self._known.sort(key=lambda known: -len(known[0]))

    def value(self, name: str, value: str) -> str:
        """The value of what is called so: of a flag, a variable or a field."""
        if is_secret(name, value):
            self.learn(value)
            for word in value.split():
                self.learn(word)
            return SECRET
        if _NUMBERS.fullmatch(value):
            return value
        words = _words(name)
        host = value.rpartition(":")[0] or value
        if words and words[-1] in _HOST_WORDS and "://" not in value and host not in _LOCAL:
            self.learn(host, HOST)
            return HOST
        try:
            found = json.loads(value)
        except ValueError:
            found = None
        if isinstance(found, dict | list):
            return json.dumps(self.tree(found, name))
        is_text = not _PROMPT_WORDS.isdisjoint(words) and re.search(r"\s|{", value)
        if is_text or "\n" in value or len(value) > _LONGEST:
            return f"<{len(value)} characters left out>"
        return self.text(value)

    def tree(self, found: Any, name: str) -> Any:
        """A JSON value that a user wrote; strings by the name of their field."""
        if isinstance(found, dict):
            return {self.text(str(key)): self.tree(item, str(key)) for key, item in found.items()}
        if isinstance(found, list):
            return [self.tree(item, name) for item in found]
        if isinstance(found, str):
            return self.value(name, found)
        return SECRET if is_secret(name, json.dumps(found)) else found

    def texts(self, found: Any) -> Any:
        """A JSON value of ours; every string as running text."""
        if isinstance(found, dict):
            return {self.text(str(key)): self.texts(item) for key, item in found.items()}
        if isinstance(found, list | tuple):
            return [self.texts(item) for item in found]
        return self.text(found) if isinstance(found, str) else found

    def text(self, text: str) -> str:
        """Running text, such as a line of a log."""
        text = _URL.sub(_url, text)  # first: what stands in for a part of it would end it
        text = _HEADER.sub(rf"\1\2{SECRET}", text)
        text = _BEARER.sub(rf"\1 {SECRET}", text)
        text = _PAIR.sub(_pair, _FLAG.sub(_flag, text))
        for known, instead in self._known:
            text = re.sub(rf"(?<!\w){re.escape(known)}(?!\w)", instead, text)
        text = _FORMS.sub(SECRET, text)
        text = _MACHINE.sub(HOST, _EMAIL.sub("<email>", text))
        text = _HOMES.sub(rf"\1{USER}", text)
        return _IPV6.sub(_address, _IPV4.sub(_address, text))


def _flag(match: re.Match[str]) -> str:
    secret = is_secret(match["name"], match["value"].strip("[]\"'"))
    return f"{match['name']}{match['between']}{SECRET}" if secret else match[0]


def _pair(match: re.Match[str]) -> str:
    secret = _is_secret_in_text(match["name"], match["value"].strip("[]\"'"))
    return f"{match['name']}{match['between']}{SECRET}" if secret else match[0]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""  # a container's user need have no name


def _url(match: re.Match[str]) -> str:
    try:
        parts = urlsplit(match[0])
        host, port = parts.hostname or "", f":{parts.port}" if parts.port else ""
    except ValueError:
        return SECRET
    if host in _PUBLIC:
        return f"{parts.scheme}://{host}{parts.path}"
    if host in _LOCAL:
        return f"{parts.scheme}://{host}{port}{parts.path}"
    return f"{parts.scheme}://{HOST}"


def _address(match: re.Match[str]) -> str:
    try:
        ipaddress.ip_address(match[0])
    except ValueError:
        return match[0]
    return match[0] if match[0] in _LOCAL else "<address>"
