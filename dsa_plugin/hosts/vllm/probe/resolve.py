"""What vLLM makes of a command line: its parser, and its configuration on a target.

`python -m dsa_plugin.hosts.vllm.probe.resolve`, as `dsa_plugin.probe.ask` runs it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from vllm import __version__
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.models import ModelRegistry
from vllm.plugins import load_general_plugins

from dsa_plugin.hosts.vllm import register
from dsa_plugin.hosts.vllm.probe.command import COMMAND, serve_parser
from dsa_plugin.hosts.vllm.probe.pretend import prepare, pretend, pretend_build
from dsa_plugin.probe.ask import Answer, Question, Target, answer, check_flags
from dsa_plugin.probe.our_kernels import our_kernels
from dsa_plugin.probe.switches import spellings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def resolve(question: Question) -> Answer:
    """As `vllm serve` does, up to where it starts processes."""
    if question.target:
        pretend(question.target)
    load_general_plugins()
    parser = serve_parser()
    parser.error = _refuse  # its own prints all of its usage
    check_flags(question.arguments, parser._option_string_actions, f"vLLM {__version__}")
    args = parser.parse_args(question.arguments)
    args.model = args.model_tag or args.model  # as ServeSubcommand.cmd does
    COMMAND.validate(args)
    if question.target is None:
        return Answer(None, {"spellings": spellings(parser)})
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(headless=args.headless)
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    model_class: Any = ModelRegistry.models[model.architecture]
    return Answer(
        None,
        {
            "served_by": model_class.module_name.partition(".")[0],
            "kv_cache_dtype": cache.cache_dtype,
            "max_model_len": model.max_model_len,
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "data_parallel_size": parallel.data_parallel_size,
            "enable_expert_parallel": parallel.enable_expert_parallel,
            **(_kernels(config, question.target) if question.kernels else {}),
        },
    )


def _kernels(config: VllmConfig, target: Target) -> dict[str, Any]:
    """What runs each op: the host's own, and ours where the host has loaded the plugin."""
    pretend_build(target)
    from dsa_plugin.hosts.vllm.probe.native import native_kernels

    native = [asdict(kernel) for kernel in native_kernels(config)]
    loaded = register.cache_info().currsize > 0
    fp8_latents = config.cache_config.cache_dtype.startswith("fp8")
    return {"native": native, "ours": our_kernels(fp8_latents=fp8_latents) if loaded else {}}


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


if __name__ == "__main__":
    prepare()
    answer(resolve)
