"""What an architecture is: frozen data over the one decoder.

`DecoderConfig` is the typed form that code works with; `ZooConfig` is its JSON form, a transformers config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from zoo import registry
from zoo.errors import ZooError

NORMS = ("rms", "rms_one_plus", "rms_plain", "layer", "l2")
UNWEIGHTED = ("rms_plain", "l2")  # norms without parameters
EMBEDDINGS = "embeddings"  # a value that the decoder writes: what enters the first layer
T = TypeVar("T")


def _freeze(value: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(value))


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Normalisation of the residual stream: `kind` is one of rms, rms_one_plus, rms_plain (no weight), layer, l2;
    `bias` is that of layer."""

    kind: str = "rms"
    eps: float = 1e-6
    bias: bool = True

    def __post_init__(self) -> None:
        if self.kind not in NORMS:
            raise ZooError(f"norm kind {self.kind!r} is unknown; it must be one of {', '.join(NORMS)}")


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Token embedding: multiplied by `scale`, plus `learned_positions` absolute positions (0: none), then a norm."""

    scale: float = 1.0
    learned_positions: int = 0
    norm: bool = False


@dataclass(frozen=True, kw_only=True)
class Head:
    """Output head: final `norm`, logits times `scale`, soft-capped at `softcap`, weights `tied` to the embedding."""

    norm: bool = True
    scale: float = 1.0
    softcap: float | None = None
    tied: bool = False


@dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary table over `dim` rotated channels of a head (partial rotation: `dim` < head_dim).

    `scaling` holds the parameters of a transformers rope type (`{"rope_type": "llama3", "factor": 8.0, ...}`);
    `pairing` is `half` (x[i] with x[i + dim/2]) or `interleaved` (x[2i] with x[2i + 1]).
    """

    dim: int
    theta: float = 10000.0
    scaling: Mapping[str, Any] = field(default_factory=dict)
    pairing: str = "half"

    def __post_init__(self) -> None:
        if self.dim <= 0 or self.dim % 2:
            raise ZooError(f"rope dim was {self.dim}; it must be a positive even number")
        if self.pairing not in ("half", "interleaved"):
            raise ZooError(f"rope pairing {self.pairing!r} is unknown; it must be half or interleaved")
        object.__setattr__(self, "scaling", _freeze(self.scaling))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One residual layer: a token mixer and a channel, wired by a block form. Either may be None.

    `share` maps a submodule name to a key: layers with the same key use one copy of that submodule's weights.
    """

    mixer: str | None = None
    mixer_args: Mapping[str, Any] = field(default_factory=dict)
    channel: str | None = None
    channel_args: Mapping[str, Any] = field(default_factory=dict)
    block: str = "pre_norm"
    block_args: Mapping[str, Any] = field(default_factory=dict)
    share: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("mixer_args", "channel_args", "block_args", "share"):
            object.__setattr__(self, name, _freeze(getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything that the decoder needs. Building one validates it, before any weight is allocated.

    Args:
        vocab_size, hidden_size: sizes of the embedding `[vocab_size, hidden_size]`.
        layers: the layers, first to last.
        embed, head, norm: see `Embed`, `Head`, `Norm`.
        ropes: named rotary tables; a mixer names the one it uses.
        max_position_embeddings: length the model was trained for, in tokens (a limit for the evals, not for the code).

    Raises:
        ZooError: an unknown mixer, channel or block, arguments they refuse, or a value read before it is written.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    embed: Embed = field(default_factory=Embed)
    head: Head = field(default_factory=Head)
    norm: Norm = field(default_factory=Norm)
    ropes: Mapping[str, Rope] = field(default_factory=dict)
    max_position_embeddings: int = 2048

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "ropes", _freeze(self.ropes))
        for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) <= 0:
                raise ZooError(f"{name} was {getattr(self, name)!r}; it must be a positive integer")
        self._validate_layers()

    def _validate_layers(self) -> None:
        written = {EMBEDDINGS}
        for index, layer in enumerate(self.layers):
            block = registry.get("blocks", layer.block, "MODULE")
            try:
                block.parse(layer.block_args).check(self)
            except ZooError as error:
                raise ZooError(f"layer {index} (block {layer.block}): {error}") from None
            for kind, name, args in (
                ("mixers", layer.mixer, layer.mixer_args),
                ("channels", layer.channel, layer.channel_args),
            ):
                if name is None:
                    continue
                cls = registry.load(kind, name).MODULE
                try:
                    parsed = cls.parse(args)
                    parsed.check(self)
                except ZooError as error:
                    raise ZooError(f"layer {index} ({name}): {error}") from None
                if missing := set(cls.reads_of(parsed)) - written:
                    raise ZooError(
                        f"layer {index} ({name}) reads {', '.join(sorted(missing))}, which no earlier layer writes; "
                        "put a layer that writes it before"
                    )
                written |= set(cls.writes_of(parsed))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; defaults are left out of the layers."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DecoderConfig:
        """The inverse of `to_dict`; an unknown key raises `ZooError` naming it."""
        values = dict(data)
        values["layers"] = tuple(build(Layer, layer) for layer in values.get("layers", ()))
        values["ropes"] = {name: build(Rope, rope) for name, rope in values.get("ropes", {}).items()}
        for name, part in (("embed", Embed), ("head", Head), ("norm", Norm)):
            values[name] = build(part, values.get(name) or {})
        return build(cls, values)


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Construct a dataclass from a mapping, refusing unknown and missing fields by name; JSON's lists become tuples."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise ZooError(f"unknown argument {unknown[0]!r}; {cls.__qualname__} takes {', '.join(known)}")
    try:
        return cls(**{name: _tupled(value) for name, value in values.items()})
    except TypeError as error:
        raise ZooError(f"{cls.__qualname__}: {error}") from None


def _tupled(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_tupled(item) for item in value)
    return {key: _tupled(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Layer):
        return {f.name: _plain(v) for f in fields(value) if (v := getattr(value, f.name)) or f.name == "mixer"}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
