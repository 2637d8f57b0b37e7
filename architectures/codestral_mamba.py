"""Codestral Mamba (Mistral AI 2024): Mamba-2 with eight groups of B and C and an output head of its own.

Its checkpoint has the format of Mamba-2 and reads as architecture `mamba2`.
"""

from __future__ import annotations

from typing import Any

from zoo.architectures import mamba2
from zoo.architectures.core.config import DecoderConfig

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=8, head_dim=16, state_dim=16, groups=4),
    "7b": dict(vocab_size=32768, hidden_size=4096, depth=64, max_position_embeddings=262144),
}
PARAMETERS = {"7b": 7285403648}  # mistralai/Mamba-Codestral-7B-v0.1


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int = 128,
    head_dim: int = 64,
    state_dim: int = 128,
    groups: int = 8,
    norm_groups: int = 1,
    tied: bool = False,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` Mamba-2 layers whose heads share B and C in `groups` groups; the output norm has `norm_groups`."""
    return mamba2.layout(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        heads=heads,
        head_dim=head_dim,
        state_dim=state_dim,
        groups=groups,
        norm_groups=norm_groups,
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
