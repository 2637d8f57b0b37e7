"""`from_pretrained(..., attention=...)`: training-free methods inside transformers' models and inside ours."""

from __future__ import annotations

import copy
import json
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from typer.testing import CliRunner

import zoo
from zoo import registry
from zoo.architectures.core import foreign, methods
from zoo.architectures.core.sparse import Method, View
from zoo.cli import app
from zoo.errors import ZooError

SIZES: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
WINDOWS = {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 512},
    "gemma2": {**WINDOWS, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "gemma3_text": {**WINDOWS, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "gpt2": {"n_positions": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 97},
}
QUEST = {"page": 16, "budget": 1.0}
ids = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(0))
padded = torch.ones_like(ids)
padded[0, :9] = 0
generate: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Directories of tiny random models, made when asked for: a family, with other values of its config."""
    folder, made = tmp_path_factory.mktemp("foreign"), {}

    def path(family: str, **fields: Any) -> Path:
        name = f"{family}{len(made) if fields else ''}"
        if name not in made:
            own = FAMILIES[family] if family == "gpt2" else {**SIZES, **FAMILIES[family]}
            config = AutoConfig.for_model(family, **{**copy.deepcopy(own), "pad_token_id": 0, **fields})
            config.eos_token_id = config.bos_token_id = None
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                parameter.data.mul_(2.0) if parameter.dim() > 1 else None
            model.save_pretrained(folder / name)
            made[name] = folder / name
        return made[name]

    return path


@pytest.fixture(scope="module")
def llama(checkpoints: Any) -> Any:
    """A model whose attention is replaced again and again."""
    return dense(checkpoints("llama"))


@pytest.fixture(scope="module")
def ours(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in our format."""
    return zoo.save(zoo.from_pretrained(checkpoints("llama")), tmp_path_factory.mktemp("ours") / "llama")


@pytest.fixture(scope="module")
def expected(checkpoints: Any) -> Tensor:
    """What its own attention gives."""
    return stepwise(dense(checkpoints("llama")), padded, DynamicCache())


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often some method answered, by phase."""
    calls: Counter[str] = Counter()
    call = Method.__call__

    def counting(self: Method, view: View) -> Tensor:
        calls["decode" if view.decoding else "prefill"] += 1
        return call(self, view)

    monkeypatch.setattr(Method, "__call__", counting)
    yield calls


def dense(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
def stepwise(model: Any, mask: Tensor, cache: Any, last: int = 4) -> Tensor:
    """Logits `[B, T, V]` of the prompt in two chunks and of tokens one by one; then some of them once more."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    total = ids.shape[1]
    bounds = [0, 20, *range(total - last, total + 1)]

    def call(start: int, end: int) -> Tensor:
        options = dict(position_ids=positions[:, start:end], past_key_values=cache, use_cache=True)
        out: Tensor = model(ids[:, start:end], attention_mask=mask[:, :end], **options).logits
        return out

    parts = [call(start, end) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    if all(layer.is_croppable for layer in cache.layers):
        cache.crop(-3)
        parts += [call(start, start + 1) for start in range(total - 3, total)]
    return torch.cat(parts, 1)


def shown(logits: Tensor) -> Tensor:
    """Where `stepwise` gave the logits of real tokens."""
    return torch.cat([padded, padded[:, -3:]], 1)[:, : logits.shape[1]].bool()


def options_in(module: Any, args: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name not in methods.COMMON}


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


class Noting(Method):
    """Dense, and remembers how many keys it has noted."""

    phases = ("prefill", "decode")

    def prefill(self, view: View) -> Tensor:
        if view.notes is not None:
            assert view.notes.get("keys", 0) <= view.k.shape[1]
            view.notes["keys"] = view.k.shape[1]
            view.notes["calls"] = view.notes.get("calls", 0) + 1
        o: Tensor = view.dense()
        return o

    decode = prefill


def calls(cache: Any) -> int:
    notes = getattr(cache.layers[0], "_zoo_notes", {"notes": {}})["notes"]
    return int(notes.get("calls", 0))


def test_notes_live_as_long_as_the_keys_grow(checkpoints: Any) -> None:
    model = dense(checkpoints("llama"))
    foreign.attach_rules(model, lambda layer, sizes: Noting(None), "noting", "noting")
    cache = DynamicCache(config=model.config)

    def run(tokens: int, rows: int = 2) -> int:
        with torch.no_grad():
            model(ids[:1, :tokens].expand(rows, -1), past_key_values=cache, use_cache=True)
        return calls(cache)

    assert [run(8), run(1), run(3)] == [1, 2, 3]
    for change in (
        lambda: cache.crop(-2),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(1),
        lambda: cache.batch_select_indices(torch.tensor([0, 1])),
    ):
        change()
        assert calls(cache) == 0
        assert [run(1), run(1)] == [1, 2]
    cache.layers[0].keys = cache.layers[0].keys[:, :, :-1]  # behind the layer's back
    cache.layers[0].values = cache.layers[0].values[:, :, :-1]
    assert [run(1), run(1)] == [1, 2]
    for again in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert calls(again) == 0 and type(again.layers[0]) is type(DynamicCache(config=model.config).layers[0])
        assert torch.equal(again.layers[0].keys, cache.layers[0].keys)
    assert calls(cache) == 2
    static = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=static)
        model(ids[:, 8:9], past_key_values=static)
        assert calls(static) == 2
        static.reset()
        assert calls(static) == 0


def test_a_copy_of_the_model_is_apart(checkpoints: Any) -> None:
    model = zoo.from_pretrained(checkpoints("llama"), attention="quest", attention_args={"page": 16, "budget": 16})
    other = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    expected = model.generate(ids, **generate)
    for each in (other, again):
        assert torch.equal(each.generate(ids, **generate), expected)


@pytest.mark.slow
def test_torch_compile_leaves_attention_alone(checkpoints: Any) -> None:
    model = zoo.from_pretrained(checkpoints("llama"), attention="quest", attention_args={"page": 16, "budget": 16})
    expected = stepwise(model, padded, StaticCache(config=model.config, max_cache_len=48))
    model.forward = torch.compile(model.forward, backend="eager")
    same(stepwise(model, padded, StaticCache(config=model.config, max_cache_len=48)), expected)


def test_gradients_flow(checkpoints: Any) -> None:
    path = checkpoints("llama")
    found = []
    for model in (zoo.from_pretrained(path, attention="quest", attention_args=QUEST), dense(path)):
        model.train()
        model(ids, attention_mask=padded, labels=ids.masked_fill(padded == 0, -100), use_cache=False).loss.backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    same(*found, tolerance=1e-4)


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


def calibrate(view: View, args: Any) -> dict[str, Any]:
    """A number that tells the layer's queries, keys and values apart, as a budget."""
    assert not view.decoding and view.k.shape[1] == view.q.shape[1]
    return {"budget": 16 + int(1000 * view.k.abs().mean() + 1000 * view.q.abs().mean()) % 16}


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A text file; `quest` has something to calibrate."""
    monkeypatch.setattr(registry.load("mixers", "quest"), "calibrate", calibrate, raising=False)
    (tmp_path / "book.txt").write_text("It was a dark night, and the wind had risen. " * 20)
    return tmp_path


def call(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.mark.parametrize("kind", ["foreign", "ours"])
def test_calibration_makes_a_file_that_loads(kind: str, calibrated: Path, tiny_llama: Path) -> None:
    path = tiny_llama
    if kind == "ours":
        path = zoo.save(zoo.from_pretrained(path), calibrated / "ours", tokenizer=zoo.tokenizer(path))
    given = ("--data", calibrated / "book.txt", "--length", 64, "--samples", 3, "--args", '{"page": 16}')
    done = call("calibrate", path, "--method", "quest", "-o", calibrated / "quest.json", *given)
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert done.stdout == f"wrote {calibrated / 'quest.json'}: quest in 4 of 4 layers\n"
    data = json.loads((calibrated / "quest.json").read_text())
    assert (data["method"], data["source"], data["args"]) == ("quest", str(path), {"page": 16})
    assert data["samples"] == {"rows": 3, "tokens": 64}
    budgets = [layer["budget"] for layer in data["layers"]]
    assert len(budgets) == 4 and len(set(budgets)) > 1
    files = [calibrated / "quest.json", str(calibrated / "quest.json")]
    for attention in files:
        model = zoo.from_pretrained(path, attention=attention, dense_layers=[1])
        if kind == "ours":
            args = [layer.mixer_args for layer in model.config.decoder_config.layers]
            assert [each.get("budget") for each in args] == [budgets[0], None, *budgets[2:]]
            assert args[0]["page"] == 16
        assert model(ids).logits.isfinite().all()
    again = call("calibrate", path, "--method", "quest", "-o", calibrated / "quest.json", *given)
    assert again.exit_code == 2 and "exists" in again.stderr


def test_both_kinds_of_model_calibrate_alike(calibrated: Path, tiny_llama: Path) -> None:
    from zoo.architectures.core.calibration import calibrate as run

    choice = methods.Choice.parse("quest", {"page": 16})
    load = partial(zoo.from_pretrained, attention="quest", attention_args={"page": 16})
    ours = zoo.save(zoo.from_pretrained(tiny_llama), calibrated / "ours")
    seen: list[int] = []
    found = [run(load(path), choice, ids, seen.append) for path in (tiny_llama, ours)]
    assert found[0] == found[1] and seen == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "two_phase"), "no training-free method"),
        (("--method", "quest+quest"), "one method is calibrated at a time"),
        (("--method", "quest", "--args", "{"), "must be a JSON object"),
        (("--method", "quest", "--args", '{"pages": 2}'), "no option 'pages'"),
        (("--method", "quest", "--samples", 0), "--samples was 0"),
    ],
)
def test_calibration_refuses(arguments: Any, words: str, calibrated: Path, tiny_llama: Path) -> None:
    where = ("--data", calibrated / "book.txt", "-o", calibrated / "out.json")
    done = call("calibrate", tiny_llama, *arguments, *where)
    assert (done.exit_code, done.stdout) == (2, "") and words in done.stderr, done.stderr
    assert not (calibrated / "out.json").exists()


def test_a_method_without_anything_to_calibrate(tiny_llama: Path, tmp_path: Path) -> None:
    name = next(name for name in methods.names() if not hasattr(registry.load("mixers", name), "calibrate"))
    done = call("calibrate", tiny_llama, "--method", name, "--data", tmp_path / "x", "-o", tmp_path / "o.json")
    assert done.exit_code == 2 and "nothing to calibrate" in done.stderr


def test_a_calibration_of_another_model(calibrated: Path, checkpoints: Any) -> None:
    file = calibrated / "other.json"
    file.write_text(json.dumps({"method": "quest", "layers": [{"budget": 16}] * 5}))
    with pytest.raises(ZooError, match="has 5 layers, the model 3"):
        zoo.from_pretrained(checkpoints("llama"), attention=file)
    file.write_text(json.dumps({"method": "quest"}))
    with pytest.raises(ZooError, match="no calibration file"):
        zoo.from_pretrained(checkpoints("llama"), attention=file)


def test_the_options_of_a_user_win_over_those_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "quest.json"
    file.write_text(json.dumps({"method": "quest", "args": {"page": 32}, "layers": [{"budget": 16}, None]}))
    [part] = methods.Choice.parse(file, {"budget": 0.5}).parts
    assert part.options(0) == {"page": 32, "budget": 0.5} and part.options(1) is None
    assert replace(part, own={}).options(0) == {"page": 32, "budget": 16}
