"""What readers of published configs share: values that must be known, rotary tables, and the check of a way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zoo.architectures.core.config import DecoderConfig, Rope
from zoo.architectures.core.formats import equivalent
from zoo.errors import ZooError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
STRETCHED = ("llama3", "yarn")  # rope types that know the length before stretching


def require(config: Mapping[str, Any], name: str, allowed: Sequence[Any], default: Any) -> None:
    """Refuse a value of `config[name]` (None or missing: `default`) whose computation we do not have."""
    value = config.get(name)
    if (default if value is None else value) not in allowed:
        kind = config.get("model_type", "this")
        raise ZooError(f"{name} {value!r} of a {kind} checkpoint is not supported; it must be one of {allowed}")


def rope(config: Mapping[str, Any], head_dim: int, pairing: str = "half", partial: float = 1.0) -> Rope:
    """The rotary table of a published config, from `rope_parameters` or the older `rope_scaling` and `rope_theta`.

    `partial` is the rotated share of a head where the config names none.

    Raises:
        ZooError: a rope type other than default, linear, llama3 and yarn.
    """
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = given.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    share = given.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or partial
    require({**config, "rope_type": kind}, "rope_type", ROPE_TYPES, "default")
    if kind in STRETCHED:
        length = config.get("original_max_position_embeddings") or config.get("max_position_embeddings", 2048)
        given.setdefault("original_max_position_embeddings", length)
    scaling = {} if kind == "default" else {"rope_type": kind, **given}
    return Rope(dim=int(head_dim * share), theta=float(theta), scaling=scaling, pairing=pairing)


def rope_parameters(table: Rope, head_dim: int | None = None) -> dict[str, Any]:
    """transformers' `rope_parameters` of a rotary table; with `head_dim` the rotated share is named too."""
    share = {} if head_dim is None else {"partial_rotary_factor": table.dim / head_dim}
    return {"rope_type": "default", **table.scaling, "rope_theta": table.theta, **share}


def confirm(
    config: dict[str, Any], decoder: DecoderConfig, read: Callable[[Mapping[str, Any]], DecoderConfig]
) -> dict[str, Any]:
    """`config`, a published `config.json` made from `decoder`, once `read` finds the same decoder in it.

    Raises:
        ZooError: the format cannot express `decoder`.
    """
    if not equivalent(read(config), decoder):
        raise ZooError(f"{config['model_type']} cannot express this model (embedding, head, norms, masks or ropes)")
    return config
