"""Checks that attention over listed blocks and the choice of these share."""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from zoo.kernels import checks

_consecutive = WeakIdKeyDictionary()  # positions that were read, and their version


def check_size(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {low}")


def check_integers(name: str, x: Tensor, q: Tensor, shapes: list[tuple[int, ...]], dims: str) -> None:
    """int32 or int64 of one of some shapes, where q lies."""
    checks.check_tensor(name, x)
    if tuple(x.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be [{dims.replace(' ', ', ')}] = {allowed}")
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has dtype {x.dtype}; it must be torch.int32 or torch.int64")
    checks.check_like(name, x, q, x.dtype)


def check_tokens(
    q: Tensor, k: Tensor, q_positions: Tensor | None, starts: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Where the tokens of q and k lie."""
    (b, tq), tk, packed = q.shape[:2], k.shape[1], cu_seqlens is not None
    checks.check_cu_seqlens(cu_seqlens, k)
    if packed and tq != tk:
        raise ValueError(f"q has {tq} tokens and k {tk}; with cu_seqlens both must have the same")
    if not packed and 0 in (tq, tk):
        raise ValueError(f"q has T = {tq} and k has T = {tk}; both must hold at least one token")
    for name, x in (("q_positions", q_positions), ("starts", starts)):
        if x is not None and packed:
            raise ValueError(f"{name} is given beside cu_seqlens; packed sequences must go without it")
    if starts is not None:
        check_integers("starts", starts, q, [(b,)], "B")
    if q_positions is not None:
        check_integers("q_positions", q_positions, q, [(tq,), (b, tq)], "Tq] or [B Tq")
        _check_consecutive(q_positions)


def _check_consecutive(positions: Tensor) -> None:
    """Read from the device only where several queries are given, so that decoding never waits for it."""
    length = positions.shape[-1]
    if length == 1 or not checks.readable(positions):
        return
    version = None if positions.is_inference() else positions._version
    if version is None or _consecutive.get(positions) != version:
        for row in positions.reshape(-1, length).tolist():
            if row != list(range(row[0], row[0] + length)):
                raise ValueError(f"q_positions is {row}; it must count up by one")
        _consecutive[positions] = version
