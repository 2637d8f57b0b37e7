"""Luna (Ma et al. 2021, arXiv 2106.01540): an encoder whose layers read the text through a pool of memory vectors."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Embed, Head, Layer, Norm

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256, hidden_size=64, depth=3, heads=4, pool=8, intermediate_size=128, max_position_embeddings=512
    ),
    "base": dict(vocab_size=50265, hidden_size=768, depth=12, heads=12, pool=128, intermediate_size=3072),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    pool: int,
    intermediate_size: int,
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_position_embeddings: int = 512,
) -> DecoderConfig:
    """`depth` layers, post-norm as BERT's; the first owns the `pool` memory vectors."""
    args = dict(heads=heads, head_dim=hidden_size // heads, bias=True, norm_eps=norm_eps)

    def layer(index: int) -> Layer:
        return Layer(
            mixer="luna",
            mixer_args={**args, "pool": pool} if index == 0 else args,
            channel="gelu_mlp",
            channel_args=dict(intermediate_size=intermediate_size, activation="gelu"),
            block="post_norm",
            block_args=dict(norm_of="sum"),
        )

    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layer(i) for i in range(depth)),
        embed=Embed(learned_positions=max_position_embeddings, norm=True),
        head=Head(tied=tied, norm=False),
        norm=Norm(kind="layer", eps=norm_eps),
        max_position_embeddings=max_position_embeddings,
    )
