"""Attention: every mask against a naive masked softmax written here, torch's own attention, packing, blind rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.kernels import dispatch
from zoo.kernels.attention import PADDING, attention
from zoo.kernels.attention.mask import Mask

BACKENDS = [name for name in dispatch.backends("attention") if name != "triton"]
MASKS = [
    {},
    {"causal": False},
    {"window": 1},
    {"window": 7},
    {"window": 7, "causal": False},
    {"window": 5, "sink_tokens": 3},
    {"window": 40, "sink_tokens": 70},
    {"chunk": 8},
    {"chunk": 8, "sink_tokens": 2},
    {"stride": 5},
    {"window": 3, "stride": 5},
    {"window": 3, "dilation": 4},
    {"chunk": 9, "dilation": 3},
]


def inputs(tq, tk=None, *, b=2, dtype=torch.float64, sink=False):
    tk = tk or tq
    made = {
        "q": torch.randn(b, tq, 4, 6, dtype=dtype),
        "k": torch.randn(b, tk, 2, 6, dtype=dtype),
        "v": torch.randn(b, tk, 2, 5, dtype=dtype),
    }
    return made | ({"sink_logits": torch.randn(4, dtype=dtype)} if sink else {})


def sees(i, j, *, causal=True, window=None, sink_tokens=0, chunk=None, stride=None, dilation=None):
    """Whether a query at position i sees a key at position j, rule by rule."""
    if j >= PADDING or (causal and j > i):
        return False
    restricted = [x for x in (window, chunk, stride, dilation) if x is not None]
    local = window is not None or chunk is not None or dilation is not None
    local = local and (window is None or abs(i - j) < window * (dilation or 1))
    local = local and (chunk is None or i // chunk == j // chunk)
    local = local and (dilation is None or (i - j) % dilation == 0)
    strided = stride is not None and (i - j) % stride == 0
    return not restricted or local or strided or j < sink_tokens


def naive(q, k, v, sink_logits=None, *, softcap=None, q_positions=None, k_positions=None, **mask):
    (b, tq), tk = q.shape[:2], k.shape[1]
    pq = torch.arange(tk - tq, tk) if q_positions is None else q_positions
    pk = torch.arange(tk) if k_positions is None else k_positions
    pq, pk = pq.expand(b, -1).tolist(), pk.expand(b, -1).tolist()
    seen = torch.tensor([[[sees(i, j, **mask) for j in pk[n]] for i in pq[n]] for n in range(b)])[:, None]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / q.shape[-1] ** 0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = torch.where(seen, scores.exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    if sink_logits is not None:
        total = torch.where(total > 0, total + sink_logits[:, None, None].exp(), total)
    blind = total == 0
    o = torch.einsum("bhij,bjhv->bihv", weights / torch.where(blind, 1.0, total), v)
    lse = torch.where(blind, 1.0, total).log().masked_fill(blind, -torch.inf)
    return o, lse.squeeze(-1).transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (1, 9), (5, 12), (12, 5), (33, 33), (200, 200)])
def test_masks_equal_naive_softmax(backend, mask, tq, tk, evaluate, assert_close):
    if backend == "reference" and tq > 33:
        tq = tk = 40
    tensors = inputs(tq, tk, b=1)
    expected = evaluate(lambda **x: naive(**x, **mask)[0], tensors)
    assert_close(evaluate(attention, tensors, backend=backend, **mask), expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"window": 4, "sink_tokens": 1}, {"causal": False}], ids=str)
@pytest.mark.parametrize("sink", [False, True])
def test_lse_softcap_and_sink_logits(backend, options, sink, evaluate, assert_close):
    tensors = inputs(9, 14, sink=sink)
    expected = evaluate(lambda **x: naive(**x, **options), tensors)
    assert_close(evaluate(attention, tensors, return_lse=True, backend=backend, **options), expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"chunk": 4, "sink_tokens": 1}, {"causal": False}], ids=str)
@pytest.mark.parametrize("return_lse", [False, True])
def test_positions_and_padding(backend, options, return_lse, evaluate, assert_close):
    """Left padding of 0 and 4: padded keys are never seen, and a padded query sees nothing in causal attention."""
    positions = torch.arange(11) - torch.tensor([[0], [4]])
    at = {"q_positions": positions[:, -8:], "k_positions": torch.where(positions < 0, PADDING, positions)}
    tensors = inputs(8, 11)
    last = slice(None) if return_lse else slice(1)
    expected = evaluate(lambda **x: naive(**x, **options, **at)[last], tensors)
    found = evaluate(attention, tensors, backend=backend, return_lse=return_lse, **options, **at)
    assert_close(found, expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blind_rows_are_zero_with_zero_gradient(backend, return_lse, dtype, evaluate):
    tensors = inputs(4, sink=return_lse, dtype=dtype)
    at = {"q_positions": torch.tensor([-1, -1, 2, 3])}
    found = evaluate(attention, tensors, backend=backend, return_lse=return_lse, **at)
    assert not found["output 0"][:, :2].any() and not found["q"][:, :2].any()
    assert all(x.isfinite().all() for name, x in found.items() if name != "output 1")
    if return_lse:
        assert (found["output 1"][:, :2] == -torch.inf).all() and found["output 1"][:, 2:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"window": 3, "sink_tokens": 1}, {"return_lse": True}], ids=str)
def test_packed_equals_separate(backend, options, assert_close):
    ends = [0, 0, 1, 12, 12, 20]
    tensors = inputs(20, b=1)
    whole = attention(**tensors, **options, cu_seqlens=torch.tensor(ends, dtype=torch.int32), backend=backend)
    parts = [
        attention(**{name: x[:, a:b] for name, x in tensors.items()}, **options)
        for a, b in zip(ends, ends[1:], strict=False)
        if a < b
    ]
    if "return_lse" in options:
        o, lse = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        assert_close({"o": whole[0], "lse": whole[1]}, {"o": o, "lse": lse}, 1e-12)
    else:
        assert_close({"o": whole}, {"o": torch.cat(parts, 1)}, 1e-12)


@pytest.mark.parametrize("length", [1, 63, 130])
def test_equals_torch(length):
    q, k, v = (torch.randn(2, length, 3, 8) for _ in range(3))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(attention(q, k, v), expected.transpose(1, 2))


def test_lse_merges_two_halves_of_the_keys():
    tensors = inputs(10)
    o, lse = attention(**tensors, return_lse=True, causal=False)
    halves = []
    for part in (slice(0, 4), slice(4, 10)):
        keys = {"k": tensors["k"][:, part], "v": tensors["v"][:, part]}
        halves.append(attention(tensors["q"], **keys, return_lse=True, causal=False))
    merged = sum(x * (part - lse).exp()[..., None] for x, part in halves)
    torch.testing.assert_close(merged, o)


@pytest.mark.parametrize("options", [{}, {"sink_tokens": 3}, {"causal": False}], ids=str)
def test_long_window_never_forms_the_whole_mask(monkeypatch, options):
    """Blocks of queries look at the keys near them, not at all 2000."""
    sizes = []
    original = Mask.visible
    monkeypatch.setattr(Mask, "visible", lambda *args: sizes.append(original(*args).numel()) or original(*args))
    attention(**inputs(2000, b=1, dtype=torch.float32), window=64, **options)
    assert sizes and sum(sizes) < 2000 * 64 * 7


# torch's own tracer instantiates autograd functions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "options", [{}, {"window": 3, "sink_tokens": 1}, {"return_lse": True}, {"packed": True}], ids=str
)
def test_compiles_in_one_graph(options, evaluate, assert_close):
    options = dict(options)
    if options.pop("packed", False):
        options["cu_seqlens"] = torch.tensor([0, 3, 3, 20], dtype=torch.int32)
    tensors = inputs(20, b=1, dtype=torch.float32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_close(evaluate(compiled, tensors, **options), evaluate(attention, tensors, **options), 1e-5)
