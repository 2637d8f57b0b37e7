"""What every op and its step promise: one graph under torch.compile and torch.export, and a step that is a well-formed
operator and writes the state of the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from calls import CALLS, RECURRENT, good
from torch import Tensor


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return torch.utils._pytree.tree_map_only(Tensor, torch.clone, arguments)


class Call(torch.nn.Module):
    def __init__(self, run: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__()
        self.run, self.options = run, options

    def forward(self, arguments: dict[str, Any]) -> Any:
        return self.run(**arguments, **self.options)


# torch's own tracer instantiates autograd functions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("how", ["compile", "export"])
def test_one_graph(call, how):
    _, run, arguments = good(call)
    options = {name: arguments.pop(name) for name in list(arguments) if isinstance(arguments[name], (str, int, float))}
    if call in RECURRENT:
        options["output_final_state"] = True
    module, twin = Call(run, options), copied(arguments)
    expected = (module(twin), twin.get("state"))
    if how == "compile":
        torch.compiler.reset()
        graph: Callable[..., Any] = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    else:
        graph = torch.export.export(module, (copied(arguments),), strict=False).module()
    torch.testing.assert_close((graph(arguments), arguments.get("state")), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", RECURRENT)
def test_a_step_is_a_well_formed_operator(op):
    package, run, arguments = good(f"{op}_step")
    seen: list[tuple[Any, ...]] = []
    with mock.patch.object(package, "_STEP", lambda *args: seen.append(args)):
        run(**arguments)
    torch.library.opcheck(getattr(torch.ops.zoo, f"{op}_step").default, seen[0])


@pytest.mark.parametrize("op", RECURRENT)
def test_a_step_writes_the_state_of_the_op(op):
    package, run, arguments = good(f"{op}_step")
    begin = copied(arguments.pop("state"))
    expected, final = getattr(package, op)(
        **arguments, initial_state=begin, output_final_state=True, backend="reference"
    )
    state = copied(begin)
    tensors = torch.utils._pytree.tree_leaves(arguments)
    leaf = next(x for x in tensors if isinstance(x, Tensor)).requires_grad_()
    o = run(**arguments, state=state)
    assert not o.requires_grad and leaf.grad is None
    torch.testing.assert_close((o, state), (expected.detach(), torch.utils._pytree.tree_map(Tensor.detach, final)))
