"""What the Triton kernels of all elementwise ops have in common."""

from __future__ import annotations

import pytest
import torch
from packing import packed
from vector_cases import CASES

from zoo.kernels import vector

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
cut = {name: case for name, case in CASES.items() if name != "short_conv"}  # the ops that cut long sequences
segmented = pytest.mark.parametrize("case", cut.values(), ids=cut)


@every
def test_fp64_is_refused(case):
    with pytest.raises(ValueError, match="fp64"):
        case.call(**{name: x.double() for name, x in case.inputs(3).items()}, backend="triton")


@every
def test_packed_without_tokens(case):
    options, t, n = packed(0, 0)
    tensors = case.inputs(t, 1, n=n)
    _, *state = case.call(**tensors, **options, output_final_state=True, backend="triton")
    for found, name in zip(state, case.state, strict=True):
        assert torch.equal(found, tensors[name])


@every
@pytest.mark.parametrize(("dtype", "rms"), [(torch.float16, 2e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_inputs(evaluate, assert_close, case, dtype, rms):
    tensors = {name: x.to(dtype) if name in case.halves else x for name, x in case.inputs(9).items()}
    exact = {name: x.double() for name, x in tensors.items()}
    found = evaluate(case.call, tensors, output_final_state=True, backend="triton")
    assert found["output 0"].dtype == dtype
    assert_close(found, evaluate(case.call, exact, output_final_state=True, backend="reference"), rms)


@every
def test_compiles_as_one_graph(evaluate, assert_close, case):
    tensors, options = case.inputs(3), {"backend": "triton", "output_final_state": True}
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    assert_close(evaluate(compiled, tensors, **options), evaluate(case.call, tensors, **options), 1e-6)


@segmented
def test_segments_equal_one_pass(check_vector, monkeypatch, case):
    monkeypatch.setattr(vector, "SEGMENT", 16)
    check_vector(case.call, case.inputs(35, 1, d=1))
    options, t, n = packed(0, 1, 20, 0)
    check_vector(case.call, case.inputs(t, 1, n=n, d=1), **options)


@segmented
def test_batch_does_not_matter(monkeypatch, case):
    monkeypatch.setattr(vector, "SEGMENT", 16)
    tensors = case.inputs(33, d=1)
    together = case.call(**tensors, backend="triton")[0]
    parts = [{name: x if name in case.common else x[i : i + 1] for name, x in tensors.items()} for i in range(2)]
    assert torch.equal(together, torch.cat([case.call(**part, backend="triton")[0] for part in parts]))
