"""Linformer (Wang et al. 2020, arXiv 2006.04768): an encoder whose attention reads a fixed number of mixtures of the
text."""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Embed, Head, Layer, Norm
from zoo.errors import ZooError

SHARING = ("heads", "kv", "layers")
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256, hidden_size=64, depth=2, heads=4, mixtures=8, intermediate_size=128, max_position_embeddings=64
    ),
    "base": dict(vocab_size=50265, hidden_size=768, depth=12, heads=12, mixtures=256, intermediate_size=3072),
}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    mixtures: int,
    intermediate_size: int,
    sharing: str = "layers",
    norm_eps: float = 1e-5,
    tied: bool = True,
    max_position_embeddings: int = 512,
) -> DecoderConfig:
    """`depth` layers, post-norm as BERT's, for at most `max_position_embeddings` tokens.

    One pair of mixing matrices per layer ("heads" share it), one matrix per layer ("kv"), or one in all ("layers").
    """
    if sharing not in SHARING:
        raise ZooError(f"sharing was {sharing!r}; it must be one of {', '.join(SHARING)}")
    bias = dict(q_bias=True, k_bias=True, v_bias=True, o_bias=True)
    size = dict(length=max_position_embeddings, mixtures=mixtures, separate=sharing == "heads")
    layer = Layer(
        mixer="linformer",
        mixer_args=dict(heads=heads, head_dim=hidden_size // heads, **bias, **size),
        channel="gelu_mlp",
        channel_args=dict(intermediate_size=intermediate_size, activation="gelu"),
        block="post_norm",
        block_args=dict(norm_of="sum"),
        share={"mixer.key_mixing": "mixing"} if sharing == "layers" else {},
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(layer,) * depth,
        embed=Embed(learned_positions=max_position_embeddings, norm=True),
        head=Head(tied=tied, norm=False),
        norm=Norm(kind="layer", eps=norm_eps),
        max_position_embeddings=max_position_embeddings,
    )
