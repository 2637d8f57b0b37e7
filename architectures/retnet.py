"""RetNet (Sun et al. 2023, arXiv 2307.08621): retention throughout, values twice as wide as keys."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm, Rope
from zoo.architectures.core.stack import uniform

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=2, heads=2, intermediate_size=128),
    "tiny_gelu": dict(
        vocab_size=256, hidden_size=64, depth=2, heads=2, intermediate_size=128, channel="gelu_mlp", norm_center=True
    ),
    # fla-hub/retnet-1.3B-100B and fla-hub/retnet-2.7B-100B
    "1b3": dict(vocab_size=32000, hidden_size=2048, depth=24, heads=8, intermediate_size=2816, tied=False),
    "2b7": dict(vocab_size=32000, hidden_size=2560, depth=32, heads=10, intermediate_size=3584, tied=False),
    # table 2 of the paper, whose channel has no gate
    "6b7": dict(
        vocab_size=32000, hidden_size=4096, depth=32, heads=16, intermediate_size=8192, channel="gelu_mlp", tied=False
    ),
}
# Computed from the published configs.
PARAMETERS = {"1b3": 1_351_772_160, "2b7": 2_722_307_840, "6b7": 6_704_660_480}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    expand_v: float = 2.0,
    channel: str = "swiglu",
    norm_center: bool = False,
    rope_theta: float = 10000.0,
    pairing: str = "half",
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of retention, with values `expand_v` times as wide as keys, and `channel`.

    `norm_center` makes the norm of each head a group norm, as in the paper; `pairing` is that of the rotary table.
    """
    head_dim = hidden_size // heads
    mixer = dict(heads=heads, head_dim=head_dim, value_dim=int(head_dim * expand_v), rope="default")
    return uniform(
        "retention",
        {**mixer, "norm_center": norm_center, "norm_eps": norm_eps},
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        channel=channel,
        intermediate_size=intermediate_size,
        norm=Norm(eps=norm_eps),
        tied=tied,
        ropes={"default": Rope(dim=head_dim, theta=rope_theta, pairing=pairing)},
        max_position_embeddings=max_position_embeddings,
    )
