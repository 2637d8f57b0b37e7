"""Trained routing however a text longer than a block is fed: chunks, padding, static caches, packed rows; and wrong
options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from naive import in_pieces, inputs, make_mixer
from zoo_models import draw, feed, forward, make, same, static_cache

from zoo.architectures.mixers.landmark import with_landmarks
from zoo.errors import ZooError

SIZES: dict[str, Any] = dict(heads=4, kv_heads=2, head_dim=16, rope="default")
T = 70


def test_all_blocks_are_all_keys() -> None:
    x, ctx = inputs(T, 1)
    for name, args in (
        ("moba", dict(block=16, budget=T)),
        ("infllm_v2", dict(block=16, kernel=8, stride=4, window=16, dense_len=0, budget=T + 10)),
        ("seer_attention", dict(block=16, gate_dim=8, budget=T, trained=True)),
    ):
        few, whole = (make_mixer(name, **SIZES, **args | extra) for extra in ({}, {"budget": 1.0}))
        for size in ((T,), (50, *[1] * 20)):
            same(in_pieces(few, x, ctx, size), in_pieces(whole, x, ctx, (T,)), 1e-10)


CONSISTENT = ("moba/small", "nsa/odd", "infllm_v2/small", "landmark/small", "cca/wide", "nsa", "cca")


@pytest.mark.parametrize("name", CONSISTENT)
def test_however_a_long_text_is_fed(name: str) -> None:
    """Chunks, single tokens, static caches, left padding and packed rows, over several blocks and windows."""
    model, ids = make([name]).double(), draw(2, T)
    whole, sizes, pads = forward(model, ids), (21, 1, 1, 30, *[1] * 17), 7
    found, cache = feed(model, ids, sizes)
    same(found, whole, 1e-10)
    assert sum(cache.layers[0].bytes().values()) == 2 * model.state_bytes(T, 8)
    same(feed(model, ids, sizes, cache=static_cache(model, T + 9))[0], whole, 1e-10)
    batch, mask = torch.cat([torch.full((2, pads), 5), ids], 1), torch.ones(2, T + pads, dtype=torch.long)
    batch[1, :T], mask[0, :pads], mask[1, T:] = ids[1], 0, 0  # the second row is padded behind
    for inputs_ in ({}, {"cache": static_cache(model, T + 20)}):
        padded, _ = feed(model, batch, (pads + 16, 1, 1, T - 18), attention_mask=mask, **inputs_)
        same(padded[:1, pads:], whole[:1], 1e-10)
        same(padded[1:, :T], whole[1:], 1e-10)
    same(forward(model, batch, attention_mask=mask)[:1, pads:], whole[:1], 1e-10)
    bounds = torch.tensor([0, T, T, 2 * T], dtype=torch.int32)
    packed = forward(model, ids.view(1, -1), cu_seqlens=bounds)
    same(packed.view(whole.shape), whole, 1e-10)


@pytest.mark.parametrize("name", ["seer_attention/small", "seer_attention/threshold"])
def test_padding_does_not_move_the_blocks_of_gates(name: str) -> None:
    model, ids, pads = make([name]).double(), draw(1, T), 7
    whole, cache = feed(model, ids, (33, 20, *[1] * 17))
    assert sum(cache.layers[0].bytes().values()) == model.state_bytes(T, 8)
    batch, mask = F.pad(ids, (pads, 0), value=5), F.pad(torch.ones_like(ids), (pads, 0))
    for inputs_ in ({}, {"cache": static_cache(model, T + 20)}):
        padded, _ = feed(model, batch, (33 + pads, 20, *[1] * 17), attention_mask=mask, **inputs_)
        same(padded[:, pads:], whole, 1e-10)
    packed = forward(model, torch.cat([ids, ids], 1), cu_seqlens=torch.tensor([0, T, 2 * T], dtype=torch.int32))
    same(packed[:, T:], forward(model, ids), 1e-10)


def test_untrained_gates_are_refused() -> None:
    mixer, (x, ctx) = make_mixer("seer_attention", **SIZES, gate_dim=8, block=16, budget=32), inputs(T, 1)
    with pytest.raises(ValueError, match="train_gates"):
        mixer(x, ctx)


@pytest.mark.parametrize(
    ("name", "args", "match"),
    [
        ("moba", dict(block=200), "block was 200"),
        ("moba", dict(budget=0), "budget was 0"),
        ("nsa", dict(stride=5), "stride was 5"),
        ("nsa", dict(init=-1), "init was -1"),
        ("infllm_v2", dict(stride=12), "stride was 12"),
        ("infllm_v2", dict(dense_len=-1), "dense_len was -1"),
        ("seer_attention", dict(k_pools=("mean", "median")), "k_pools"),
        ("seer_attention", dict(threshold=1.5), "threshold was 1.5"),
        ("landmark", dict(block=0), "block was 0"),
        ("landmark", dict(softcap=5.0), "softcap was 5"),
        ("cca", dict(group=0), "group was 0"),
        ("cca", dict(qk_norm="rms", qk_norm_full=True), "qk_norm_full"),
    ],
)
def test_wrong_options_are_named(name: str, args: dict[str, Any], match: str) -> None:
    with pytest.raises(ZooError, match=match):
        make([name]).model.layers[0].mixer.parse({**SIZES, **args}).check(make([name]).model.decoder_config)


def test_landmarks_stand_behind_every_block() -> None:
    ids = torch.arange(1, 9)[None]
    assert with_landmarks(ids, 0, 3).tolist() == [[1, 2, 3, 0, 4, 5, 6, 0, 7, 8]]
    assert with_landmarks(ids[:, :2], 0, 3).tolist() == [[1, 2]]
