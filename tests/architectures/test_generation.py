"""transformers' `generate` on an all-attention, a hybrid, a windowed and a recurrent model: caching changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from zoo_models import draw, feed, forward, make, same

from zoo.architectures.core.modeling import ZooForCausalLM

LAYOUTS = {
    "attention": ["attention", "attention/from_attention"],
    "linear_first": ["gated_delta_net", "gla", "attention", "hedgehog"],
    "windowed": ["attention/sinks", "attention/window"],
    "mixed_windows": ["mamba2", "attention/sinks", "attention", "gated_delta_net"],
    "shared": ["attention/writes", "cross", "gated_delta_net", "cross"],
    "recurrent": ["gated_delta_net", "mamba2", "hedgehog", "gla"],
}
PROMPT, NEW = 9, 14


@pytest.fixture(params=LAYOUTS, scope="module")
def lm(request: pytest.FixtureRequest) -> ZooForCausalLM:
    return make(LAYOUTS[request.param])


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return draw(2, PROMPT)


@pytest.fixture(scope="module")
def greedy(lm: ZooForCausalLM, ids: Tensor) -> Tensor:
    """Greedy text by whole forwards, without any cache."""
    for _ in range(NEW):
        ids = torch.cat([ids, forward(lm, ids)[:, -1:].argmax(-1)], 1)
    return ids


def generate(model: ZooForCausalLM, ids: Tensor, **options: Any) -> Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, **options)


def test_the_text_is_not_one_token(greedy: Tensor) -> None:
    assert len(set(greedy[:, PROMPT:].flatten().tolist())) > 2


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy(lm: ZooForCausalLM, ids: Tensor, greedy: Tensor, use_cache: bool) -> None:
    assert torch.equal(generate(lm, ids, use_cache=use_cache), greedy)


def test_sampling_is_reproducible_and_the_same_without_cache(lm: ZooForCausalLM, ids: Tensor) -> None:
    texts = []
    for use_cache in (True, True, False):
        torch.manual_seed(7)
        texts.append(generate(lm, ids, do_sample=True, temperature=2.0, top_k=20, use_cache=use_cache))
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
    torch.manual_seed(8)
    assert not torch.equal(texts[0], generate(lm, ids, do_sample=True, temperature=2.0, top_k=20))


def test_beams_equal_beams_without_cache(lm: ZooForCausalLM, ids: Tensor) -> None:
    cached, plain = (generate(lm, ids, num_beams=3, use_cache=flag) for flag in (True, False))
    assert torch.equal(cached, plain)


def test_several_samples_per_prompt(lm: ZooForCausalLM, ids: Tensor, greedy: Tensor) -> None:
    torch.manual_seed(0)
    texts = generate(lm, ids, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(texts, greedy.repeat_interleave(2, 0))


@pytest.mark.parametrize("implementation", [None, "static"])
def test_a_left_padded_batch_equals_single_rows(lm: ZooForCausalLM, ids: Tensor, implementation: str | None) -> None:
    pads, mask = 4, torch.ones_like(ids)
    batch = ids.clone()
    batch[0, :pads], mask[0, :pads] = 0, 0
    found = generate(lm, batch, attention_mask=mask, cache_implementation=implementation)
    assert torch.equal(found[:1, PROMPT:], generate(lm, ids[:1, pads:])[:, PROMPT - pads :])
    assert torch.equal(found[1:, PROMPT:], generate(lm, ids[1:])[:, PROMPT:])


def test_static_cache(lm: ZooForCausalLM, ids: Tensor, greedy: Tensor) -> None:
    assert torch.equal(generate(lm, ids, cache_implementation="static"), greedy)
    cache = StaticCache(config=lm.config, max_cache_len=PROMPT + NEW)
    assert torch.equal(generate(lm, ids, past_key_values=cache), greedy)


def test_chunked_prefill(lm: ZooForCausalLM, ids: Tensor, greedy: Tensor) -> None:
    assert torch.equal(generate(lm, ids, prefill_chunk_size=4), greedy)


@pytest.mark.parametrize("with_config", [True, False])
def test_a_conversation_continues_from_its_cache(
    lm: ZooForCausalLM, ids: Tensor, greedy: Tensor, with_config: bool
) -> None:
    cache = DynamicCache(config=lm.config) if with_config else DynamicCache()
    first = generate(lm, ids, past_key_values=cache, max_new_tokens=5)
    longer = torch.cat([first, draw(2, 4, seed=11)], 1)
    found = generate(lm, longer, past_key_values=cache, max_new_tokens=6)
    assert torch.equal(found, generate(lm, longer, use_cache=False, max_new_tokens=6))


def test_prompt_lookup_equals_greedy(lm: ZooForCausalLM, ids: Tensor) -> None:
    prompt = torch.cat([ids[:1], ids[:1], ids[:1, :4]], 1)  # repeats, so that candidates are found
    expected = generate(lm, prompt, max_new_tokens=40)
    assert torch.equal(generate(lm, prompt, max_new_tokens=40, prompt_lookup_num_tokens=3), expected)


def test_assisted_decoding_equals_greedy(lm: ZooForCausalLM, ids: Tensor) -> None:
    expected = generate(lm, ids[:1], max_new_tokens=30)
    for assistant in (make(LAYOUTS["attention"], seed=3), make(LAYOUTS["recurrent"], seed=4), lm):
        assert torch.equal(generate(lm, ids[:1], max_new_tokens=30, assistant_model=assistant), expected)


def test_contrast_of_a_wrong_cache(lm: ZooForCausalLM, ids: Tensor) -> None:
    """The comparisons above can fail: a cache that has seen other tokens changes the logits."""
    _, wrong = feed(lm, draw(2, PROMPT, seed=5), [PROMPT])
    found, _ = feed(lm, ids, (1,), cache=wrong)
    with pytest.raises(AssertionError):
        same(found, forward(lm, torch.cat([ids, ids[:, :1]], 1))[:, -1:])


def test_a_cache_of_another_model_is_refused(lm: ZooForCausalLM, ids: Tensor) -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    with pytest.raises(ValueError, match="another model"):
        lm(ids, past_key_values=cache)


def test_a_four_dimensional_mask_is_refused(lm: ZooForCausalLM, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="dimensions"):
        lm(ids, attention_mask=torch.ones(2, 1, PROMPT, PROMPT))


@pytest.mark.parametrize("layout", ["mixed_windows", "recurrent"])
def test_decode_compiles_without_a_break(layout: str, ids: Tensor) -> None:
    model = make(LAYOUTS[layout])
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + 6)
    feed(model, ids, [PROMPT], cache=cache)
    step = torch.compile(model, fullgraph=True, backend="eager")
    new, outs = draw(2, 4, seed=6), []
    with torch.no_grad():
        for token in new.split(1, 1):
            outs.append(step(token, past_key_values=cache, use_cache=True).logits)
    same(torch.cat(outs, 1), forward(model, torch.cat([ids, new], 1))[:, PROMPT:])
    torch._dynamo.reset()
