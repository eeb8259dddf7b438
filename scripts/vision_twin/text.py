"""Phi-3.5-mini's decoder, with or without its embedding, node for node as genai's builder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from graph import FLOAT, INT32, INT64, Graph, Weights
from onnx import GraphProto
from shape import Shape

_EPSILON = 1e-5
_THETA = 10000.0
# LongRoPE's factors for each pair of a head's channels are 48 numbers in each of two lists of the
# real configuration; here they grow evenly between ends like theirs. They change values, not work.
_SHORT_FACTORS, _LONG_FACTORS = (1.0, 2.8), (1.1, 64.0)


def build(
    g: Graph,
    shape: Shape,
    weights: Weights,
    never: list[int],
    report: Callable[[float], None],
    *,
    embeds: bool = False,
) -> None:
    """Fill the graph: inputs_embeds, attention_mask and the past -> logits and the present.

    `never` are the words whose logit is always 0, so that a model that babbles does not end. With
    `embeds` the words' numbers come in, and the graph has the embedding itself.
    """
    x = "inputs_embeds"
    if embeds:
        g.input("input_ids", INT64, ["batch_size", "sequence_length"])
        table = g.weight("embed_tokens.weight", weights.normal(shape.vocabulary, shape.width))
        x = g.op("Gather", table, "input_ids")
    else:
        g.input(x, FLOAT, ["batch_size", "sequence_length", shape.width])
    g.input("attention_mask", INT64, ["batch_size", "total_sequence_length"])
    g.output("logits", FLOAT, ["batch_size", "sequence_length", shape.vocabulary])
    shared = _positions(g, shape)
    added = ""  # what the next norm adds to `x`
    for layer in range(shape.layers):
        report(layer / shape.layers)
        x, added = _layer(g, layer, (x, added), shared, shape, weights)
    y, _ = _norm(g, "norm", x, added, shape, weights, last=True)
    codes, scales = weights.matrix(shape.vocabulary, shape.width)
    scales[never] = 0
    g.matmul(y, "lm_head", (codes, scales), "logits")


def _positions(g: Graph, shape: Shape) -> list[str]:
    """The lengths GroupQueryAttention reads off the mask, and the rotary caches."""
    length = g.op("Gather", g.op("Shape", "attention_mask"), g.scalar(1), axis=0)
    last = g.op("Sub", g.op("ReduceSum", "attention_mask", g.ints(1), keepdims=0), g.ints(1))
    caches = ["cos_cache", "sin_cache"]
    g.op(
        "If",
        g.op("Greater", length, g.scalar(shape.short_context)),
        outputs=caches,
        then_branch=_caches(g, "large", shape.context, _LONG_FACTORS, shape),
        else_branch=_caches(g, "small", shape.short_context, _SHORT_FACTORS, shape),
    )
    return [g.op("Cast", last, to=INT32), g.op("Cast", length, to=INT32), *caches]


def _caches(
    g: Graph, name: str, length: int, ends: tuple[float, float], shape: Shape
) -> GraphProto:
    """A branch that gives cosines and sines (length, head_size / 2) as constants."""
    size = shape.head_size
    speeds = _THETA ** -(np.arange(0, size, 2) / size) / np.linspace(*ends, size // 2)
    longer = shape.context / shape.short_context
    gain = np.sqrt(1 + np.log(longer) / np.log(shape.short_context))
    angles = np.outer(np.arange(length), speeds)
    branch = g.body(f"{name}_rope_caches")
    for part, turn in (("cos", np.cos), ("sin", np.sin)):
        values = (turn(angles) * gain).astype(np.float32)
        out = f"{part}_cache_{name}"
        branch.constant(values, out)
        branch.output(out, FLOAT, list(values.shape))
    return branch.proto()


def _norm(
    g: Graph, name: str, x: str, added: str, shape: Shape, weights: Weights, *, last: bool = False
) -> tuple[str, str]:
    """The norm of `x` and what is to be added to it, and this sum."""
    weight = g.weight(f"{name}.weight", weights.near_one(shape.width))
    if not added:
        kind = "SimplifiedLayerNormalization"
        return g.op(kind, x, weight, epsilon=_EPSILON, axis=-1, stash_type=1), x
    out, total = f"/{name}/output_0", f"/{name}/output_3"
    outputs = [out] if last else [out, "", "", total]
    kind = "SkipSimplifiedLayerNormalization"
    g.op(kind, x, added, weight, outputs=outputs, epsilon=_EPSILON)
    return out, total


def _layer(
    g: Graph,
    layer: int,
    stream: tuple[str, str],
    shared: list[str],
    shape: Shape,
    weights: Weights,
) -> tuple[str, str]:
    """The residual after a layer, and what is still to be added to it."""
    ours, width = f"layers.{layer}", shape.width

    def product(x: str, name: str, rows: int, columns: int) -> str:
        return g.matmul(x, f"{ours}.{name}", weights.matrix(rows, columns))

    y, x = _norm(g, f"{ours}.input_layernorm", *stream, shape, weights)
    packed = product(y, "attn.qkv_proj", 3 * width, width)
    cache: list[str | int] = ["batch_size", shape.heads, "past_sequence_length", shape.head_size]
    past = [g.input(f"past_key_values.{layer}.{part}", FLOAT, cache) for part in ("key", "value")]
    present = [f"present.{layer}.{part}" for part in ("key", "value")]
    for name in present:
        g.output(name, FLOAT, [*cache[:2], "total_sequence_length", cache[3]])
    attended = g.op(
        "GroupQueryAttention",
        *(packed, "", "", *past, *shared),
        outputs=[f"/{ours}/attention", *present],
        num_heads=shape.heads,
        kv_num_heads=shape.heads,
        scale=shape.head_size**-0.5,
        local_window_size=-1,
        softcap=0.0,
        do_rotary=1,
        rotary_interleaved=0,
    )
    added = product(attended, "attn.o_proj", width, width)
    y, x = _norm(g, f"{ours}.post_attention_layernorm", x, added, shape, weights)
    gate = product(y, "mlp.gate_proj", shape.inner, width)
    up = product(y, "mlp.up_proj", shape.inner, width)
    swish = g.op("Mul", gate, g.op("Sigmoid", gate))
    return x, product(g.op("Mul", swish, up), "mlp.down_proj", width, shape.inner)
