"""`torch.library` ops from two plain functions, so that compilers see one op where kernels are launched.

An op's `forward` allocates its results and launches kernels through `launch.start`; run with launches held back it
says the shapes of its results, so nothing has to describe them a second time.
"""

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
        results: number of results that `forward(*arguments)` returns, each a tensor, or None where there is none:
            `backward` and the caller then get an empty tensor in its place.
        backward: called with a dictionary of the arguments, the results, and their gradients (None where nothing
            arrived); returns the gradients of arguments by name. What it leaves out has none.
        forgets: tensor arguments that `backward` does not read; they are None there.
    """
    fields = [part.split() for part in arguments.split(",")]
    labels = [label for _, label in fields]
    tensors = [label for kind, label in fields if kind.startswith("Tensor") and label != "cu_seqlens"]
    run = register(name, f"({arguments}) -> ({', '.join(['Tensor'] * results)})", forward)

    def gradients(*values: Any) -> list[Tensor | None]:
        *given, outputs, grads = values
        found = backward(dict(zip(labels, given, strict=True)), outputs, grads)
        return [found.get(label) for label in tensors]

    optional = ", ".join(f"{'Tensor?' if kind == 'Tensor' else kind} {label}" for kind, label in fields)
    back = register(f"{name}_backward", f"({optional}, Tensor[] results, Tensor?[] grads) -> Tensor[]", gradients)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        kept = [None if label in forgets else x for x, label in zip(inputs, labels, strict=True)]
        ctx.set_materialize_grads(False)
        ctx.others = [x for x in kept if not isinstance(x, Tensor)]
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


def register(name: str, schema: str, function: Function, changed: Sequence[str] = ()) -> Any:
    """The op zoo::`name`(schema), without a gradient, that overwrites the arguments `changed`; () returns nothing."""

    def filled(*args: Any) -> Any:
        found, x = function(*args), _first(args)
        if found is None or isinstance(found, Tensor):
            return found
        return type(found)(x.new_empty(0) if y is None else y for y in found)

    def on_device(*args: Any) -> Any:
        """Triton launches on the current device, which need not be that of the tensors."""
        x = _first(args)
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return filled(*args)

    def dry(*args: Any) -> Any:
        with launch.held_back():
            return filled(*args)

    run = torch.library.custom_op(f"zoo::{name}", on_device, mutates_args=changed, schema=schema)
    run.register_fake(dry)
    return run


def _first(args: Sequence[Any]) -> Tensor:
    return next(x for x in args if isinstance(x, Tensor))
