"""LogSparse Transformer (Li et al. 2019, arXiv 1907.00235): each token sees logarithmically many predecessors."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Embed, Norm
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=4, max_position_embeddings=512),
    "tiny_restart": dict(
        vocab_size=256, hidden_size=64, depth=2, heads=4, local=3, restart=8, max_position_embeddings=512
    ),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    local: int = 1,
    restart: int | None = None,
    intermediate_size: int | None = None,
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers, each with the `local` last keys too, in sub-sequences of `restart` tokens if that is given."""
    return uniform(
        "log_sparse",
        dict(heads=heads, head_dim=hidden_size // heads, local=local, restart=restart),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        channel="gelu_mlp",
        intermediate_size=intermediate_size or 4 * hidden_size,
        norm=Norm(kind="layer", eps=norm_eps),
        embed=Embed(learned_positions=max_position_embeddings),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
