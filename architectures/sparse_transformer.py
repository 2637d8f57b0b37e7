"""Sparse Transformer (Child et al. 2019, arXiv 1904.10509): strided or fixed factorised attention."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Embed, Head, Layer, Norm
from zoo.errors import ZooError

SIZES: dict[str, Any] = dict(vocab_size=256, hidden_size=64, depth=2, heads=4, stride=6, max_position_embeddings=512)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(**SIZES, summary=2),
    "tiny_strided": dict(**SIZES, pattern="strided", merged=False),
    "enwik8": dict(
        vocab_size=256, hidden_size=512, depth=30, heads=8, stride=128, summary=32, max_position_embeddings=12288
    ),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    stride: int,
    summary: int = 1,
    pattern: str = "fixed",
    merged: bool = True,
    intermediate_size: int | None = None,
    norm_eps: float = 1e-5,
    tied: bool = False,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of the `pattern`, "strided" (images, sound) or "fixed" (text), with period `stride`.

    Every layer has both parts of the pattern in one softmax, or, not `merged`, the layers take turns: local part first,
    then the column. `summary` is the number of columns at the end of a fixed block.
    """
    if pattern not in ("strided", "fixed"):
        raise ZooError(f"pattern was {pattern!r}; it must be strided or fixed")
    sizes = dict(stride=stride) if pattern == "strided" else dict(block=stride, summary=summary)
    channel = dict(intermediate_size=intermediate_size or 4 * hidden_size, activation="gelu_sigmoid")

    def layer(index: int) -> Layer:
        part = "both" if merged else ("local", "column")[index % 2]
        args = dict(heads=heads, head_dim=hidden_size // heads, part=part, **sizes)
        return Layer(mixer=pattern, mixer_args=args, channel="gelu_mlp", channel_args=channel)

    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layer(i) for i in range(depth)),
        embed=Embed(learned_positions=max_position_embeddings),
        head=Head(tied=tied),
        norm=Norm(kind="layer", eps=norm_eps),
        max_position_embeddings=max_position_embeddings,
    )
