"""Hymba (Dong et al. 2024, arXiv 2411.13676): attention heads and Mamba heads side by side in every layer.

Both read the same input, are normalised and averaged, and share one output projection. Three layers see everything
(first, middle, last), the others a window; neighbouring windowed layers share keys and values. Learned meta tokens
stand before every sequence and stay visible to all windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=250,
        hidden_size=64,
        depth=4,
        heads=4,
        kv_heads=2,
        head_dim=16,
        value_dim=32,
        state_dim=8,
        intermediate_size=128,
        global_layers=(0, 3),
        window=6,
        meta_tokens=2,
    ),
    "1.5b": dict(
        vocab_size=32001,
        hidden_size=1600,
        depth=32,
        heads=25,
        kv_heads=5,
        head_dim=64,
        value_dim=128,
        state_dim=16,
        intermediate_size=5504,
        global_layers=(0, 15, 31),
        window=1024,
        meta_tokens=128,
        max_position_embeddings=8192,
    ),
}
PARAMETERS = {"1.5b": 1_520_000_000}  # the model card's 1.52B


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    state_dim: int,
    intermediate_size: int,
    global_layers: Sequence[int],
    window: int,
    meta_tokens: int,
    conv: int = 4,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-6,
    max_position_embeddings: int = 2048,
) -> DecoderConfig:
    """`depth` layers; all but `global_layers` see `window` tokens and the meta tokens.

    Heads have keys of `head_dim` and values of `value_dim` channels; Mamba is as wide as all heads' values, with
    `state_dim` states. The `meta_tokens` are the last ids of the vocabulary (see `meta_ids`).
    """
    attention = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim, "rope": "default"}
    local = {**attention, "window": window, "sinks": meta_tokens}
    mamba = {"inner": heads * value_dim, "state_dim": state_dim, "conv": conv, "norm": "rms", "norm_eps": norm_eps}
    writers = shared_keys(depth, global_layers)

    def layer(index: int) -> Layer:
        first, args = "attention", dict(attention if index in global_layers else local)
        if (writer := writers.get(index)) is not None:
            first, name = ("attention", "writes") if writer == index else ("cross", "kv")
            args[name] = f"layer{writer}"
        branches = {"first": first, "first_args": args, "second": "mamba", "second_args": mamba}
        return Layer(
            mixer="parallel",
            mixer_args={**branches, "norms": True, "average": True, "joint": True},
            channel="swiglu",
            channel_args={"intermediate_size": intermediate_size},
        )

    return DecoderConfig(
        vocab_size=vocab_size + meta_tokens,
        hidden_size=hidden_size,
        layers=tuple(layer(i) for i in range(depth)),
        head=Head(tied=True),
        norm=Norm(eps=norm_eps),
        ropes={"default": Rope(dim=head_dim, theta=rope_theta)},
        max_position_embeddings=max_position_embeddings,
    )


def shared_keys(depth: int, global_layers: Sequence[int]) -> dict[int, int]:
    """For each layer that shares keys and values, the layer that makes them.

    Windowed layers between two global ones go in pairs; of an odd number, the first three go together.
    """
    writers: dict[int, int] = {}
    edges = [-1, *sorted(global_layers), depth]
    for before, after in zip(edges, edges[1:], strict=False):
        run = list(range(before + 1, after))
        while len(run) > 1:
            size = 2 if len(run) % 2 == 0 else 3
            writers |= dict.fromkeys(run[:size], run[0])
            run = run[size:]
    return writers


def meta_ids(config: DecoderConfig) -> list[int]:
    """The ids that must stand before every sequence, in order: the vocabulary's last ones."""
    count = max(layer.mixer_args["first_args"].get("sinks", 0) for layer in config.layers)
    return list(range(config.vocab_size - count, config.vocab_size))
