"""`dsa chat`: a prompt line against a server."""

from typing import Annotated

import typer


def chat(
    server: Annotated[
        str,
        typer.Argument(
            metavar="URL|RECIPE", help="Of a server of OpenAI's API; or what `dsa serve` started."
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Where the server has several.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="Reason first; the server's default."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="The server's unless given.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of an answer.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Of a server that wants one.")
    ] = None,
) -> None:
    """Talk to a server, line by line; /reset, /quit, and Ctrl-C stops an answer."""
    from dsa_plugin.chat.address import server_url
    from dsa_plugin.chat.server import Asking, Server
    from dsa_plugin.cli.prompt_line import converse

    asked = Server(server_url(server), model, api_key, Asking(temperature, max_tokens, thinking))
    print(f"{asked.model} at {asked.url}")
    converse(asked.answer, system)
