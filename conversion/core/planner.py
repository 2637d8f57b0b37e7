"""The plan of a conversion: one row per output tensor, made from names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zoo import registry
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.formats import CARRIED, Canonical, check_tensors
from zoo.architectures.core.layout import Item, overridden, parse_layout
from zoo.architectures.core.operations import Operation, initial
from zoo.architectures.core.plan import AttentionSpec, Init, MixerPlan
from zoo.architectures.core.recurrent import UNTRANSFERRED
from zoo.architectures.core.rules import Step
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.conversion.core import positions
from zoo.errors import ZooError

HEAD_HYBRID = "head_hybrid"  # the mixer of a layer of which some heads are kept


@dataclass(frozen=True)
class Swap:
    """What a layer's attention is replaced by: a mixer and the arguments that the user set."""

    mixer: str
    args: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One output tensor: `sources` (tensors of the source checkpoint) through `operation` to `target`.

    `origin` is the source's tensor under our names; None for a new one.
    """

    target: str
    sources: tuple[str, ...]
    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    step: Step | None = None
    init: Init | None = None
    origin: str | None = None

    @property
    def new(self) -> bool:
        """Whether the parameter is new, not transferred."""
        return self.init is not None

    @property
    def copied(self) -> bool:
        """Whether it is a source tensor, bit for bit."""
        return self.step is not None and self.step.copied

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "target": self.target,
            "sources": list(self.sources),
            "operation": self.operation,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class Plan:
    """A conversion as data: `rows`, the output's `config`, and the `swaps` by layer that led to them; by layer, what
    was `measured` for new parameters to start from; and what becomes of `rope`."""

    source: Canonical
    config: ZooConfig
    swaps: Mapping[int, Swap]
    rows: tuple[Row, ...]
    seed: int = 0
    measured: Mapping[int, Mapping[str, list[float]]] = field(default_factory=dict)
    rope: str = "keep"

    @cached_property
    def by_target(self) -> dict[str, Row]:
        """Rows by the name of their tensor."""
        return {row.target: row for row in self.rows}

    @property
    def transferred(self) -> list[str]:
        """Names of parameters that come from the source."""
        return [row.target for row in self.rows if not row.new]

    @property
    def new(self) -> list[str]:
        """Names of parameters that the source does not have."""
        return [row.target for row in self.rows if row.new]

    @property
    def parameters(self) -> int:
        """Number of parameters of the output."""
        return sum(torch.Size(row.shape).numel() for row in self.rows)

    def tensor(self, target: str) -> Tensor:
        """The output tensor `target`, made now."""
        row = self.by_target[target]
        if row.step is not None:
            return row.step.run(self.source.checkpoint.get)
        assert row.init is not None
        return initial(row.init, target, self.seed).to(row.dtype)

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Rows as text: target, operation, sources, shape, dtype."""
        return [
            (row.target, row.operation, ", ".join(row.sources), str(list(row.shape)), row.to_dict()["dtype"])
            for row in self.rows
        ]


def choose(
    decoder: DecoderConfig,
    mixer: str | None,
    mixer_args: Mapping[str, Any] | None,
    layout: str | None,
    keep: Sequence[int],
    keep_heads: Mapping[int, Sequence[int]] | None = None,
) -> dict[int, Swap]:
    """The swaps that a user's arguments ask for, by layer.

    Raises:
        ZooError: both or neither of mixer and layout, layers to keep that do not exist, a layer to swap that is not
            softmax attention, or heads to keep in a layer that is not swapped.
    """
    depth = len(decoder.layers)
    if (mixer is None) == (layout is None):
        raise ZooError(f"mixer was {mixer!r} and layout {layout!r}; give exactly one of them")
    if wrong := [index for index in keep if type(index) is not int or not 0 <= index < depth]:
        raise ZooError(f"keep names layer {wrong[0]}; the model has layers 0 to {depth - 1}")
    swaps = {}
    for index, (name, args) in enumerate(_wanted(mixer, layout, mixer_args or {}, depth)):
        found = decoder.layers[index].mixer
        if index in keep or (name == "attention" and not args) or (layout is None and found != "attention"):
            continue
        if found != "attention":
            raise ZooError(f"layer {index} is {found}, not attention, and cannot become {name}; keep it")
        swaps[index] = Swap(name, args)
    for index, heads in (keep_heads or {}).items():
        if index not in swaps:
            raise ZooError(f"keep_heads names layer {index}, which is not converted; it converts {list(swaps)}")
        swap = swaps[index]
        swaps[index] = Swap(HEAD_HYBRID, {"kept": list(heads), "mixer": swap.mixer, "mixer_args": dict(swap.args)})
    return swaps


def _wanted(mixer: str | None, layout: str | None, args: Mapping[str, Any], depth: int) -> list[Item]:
    if mixer is not None and mixer.isidentifier() and mixer not in registry.names("mixers"):
        raise registry.unknown("mixers", mixer)
    text = str(layout if mixer is None else mixer)
    items = parse_layout(text, depth)
    if mixer is not None and any(item != items[0] for item in items):
        raise ZooError(f"mixer {mixer!r} names several; pass it as layout=")
    return [(name, {**own, **(args if name != "attention" or mixer is not None else {})}) for name, own in items]


def build_plan(source: Canonical, swaps: Mapping[int, Swap], seed: int = 0, rope: str = "keep") -> Plan:
    """The plan that replaces the attention of the layers in `swaps`, with RoPE as in `positions`; no tensor is read.

    Raises:
        ZooError: a mixer that cannot be made from this attention, or arguments that do not fit.
    """
    positions.check(rope, source.decoder)
    if rope != "keep":
        swaps = {i: replace(swap, args=positions.arguments(rope, swap.mixer, swap.args)) for i, swap in swaps.items()}
    plans = {index: _mixer_plan(source.decoder, index, swap) for index, swap in swaps.items()}
    layers = [positions.kept(rope, layer) for layer in source.decoder.layers]
    for index, swap in swaps.items():
        args = overridden(plans[index].args, swap.args)
        layers[index] = replace(source.decoder.layers[index], mixer=swap.mixer, mixer_args=args)
    decoder = replace(source.decoder, layers=tuple(layers))
    config = _config(source, decoder, swaps)
    rows = tuple(_rows(source, plans))
    check_tensors(config, {row.target: row.shape for row in rows}, "plan")
    return Plan(source, config, dict(swaps), rows, seed, rope=rope)


def attention_spec(decoder: DecoderConfig, index: int) -> AttentionSpec:
    """The softmax attention of layer `index`, as mixers ask for it."""
    layer = decoder.layers[index]
    args = registry.get("mixers", "attention", "MODULE").parse(layer.mixer_args)
    return AttentionSpec(
        hidden_size=decoder.hidden_size,
        heads=args.heads,
        kv_heads=args.kv_heads or args.heads,
        head_dim=args.head_dim,
        **{name: getattr(args, name) for name in ("q_bias", "k_bias", "v_bias", "o_bias", "qk_norm", "rope", "scale")},
        norm_eps=args.qk_norm_eps,
        max_position=decoder.max_position_embeddings,
        args=dict(layer.mixer_args),
    )


def _mixer_plan(decoder: DecoderConfig, index: int, swap: Swap) -> MixerPlan:
    spec = replace(attention_spec(decoder, index), wanted=swap.args)
    module = registry.get("mixers", swap.mixer, "MODULE")
    unmet = [name for name in UNTRANSFERRED if spec.args.get(name)]
    if unmet and not module.keeps_softmax:
        raise ZooError(f"layer {index} has attention with {unmet[0]}, which {swap.mixer} cannot take over; keep it")
    try:
        plan: MixerPlan = module.from_attention(spec)
        return _fitted(plan, decoder, swap) if swap.args else plan
    except ZooError as error:
        raise ZooError(f"layer {index}: {error}") from None


def _fitted(plan: MixerPlan, decoder: DecoderConfig, swap: Swap) -> MixerPlan:
    """`plan` without the parameters that the user's arguments take away, and with the shapes that they give."""
    usual = _shapes(swap.mixer, decoder, plan.args)
    shapes = _shapes(swap.mixer, decoder, overridden(plan.args, swap.args))
    gone = set(usual) - set(shapes)
    inits = (
        replace(init, shape=shapes.get(init.target, init.shape)) if init.kind != "values" else init
        for init in plan.inits
        if init.target not in gone
    )
    return replace(plan, rows=tuple(row for row in plan.rows if row.target not in gone), inits=tuple(inits))


def _shapes(mixer: str, decoder: DecoderConfig, args: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    cls = registry.get("mixers", mixer, "MODULE")
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in cls(decoder, cls.parse(args)).state_dict().items()}


def _config(source: Canonical, decoder: DecoderConfig, swaps: Mapping[int, Swap]) -> ZooConfig:
    mixers = {swap.mixer for swap in swaps.values()}
    named = len(mixers) == 1 and mixers <= set(registry.names("architectures"))
    name = min(mixers) if named else source.config.architecture
    fields = {field: getattr(source.config, field, None) for field in (*CARRIED, "source_format")}
    given = {field: value for field, value in fields.items() if value is not None}
    return ZooConfig.from_decoder(decoder, name, dtype=source.dtype, **given)


def _rows(source: Canonical, plans: Mapping[int, MixerPlan]) -> Iterator[Row]:
    """The source's order, with a swapped layer's mixer where its attention was."""
    prefixes = {f"model.layers.{index}.mixer.": index for index in plans}
    done: set[int] = set()
    for name, step in source.steps.items():
        index = next((index for prefix, index in prefixes.items() if name.startswith(prefix)), None)
        if index is None:
            yield _transferred(name, step)
        elif index not in done:
            done.add(index)
            yield from _mixer_rows(source, f"model.layers.{index}.mixer.", plans[index])


def _mixer_rows(source: Canonical, prefix: str, plan: MixerPlan) -> Iterator[Row]:
    for row in plan.rows:
        if prefix + row.source not in source.steps:
            raise ZooError(f"tensor {prefix + row.source!r} is missing; the source's attention has none such")
        operation = Operation(row.operation, dict(row.options))
        step = source.steps[prefix + row.source].then(prefix + row.target, operation)
        yield _transferred(prefix + row.source, step)
    for init in plan.inits:
        dtype = torch.float32 if init.fp32 else source.dtype
        yield Row(prefix + init.target, (), str(_brief(init)), tuple(init.shape), dtype, init=init)


def _transferred(origin: str, step: Step) -> Row:
    operation = " > ".join(str(each) for each in step.operations)
    return Row(step.target, step.sources, operation, step.shape, step.dtype, step=step, origin=origin)


def _brief(init: Init) -> str:
    options = ", ".join(f"{k}={v if not isinstance(v, (list, tuple)) else '...'}" for k, v in init.options.items())
    return f"{init.kind}({options})" if options else init.kind
