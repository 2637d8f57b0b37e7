"""Trained routing against the published definitions, written out one query and head at a time in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from naive import in_pieces, inputs, linear, make_mixer, rms
from torch import Tensor
from zoo_models import same

from zoo.architectures.core.routing import block_weights, window_weights

SIZES: dict[str, Any] = dict(heads=4, kv_heads=2, head_dim=16, rope="default")
T, SCALE, GROUP = 70, 16**-0.5, 2
Sets = dict[tuple[int, int, int], list[int]]  # of row, query and head the keys that are seen


def rotated(x: Tensor, positions: Tensor | None = None) -> Tensor:
    """RoPE of `[..., T, heads, 16]` at 0, 1, 2, ... or at `positions [T]`."""
    positions = torch.arange(x.shape[-3]) if positions is None else positions
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 10000.0 ** (-torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def heads(x: Tensor, projection: Any) -> Tensor:
    return linear(x, projection).unflatten(-1, (-1, 16))


def softmax(scores: list[Tensor]) -> Tensor:
    weights = torch.stack(scores).exp()
    return weights / weights.sum()


def attended(q: Tensor, k: Tensor, v: Tensor, seen: Sets) -> Tensor:
    """`[B, T, H, V]`; a query that sees nothing gets 0."""
    k, v = (x.repeat_interleave(GROUP, 2) for x in (k, v))
    mask = torch.zeros(*q.shape[:3], k.shape[1], dtype=torch.bool)
    for place, keys in seen.items():
        mask[place][keys] = True
    scores = SCALE * torch.einsum("bihk,bjhk->bihj", q, k).masked_fill(~mask, -torch.inf)
    weights = scores.exp()
    return torch.einsum("bihj,bjhv->bihv", weights / weights.sum(-1, keepdim=True).clamp(min=1e-300), v)


def dots(q: Tensor, k: Tensor) -> list[Any]:
    """Scores `[T][H][N]` of queries `[T, H, K]` and keys `[N, G, K]`, as numbers."""
    k = k.repeat_interleave(GROUP, 1)
    found: list[Any] = (SCALE * torch.einsum("ihk,nhk->ihn", q, k)).detach().tolist()
    return found


def shares_of(scores: list[float]) -> list[float]:
    weights = [math.exp(x) for x in scores]
    return [w / sum(weights) for w in weights]


def tokens(blocks: set[int], size: int, i: int) -> list[int]:
    return [j for j in range(i + 1) if j // size in blocks]


def best(values: dict[int, float], count: int) -> set[int]:
    return set(sorted(values, key=lambda b: -values[b])[: max(0, count)])


def everything(*shape: int) -> list[tuple[int, ...]]:
    return [tuple(x) for x in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist()]


def gradients(y: Tensor, x: Tensor, mixer: Any) -> list[Tensor]:
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(4))
    return list(torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()]))


def compare(mixer: Any, x: Tensor, ctx: Any, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Values, and the gradients of the input and of every parameter."""
    found = mixer(x, ctx)
    same(found, expected, tolerance)
    for mine, theirs in zip(gradients(found, x, mixer), gradients(expected, x, mixer), strict=True):
        same(mine, theirs, 10 * tolerance)


def test_moba_is_its_definition() -> None:
    mixer, (x, ctx) = make_mixer("moba", **SIZES, block=16, budget=48), inputs(T, 1)
    x.requires_grad_(True)
    q, k = rotated(heads(x, mixer.q_proj)), rotated(heads(x, mixer.k_proj))
    seen, scores = {}, dots(q[0], torch.stack([k[0, c : c + 16].mean(0) for c in range(0, T - 15, 16)]))
    for b, i, h in everything(1, T, 4):
        past = {c: scores[i][h][c] for c in range(i // 16)}
        seen[b, i, h] = tokens(best(past, 2) | {i // 16}, 16, i)
    assert any(len(keys) < i + 1 for (_, i, _), keys in seen.items())
    expected = linear(attended(q, k, heads(x, mixer.v_proj), seen).flatten(2), mixer.o_proj)
    compare(mixer, x, ctx, expected)


def compressed(x: Tensor, module: Any, size: int, stride: int) -> Tensor:
    """`[B, N, G, K]` of every whole window of `x [B, T, G, K]`."""
    made = []
    for start in range(0, x.shape[1] - size + 1, stride):
        marked = torch.stack([x[:, start + c] + module.places[c] for c in range(size)], 2)  # [B, G, C, K]
        made.append(linear(F.gelu(linear(marked.flatten(2), module.up)), module.down))
    return torch.stack(made, 1)


def nsa_choice(scores: list[Any], size: int, stride: int, block: int, i: int, g: int) -> dict[int, float]:
    """The paper's importance of blocks for one query and KV head, its sums as printed, with blocks counted from 1."""
    shares: dict[int, float] = {}
    for h in range(g * GROUP, g * GROUP + GROUP):
        whole = [m for m in range(len(scores[i][h])) if m * stride + size - 1 <= i]
        for m, p in zip(whole, shares_of([scores[i][h][m] for m in whole]), strict=True):
            shares[m + 1] = shares.get(m + 1, 0.0) + p
    found = {}
    for j in range(1, i // block + 2):
        terms = [(block // stride) * j - m - n for m in range(block // stride) for n in range(size // stride)]
        found[j - 1] = sum(shares.get(term, 0.0) for term in terms)
    return found


@pytest.mark.parametrize("norm", [None, "rms"])
def test_nsa_is_its_definition(norm: str | None) -> None:
    size, stride, block, window = 8, 4, 16, 10
    sizes = dict(size=size, stride=stride, block=block, window=window, budget=64)
    mixer, (x, ctx) = make_mixer("nsa", **SIZES, **sizes, qk_norm=norm, hidden=12), inputs(T, 1)
    x.requires_grad_(True)
    normed = lambda y, which: y if norm is None else rms(y, getattr(mixer, which).weight, 1e-6)  # noqa: E731
    q, k = (rotated(normed(heads(x, getattr(mixer, f"{n}_proj")), f"{n}_norm")) for n in "qk")
    far_k = normed(compressed(heads(x, mixer.compressed_k_proj), mixer.k_compress, size, stride), "k_norm")
    far_k = rotated(far_k, torch.arange(far_k.shape[1]) * stride)
    far_v = compressed(heads(x, mixer.compressed_v_proj), mixer.v_compress, size, stride)
    ends = [m * stride + size - 1 for m in range(far_k.shape[1])]
    far: Sets = {(b, i, h): [m for m, end in enumerate(ends) if end <= i] for b, i, h in everything(1, T, 4)}
    chosen: Sets = {}
    scores = dots(q[0], far_k[0])
    for b, i, g in everything(1, T, 2):
        importance = nsa_choice(scores, size, stride, block, i, g)
        own = i // block
        forced = {0, own, max(0, own - 1)}
        others = {c: s for c, s in importance.items() if c not in forced}
        keys = tokens(forced | best(others, 4 - len(forced)), block, i)
        chosen |= {(b, i, h): keys for h in (2 * g, 2 * g + 1)}
    assert any(len(keys) < i + 1 for (_, i, _), keys in chosen.items())
    near: Sets = {(b, i, h): list(range(max(0, i - window + 1), i + 1)) for b, i, h in everything(1, T, 4)}
    near_k = rotated(normed(heads(x, mixer.window_k_proj), "k_norm"))
    branches = [
        attended(q, far_k, far_v, far),
        attended(q, k, heads(x, mixer.v_proj), chosen),
        attended(q, near_k, heads(x, mixer.window_v_proj), near),
    ]
    gates = torch.sigmoid(linear(x, mixer.gate_proj)).unflatten(-1, (4, 3))
    o = sum(gates[..., n, None] * branch for n, branch in enumerate(branches))
    compare(mixer, x, ctx, linear(o.flatten(2), mixer.o_proj), 1e-6)  # rotary tables are fp32


def test_weights_of_windows_and_blocks() -> None:
    size, stride, block, blocks = 6, 2, 4, 6
    q, k = (torch.randn(1, 21, n, 16, generator=torch.Generator().manual_seed(n)).double() for n in (4, 2))
    k, at = k[:, :8], torch.arange(21)[None]  # windows end at 5, 7, ...
    found, scores = window_weights(q, k, at, size, stride, SCALE), dots(q[0], k[0])
    overlaps = {
        (m, c): len({m * stride + n for n in range(size)} & set(range(c * block, (c + 1) * block))) // stride
        for m, c in everything(8, blocks)
    }
    by_sum, by_max = (block_weights(found, size, stride, block, blocks, by) for by in ("sum", "max"))
    for i, g in everything(21, 2):
        whole = [m for m in range(8) if m * stride + size - 1 <= i]
        both = [shares_of([scores[i][h][m] for m in whole]) for h in (2 * g, 2 * g + 1)]
        shares = [sum(pair) for pair in zip(*both, strict=True)]
        assert found[0, g, i].tolist() == pytest.approx(shares + [0.0] * (8 - len(whole)), abs=1e-12)
        for c in range(blocks):
            parts = [(overlaps[m, c], p) for m, p in zip(whole, shares, strict=True) if overlaps[m, c]]
            assert by_sum[0, g, i, c].item() == pytest.approx(sum(n * p for n, p in parts), abs=1e-12)
            assert by_max[0, g, i, c].item() == pytest.approx(max([p for _, p in parts], default=0.0), abs=1e-12)


@pytest.mark.parametrize("dense_len", [0, 50])
def test_infllm_v2_is_its_definition(dense_len: int) -> None:
    kernel, stride, block = 8, 4, 16
    args = dict(block=block, kernel=kernel, stride=stride, init=1, window=16, dense_len=dense_len, budget=48)
    mixer, (x, ctx) = make_mixer("infllm_v2", **SIZES, **args), inputs(T, 1)
    x.requires_grad_(True)
    q, k = rotated(heads(x, mixer.q_proj)), rotated(heads(x, mixer.k_proj))
    means = torch.stack([k[0, s : s + kernel].mean(0) for s in range(0, T - kernel + 1, stride)])
    seen, products = {}, dots(q[0], means)
    for b, i, g in everything(1, T, 2):
        starts = range(0, i - kernel + 2, stride)
        by_head = [shares_of(products[i][h][: len(starts)]) for h in (2 * g, 2 * g + 1)]
        shares = [sum(both) for both in zip(*by_head, strict=True)]
        scores = {}
        for c in range(1, i // block):
            over = [p for s, p in zip(starts, shares, strict=True) if s < (c + 1) * block and s + kernel > c * block]
            scores[c] = max(over)
        blocks = {0, i // block} | best(scores, 1 if i >= block else 2)
        whole = i < dense_len
        for h in (2 * g, 2 * g + 1):
            seen[b, i, h] = list(range(i + 1)) if whole else tokens(blocks, block, i)
    assert any(len(keys) < i + 1 for (_, i, _), keys in seen.items())
    expected = linear(attended(q, k, heads(x, mixer.v_proj), seen).flatten(2), mixer.o_proj)
    compare(mixer, x, ctx, expected)


def pooled(x: Tensor, kinds: tuple[str, ...]) -> Tensor:
    """`[M, K]` to `[F]`."""
    return torch.cat([{"mean": x.mean(0), "max": x.max(0).values, "min": x.min(0).values}[kind] for kind in kinds])


def gate_scores(mixer: Any, phase: str, x: Tensor, at: int, own: int, head: int) -> Tensor:
    """Softmax over the past blocks for the queries from `at` on, of `x [T, D]`."""
    gate, block = mixer.gates[phase], mixer.args.block
    q, k = heads(x, mixer.q_proj), heads(x, mixer.k_proj)
    if phase == "prefill":
        query, group = pooled(q[at : at + block, head], mixer.args.q_pools), head // GROUP
    else:
        query, group = q[at, 2 * head : 2 * head + 2].flatten(), head
    turned = lambda y, p: rotated(y[None, None], torch.tensor([p]))[0, 0]  # noqa: E731
    query, scores = turned(query @ gate.q_weight[head], at), []
    for c in range(own):
        key = pooled(k[c * block : (c + 1) * block, group], mixer.args.k_pools) @ gate.k_weight[group]
        scores.append(query @ turned(key, c * block) * mixer.args.gate_dim**-0.5)
    return softmax(scores) if scores else torch.zeros(0).double()


@pytest.mark.parametrize("rule", [dict(budget=32), dict(threshold=0.3)])
def test_seer_attention_is_its_definition(rule: dict[str, Any]) -> None:
    """A prompt by the prefill gate, then tokens by the decode gate."""
    prompt, block = 57, 16
    args = dict(block=block, gate_dim=16, q_pools=("mean", "max"), trained=True)
    mixer, (x, ctx) = make_mixer("seer_attention", **SIZES, **args, **rule), inputs(T, 1)
    q, k, v = rotated(heads(x, mixer.q_proj)), rotated(heads(x, mixer.k_proj)), heads(x, mixer.v_proj)
    seen = {}
    with torch.no_grad():
        for i, h in everything(T, 4):
            own, decode = i // block, i >= prompt
            scores = gate_scores(mixer, "decode" if decode else "prefill", x[0, : T if decode else prompt],
                                 i if decode else own * block, own, h // GROUP if decode else h)  # fmt: skip
            values = dict(enumerate(scores.tolist()))
            past = {c for c, p in values.items() if p >= 0.3} if "threshold" in rule else best(values, 1)
            seen[0, i, h] = tokens(past | {own}, block, i)
        assert any(len(keys) < i + 1 for (_, i, _), keys in seen.items())
        expected = linear(attended(q, k, v, seen).flatten(2), mixer.o_proj)
        same(in_pieces(mixer, x, ctx, (prompt, *[1] * (T - prompt))), expected, 1e-6)  # rotary tables are fp32


def landmark_weights(scores: Tensor, i: int, size: int, read: int) -> Tensor:
    """The paper's weights of all keys for one query, from its scores `[T]`: a softmax inside each group of keys, the
    landmarks of past blocks standing in the group of the query's own block; then the products."""
    own, weights = i // size, torch.zeros_like(scores)
    marks = {c: c * size + size - 1 for c in range(own)}
    kept = best({c: scores[m].item() for c, m in marks.items()}, read - 1)
    top = [*(marks[c] for c in kept), *(j for j in range(own * size, i + 1) if j % size != size - 1)]
    for j, w in zip(top, softmax([scores[j] for j in top]), strict=True):
        if j // size == own:
            weights[j] = w
            continue
        inside = list(range(j - size + 1, j))
        weights[inside] = w * softmax([scores[n] for n in inside])
    return weights


@pytest.mark.parametrize("budget", [1.0, 15])
def test_landmark_is_its_definition(budget: float | int) -> None:
    mixer, (x, ctx) = make_mixer("landmark", **SIZES, block=4, budget=budget), inputs(31, 1)
    x.requires_grad_(True)
    q, k, v = rotated(heads(x, mixer.q_proj)), rotated(heads(x, mixer.k_proj)), heads(x, mixer.v_proj)
    rows = []
    for i, h in everything(31, 4):
        weights = landmark_weights(SCALE * k[0, :, h // GROUP] @ q[0, i, h], i, 5, 99 if budget == 1.0 else 3)
        assert weights.sum().item() == pytest.approx(1)
        rows.append(weights @ v[0, :, h // GROUP])
    expected = linear(torch.stack(rows).view(1, 31, -1), mixer.o_proj)
    compare(mixer, x, ctx, expected)
    same(in_pieces(mixer, x, ctx, (9, *[1] * 22)), expected.detach(), 1e-10)


@pytest.mark.parametrize(("group", "window"), [(3, 4), (4, 1), (1, 2), (5, 9)])
def test_cca_is_its_definition(group: int, window: int) -> None:
    mixer, (x, ctx) = make_mixer("cca", **SIZES, group=group, window=window), inputs(29, 1)
    x.requires_grad_(True)
    q, k, v = heads(x, mixer.q_proj), heads(x, mixer.k_proj), heads(x, mixer.v_proj)
    cores = {}
    for m, h in everything(29 // group, 4):
        part, g = list(range(m * group, (m + 1) * group)), h // GROUP
        share = softmax([SCALE * q[0, part[-1], h] @ k[0, j, g] for j in part])
        key = rotated((share @ k[0, part, g])[None, None], torch.tensor([part[-1]]))[0, 0]
        cores[m, h] = key, share @ v[0, part, g]
    q, k, rows = rotated(q), rotated(k), []
    for i, h in everything(29, 4):
        whole = max(0, (i + 1 - window) // group)
        near = list(range(whole * group, i + 1))
        assert min(i + 1, window) <= len(near) < window + group
        keys, values = (torch.stack([cores[m, h][n] for m in range(whole)] + list(x[0, near, h // GROUP]))
                        for n, x in enumerate((k, v)))  # fmt: skip
        rows.append((SCALE * keys @ q[0, i, h]).softmax(0) @ values)
    compare(mixer, x, ctx, linear(torch.stack(rows).view(1, 29, -1), mixer.o_proj), 1e-6)  # rotary tables are fp32
