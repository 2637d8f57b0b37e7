"""H3 (Fu et al. 2022, arXiv 2212.14052): shift and diagonal state spaces with products between, and the published
hybrids with a few attention layers among them, all without positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Norm
from zoo.architectures.core.stack import uniform

VOCABULARY: dict[str, Any] = dict(vocab_size=50264)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=3,
        intermediate_size=128,
        head_dim=4,
        shift=8,
        state_dim=8,
        attention_layers=(1,),
        attention_heads=4,
    ),
    # the published hybrids (HazyResearch/H3), vocabularies filled up to a multiple of 8
    "125m": dict(**VOCABULARY, hidden_size=768, depth=12, attention_layers=(6,), attention_heads=12),
    "355m": dict(**VOCABULARY, hidden_size=1024, depth=24, attention_layers=(8, 16), attention_heads=16),
    "1b3": dict(**VOCABULARY, hidden_size=2048, depth=24, attention_layers=(8, 16), attention_heads=16),
    "2b7": dict(**VOCABULARY, hidden_size=2560, depth=32, attention_layers=(8, 16, 24), attention_heads=20),
}
# Printed by that repository's own example. It counts the state spaces' B, which enter as products with C: 0.9% of all.
PARAMETERS = {"125m": 126_387_456}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    intermediate_size: int | None = None,
    head_dim: int = 1,
    shift: int = 64,
    state_dim: int = 64,
    attention_layers: Sequence[int] = (),
    attention_heads: int | None = None,
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers of H3 and an MLP with GELU, with layer norms; those whose index (from 0) is in `attention_layers`
    have softmax attention with `attention_heads` (None: one per 64 channels). The MLP is `intermediate_size` wide
    (None: four times the hidden size)."""
    heads = attention_heads or max(1, hidden_size // 64)
    biases = dict(q_bias=True, k_bias=True, v_bias=True, o_bias=True)
    attention = dict(heads=heads, head_dim=hidden_size // heads, **biases)
    decoder = uniform(
        "h3",
        dict(head_dim=head_dim, shift=shift, state_dim=state_dim),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        intermediate_size=intermediate_size or 4 * hidden_size,
        channel="gelu_mlp",
        norm=Norm(kind="layer", eps=norm_eps),
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
    layers = (
        replace(layer, mixer="attention", mixer_args=attention) if index in attention_layers else layer
        for index, layer in enumerate(decoder.layers)
    )
    return replace(decoder, layers=tuple(layers))
