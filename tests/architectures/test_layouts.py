"""Layouts: what is registered fits the decoder, and a bad one is refused before any weight is allocated."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_models import ROPES, draw, feed, forward, make, same, swiglu_layer

import zoo
from zoo import registry
from zoo.architectures.core import mixer as contract
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig, Head, Layer, Norm, Rope
from zoo.architectures.core.mixer import Context, Mixer
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.errors import ZooError


@dataclass(frozen=True, kw_only=True)
class Args(contract.Args):
    heads: int = 1
    reads_gate: bool = False


class Running(Mixer):
    """A running sum of projected inputs; it also hands its output to later layers."""

    options = Args
    writes = ("running",)

    def __init__(self, config: DecoderConfig, args: Args) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        total = ctx.mask(self.proj(x)).cumsum(1)
        if cache is not None:
            total = total + cache.state("sum", (x.shape[0], 1, x.shape[2]), x.dtype, "recurrent", x.device)
            cache.put("sum", total[:, -1:])
        return total / 10, {"running": total}

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return self.proj.out_features * itemsize


class Reading(Running):
    """Multiplies by what an earlier layer wrote."""

    reads, writes = ("running",), ()

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:  # type: ignore[override]
        return self.proj(x) * ctx.values["running"].tanh()

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        return 0


@pytest.fixture
def own_mixers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`running` and `reading`, registered for one test."""
    for name, module in (("running", Running), ("reading", Reading)):
        path = f"{registry.KINDS['mixers']}.{name}"
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
        sys.modules[path].MODULE = module  # type: ignore[attr-defined]
    known = registry._modules
    own = {registry.KINDS["mixers"]: ("running", "reading")}
    monkeypatch.setattr(registry, "_modules", lambda package: (*known(package), *own.get(package, ())))


def decoder(*layers: Layer, **fields: Any) -> DecoderConfig:
    return DecoderConfig(**{"vocab_size": 97, "hidden_size": 64, "layers": layers, "ropes": ROPES, **fields})


def attention(**args: Any) -> Layer:
    return Layer(mixer="attention", mixer_args={**registry.get("mixers", "attention", "EXAMPLE"), **args})


def test_a_mixer_of_ones_own_works_through_the_decoder(own_mixers: None, tmp_path: Path) -> None:
    layers = (swiglu_layer("running", {}), attention(), swiglu_layer("reading", {}))
    model, ids = make(ZooConfig.from_decoder(decoder(*layers), "test")), draw(2, 9)
    whole = forward(model, ids)
    same(feed(model, ids, (4, 1, 1, 3))[0], whole)
    _, cache = feed(model, ids, (8, 1))
    assert sum(sum(layer.bytes().values()) for layer in cache.layers) == 2 * model.state_bytes(9)
    expected = {name: p.grad for name, p in trained(model).named_parameters()}
    assert all(g is not None and g.any() for g in expected.values())
    expected = {name: g.clone() for name, g in expected.items() if g is not None}
    model.gradient_checkpointing_enable()
    for name, p in trained(model).named_parameters():
        same(p.grad, expected[name])
    model.save_pretrained(tmp_path)
    same(forward(ZooForCausalLM.from_pretrained(tmp_path), ids), whole, 1e-6)


def trained(model: ZooForCausalLM) -> ZooForCausalLM:
    ids = draw(2, 9)
    model.train().zero_grad()
    model(ids, labels=ids).loss.backward()
    return model


def test_rollback_replays_what_earlier_layers_wrote(own_mixers: None) -> None:
    layers = (swiglu_layer("running", {}), attention(window=3), swiglu_layer("reading", {}))
    model, ids = make(ZooConfig.from_decoder(decoder(*layers), "test")), draw(1, 10)
    _, cache = feed(model, ids, [4])
    cache.activate_past_recording()
    feed(model, torch.cat([ids[:, 4:6], draw(1, 3, seed=9)], 1), [5], cache=cache)
    cache.crop(-3)
    same(feed(model, ids[:, 6:], [4], cache=cache)[0], forward(model, ids)[:, 6:])


def test_a_reader_without_a_writer_is_refused(own_mixers: None) -> None:
    decoder(Layer(mixer="running"), Layer(mixer="reading"))
    with pytest.raises(ZooError, match=r"layer 0 \(reading\) reads running"):
        decoder(Layer(mixer="reading"), Layer(mixer="running"))


SIZES = dict(heads=4, head_dim=8)
MAMBA = dict(**SIZES, state_dim=8)
BAD: list[tuple[dict[str, Any], str]] = [
    (dict(mixer="gated_delta_nett"), "did you mean gated_delta_net"),
    (dict(channel="swigluu"), "did you mean swiglu"),
    (dict(block="pre_nrom"), "did you mean pre_norm"),
    (dict(channel="swiglu", channel_args=dict(intermediate_size=0)), "intermediate_size was 0"),
]
BAD_MIXERS: list[tuple[str, dict[str, Any], str]] = [
    ("attention", dict(**SIZES, depth=3), "unknown argument 'depth'"),
    ("attention", dict(heads=2), "head_dim"),
    ("attention", dict(**SIZES, kv_heads=3), "multiple of kv_heads"),
    ("attention", dict(**SIZES, window=0), "window was 0"),
    ("attention", dict(**SIZES, window=2, chunk=2), "choose one"),
    ("attention", dict(**SIZES, sinks=2), "without a window"),
    ("attention", dict(**SIZES, rope="long"), "names no table"),
    ("gated_delta_net", dict(**SIZES, value_heads=6), "multiple of heads"),
    ("gated_delta_net", dict(**SIZES, gate="gelu"), "gate 'gelu'"),
    ("gla", dict(**SIZES, decay_rank=0), "decay_rank was 0"),
    ("gla", dict(**SIZES, decay_divisor=0.0), "decay_divisor was 0.0"),
    ("gla", dict(**SIZES, feature_map="exp"), "feature_map 'exp'"),
    ("gla", dict(**SIZES, conv=-1), "conv was -1"),
    ("gla", dict(**SIZES, conv_activation="relu"), "conv_activation 'relu'"),
    ("mamba2", dict(**MAMBA, groups=3), "multiple of groups"),
    ("mamba2", dict(**MAMBA, norm_groups=5), "divide 32"),
    ("mamba2", dict(**MAMBA, biases=("q",)), "biases names 'q'"),
    ("mamba2", dict(**MAMBA, time_step_limit=(1.0, 0.5)), "time_step_limit"),
    ("hedgehog", dict(heads=0, head_dim=8), "heads was 0"),
    ("hedgehog", dict(**SIZES, qk_norm="rsm"), "qk_norm"),
]
BAD += [(dict(mixer=name, mixer_args=args), message) for name, args, message in BAD_MIXERS]


@pytest.mark.parametrize(("layer", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_layer_is_refused_in_one_line(
    layer: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[int] = []
    monkeypatch.setattr(nn.Linear, "__init__", lambda *_, **__: allocated.append(1))
    with pytest.raises(ZooError) as caught:
        decoder(Layer(**layer))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not allocated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(layout="gla,retnett"), "mixer 'retnett' is not registered"),
        (dict(layout="gla(window=8),attention"), "layer 0 (gla): unknown argument 'window'"),
        (dict(layout="attention,cross(kv='far')"), "layer 1 (cross) reads far.k"),
        (dict(layout="cross,attention(writes='kv')"), "layer 0 (cross) reads kv.k"),
        (dict(layout="attention", heads=3), "heads was 3; it must divide hidden_size (64)"),
        (dict(layout="attention(kv_heads=3)"), "heads must be a multiple of kv_heads"),
        (dict(layout="gla*5"), "has 5 layers; the model has 4"),
        (dict(layout="gla;attention"), "is invalid at"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["layout"],
)
def test_a_bad_layout_string_is_refused_in_one_line(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[int] = []
    monkeypatch.setattr(nn.Module, "__init__", lambda *_, **__: allocated.append(1))
    with pytest.raises(ZooError) as caught:
        zoo.create("hybrid", **arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not allocated


def test_bad_parts_of_a_config_are_refused() -> None:
    for build, message in (
        (lambda: decoder(hidden_size=0), "hidden_size was 0"),
        (lambda: decoder(vocab_size=-5), "vocab_size was -5"),
        (lambda: Norm(kind="batch"), "norm kind 'batch'"),
        (lambda: Rope(dim=7), "even"),
        (lambda: Rope(dim=8, pairing="thirds"), "pairing"),
        (lambda: DecoderConfig.from_dict({"vocab_size": 9, "hidden_size": 8, "width": 3}), "unknown argument 'width'"),
        (lambda: DecoderConfig.from_dict({"hidden_size": 8, "layers": []}), "vocab_size"),
    ):
        with pytest.raises(ZooError, match=message):
            build()


def test_a_layout_string_may_name_a_mixer_alone(mixer: str) -> None:
    cls = registry.get("mixers", mixer, "MODULE")
    if cls.encoder_only or cls.reads_of(cls.parse(cls.default_args(128, 2))):
        return  # no layer of a causal model, or one that needs another before it
    with torch.device("meta"):
        model = zoo.create("hybrid", layout=mixer, hidden_size=128, heads=2, depth=1)
    assert type(model.model.layers[0].mixer) is cls


def test_an_example_of_every_part_builds(mixer: str) -> None:
    cls = registry.get("mixers", mixer, "MODULE")
    config = decoder()
    args = cls.parse(registry.get("mixers", mixer, "EXAMPLE"))
    args.check(config)
    y = cls(config, args)
    assert y.state_bytes(8) >= 0
    for channel in registry.names("channels"):
        part = registry.get("channels", channel, "MODULE")
        part.parse(registry.get("channels", channel, "EXAMPLE")).check(config)


@pytest.mark.parametrize("kind", ["rms", "rms_one_plus", "rms_plain", "layer", "l2"])
def test_every_norm_kind_normalises(kind: str) -> None:
    layers = (attention(qk_norm=kind), swiglu_layer("gla", registry.get("mixers", "gla", "EXAMPLE")))
    model, ids = make(ZooConfig.from_decoder(decoder(*layers, norm=Norm(kind=kind)), "test")), draw(2, 9)
    same(feed(model, ids, (4, 1, 4))[0], forward(model, ids))
    x = torch.randn(3, 64) * 7
    size = model.model.norm(x).norm(dim=-1)
    torch.testing.assert_close(size, torch.full((3,), 1.0 if kind == "l2" else 8.0), rtol=0.15, atol=0)


def test_head_and_embedding_options() -> None:
    plain, ids = decoder(attention(), head=Head(tied=True)), draw(2, 6)
    base = make(ZooConfig.from_decoder(plain, "test"))
    scaled = make(ZooConfig.from_decoder(decoder(attention(), head=Head(tied=True, scale=0.5, softcap=2.0)), "test"))
    same(forward(scaled, ids), 2.0 * torch.tanh(forward(base, ids) * 0.5 / 2.0), 1e-6)


def test_layers_may_lack_a_mixer_or_a_channel() -> None:
    layers = (
        Layer(channel="swiglu", channel_args=dict(intermediate_size=16)),
        attention(),
        Layer(mixer=None, channel=None),
    )
    model, ids = make(ZooConfig.from_decoder(decoder(*layers), "test")), draw(2, 6)
    same(feed(model, ids, (3, 1, 2))[0], forward(model, ids))
