"""The mixture of experts against its formula, one token and one expert at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.architectures.channels.moe import EXAMPLE, VARIANTS, Args, MixtureOfExperts
from zoo.architectures.core import experts
from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.experts import grouped_linear
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.errors import ZooError

CASES: dict[str, dict[str, Any]] = {
    "example": EXAMPLE,
    **VARIANTS,
    "unnormalised_groups": {**VARIANTS["grouped"], "normalise": False, "experts": 6, "groups": 3, "top_groups": 2},
    "group_of_one": {**VARIANTS["grouped"], "top_k": 1, "groups": 4, "top_groups": 3, "normalise": False},
    "corrected_softmax": {**EXAMPLE, "experts": 5, "top_k": 3, "correction_bias": True, "scale": 0.7},
    "plain_with_biases": {**EXAMPLE, "gated": False, "activation": "gelu", "bias": True},
    "tanh_gelu": {**EXAMPLE, "activation": "gelu_tanh", "top_k": 4},
}
WIDTH = 16


def make(args: dict[str, Any], seed: int = 0) -> MixtureOfExperts:
    config = DecoderConfig(vocab_size=8, hidden_size=WIDTH, layers=())
    torch.manual_seed(seed)
    part = MixtureOfExperts(config, Args(**args)).double()
    with torch.no_grad():
        for tensor in part.state_dict(keep_vars=True).values():
            tensor.copy_(torch.randn(tensor.shape) * 0.5)
    return part


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(part: MixtureOfExperts, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    return part(x, Context(phase="train", positions=positions))


ACTIVATION = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}


def choose(args: Args, scores: Tensor, bias: Tensor | None) -> list[int]:
    """The experts of one token, by sorting."""
    wanted = scores if bias is None else scores + bias
    size = args.experts // args.groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(args.groups)]
    groups.sort(key=lambda group: -sum(sorted((wanted[e].item() for e in group), reverse=True)[:2]))
    allowed = [e for group in groups[: args.top_groups] for e in group]
    return sorted(allowed, key=lambda e: -wanted[e].item())[: args.top_k]


def expert(part: MixtureOfExperts, args: Args, e: int, x: Tensor) -> Tensor:
    weights, biases = dict(part.experts.named_parameters()), (0.0, 0.0)
    first = weights["gate_up_proj" if args.gated else "up_proj"][e]
    if args.bias:
        biases = (weights["gate_up_bias" if args.gated else "up_bias"][e], weights["down_bias"][e])
    hidden = first @ x + biases[0]
    if args.gated:
        gate, up = hidden[: args.intermediate_size], hidden[args.intermediate_size :]
        if args.limit is not None:
            gate, up = gate.clamp(max=args.limit), up.clamp(-args.limit, args.limit)
            hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        else:
            hidden = ACTIVATION[args.activation](gate) * up
    else:
        hidden = ACTIVATION[args.activation](hidden)
    return weights["down_proj"][e] @ hidden + biases[1]


def token(part: MixtureOfExperts, args: Args, x: Tensor) -> Tensor:
    """The channel's output for one token `x [D]`."""
    logits = part.router(x)
    scores = logits.sigmoid() if args.router == "sigmoid" else logits.softmax(-1)
    if args.softmax_after:
        scores = logits
    chosen = choose(args, scores, part.correction_bias if args.correction_bias else None)
    weights = scores[chosen].softmax(-1) if args.softmax_after else scores[chosen]
    if args.normalise:
        weights = weights / (weights.sum() + args.normalise_eps)
    inner = x if args.latent_size is None else part.latent_in(x)
    y = torch.zeros_like(inner)
    for e, weight in zip(chosen, weights * args.scale, strict=True):
        y = y + (expert(part, args, e, weight * inner) if args.weight_input else weight * expert(part, args, e, inner))
    y = y if args.latent_size is None else part.latent_out(y)
    if args.shared_size is None:
        return y
    act, shared = ACTIVATION[args.activation], part.shared
    up = shared.up_proj(x)
    out = shared.down_proj(act(shared.gate_proj(x)) * up if args.gated else act(up))
    return y + (out * torch.sigmoid(part.shared_gate(x)) if args.shared_gate else out)


@pytest.mark.parametrize("options", CASES)
def test_experts_are_a_sum_over_tokens(options: str) -> None:
    args, part, x = Args(**CASES[options]), make(CASES[options]), draw(2, 7, WIDTH) * 3
    expected = torch.stack([torch.stack([token(part, args, x[b, t]) for t in range(7)]) for b in range(2)])
    found = run(part, x)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    loss = draw(2, 7, WIDTH)
    inputs = list(part.parameters())
    pairs = zip(*(torch.autograd.grad((y * loss).sum(), inputs) for y in (found, expected)), strict=True)
    for parameter, (ours, formula) in zip(inputs, pairs, strict=True):
        assert (ours - formula).abs().max() <= 1e-12 * formula.abs().max(), parameter.shape
        assert ours.any()


@pytest.mark.parametrize("options", CASES)
def test_a_token_does_not_depend_on_the_others(options: str) -> None:
    part, x = make(CASES[options]), draw(3, 5, WIDTH)
    whole = run(part, x)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(run(part, x[order].flip(1)), whole[order].flip(1), rtol=0, atol=1e-12)
    assert torch.allclose(run(part, x[1:2, 3:4]), whole[1:2, 3:4], rtol=0, atol=1e-12)


def test_a_correction_moves_the_choice_and_not_the_weights() -> None:
    args = {**EXAMPLE, "router": "sigmoid", "correction_bias": True}
    part, x = make(args), draw(9, WIDTH)
    part.correction_bias.zero_()
    part.correction_bias[3] = 100.0
    index, weight = part.route(x)
    assert (index == 3).any(-1).all()
    assert torch.allclose(weight, part.router(x).sigmoid().gather(-1, index))
    assert "correction_bias" in part.state_dict() and "correction_bias" not in dict(part.named_parameters())


def test_a_correction_stays_in_fp32_under_bf16(tmp_path: Path) -> None:
    layer = Layer(channel="moe", channel_args=VARIANTS["grouped"])
    decoder = DecoderConfig(vocab_size=8, hidden_size=WIDTH, layers=(layer,))
    model = ZooForCausalLM(ZooConfig.from_decoder(decoder, "test"))
    bias = model.model.layers[0].channel.correction_bias.copy_(torch.randn(4))
    model.save_pretrained(tmp_path)
    loaded = ZooForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model.layers[0].channel
    assert loaded.correction_bias.dtype == torch.float32 and torch.equal(loaded.correction_bias, bias)
    assert loaded.experts.down_proj.dtype == torch.bfloat16


def test_grouped_products_with_experts_that_have_no_rows() -> None:
    x, weight = draw(5, 3).requires_grad_(), draw(4, 2, 3).requires_grad_()
    ends = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, ends), (x, weight))
    out = grouped_linear(x, weight, ends)
    assert torch.allclose(out, torch.cat([x[:2] @ weight[1].T, x[2:] @ weight[3].T]))
    out.sum().backward()
    assert weight.grad is not None and not weight.grad[0].any() and not weight.grad[2].any()


def test_torchs_grouped_product_is_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    part, x = make(VARIANTS["clamped"]).bfloat16(), draw(2, 9, WIDTH).bfloat16()
    found = []
    for grouped in (False, True):
        monkeypatch.setattr(experts, "_has_grouped_mm", lambda x, weight, grouped=grouped: grouped)
        y = run(part, x)
        found.append((y, *torch.autograd.grad(y.square().sum(), list(part.experts.parameters()))))
    for looped, product in zip(*found, strict=True):
        assert (looped - product).abs().max() <= 0.02 * looped.abs().max()


def test_it_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    part, x = make(VARIANTS["clamped"]).float(), draw(2, 6, WIDTH).float()
    compiled = torch.compile(lambda x: run(part, x), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), run(part, x), atol=1e-5)
    x, weight, ends = draw(5, 3), draw(4, 2, 3), torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = (x.requires_grad_(), weight.requires_grad_(), ends)
    torch.library.opcheck(torch.ops.zoo.expert_linear, inputs, test_utils=checks)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({"top_k": 5}, "top_k was 5"),
        ({"router": "tanh"}, "router was 'tanh'"),
        ({"groups": 3}, "groups was 3"),
        ({"groups": 4, "top_groups": 1}, "top_k was 2"),
        ({"activation": "tanh"}, "activation was 'tanh'"),
        ({"softmax_after": True, "router": "sigmoid"}, "softmax_after"),
        ({"limit": 7.0, "gated": False}, "limit was 7.0"),
        ({"shared_gate": True}, "shared_gate"),
        ({"intermediate_size": 0}, "intermediate_size was 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args: dict[str, Any], word: str) -> None:
    with pytest.raises(ZooError, match=word):
        Args(**{**EXAMPLE, **args}).check(DecoderConfig(vocab_size=8, hidden_size=WIDTH, layers=()))
