"""CUDA's libraries out of NVIDIA's Python packages, where a runtime by itself would not look."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

# Libraries that the runtime and its CUDA provider link or open later, each after those it needs.
_LIBRARIES = ("cudart", "cublasLt", "cublas", "nvrtc", "nvJitLink", "curand", "cufft", "cudnn")


def preload(
    folders: list[Path] | None = None, load: Callable[[str], object] = ctypes.CDLL
) -> list[Path]:
    """Load the libraries that `pip install "onnxruntime-gpu[cuda,cudnn]"` has brought.

    Gives their files. They lie in site-packages, where neither the loader nor ONNX Runtime's own
    library looks; once they are in the process, they are found by name. Where no package brings
    them nothing is done, and the system's are taken. One that cannot be loaded is left out: the
    runtime says which it misses.
    """
    loaded = []
    for name in _LIBRARIES:
        for folder in _folders() if folders is None else folders:
            # In nvidia/cu13/lib since CUDA 13, and before in a folder for each: nvidia/cublas/lib.
            for path in sorted(folder.glob(f"*/lib/lib{name}.so.*")):
                try:
                    load(str(path))
                except OSError:
                    continue
                loaded.append(path)
    return loaded


def _folders() -> list[Path]:
    found = importlib.util.find_spec("nvidia")
    places = found.submodule_search_locations if found is not None else None
    return [Path(place) for place in places or ()]
