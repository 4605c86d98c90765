"""`dsa doctor`: what a host does with DSA here or on another GPU, and what stands in the way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dsa_plugin.doctor.command_line import Command
    from dsa_plugin.doctor.findings import Finding
    from dsa_plugin.doctor.report import Report
    from dsa_plugin.doctor.serving import Serving

_GPUS = 8  # of the machines that most GPUs are sold in


def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Folder, repository or registered release; both families otherwise."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="A GPU that this machine lacks, as `dsa plan` names it.")
    ] = None,
    count: Annotated[int, typer.Option(help="GPUs of that machine, with --gpu.")] = _GPUS,
    host: Annotated[
        str | None, typer.Option(help="vllm or sglang; the one installed here.")
    ] = None,
    command: Annotated[
        list[str] | None,
        typer.Argument(help="After --: a command line that starts a host, to ask about it alone."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Write what a bug report needs into this file, without secrets."),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="A server's log, of which the bundle takes the end.")
    ] = None,
) -> None:
    """Say what the host installed here would run for DSA, what the plugin does, and every blocker.

    The host's own code chooses, told that it is on that GPU with all that its GPU builds bring; a
    refusal is in its words. Only with --model is it asked whether the weights fit.

    After -- it says of each flag whether it is served, refused or of no concern to the plugin.
    --bundle asks about this machine alone, whatever stands in the way.

    Exits with 0 where everything asked about is served, by the plugin or by the host alone, or the
    bundle is written; with 1 where something stands in the way; with 2 where the command itself is
    wrong.
    """
    from dsa_plugin.cli.model_config import find_model
    from dsa_plugin.doctor.command_line import examine_command
    from dsa_plugin.doctor.redact import Redactor
    from dsa_plugin.doctor.report import FAMILIES, make_report
    from dsa_plugin.env import Env
    from dsa_plugin.planning.gpus import find_gpu
    from dsa_plugin.probe.ask import Target
    from dsa_plugin.recipes.launch import host_here

    if bundle is not None:
        _refuse_beside_bundle(gpu=gpu, host=host, json=as_json)
        _bundle(bundle, command or [], model, log)
        return
    if log is not None:
        raise ValueError("--log goes into a bundle; name its file with --bundle FILE")
    Env.load()
    if count < 1:
        raise ValueError(f"--count is {count}; allowed: an integer >= 1")
    if command:
        gpu_of = find_gpu(gpu) if gpu else None
        target = Target.of(gpu_of, count) if gpu_of else Target.here()
        # What is printed is what is pasted into an issue.
        examined = examine_command(command, target).redacted(Redactor({}))
        if as_json:
            print(json.dumps(dataclasses.asdict(examined), indent=1))
        else:
            _show_command(examined)
        raise typer.Exit(not examined.finding.ok)
    report = make_report(
        host_here(host),
        {name: find_model(name) for name in ([model] if model else FAMILIES)},
        find_gpu(gpu) if gpu else None,
        count,
        sized=model is not None,
    )
    if as_json:
        print(json.dumps(_as_json(report), indent=1))
    else:
        _show(report)
    raise typer.Exit(report.blocked)


def _refuse_beside_bundle(**given: object) -> None:
    for flag in (name for name, value in given.items() if value):
        raise ValueError(f"--{flag} beside --bundle, which is of this machine; drop one of the two")


def _bundle(path: Path, command: list[str], model: str | None, log: Path | None) -> None:
    import os

    from dsa_plugin.doctor.bundle import Asked, check_writable, make_bundle, write_bundle

    check_writable(path)
    made = make_bundle(Asked(command, model, log), os.environ)
    size = write_bundle(made, path)
    failed = [name for name, found in made.items() if isinstance(found, dict) and "error" in found]
    print(f"{path.resolve()}: {size / 1024:.0f} KB of JSON: {', '.join(made)}")
    if failed:
        print(f"Not whole, with the reason in the file: {', '.join(failed)}")
    print("Keys, tokens, passwords, prompts, and names of people and machines were taken out.")
    print("Read it before you attach it to an issue.")


def _show_command(command: Command) -> None:
    print(_line(command.finding))
    for switch in command.switches:
        shown = f"{switch.name} {switch.value}".rstrip()
        print(f"  {switch.classed.replace('_', ' '):12} {shown}: {switch.reason}")


def _as_json(report: Report) -> dict[str, Any]:
    serving = [dataclasses.asdict(s) | {"blocker": s.blocker} for s in report.serving]
    return dataclasses.asdict(report) | {"serving": serving, "blocked": report.blocked}


def _show(report: Report) -> None:
    machine = f"{report.count} x {report.gpu}" if report.count else report.gpu
    print(f"{report.host} on {machine}\n")
    for finding in report.findings:
        print(_line(finding))
        if finding.remedy:
            print(f"     what would work: {finding.remedy}")
    for serving in report.serving:
        _show_serving(serving)
    if not report.serving:
        print("\nNothing more can be asked.")


def _line(finding: Finding) -> str:
    return f"{'ok  ' if finding.ok else 'FAIL'} {finding.what}: {finding.text}"


def _show_serving(serving: Serving) -> None:
    by = {"dsa_plugin": "the plugin", None: "nobody"}.get(serving.served_by, serving.served_by)
    print(f"\n{serving.model}, --kv-cache-dtype {serving.cache_dtype}: served by {by}")
    if serving.blocker:
        print(f"  FAIL {serving.blocker}")
    if serving.native_error:
        print(f"  {serving.host} alone: no: {serving.native_error}")
    for kernel in serving.native:
        verdict = "not checked before it runs" if kernel.verdict == "unchecked" else kernel.verdict
        print(f"  {kernel.op:15} {serving.host} alone: {verdict}: {kernel.text}")
        print(f"  {'':15} the plugin: {serving.ours.get(kernel.op, 'does not run')}")
