"""The delta rule against transformers' own, and on inputs that are hard for its triangular inverse."""

from __future__ import annotations

import torch

from zoo.kernels.delta_rule import delta_rule
from zoo.kernels.halves import unit_lower_inverse


def test_equals_transformers_gated_delta_rule(evaluate, assert_close):
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    q, k, v = (torch.randn(2, 150, 3, 16) for _ in range(3))
    beta, decay = torch.rand(2, 150, 3), -torch.rand(2, 150, 3)
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "decay": decay, "initial_state": torch.randn(2, 3, 16, 16)}

    def theirs(q, k, v, beta, decay, initial_state):
        return torch_chunk_gated_delta_rule(
            q, k, v, decay, beta, initial_state=initial_state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )

    expected = evaluate(theirs, tensors)
    assert_close(evaluate(delta_rule, tensors, qk_l2norm=True, output_final_state=True), expected, 1e-5, 1e-4)


def test_full_strength_writes_are_read_back():
    k = torch.nn.functional.normalize(torch.randn(1, 70, 1, 8), dim=-1)
    v = torch.randn(1, 70, 1, 4)
    o, _ = delta_rule(k, k, v, torch.ones(1, 70, 1), scale=1.0)
    torch.testing.assert_close(o, v, rtol=1e-4, atol=1e-4)


def test_equal_keys_stay_accurate(evaluate, assert_close):
    """All keys alike make powers of the triangular matrix explode; its inverse is tame."""
    k = torch.nn.functional.normalize(torch.ones(1, 130, 1, 8), dim=-1)
    tensors = {"q": torch.randn(1, 130, 1, 8), "k": k, "v": torch.randn(1, 130, 1, 4)}
    tensors["beta"] = 1.9 * torch.ones(1, 130, 1)
    exact = {name: x.double() for name, x in tensors.items()}
    expected = evaluate(delta_rule, exact, backend="reference", output_final_state=True)
    assert_close(evaluate(delta_rule, tensors, output_final_state=True), expected, 1e-4, 1e-3)


def test_inverse_and_its_gradient():
    lower = torch.randn(2, 16, 16, dtype=torch.float64).tril(-1).requires_grad_()
    identity = unit_lower_inverse(lower) @ (torch.eye(16) + lower)
    torch.testing.assert_close(identity, torch.eye(16, dtype=torch.float64).expand(2, -1, -1))
    assert torch.autograd.gradcheck(lambda x: unit_lower_inverse(x.tril(-1)), lower, fast_mode=True)
