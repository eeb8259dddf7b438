"""The converter from a Llama model's GGUF file (Q4_1 matrices) to an ONNX Runtime GenAI folder.

A Q4_1 block is 32 codes q with value = scale * q + least, which is MatMulNBits' scale * (q - zero)
with zero = -least / scale: a fraction, while only whole zeros are fast (fractions cost nine tenths
of the decoding speed). So the matrices that suffer most from a rounded zero get 8 bits, as 16 * q
and 16 * zero, and the others the nearest 4 bits with a whole zero. Measured on SmolLM2-135M against
the exact weights: perplexity +5 %, where 4 bits with rounded zeros everywhere cost +20 %.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from phid.gguf_file import BLOCK, Bytes, Gguf, Matrix, read_gguf, stacked

_EIGHT_BITS = ("attn_qkv", "ffn_down")  # and the head, which is Q8_0 in the file
_CONTROL = 3  # GGUF's number for control tokens, which text never makes
_ALIGNMENT = 64  # bytes: weights are used where they are mapped, so each starts a cache line
_CONTRIB = {
    "GatherBlockQuantized",
    "GroupQueryAttention",
    "MatMulNBits",
    "SkipSimplifiedLayerNormalization",
}


def convert(
    gguf: Path, folder: Path, progress: Callable[[float], None] = lambda _fraction: None
) -> None:
    """Fill `folder`, which exists, with a model genai loads; equal files in, equal bytes out.

    Raises ValueError where the file is not a Llama with Q4_1 matrices, Q8_0 embeddings tied to
    the head, plain rotary positions and the SmolLM tokenizer.
    """
    source = read_gguf(gguf)
    try:
        shape = _Shape.of(source.meta)
        with (folder / "model.onnx.data").open("wb") as data:
            model = _model(source, shape, data, progress)
        texts = {
            "genai_config.json": _genai_config(source.meta, shape),
            "tokenizer.json": _tokenizer(source.meta),
            "tokenizer_config.json": _tokenizer_config(source.meta, shape),
        }
    except KeyError as error:
        raise ValueError(f"{gguf.name} has no {error}") from error
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    for name, content in texts.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / name).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Shape:
    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    context: int
    vocabulary: int
    rotary_base: float
    epsilon: float

    @classmethod
    def of(cls, meta: dict[str, Any]) -> Self:
        pinned = {
            "general.architecture": "llama",
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
        }
        for key, value in pinned.items():
            if meta.get(key) != value:
                raise ValueError(f"{key} is {meta.get(key)!r}: only {value!r} is converted")
        return cls(
            layers=meta["llama.block_count"],
            width=meta["llama.embedding_length"],
            heads=meta["llama.attention.head_count"],
            kv_heads=meta["llama.attention.head_count_kv"],
            inner=meta["llama.feed_forward_length"],
            context=meta["llama.context_length"],
            vocabulary=meta["llama.vocab_size"],
            rotary_base=meta["llama.rope.freq_base"],
            epsilon=meta["llama.attention.layer_norm_rms_epsilon"],
        )

    @property
    def head(self) -> int:
        return self.width // self.heads


# The graph: node for node what onnxruntime_genai.models.builder makes of a Llama.


class _Graph:
    """The nodes and weights so far; the weights' bytes go to `data` at once."""

    def __init__(self, data: BinaryIO) -> None:
        self._data = data
        self.nodes: list[Any] = []
        self.weights: list[TensorProto] = []

    def node(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        """The node's first output."""
        domain = "com.microsoft" if op in _CONTRIB else ""
        name = "/" + outputs[0].replace(".", "/")
        self.nodes.append(
            helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes)
        )
        return outputs[0]

    def constant(self, name: str, shape: list[int], values: list[int]) -> str:
        self.weights.append(helper.make_tensor(name, TensorProto.INT64, shape, values))
        return name

    def weight(self, name: str, values: npt.NDArray[Any], *, also: str = "") -> str:
        """The weight's name; `also` names the same bytes with all axes but the first merged."""
        self._data.write(bytes(-self._data.tell() % _ALIGNMENT))
        place = {
            "location": "model.onnx.data",
            "offset": self._data.tell(),
            "length": self._data.write(np.ascontiguousarray(values).data),
        }
        flat = (len(values), values.size // len(values))
        for label, shape in ((name, values.shape), (also, flat)):
            if label:
                kind = helper.np_dtype_to_tensor_dtype(values.dtype)
                tensor = TensorProto(name=label, dims=shape, data_type=kind)
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))
                self.weights.append(tensor)
        return name

    def matrix(self, name: str, matrix: Matrix, *, also: str = "") -> list[str]:
        """The names of the codes, the scales and, where there are any, the zeros."""
        pack = _halves if matrix.bits == 4 else np.ascontiguousarray
        names = [
            self.weight(f"{name}.codes", pack(matrix.codes), also=also),
            self.weight(f"{name}.scales", matrix.scales),
        ]
        if matrix.zeros is not None:
            names.append(self.weight(f"{name}.zeros", pack(matrix.zeros.astype(np.uint8))))
        return names

    def product(self, x: str, matrix: Matrix, weights: list[str], out: str) -> str:
        rows, blocks, _ = matrix.codes.shape
        shape = {"K": blocks * BLOCK, "N": rows, "bits": matrix.bits, "block_size": BLOCK}
        return self.node("MatMulNBits", [x, *weights], [out], **shape, accuracy_level=4)


def _model(
    source: Gguf, shape: _Shape, data: BinaryIO, progress: Callable[[float], None]
) -> ModelProto:
    graph = _Graph(data)
    _positions(graph, shape)
    embeddings = source.q8_0("token_embd.weight")
    head = graph.matrix("head", embeddings, also="embeddings")
    residual = graph.node(
        "GatherBlockQuantized",
        ["embeddings", "input_ids", head[1]],
        ["embedded"],
        bits=8,
        block_size=BLOCK,
        gather_axis=0,
        quantize_axis=1,
    )
    added = ""  # the last part's output: the next norm adds it to the residual
    for layer in range(shape.layers):
        progress(layer / shape.layers)
        residual, added = _layer(graph, source, shape, layer, residual, added)
    final = graph.weight("norm", source.floats("output_norm.weight"))
    norm = "SkipSimplifiedLayerNormalization"
    graph.node(norm, [residual, added, final], ["normed"], epsilon=shape.epsilon)
    graph.product("normed", embeddings, head, "logits")
    progress(1.0)
    inputs, outputs = _signature(shape)
    return helper.make_model(
        helper.make_graph(graph.nodes, "main", inputs, outputs, graph.weights),
        producer_name="phid",
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
    )


def _positions(graph: _Graph, shape: _Shape) -> None:
    """The rotary caches, and the two lengths GroupQueryAttention reads off the mask."""
    speeds = shape.rotary_base ** -(np.arange(0, shape.head, 2) / shape.head)
    angles = np.outer(np.arange(shape.context), speeds)
    graph.weight("cosines", np.cos(angles).astype(np.float32))
    graph.weight("sines", np.sin(angles).astype(np.float32))
    graph.constant("ones", [1], [1])
    graph.constant("one", [], [1])
    graph.node("ReduceSum", ["attention_mask", "ones"], ["mask.sum"], keepdims=0)
    graph.node("Sub", ["mask.sum", "ones"], ["mask.last"])
    graph.node("Cast", ["mask.last"], ["last_position"], to=TensorProto.INT32)
    graph.node("Shape", ["attention_mask"], ["mask.shape"])
    graph.node("Gather", ["mask.shape", "one"], ["mask.length"], axis=0)
    graph.node("Cast", ["mask.length"], ["total_length"], to=TensorProto.INT32)


def _layer(
    graph: _Graph, source: Gguf, shape: _Shape, layer: int, residual: str, added: str
) -> tuple[str, str]:
    """The names of the residual after one layer and of what is still to be added to it."""
    ours = f"layers.{layer}."

    def norm(name: str, residual: str, added: str) -> tuple[str, str]:
        weight = graph.weight(ours + name, source.floats(f"blk.{layer}.{name}.weight"))
        out = f"{ours}{name}.out"
        if not added:
            op, inputs, outputs = "SimplifiedLayerNormalization", [residual, weight], [out]
        else:
            op, inputs = "SkipSimplifiedLayerNormalization", [residual, added, weight]
            residual = f"{ours}{name}.sum"
            outputs = [out, "", "", residual]
        return graph.node(op, inputs, outputs, epsilon=shape.epsilon), residual

    def product(x: str, name: str, matrix: Matrix) -> str:
        whole = matrix.in_8_bits() if name in _EIGHT_BITS else matrix.with_whole_zeros()
        return graph.product(x, whole, graph.matrix(ours + name, whole), f"{ours}{name}.out")

    def matrix(name: str) -> Matrix:
        return source.q4_1(f"blk.{layer}.{name}.weight")

    normed, residual = norm("attn_norm", residual, added)
    queries = matrix("attn_q").with_rows(_rotary_order(shape.heads, shape.head))
    keys = matrix("attn_k").with_rows(_rotary_order(shape.kv_heads, shape.head))
    packed = product(normed, "attn_qkv", stacked([queries, keys, matrix("attn_v")]))
    past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
    present = [f"present.{layer}.{part}" for part in ("key", "value")]
    attended = graph.node(
        "GroupQueryAttention",
        [packed, "", "", *past, "last_position", "total_length", "cosines", "sines"],
        [f"{ours}attn.out", *present],
        num_heads=shape.heads,
        kv_num_heads=shape.kv_heads,
        scale=shape.head**-0.5,
        do_rotary=1,
        rotary_interleaved=0,
    )
    added = product(attended, "attn_output", matrix("attn_output"))
    normed, residual = norm("ffn_norm", residual, added)
    gate = product(normed, "ffn_gate", matrix("ffn_gate"))
    up = product(normed, "ffn_up", matrix("ffn_up"))
    sigmoid = graph.node("Sigmoid", [gate], [f"{ours}ffn.sigmoid"])
    swish = graph.node("Mul", [gate, sigmoid], [f"{ours}ffn.swish"])
    inner = graph.node("Mul", [swish, up], [f"{ours}ffn.inner"])
    return residual, product(inner, "ffn_down", matrix("ffn_down"))


def _rotary_order(heads: int, size: int) -> npt.NDArray[np.intp]:
    """Where ONNX Runtime's rows of a query or key matrix are in the file.

    llama.cpp's converter wove the two halves of each head together, row by row.
    """
    return np.arange(heads * size).reshape(heads, size // 2, 2).swapaxes(1, 2).ravel()


def _signature(shape: _Shape) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
    """The graph's inputs and outputs, by the names genai knows."""

    def value(name: str, kind: int, *sizes: str | int) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, ["batch", *sizes])

    def cache(stem: str, length: str) -> list[ValueInfoProto]:
        return [
            value(f"{stem}.{n}.{part}", TensorProto.FLOAT, shape.kv_heads, length, shape.head)
            for n in range(shape.layers)
            for part in ("key", "value")
        ]

    inputs = [
        value("input_ids", TensorProto.INT64, "sequence"),
        value("attention_mask", TensorProto.INT64, "total"),
    ]
    logits = value("logits", TensorProto.FLOAT, "sequence", shape.vocabulary)
    return [*inputs, *cache("past_key_values", "past")], [logits, *cache("present", "total")]


def _halves(codes: Bytes) -> Bytes:
    """Pairs of 4-bit codes in a byte each, the first in the low half; an odd one is alone."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return cast("Bytes", codes[..., ::2] | codes[..., 1::2] << 4)


# The rest of the folder.


def _genai_config(meta: dict[str, Any], shape: _Shape) -> dict[str, Any]:
    # The model ends a turn with <|im_end|>; <|endoftext|>, its pretraining's end, is its unk.
    ends = [meta["tokenizer.ggml.eos_token_id"], meta["tokenizer.ggml.unknown_token_id"]]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": shape.head,
        "hidden_size": shape.width,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
    }
    model = {
        "type": "llama",
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": ends,
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "vocab_size": shape.vocabulary,
        "context_length": shape.context,
        "decoder": decoder,
    }
    search = {
        "do_sample": False,
        "max_length": shape.context,
        "past_present_share_buffer": True,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    return {"model": model, "search": search}


def _tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    """What the `tokenizers` library calls tokenizer.json; llama.cpp calls its splitting smollm."""
    tokens = meta["tokenizer.ggml.tokens"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    # Each digit alone, then GPT-2's words. The library's own names for these two (Digits, and
    # ByteLevel's use_regex) mean the same, but genai ignores the first.
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in (r"\p{N}", words)
    ]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    splits.append({**byte_level, "use_regex": False})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": tokens[number], **plain, "special": True}
            for number, kind in enumerate(meta["tokenizer.ggml.token_type"])
            if kind == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": meta["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(meta: dict[str, Any], shape: _Shape) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    named = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    special = {
        f"{ours}_token": tokens[meta[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in named.items()
    }
    return {
        **special,
        "add_prefix_space": False,
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.context,
        "tokenizer_class": "GPT2Tokenizer",
    }
