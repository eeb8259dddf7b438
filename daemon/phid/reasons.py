"""Why a provider does not run the model, in a user's words, with the line that mends it."""

from __future__ import annotations

import re

from phid.proofs import Evidence
from phid.providers import PROVIDERS

_LIBRARY = re.compile(r"(lib[\w.+-]+\.so[.\d]*): cannot open shared object file")
_JETSON = "a wheel built for this JetPack: see README, On a Jetson"
# What native libraries say, with what it means; the first that is found is told.
_MEANINGS: tuple[tuple[str, str, str], ...] = (
    (
        r"no kernel image is available",
        "its build carries no code for this GPU (no kernel image): it was compiled for others",
        _JETSON + "; on a PC: an older or newer onnxruntime-gpu",
    ),
    (
        r"driver version is insufficient|forward compatibility was attempted",
        "the NVIDIA driver is older than the CUDA of this build",
        "apt-get install a newer nvidia-driver, or an onnxruntime-gpu for this driver's CUDA",
    ),
    (
        r"no CUDA-capable device|CUDA_ERROR_NO_DEVICE|cudaErrorNoDevice",
        "there is no NVIDIA GPU here, or this user may not open it",
        "nvidia-smi (does it list one?); usermod -aG video,render phid",
    ),
    (
        r"out of memory|CUDA_ERROR_OUT_OF_MEMORY|failed to allocate",
        "the model does not fit the device's memory",
        "a smaller model, or engine.max_context",
    ),
    (
        r"has not been built with DML|DML provider requested",
        "this build has no DirectML: it is a part of Windows",
        PROVIDERS["directml"].install,
    ),
    (
        r"default backend path|Unable to load backend|QNN SetupBackend failed|libQnn\w+\.so",
        "the library of its NPU (QNN's backend) cannot be loaded",
        'provider_options.qnn = {backend_path = "libQnnHtp.so"}, on a Qualcomm NPU with its driver',
    ),
    (
        r"execution provider is not supported in this build|is not enabled in this build",
        "its package is there, and finds no device that it can run on",
        "",
    ),
    (
        r"Failed to find .* device|no device (was )?found|No available devices",
        "there is no device for it here",
        "",
    ),
)


def explain(provider: str, evidence: Evidence) -> tuple[str, str | None]:
    """What became of a trial that did not come to an answer, and what mends it."""
    name = PROVIDERS[provider]
    if evidence.mend:
        return evidence.says, evidence.mend
    if evidence.died:
        while_doing = f" ({evidence.stage})" if evidence.stage else ""
        known = meaning(evidence.printed)
        hint = f": {known[0]}" if known else ""
        return f"its process {evidence.died}{while_doing}{hint}", _or_other(name.shown, known)
    found = _LIBRARY.search(evidence.says)
    if found and not found[1].startswith("libQnn"):
        return f"the library {found[1]} is missing", _for_library(found[1], name.install)
    if known := meaning(evidence.says):
        return known[0], _or_other(name.shown, known)
    first = next(iter(evidence.says.strip().splitlines()), "it failed without a word")
    return first[:300], _or_other(name.shown, None)


def meaning(says: str) -> tuple[str, str] | None:
    """What native words amount to, with the line that mends it; None for words we do not know."""
    for pattern, means, mend in _MEANINGS:
        if re.search(pattern, says, re.IGNORECASE):
            return means, mend
    return None


def _for_library(library: str, install: str) -> str:
    if re.match(r"lib(cu|nv)", library):
        return 'pip install "onnxruntime-gpu[cuda,cudnn]" (or apt-get install cuda-toolkit, cudnn)'
    return f"apt-file search {library} names the Debian package; or {install}"


def _or_other(shown: str, known: tuple[str, str] | None) -> str:
    return (known[1] if known else "") or f"leave {shown} out of providers, or mend its driver"
