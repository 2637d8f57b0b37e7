"""GPT-3 (Brown et al. 2020, arXiv 2005.14165): dense layers and locally banded sparse ones by turns, learned positions.

A locally banded layer is attention over a window."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Embed, Head, Layer, Norm


def _size(hidden_size: int, depth: int, heads: int) -> dict[str, Any]:
    return dict(vocab_size=50257, hidden_size=hidden_size, depth=depth, heads=heads)


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=4, window=8, max_position_embeddings=512),
    "125m": _size(768, 12, 12),
    "350m": _size(1024, 24, 16),
    "760m": _size(1536, 24, 16),
    "1b3": _size(2048, 24, 16),  # the paper's table has 24 heads of 128 channels, which are more than 2048
    "2b7": _size(2560, 32, 32),
    "6b7": _size(4096, 32, 32),
    "13b": _size(5120, 40, 40),  # the paper's table has 5140, which 40 heads of 128 channels do not make
    "175b": _size(12288, 96, 96),
}
# Table 2.1 of the paper; it rounds the other sizes by more than 1%.
PARAMETERS = {"125m": 125_000_000, "760m": 760_000_000, "6b7": 6_700_000_000, "175b": 175_000_000_000}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    window: int = 256,
    intermediate_size: int | None = None,
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers, the first and every second after it dense, the others over `window` keys (the width of the
    published band is not known)."""
    bias = dict(q_bias=True, k_bias=True, v_bias=True, o_bias=True)
    dense = dict(heads=heads, head_dim=hidden_size // heads, **bias)
    channel = dict(intermediate_size=intermediate_size or 4 * hidden_size)

    def layer(index: int) -> Layer:
        args = dense if index % 2 == 0 else {**dense, "window": window}
        return Layer(mixer="attention", mixer_args=args, channel="gelu_mlp", channel_args=channel)

    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layer(i) for i in range(depth)),
        embed=Embed(learned_positions=max_position_embeddings),
        head=Head(tied=tied),
        norm=Norm(kind="layer", eps=norm_eps),
        max_position_embeddings=max_position_embeddings,
    )
