"""vision.onnx: CLIP, the HD merge and the projection, as the published recipe exports them.

The recipe: torch.onnx.export of the model's image embedding, then ONNX Runtime's transformer
optimizer (model type clip) and its 4-bit quantizer (block 32, accuracy level 4). What comes out has
an Attention node a layer with float weights for query, key and value (the optimizer packs them
before the quantizer looks for MatMuls), and int4 weights in every other product; the size of the
official file, 445 MB, says the same. Here these nodes are written directly; only the arithmetic on
shapes around them is shorter.
"""

from __future__ import annotations

from collections.abc import Callable

from graph import BOOL, FLOAT, INT64, Graph, Weights
from shape import CELLS, PATCH, PATCHES, SIDE, Shape

_EPSILON = 1e-5


def build(g: Graph, shape: Shape, weights: Weights, report: Callable[[float], None]) -> None:
    """Fill the graph: pixel_values (n, views, 3, 336, 336) and image_sizes (n, 2) in pixels.

    Gives image_features (image tokens, width): each picture's crops row by row, a separator, its
    global view. There may be any number of views; those beyond a picture's own crops are computed
    and not used.
    """
    g.input("pixel_values", FLOAT, ["num_images", "max_num_crops", 3, "height", "width"])
    g.input("image_sizes", INT64, ["num_images", 2])
    g.output("image_features", FLOAT, ["num_image_tokens", shape.width])
    x = _embed(g, shape, weights)
    x = _encode(g, x, shape, weights, report)
    patches = g.op("Slice", x, g.ints(1), g.ints(PATCHES**2 + 1), g.ints(1))
    views = g.op("Slice", g.op("Shape", "pixel_values"), g.ints(0), g.ints(2), g.ints(0))
    per_view = g.op("Concat", views, g.ints(-1, shape.clip_width), axis=0)
    merged = _merge(g, g.op("Reshape", patches, per_view), shape, weights)
    y = g.matmul(merged, "img_projection.0", weights.matrix(shape.width, shape.merged))
    y = g.op("BiasGelu", y, _vector(g, weights, "img_projection.0.bias", shape.width))
    y = g.matmul(y, "img_projection.2", weights.matrix(shape.width, shape.width))
    bias = _vector(g, weights, "img_projection.2.bias", shape.width)
    g.op("Add", y, bias, outputs=["image_features"])


def _vector(g: Graph, weights: Weights, name: str, size: int) -> str:
    return g.weight(name, weights.normal(size, deviation=0.02))


def _norm(g: Graph, weights: Weights, name: str, size: int) -> list[str]:
    return [
        g.weight(f"{name}.weight", weights.near_one(size)),
        _vector(g, weights, f"{name}.bias", size),
    ]


def _embed(g: Graph, shape: Shape, weights: Weights) -> str:
    """(n * views, 577, clip_width): a class token and 24 x 24 patches, with their positions."""
    width = shape.clip_width
    flat = g.op("Reshape", "pixel_values", g.ints(-1, 3, SIDE, SIDE))
    kernel = weights.normal(width, 3, PATCH, PATCH, deviation=(3 * PATCH**2) ** -0.5)
    patches = g.op(
        "Conv",
        flat,
        g.weight("patch_embedding.weight", kernel),
        kernel_shape=[PATCH, PATCH],
        strides=[PATCH, PATCH],
    )
    patches = g.op("Reshape", patches, g.ints(0, width, -1))
    patches = g.op("Transpose", patches, perm=[0, 2, 1])
    count = g.op("Slice", g.op("Shape", flat), g.ints(0), g.ints(1), g.ints(0))
    token = g.weight("class_embedding", weights.normal(1, 1, width, deviation=0.02))
    token = g.op("Expand", token, g.op("Concat", count, g.ints(1, 1), axis=0))
    positions = g.weight(
        "position_embedding.weight", weights.normal(1, PATCHES**2 + 1, width, deviation=0.02)
    )
    x = g.op("Add", g.op("Concat", token, patches, axis=1), positions)
    norm = _norm(g, weights, "pre_layrnorm", width)
    return g.op("LayerNormalization", x, *norm, epsilon=_EPSILON, axis=-1)


def _encode(
    g: Graph, x: str, shape: Shape, weights: Weights, report: Callable[[float], None]
) -> str:
    """The hidden state after the last layer (no norm follows it)."""
    width, inner = shape.clip_width, shape.clip_inner
    norm = _norm(g, weights, "layers.0.layer_norm1", width)
    y = g.op("LayerNormalization", x, *norm, epsilon=_EPSILON, axis=-1)
    for layer in range(shape.clip_layers):
        report(layer / shape.clip_layers)
        ours = f"layers.{layer}"
        qkv = weights.normal(width, 3 * width, deviation=width**-0.5)
        y = g.op(
            "Attention",
            y,
            g.weight(f"{ours}.qkv.weight", qkv),
            _vector(g, weights, f"{ours}.qkv.bias", 3 * width),
            num_heads=shape.clip_heads,
        )
        y = g.matmul(y, f"{ours}.out_proj", weights.matrix(width, width))
        bias = _vector(g, weights, f"{ours}.out_proj.bias", width)
        y, x = _skip(g, y, x, _norm(g, weights, f"{ours}.layer_norm2", width), bias)
        y = g.matmul(y, f"{ours}.fc1", weights.matrix(inner, width))
        y = g.op("Add", _vector(g, weights, f"{ours}.fc1.bias", inner), y)
        y = g.op("QuickGelu", y, alpha=1.702)
        y = g.matmul(y, f"{ours}.fc2", weights.matrix(width, inner))
        bias = _vector(g, weights, f"{ours}.fc2.bias", width)
        if layer < shape.clip_layers - 1:
            norm = _norm(g, weights, f"layers.{layer + 1}.layer_norm1", width)
            y, x = _skip(g, y, x, norm, bias)
    return g.op("Add", x, g.op("Add", bias, y))


def _skip(g: Graph, y: str, x: str, norm: list[str], bias: str) -> tuple[str, str]:
    """The norm of x + y + bias, and this sum."""
    total = f"{norm[0]}.input"
    normed = f"{norm[0]}.output"
    g.op(
        "SkipLayerNormalization",
        *(y, x, *norm, bias),
        outputs=[normed, "", "", total],
        epsilon=_EPSILON,
    )
    return normed, total


def _merge(g: Graph, views: str, shape: Shape, weights: Weights) -> str:
    """(image tokens, 4 * clip_width) from (n, views, 576, clip_width), a picture after another.

    sub_GN ends every row of cells, glb_GN separates the crops from the global view.
    """
    line_end = g.weight("sub_GN", weights.normal(1, 1, 1, shape.merged))
    separator = g.weight("glb_GN", weights.normal(1, shape.merged))
    globals_ = g.op("Gather", views, g.scalar(0), axis=1)
    globals_ = _grid(g, globals_, g.ints(1), g.ints(1), line_end, shape)

    body = g.body("picture")
    index = body.input("picture/index", INT64, [])
    body.input("picture/go_on", BOOL, [])
    before = body.sequence("picture/before")
    size = body.op("Gather", "image_sizes", index, axis=0)
    crops = body.op("Div", size, body.scalar(SIDE))
    down = body.op("Slice", crops, body.ints(0), body.ints(1), body.ints(0))
    across = body.op("Slice", crops, body.ints(1), body.ints(2), body.ints(0))
    end = body.op("Add", body.op("Mul", down, across), body.ints(1))
    own = body.op("Gather", views, index, axis=0)
    own = body.op("Slice", own, body.ints(1), end, body.ints(0))
    own = body.op("Squeeze", _grid(body, own, down, across, line_end, shape), body.ints(0))
    whole = body.op("Gather", globals_, index, axis=0)
    tokens = body.op("Concat", own, separator, whole, axis=0)
    body.op("SequenceInsert", before, tokens, outputs=["picture/after"])
    body.op("Identity", "picture/go_on", outputs=["picture/go_on_then"])
    body.output("picture/go_on_then", BOOL, [])
    body.sequence("picture/after", out=True)

    count = g.op("Gather", g.op("Shape", "image_sizes"), g.scalar(0), axis=0)
    none = g.op("SequenceEmpty", dtype=FLOAT)
    pictures = g.op("Loop", count, "", none, body=body.proto())
    return g.op("ConcatFromSequence", pictures, axis=0)


def _grid(g: Graph, views: str, down: str, across: str, line_end: str, shape: Shape) -> str:
    """(pictures, rows * (columns + 1), 4 * clip_width): crops laid out, each row with its end.

    `views` is (pictures * down * across, 576, clip_width), `down` and `across` are vectors of one.
    """
    cells = g.ints(CELLS)
    x = g.op("Reshape", views, g.ints(-1, CELLS, 2, CELLS, 2, shape.clip_width))
    x = g.op("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
    apart = g.op("Concat", g.ints(-1), down, across, cells, cells, g.ints(shape.merged), axis=0)
    x = g.op("Transpose", g.op("Reshape", x, apart), perm=[0, 1, 3, 2, 4, 5])
    rows, columns = g.op("Mul", down, cells), g.op("Mul", across, cells)
    x = g.op("Reshape", x, g.op("Concat", g.ints(-1), rows, columns, g.ints(shape.merged), axis=0))
    count = g.op("Slice", g.op("Shape", x), g.ints(0), g.ints(1), g.ints(0))
    ends = g.op("Expand", line_end, g.op("Concat", count, rows, g.ints(1, 1), axis=0))
    x = g.op("Concat", x, ends, axis=2)
    return g.op("Reshape", x, g.op("Concat", count, g.ints(-1, shape.merged), axis=0))
