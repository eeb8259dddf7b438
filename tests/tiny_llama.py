"""A Llama of two small layers with random weights: a GGUF file to convert, and what it computes."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

# The tokens are GPT-2's 256 byte characters, after three of control.
LAYERS, WIDTH, HEADS, KV_HEADS, INNER = 2, 64, 4, 2, 96
BYTES = "".join(map(chr, [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]))
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "th", "the"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
META = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.embedding_length": WIDTH,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.feed_forward_length": INNER,
    "llama.context_length": 128,
    "llama.vocab_size": len(TOKENS),
    "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.merges": ["t h", "th e"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.chat_template": TEMPLATE,
}


class TinyLlama:
    """Random weights, as a GGUF file and as plain floats."""

    def __init__(self, seed: int = 1) -> None:
        self._random = np.random.default_rng(seed)
        self.floats: dict[str, Floats] = {}
        self._tensors: list[tuple[str, tuple[int, ...], int, bytes]] = []
        self._q8_0("token_embd.weight", len(TOKENS), WIDTH)
        for layer in range(LAYERS):
            kv = WIDTH // HEADS * KV_HEADS
            for name, rows, columns in (
                ("attn_q", WIDTH, WIDTH),
                ("attn_k", kv, WIDTH),
                ("attn_v", kv, WIDTH),
                ("attn_output", WIDTH, WIDTH),
                ("ffn_gate", INNER, WIDTH),
                ("ffn_up", INNER, WIDTH),
                ("ffn_down", WIDTH, INNER),
            ):
                self._q4_1(f"blk.{layer}.{name}.weight", rows, columns)
            self._f32(f"blk.{layer}.attn_norm.weight")
            self._f32(f"blk.{layer}.ffn_norm.weight")
        self._f32("output_norm.weight")

    def _f32(self, name: str) -> None:
        values = self._random.uniform(0.5, 1.5, WIDTH).astype(np.float32)
        self.floats[name] = values
        self._tensors.append((name, (WIDTH,), 0, values.tobytes()))

    def _q8_0(self, name: str, rows: int, columns: int) -> None:
        scale = np.float16(2**-6)
        codes = self._random.integers(-127, 128, (rows, columns // 32, 32), dtype=np.int8)
        self.floats[name] = (codes * np.float32(scale)).reshape(rows, columns)
        raw = b"".join(scale.tobytes() + block.tobytes() for row in codes for block in row)
        self._tensors.append((name, (rows, columns), 8, raw))

    def _q4_1(self, name: str, rows: int, columns: int) -> None:
        # Zero points are whole here, so that nothing is lost and the numbers must agree.
        codes = self._random.integers(0, 16, (rows, columns // 32, 32), dtype=np.uint8)
        scales = (2.0 ** -self._random.integers(5, 7, codes.shape[:2])).astype(np.float16)
        least = -scales * self._random.integers(5, 11, codes.shape[:2]).astype(np.float16)
        values = codes * scales[..., None].astype(np.float32) + least[..., None]
        self.floats[name] = values.reshape(rows, columns).astype(np.float32)
        raw = b"".join(
            scales[at].tobytes()
            + least[at].tobytes()
            + (codes[at][:16] | codes[at][16:] << 4).tobytes()
            for at in np.ndindex(scales.shape)
        )
        self._tensors.append((name, (rows, columns), 3, raw))

    def gguf(self, **meta: Any) -> bytes:
        out = io.BytesIO()
        merged = META | meta
        out.write(b"GGUF" + struct.pack("<IQQ", 3, len(self._tensors), len(merged)))
        for key, value in merged.items():
            out.write(_text(key) + _typed(value))
        at = 0
        for name, shape, kind, raw in self._tensors:
            sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
            out.write(_text(name) + sizes + struct.pack("<IQ", kind, at))
            at += len(raw) + -len(raw) % 32
        out.write(bytes(-out.tell() % 32))
        for *_, raw in self._tensors:
            out.write(raw + bytes(-len(raw) % 32))
        return out.getvalue()

    def logits(self, ids: list[int]) -> Floats:
        """What the weights say comes next, in plain numpy and full precision."""
        w, size = self.floats, WIDTH // HEADS
        x = w["token_embd.weight"][ids]
        speeds = META["llama.rope.freq_base"] ** -(np.arange(0, size, 2) / size)  # type: ignore[operator]
        turn = np.exp(1j * np.outer(np.arange(len(ids)), speeds))
        unseen = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
        for layer in range(LAYERS):

            def apply(x: Floats, name: str, layer: int = layer) -> Floats:
                return x @ w[f"blk.{layer}.{name}.weight"].T

            def heads(x: Floats, *, rotated: bool) -> Floats:
                # A GGUF file has the two numbers that are rotated together side by side.
                split = x.reshape(len(ids), -1, size)
                if rotated:
                    turned = (split[..., ::2] + 1j * split[..., 1::2]) * turn[:, None]
                    split = np.stack([turned.real, turned.imag], -1).reshape(split.shape)
                return np.repeat(split, HEADS // split.shape[1], axis=1)

            h = _norm(x, w[f"blk.{layer}.attn_norm.weight"])
            q, k = (heads(apply(h, name), rotated=True) for name in ("attn_q", "attn_k"))
            v = heads(apply(h, "attn_v"), rotated=False)
            seen = np.exp(np.einsum("qhd,khd->hqk", q, k) * size**-0.5 + unseen)
            mixed = np.einsum("hqk,khd->qhd", seen / seen.sum(-1, keepdims=True), v)
            x = x + apply(mixed.reshape(len(ids), WIDTH), "attn_output")
            h = _norm(x, w[f"blk.{layer}.ffn_norm.weight"])
            gate = apply(h, "ffn_gate")
            x = x + apply(gate / (1 + np.exp(-gate)) * apply(h, "ffn_up"), "ffn_down")
        return _norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T


def _norm(x: Floats, weight: Floats) -> Floats:
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _typed(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    kind, form = (8, _text) if isinstance(value[0], str) else (5, struct.Struct("<i").pack)
    return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(map(form, value))
