"""How a model is put on an execution provider: its name, its options and its plugin, natively."""

from __future__ import annotations

import importlib
from typing import Any

from phid import nvidia
from phid.errors import Code, Refused
from phid.jobs import Load
from phid.native import og
from phid.providers import CPU, PROVIDERS

GRAPHS = ("decoder", "vision", "embedding")


def place(config: Any, load: Load) -> None:
    """Have the model run on `load.provider` and on nothing else that its own files may name.

    Options that its configuration gives for that provider hold where `load` says nothing. Raises
    Refused where the provider's plugin cannot be taken in.
    """
    provider = PROVIDERS[load.provider]
    config.clear_providers()
    if provider.name == CPU:
        return
    if provider.plugin is not None:
        _register(provider.plugin, provider.shown)
    if provider.name == "cuda":
        nvidia.preload()
    config.append_provider(provider.runtime)
    for name, value in load.options:
        config.set_provider_option(provider.runtime, name, value)


def sessions(load: Load, config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What is put over the `model` of genai_config.json so that each graph's session has `options`.

    A graph without options of its own has the decoder's, with the provider that `place` puts there.
    Giving it any would take that provider away: on CUDA, the CPU computed the pictures. A graph
    that has its own gets the provider here.
    """
    told: dict[str, Any] = {"decoder": {"session_options": options}}
    for graph in GRAPHS[1:]:
        if "session_options" in config.get(graph, {}):
            own = dict(options)
            if load.provider != CPU:
                runtime = PROVIDERS[load.provider].runtime
                own["provider_options"] = [{runtime: dict(load.options)}]
            told[graph] = {"session_options": own}
    return told


def _register(plugin: str, shown: str) -> None:
    """Take in a plugin's library, where its package is installed; else it may be built in."""
    try:
        module = importlib.import_module(plugin)
    except ImportError:
        return
    try:
        og.register_execution_provider_library(module.get_ep_name(), module.get_library_path())
    except (AttributeError, OSError, RuntimeError) as error:
        raise Refused(Code.INTERNAL, f"the plugin of {shown} cannot be loaded: {error}") from None
