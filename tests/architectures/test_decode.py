"""The cache contract: however a sequence is fed, padded, packed or rolled back, the logits are those of one forward."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from zoo_models import draw, feed, forward, make, parts, same, static_cache

from zoo.architectures.core.decoder import prepare_cache
from zoo.architectures.core.modeling import ZooForCausalLM

T = 13


def test_token_by_token_equals_one_forward(model: ZooForCausalLM) -> None:
    ids = draw(2, T)
    if not all(part.phase_consistent for part in parts(model)):
        return
    same(feed(model, ids, [1] * T)[0], forward(model, ids))


@pytest.mark.parametrize("sizes", [(5, 1, 1, 6), (1, 12)])
def test_prefill_and_chunks_equal_one_forward(model: ZooForCausalLM, sizes: tuple[int, ...]) -> None:
    ids = draw(2, T)
    same(feed(model, ids, sizes)[0], forward(model, ids))


def test_left_padding_changes_nothing(model: ZooForCausalLM) -> None:
    rows, pads = draw(2, T), 5
    batch, mask = rows.clone(), torch.ones_like(rows)
    batch[0, :pads], mask[0, :pads] = 7, 0
    whole = forward(model, batch, attention_mask=mask)
    same(whole[:1, pads:], forward(model, rows[:1, pads:]))
    same(whole[1:], forward(model, rows[1:]))
    cached, cache = feed(model, batch, (8, 1, 1, 3), attention_mask=mask)
    same(cached[:1, pads:], whole[:1, pads:])
    same(cached[1:], whole[1:])


def has_convolutions(cache: DynamicCache) -> bool:
    return any(state.kind == "conv" for layer in cache.layers for state in layer._states.values())


def test_padding_in_a_later_chunk_changes_nothing(model: ZooForCausalLM) -> None:
    rows, pads = draw(2, T), 3
    batch, mask = rows.clone(), torch.ones_like(rows)
    batch[0, 4 : 4 + pads], mask[0, 4 : 4 + pads] = 7, 0
    found, cache = feed(model, batch, (4, 9), attention_mask=mask)
    if has_convolutions(cache):
        return  # a short convolution sees the last tokens of the row, so that padding inside it is not skipped
    alone = torch.cat([rows[:1, :4], rows[:1, 4 + pads :]], 1)
    expected, _ = feed(model, alone, (4, 6))
    same(found[:1, 4 + pads :], expected[:, 4:])


def test_packed_rows_equal_single_rows(model: ZooForCausalLM) -> None:
    lengths = (4, 1, 8)
    ids = draw(1, sum(lengths))
    expected = torch.cat([forward(model, piece) for piece in ids.split(lengths, 1)], 1)
    if not all(part.packed for part in parts(model)):
        return
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    same(forward(model, ids, cu_seqlens=bounds), expected)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    same(forward(model, ids, position_ids=positions), expected)


def test_static_cache_equals_dynamic(model: ZooForCausalLM) -> None:
    rows, pads = draw(2, T), 3
    mask = torch.ones_like(rows)
    mask[0, :pads] = 0
    sizes = (6, 1, 1, 5)
    for inputs in ({}, {"attention_mask": mask}):
        cache = static_cache(model, 20)
        found, _ = feed(model, rows, sizes, cache=cache, **inputs)
        expected, _ = feed(model, rows, sizes, **inputs)
        same(found[:, pads:], expected[:, pads:])


def test_static_cache_is_as_new_after_reset(model: ZooForCausalLM) -> None:
    cache = static_cache(model, 20)
    feed(model, draw(2, T, seed=3), (6, 1, 6), cache=cache)
    cache.reset()
    ids = draw(2, T)
    same(feed(model, ids, (6, 1, 6), cache=cache)[0], forward(model, ids))


def test_a_cache_keeps_its_length(model: ZooForCausalLM) -> None:
    ids = draw(2, T)
    _, cache = feed(model, ids, (5, 1))
    assert cache.get_seq_length() == 6
    static = static_cache(model, 20)
    feed(model, ids, (5, 1), cache=static)
    assert int(static.get_seq_length()) == 6


@pytest.mark.parametrize(
    ("static", "before", "draft", "removed"),
    [
        (False, 5, 4, 3),
        (True, 4, 1, 1),
        pytest.param(False, 0, 6, 2, marks=pytest.mark.slow),
        pytest.param(True, 5, 4, 4, marks=pytest.mark.slow),
    ],
)
def test_rollback_is_never_having_seen_the_tokens(
    model: ZooForCausalLM, static: bool, before: int, draft: int, removed: int
) -> None:
    if not all(part.rollback for part in parts(model)):
        return
    ids, wrong, kept = draw(2, T), draw(2, removed, seed=9), before + draft - removed
    cache = static_cache(model, 24) if static else DynamicCache(config=model.config)
    prepared = prepare_cache(cache, True, model.config.num_hidden_layers)
    if before:
        feed(model, ids, [before], cache=prepared)
    prepared.activate_past_recording()
    feed(model, torch.cat([ids[:, before:kept], wrong], 1), [draft], cache=prepared)
    prepared.crop(-removed)
    assert int(prepared.get_seq_length()) == kept
    found, _ = feed(model, ids[:, kept:], (1, T - kept - 1), cache=prepared)
    same(found, forward(model, ids)[:, kept:])


def test_beams_reorder_repeat_and_select(model: ZooForCausalLM) -> None:
    ids, new = draw(3, 6), draw(6, 2, seed=4)
    order = torch.tensor([2, 0, 0])
    _, cache = feed(model, ids, (5, 1))
    cache.reorder_cache(order)
    same(feed(model, new[:3], (1, 1), cache=cache)[0], forward(model, torch.cat([ids[order], new[:3]], 1))[:, 6:])
    _, cache = feed(model, ids, (5, 1))
    cache.batch_repeat_interleave(2)
    repeated = ids.repeat_interleave(2, 0)
    same(feed(model, new, (1, 1), cache=cache)[0], forward(model, torch.cat([repeated, new], 1))[:, 6:])
    _, cache = feed(model, ids, (5, 1))
    keep = torch.tensor([1, 2])
    cache.batch_select_indices(keep)
    same(feed(model, new[:2], (1, 1), cache=cache)[0], forward(model, torch.cat([ids[keep], new[:2]], 1))[:, 6:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_are_the_bytes_of_the_cache(case: str, dtype: torch.dtype) -> None:
    model = make(case).to(dtype)
    for length in (3, T):
        _, cache = feed(model, draw(2, length), (length - 1, 1))
        held = sum(sum(layer.bytes().values()) for layer in cache.layers)
        assert held == 2 * model.state_bytes(length), f"{length} tokens"
