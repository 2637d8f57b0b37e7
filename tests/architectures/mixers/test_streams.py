"""Streaming attention: sinks and a window, by heads too, against the papers' caches token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding_models import (
    PROMPT,
    ROUNDED,
    T,
    attended,
    build,
    cached,
    context,
    decoded,
    inputs,
    projected,
)
from torch import Tensor
from zoo_models import ROPES, draw, feed, make, same

from zoo import registry
from zoo.architectures.core.mixer import Mixer
from zoo.architectures.core.rope import RotaryTable, apply_rope
from zoo.architectures.core.sparse import View
from zoo.errors import ZooError


def streamed(module: Mixer, x: Tensor, sinks: int, window: int, reindex: bool) -> Tensor:
    """The cache of the paper, token by token: what is kept, at its place in the cache."""
    table, kept, rows = RotaryTable(ROPES["default"], 2048), [], []
    with torch.no_grad():
        q, k = (module.get_submodule(f"{n}_proj")(x).unflatten(-1, (-1, 16)) for n in "qk")
        v = module.get_submodule("v_proj")(x).unflatten(-1, (-1, 16))
    turn = lambda y, at: apply_rope(y[None], table(torch.tensor([at])), "half")[0]  # noqa: E731
    for t in range(len(x)):
        kept = [j for j in [*kept, t] if j < sinks or j > t - window]
        places = list(range(len(kept))) if reindex else kept
        at = torch.cat([turn(k[j][None], [p]) for j, p in zip(kept, places, strict=True)])
        query = turn(q[t][None], [places[-1]])[0]
        rows.append(attended(query, at, v[kept], [set(range(len(kept)))] * 4))
    with torch.no_grad():
        return module.get_submodule("o_proj")(torch.stack(rows).flatten(1))


@pytest.mark.parametrize(("sinks", "budget", "reindex"), [(4, 20, True), (2, 3, True), (0, 7, True), (3, 12, False)])
def test_streaming_is_a_cache_of_sinks_and_a_window(sinks: int, budget: int, reindex: bool) -> None:
    module = build("streaming_llm", sinks=sinks, budget=budget, reindex=reindex)
    x = inputs()
    expected = torch.stack([streamed(module, row, sinks, budget - sinks, reindex) for row in x])
    for sizes in ([T], [PROMPT, *[1] * (T - PROMPT)], [3, 30, 1, 1, T - 35]):
        same(cached(module, x, sizes), expected, ROUNDED)
    ctx = context(torch.arange(T).repeat(2, 1))
    same(module(x, ctx), expected, ROUNDED)  # type: ignore[arg-type]
    found = cached(module, x, [30, *[1] * (T - 30)], static=True, pads=6)
    same(found[0, 6:], streamed(module, x[0, 6:], sinks, budget - sinks, reindex), ROUNDED)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("pads", [0, 6])
def test_a_streaming_method_gives_what_the_mixer_gives(turned: bool, pads: int) -> None:
    """From the rotated queries and keys of all tokens, as another model would hold them."""
    module, x = build("streaming_llm", sinks=3, budget=11, reindex=turned), inputs(1)
    q, k, v = projected(module, x[0, pads:])
    expected = streamed(module, x[0, pads:], 3, 8, turned)
    filler = torch.full((pads, *k.shape[1:]), 9.0).double()
    starts = torch.tensor([pads]) if pads else None
    k, v = (torch.cat([filler, y])[None] for y in (k, v))
    q = torch.cat([torch.zeros(pads, *q.shape[1:]).double(), q])[None]
    rule: Any = module.rule
    o_proj = module.get_submodule("o_proj")
    same(o_proj(rule(View(q, k, v, starts=starts)).flatten(-2))[0, pads:], expected, ROUNDED)
    for t in (pads, pads + 2, 40, T - 1):
        view = View(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], decoding=True, starts=starts)
        same(o_proj(rule(view).flatten(-2))[0], expected[t - pads : t - pads + 1], ROUNDED)


# ---- retrieval and streaming heads ----------------------------------------------------------------------------------
@pytest.mark.parametrize("alphas", [(0.0, 0.9), (0.9, 0.2), (0.1, 0.3), (1.0, 0.8)])
def test_streaming_heads_see_sinks_and_a_window(alphas: tuple[float, ...]) -> None:
    module, x = build("duo_attention", alphas=alphas, sinks=2, budget=9), inputs()

    def sets(q: Tensor, k: Tensor, args: Any, t: int) -> list[set[int]]:
        near = {j for j in range(t + 1) if j < 2 or j > t - 7}
        return [set(range(t + 1)) if alphas[h // 2] > 0.5 else near for h in range(4)]

    expected = torch.stack([decoded(module, row, sets, 0) for row in x])
    same(cached(module, x, [PROMPT, *[1] * (T - PROMPT)]), expected, 1e-10)
    q, k, v = (y[None] for y in projected(module, x[0]))
    rule: Any = module.rule
    o_proj = module.get_submodule("o_proj")
    same(o_proj(rule(View(q, k, v)).flatten(-2)), expected[:1], 1e-10)
    last = rule(View(q[:, -1:], k, v, decoding=True))
    same(o_proj(last.flatten(-2)), expected[:1, -1:], 1e-10)
    padded = cached(module, x, [20, *[1] * (T - 20)], static=True, pads=6)
    same(padded[0, 6:], decoded(module, x[0, 6:], sets, 0), 1e-10)


@pytest.mark.parametrize("name", ["duo_attention/none_full", "streaming_llm/small"])
def test_a_bounded_cache_does_not_grow(name: str) -> None:
    model = make([name, name])
    sizes = set()
    for length in (20, 60):
        _, cache = feed(model, draw(1, length), [length - 2, 1, 1])
        sizes.add(sum(sum(layer.bytes().values()) for layer in cache.layers))
        assert sizes == {model.state_bytes(length)}


def test_estimated_gates_are_errors_without_far_tokens() -> None:
    module, x = build("duo_attention", sinks=1, budget=5), inputs(1)
    q, k, v = projected(module, x[0])
    found = registry.get("mixers", "duo_attention", "calibrate")(View(q[None], k[None], v[None]), module.args)
    full = [attended(q[t], k[: t + 1], v[: t + 1], [set(range(t + 1))] * 4) for t in range(T)]
    few = [attended(q[t], k[: t + 1], v[: t + 1], [{0, *range(max(0, t - 3), t + 1)}] * 4) for t in range(T)]
    wrong, size = torch.stack(full) - torch.stack(few), torch.stack(full)
    for g in range(2):
        heads = slice(2 * g, 2 * g + 2)
        expected = float((wrong[:, heads].norm() / size[:, heads].norm()).clamp(max=1.0))
        assert found["alphas"][g] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("streaming_llm", dict(budget=0.5), "a number of tokens"),
        ("streaming_llm", dict(budget=4), "sinks was 4 of a budget of 4"),
        ("streaming_llm", dict(qk_norm="rms", qk_norm_after_rope=True), "reindex must be false"),
        ("duo_attention", dict(alphas=(0.5,)), "for each of 2 KV heads"),
        ("duo_attention", dict(alphas=(0.5, 1.5)), "a number of 0 to 1"),
    ],
)
def test_bad_options_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        build(name, **args)
