"""H3 (Fu et al. 2022, arXiv 2212.14052) throughout: a shift and a diagonal state space with products between."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, intermediate_size=128, head_dim=4, shift=8, state_dim=8),
    # the widths and depths of the published models, whose attention layers (two or three) are H3 layers here
    "125m": dict(vocab_size=50257, hidden_size=768, depth=12, intermediate_size=3072),
    "355m": dict(vocab_size=50257, hidden_size=1024, depth=24, intermediate_size=4096),
    "1b3": dict(vocab_size=50257, hidden_size=2048, depth=24, intermediate_size=8192, head_dim=8),
    "2b7": dict(vocab_size=50257, hidden_size=2560, depth=32, intermediate_size=10240, head_dim=8),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    intermediate_size: int,
    head_dim: int = 1,
    shift: int = 64,
    state_dim: int = 64,
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of H3 and an MLP with GELU, with layer norms."""
    return uniform(
        "h3",
        dict(head_dim=head_dim, shift=shift, state_dim=state_dim),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size,
        channel="gelu_mlp",
        norm=Norm(kind="layer", eps=norm_eps),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
