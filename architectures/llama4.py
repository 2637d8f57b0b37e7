"""Llama 4 (Meta 2025, https://ai.meta.com/blog/llama-4-multimodal-intelligence): three layers with RoPE that see chunks
of 8192 tokens, then one without positions that sees everything ("iRoPE"); mixtures of experts beside a shared expert.

The format is transformers' `llama4_text`, and the language model of the multimodal `llama4`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.local_global import BIASES, FULL, whole_rope
from zoo.architectures.core.published import (
    confirm,
    head_rule,
    linear_rules,
    require,
    rope_parameters,
    text_config,
    towers,
)
from zoo.architectures.core.rules import Rule, rename, transpose
from zoo.architectures.mixers.attention import Args as Attention
from zoo.errors import ZooError

ARCHITECTURE = "llama4"
CHUNKED = "chunked_attention"
_RELEASED = dict(
    vocab_size=202048,
    hidden_size=5120,
    depth=48,
    heads=40,
    kv_heads=8,
    head_dim=128,
    intermediate_size=16384,
    expert_size=8192,
    top_k=1,
)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        depth=4,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        expert_size=48,
        experts=4,
        top_k=1,
        moe_every=2,
        chunk=8,
        temperature=(4, 0.1),
        max_position_embeddings=2048,
    ),
    "scout": dict(
        _RELEASED,
        experts=16,
        moe_every=1,
        rope=Rope(
            dim=128,
            theta=500000.0,
            scaling=dict(
                rope_type="llama3",
                factor=16.0,
                low_freq_factor=1.0,
                high_freq_factor=1.0,
                original_max_position_embeddings=8192,
            ),
            pairing="interleaved",
        ),
        max_position_embeddings=10485760,
    ),
    "maverick": dict(_RELEASED, experts=128, moe_every=2, qk_norm=False, max_position_embeddings=1048576),
}
# The announced 109B and 400B, without the 0.9B of the image encoder: computed from the published configs.
PARAMETERS = {"scout": 107_770_000_000, "maverick": 400_000_000_000}
# what transformers takes for a field that a config leaves out
DEFAULTS: dict[str, Any] = dict(
    vocab_size=202048,
    hidden_size=5120,
    intermediate_size=8192,
    intermediate_size_mlp=16384,
    num_hidden_layers=48,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    num_experts_per_tok=1,
    num_local_experts=16,
    interleave_moe_layer_step=1,
    use_qk_norm=True,
    no_rope_layer_interval=4,
    attention_chunk_size=8192,
    attn_temperature_tuning=True,
    floor_scale=8192,
    attn_scale=0.1,
    attention_bias=False,
    rope_theta=500000.0,
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    depth: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    expert_size: int,
    experts: int,
    top_k: int,
    moe_every: int = 1,
    moe_layers: Sequence[int] | None = None,
    global_every: int = 4,
    rotated: Sequence[bool] | None = None,
    kinds: Sequence[str] | None = None,
    chunk: int | None = 8192,
    temperature: tuple[float, float] | None = (8192, 0.1),
    qk_norm: bool = True,
    attention_bias: bool = False,
    rope: Rope | None = None,
    norm_eps: float = 1e-5,
    tied: bool = False,
    max_position_embeddings: int = 131072,
) -> DecoderConfig:
    """`depth` layers. `rotated` says which have positions (default: all but each `global_every`-th), `kinds`
    (chunked_attention, full_attention) what they see (default: those with positions see chunks), and `moe_layers` where
    experts of `expert_size` are (default: each `moe_every`-th); the others are dense, of `intermediate_size`.

    `temperature` (floor, scale) is for the layers without positions, `qk_norm` for those with.
    """
    rotated = rotated or [(index + 1) % global_every != 0 for index in range(depth)]
    kinds = kinds or [CHUNKED if each else FULL for each in rotated]
    sparse = range(moe_every - 1, depth, moe_every) if moe_layers is None else moe_layers
    attention = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, **dict.fromkeys(BIASES, attention_bias))
    # a norm to the root mean square 1 is one to length 1, with scores that are head_dim times as large
    norm = dict(qk_norm="l2", qk_norm_after_rope=True, qk_norm_eps=head_dim * norm_eps, scale=head_dim**0.5)
    with_positions = {"rope": "default", **(norm if qk_norm else {})}
    moe = dict(
        experts=experts,
        top_k=top_k,
        intermediate_size=expert_size,
        router="sigmoid",
        weight_input=True,
        shared_size=expert_size,
    )

    def layer(index: int) -> Layer:
        mixer = attention | (with_positions if rotated[index] else {"temperature": temperature})
        if kinds[index] == CHUNKED:
            mixer |= {"chunk": chunk}
        if index in sparse:
            return Layer(mixer="attention", mixer_args=mixer, channel="moe", channel_args=moe)
        dense = dict(intermediate_size=intermediate_size)
        return Layer(mixer="attention", mixer_args=mixer, channel="swiglu", channel_args=dense)

    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(layer(index) for index in range(depth)),
        head=Head(tied=tied),
        norm=Norm(eps=norm_eps),
        ropes={"default": rope or Rope(dim=head_dim, theta=500000.0, pairing="interleaved")},
        max_position_embeddings=max_position_embeddings,
    )


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") in ("llama4_text", "llama4")


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; a multimodal checkpoint's image encoder and projector are left out."""
    text = text_config(config)
    theirs, ours = "model.layers.{i}.", "model.layers.{i}."
    forward = theirs + "feed_forward."
    found = (
        rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
        rename("model.norm.weight", "model.norm.weight"),
        head_rule(bool(text.get("tie_word_embeddings", False))),
        rename(theirs + "input_layernorm.weight", ours + "mixer_norm.weight"),
        rename(theirs + "post_attention_layernorm.weight", ours + "channel_norm.weight"),
        *linear_rules(theirs + "self_attn.", ours + "mixer.", PROJECTIONS),
        *linear_rules(forward, ours + "channel.", (*MLP, "router")),
        *linear_rules(forward + "shared_expert.", ours + "channel.shared.", MLP),
        transpose(forward + "experts.gate_up_proj", ours + "channel.experts.gate_up_proj", (0, 2, 1)),
        transpose(forward + "experts.down_proj", ours + "channel.experts.down_proj", (0, 2, 1)),
    )
    return found if text == config else towers(found, ("vision_model", "multi_modal_projector"))


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Llama 4 `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    config = {**DEFAULTS, **text_config(config)}
    require(config, "hidden_act", ("silu", "swish"), "silu")
    depth, every = config["num_hidden_layers"], config["no_rope_layer_interval"]
    ropes = config.get("no_rope_layers") or [(index + 1) % every != 0 for index in range(depth)]  # 1: has positions
    kinds = config.get("layer_types") or [CHUNKED if each else FULL for each in ropes]
    if len(ropes) < depth or len(kinds) != depth or set(kinds) - {CHUNKED, FULL}:
        raise ZooError(f"layer_types and no_rope_layers must be of {depth} layers, of {CHUNKED} or {FULL}")
    if CHUNKED in kinds and not config["attention_chunk_size"]:
        raise ZooError(f"attention_chunk_size was {config['attention_chunk_size']!r}; layers of {CHUNKED} need one")
    tuned = config["attn_temperature_tuning"]
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        depth=depth,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate_size=config["intermediate_size_mlp"],
        expert_size=config["intermediate_size"],
        experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        moe_every=config["interleave_moe_layer_step"],
        moe_layers=config.get("moe_layers"),
        rotated=[bool(each) for each in ropes],
        kinds=kinds,
        chunk=config["attention_chunk_size"],
        temperature=(config["floor_scale"], config["attn_scale"]) if tuned else None,
        qk_norm=config["use_qk_norm"],
        attention_bias=config["attention_bias"],
        rope=whole_rope(config, config["head_dim"], "interleaved"),
        norm_eps=config["rms_norm_eps"],
        tied=config["tie_word_embeddings"],
        max_position_embeddings=config["max_position_embeddings"],
    )


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Llama 4 `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Llama 4 cannot express.
    """
    layers = decoder.layers
    sizes = {layer.channel: layer.channel_args.get("intermediate_size") for layer in layers}
    if {layer.mixer for layer in layers} != {"attention"} or set(sizes) - {"moe", "swiglu"} or not decoder.ropes:
        raise ZooError("Llama 4 needs attention with moe or swiglu channels, and a rotary table; save as zoo")
    moe = next((layer.channel_args for layer in layers if layer.channel == "moe"), {"experts": 1, "top_k": 1})
    attention = [Attention(**layer.mixer_args) for layer in layers]
    temperature = next((args.temperature for args in attention if args.temperature), None)
    result = {
        **config,
        "model_type": "llama4_text",
        "architectures": ["Llama4ForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": attention[0].heads,
        "num_key_value_heads": attention[0].kv_heads or attention[0].heads,
        "head_dim": attention[0].head_dim,
        "attention_bias": attention[0].q_bias,
        "intermediate_size": sizes.get("moe", DEFAULTS["intermediate_size"]),
        "intermediate_size_mlp": sizes.get("swiglu", DEFAULTS["intermediate_size_mlp"]),
        "num_local_experts": moe["experts"],
        "num_experts_per_tok": moe["top_k"],
        "moe_layers": [index for index, layer in enumerate(layers) if layer.channel == "moe"],
        "no_rope_layers": [int(args.rope is not None) for args in attention],
        "layer_types": [CHUNKED if args.chunk else FULL for args in attention],
        "attention_chunk_size": next(
            (args.chunk for args in attention if args.chunk), DEFAULTS["attention_chunk_size"]
        ),
        "use_qk_norm": any(args.qk_norm for args in attention),
        "attn_temperature_tuning": temperature is not None,
        **({} if temperature is None else dict(zip(("floor_scale", "attn_scale"), temperature, strict=True))),
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm.eps,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.head.tied,
        "rope_parameters": rope_parameters(next(iter(decoder.ropes.values()))),
    }
    return confirm(result, decoder, _decoder)
