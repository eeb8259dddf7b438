"""The trained network as an ONNX Runtime GenAI folder of type phi3v."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from frames import SIDE
from net import (
    CELLS,
    CONCEPTS,
    FOUND,
    LOOKS,
    NOUNS,
    VIEW_TOKENS,
    EncoderLayer,
    Eye,
    TinyVision,
    quantise_rows,
)
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF, INT64, INT32 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT64,
    TensorProto.INT32,
)
COPIED = (
    "LICENSE",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
)
SUPPRESSED = -10000.0


class Graph:
    """A graph under construction; every method gives the name of what it made."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, kind: int, dims: list[Any]) -> str:
        """A graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, dims))
        return name

    def output(self, name: str, kind: int, dims: list[Any]) -> None:
        """Declare a graph output."""
        self.outputs.append(helper.make_tensor_value_info(name, kind, dims))

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        """A constant tensor."""
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        name = f"c{len(self.constants)}"
        array = np.array(value, dtype, order="C")
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.const(values, np.int64)

    def one(self, value: int) -> str:
        """A constant int64 scalar."""
        return self.const(value, np.int64)

    def small(self, value: Any) -> str:
        """A constant kept as fp16 and widened when the session is made."""
        return self.op("Cast", self.const(value, np.float16), to=FLOAT)

    def op(
        self,
        kind: str,
        *inputs: str,
        outputs: list[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """One node; the name of its first output."""
        names = outputs or [f"n{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names[0]

    def save(self, path: Path) -> None:
        """Check the graph and write it."""
        graph = helper.make_graph(
            self.nodes, self.name, self.inputs, self.outputs, list(self.constants.values())
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        model.producer_name = "phid tiny vision"
        onnx.save(model, path)


def linear(g: Graph, x: str, layer: torch.nn.Linear) -> str:
    """`x` times a linear layer's weight, plus its bias if it has one."""
    y = g.op("MatMul", x, g.small(layer.weight.T))
    return g.op("Add", y, g.const(layer.bias)) if layer.bias is not None else y


def layer_norm(g: Graph, x: str, norm: torch.nn.LayerNorm) -> str:
    """LayerNormalization over the last axis."""
    return g.op(
        "LayerNormalization", x, g.const(norm.weight), g.const(norm.bias), epsilon=norm.eps, axis=-1
    )


def write_vision(net: TinyVision, path: Path) -> None:
    """vision.onnx: pixel_values, image_sizes -> image_features, any number of images and crops."""
    g = Graph("vision")
    g.input("pixel_values", FLOAT, ["num_images", "max_num_crops", 3, "height", "width"])
    g.input("image_sizes", INT64, ["num_images", 2])
    g.output("image_features", FLOAT, ["num_image_tokens", net.shape.hidden])
    whole = g.op("Slice", "pixel_values", g.ints(0), g.ints(1), g.ints(1))
    cells, separators, ends = _whole_views(g, g.op("Squeeze", whole, g.ints(1)), net)
    crops = g.op("Slice", "pixel_values", g.ints(1), g.ints(1 << 30), g.ints(1))
    table = g.op(
        "Concat",
        g.op("Reshape", net_newline(g, net), g.ints(1, -1)),
        separators,
        g.op("Reshape", ends, g.ints(-1, net.shape.hidden)),
        g.op("Reshape", cells, g.ints(-1, net.shape.hidden)),
        _crop_cells(g, crops, net),
        axis=0,
    )
    rows = _token_rows(g, g.op("Shape", crops))
    g.op("Gather", table, rows, outputs=["image_features"], axis=0)
    g.save(path)


def net_newline(g: Graph, net: TinyVision) -> str:
    """The token that ends a row of cells."""
    return g.const(net.eye.newline)


def _whole_views(g: Graph, x: str, net: TinyVision) -> tuple[str, str, str]:
    """Cells (n, 144, hidden), separators (n, hidden) and row ends (n, 24, hidden) of the views."""
    eye, hidden = net.eye, net.shape.hidden
    for conv in eye.convs:
        weight, bias = conv.folded()
        size, stride = conv.conv.kernel_size[0], conv.conv.stride[0]
        pads = [conv.conv.padding[0]] * 4
        y = g.op(
            "Conv",
            x,
            g.small(weight),
            g.const(bias),
            kernel_shape=[size, size],
            strides=[stride, stride],
            pads=pads,
        )
        x = g.op("Relu", g.op("Add", y, x) if conv.residual else y)
    seen = g.op("Transpose", g.op("Reshape", x, g.ints(0, 0, -1)), perm=[0, 2, 1])
    first = g.op("Slice", seen, g.ints(0), g.ints(1), g.ints(0))
    others = g.op("Slice", seen, g.ints(0), g.ints(-1), g.ints(0))
    before = g.op("Concat", first, others, axis=0)
    moved = linear(g, g.op("Sub", seen, before), eye.compare)
    cells = g.op("Add", linear(g, seen, eye.project), moved)
    cells = g.op("Add", cells, g.const(eye.place))
    for layer in eye.encoder:
        cells = _encoder_layer(g, cells, layer, hidden)
    cells = layer_norm(g, cells, eye.norm)
    logits = linear(g, cells, eye.concepts)
    ends = np.cumsum([0, *CONCEPTS.values()])
    parts = [
        g.op("Softmax", g.op("Slice", logits, g.ints(start), g.ints(end), g.ints(2)), axis=-1)
        for start, end in itertools.pairwise(ends)
    ]
    shares = g.op("Mul", g.op("Concat", *parts, axis=-1), g.const(eye.present))
    shares, things = _ordered(g, shares, eye)
    counts = g.op("ReduceSum", shares, g.ints(1), keepdims=0)
    mean = g.op("ReduceMean", cells, g.ints(1), keepdims=0)
    most = g.op("ReduceMax", cells, g.ints(1), keepdims=0)
    facts = linear(g, g.op("Concat", counts, mean, most, axis=-1), eye.summary_in)
    separators = linear(g, g.op("Relu", facts), eye.summary_out)
    cells = g.op("Add", cells, linear(g, shares, eye.meaning))
    return cells, separators, _row_ends(g, things, eye)


def _ordered(g: Graph, shares: str, eye: Eye) -> tuple[str, str]:
    """What `Eye.ordered` gives."""

    def around(x: str) -> str:
        pads = {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1]}
        return g.op("AveragePool", x, count_include_pad=1, **pads)

    def cut(start: int, end: int) -> str:
        return g.op("Slice", shares, g.ints(start), g.ints(end), g.ints(2))

    found = g.op("ReduceSum", cut(0, CONCEPTS["kind"]), g.ints(2), keepdims=0)
    board = g.op("Reshape", found, g.ints(-1, 1, CELLS, CELLS))
    highest = g.op("MaxPool", board, kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
    peak = g.op("GreaterOrEqual", board, highest)
    peak = g.op("And", peak, g.op("Greater", board, g.const(FOUND)))
    kept = g.op("Reshape", g.op("Cast", peak, to=FLOAT), g.ints(-1, CELLS * CELLS, 1))
    weight = g.op("Add", around(board), g.const(1e-6))
    ranks = []
    for steps in (eye.column_steps, eye.row_steps):
        place = g.op("Div", around(g.op("Mul", board, g.const(steps))), weight)
        own = g.op("Reshape", place, g.ints(-1, CELLS * CELLS, 1))
        others = g.op("Reshape", place, g.ints(-1, 1, CELLS * CELLS))
        before = g.op("Cast", g.op("Less", others, own), to=FLOAT)
        rank = g.op("Sub", g.op("MatMul", before, kept), g.const(eye.rank_numbers))
        fits = g.op("Relu", g.op("Sub", g.const(1.0), g.op("Abs", rank)))
        ranks.append(g.op("Mul", fits, kept))
    looks, changes = cut(0, LOOKS), cut(LOOKS + 8, 1 << 30)
    most = g.op("Max", g.op("Reshape", found, g.ints(-1, CELLS * CELLS, 1)), g.const(FOUND))
    whole = g.op("Div", kept, most)
    things = g.op("Mul", looks, whole), *ranks, g.op("Mul", changes, whole)
    shares = g.op("Concat", looks, *ranks, changes, axis=2)
    return shares, g.op("Concat", *things, axis=2)


def _row_ends(g: Graph, shares: str, eye: Eye) -> str:
    """What `Eye.row_ends` gives."""

    def cut(x: str, axis: int, start: int, end: int) -> str:
        return g.op("Slice", x, g.ints(start), g.ints(end), g.ints(axis))

    picked = g.op("Transpose", g.op("MatMul", shares, g.const(eye.picks)), perm=[0, 2, 1])
    slots = g.op("MatMul", picked, shares)
    looks = cut(slots, 2, 0, LOOKS)
    nouns = cut(slots, 1, 6, 6 + NOUNS)
    sides = []
    for first_rank, first_slot in ((LOOKS + 1, 0), (LOOKS + 5, 3)):
        for ranks, others in ((1, 0), (0, 1)):
            own = cut(nouns, 2, first_rank + ranks, first_rank + ranks + 2)
            beside = cut(looks, 1, first_slot + others, first_slot + others + 2)
            side = g.op("MatMul", own, beside)
            sides.append(g.op("Reshape", side, g.ints(0, NOUNS, 1, LOOKS)))
    things = g.op("Concat", cut(slots, 1, 0, 3), cut(slots, 1, 6, 11), axis=1)
    beside = g.op("Reshape", g.op("Concat", *sides, axis=2), g.ints(0, -1, LOOKS))
    kinds = g.op("ReduceSum", cut(beside, 2, 0, CONCEPTS["kind"]), g.ints(2))
    nobody = g.op("Sub", g.const(1.0), kinds)
    beside = linear(g, g.op("Concat", nobody, cut(beside, 2, 1, LOOKS), axis=2), eye.side)
    ends = g.op("Concat", linear(g, things, eye.slot), beside, axis=1)
    return g.op("Add", ends, g.const(eye.newline + eye.row_tag))


def _encoder_layer(g: Graph, x: str, layer: EncoderLayer, hidden: int) -> str:
    size = hidden // layer.heads
    qkv = linear(g, layer_norm(g, x, layer.norm1), layer.qkv)
    qkv = g.op("Reshape", qkv, g.ints(0, CELLS * CELLS, 3, layer.heads, size))
    qkv = g.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
    q, k, v = (g.op("Gather", qkv, g.one(part), axis=0) for part in range(3))
    scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = g.op("Softmax", g.op("Mul", scores, g.const(size**-0.5)), axis=-1)
    mixed = g.op("Transpose", g.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    mixed = g.op("Reshape", mixed, g.ints(0, CELLS * CELLS, hidden))
    x = g.op("Add", x, linear(g, mixed, layer.out))
    wide = g.op("Relu", linear(g, layer_norm(g, x, layer.norm2), layer.up))
    return g.op("Add", x, linear(g, wide, layer.down))


def _crop_cells(g: Graph, crops: str, net: TinyVision) -> str:
    """(n * crops * 144, hidden): the mean colour of each 28 x 28 patch of the crops."""
    side = SIDE // CELLS
    flat = g.op("Reshape", crops, g.ints(-1, 3, SIDE, SIDE))
    mean = g.op("AveragePool", flat, kernel_shape=[side, side], strides=[side, side])
    mean = g.op("Transpose", mean, perm=[0, 2, 3, 1])
    return linear(g, g.op("Reshape", mean, g.ints(-1, 3)), net.eye.crop_cell)


def _token_rows(g: Graph, crops_shape: str) -> str:
    """For each image token, its row in [newline, n separators, n x 24 ends, n x 144, crops].

    The order is Phi-3.5-vision's: the crops' picture row by row, a separator, the global view
    row by row; each row of cells ends in a newline token.
    """
    n = g.op("Gather", crops_shape, g.one(0))
    most_crops = g.op("Gather", crops_shape, g.one(1))
    grid = g.op("Div", "image_sizes", g.one(SIDE))
    down = g.op("Gather", grid, g.one(0), axis=1)
    across = g.op("Gather", grid, g.one(1), axis=1)
    row_length = g.op("Add", g.op("Mul", across, g.one(CELLS)), g.one(1))
    crop_tokens = g.op("Mul", g.op("Mul", down, g.one(CELLS)), row_length)
    lengths = g.op("Add", crop_tokens, g.one(1 + VIEW_TOKENS))
    ends = g.op("CumSum", lengths, g.one(0))
    total = g.op("ReduceSum", lengths, keepdims=0)
    token = g.op("Range", g.one(0), total, g.one(1))
    passed = g.op(
        "GreaterOrEqual", g.op("Unsqueeze", token, g.ints(1)), g.op("Unsqueeze", ends, g.ints(0))
    )
    image = g.op("ReduceSum", g.op("Cast", passed, to=INT64), g.ints(1), keepdims=0)
    start = g.op("Sub", g.op("Gather", ends, image), g.op("Gather", lengths, image))
    local = g.op("Sub", token, start)
    own_crop_tokens = g.op("Gather", crop_tokens, image)
    own_row_length = g.op("Gather", row_length, image)

    row = g.op("Div", local, own_row_length)
    column = g.op("Mod", local, own_row_length)
    crop = g.op("Mul", g.op("Div", row, g.one(CELLS)), g.op("Gather", across, image))
    crop = g.op("Add", crop, g.op("Div", column, g.one(CELLS)))
    crop = g.op("Add", g.op("Mul", image, most_crops), crop)
    cell = g.op("Mul", g.op("Mod", row, g.one(CELLS)), g.one(CELLS))
    cell = g.op("Add", cell, g.op("Mod", column, g.one(CELLS)))
    base = g.op("Add", g.op("Mul", n, g.one(1 + 2 * CELLS + CELLS * CELLS)), g.one(1))
    in_crops = g.op("Add", g.op("Add", g.op("Mul", crop, g.one(CELLS * CELLS)), cell), base)
    row_end = g.op("Equal", column, g.op("Sub", own_row_length, g.one(1)))
    first_end = g.op("Add", g.op("Mul", image, g.one(2 * CELLS)), g.op("Add", n, g.one(1)))
    own_end = g.op("Add", g.op("Add", first_end, row), g.one(CELLS))
    own_end = g.op("Where", g.op("Less", row, g.one(CELLS)), own_end, g.one(0))
    in_crops = g.op("Where", row_end, own_end, in_crops)

    whole = g.op("Sub", g.op("Sub", local, own_crop_tokens), g.one(1))
    row = g.op("Div", whole, g.one(CELLS + 1))
    column = g.op("Mod", whole, g.one(CELLS + 1))
    cell = g.op("Add", g.op("Mul", row, g.one(CELLS)), column)
    base = g.op("Add", g.op("Mul", n, g.one(1 + 2 * CELLS)), g.one(1))
    in_whole = g.op("Add", g.op("Add", g.op("Mul", image, g.one(CELLS * CELLS)), cell), base)
    own_end = g.op("Add", first_end, row)
    in_whole = g.op("Where", g.op("Equal", column, g.one(CELLS)), own_end, in_whole)

    separator = g.op("Add", image, g.one(1))
    after = g.op("Where", g.op("Equal", local, own_crop_tokens), separator, in_whole)
    return g.op("Where", g.op("Less", local, own_crop_tokens), in_crops, after)


def write_embedding(net: TinyVision, words: list[int], seed: int, path: Path) -> None:
    """embedding.onnx: input_ids, image_features -> inputs_embeds; slots take features in turn.

    Rows of tokens the network never met are random; slots of image k also get its index vector.
    """
    shape, g = net.shape, Graph("embedding")
    g.input("input_ids", INT32, ["batch_size", "sequence_length"])
    g.input("image_features", FLOAT, ["num_image_tokens", shape.hidden])
    g.output("inputs_embeds", FLOAT, ["batch_size", "sequence_length", shape.hidden])
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((shape.vocabulary, shape.hidden), np.float32) * 0.5
    rows[words] = net.embedding.detach().numpy()
    ids = g.op("Cast", "input_ids", to=INT64)
    text = g.op("Max", ids, g.one(0))
    text = g.op("Cast", g.op("Gather", g.const(rows, np.float16), text, axis=0), to=FLOAT)
    is_image = g.op("Less", ids, g.one(0))
    counted = g.op("Reshape", g.op("Cast", is_image, to=INT64), g.ints(-1))
    slot = g.op("Sub", g.op("CumSum", counted, g.one(0)), g.one(1))
    slot = g.op("Max", g.op("Reshape", slot, g.op("Shape", ids)), g.one(0))
    # A spare row keeps the gather legal when there are no features at all.
    padded = g.op("Concat", "image_features", g.const(np.zeros((1, shape.hidden))), axis=0)
    last = g.op("Gather", g.op("Shape", "image_features"), g.one(0))
    features = g.op("Gather", padded, g.op("Min", slot, last), axis=0)
    index = g.op("Sub", g.op("Neg", ids), g.one(1))
    index = g.op("Min", g.op("Max", index, g.one(0)), g.one(shape.image_slots - 1))
    features = g.op("Add", features, g.op("Gather", g.const(net.image_index), index, axis=0))
    mask = g.op("Unsqueeze", is_image, g.ints(-1))
    g.op("Where", mask, features, text, outputs=["inputs_embeds"])
    g.save(path)


def write_text(net: TinyVision, words: list[int], path: Path) -> None:
    """text.onnx: inputs_embeds, mask and past -> the last token's logits and present."""
    shape, g = net.shape, Graph("text")
    g.input("inputs_embeds", FLOAT, ["batch_size", "sequence_length", shape.hidden])
    g.input("attention_mask", INT64, ["batch_size", "total_sequence_length"])
    g.output("logits", FLOAT, ["batch_size", 1, shape.vocabulary])
    ones = g.op("ReduceSum", "attention_mask", g.ints(1))
    lengths = g.op("Cast", g.op("Sub", ones, g.one(1)), to=INT32)
    total = g.op("Gather", g.op("Shape", "attention_mask"), g.one(1))
    total = g.op("Cast", total, to=INT32)
    lengths = g.op("Squeeze", lengths, g.ints(1))
    steps = g.op("Range", g.const(0.0), g.const(float(shape.context)), g.const(1.0))
    steps = g.op("Unsqueeze", steps, g.ints(1))
    angles = g.op("Mul", steps, g.const(net.frequencies[None]))
    caches = (g.op("Cos", angles), g.op("Sin", angles))
    x = "inputs_embeds"
    for index, layer in enumerate(net.layers):
        x = _decoder_layer(g, x, layer, index, (lengths, total, *caches), net)
    last = g.op("Slice", x, g.ints(-1), g.ints(1 << 30), g.ints(1))
    last = _root_norm(g, last, net.norm)
    _head(g, last, net, words)
    g.save(path)


def _root_norm(g: Graph, x: str, norm: torch.nn.Module) -> str:
    return g.op(
        "SimplifiedLayerNormalization", x, g.const(norm.weight), epsilon=1e-5, axis=-1, stash_type=1
    )


def _decoder_layer(
    g: Graph, x: str, layer: Any, index: int, shared: tuple[str, ...], net: TinyVision
) -> str:
    shape = net.shape
    kv = ["batch_size", shape.heads, "past_sequence_length", shape.head_size]
    past = [g.input(f"past_key_values.{index}.{part}", FLOAT, kv) for part in ("key", "value")]
    present = [f"present.{index}.{part}" for part in ("key", "value")]
    for name in present:
        g.output(name, FLOAT, [*kv[:2], "total_sequence_length", kv[3]])
    y = _root_norm(g, x, layer.norm1)
    q, k, v = (linear(g, y, part) for part in (layer.q, layer.k, layer.v))
    mixed = g.op(
        "GroupQueryAttention",
        *(q, k, v, *past, *shared),
        outputs=[f"attention.{index}", *present],
        domain="com.microsoft",
        num_heads=shape.heads,
        kv_num_heads=shape.heads,
        do_rotary=1,
        rotary_interleaved=0,
        scale=shape.head_size**-0.5,
    )
    x = g.op("Add", x, linear(g, mixed, layer.o))
    y = _root_norm(g, x, layer.norm2)
    gate = linear(g, y, layer.gate)
    gate = g.op("Mul", gate, g.op("Sigmoid", gate))
    return g.op("Add", x, linear(g, g.op("Mul", gate, linear(g, y, layer.up)), layer.down))


def _head(g: Graph, x: str, net: TinyVision, words: list[int]) -> None:
    """The int4 head over the whole vocabulary; rows not in use are zero and pushed far down."""
    shape, block = net.shape, 32
    full = torch.zeros(shape.vocabulary, shape.hidden)
    full[words] = net.head.weight.detach()
    codes, scale = quantise_rows(full, block)
    pairs = codes.to(torch.uint8).numpy().reshape(shape.vocabulary, -1, block // 2, 2)
    logits = g.op(
        "MatMulNBits",
        x,
        g.const(pairs[..., 0] | (pairs[..., 1] << 4), np.uint8),
        g.const(scale.reshape(shape.vocabulary, -1)),
        domain="com.microsoft",
        K=shape.hidden,
        N=shape.vocabulary,
        bits=4,
        block_size=block,
    )
    low = g.op(
        "ConstantOfShape",
        g.ints(shape.vocabulary),
        value=helper.make_tensor("value", FLOAT, [1], [SUPPRESSED]),
    )
    zeros = g.const(np.zeros(len(words)))
    low = g.op("ScatterElements", low, g.ints(*words), zeros, axis=0)
    g.op("Add", logits, low, outputs=["logits"])


def genai_config(net: TinyVision) -> dict[str, Any]:
    """The folder's genai_config.json."""
    shape = net.shape
    inputs = {
        "inputs_embeds": "inputs_embeds",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "text.onnx",
        "head_size": shape.head_size,
        "hidden_size": shape.hidden,
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.heads,
    }
    model = {
        "bos_token_id": 1,
        "context_length": shape.context,
        "decoder": decoder,
        "embedding": {
            "filename": "embedding.onnx",
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "vision": {
            "filename": "vision.onnx",
            "config_filename": "processor_config.json",
            "inputs": {"pixel_values": "pixel_values", "image_sizes": "image_sizes"},
            "outputs": {"image_features": "image_features"},
        },
        "eos_token_id": [32007, 32001, 32000],
        "pad_token_id": 32000,
        "type": "phi3v",
        "vocab_size": shape.vocabulary,
    }
    search = {
        "do_sample": False,
        "max_length": shape.context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
    return {"model": model, "search": search}


def export(net: TinyVision, words: list[int], tokenizer: Path, folder: Path, seed: int) -> None:
    """Write the whole folder; `words[k]` is the token id of the network's k-th word."""
    net.eval()
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(tokenizer / name, folder / name)
    with torch.no_grad():
        write_vision(net, folder / "vision.onnx")
        write_embedding(net, words, seed, folder / "embedding.onnx")
        write_text(net, words, folder / "text.onnx")
    (folder / "genai_config.json").write_text(json.dumps(genai_config(net), indent=2) + "\n")
