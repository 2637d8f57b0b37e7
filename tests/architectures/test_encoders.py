"""Bidirectional models: every mixer that sees both sides, and the encoder architectures, as masked language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM
from zoo_models import PART_CASES, ROPES, VOCAB, draw, error, examples, same, stir, swiglu_layer

import zoo
from zoo import registry
from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.decoder import encoder_only
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.modeling import ZooForCausalLM, ZooForMaskedLM, ZooModel
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.errors import ZooError


def mixer_cases() -> dict[str, tuple[Layer, ...]]:
    """Two layers of every mixer that sees both sides, after those that write what it reads."""
    cases = {}
    for name in registry.names("mixers"):
        module = registry.load("mixers", name)
        before = tuple(swiglu_layer(mixer, args) for mixer, args in getattr(module, "BEFORE", ()))
        for case, args in examples("mixers", name).items():
            layers = (*before, *[swiglu_layer(name, args)] * 2)
            if all(sees_both_sides(layer) for layer in layers):
                cases[case] = layers
    return cases


def sees_both_sides(layer: Layer) -> bool:
    cls = registry.get("mixers", str(layer.mixer), "MODULE")
    return cls.encoder_only or cls.bidirectional


def architecture_cases() -> dict[str, DecoderConfig]:
    made = {
        f"{name}/{preset}": registry.get("architectures", name, "layout")(**sizes)
        for name in registry.names("architectures")
        for preset, sizes in registry.get("architectures", name, "PRESETS").items()
        if "tiny" in preset
    }
    return {case: config for case, config in made.items() if encoder_only(config)}


def decoder(*layers: Layer) -> DecoderConfig:
    return DecoderConfig(vocab_size=VOCAB, hidden_size=64, layers=layers, ropes=ROPES)


CASES = {case: decoder(*layers) for case, layers in mixer_cases().items()} | architecture_cases()
LOOKING_BACK = [case for case, layers in PART_CASES.items() if not all(x.mixer and sees_both_sides(x) for x in layers)]


def make(case: str) -> ZooForMaskedLM:
    torch.manual_seed(0)
    model = ZooForMaskedLM(ZooConfig.from_decoder(CASES[case], "test")).eval()
    stir(model)
    return model


def forward(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> ZooForMaskedLM:
    return make(request.param)


def test_padding_on_either_side_changes_nothing(model: ZooForMaskedLM) -> None:
    rows, pads = draw(2, 13), 4
    alone, whole = forward(model, rows[:1, :-pads]), forward(model, rows)
    for left in (True, False):
        batch, mask = rows.clone(), torch.ones_like(rows)
        padding, text = (slice(0, pads), slice(pads, None)) if left else (slice(-pads, None), slice(0, -pads))
        batch[0, padding], mask[0, padding], batch[0, text] = 7, 0, rows[0, :-pads]
        found = forward(model, batch, attention_mask=mask)
        same(found[:1, text], alone)
        same(found[1:], whole[1:])


def test_later_tokens_are_seen(model: ZooForMaskedLM) -> None:
    if all(not hasattr(block.mixer, "o_proj") for block in model.model.layers):
        return  # a memory unit alone looks at no other token
    ids = draw(1, 10)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % VOCAB
    assert error(forward(model, other)[:, :-1], forward(model, ids)[:, :-1])[0] > 1e-4


def backward(model: ZooForMaskedLM) -> tuple[float, dict[str, Tensor]]:
    ids, labels = draw(2, 12), draw(2, 12, seed=3)
    labels[:, ::2] = -100
    model.train().zero_grad()
    loss = model(ids, labels=labels).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_parameter_gets_a_gradient_also_with_checkpointing(model: ZooForMaskedLM) -> None:
    loss, expected = backward(model)
    used = {name for name, gradient in expected.items() if torch.isfinite(gradient).all() and gradient.any()}
    assert not {name for name, _ in model.named_parameters()} - used
    model.gradient_checkpointing_enable()
    again, found = backward(model)
    assert again == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        same(found[name], gradient, 1e-5)


def test_a_saved_model_computes_the_same(model: ZooForMaskedLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    ids = draw(2, 9)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is ZooForMaskedLM
    same(forward(loaded, ids), forward(model, ids), 1e-6)
    ours = zoo.from_pretrained(tmp_path)
    assert type(ours) is ZooForMaskedLM
    same(forward(ours, ids), forward(model, ids), 1e-6)


def test_low_precision_stays_near(model: ZooForMaskedLM, tmp_path: Path) -> None:
    if any(block.mixer.chooses for block in model.model.layers):
        pytest.skip("which tokens are read depends on the rounding")
    ids = draw(2, 13)
    expected = forward(model, ids)
    model.save_pretrained(tmp_path)
    low = ZooForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert error(forward(low, ids).float(), expected)[0] < 0.04
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(forward(model, ids).float(), expected)[0] < 0.04
    assert forward(model.double(), ids).dtype == torch.float64


def test_weights_made_on_the_meta_device_are_filled(model: ZooForMaskedLM) -> None:
    with torch.device("meta"):
        empty = ZooForMaskedLM(model.config)
    filled = empty.to_empty(device="cpu")
    for tensor in (*filled.parameters(), *filled.buffers()):
        tensor.data.fill_(float("nan"))
    for item in (*filled.modules(), *filled.parameters()):
        item._is_hf_initialized = False  # type: ignore[union-attr, assignment]
    filled.init_weights()
    assert not [name for name, p in filled.named_parameters() if not torch.isfinite(p).all()]


def test_packed_rows_are_kept_apart_or_refused(model: ZooForMaskedLM) -> None:
    ids, bounds = draw(1, 11), torch.tensor([0, 4, 11], dtype=torch.int32)
    if all(block.mixer.packed for block in model.model.layers):
        expected = torch.cat([forward(model, piece) for piece in ids.split([4, 7], 1)], 1)
        same(forward(model, ids, cu_seqlens=bounds), expected)
    else:
        with pytest.raises(ValueError, match="packed sequences"):
            forward(model, ids, cu_seqlens=bounds)


ENCODERS = [case for case in CASES if encoder_only(CASES[case])]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_encoder_is_no_causal_model(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(nn.Linear, "__init__", lambda *_, **__: made.append(1))
    config = ZooConfig.from_decoder(CASES[encoder], "test")
    for cls in (ZooForCausalLM, ZooModel):
        with pytest.raises(ZooError, match="sees tokens to come.*ZooForMaskedLM"):
            cls(config)
    assert not made


@pytest.mark.parametrize("kind", LOOKING_BACK)
def test_what_only_looks_back_is_no_masked_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, made = ZooConfig.from_decoder(decoder(*PART_CASES[kind]), "test"), list[int]()
    monkeypatch.setattr(ZooConfig, "decoder_config", config.decoder_config)  # some validate by making the mixer
    monkeypatch.setattr(nn.Linear, "__init__", lambda *_, **__: made.append(1))
    with pytest.raises(ZooError, match="only looks back"):
        ZooForMaskedLM(config)
    assert not made


@pytest.mark.parametrize("name", ["linformer", "luna"])
def test_create_gives_a_masked_model(name: str) -> None:
    model = zoo.create(name)
    assert type(model) is ZooForMaskedLM and model.state_bytes(100) == 0


def context(tokens: int) -> Context:
    return Context(phase="train", positions=torch.arange(tokens)[None], causal=False)


def build(name: str, **args: Any) -> Any:
    cls = registry.get("mixers", name, "MODULE")
    torch.manual_seed(0)
    module = cls(decoder(), cls.parse(args)).double()
    stir(module, std=0.2)
    return module


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of `q [B, N, 64]` in 4 heads to all of `k, v [B, S, 64]`."""
    q, k, v = (x.unflatten(-1, (4, 16)).transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(-2)


def test_linformer_attends_to_mixtures() -> None:
    module, x = build("linformer", heads=4, head_dim=16, length=20, mixtures=5), torch.randn(2, 11, 64).double()
    with torch.no_grad():
        q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
        keys, values = (m.weight[:11].T @ y for m, y in ((module.key_mixing, k), (module.value_mixing, v)))
        same(module(x, context(11)), module.o_proj(softmax(q, keys, values)), 1e-12)
    with pytest.raises(ValueError, match="at most 20"):
        module(torch.randn(1, 21, 64).double(), context(21))


def test_linformer_layers_share_one_mixing_matrix() -> None:
    layers = zoo.create("linformer").model.layers
    assert layers[0].mixer.key_mixing is layers[1].mixer.key_mixing
    separate = zoo.create("linformer", sharing="heads").model.layers
    assert separate[0].mixer.key_mixing is not separate[1].mixer.key_mixing
    assert separate[0].mixer.value_mixing is not separate[0].mixer.key_mixing


def test_luna_packs_and_unpacks_and_carries_its_pool() -> None:
    first, second = build("luna", heads=4, head_dim=16, pool=6), build("luna", heads=4, head_dim=16)
    x, later = (torch.randn(2, 11, 64, generator=torch.Generator().manual_seed(s)).double() for s in (1, 2))

    def layer(module: Any, pool: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        read = softmax(module.pool_q_proj(pool), module.pool_k_proj(x), module.pool_v_proj(x))
        return module.o_proj(softmax(module.q_proj(x), module.k_proj(read), module.v_proj(read))), pool + read

    with torch.no_grad():
        y, carried = layer(first, first.pool.expand(2, -1, -1), x)
        found, values = first(x, context(11))
        same(found, y, 1e-12)
        expected, _ = layer(second, second.pool_norm(carried), later)
        ctx = Context(phase="train", positions=torch.arange(11)[None], causal=False, values=values)
        same(second(later, ctx)[0], expected, 1e-12)
