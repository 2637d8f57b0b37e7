"""What a method notes of cached keys, and models under it: copies, compiled, trained."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from sparse_models import QUEST, dense, generate, ids, padded, same, stepwise
from torch import Tensor
from transformers import DynamicCache, StaticCache

import zoo
from zoo.architectures.core import foreign
from zoo.architectures.core.sparse import Method, View


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
