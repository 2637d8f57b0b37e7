"""`torch.library` ops from two plain functions, so that compilers see one op where kernels are launched.

An op's `forward` allocates its results and launches kernels through `launch.start`; run with launches held back it
says the shapes of its results, so nothing has to describe them a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import launch

Function = Callable[..., Any]


def differentiable(
    name: str, arguments: str, results: int, forward: Function, backward: Function, forgets: Sequence[str] = ()
) -> Function:
    """The op zoo::`name`, to be called with positional arguments.

    Args:
        arguments: its schema, as in "Tensor q, Tensor? decay, float scale".
        results: number of tensors that `forward(*arguments)` returns; results that there are not are empty tensors.
        backward: called with a dictionary of the arguments, the results, and their gradients (None where nothing
            arrived); returns the gradients of arguments by name. What it leaves out has none.
        forgets: tensor arguments that `backward` does not read; they are None there.
    """
    fields = [(kind, label) for kind, label in (part.split() for part in arguments.split(","))]
    labels = [label for _, label in fields]
    tensors = [label for kind, label in fields if kind.startswith("Tensor") and label != "cu_seqlens"]
    schema = f"({arguments}) -> ({', '.join(['Tensor'] * results)})"
    run = torch.library.custom_op(f"zoo::{name}", _on_device(forward), mutates_args=(), schema=schema)
    run.register_fake(_dry(forward))

    def gradients(*values: Any) -> list[Tensor]:
        *given, outputs, grads = values
        found = backward(dict(zip(labels, given, strict=True)), outputs, grads)
        return [outputs[0].new_empty(0) if (grad := found.get(label)) is None else grad for label in tensors]

    optional = ", ".join(f"{'Tensor?' if kind == 'Tensor' else kind} {label}" for kind, label in fields)
    schema = f"({optional}, Tensor[] results, Tensor?[] grads) -> Tensor[]"
    back = torch.library.custom_op(f"zoo::{name}_backward", _on_device(gradients), mutates_args=(), schema=schema)
    back.register_fake(_dry(gradients))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        kept = [None if label in forgets else x for x, label in zip(inputs, labels, strict=True)]
        ctx.set_materialize_grads(False)
        ctx.count, ctx.others = len(inputs), [x for x in kept if not isinstance(x, Tensor)]
        ctx.places = [isinstance(x, Tensor) for x in kept]
        ctx.save_for_backward(*(x for x in kept if isinstance(x, Tensor)), *output)

    def derive(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, others = list(ctx.saved_tensors), iter(ctx.others)
        given = [saved.pop(0) if place else next(others) for place in ctx.places]
        found = dict(zip(tensors, back(*given, saved, list(grads)), strict=True))
        wanted = zip(labels, ctx.needs_input_grad, strict=True)
        return tuple(found[label] if needed else None for label, needed in wanted)

    run.register_autograd(derive, setup_context=setup)
    return run


def in_place(name: str, arguments: str, function: Function) -> Function:
    """The op zoo::`name` that returns one tensor and overwrites the arguments marked `Tensor(a!)`; no gradient."""
    changed = [part.split()[1] for part in arguments.split(",") if "!" in part]
    schema = f"({arguments}) -> Tensor"
    run = torch.library.custom_op(f"zoo::{name}", _on_device(function), mutates_args=changed, schema=schema)
    run.register_fake(_dry(function))
    return run


def _dry(function: Function) -> Function:
    def run(*args: Any) -> Any:
        with launch.held_back():
            return function(*args)

    return run


def _on_device(function: Function) -> Function:
    """Triton launches on the current device, which need not be that of the tensors."""

    def run(*args: Any) -> Any:
        x = next(x for x in args if isinstance(x, Tensor))
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return function(*args)

    return run
