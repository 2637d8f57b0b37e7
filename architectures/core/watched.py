"""Looking into a model that runs: what goes through its mixers, and what is left when one of them is switched off.

B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from zoo.architectures.core.mixer import Context, Mixer

Key = TypeVar("Key")


@dataclass
class Seen:
    """What went through one mixer: input and output `[B, T, D]`, and the call's context."""

    ctx: Context
    x: Tensor
    y: Tensor


def main_output(output: Any) -> Tensor:
    """The hidden states of a mixer that may also write values for later layers."""
    y: Tensor = output[0] if isinstance(output, tuple) else output
    return y


@contextmanager
def recorded(mixers: Mapping[Key, nn.Module]) -> Iterator[dict[Key, Seen]]:
    """The last call of each of `mixers` inside the `with`, under its key."""
    seen: dict[Key, Seen] = {}

    def record(key: Key, inputs: tuple[Any, ...], output: Any) -> None:
        seen[key] = Seen(ctx=inputs[1], x=inputs[0], y=main_output(output))

    with ExitStack() as stack:
        for key, mixer in mixers.items():
            hook = mixer.register_forward_hook(lambda _, inputs, output, key=key: record(key, inputs, output))
            stack.callback(hook.remove)
        yield seen


def watched(model: Any, layers: Iterable[int]) -> AbstractContextManager[dict[int, Seen]]:
    """The last call of the mixers of `layers` inside the `with`, by layer."""
    return recorded({index: model.model.layers[index].mixer for index in layers})


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """`module` with zeros for its output, and for what it writes for later layers."""

    def zeros(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return output[0] * 0, {name: value * 0 for name, value in output[1].items()}
        return output * 0

    hook = module.register_forward_hook(zeros)
    try:
        yield
    finally:
        hook.remove()


def parts(mixer: nn.Module) -> dict[str, nn.Module]:
    """What can be switched off in a mixer: the whole, and each mixer inside it."""
    inside = {name: module for name, module in mixer.named_modules() if name and isinstance(module, Mixer)}
    return {"whole": mixer, **inside}
