"""DeepSeek-V3.2's message encoding: its checkpoints ship it as a script, and no chat template.

https://huggingface.co/deepseek-ai/DeepSeek-V3.2/tree/main/encoding. Messages are OpenAI's, with
`reasoning_content` of assistants, `tools` and `response_format` of a system or developer message.
The text of `_TOOLS` is what the model was trained on, so it is DeepSeek's to the letter (MIT).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsa_plugin.chat.pieces import END_THINK, THINK

Message = Mapping[str, Any]

END = "<｜end▁of▁sentence｜>"

_BEGIN = "<｜begin▁of▁sentence｜>"
_USER, _ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
_CALLS, _END_CALLS = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
_INVOKE, _END_INVOKE = "<｜DSML｜invoke", "</｜DSML｜invoke>"
_PARAMETER, _END_PARAMETER = "<｜DSML｜parameter", "</｜DSML｜parameter>"
_TOOLS = f"""## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "{_CALLS}" block like the following as part of your reply to \
the user:
{_CALLS}
{_INVOKE} name="$FUNCTION_NAME">
{_PARAMETER} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{_END_PARAMETER}
...
{_END_INVOKE}
{_INVOKE} name="$FUNCTION_NAME2">
...
{_END_INVOKE}
{_END_CALLS}

String and scalar parameters should be specified as is without any escaping or quotes, while lists \
and objects should use JSON format. The "string" attribute should be set to "true" for string type \
parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider \
outputting a thinking block. Here is an example:

{_CALLS}
...
{_END_CALLS}

<function_results>
...
</function_results>

{THINK}...thinking about results{END_THINK}

Here are the functions available in JSONSchema format:
<functions>
SCHEMAS
</functions>
"""
_RESPONSE_FORMAT = (
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
)
_ONE_INVOKE = re.compile(rf'{_INVOKE} name="(.*?)">\n(.*?)\n?{_END_INVOKE}\n', re.DOTALL)
_ONE_PARAMETER = re.compile(
    rf'{_PARAMETER} name="(.*?)" string="(true|false)">(.*?){_END_PARAMETER}\n', re.DOTALL
)


def encode_messages(
    messages: Sequence[Message], *, thinking: bool, tools: Sequence[Message] = ()
) -> str:
    """The prompt of a conversation, up to where the assistant goes on.

    Reasoning is kept in what follows the last user's or developer's message alone.

    Args:
        messages: of system, developer, user, assistant and tool.
        thinking: whether the assistant is to reason first.
        tools: added to the first message if that is a system's or developer's, else put before it.

    Raises:
        ValueError: a message that the encoding cannot express; says which.
    """
    messages = _with_tools(messages, tools)
    asking = [i for i, message in enumerate(messages) if message["role"] in ("user", "developer")]
    newest = asking[-1] if asking else -1
    return _BEGIN + "".join(
        _render(messages, index, thinking and index >= newest) for index in range(len(messages))
    )


def parse_answer(text: str, *, thinking: bool) -> dict[str, Any]:
    """What the assistant wrote, without its end token, as a message.

    Raises:
        ValueError: it is no whole answer, or calls tools in another form.
    """
    reasoning, found, rest = text.partition(END_THINK) if thinking else ("", "yes", text)
    if not found:
        raise ValueError(f"the answer ends before its {END_THINK}; allow it more tokens")
    content, found, calls = rest.partition(f"\n\n{_CALLS}\n")
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["reasoning_content"] = reasoning
    if found:
        if not calls.endswith(_END_CALLS):
            raise ValueError(f"the tool calls do not end with {_END_CALLS}: {calls[-60:]!r}")
        message["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": _arguments(parameters)}}
            for name, parameters in _matches(_ONE_INVOKE, calls.removesuffix(_END_CALLS))
        ]
    return message


def _with_tools(messages: Sequence[Message], tools: Sequence[Message]) -> list[Message]:
    for message in messages:
        if message.get("role") not in _RENDERERS:
            raise ValueError(
                f"a message's role is {message.get('role')!r}; allowed: {', '.join(_RENDERERS)}"
            )
    if not tools:
        return list(messages)
    if messages and messages[0]["role"] in ("system", "developer"):
        return [{**messages[0], "tools": tools}, *messages[1:]]
    return [{"role": "system", "tools": tools}, *messages]


def _render(messages: Sequence[Message], index: int, thinking: bool) -> str:
    """One message; `thinking`: it is, or follows, the last user's, and reasoning is wanted."""
    return _RENDERERS[messages[index]["role"]](messages, index, thinking)


def _render_system(messages: Sequence[Message], index: int, _thinking: bool) -> str:
    return (messages[index].get("content") or "") + _extras(messages[index])


def _render_developer(messages: Sequence[Message], index: int, thinking: bool) -> str:
    asked = f"{_extras(messages[index])}\n\n# The user's message is: {_content(messages, index)}"
    return f"{_USER}{asked}{_ASSISTANT}{THINK if thinking else END_THINK}"


def _render_user(messages: Sequence[Message], index: int, thinking: bool) -> str:
    return f"{_USER}{_content(messages, index)}{_ASSISTANT}{THINK if thinking else END_THINK}"


def _render_assistant(messages: Sequence[Message], index: int, thinking: bool) -> str:
    message = messages[index]
    calls = message.get("tool_calls") or ()
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    if thinking and not (reasoning or calls):
        raise ValueError(
            f"message {index} follows the last user's and has neither reasoning_content nor "
            "tool_calls: give it one, or encode without thinking"
        )
    text = (reasoning + END_THINK if thinking else "") + (message.get("content") or "")
    if calls:
        invokes = "\n".join(_invoke(call["function"]) for call in calls)
        text += f"\n\n{_CALLS}\n{invokes}\n{_END_CALLS}"
    return text + END


def _render_tool(messages: Sequence[Message], index: int, thinking: bool) -> str:
    caller = index
    while caller >= 0 and messages[caller]["role"] == "tool":
        caller -= 1
    calls = messages[caller].get("tool_calls") or () if caller >= 0 else ()
    number = index - caller
    if number > len(calls):
        raise ValueError(
            f"message {index} is result {number} of the {len(calls)} tool calls before it; each "
            "result answers one tool call of the assistant's message before"
        )
    text = "\n\n<function_results>" if number == 1 else ""
    text += f"\n<result>{_content(messages, index)}</result>"
    if number == len(calls):
        text += f"\n</function_results>\n\n{THINK if thinking else END_THINK}"
    return text


_RENDERERS = {
    "system": _render_system,
    "developer": _render_developer,
    "user": _render_user,
    "assistant": _render_assistant,
    "tool": _render_tool,
}


def _content(messages: Sequence[Message], index: int) -> str:
    content = messages[index].get("content")
    if not isinstance(content, str):
        raise ValueError(
            f"message {index}, of role {messages[index]['role']}, has the content {content!r}; it "
            "must be text"
        )
    return content


def _extras(message: Message) -> str:
    """Tools and response format of a system's or developer's message."""
    text = ""
    if tools := message.get("tools"):
        schemas = "\n".join(_json(tool["function"]) for tool in tools)
        text += "\n\n" + _TOOLS.replace("SCHEMAS", schemas)
    if schema := message.get("response_format"):
        text += "\n\n" + _RESPONSE_FORMAT + _json(schema)
    return text


def _invoke(function: Message) -> str:
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    parameters = "\n".join(
        f'{_PARAMETER} name="{name}" string="true">{value}{_END_PARAMETER}'
        if isinstance(value, str)
        else f'{_PARAMETER} name="{name}" string="false">{_json(value)}{_END_PARAMETER}'
        for name, value in arguments.items()
    )
    return f'{_INVOKE} name="{function["name"]}">\n{parameters}\n{_END_INVOKE}'


def _arguments(parameters: str) -> str:
    """The parameters of one call as JSON, as OpenAI's messages have them."""
    found = _matches(_ONE_PARAMETER, parameters + "\n" if parameters else "")
    return _json({n: v if kind == "true" else json.loads(v) for n, kind, v in found})


def _matches(pattern: re.Pattern[str], text: str) -> list[tuple[str, ...]]:
    """The groups of each match; what is between matches is an error."""
    if left := pattern.sub("", text):
        raise ValueError(f"the tool calls hold {left[:60]!r}, which is none of their form")
    return [match.groups() for match in pattern.finditer(text)]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
