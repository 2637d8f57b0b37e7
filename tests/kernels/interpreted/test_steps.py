"""The kernel that takes one token against the reference.

Shapes: B batch, H key heads, Hv value heads, K and V head widths.
"""

from __future__ import annotations

import sys

import pytest
import torch

from zoo.kernels import delta_rule, dplr, linear_attention, mlstm, steps

OPS = {
    "linear_attention": (linear_attention.linear_attention, linear_attention.linear_attention_step),
    "delta_rule": (delta_rule.delta_rule, delta_rule.delta_rule_step),
    "dplr": (dplr.dplr, dplr.dplr_step),
}
FORMS = {"none": None, "head": "H", "channel": "HK", "token head": "BTH", "token channel": "BTHK"}


def inputs(op, form="token head", b=2, h=1, hv=2, k=7, v=19, dtype=torch.float32):
    sizes = {"B": b, "T": 1, "H": hv, "K": k}
    made = {name: torch.randn(b, 1, h, k).to(dtype) for name in ("q", "k")}
    made |= {"v": torch.randn(b, 1, hv, v).to(dtype), "decay": None}
    if FORMS[form]:
        made["decay"] = -3 * torch.rand([sizes[axis] for axis in FORMS[form]])
    if op == "delta_rule":
        made["beta"] = 2 * torch.rand(b, 1, hv)
    if op == "dplr":
        made |= {name: torch.randn(b, 1, h, k).to(dtype) for name in ("a", "b")}
    return made, torch.randn(b, hv, k, v)


def test_wide_heads_and_scattered_states_run_without_a_kernel(monkeypatch):
    monkeypatch.setattr(steps, "_launch", None)
    for state, width in ((torch.zeros(1, 1, 300, 2), 300), (torch.zeros(1, 1, 2, 4).mT, 4)):
        x = torch.ones(1, 1, 1, width)
        v = torch.ones(1, 1, 1, 2)
        o = linear_attention.linear_attention_step(x, x, v, state=state, scale=1.0)
        assert torch.equal(o, torch.full_like(v, width)) and torch.equal(state, torch.ones_like(state))


@pytest.fixture(autouse=True)
def _only_kernels(monkeypatch, request):
    if "without_a_kernel" not in request.node.name:
        monkeypatch.setattr(steps, "_plain", None)


@pytest.fixture
def check(assert_close):
    def run(op, tensors, state, rms=1e-6, **options):
        whole, step = OPS[op]
        exact = {name: None if x is None else x.double() for name, x in tensors.items()}
        options["output_final_state"] = True
        o, final = whole(**exact, initial_state=state.double(), backend="reference", **options)
        del options["output_final_state"]
        found = step(**tensors, state=state, **options)
        assert found.dtype == tensors["q"].dtype and state.dtype == torch.float32
        assert_close({"o": found}, {"o": o}, rms if found.dtype == torch.float32 else 1e-2)
        assert_close({"state": state}, {"state": final}, rms)

    return run


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_state(check, op, form):
    check(op, *inputs(op, form), scale=0.7)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("k", "v"), [(1, 1), (16, 16), (70, 130)])
def test_odd_and_wide_heads(check, op, k, v):
    check(op, *inputs(op, k=k, v=v, b=1))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_states_in_fp32(check, op, dtype):
    check(op, *inputs(op, k=16, v=16, dtype=dtype))


def test_normalised_and_zero_keys(check):
    tensors, state = inputs("delta_rule", b=3)
    tensors["k"][0], tensors["q"][1] = 0.0, 0.0
    check("delta_rule", tensors, state, qk_l2norm=True)


@pytest.mark.parametrize("op", OPS)
def test_total_forgetting(check, op):
    tensors, state = inputs(op)
    tensors["decay"][0] = -1e4
    check(op, tensors, state)


def test_slices_of_a_projection_and_of_a_cache(check):
    wide = torch.randn(3, 1, 3 * 2 * 8)
    q, k, v = (x.unflatten(-1, (2, 8)) for x in wide.split(16, -1))
    cache = torch.randn(3, 2, 2, 8, 8)
    kept = cache[:, 1].clone()
    check("linear_attention", {"q": q, "k": k, "v": v}, cache[:, 0])
    assert torch.equal(cache[:, 1], kept)


def test_the_matrix_of_mlstm(assert_close):
    tensors, state = inputs("linear_attention", "none")
    del tensors["decay"]
    tensors |= {name: torch.randn(2, 1, 2) for name in ("input_gate", "forget_gate")}
    begin = (state, torch.randn(2, 2, 7), torch.randn(2, 2))
    exact = {name: x.double() for name, x in tensors.items()}
    initial = tuple(x.double() for x in begin)
    h, final = mlstm.mlstm(**exact, initial_state=initial, output_final_state=True, backend="reference")
    found = mlstm.mlstm_step(**tensors, state=begin)
    assert_close({"h": found}, {"h": h}, 1e-5)
    assert_close(dict(zip("Cnm", begin, strict=True)), dict(zip("Cnm", final, strict=True)), 1e-6)


@pytest.mark.parametrize("op", OPS)
def test_operator_contract(op):
    tensors, state = inputs(op)
    seen = []
    package = sys.modules[f"zoo.kernels.{op}"]
    real, package._STEP = package._STEP, lambda *args: seen.append(args)
    try:
        OPS[op][1](**tensors, state=state)
    finally:
        package._STEP = real
    torch.library.opcheck(getattr(torch.ops.zoo, f"{op}_step").default, seen[0])


def test_compiles_as_one_graph(assert_close):
    tensors, state = inputs("delta_rule")
    other = state.clone()
    compiled = torch.compile(delta_rule.delta_rule_step, fullgraph=True, backend="aot_eager")
    found = {"o": compiled(**tensors, state=state), "state": state}
    assert_close(found, {"o": delta_rule.delta_rule_step(**tensors, state=other), "state": other}, 1e-7)
