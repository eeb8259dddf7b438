"""ONNX graphs with weights in files beside them, and whole folders that look like models."""

from __future__ import annotations

import json
from pathlib import Path

from onnx import TensorProto, helper


def weighty_graph(weights: dict[str, tuple[str, int, int]], *, looked_up: str = "") -> bytes:
    """A graph whose weights are at (file, offset, length); of one only rows are taken."""
    tensors = []
    for name, (location, offset, length) in weights.items():
        tensor = TensorProto(name=name, dims=[length], data_type=TensorProto.UINT8)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": offset, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    nodes = [
        helper.make_node("Gather" if name == looked_up else "Identity", [name], [f"{name}_out"])
        for name in weights
    ]
    graph = helper.make_graph(nodes, "g", [], [], tensors)
    return bytes(helper.make_model(graph).SerializeToString())


def model_folder(path: Path, *, data: bytes = b"weights" * 4000, vocabulary: int = 10) -> Path:
    """A folder that has all that a text model has, but for sense."""
    path.mkdir(parents=True)
    config = {
        "model": {
            "type": "llama",
            "context_length": 4096,
            "vocab_size": vocabulary,
            "decoder": {
                "filename": "model.onnx",
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
                "head_size": 16,
            },
        }
    }
    (path / "genai_config.json").write_text(json.dumps(config))
    words = {"model": {"vocab": {f"w{n}": n for n in range(10)}}, "added_tokens": []}
    (path / "tokenizer.json").write_text(json.dumps(words))
    (path / "tokenizer_config.json").write_text("{}")
    graph = weighty_graph({"w": ("model.onnx.data", 0, len(data))})
    (path / "model.onnx").write_bytes(graph)
    (path / "model.onnx.data").write_bytes(data)
    return path
