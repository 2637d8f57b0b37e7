"""Effective state sizes equal their analytic values, on ops and on models; utilisation and sinks on known models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import zoo
from zoo.architectures.core.mixing import softmax_weights, state_sizes
from zoo.architectures.mixers.attention import Args
from zoo.errors import ZooError
from zoo.evals import attention_sinks, effective_state_size, state_utilisation
from zoo.evals.core.attended import attended, softmax_mixers
from zoo.kernels.attention import attention
from zoo.kernels.delta_rule import delta_rule
from zoo.kernels.linear_attention import linear_attention

T, K = 64, 8
PLACES = (4, 16, 32, 48, 60)
ROW = torch.randint(258, (T,), generator=torch.Generator().manual_seed(1))


def operator(op: Any, *before: torch.Tensor, after: tuple[torch.Tensor, ...] = (), **options: Any) -> torch.Tensor:
    """The matrix `[1, 1, T, T]` of an op over values."""
    out = op(*before, torch.eye(T, dtype=torch.float64)[None, :, None], *after, **options)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def cases() -> dict[str, tuple[torch.Tensor, Any]]:
    q, k = random(1, T, 1, K), random(1, T, 1, K + 1)[..., :K]
    unit, beta = k / k.norm(dim=-1, keepdim=True), random(1, T, 1).sigmoid()
    decay = -0.1 * random(1, T, 1, K).abs()
    poles = torch.tensor([0.9, 0.7, -0.5, 0.3], dtype=torch.float64)
    steps = torch.arange(T)[:, None] - torch.arange(T)
    ssm = (random(4)[:, None, None] * poles[:, None, None] ** steps.clamp(min=0)).sum(0).tril()[None, None]

    def recurrent(i: int) -> int:
        return min(i, K, T - i)

    return {
        "linear attention": (operator(linear_attention, q, k), recurrent),
        "gated linear attention": (operator(partial(linear_attention, decay=decay), q, k), recurrent),
        "delta rule": (operator(delta_rule, q, unit, after=(beta,)), recurrent),
        "softmax": (operator(attention, q, k), lambda i: min(i, T - i)),
        "window": (operator(partial(attention, window=9), q, k), lambda i: min(i, 8, T - i)),
        "four poles": (ssm, lambda i: min(4, T - i)),
        "running sum": (torch.ones(T, T, dtype=torch.float64).tril()[None, None], lambda i: 1),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_sizes_of_ops_are_the_analytic_ones(name: str) -> None:
    weights, size = cases()[name]
    found = [state_sizes(weights, [place], 1e-11)[0].item() for place in PLACES]
    assert found == [size(place) for place in PLACES]


@pytest.fixture(scope="module")
def model() -> Any:
    """Full softmax, a window of 5, Gated DeltaNet with 8 keys, Mamba-2 with 6 states; fp64, so that ranks are exact."""
    torch.manual_seed(0)
    layout = "attention,attention(window=5),gated_delta_net,mamba2(state_dim=6,head_dim=8)"
    sizes = dict(vocab_size=258, hidden_size=32, depth=4, heads=4, intermediate_size=32)
    return zoo.create("hybrid", layout=layout, **sizes).double()


def test_sizes_of_a_model_are_the_analytic_ones(model: Any) -> None:
    result = effective_state_size.evaluate(model, length=T, samples=2, tolerance=1e-11)
    places = [7, 14, 21, 28, 36, 43, 50, 57]
    sizes = [lambda i, n=n: min(i, n, T - i) for n in (T, 4, 8, 6)]
    for layer, size in enumerate(sizes):
        heads = list(result.select("tolerance_size", layer=layer))
        for row in heads:
            assert row.value == sum(map(size, places)) / 8 and row.n == 2
        (total,) = result.select("total_tolerance_size", layer=layer)
        assert total.value == pytest.approx(len(heads) * sum(map(size, places)) / 8)
        assert all(1 < row.value < size(T // 2) for row in result.select("entropy_size", layer=layer))


def test_utilisation_is_over_the_state_that_is_kept(model: Any) -> None:
    result = state_utilisation.evaluate(model, length=T, tolerance=1e-11)
    assert [result.value("state_rows", layer=layer) for layer in range(4)] == [57, 4, 8, 6]
    places = [7, 14, 21, 28, 36, 43, 50, 57]
    expected = [sum(min(i, T - i) / i for i in places) / 8, 1.0, (7 / 8 + 6 + 7 / 8) / 8, 1.0]
    assert [result.value("utilisation", layer=layer) for layer in range(4)] == pytest.approx(expected)


def test_half_precision_is_measured_wide() -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=258, hidden_size=32, depth=1, heads=4, intermediate_size=32)
    low = zoo.create("hybrid", layout="gated_delta_net", **sizes).bfloat16()
    found = effective_state_size.evaluate(low, length=T, tolerance=1e-5)
    assert [row.value for row in found.select("tolerance_size")] == [(7 + 6 * 8 + 7) / 8] * 4


def test_weights_are_those_of_transformers(tiny_llama: Path) -> None:
    reference = LlamaForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(ROW[None], output_attentions=True).attentions
    ours = zoo.from_pretrained(str(tiny_llama), dtype=torch.float32)
    seen = 0
    for (layer, _), head, queries, weights in attended(ours, softmax_mixers(ours, "x"), ROW, [3, 40, 63]):
        torch.testing.assert_close(weights, expected[layer][0, head, queries], atol=1e-6, rtol=1e-5)
        seen += 1
    assert seen == 4 * 4


def test_sink_logits_take_their_share() -> None:
    args, q, k = Args(heads=1, head_dim=K), random(1, T, 1, K), random(1, T, 1, K + 1)[..., :K]
    logits = torch.tensor([1.5], dtype=torch.float64)
    expected = operator(lambda q, k, v: attention(q, k, v, sink_logits=logits), q, k)
    found = softmax_weights(args, q.transpose(1, 2), k.transpose(1, 2), torch.arange(T), sinks=logits)
    torch.testing.assert_close(found, expected)


def test_sink_mass(model: Any) -> None:
    with torch.no_grad():
        for mixer in softmax_mixers(model, "x").values():
            mixer.q_proj.weight.zero_()
    result = attention_sinks.evaluate(model, length=40, samples=1)
    for tokens in (1, 4):
        even = result.value("even_mass", tokens=tokens)
        assert even == pytest.approx(sum(tokens / (i + 1) for i in range(20, 40)) / 20)
        assert [row.value for row in result.select("sink_mass", layer=0, tokens=tokens)] == pytest.approx([even] * 4)
        assert all(row.value == 0 for row in result.select("sink_mass", layer=1, tokens=tokens))  # outside the window


def test_bad_input_is_one_line(model: Any, llama: Any) -> None:
    for options, message in (({"tolerance": 2}, "tolerance was 2"), ({"length": 4096}, "beyond the model's 2048")):
        with pytest.raises(ZooError, match=message):
            effective_state_size.evaluate(model, **options)
    with pytest.raises(ZooError, match="has none"):
        effective_state_size.evaluate(llama)
    with pytest.raises(ZooError, match="length was 6"):
        attention_sinks.evaluate(model, length=6)
