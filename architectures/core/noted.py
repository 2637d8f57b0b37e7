"""What methods note about the keys in transformers' own caches, kept on the cache layer that holds these keys.

Notes may only outlive a call in which the cache grew. A cache layer that has some is of a subclass that drops them on
any other change; its copies and its pickles are plain layers again.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

_CACHES: WeakKeyDictionary[nn.Module, ref[Cache]] = WeakKeyDictionary()
CHANGES = ("reset", "crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices")


def _bare(cls: Any) -> Any:
    return cls.__new__(cls)


def _reduce(self: Any, protocol: Any) -> Any:
    return _bare, (type(self).plain,), {name: value for name, value in self.__dict__.items() if name != "_zoo_notes"}


@cache
def _noted(base: type) -> type:
    """`base`, dropping notes on every change but growth; `_zoo_notes` is {"notes": ..., "length": of what keys}."""

    def dropping(name: str) -> Any:
        def change(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.__dict__.pop("_zoo_notes", None)
            return getattr(base, name)(self, *args, **kwargs)

        return change

    methods = {name: dropping(name) for name in CHANGES if hasattr(base, name)}
    # with a layer type of its own it would enter transformers' table of cache layers
    return type(base.__name__, (base,), {**methods, "plain": base, "__reduce_ex__": _reduce, "_layer_type": None})


def remember_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of attention modules: which cache this call of the module has."""
    found = kwargs.get("past_key_values")
    found = getattr(found, "self_attention_cache", found)
    if isinstance(found, Cache):
        _CACHES[module] = ref(found)
    else:
        _CACHES.pop(module, None)


def layer_of(module: nn.Module, keys: Tensor) -> Any:
    """The cache layer that holds `keys`, or None: no cache, or keys that are not simply those in it."""
    found = _CACHES.get(module)
    layers = getattr(found() if found else None, "layers", [])
    index: int = module.layer_idx  # type: ignore[assignment]
    layer: Any = layers[index] if index < len(layers) else None
    return layer if _base(layer) in (DynamicLayer, StaticLayer) and layer.keys is keys else None


def _base(layer: Any) -> Any:
    found = getattr(type(layer), "plain", type(layer))
    return found


def notes_of(layer: Any, tokens: int) -> dict[str, Any]:
    """The notes about the keys of `layer`, which has just grown by `tokens`."""
    if _base(layer) is type(layer):
        layer.__class__ = _noted(_base(layer))
    held = layer.__dict__.setdefault("_zoo_notes", {"notes": {}, "length": None})
    if _base(layer) is DynamicLayer:  # a static layer's length is not known on the host, nor can it shrink
        length = layer.keys.shape[-2]
        if held["length"] is not None and held["length"] + tokens != length:
            held["notes"] = {}
        held["length"] = length
    notes: dict[str, Any] = held["notes"]
    return notes


def offset_of(layer: Any, tokens: int, keys: int) -> int | Tensor:
    """How many tokens lay in the cache before the `tokens` of this call; `keys` is how many keys attention sees."""
    if _base(layer) is StaticLayer:
        before: Tensor = layer.cumulative_length - tokens
        return before
    return keys - tokens
