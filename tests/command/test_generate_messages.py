"""DeepSeek-V3.2's message encoding: its published examples, and vLLM's encoder."""

from __future__ import annotations

import json
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from dsa_plugin.chat.pieces import split_reasoning
from dsa_plugin.generate.deepseek_v32_messages import END, encode_messages, parse_answer

PUBLISHED = Path(__file__).resolve().parents[1] / "dsa_testbed" / "data" / "deepseek_v32"
Message = dict[str, Any]


def published(name: str) -> str:
    return (PUBLISHED / name).read_text(encoding="utf-8").strip()


def call(name: str, **arguments: Any) -> Message:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"type": "function", "function": function}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


SYSTEM: Message = {"role": "system", "content": "Be brief."}
TOOL: Message = {
    "type": "function",
    "function": {"name": "天气", "description": "{x}", "parameters": {"type": "object"}},
}
CALLS = [call("天气", where="Zürich", days=3), call("now")]
ASKED: list[Message] = [user("Wie ist das Wetter?"), {"role": "assistant", "tool_calls": CALLS}]
REASONED: list[Message] = [ASKED[0], {**ASKED[1], "reasoning_content": "Look it up."}]
RESULTS: list[Message] = [{"role": "tool", "content": "rain"}, {"role": "tool", "content": "12:00"}]
DONE: Message = {"role": "assistant", "reasoning_content": "It rains.", "content": "Rain."}
CONVERSATIONS: dict[str, list[Message]] = {
    "one question": [user("hello")],
    "system": [SYSTEM, user("hello")],
    "reasoning is dropped": [SYSTEM, user("hello"), DONE, user("1+1=?")],
    "reasoning is kept": [user("hello"), DONE],
    "calls without reasoning": [*ASKED, *RESULTS],
    "calls": [*REASONED, *RESULTS],
    "results of one call of two": [*REASONED, RESULTS[0]],
    "after calls": [*REASONED, *RESULTS, DONE, user("And tomorrow?")],
    "calls again": [*REASONED, *RESULTS, *REASONED, *RESULTS],
    "response format": [{**SYSTEM, "response_format": {"type": "object"}}, user("hello")],
    "tools": [{**SYSTEM, "tools": [TOOL, TOOL]}, user("hello")],
    "developer": [{"role": "developer", "content": "hello", "tools": [TOOL]}],
    "developers": [
        {"role": "developer", "content": "hello"},
        DONE,
        {"role": "developer", "content": "again", "response_format": {"a": "ü"}},
    ],
}


def test_the_published_example() -> None:
    """A conversation of two questions, with tools, several calls at once, and their results."""
    given = json.loads(published("test_input.json"))
    encoded = encode_messages(given["messages"], thinking=True, tools=given["tools"])
    assert encoded == published("test_output.txt")


def test_the_published_search_agent() -> None:
    """A developer's message with tools, and the first answer, which parses into what it was."""
    text = published("test_output_search_w_date_begin.txt")
    schemas = text.split("<functions>\n")[1].split("\n</functions>")[0].splitlines()
    asked = text.split("# The user's message is: ")[1].split("<｜Assistant｜>")[0]
    answer = parse_answer(text.split("<think>")[-1].removesuffix(END), thinking=True)
    assert [c["function"]["name"] for c in answer["tool_calls"]] == ["search", "search"]
    assert json.loads(answer["tool_calls"][0]["function"]["arguments"])["topn"] == 10
    tools = [{"type": "function", "function": json.loads(schema)} for schema in schemas]
    messages = [{"role": "developer", "content": asked}, answer]
    assert encode_messages(messages, thinking=True, tools=tools) == text


@pytest.fixture(scope="module")
def vllms_encoder() -> Any:
    """That file alone: importing vLLM takes long."""
    vllm = find_spec("vllm")
    assert vllm is not None
    assert vllm.origin is not None
    path = Path(vllm.origin).parent / "tokenizers" / "deepseek_v32_encoding.py"
    spec = spec_from_file_location("vllms_encoder", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("thinking", [False, True])
def test_vllms_encoder_agrees(vllms_encoder: Any, name: str, thinking: bool) -> None:
    """But for the empty lines of its text about tools, which the published examples have."""
    messages = CONVERSATIONS[name]
    # Its name of the key.
    renamed = [
        {"reasoning" if k == "reasoning_content" else k: v for k, v in m.items()} for m in messages
    ]
    # With several developers' messages its default, which drops old reasoning, ends in an error;
    # it writes none of that reasoning anyway.
    wanted = vllms_encoder.encode_messages(
        renamed, "thinking" if thinking else "chat", drop_thinking=name != "developers"
    )
    mine = encode_messages(messages, thinking=thinking)
    if any("tools" in message for message in messages):
        mine, wanted = (text.replace("\n\n", "\n") for text in (mine, wanted))
    assert mine == wanted


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("message", [DONE, REASONED[1], {**REASONED[1], "content": "Wait."}])
def test_an_answer_parses_into_its_message(message: Message, thinking: bool) -> None:
    written = encode_messages([ASKED[0], message], thinking=thinking)
    prompt = encode_messages([ASKED[0]], thinking=thinking)
    assert written.startswith(prompt)
    parsed = parse_answer(written.removeprefix(prompt).removesuffix(END), thinking=thinking)
    wanted = {"content": "", **message}
    if not thinking:
        del wanted["reasoning_content"]
    assert parsed == wanted


def test_request_tools_join_the_system_message_or_make_one() -> None:
    joined = encode_messages([SYSTEM, user("hello")], thinking=False, tools=[TOOL])
    assert joined == encode_messages([{**SYSTEM, "tools": [TOOL]}, user("hello")], thinking=False)
    made = encode_messages([user("hello")], thinking=False, tools=[TOOL])
    assert made == joined.replace("Be brief.", "")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "robot", "content": "x"}], "role is 'robot'"),
        ([user("x"), {"role": "assistant", "content": "y"}], "neither reasoning_content"),
        ([user("x"), {"role": "tool", "content": "y"}], "result 1 of the 0 tool calls"),
        ([*REASONED, *RESULTS, RESULTS[0]], "result 3 of the 2 tool calls"),
        ([{"role": "tool", "content": "y"}], "result 1 of the 0 tool calls"),
        ([{"role": "user"}], "content None"),
    ],
)
def test_what_cannot_be_written_is_refused(messages: list[Message], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        encode_messages(messages, thinking=True)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("still reasoning", "ends before its </think>"),
        ('a</think>\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">', "do not end with"),
        (
            'a</think>\n\n<｜DSML｜function_calls>\n<invoke name="f">\n</｜DSML｜function_calls>',
            "none of their form",
        ),
    ],
)
def test_broken_answers_are_refused(answer: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_answer(answer, thinking=True)


@pytest.mark.parametrize("width", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "thinking", "pieces"),
    [
        ("a < b</think>c", True, [("reasoning", "a < b"), ("answer", "c")]),
        ("<think>a</think>b </thin", False, [("reasoning", "a"), ("answer", "b </thin")]),
        ("never ends", True, [("reasoning", "never ends")]),
        ("</think>x", True, [("answer", "x")]),
    ],
)
def test_reasoning_is_told_apart_however_it_comes(
    text: str, thinking: bool, width: int, pieces: list[tuple[str, str]]
) -> None:
    parts = [text[i : i + width] for i in range(0, len(text), width)]
    joined: list[tuple[str, str]] = []
    for kind, piece in split_reasoning(parts, thinking=thinking):
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + piece)
        else:
            joined.append((kind, piece))
    assert joined == pieces
