"""Every block form against its wiring written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_models import ROPES, WIDTH, stir, swiglu_layer

from zoo import registry
from zoo.architectures.core.config import DecoderConfig, Layer, Norm
from zoo.architectures.core.mixer import Context
from zoo.errors import ZooError

ATTENTION = dict(heads=4, head_dim=16)


def config_of(layer: Layer, norm: Norm | None = None) -> DecoderConfig:
    return DecoderConfig(vocab_size=8, hidden_size=WIDTH, layers=(layer,), norm=norm or Norm(), ropes=ROPES)


def make_block(name: str, norm: Norm | None = None, **args: Any) -> nn.Module:
    layer = swiglu_layer("attention", ATTENTION, block=name, block_args=args)
    torch.manual_seed(0)
    block = registry.get("blocks", name, "MODULE")(config_of(layer, norm), layer).double().eval()
    stir(block, std=0.3)
    return block


def inputs() -> tuple[Tensor, Context]:
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, Context(phase="train", positions=torch.arange(7).expand(2, 7))


def rms(x: Tensor, norm: Any) -> Tensor:
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def post_branch(x: Tensor, b: Any, f: Any, g: Any) -> Tensor:
    x = x + rms(f(x), b.mixer_norm)
    return x + rms(g(x), b.channel_norm)


def post_sum(x: Tensor, b: Any, f: Any, g: Any) -> Tensor:
    x = rms(x + f(x), b.mixer_norm)
    return rms(x + g(x), b.channel_norm)


def deepnorm(x: Tensor, b: Any, f: Any, g: Any) -> Tensor:
    x = rms(1.7 * x + f(x), b.mixer_norm)
    return rms(1.7 * x + g(x), b.channel_norm)


def sandwich(x: Tensor, b: Any, f: Any, g: Any) -> Tensor:
    x = x + rms(f(rms(x, b.mixer_norm)), b.mixer_post_norm)
    return x + rms(g(rms(x, b.channel_norm)), b.channel_post_norm)


def parallel_one(x: Tensor, b: Any, f: Any, g: Any) -> Tensor:
    normed = rms(x, b.norm)
    return x + f(normed) + g(normed)


def parallel_two(x: Tensor, b: Any, f: Any, g: Any) -> Tensor:
    return x + f(rms(x, b.mixer_norm)) + g(rms(x, b.channel_norm))


WIRINGS = [
    ("post_norm", {}, post_branch),
    ("post_norm", {"norm_of": "sum"}, post_sum),
    ("post_norm", {"norm_of": "sum", "alpha": 1.7}, deepnorm),
    ("sandwich", {}, sandwich),
    ("parallel", {}, parallel_one),
    ("parallel", {"norms": 2}, parallel_two),
]


@pytest.mark.parametrize(("name", "args", "wiring"), WIRINGS)
def test_a_block_is_its_wiring(name: str, args: dict[str, Any], wiring: Any) -> None:
    block: Any = make_block(name, **args)
    x, ctx = inputs()
    found, written = block(x, ctx)
    expected = wiring(x, block, lambda y: block.mixer(y, ctx), lambda y: block.channel(y, ctx))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not written


def test_no_two_wirings_agree() -> None:
    """The tests above can tell the forms apart."""
    x, ctx = inputs()
    found = [make_block(name, **args)(x, ctx)[0] for name, args, _ in WIRINGS]
    for i, first in enumerate(found):
        for second in found[:i]:
            assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize("missing", ["mixer", "channel"])
@pytest.mark.parametrize("name", ["pre_norm", "post_norm", "sandwich"])
def test_a_layer_may_have_one_part(name: str, missing: str) -> None:
    """One norm (or one pair) and one part, as in Nemotron-H."""
    layer = swiglu_layer("attention", ATTENTION, block=name, **({"channel": None} if missing == "channel" else {}))
    layer = layer if missing == "channel" else Layer(channel="swiglu", channel_args=layer.channel_args, block=name)
    block = registry.get("blocks", name, "MODULE")(config_of(layer), layer).double()
    x, ctx = inputs()
    assert block(x, ctx)[0].shape == x.shape
    assert not [parameter for parameter, _ in block.named_parameters() if parameter.startswith(missing)]


@pytest.mark.parametrize("kind", ["layer", "rms_one_plus", "l2"])
def test_blocks_take_the_norm_of_the_config(kind: str) -> None:
    for name in ("post_norm", "sandwich", "parallel"):
        block: Any = make_block(name, Norm(kind=kind, bias=False))
        norms = [module for path, module in block.named_children() if path.endswith("norm")]
        assert len(norms) == {"post_norm": 2, "sandwich": 4, "parallel": 1}[name]
        assert len({type(norm) for norm in norms}) == 1 and all(
            not hasattr(norm, "bias") or norm.bias is None for norm in norms
        )


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("post_norm", {"norm_of": "input"}, "norm_of was 'input'"),
        ("parallel", {"norms": 3}, "norms was 3"),
        ("sandwich", {"alpha": 2.0}, "unknown argument 'alpha'"),
    ],
)
def test_bad_block_arguments_are_refused_before_weights(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        config_of(swiglu_layer("attention", ATTENTION, block=name, block_args=args))


def test_parallel_needs_both_parts() -> None:
    layer = Layer(mixer="attention", mixer_args=ATTENTION, block="parallel")
    with pytest.raises(ZooError, match="needs a mixer and a channel"):
        registry.get("blocks", "parallel", "MODULE")(config_of(layer), layer)
