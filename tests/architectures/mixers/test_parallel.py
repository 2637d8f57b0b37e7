"""`parallel` against its formula over the two mixers run alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_models import ROPES, WIDTH, feed, make, same, stir, swiglu_layer

from zoo import registry
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig, Head
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.architectures.hybrid import layout
from zoo.architectures.mixers.attention import Attention
from zoo.architectures.mixers.mamba2 import Mamba2
from zoo.architectures.mixers.parallel import Parallel
from zoo.errors import ZooError

SOFTMAX = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default", "window": 5}
SSM = {"heads": 4, "head_dim": 16, "state_dim": 12}
BOTH: dict[str, Any] = {"first": "attention", "first_args": SOFTMAX, "second": "mamba2", "second_args": SSM}
CONFIG = DecoderConfig(vocab_size=97, hidden_size=WIDTH, layers=(), ropes=ROPES)


def built(**more: Any) -> Parallel:
    torch.manual_seed(0)
    made = Parallel(CONFIG, Parallel.parse({**BOTH, **more})).double()
    made.init_weights(0.02)
    stir(made, std=0.2)
    return made


def context(tokens: int) -> Context:
    positions = torch.arange(tokens).expand(2, tokens)
    angles = positions[..., None] * (10000.0 ** (-torch.arange(0, 16, 2).double() / 16)).repeat(2)
    return Context(phase="train", positions=positions, ropes={"default": (angles.cos(), angles.sin())})


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG.norm.eps).sqrt() * weight


def draw(tokens: int = 11) -> Tensor:
    return torch.randn(2, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_scales_sum_and_mean() -> None:
    x, ctx = draw(), context(11)
    mixer = built(first_in=0.5, first_out=3.0, second_in=2.0, second_out=0.25)
    first, second = mixer.first, mixer.second
    assert isinstance(first, Attention) and isinstance(second, Mamba2)
    expected = 3.0 * first(0.5 * x, ctx) + 0.25 * second(2.0 * x, ctx)
    same(mixer(x, ctx), expected, 1e-12)
    same(built(average=True)(x, ctx), (built().first(x, ctx) + built().second(x, ctx)) / 2, 1e-12)


def test_norms_are_on_each_output() -> None:
    x, ctx = draw(), context(11)
    mixer = built(norms=True, first_out=0.7, average=True)
    outs = (mixer.first(x, ctx), mixer.second(x, ctx))
    first, second = (rms(y, norm.weight) for y, norm in zip(outs, (mixer.first_norm, mixer.second_norm), strict=True))
    same(mixer(x, ctx), (0.7 * first + second) / 2, 1e-12)


def test_joint_norms_and_averages_before_one_projection() -> None:
    x, ctx = draw(), context(11)
    mixer = built(norms=True, average=True, joint=True)
    alone = built()
    missing, _ = alone.load_state_dict(mixer.state_dict(), strict=False)
    assert set(missing) == {"first.o_proj.weight", "second.out_proj.weight"}
    eye = torch.eye(WIDTH, dtype=torch.float64)
    alone.first.o_proj.weight.data.copy_(eye)
    alone.second.out_proj.weight.data.copy_(eye)
    first, second = (
        rms(alone.first(x, ctx), mixer.first_norm.weight),
        rms(alone.second(x, ctx), mixer.second_norm.weight),
    )
    same(mixer(x, ctx), (first + second) / 2 @ mixer.out_proj.weight.T, 1e-12)


def test_states_are_nested_and_counted() -> None:
    mixer, cache = built(), LayerCache()
    with torch.no_grad():
        mixer(draw(9), context(9), cache)
    names = set(cache.bytes())
    assert {"first/k", "first/v", "second/state", "second/conv_x"} <= names
    assert all(name.split("/")[0] in ("first", "second") for name in names)


def test_any_two_mixers_and_a_layout_string() -> None:
    mixer = Parallel(CONFIG, Parallel.parse({**BOTH, "first": "gla", "first_args": {"heads": 4, "head_dim": 16}}))
    assert type(mixer.first) is registry.get("mixers", "gla", "MODULE")
    text = "parallel(first=attention,first_args={'heads': 4, 'head_dim': 16},second_in=0.5)"
    config = layout(layout=text, vocab_size=97, hidden_size=64, depth=2, heads=4, intermediate_size=96)
    args = Parallel.parse(config.layers[1].mixer_args)
    assert (args.second, args.second_in, args.branches()[0][1].rope) == ("mamba2", 0.5, None)
    assert Parallel.default_args(64, 4)["first_args"]["heads"] == 4


def test_values_pass_through_the_branches() -> None:
    """The first branch of a later layer reads what the first branch of an earlier one wrote."""
    shared = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default"}
    writer = {**BOTH, "first_args": {**SOFTMAX, "window": None, "writes": "kv"}}
    reader = {**BOTH, "first": "cross", "first_args": {**shared, "kv": "kv"}}
    layers = (swiglu_layer("parallel", writer), swiglu_layer("parallel", reader))
    decoder = DecoderConfig(vocab_size=97, hidden_size=WIDTH, layers=layers, ropes=ROPES, head=Head())
    model = make(ZooConfig.from_decoder(decoder, "test"))
    ids = torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    same(feed(model, ids, (5, 1, 1, 5))[0], whole)
    assert Parallel.writes_of(Parallel.parse(writer)) and set(Parallel.reads_of(Parallel.parse(reader)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second": "no_such_mixer"}, "no_such_mixer"),
        ({"second_args": {**SSM, "wrong": 1}}, "wrong"),
        ({"joint": True, "second_args": {**SSM, "heads": 6}}, "widths 64 and 96"),
        ({"first_args": {**SOFTMAX, "rope": "missing"}}, "missing"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        Parallel.parse({**BOTH, **change}).check(CONFIG)
