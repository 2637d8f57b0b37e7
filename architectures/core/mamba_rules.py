"""Key rules of the Mamba family: fused projections and convolutions as published, separate parameters here.

Mamba-2's `in_proj` has rows `[z, x, B, C, dt]`, its `conv1d [C, 1, W]` the channels `[x, B, C]`; our mixer has one
projection and one convolution `[C, W]` for each part.

C channels, W convolution width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.architectures.core.published import head_rule
from zoo.architectures.core.rules import Rule, depthwise, rename, split
from zoo.errors import ZooError


def mamba_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The rules of one Mamba mixer, with Jamba's norms, from the prefix `theirs` to `ours` (see `mamba2_rules`)."""
    linear = [f"{name}_proj.weight" for name in ("in", "x", "dt", "out")] + ["in_proj.bias", "out_proj.bias"]
    norms = {"dt_layernorm": "dt_norm", "b_layernorm": "B_norm", "c_layernorm": "C_norm"}
    return (
        *(rename(theirs + name, ours + name) for name in (*linear, "A_log", "D")),
        rename(theirs + "dt_proj.bias", ours + "dt_bias"),
        depthwise(theirs + "conv1d.weight", [ours + "convs.x"]),
        rename(theirs + "conv1d.bias", ours + "convs.x_bias"),
        *(rename(f"{theirs}{norm}.weight", f"{ours}{mine}.weight") for norm, mine in norms.items()),
    )


def backbone_rules(tied: bool) -> tuple[Rule, ...]:
    """The rules around the mixers of transformers' Mamba models, all but those of `backbone.layers.{i}.mixer`."""
    return (
        rename("backbone.embeddings.weight", "model.embed_tokens.weight"),
        rename("backbone.layers.{i}.norm.weight", "model.layers.{i}.mixer_norm.weight"),
        rename("backbone.norm_f.weight", "model.norm.weight"),
        head_rule(tied, "backbone.embeddings.weight"),
    )


def mamba2_rules(theirs: str, ours: str, args: Mapping[str, Any]) -> tuple[Rule, ...]:
    """The rules of one Mamba-2 mixer with `args`, from the prefix `theirs` to `ours`.

    A prefix ends with a dot and may have a number in it: `backbone.layers.{i}.mixer.`.
    """
    inner, keys = args["heads"] * args["head_dim"], args.get("groups", 1) * args["state_dim"]
    rows, channels = (inner, inner, keys, keys, args["heads"]), (inner, keys, keys)
    projections = [f"{ours}{part}_proj" for part in ("z", "x", "B", "C", "dt")]
    convolutions = [f"{ours}convs.{part}" for part in ("x", "B", "C")]
    return (
        *(split(f"{theirs}in_proj.{kind}", [f"{p}.{kind}" for p in projections], rows) for kind in ("weight", "bias")),
        depthwise(theirs + "conv1d.weight", convolutions, channels),
        split(theirs + "conv1d.bias", [f"{name}_bias" for name in convolutions], channels),
        *(rename(f"{theirs}out_proj.{kind}", f"{ours}out_proj.{kind}") for kind in ("weight", "bias")),
        *(rename(theirs + name, ours + name) for name in ("A_log", "D", "dt_bias")),
        rename(theirs + "norm.weight", ours + "norm_weight"),
    )


def mamba2_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `mamba2` in a config with fields `mamba_n_heads`, ... (Bamba, Granite, Falcon-H1).

    Raises:
        ZooError: heads that do not make up the inner width.
    """
    heads = config.get("mamba_n_heads") or 128
    inner = config.get("mamba_d_ssm") or config.get("mamba_expand", 2) * config["hidden_size"]
    head_dim = config.get("mamba_d_head", "auto")
    head_dim = inner // heads if head_dim in ("auto", None) else head_dim
    if heads * head_dim != inner:
        raise ZooError(f"mamba_n_heads {heads} of mamba_d_head {head_dim} must make up {inner} channels")
    return {
        "heads": heads,
        "head_dim": head_dim,
        "state_dim": config.get("mamba_d_state") or 256,
        "groups": config.get("mamba_n_groups") or 1,
        "conv": config.get("mamba_d_conv") or 4,
        "conv_bias": bool(config.get("mamba_conv_bias", True)),
        "biases": ("z", "x", "B", "C", "dt", "out") if config.get("mamba_proj_bias") else (),
        "time_step_limit": time_step_limit(config.get("time_step_limit")),
        "norm_eps": config.get("rms_norm_eps", 1e-5),
    }


def mamba2_fields(args: Any, hidden_size: int) -> dict[str, Any]:
    """The way back from `mamba2_args`, of typed arguments; the norm's eps is not among them."""
    return {
        "mamba_n_heads": args.heads,
        "mamba_d_head": args.head_dim,
        "mamba_d_state": args.state_dim,
        "mamba_n_groups": args.groups,
        "mamba_d_conv": args.conv,
        "mamba_conv_bias": args.conv_bias,
        "mamba_proj_bias": "z" in args.biases,
        "mamba_expand": args.heads * args.head_dim // hidden_size,
        "time_step_limit": published_limit(args.time_step_limit),
    }


def time_step_limit(value: Any) -> tuple[float, float | None] | None:
    """Our `time_step_limit` of a published one; transformers writes infinity as `{"__float__": "Infinity"}`."""
    low, high = (float(v["__float__"]) if isinstance(v, Mapping) else float(v) for v in value or (0.0, math.inf))
    if low <= 0 and math.isinf(high):
        return None
    return low, None if math.isinf(high) else high


def published_limit(limit: Sequence[float | None] | None) -> list[float]:
    """The way back from `time_step_limit`."""
    low, high = limit or (0.0, None)
    return [low or 0.0, math.inf if high is None else high]
