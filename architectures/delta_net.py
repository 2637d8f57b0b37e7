"""DeltaNet (Yang et al. 2024, arXiv 2406.06484) throughout: linear attention that overwrites what a key held."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=2, intermediate_size=128),
    "340m": dict(vocab_size=32000, hidden_size=1024, depth=24, heads=8, intermediate_size=2816, tied=False),
    # fla-hub/delta_net-1.3B-100B and fla-hub/delta_net-2.7B-100B
    "1b3": dict(vocab_size=32000, hidden_size=2048, depth=24, heads=16, intermediate_size=5632, tied=False),
    "2b7": dict(vocab_size=32000, hidden_size=2560, depth=32, heads=20, intermediate_size=6912, tied=False),
}
# The checkpoints' files in bf16: 2.73 GB, and 4.98 + 0.43 GB. The paper names 340m without a count.
PARAMETERS = {"1b3": 1_365_000_000, "2b7": 2_705_000_000}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    conv: int = 4,
    gate: str | None = None,
    beta_scale: float = 1.0,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of DeltaNet and SwiGLU; `beta_scale` 2 allows negative eigenvalues."""
    return uniform(
        "delta_net",
        dict(heads=heads, head_dim=hidden_size // heads, conv=conv, gate=gate, beta_scale=beta_scale),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size,
        norm=Norm(eps=norm_eps),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
