"""Griffin and Hawk (De et al. 2024, arXiv 2402.19427): RG-LRU layers with local attention in each third, or alone.

RecurrentGemma's layers without its scaled embeddings and capped logits, with RG-LRUs wider than the residual stream.
"""

from __future__ import annotations

from typing import Any

from zoo.architectures import recurrent_gemma
from zoo.architectures.core.config import DecoderConfig

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, hidden_size=64, depth=3, heads=4, intermediate_size=128, width=96, window=8),
    "hawk_tiny": dict(
        vocab_size=256, hidden_size=64, depth=2, heads=4, intermediate_size=128, width=96, attention=False
    ),
    # the paper's 7B models as its authors' library has them
    "7b": dict(vocab_size=256000, hidden_size=4096, depth=32, heads=32, intermediate_size=12288, width=5632),
    "hawk_7b": dict(
        vocab_size=256000, hidden_size=4096, depth=32, heads=32, intermediate_size=12288, width=5632, attention=False
    ),
}
# transformers' `recurrent_gemma` class with these sizes; the paper rounds to 7B
PARAMETERS = {"7b": 7_795_144_704, "hawk_7b": 8_161_562_624}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    intermediate_size: int,
    width: int,
    attention: bool = True,
    kv_heads: int = 1,
    window: int = 1024,
    conv: int = 4,
    tied: bool = True,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers, each third with attention over `window` keys (Griffin) or all recurrent (Hawk)."""
    return recurrent_gemma.layout(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        intermediate_size=intermediate_size,
        window=window,
        width=width,
        conv=conv,
        kinds=recurrent_gemma.PATTERN if attention else ("recurrent",),
        scaled=False,
        logit_softcap=None,
        tied=tied,
        max_position_embeddings=max_position_embeddings,
    )
