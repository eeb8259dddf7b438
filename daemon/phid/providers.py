"""The execution providers: their names, here and in the runtime, and what brings them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

CPU = "cpu"
AUTO = "auto"
UNKNOWN = "unknown"
"""The provider where it could not be measured: it is never guessed."""


@dataclass(frozen=True, slots=True)
class Provider:
    """One execution provider.

    `name` is ours, on the wire and in settings (where case does not matter); `runtime` is what
    ONNX Runtime GenAI calls it, `kernels` what a trace's events call it. `packages` are sets of
    distributions, any of which brings it; `install` is the line that makes it so. `plugin` is the
    module that brings its library apart from the runtime's. `small` says that it can run the small
    model that comes with phid: an NPU's compiler takes only models made for it. A card has
    `own_memory`: its model need not fit into the machine's. `slice` is how many tokens of a prompt
    it takes in one call, which nothing can interrupt: a GPU needs many to be busy.
    """

    name: str
    shown: str
    runtime: str
    kernels: str
    packages: tuple[tuple[str, ...], ...]
    install: str
    plugin: str | None = None
    small: bool = True
    own_memory: bool = False
    slice: int = 64


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(
            "cuda",
            "CUDA",
            "cuda",
            "CUDAExecutionProvider",
            (("onnxruntime-genai-cuda", "onnxruntime-gpu"),),
            "pip uninstall -y onnxruntime onnxruntime-genai"
            ' && pip install "onnxruntime-gpu[cuda,cudnn]" onnxruntime-genai-cuda',
            own_memory=True,
            slice=512,
        ),
        Provider(
            "directml",
            "DirectML",
            "DML",
            "DmlExecutionProvider",
            (("onnxruntime-genai-directml", "onnxruntime-directml"),),
            "pip uninstall -y onnxruntime onnxruntime-genai"
            " && pip install onnxruntime-directml onnxruntime-genai-directml",
            own_memory=True,
        ),
        Provider(
            "qnn",
            "QNN",
            "QNN",
            "QNNExecutionProvider",
            (("onnxruntime-genai", "onnxruntime-qnn"),),
            "pip install onnxruntime-qnn",
            plugin="onnxruntime_qnn",
            small=False,
        ),
        Provider(
            "openvino",
            "OpenVINO",
            "OpenVINO",
            "OpenVINOExecutionProvider",
            (
                ("onnxruntime-genai", "onnxruntime-ep-openvino"),
                ("onnxruntime-genai", "onnxruntime-openvino"),
            ),
            "pip install onnxruntime-ep-openvino",
            plugin="onnxruntime_ep_openvino",
        ),
        Provider(
            CPU,
            "CPU",
            CPU,
            "CPUExecutionProvider",
            (
                ("onnxruntime-genai",),
                ("onnxruntime-genai-cuda",),
                ("onnxruntime-genai-directml",),
            ),
            "pip install onnxruntime-genai",
        ),
    )
}
"""By name, in the order in which `auto` tries them."""

_BY_KERNELS = {provider.kernels: provider.name for provider in PROVIDERS.values()}
_ALIASES = {"dml": "directml", "gpu": "cuda", "nvidia": "cuda", "npu": "qnn"}


def canonical(word: str) -> str:
    """The name that a setting's word means, whatever its case.

    Raises ValueError with the nearest name for a word that means none.
    """
    name = word.strip().lower()
    if name in PROVIDERS or name == AUTO:
        return name
    known = [AUTO, *PROVIDERS]
    close = _ALIASES.get(name) or next(iter(difflib.get_close_matches(name, known, 1)), None)
    nearest = f": did you mean {close}?" if close else f": there are {', '.join(known)}"
    raise ValueError(f"{word!r} is no provider{nearest}")


def of_kernels(kernels: str) -> str:
    """Our name for what a trace's event calls its provider; one we do not know keeps its own."""
    return _BY_KERNELS.get(kernels, kernels.removesuffix("ExecutionProvider").lower())


def candidates(wanted: tuple[str, ...], *, strict: bool) -> tuple[str, ...]:
    """The providers to try, in order, each once.

    The CPU comes last where it is not named: a model that answers slowly is better than none. With
    `strict` only those named are tried; `auto` names all but the CPU then.
    """
    every = [name for name in PROVIDERS if not (strict and name == CPU)]
    names = [n for word in wanted for n in (every if word == AUTO else [word])]
    if not strict:
        names.append(CPU)
    return tuple(dict.fromkeys(names))
