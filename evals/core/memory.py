"""Bytes: of a model's state as a function of length, and of a run at its peak."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zoo.errors import ZooError

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def state_bytes(model: Any, length: int) -> int:
    """Bytes of cache that one sequence of `length` tokens needs: the model's own account, or that of its KV cache.

    Raises:
        ZooError: the model gives no account and is not a softmax decoder with a plain KV cache.
    """
    account = getattr(model, "state_bytes", None)
    if account is not None:
        return int(account(length))
    return kv_cache_bytes(model.config, length, next(model.parameters()).element_size())


def kv_cache_bytes(config: Any, length: int, itemsize: int) -> int:
    """Bytes of the keys and values of a transformers softmax decoder, one sequence of `length` tokens.

    A sliding-window layer holds the window's last tokens but one: the new token's own key is added in the call.
    """
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise ZooError(f"state size of model type {config.model_type!r} is unknown; add a state_bytes method")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    per_token = 2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim * itemsize
    window = getattr(config, "sliding_window", None)
    default = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or default
    known = {"full_attention": length, "sliding_attention": min(length, (window or length + 1) - 1)}
    other = sorted(set(kinds) - set(known))
    if other:
        raise ZooError(f"state size of layer types {other} is unknown; add a state_bytes method")
    return sum(per_token * known[kind] for kind in kinds)


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """Bytes that `run()` needs at its peak beyond what was in use before it.

    On a GPU these are the bytes of torch's allocator, so the weights do not count; on a CPU it is the growth of the
    process's resident memory, which is coarse: memory that the process already holds is reused unseen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    _reset_peak()
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _reset_peak() -> None:
    """Set the process's peak to its present size; where that is not allowed the peak is that of the whole run."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def _status(field: str) -> int:
    """A field of the process's status in bytes; 0 where there is no such file (not Linux)."""
    if not _STATUS.exists():
        return 0
    line = next((line for line in _STATUS.read_text().splitlines() if line.startswith(field)), "0 0")
    return int(line.split()[1]) * 1024
