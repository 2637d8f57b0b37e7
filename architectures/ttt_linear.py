"""TTT-Linear (Sun et al. 2024, arXiv 2407.04620) throughout: the state is a linear model that learns as it reads."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=4, intermediate_size=128, mini_batch=4),
    # the sizes of the paper's models, on the Transformer backbone
    "125m": dict(vocab_size=32000, hidden_size=768, depth=12, heads=12, intermediate_size=2048),
    "350m": dict(vocab_size=32000, hidden_size=1024, depth=24, heads=16, intermediate_size=2736),
    "760m": dict(vocab_size=32000, hidden_size=1536, depth=24, heads=16, intermediate_size=4096),
    "1b3": dict(vocab_size=32000, hidden_size=2048, depth=24, heads=32, intermediate_size=5504),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    mini_batch: int = 16,
    base_lr: float = 1.0,
    gate: bool = False,
    shared_qk: bool = False,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of TTT-Linear and SwiGLU; `gate` and `shared_qk` make the mixer that of the Mamba backbone."""
    sizes = dict(heads=heads, head_dim=hidden_size // heads, mini_batch=mini_batch)
    return uniform(
        "ttt_linear",
        dict(**sizes, base_lr=base_lr, gate=gate, shared_qk=shared_qk),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size,
        norm=Norm(eps=norm_eps),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
