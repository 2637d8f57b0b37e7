"""What a method needs to know about each layer of a model, found on sample text in one pass.

B sample rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import registry
from zoo.architectures.core.methods import Choice, options_of
from zoo.architectures.core.shards import refuse_existing, write_json
from zoo.architectures.core.sparse import View
from zoo.errors import ZooError


class Sampler:
    """Dense attention that calls a method's `calibrate` with the queries, keys and values of a layer as they pass."""

    def __init__(self, method: str, choice: Choice, depth: int, done: Callable[[int], None]) -> None:
        self.calibrate = function_of(method)
        self.method, self.choice, self.done = method, choice, done
        self.layers: list[dict[str, Any] | None] = [None] * depth

    def rule_of(self, layer: int, sizes: Mapping[str, Any]) -> Any:
        args = self.choice.args(self.choice.parts[0], layer, sizes)
        return None if args is None else partial(self.attend, layer, args)

    def attend(self, layer: int, args: Any, view: View) -> Tensor:
        found = {name: plain(value) for name, value in self.calibrate(view, args).items()}
        if unknown := sorted(set(found) - set(options_of(self.method))):
            raise ZooError(f"method {self.method!r} has no option {unknown[0]!r}, which its calibration found")
        self.layers[layer] = found
        self.done(layer)
        return view.dense()


def function_of(method: str) -> Any:
    """`calibrate(view, args)` of a method's file.

    Raises:
        ZooError: the method has nothing to calibrate.
    """
    found = getattr(registry.load("mixers", method), "calibrate", None)
    if found is None:
        which = [name for name in registry.names("mixers") if hasattr(registry.load("mixers", name), "calibrate")]
        raise ZooError(f"method {method!r} has nothing to calibrate; those that do: {', '.join(which) or 'none'}")
    return found


def calibrate(model: Any, choice: Choice, rows: Tensor, done: Callable[[int], None] = lambda layer: None) -> list[Any]:
    """The options of each layer (None: it stays dense) by the sample `rows [B, T]`.

    `model` was loaded with `choice`, which is one method; it attends by the samples' rule afterwards and is of no more
    use. `done` is called with each layer that is ready.
    """
    [part] = choice.parts
    text = model.config.get_text_config(decoder=True)
    sampler = Sampler(part.name, choice, text.num_hidden_layers, done)
    if model.config.model_type == "zoo":
        for index, block in enumerate(model.model.layers):
            mixer = getattr(block, "mixer", None)
            if getattr(mixer, "rule", None) is not None:
                mixer.rule = partial(sampler.attend, index, mixer.args)  # type: ignore[union-attr]
    else:
        from zoo.architectures.core.foreign import attach_rules

        attach_rules(model, sampler.rule_of, str(id(sampler)), "calibrate")
    with torch.inference_mode():
        model.eval().base_model(input_ids=rows, use_cache=False)
    if not any(sampler.layers):
        raise ZooError(f"no layer has attention that {part.name!r} could take the place of")
    return sampler.layers


def write(
    out: Path, choice: Choice, source: str, rows: Tensor, layers: Sequence[Mapping[str, Any] | None]
) -> dict[str, Any]:
    """Write a calibration file, whole or not at all, and return what is in it."""
    [part] = choice.parts
    shape = {"rows": rows.shape[0], "tokens": rows.shape[1]}
    data = {"method": part.name, "source": source, "samples": shape, "args": plain(part.own), "layers": list(layers)}
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, data)
    return data


def plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
