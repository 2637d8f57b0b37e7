"""A decoder as another one that computes the same: what a class of transformers asks for and the model does not have.

H heads, K head dimension, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.formats import Canonical
from zoo.architectures.core.local_global import BIASES
from zoo.architectures.core.operations import Operation
from zoo.architectures.core.shards import Spec
from zoo.architectures.mixers.mamba2 import PROJECTIONS

MAMBA_BIASES = {name: f"{name}_proj" for name in PROJECTIONS}
SOFTMAX_BIASES = {name: name.replace("bias", "proj") for name in BIASES}


@dataclass(frozen=True)
class Weights:
    """A decoder with its tensors: their shapes and dtypes, and how each is made, when it is written."""

    decoder: DecoderConfig
    specs: Mapping[str, Spec]
    make: Mapping[str, Callable[[], Tensor]]

    @classmethod
    def of(cls, source: Canonical) -> Weights:
        """Those of a checkpoint."""
        specs = {name: Spec(step.shape, step.dtype) for name, step in source.steps.items()}
        return cls(source.decoder, specs, {name: partial(source.get, name) for name in specs})

    def put(self, name: str, shape: Sequence[int], dtype: torch.dtype, make: Callable[[], Tensor]) -> Weights:
        """With one tensor more, or another one of this name."""
        specs = {**self.specs, name: Spec(tuple(shape), dtype)}
        return replace(self, specs=specs, make={**self.make, name: make})

    def with_layers(self, change: Callable[[int, Layer], Layer]) -> Weights:
        """With every layer changed."""
        layers = tuple(change(index, layer) for index, layer in enumerate(self.decoder.layers))
        return replace(self, decoder=replace(self.decoder, layers=layers))


Rewrite = Callable[[Weights], Weights]


def said(weights: Weights) -> Weights:
    """Defaults spelled out, and left out what has no effect."""

    def change(index: int, layer: Layer) -> Layer:
        args = dict(layer.mixer_args)
        if args.get("qk_norm") is None:
            args.pop("qk_norm_eps", None)
        if layer.mixer == "gated_delta_net":
            args["value_heads"] = args.get("value_heads") or args["heads"]
            args["value_dim"] = args.get("value_dim") or args["head_dim"]
        return replace(layer, mixer_args=args)

    return weights.with_layers(change)


def scaled(weights: Weights) -> Weights:
    """Attention whose scale is a number, as a config with an `attention_multiplier` has it."""

    def change(index: int, layer: Layer) -> Layer:
        args = layer.mixer_args
        if layer.mixer != "attention" or args.get("scale") is not None:
            return layer
        return replace(layer, mixer_args={**args, "scale": args["head_dim"] ** -0.5})

    return weights.with_layers(change)


def biased(weights: Weights) -> Weights:
    """Where some projections of attention, or of Mamba-2, have a bias, the others get one of zeros."""
    for name, table in (("attention", SOFTMAX_BIASES), ("mamba2", MAMBA_BIASES)):
        layers = [i for i, layer in enumerate(weights.decoder.layers) if layer.mixer == name]
        if any(_has(weights, i, part) for i in layers for part in table.values()):
            for index in layers:
                weights = _all_biased(weights, index, table)
    return weights


def _has(weights: Weights, index: int, part: str) -> bool:
    return f"model.layers.{index}.mixer.{part}.bias" in weights.specs


def _all_biased(weights: Weights, index: int, table: Mapping[str, str]) -> Weights:
    for part in table.values():
        if not _has(weights, index, part):
            weight = weights.specs[f"model.layers.{index}.mixer.{part}.weight"]
            zeros = partial(torch.zeros, weight.shape[:1], dtype=weight.dtype)
            weights = weights.put(f"model.layers.{index}.mixer.{part}.bias", weight.shape[:1], weight.dtype, zeros)
    biases: dict[str, Any] = dict.fromkeys(table, True) if table is SOFTMAX_BIASES else {"biases": tuple(table)}

    def change(i: int, layer: Layer) -> Layer:
        return replace(layer, mixer_args={**layer.mixer_args, **biases}) if i == index else layer

    return weights.with_layers(change)


def around_one(weights: Weights) -> Weights:
    """RMS norms, those of queries and keys too, whose weights are kept as their distance from one, in fp32."""
    decoder = weights.decoder
    if decoder.norm.kind != "rms":
        return weights
    weights = replace(weights, decoder=replace(decoder, norm=replace(decoder.norm, kind="rms_one_plus")))
    for name, spec in weights.specs.items():
        if name.endswith(("_norm.weight", "model.norm.weight")):
            # the distance of a bf16 weight from one is no bf16 number
            weights = weights.put(name, spec.shape, torch.float32, partial(_less_one, weights.make[name]))

    def change(index: int, layer: Layer) -> Layer:
        if layer.mixer != "attention" or layer.mixer_args.get("qk_norm") != "rms":
            return layer
        return replace(layer, mixer_args={**layer.mixer_args, "qk_norm": "rms_one_plus"})

    return weights.with_layers(change)


def _less_one(make: Callable[[], Tensor]) -> Tensor:
    return make().float() - 1


def gated(weights: Weights) -> Weights:
    """Attention with an output gate that is half open everywhere: `sigmoid(0) = 1/2`, and twice the output weights."""

    def change(index: int, layer: Layer) -> Layer:
        if layer.mixer != "attention" or layer.mixer_args.get("output_gate"):
            return layer
        return replace(layer, mixer_args={**layer.mixer_args, "output_gate": True})

    for index, layer in enumerate(weights.decoder.layers):
        if change(index, layer) is not layer:
            weights = _gated(weights, f"model.layers.{index}.mixer.", layer.mixer_args["heads"])
    return weights.with_layers(change)


def _gated(weights: Weights, prefix: str, heads: int) -> Weights:
    """Rows of the gate, zeros, behind those of each head's queries; the output projection times two."""
    for name in (prefix + "q_proj.weight", prefix + "q_proj.bias"):
        if name in weights.specs:
            spec = weights.specs[name]
            shape = (2 * spec.shape[0], *spec.shape[1:])
            weights = weights.put(name, shape, spec.dtype, partial(_with_gate, weights.make[name], heads))
    name = prefix + "o_proj.weight"
    spec = weights.specs[name]
    return weights.put(name, spec.shape, spec.dtype, partial(_doubled, weights.make[name]))


def _with_gate(make: Callable[[], Tensor], heads: int) -> Tensor:
    queries = make()
    return Operation("weave", {"groups": heads})([queries, torch.zeros_like(queries)])


def _doubled(make: Callable[[], Tensor]) -> Tensor:
    return make() * 2
