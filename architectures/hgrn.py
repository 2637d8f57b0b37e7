"""HGRN (Qin et al. 2023, arXiv 2311.04823) throughout: an elementwise recurrence, slower in deeper layers."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.lower_bounds import rising
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, intermediate_size=128),
    "tiny_complex": dict(vocab_size=256, hidden_size=64, depth=2, intermediate_size=128, complex=True),
    # fla-hub/hgrn-1.3B-100B and fla-hub/hgrn-2.7B-100B
    "1b3": dict(vocab_size=32000, hidden_size=2048, depth=24, intermediate_size=5632, tied=False),
    "2b7": dict(vocab_size=32000, hidden_size=2560, depth=32, intermediate_size=6912, tied=False),
}
# The 1.3B checkpoint's file has 2.73 GB in bf16; the count of 2.7B is computed from its config.
PARAMETERS = {"1b3": 1_365_000_000, "2b7": 2_701_000_000}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    intermediate_size: int,
    width: int | None = None,
    complex: bool = False,
    gate: str = "silu",
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of HGRN and SwiGLU; `width` (None: the hidden size) channels, `complex` for complex states."""
    return rising(
        uniform(
            "hgrn",
            dict(width=width, complex=complex, gate=gate),
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            depth=depth,
            intermediate_size=intermediate_size,
            norm=Norm(eps=norm_eps),
            tied=tied,
            max_position_embeddings=max_position_embeddings,
        )
    )
