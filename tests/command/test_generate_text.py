"""`dsa generate`'s text: the demo model by a prompt line, files of prompts, chat templates."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dsa_plugin import cli
from dsa_plugin.generate.deepseek_v32_messages import encode_messages
from dsa_plugin.generate.prompts import Asked, read_prompts
from dsa_plugin.generate.text import Text, texts
from dsa_testbed.checkpoint import load_config, make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "checkpoints" / "demo"
KEYS = "The amber key is with Nora. The green key is with Otto. "
AMBER, GREEN = (f"{KEYS}Question: who has the {key} key?" for key in ("amber", "green"))


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dsa_plugin.cli", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.descriptor, self.shown = ours, ""

    def until(self, text: str, seconds: float = 300) -> str:
        """What is shown up to, and with, some text."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self.descriptor], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.shown!r}"
            try:
                self.shown += os.read(self.descriptor, 4096).decode()
            except OSError as error:  # how a terminal ends
                raise AssertionError(f"ended before {text!r}: {self.shown!r}") from error
        found, _, self.shown = self.shown.partition(text)
        return found + text

    def type(self, line: str) -> None:
        os.write(self.descriptor, line.encode() + b"\n")


def test_a_prompt_line() -> None:
    terminal = Terminal("generate", str(DEMO), "--interactive")
    terminal.until("Ctrl-C stops an answer")
    for question, answer in ((AMBER, "Nora"), (GREEN, "Otto")):
        terminal.until(">>> ")
        terminal.type(question)
        assert answer in terminal.until("\r\n>>> ").replace(question, "").splitlines()[-2]
        terminal.type("/reset")
        terminal.until("forgotten")
    terminal.until(">>> ")
    terminal.type("/quit")
    assert terminal.process.wait(60) == 0
    os.close(terminal.descriptor)


def test_a_file_of_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same by each form of a file, in bf16 too."""
    plain, lines = tmp_path / "questions.txt", tmp_path / "questions.jsonl"
    plain.write_text(f"{AMBER}\n\n{GREEN}\n")
    messages = [{"role": "user", "content": AMBER}]
    written = [{"messages": messages}, {"prompt": f"{GREEN}\nAnswer:"}]
    lines.write_text("".join(json.dumps(each) + "\n" for each in written))
    for path, *flags in ((plain,), (lines,), (plain, "--dtype", "bf16")):
        arguments = [str(DEMO), "--prompts", str(path), "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", ["dsa", "generate", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code in (0, None)
        shown = capsys.readouterr()
        told = [json.loads(line) for line in shown.out.splitlines()]
        assert ["Nora" in told[0]["text"], "Otto" in told[1]["text"]] == [True, True]
        assert {each["finish_reason"] for each in told} == {"stop"}
        assert told[0]["message"] == {"role": "assistant", "content": told[0]["text"]}
        assert "tokens read at" in shown.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give one of --prompt TEXT, --prompts FILE and --interactive"),
        (["--prompt", "x", "--interactive"], "give one of"),
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "x", "--device", "cuda"], "finds 0 GPUs"),
    ],
)
def test_bad_flags(
    flags: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["dsa", "generate", str(DEMO), *flags])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_prompts_of_files(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("one\n\n two\n")
    system = {"role": "system", "content": "S"}
    user = [{"role": "user", "content": text} for text in ("one", " two")]
    assert read_prompts(plain) == [Asked([user[0]]), Asked([user[1]])]
    assert read_prompts(plain, "S") == [Asked([system, user[0]]), Asked([system, user[1]])]
    lines = tmp_path / "a.jsonl"
    tool = {"type": "function"}
    given: list[Any] = [{"prompt": "x"}, {"messages": user}, {"messages": user, "tools": [tool]}]
    lines.write_text("\n".join(map(json.dumps, given)))
    assert read_prompts(lines) == [Asked(text="x"), Asked(user), Asked(user, [tool])]


@pytest.mark.parametrize(
    "line", ['"x"', "{", "{}", '{"prompt": 1}', '{"messages": ["x"]}', '{"prompt": "x", "n": 1}']
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n' + line)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is"):
        read_prompts(path)


def test_a_file_without_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(tmp_path / "a.txt")


def test_the_template_of_a_checkpoint_is_used() -> None:
    text = Text(DEMO)
    messages = [{"role": "user", "content": " hello "}]
    assert text.chat(messages) == "hello\nAnswer:"
    assert text.tokens_of_chat("hello\nAnswer:") == text.tokens("hello\nAnswer:")


def test_a_template_is_told_to_think(tmp_path: Path) -> None:
    """By both names of it, and only where that was asked for."""
    folder = Path(shutil.copytree(DEMO, tmp_path / "demo"))
    switches = ("thinking", "enable_thinking")
    template = "".join(f"{{{{ {name} | default('unsaid') }}}} " for name in switches)
    (folder / "chat_template.jinja").write_text(template + "{{ tools | length if tools else 0 }}")
    text = Text(folder)
    messages = [{"role": "user", "content": "x"}]
    assert text.chat(messages) == "unsaid unsaid 0"
    assert text.chat(messages, True) == "True True 0"
    assert text.chat(messages, False, [{"type": "function"}]) == "False False 1"


def test_without_a_template_deepseek_has_its_encoding_and_glm_none() -> None:
    messages = [{"role": "user", "content": "hello"}]
    text = Text(make_checkpoint("v32"))
    assert text.chat(messages, True) == encode_messages(messages, thinking=True)
    answer = text.message("So.</think>Hi.", text.chat(messages, True))
    assert answer == {"role": "assistant", "content": "Hi.", "reasoning_content": "So."}
    folder = make_checkpoint("glm5")
    with pytest.raises(ValueError, match="has no chat template"):
        Text(folder).chat(messages)
    assert load_config(folder)["model_type"] == "glm_moe_dsa"


def test_text_comes_in_whole_characters() -> None:
    text = Text(make_checkpoint("v32"))
    for whole in ("Zürich, 東京 🦊!", "ends within 東"):
        tokens = text.tokens(whole)
        assert len(tokens) > len(set(whole)) / 2
        pieces = list(texts(iter(tokens), text.decode))
        assert "".join(pieces) == whole
        assert not any("\ufffd" in piece for piece in pieces)
    cut = text.tokens("東")[:-1]
    assert list(texts(iter(cut), text.decode)) == ["\ufffd"]
