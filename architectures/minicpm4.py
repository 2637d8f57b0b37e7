"""MiniCPM4 (MiniCPM Team 2025, arXiv 2506.07900): InfLLM-V2 attention in every layer, dense below 8192 tokens.

Grouped-query attention with 2 KV heads and LongRoPE; residual branches, embedding and logits are scaled as in muP. The
published checkpoints need code of their own (`model_type` minicpm is no class of transformers): this is their layout.
"""

from __future__ import annotations

from typing import Any

from zoo.architectures.core.config import DecoderConfig, Embed, Head, Layer, Norm, Rope

# openbmb/MiniCPM4-8B, config.json: short and long factors are the same
FACTORS = (
    *(0.9977997200264581, 1.014658295992452, 1.0349680404997148, 1.059429246056193, 1.0888815016813513),
    *(1.1243301355211495, 1.166977103606075, 1.2182568066927284, 1.2798772354275727, 1.3538666751582975),
    *(1.4426259039919596, 1.5489853358570191, 1.6762658237220625, 1.8283407612492941, 2.0096956085876183),
    *(2.225478927469756, 2.481536379650452, 2.784415934557119, 3.1413289096347365, 3.560047844772632),
    *(4.048719380066383, 4.615569542115128, 5.2684819496549835, 6.014438591970396, 6.858830049237097),
    *(7.804668263503327, 8.851768731513417, 9.99600492938444, 11.228766118181639, 12.536757560834843),
    *(13.902257701387796, 15.303885189125953, 16.717837610115794, 18.119465097853947, 19.484965238406907),
    *(20.792956681060105, 22.02571786985731, 23.16995406772833, 24.217054535738416, 25.16289275000465),
    *(26.007284207271347, 26.753240849586767, 27.40615325712662, 27.973003419175363, 28.461674954469114),
    *(28.880393889607006, 29.237306864684626, 29.540186419591297, 29.79624387177199, 30.01202719065413),
    *(30.193382037992453, 30.34545697551969, 30.47273746338473, 30.579096895249787, 30.66785612408345),
    *(30.741845563814174, 30.80346599254902, 30.85474569563567, 30.897392663720595, 30.932841297560394),
    *(30.962293553185553, 30.986754758742034, 31.007064503249293, 31.02392307921529),
)
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": list(FACTORS),
    "long_factor": list(FACTORS),
    "original_max_position_embeddings": 32768,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=2,
        heads=4,
        kv_heads=2,
        intermediate_size=128,
        base_size=16,
        attention=dict(block=16, kernel=8, stride=4, window=16, dense_len=16, budget=48),
    ),
    "0.5b": dict(
        vocab_size=73448, hidden_size=1024, depth=24, heads=16, kv_heads=2, intermediate_size=4096, norm_eps=1e-5
    ),
    "8b": dict(
        vocab_size=73448,
        hidden_size=4096,
        depth=32,
        heads=32,
        kv_heads=2,
        intermediate_size=16384,
        tied=False,
        rope=Rope(dim=128, scaling=LONG_ROPE),
    ),
}
# counted by hand from the published configs
PARAMETERS = {"0.5b": 433_900_000, "8b": 8_185_000_000}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    kv_heads: int,
    intermediate_size: int,
    attention: dict[str, Any] | None = None,
    base_size: int = 256,
    embed_scale: float = 12.0,
    depth_scale: float = 1.4,
    rope: Rope | None = None,
    norm_eps: float = 1e-6,
    tied: bool = True,
    max_position_embeddings: int = 32768,
) -> DecoderConfig:
    """`depth` layers alike; `attention` are options of `infllm_v2`, the published ones by default.

    Residual branches are scaled by `depth_scale / sqrt(depth)`, logits by `base_size / hidden_size`.
    """
    head_dim = hidden_size // heads
    layer = Layer(
        mixer="infllm_v2",
        mixer_args=dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope="default", **(attention or {})),
        channel="swiglu",
        channel_args=dict(intermediate_size=intermediate_size),
        block_args=dict(residual_scale=depth_scale * depth**-0.5),
    )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(layer,) * depth,
        embed=Embed(scale=embed_scale),
        head=Head(scale=base_size / hidden_size, tied=tied),
        norm=Norm(eps=norm_eps),
        ropes={"default": rope or Rope(dim=head_dim)},
        max_position_embeddings=max_position_embeddings,
    )
