"""`from_pretrained(..., attention=...)`: training-free methods inside transformers' models and inside ours."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_models import FAMILIES, QUEST, dense, generate, ids, options_in, padded, same, shown, stepwise
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import zoo
from zoo import registry
from zoo.architectures.core import foreign, methods
from zoo.errors import ZooError


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_of_everything_is_the_model_as_it_was(family: str, checkpoints: Any, used: Counter[str]) -> None:
    path = checkpoints(family)
    model, expected = zoo.from_pretrained(path, attention="quest", attention_args=QUEST), dense(path)
    assert type(model) is type(expected) and model.dtype == expected.dtype
    real = padded.bool()
    with torch.no_grad():
        same(model(ids, attention_mask=padded).logits[real], expected(ids, attention_mask=padded).logits[real])
        same(model(ids).logits, expected(ids).logits)
    full = 3 - sum(kind == "sliding_attention" for kind in FAMILIES[family].get("layer_types", ()))
    assert used == {"prefill": 2 * full}, "each layer without a window, and no other"
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        call = dict(generate, attention_mask=padded, **options)
        assert torch.equal(model.generate(ids, **call), expected.generate(ids, **call)), options
    call = dict(generate, prompt_lookup_num_tokens=3)
    if family not in ("gemma2", "gemma3_text"):  # transformers does not roll their windows back
        assert torch.equal(model.generate(ids[:1], **call), expected.generate(ids[:1], **call))
    assert used["decode"] > 4 * full


@pytest.mark.parametrize("method", methods.names())
def test_every_method_inside_a_model_of_transformers(method: str, llama: Any, expected: Tensor) -> None:
    module = registry.load("mixers", method)
    foreign.attach(llama, methods.Choice.parse(method, options_in(module, module.EXAMPLE)))
    for cache in (DynamicCache(config=llama.config), StaticCache(config=llama.config, max_cache_len=48)):
        found = stepwise(llama, padded, cache)
        same(found[shown(found)], expected[:, : found.shape[1]][shown(found)])


@pytest.mark.parametrize("method", methods.names())
def test_a_model_of_transformers_and_ours_choose_alike(method: str, llama: Any, ours: Path) -> None:
    module = registry.load("mixers", method)
    for args in (options_in(module, args) for args in getattr(module, "VARIANTS", {}).values()):
        foreign.attach(llama, methods.Choice.parse(method, args))
        model = zoo.from_pretrained(ours, attention=method, attention_args=args)
        assert {layer.mixer for layer in model.config.decoder_config.layers} == {method}
        if getattr(model.model.layers[0].mixer.rule, "turn", None) is not None:
            continue  # ours knows more than the queries, keys and values of the call
        theirs, own = (stepwise(each, padded, DynamicCache(config=each.config)) for each in (llama, model))
        same(theirs[:, : own.shape[1]][shown(own)], own[shown(own)])


def test_two_methods(checkpoints: Any, ours: Path, tmp_path: Path) -> None:
    path = checkpoints("llama")
    args = {"xattention": {"block": 16, "budget": 16, "stride": 4}, "quest": {"page": 16, "budget": 16}}
    both = [zoo.from_pretrained(x, attention="xattention+quest", attention_args=args) for x in (path, ours)]
    found = [stepwise(model, padded, DynamicCache(config=model.config)) for model in both]
    same(found[0][shown(found[0])], found[1][shown(found[0])])
    first, last = (
        zoo.from_pretrained(path, attention=name, attention_args=args[name]) for name in ("xattention", "quest")
    )
    with torch.no_grad():
        chosen = both[0](ids).logits
        same(chosen, first(ids).logits)
        assert (chosen - dense(path)(ids).logits)[:, -1].abs().max() > 1e-2
    cache = DynamicCache(config=last.config)
    with torch.no_grad():
        last(ids[:, :30], past_key_values=cache)
        filled = copy.deepcopy(cache)
        same(both[0](ids[:, 30:31], past_key_values=filled).logits, last(ids[:, 30:31], past_key_values=cache).logits)
    zoo.save(both[1], tmp_path / "again")
    same(stepwise(zoo.from_pretrained(tmp_path / "again"), padded, DynamicCache())[1], found[1][1])
    assert both[1].state_bytes(64) > zoo.from_pretrained(ours).state_bytes(64), "with what is noted about pages"


def test_padding_between_tokens(checkpoints: Any) -> None:
    """A row that ends in padding and goes on: as the row without."""
    model = zoo.from_pretrained(checkpoints("llama"), attention="quest", attention_args={"page": 16, "budget": 16})
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, 24:30] = 0
    positions, cache = mask.cumsum(1) - 1, DynamicCache(config=model.config)
    alone, plain = ids[:1, mask[0].bool()], DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:1, :30], attention_mask=mask[:, :30], position_ids=positions[:, :30], past_key_values=cache)
        model(alone[:, :24], past_key_values=plain)
        for at in range(30, 40):
            options = dict(attention_mask=mask[:, : at + 1], position_ids=positions[:, at : at + 1])
            found = model(ids[:1, at : at + 1], past_key_values=cache, **options).logits
            same(found, model(alone[:, at - 6 : at - 5], past_key_values=plain).logits)


@pytest.mark.parametrize(
    ("family", "fields"),
    [("gemma2", {"attn_logit_softcapping": 5.0}), ("llama", {"attention_dropout": 0.5}), ("qwen3", {})],
)
def test_what_is_more_than_softmax_stays(family: str, fields: dict[str, Any], checkpoints: Any, used: Any) -> None:
    """A softcap, dropout in training, packed sequences."""
    path = checkpoints(family, **fields)
    model, expected = zoo.from_pretrained(path, attention="quest", attention_args=QUEST), dense(path)
    positions = torch.arange(20).repeat(1, 2) if family == "qwen3" else None
    for each in (model, expected):
        each.train(family == "llama")
    found = []
    for each in (model, expected):
        torch.manual_seed(3)
        with torch.no_grad():
            found.append(each(ids[:1], position_ids=positions, use_cache=False).logits)
    assert torch.equal(*found) and not used


def test_eager_attention_stays_beside_a_method(checkpoints: Any) -> None:
    path = checkpoints("gemma2", attn_logit_softcapping=2.0)
    options = dict(attention="quest", attention_args=QUEST)
    with torch.no_grad():
        eager = dense(path, attn_implementation="eager")(ids, attention_mask=padded)
        assert not torch.equal(eager.logits, dense(path)(ids, attention_mask=padded).logits)
        found = zoo.from_pretrained(path, attn_implementation="eager", **options)(ids, attention_mask=padded)
        assert torch.equal(found.logits, eager.logits)
        path = checkpoints("llama")
        eager = dense(path, attn_implementation="eager")(ids, attention_mask=padded, output_attentions=True)
        model = zoo.from_pretrained(path, attn_implementation="eager", **options)
        same(model(ids, attention_mask=padded).logits[1], eager.logits[1])
        assert len(model(ids, attention_mask=padded, output_attentions=True).attentions) in (0, 3)
    with pytest.raises(ZooError, match="must be sdpa or eager"):
        zoo.from_pretrained(path, attn_implementation="flex_attention", **options)


def test_layers_that_stay_dense(checkpoints: Any, ours: Path, used: Counter[str]) -> None:
    path = checkpoints("llama")
    options: dict[str, Any] = dict(attention="quest", attention_args=QUEST, dense_layers=(0, 2))
    for each in (path, ours):
        with torch.no_grad():
            zoo.from_pretrained(each, **options)(ids)
    assert used == {"prefill": 2}
    model = zoo.from_pretrained(ours, **options)
    assert [layer.mixer for layer in model.config.decoder_config.layers] == ["attention", "quest", "attention"]


def test_the_name_of_a_method_is_not_saved(checkpoints: Any, tmp_path: Path) -> None:
    model = zoo.from_pretrained(checkpoints("llama"), attention="quest", attention_args=QUEST)
    model.save_pretrained(tmp_path / "saved")
    assert "attn_implementation" not in (tmp_path / "saved" / "config.json").read_text()
    assert dense(tmp_path / "saved").config._attn_implementation == "sdpa"
    foreign.detach(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": "gla"}, "'gla' is no training-free method.*zoo.convert; .*quest"),
        ({"attention": "qest"}, "did you mean quest"),
        ({"attention": "quest+quest"}, "'quest' would choose keys in prefill, and does so in decode alone"),
        ({"attention": "quest+quest+quest"}, "one method, or one for prefill"),
        ({"attention": "quest", "attention_args": {"pages": 16}}, "no option 'pages'; it takes budget, page"),
        ({"attention": "quest", "attention_args": {"heads": 16}}, "no option 'heads'"),
        ({"attention": "quest", "attention_args": {"page": 5}}, "page was 5"),
        ({"attention": "quest", "attention_args": {"budget": 0}}, "budget was 0"),
        ({"attention": "quest", "dense_layers": (7,)}, "dense_layers has 7; layers are 0 to 2"),
        ({"attention": "nowhere.json"}, "no calibration file at nowhere.json"),
        ({"attention_args": {"page": 16}}, "name it with attention="),
    ],
)
def test_what_is_refused_before_anything_is_loaded(
    options: dict[str, Any], words: str, checkpoints: Any, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [checkpoints("llama"), ours]
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    for path in paths:
        with pytest.raises(ZooError, match=words) as caught:
            zoo.from_pretrained(path, **options)
        assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_models_without_attention_to_replace(checkpoints: Any, tmp_path: Path) -> None:
    zoo.save(zoo.create("gla", preset="tiny"), tmp_path / "gla")
    with pytest.raises(ZooError, match="no layer has plain attention"):
        zoo.from_pretrained(tmp_path / "gla", attention="quest")
    windows = zoo.create("hybrid", layout="attention(window=4),attention", hidden_size=64)
    zoo.save(windows, tmp_path / "windows")
    model = zoo.from_pretrained(tmp_path / "windows", attention="quest")
    assert [layer.mixer for layer in model.config.decoder_config.layers] == ["attention", "quest"] * 2
    folder = tmp_path / "unknown"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "nothing_such"}))
    with pytest.raises(ZooError, match="transformers has no language model"):
        zoo.from_pretrained(folder, attention="quest")


@pytest.mark.slow
def test_convert_makes_a_checkpoint_of_a_method(tiny_llama: Path, tmp_path: Path) -> None:
    report = zoo.convert(tiny_llama, tmp_path / "out", layout="quest(budget=1.0)")
    assert report.ok
    with torch.no_grad():
        same(zoo.from_pretrained(tmp_path / "out")(ids).logits, zoo.from_pretrained(tiny_llama)(ids).logits)


# Calibration.
