"""The models that the contracts are tested on, and how their outputs are compared.

A stack for every registered mixer, channel and block: a layer with each of the arguments that `EXAMPLE` and
`VARIANTS` of its file give and, for mixers, as made from attention; and the tiny presets of every architecture. A
mixer that reads what another layer writes names that layer in `BEFORE`, as (mixer, arguments). Nothing here names one
of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from zoo import registry
from zoo.architectures.core.config import DecoderConfig, Head, Layer, Rope
from zoo.architectures.core.decoder import encoder_only
from zoo.architectures.core.mixer import Mixer
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.plan import AttentionSpec
from zoo.architectures.core.sparse import SparseAttention
from zoo.architectures.core.zoo_config import ZooConfig

VOCAB, WIDTH = 97, 64
ROPES = {"default": Rope(dim=16)}
SPEC = AttentionSpec(
    hidden_size=WIDTH,
    heads=4,
    kv_heads=2,
    head_dim=16,
    q_bias=True,
    k_bias=True,
    v_bias=True,
    o_bias=True,
    qk_norm="rms",
    rope="default",
    args=dict(
        heads=4,
        kv_heads=2,
        head_dim=16,
        q_bias=True,
        k_bias=True,
        v_bias=True,
        o_bias=True,
        qk_norm="rms",
        rope="default",
    ),
)


def convertible(mixer: str) -> bool:
    found = registry.get("mixers", mixer, "MODULE")
    return found.from_attention.__func__ is not Mixer.from_attention.__func__ and getattr(found, "makes_keys", True)


def examples(kind: str, name: str) -> dict[str, dict[str, Any]]:
    """Arguments by case name, as the file of a part gives them."""
    module = registry.load(kind, name)
    prefix = name if kind == "mixers" else f"{kind}/{name}"
    cases = {prefix: dict(getattr(module, "EXAMPLE", {}))}
    return cases | {f"{prefix}/{variant}": args for variant, args in getattr(module, "VARIANTS", {}).items()}


def part_layers() -> dict[str, Layer]:
    """A layer for each of the arguments of every part, by `name` and `name/variant`."""
    layers: dict[str, Layer] = {}
    for name in registry.names("mixers"):
        cls = registry.get("mixers", name, "MODULE")
        made = {} if cls.encoder_only else examples("mixers", name)
        if convertible(name):
            made[f"{name}/from_attention"] = dict(cls.from_attention(SPEC).args)
        layers |= {case: swiglu_layer(name, args) for case, args in made.items()}
    attention = dict(mixer="attention", mixer_args=registry.get("mixers", "attention", "EXAMPLE"))
    for name in registry.names("channels"):
        for case, args in examples("channels", name).items():
            layers[case] = Layer(**attention, channel=name, channel_args=args)
    for name in registry.names("blocks"):
        for case, args in examples("blocks", name).items():
            layers[case] = swiglu_layer(**attention, block=name, block_args=args)
    return layers


def part_cases() -> dict[str, tuple[Layer, ...]]:
    """The stack of every part: the layers that come before, and all of its own, two at least."""
    stacks: dict[str, list[Layer]] = {}
    chosen: dict[bool, dict[str, list[Layer]]] = {True: {}, False: {}}
    for name, layer in PARTS.items():
        length = 2 if name.startswith(("channels/", "blocks/")) else 1
        stack = "/".join(name.split("/")[:length])
        if length == 1 and issubclass(cls := registry.get("mixers", stack, "MODULE"), SparseAttention):
            consistent = bool(cls.parse(layer.mixer_args).everything)
            chosen[consistent].setdefault(stack, []).append(layer)
        else:
            stacks.setdefault(stack, []).append(layer)
    stacks |= shared_stacks(chosen[True], "") | shared_stacks(chosen[False], " of few keys")
    cases = {}
    for name, layers in stacks.items():
        before = getattr(registry.load("mixers", name), "BEFORE", ()) if name in registry.names("mixers") else ()
        own = layers * 2 if len(layers) == 1 else layers
        cases[name] = (*(swiglu_layer(mixer, args) for mixer, args in before), *own)
    return cases


def shared_stacks(layers: Mapping[str, list[Layer]], note: str, each: int = 6) -> dict[str, list[Layer]]:
    """Stacks of about `each` layers of several mixers, as those that only choose keys differ in little else."""
    stacks: dict[str, list[Layer]] = {}
    names: list[str] = []
    held: list[Layer] = []
    for name, own in layers.items():
        names.append(name)
        held += own
        if len(held) >= each or name == list(layers)[-1]:
            stacks["+".join(names) + note], names, held = held, [], []
    return stacks


def presets() -> list[str]:
    """The tiny presets of every causal architecture."""
    tiny = [
        (name, preset, registry.get("architectures", name, "layout")(**sizes))
        for name in registry.names("architectures")
        for preset, sizes in registry.get("architectures", name, "PRESETS").items()
        if "tiny" in preset and preset not in getattr(registry.load("architectures", name), "PARAMETERS", {})
    ]
    return [f"{name}/{preset}" for name, preset, decoder in tiny if not encoder_only(decoder)]


def swiglu_layer(mixer: str, mixer_args: dict[str, Any], **fields: Any) -> Layer:
    channel = dict(channel="swiglu", channel_args=dict(intermediate_size=96))
    return Layer(mixer=mixer, mixer_args=mixer_args, **{**channel, **fields})


PARTS = part_layers()
PART_CASES = part_cases()
CASES = [*PART_CASES, *presets()]


def stack(names: Sequence[str], vocab_size: int = VOCAB, tied: bool = False) -> ZooConfig:
    """The config of a decoder with one layer per name; a name is a mixer's or `mixer/variant`."""
    return _config(tuple(PARTS[name] for name in names), vocab_size, tied)


def _config(layers: tuple[Layer, ...], vocab_size: int = VOCAB, tied: bool = False) -> ZooConfig:
    decoder = DecoderConfig(vocab_size=vocab_size, hidden_size=WIDTH, layers=layers, ropes=ROPES, head=Head(tied=tied))
    return ZooConfig.from_decoder(decoder, "test")


def case_config(case: str) -> ZooConfig:
    if case in PART_CASES:
        return _config(PART_CASES[case])
    architecture, preset = case.split("/")
    module = registry.load("architectures", architecture)
    return ZooConfig.from_decoder(module.layout(**module.PRESETS[preset]), architecture)


def stir(model: torch.nn.Module, seed: int = 0, std: float = 0.05) -> None:
    """Noise on every parameter, so that a start at zero or one hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))


def make(config: ZooConfig | Sequence[str] | str, seed: int = 0) -> ZooForCausalLM:
    """A model in eval mode, from a config, a case or the names of its layers."""
    if not isinstance(config, ZooConfig):
        config = case_config(config) if isinstance(config, str) else stack(config)
    torch.manual_seed(seed)
    model = ZooForCausalLM(config).eval()
    stir(model, seed)
    return model


def draw(*shape: int, seed: int = 1, vocab: int = VOCAB) -> Tensor:
    """Token ids, none of them 0."""
    return torch.randint(1, vocab, shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative root mean square error, and worst element over the largest expected one."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    found, expected = found.detach().double(), expected.detach().double()
    assert torch.isfinite(found).all()
    difference = (found - expected).abs()
    rms = difference.square().mean().sqrt() / expected.square().mean().sqrt()
    return rms.item(), (difference.max() / expected.abs().max()).item()


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Both errors within `tolerance`; an all-zero result or one wrong element fails."""
    rms, worst = error(found, expected)
    assert rms <= tolerance and worst <= 5 * tolerance, f"relative RMS {rms:.2e}, worst element {worst:.2e}"


def feed(
    model: ZooForCausalLM, ids: Tensor, sizes: Sequence[int], cache: Any = None, **inputs: Any
) -> tuple[Tensor, Any]:
    """Logits `[B, T, V]` of `ids` fed in pieces of these sizes, and the cache after them."""
    cache = DynamicCache() if cache is None else cache
    outs, start = [], 0
    mask = inputs.pop("attention_mask", None)
    with torch.no_grad():
        for size in sizes:
            stop = start + size
            seen = {} if mask is None else {"attention_mask": mask[:, :stop]}
            outs.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **seen, **inputs).logits)
            start = stop
    return torch.cat(outs, 1), cache


def forward(model: ZooForCausalLM, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of one forward without a cache."""
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs).logits


def parts(model: ZooForCausalLM) -> list[Any]:
    return [part for block in model.model.layers for part in (block.mixer, block.channel) if part is not None]


def static_cache(model: ZooForCausalLM, length: int) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=length)
