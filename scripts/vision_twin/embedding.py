"""embedding.onnx: words by their number, pictures in the places left for them."""

from graph import FLOAT, INT64, Graph, Weights
from shape import Shape


def build(g: Graph, shape: Shape, weights: Weights) -> None:
    """Fill the graph: input_ids (negative where a picture goes) and image_features.

    Gives inputs_embeds (batch, sequence, width). The embeddings are float32, as in the official
    build.
    """
    g.input("input_ids", INT64, ["batch_size", "sequence_length"])
    g.input("image_features", FLOAT, ["num_image_tokens", shape.width])
    g.output("inputs_embeds", FLOAT, ["batch_size", "sequence_length", shape.width])
    words = g.weight("embed_tokens.weight", weights.normal(shape.vocabulary, shape.width))
    numbers = g.op("Max", "input_ids", g.scalar(0))
    text = g.op("Gather", words, numbers, axis=0)
    places = g.op("NonZero", g.op("Less", "input_ids", g.scalar(0)))
    places = g.op("Transpose", places, perm=[1, 0])
    g.op("ScatterND", text, places, "image_features", outputs=["inputs_embeds"])
