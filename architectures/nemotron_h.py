"""Nemotron-H (NVIDIA 2025, arXiv 2504.03624) and Nemotron 3: layers of one part each.

A pattern names them: `M` Mamba-2, `*` softmax attention without positions, `-` a squared-ReLU MLP, `E` a mixture of
such experts. Each part has one norm and one residual. The format is that of transformers' `nemotron_h`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm
from zoo.architectures.core.mamba_rules import mamba2_rules, time_step_limit
from zoo.architectures.core.published import confirm, linear_rules, part_of, require
from zoo.architectures.core.rules import Rule, drop, rename, stack
from zoo.architectures.mixers.attention import Args as AttentionArgs
from zoo.architectures.mixers.mamba2 import Args as Mamba2Args
from zoo.errors import ZooError

ARCHITECTURE = "nemotron_h"
LETTERS = {"M": ("mixer", "mamba2"), "*": ("mixer", "attention"), "-": ("channel", "relu2"), "E": ("channel", "moe")}
WORDS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E"}
_FIVE = "M-" * 5
PATTERN_8B = "M-M-M-M*" + "-M-M-M-M-M*" * 3 + "-" + _FIVE
PATTERN_47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
PATTERN_56B = "M-M-M-M*" + "-M-M-M-M-M*" * 9 + "-" + _FIVE
PATTERN_NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def _size(hidden_size: int, pattern: str, heads: int, intermediate_size: int, mamba: dict[str, int]) -> dict[str, Any]:
    sizes = dict(vocab_size=131072, hidden_size=hidden_size, pattern=pattern, heads=heads, kv_heads=8, head_dim=128)
    mamba = {"head_dim": 64, "groups": 8, **mamba}
    return {**sizes, "intermediate_size": intermediate_size, "mamba": mamba, "max_position_embeddings": 8192}


_LARGE = dict(heads=256, state_dim=256)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256,
        hidden_size=64,
        pattern="M-*-",
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        mamba=dict(heads=4, head_dim=16, state_dim=16, groups=2),
    ),
    "moe_tiny": dict(
        vocab_size=256,
        hidden_size=64,
        pattern="ME*E",
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate_size=32,
        mamba=dict(heads=4, head_dim=16, state_dim=16, groups=2),
        moe=dict(experts=4, top_k=2, intermediate_size=32, shared_size=48),
    ),
    "8b": _size(4096, PATTERN_8B, 32, 21504, dict(heads=128, state_dim=128)),
    "47b": _size(8192, PATTERN_47B, 64, 30720, _LARGE),
    "56b": _size(8192, PATTERN_56B, 64, 32768, _LARGE),
    "3_nano_30b": {
        **_size(2688, PATTERN_NANO, 32, 1856, dict(heads=64, state_dim=128)),
        "kv_heads": 2,
        "moe": dict(experts=128, top_k=6, intermediate_size=1856, shared_size=3712, scale=2.5),
        "max_position_embeddings": 262144,
    },
}
# computed from the published configs; the model cards say 8.1B, 47B, 56B and 31.6B
PARAMETERS = {"8b": 8_100_852_736, "47b": 46_791_554_816, "56b": 56_324_350_464, "3_nano_30b": 31_577_937_344}


def layout(
    *,
    vocab_size: int,
    hidden_size: int,
    pattern: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    mamba: Mapping[str, Any],
    moe: Mapping[str, Any] | None = None,
    mlp_bias: bool = False,
    time_step_min: float = 0.001,
    norm_eps: float = 1e-5,
    max_position_embeddings: int = 4096,
) -> DecoderConfig:
    """One layer per letter of `pattern` (M, *, -, E).

    `mamba` holds the arguments of `mamba2`, whose output norm works per group and whose time steps are at least
    `time_step_min`; `moe` those of `moe` where they are not Nemotron's own (sigmoid router with a correction bias,
    plain squared-ReLU experts).
    """
    if not pattern or set(pattern) - set(LETTERS):
        raise ZooError(f"pattern was {pattern!r}; it must be made of {', '.join(LETTERS)}")
    if "E" in pattern and moe is None:
        raise ZooError(f"pattern was {pattern!r} without moe; give the experts' sizes")
    limit = (time_step_min, None) if time_step_min > 0 else None
    router = {"router": "sigmoid", "correction_bias": True, "normalise": True, "normalise_eps": 1e-20}
    arguments: dict[str, Mapping[str, Any]] = {
        "mamba2": {"norm_groups": mamba.get("groups", 1), "norm_eps": norm_eps, "time_step_limit": limit, **mamba},
        "attention": {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim},
        "relu2": {"intermediate_size": intermediate_size, "bias": mlp_bias},
        "moe": {**router, "activation": "relu2", "gated": False, **(moe or {})},
    }
    parts = [LETTERS[letter] for letter in pattern]
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(Layer(**{kind: name, f"{kind}_args": arguments[name]}) for kind, name in parts),  # type: ignore[arg-type]
        head=Head(tied=False),
        norm=Norm(eps=norm_eps),
        max_position_embeddings=max_position_embeddings,
    )


_THEIRS, _OURS = "backbone.layers.{i}.mixer.", "model.layers.{i}."
RULES: tuple[Rule, ...] = (
    rename("backbone.embeddings.weight", "model.embed_tokens.weight"),
    rename("backbone.norm_f.weight", "model.norm.weight"),
    rename("lm_head.weight", "lm_head.weight"),
    *linear_rules(_THEIRS, _OURS + "mixer.", ("q_proj", "k_proj", "v_proj", "o_proj")),
    *linear_rules(_THEIRS, _OURS + "channel.", ("up_proj", "down_proj")),
    rename(_THEIRS + "gate.weight", _OURS + "channel.router.weight"),
    rename(_THEIRS + "gate.e_score_correction_bias", _OURS + "channel.correction_bias"),
    rename(_THEIRS + "fc1_latent_proj.weight", _OURS + "channel.latent_in.weight"),
    rename(_THEIRS + "fc2_latent_proj.weight", _OURS + "channel.latent_out.weight"),
    *(
        rename(f"{_THEIRS}shared_experts.{name}.weight", f"{_OURS}channel.shared.{name}.weight")
        for name in ("up_proj", "down_proj")
    ),
    drop("mtp.{any}"),  # heads for several tokens at once, which transformers leaves out as well
)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether this module owns the format of a `config.json`."""
    return config.get("model_type") == "nemotron_h"


def rules(config: Mapping[str, Any]) -> Sequence[Rule]:
    """The key rules; a layer's norm belongs to its mixer or to its channel."""
    kinds = [LETTERS[letter][0] for letter in _pattern(config)]
    norms = (
        rename(f"backbone.layers.{i}.norm.weight", f"model.layers.{i}.{kind}_norm.weight")
        for i, kind in enumerate(kinds)
    )
    experts = (
        stack(f"{_THEIRS}experts.{{e}}.{name}.weight", f"{_OURS}channel.experts.{name}", _moe(config)["experts"])
        for name in ("up_proj", "down_proj")
    )
    return (*RULES, *norms, *experts, *mamba2_rules(_THEIRS, _OURS + "mixer.", _mamba(config)))


def _pattern(config: Mapping[str, Any]) -> str:
    words = config.get("layers_block_type") or config.get("layer_types")
    if words is None and (pattern := config.get("hybrid_override_pattern")):
        return pattern
    words = words or ["mamba", "moe", "attention", "mlp"]
    for word in words:
        require({"model_type": "nemotron_h", "layers_block_type": word}, "layers_block_type", tuple(WORDS), None)
    return "".join(WORDS[word] for word in words)


def _mamba(config: Mapping[str, Any]) -> dict[str, Any]:
    def either(name: str, older: str, default: Any) -> Any:
        return config[older] if older in config else config.get(name, default)

    return {
        "heads": config.get("mamba_num_heads", 128),
        "head_dim": config.get("mamba_head_dim", 64),
        "state_dim": config.get("ssm_state_size", 128),
        "groups": either("n_groups", "mamba_n_groups", 8),
        "conv": either("conv_kernel", "mamba_d_conv", 4),
        "conv_bias": bool(either("use_conv_bias", "mamba_conv_bias", True)),
        "biases": ("z", "x", "B", "C", "dt", "out") if config.get("use_bias") else (),
    }


def _moe(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "experts": config.get("n_routed_experts", 8),
        "top_k": config.get("num_experts_per_tok", 2),
        "intermediate_size": config.get("moe_intermediate_size", 7688),
        "shared_size": config.get("moe_shared_expert_intermediate_size", 7688),
        "latent_size": config.get("moe_latent_size"),
        "groups": config.get("n_group", 1),
        "top_groups": config.get("topk_group", 1),
        "normalise": bool(config.get("norm_topk_prob", True)),
        "scale": float(config.get("routed_scaling_factor", 1.0)),
    }


def _check(config: Mapping[str, Any], pattern: str) -> None:
    require(config, "mamba_hidden_act", ("silu", "swish"), "silu")
    require(config, "mlp_hidden_act", ("relu2",), "relu2")
    for name in ("tie_word_embeddings", "attention_bias", "mamba_proj_bias", "residual_in_fp32"):
        require(config, name, (False,), False)
    require(config, "sliding_window", (None,), None)
    if time_step_limit(config.get("time_step_limit")) is not None:
        raise ZooError("time_step_limit of a nemotron_h checkpoint is not supported; it must be (0, infinity)")
    if "E" in pattern:
        require(config, "n_shared_experts", (1,), 1)
        require(config, "mlp_bias", (False,), False)


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder for a Nemotron-H `config.json`.

    Raises:
        ZooError: a value whose computation we do not have, by name.
    """
    pattern = _pattern(config)
    _check(config, pattern)
    return layout(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        pattern=pattern,
        heads=config.get("num_attention_heads", 32),
        kv_heads=config.get("num_key_value_heads") or config.get("num_attention_heads", 32),
        head_dim=config.get("head_dim") or 128,
        intermediate_size=config.get("intermediate_size", 21504),
        mamba=_mamba(config),
        moe=_moe(config) if "E" in pattern else None,
        mlp_bias=bool(config.get("mlp_bias", False)),
        # transformers takes this, the least time step of the start, as the limit at run time too
        time_step_min=config["mamba_dt_min"] if "mamba_dt_min" in config else config.get("time_step_min", 0.001),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        max_position_embeddings=config.get("max_position_embeddings", 4096),
    )


_decoder = decoder  # `published` has an argument of that name


def published(decoder: DecoderConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """The Nemotron-H `config.json` of `decoder`; `config` holds the fields to carry over (token ids, dtype, ...).

    Raises:
        ZooError: a decoder that Nemotron-H cannot express.
    """
    attention = part_of(decoder, "mixers", "attention") or AttentionArgs(heads=1, head_dim=decoder.hidden_size)
    mamba = part_of(decoder, "mixers", "mamba2") or Mamba2Args(heads=2, head_dim=decoder.hidden_size, state_dim=16)
    mlp, moe = part_of(decoder, "channels", "relu2"), part_of(decoder, "channels", "moe")
    pattern = "".join(_letter(layer) for layer in decoder.layers)
    limit = mamba.time_step_limit or (0.0, None)
    result = {
        **config,
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(pattern),
        "hybrid_override_pattern": pattern,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.head_dim,
        "intermediate_size": 1 if mlp is None else mlp.intermediate_size,
        "mlp_bias": mlp is not None and mlp.bias,
        "mlp_hidden_act": "relu2",
        "mamba_num_heads": mamba.heads,
        "mamba_head_dim": mamba.head_dim,
        "ssm_state_size": mamba.state_dim,
        "n_groups": mamba.groups,
        "conv_kernel": mamba.conv,
        "use_conv_bias": mamba.conv_bias,
        "use_bias": "z" in mamba.biases,
        "time_step_min": limit[0],
        "layer_norm_epsilon": decoder.norm.eps,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": False,
        **({} if moe is None else _moe_fields(moe)),
    }
    return confirm(result, decoder, _decoder)


def _letter(layer: Layer) -> str:
    for letter, (kind, name) in LETTERS.items():
        other = "channel" if kind == "mixer" else "mixer"
        if getattr(layer, kind) == name and getattr(layer, other) is None:
            return letter
    raise ZooError(f"Nemotron-H has no layer of {layer.mixer} and {layer.channel}; save as zoo")


def _moe_fields(moe: Any) -> dict[str, Any]:
    return {
        "n_routed_experts": moe.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "moe_shared_expert_intermediate_size": moe.shared_size,
        "moe_latent_size": moe.latent_size,
        "n_group": moe.groups,
        "topk_group": moe.top_groups,
        "norm_topk_prob": moe.normalise,
        "routed_scaling_factor": moe.scale,
    }
