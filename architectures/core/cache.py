"""One cache-layer type for every mixer: named states with a kind, a length, and rollback by replay.

transformers' `generate` builds a `DynamicCache` or `StaticCache`; `core/adopt.py` replaces its empty layers by ours.

B batch, S cached tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from zoo.architectures.core.cache_view import CacheView, Kind, noted_bytes

UNSEEN = torch.iinfo(torch.int64).max // 2  # a key position after every query: never visible


@dataclass
class _State:
    tensor: Tensor
    kind: Kind
    fill: float
    room: Tensor | None = None  # what `tensor` is the start of, when keys and values grow in place


@dataclass
class _Snapshot:
    states: dict[str, _State]
    length: int
    padded: bool
    replay: Callable[[int], None]
    tokens: int


class LayerCache(CacheLayerMixin):
    """The cache of one layer.

    A mixer reads a state with `state(...)` (created on first use) and writes it with `put`; keys and values grow
    through `append`. With `max_cache_len` set the cache is static: buffers are allocated once and written in place.
    """

    is_compileable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, max_cache_len: int | None = None, **_: Any) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.cumulative_length: int | Tensor = 0 if max_cache_len is None else torch.zeros((), dtype=torch.long)
        self.started = False  # known on the host, unlike a static cache's length
        self.padded = False  # some call had padding: cached keys need positions
        self.gaps = False  # some padding lies behind real tokens, not only before the first
        self.record_past = False
        self.unrectified = 0  # last tokens that were decoded with few keys, of a model that rectifies these
        self.notes: dict[str, Any] = {}  # what a method derives from the cached keys; dropped when these change
        self._states: dict[str, _State] = {}
        self._snapshot: _Snapshot | None = None

    @property
    def static(self) -> bool:
        return self.max_cache_len is not None

    def view(self, prefix: str) -> CacheView:
        """The same cache with names nested under `prefix` (`attn/k`)."""
        return CacheView(self, prefix)

    def state(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, kind: Kind, device: torch.device, fill: float = 0
    ) -> Tensor:
        """The state `name`, made of `fill` on first use. `shape` starts with the batch."""
        if name not in self._states:
            tensor = torch.full(shape, fill, dtype=dtype, device=device)
            if self.static and not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(tensor)
            self._states[name] = _State(tensor, kind, fill)
            self.is_initialized = True
        return self._states[name].tensor

    def get(self, name: str) -> Tensor | None:
        """The state `name`, or None before its first use."""
        return self._states[name].tensor if name in self._states else None

    def put(self, name: str, value: Tensor, kind: Kind = "recurrent") -> None:
        """Store a new value; a static cache keeps its buffer."""
        if name not in self._states:
            self._states[name] = _State(value, kind, 0)
            self.is_initialized = True
        elif self.static:
            self._states[name].tensor.copy_(value)
        else:
            self._states[name].tensor = value

    def append(self, name: str, new: Tensor, fill: float = 0) -> Tensor:
        """Grow `name [B, S, ...]` by `new [B, T, ...]` and return all of it (when static: the whole buffer)."""
        if not self.static:
            if name not in self._states:
                self.put(name, new, "kv")
            else:
                grow(self._states[name], new)
            return self._states[name].tensor
        shape = (new.shape[0], cast(int, self.max_cache_len), *new.shape[2:])
        buffer = self.state(name, shape, new.dtype, "kv", new.device, fill)
        index = self._length_on(new.device) + torch.arange(new.shape[1], device=new.device)
        buffer.index_copy_(1, index, new)
        return buffer

    def advance(self, tokens: int) -> None:
        """Count `tokens` as seen; called once per forward by the decoder."""
        self.started = True
        if isinstance(self.cumulative_length, int):
            self.cumulative_length += tokens
        else:
            self.cumulative_length.add_(tokens)

    def _length_on(self, device: torch.device) -> Tensor:
        length = cast(Tensor, self.cumulative_length)
        if length.device != device:
            self.cumulative_length = length = length.to(device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(length)
        return length

    def held(self) -> dict[str, tuple[Kind, Tensor]]:
        """Kind and tensor of every state, by name."""
        return {name: (s.kind, s.tensor) for name, s in self._states.items()}

    def bytes(self) -> dict[str, int]:
        """Bytes held, by state name, with what is noted about the keys."""
        held = {name: s.tensor.numel() * s.tensor.element_size() for name, s in self._states.items()}
        return held | ({"notes": noted_bytes(self.notes)} if self.notes else {})

    # Rollback: a snapshot before the call plus the call's inputs; going back replays the tokens that stay.

    def record(self, replay: Callable[[int], None], tokens: int) -> None:
        """Remember the state before a call over `tokens` tokens; `replay(n)` repeats the call's first n tokens."""
        self._snapshot = _Snapshot(self._copy_states(), self._host_length(), self.padded, replay, tokens)

    def _copy_states(self) -> dict[str, _State]:
        copied = {}
        for name, s in self._states.items():
            grows = s.kind == "kv" and not self.static  # what was written is never written again
            copied[name] = _State(s.tensor if grows else s.tensor.clone(), s.kind, s.fill)
        return copied

    def _host_length(self) -> int:
        return int(self.cumulative_length)

    @property
    def is_croppable(self) -> bool:
        return self.record_past or self._only_keys()

    def _only_keys(self) -> bool:
        return bool(self._states) and all(s.kind == "kv" for s in self._states.values()) and not self.static

    def activate_past_recording(self) -> None:
        """From the next call on, keep what `crop` needs to undo it."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `abs(tokens_to_remove)` tokens.

        Raises:
            RuntimeError: they reach back beyond what is recorded.
        """
        n = abs(int(tokens_to_remove))
        snapshot, self._snapshot = self._snapshot, None
        if n == 0:
            return
        self.notes.clear()
        self.unrectified = max(0, self.unrectified - n)
        if self._only_keys():
            self._crop_keys(n)
        elif snapshot is None or n > snapshot.tokens:
            have = 0 if snapshot is None else snapshot.tokens
            raise RuntimeError(f"cannot remove {n} tokens from this cache: {have} are recorded")
        else:
            self._restore(snapshot)
            if kept := snapshot.tokens - n:
                recording, self.record_past = self.record_past, False
                snapshot.replay(kept)
                self.record_past = recording

    def rewind(self, tokens: int) -> None:
        """Go back before the last `tokens` tokens, which are to be fed again at once; also in a static cache.

        Raises:
            RuntimeError: the layer keeps more than keys and values, which cannot be taken back.
        """
        if any(s.kind != "kv" for s in self._states.values()):
            raise RuntimeError("only keys and values can be taken back, and a layer of this cache keeps a state")
        self._snapshot = None
        self.notes.clear()
        if isinstance(self.cumulative_length, int):
            self._crop_keys(tokens)
        else:
            self.cumulative_length.sub_(tokens)

    def _crop_keys(self, n: int) -> None:
        length = self._host_length() - n
        if length < 0:
            raise RuntimeError(f"cannot remove {n} tokens from a cache of {length + n}")
        for s in self._states.values():
            s.tensor = s.tensor[:, :length]
        self.cumulative_length = length

    def _restore(self, snapshot: _Snapshot) -> None:
        self.padded = snapshot.padded
        if isinstance(self.cumulative_length, int):
            self._states, self.cumulative_length = snapshot.states, snapshot.length
            return
        self.cumulative_length.fill_(snapshot.length)
        for name, s in self._states.items():
            old = snapshot.states.get(name)
            s.tensor.copy_(old.tensor) if old is not None else s.tensor.fill_(s.fill)

    # The rest of transformers' protocol.

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("mixers write named states; `update(key, value)` has no meaning here")

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """States appear on first use."""

    def get_seq_length(self) -> int:
        return cast(int, self.cumulative_length)  # a tensor when static, never read on the host

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.get_seq_length() + query_length if self.max_cache_len is None else self.max_cache_len), 0

    @property
    def batch_size(self) -> int:
        if not self._states:
            raise AttributeError("batch_size is unknown before the first call")
        return next(iter(self._states.values())).tensor.shape[0]

    def reset(self) -> None:
        self.started = self.padded = self.gaps = False
        self.unrectified = 0
        self._snapshot = None
        self.notes.clear()
        if isinstance(self.cumulative_length, int):
            self._states, self.cumulative_length = {}, 0
            return
        self.cumulative_length.zero_()
        for s in self._states.values():
            s.tensor.fill_(s.fill)

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.notes.clear()
        for s in self._states.values():
            if self.static:
                s.tensor.copy_(function(s.tensor))
            else:
                s.tensor, s.room = function(s.tensor), None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        for s in self._states.values():
            self._device = s.tensor.device
            s.tensor, s.room = s.tensor.to("cpu", non_blocking=True), None

    def prefetch(self) -> None:
        for s in self._states.values():
            s.tensor = s.tensor.to(getattr(self, "_device", s.tensor.device), non_blocking=True)


def grow(state: _State, new: Tensor) -> None:
    """Append `new [B, T, ...]` to `state [B, S, ...]`, in place while there is room, so that a token costs no copy."""
    old = state.tensor
    if torch.is_grad_enabled() and (old.requires_grad or new.requires_grad):
        state.tensor, state.room = torch.cat([old, new], dim=1), None
        return
    seen, total = old.shape[1], old.shape[1] + new.shape[1]
    stale = state.room is not None and state.room.is_inference() and not torch.is_inference_mode_enabled()
    if state.room is None or stale or state.room.shape[1] < total:
        state.room = old.new_empty((old.shape[0], total + max(64, total // 8), *old.shape[2:]))
        state.room[:, :seen] = old
    state.room[:, seen:total] = new
    state.tensor = state.room[:, :total]
