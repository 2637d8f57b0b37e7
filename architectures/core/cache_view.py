"""Nested names in a layer's cache, for layers made of several mixers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

if TYPE_CHECKING:
    from zoo.architectures.core.cache import LayerCache

Kind = Literal["kv", "ring", "conv", "recurrent", "metadata"]


class CacheView:
    """A `LayerCache` seen through a name prefix, for layers made of several mixers."""

    def __init__(self, layer: LayerCache | CacheView, prefix: str) -> None:
        self.layer, self.prefix = layer, prefix

    def _name(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def view(self, prefix: str) -> CacheView:
        return CacheView(self, prefix)

    def state(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer.state(self._name(name), *args, **kwargs)

    def get(self, name: str) -> Tensor | None:
        return self.layer.get(self._name(name))

    def put(self, name: str, value: Tensor, kind: Kind = "recurrent") -> None:
        self.layer.put(self._name(name), value, kind)

    def append(self, name: str, new: Tensor, fill: float = 0) -> Tensor:
        return self.layer.append(self._name(name), new, fill)

    @property
    def notes(self) -> dict[str, Any]:
        own: dict[str, Any] = self.layer.notes.setdefault(self.prefix, {})
        return own

    @property
    def static(self) -> bool:
        return self.layer.static

    @property
    def started(self) -> bool:
        return self.layer.started

    @property
    def padded(self) -> bool:
        return self.layer.padded

    @property
    def gaps(self) -> bool:
        return self.layer.gaps

    @property
    def cumulative_length(self) -> int | Tensor:
        return self.layer.cumulative_length


def noted_bytes(notes: Any) -> int:
    """Bytes of the tensors in a mapping of mappings and tuples."""
    if isinstance(notes, Tensor):
        return notes.numel() * notes.element_size()
    parts = notes.values() if isinstance(notes, dict) else notes if isinstance(notes, (tuple, list)) else ()
    return sum(noted_bytes(part) for part in parts)
