"""Operations on weights as data: what a plan row does to its sources, and how a new tensor starts.

An operation takes the list of tensors that come before it in a chain and returns one tensor. On the meta device the
same functions tell the shape and dtype of a row that nothing has been read for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.plan import Init
from zoo.errors import ZooError


@dataclass(frozen=True)
class Operation:
    """`name` of a function below and its `options`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in OPERATIONS:
            raise ZooError(f"operation {self.name!r} is unknown; it must be one of {', '.join(OPERATIONS)}")

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        return OPERATIONS[self.name](tensors, **self.options)

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.options.items())})"


def copy(tensors: Sequence[Tensor]) -> Tensor:
    """The one tensor, unchanged."""
    (tensor,) = tensors
    return tensor


def expand_heads(tensors: Sequence[Tensor], *, group: int, head_dim: int) -> Tensor:
    """`[Hkv * d, ...] -> [Hkv * group * d, ...]`: head `h` is KV head `h // group`."""
    heads = copy(tensors).unflatten(0, (-1, head_dim))
    return heads.repeat_interleave(group, dim=0).flatten(0, 1)


def select_heads(tensors: Sequence[Tensor], *, heads: Sequence[int], head_dim: int, dim: int = 0) -> Tensor:
    """The rows (`dim=0`) or columns (`dim=1`) of the given heads, in that order."""
    split = copy(tensors).unflatten(dim, (-1, head_dim))
    return split.index_select(dim, torch.tensor(list(heads), device=split.device)).flatten(dim, dim + 1)


def slice_(tensors: Sequence[Tensor], *, dim: int, start: int, stop: int) -> Tensor:
    """Rows `start:stop` along `dim`."""
    return copy(tensors).narrow(dim, start, stop - start)


def part(tensors: Sequence[Tensor], *, dim: int, index: int, of: int) -> Tensor:
    """Part `index` of `of` equal parts along `dim`."""
    return copy(tensors).unflatten(dim, (of, -1)).select(dim, index)


def band(tensors: Sequence[Tensor], *, groups: int, start: int, stop: int) -> Tensor:
    """Rows `start:stop` of each of `groups` equal parts."""
    return copy(tensors).unflatten(0, (groups, -1))[:, start:stop].flatten(0, 1)


def weave(tensors: Sequence[Tensor], *, groups: int) -> Tensor:
    """`groups` equal parts of every tensor: the first parts of all, then the second ones, ..."""
    return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)


def concat(tensors: Sequence[Tensor], *, dim: int) -> Tensor:
    """All tensors, one after the other along `dim`."""
    return torch.cat(list(tensors), dim=dim)


def transpose(tensors: Sequence[Tensor], *, dims: Sequence[int]) -> Tensor:
    """Axes reordered to `dims`."""
    return copy(tensors).permute(*dims)


def pair(tensors: Sequence[Tensor], *, head_dim: int, to: str, dim: int = 0) -> Tensor:
    """Rows of each head reordered to a rotary pairing: `half` pairs i with i + d/2, `interleaved` 2i with 2i + 1."""
    shape = (-1, head_dim // 2, 2) if to == "half" else (-1, 2, head_dim // 2)
    return copy(tensors).unflatten(dim, shape).transpose(dim + 1, dim + 2).flatten(dim, dim + 2)


def add(tensors: Sequence[Tensor], *, value: float) -> Tensor:
    """Plus a constant, computed in fp32."""
    tensor = copy(tensors)
    return (tensor.float() + value).to(tensor.dtype)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """All tensors along a new first axis."""
    return torch.stack(list(tensors))


def fold(tensors: Sequence[Tensor], *, of: int) -> Tensor:
    """`[N * of, R, ...] -> [N, of * R, ...]`: every `of` entries one after the other along the second axis."""
    return copy(tensors).unflatten(0, (-1, of)).flatten(1, 2)


def take(tensors: Sequence[Tensor], *, index: int) -> Tensor:
    """Entry `index` of the first axis."""
    return copy(tensors)[index]


def reshape(tensors: Sequence[Tensor], *, shape: Sequence[int]) -> Tensor:
    """The same numbers in another shape; -1 stands for what is left."""
    return copy(tensors).reshape(*shape)


def negate(tensors: Sequence[Tensor]) -> Tensor:
    """With the other sign."""
    return -copy(tensors)


def log(tensors: Sequence[Tensor]) -> Tensor:
    """The natural logarithm, computed in fp32."""
    tensor = copy(tensors)
    return tensor.float().log().to(tensor.dtype)


def exp(tensors: Sequence[Tensor]) -> Tensor:
    """The exponential, computed in fp32."""
    tensor = copy(tensors)
    return tensor.float().exp().to(tensor.dtype)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "copy": copy,
    "expand_heads": expand_heads,
    "select_heads": select_heads,
    "slice": slice_,
    "part": part,
    "band": band,
    "weave": weave,
    "concat": concat,
    "transpose": transpose,
    "pair": pair,
    "add": add,
    "stack": stack,
    "fold": fold,
    "take": take,
    "reshape": reshape,
    "negate": negate,
    "log": log,
    "exp": exp,
}


def tensor_seed(name: str, seed: int) -> int:
    """The seed of one tensor: it depends on nothing but the tensor's full name and the user's seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def initial(init: Init, name: str, seed: int) -> Tensor:
    """The starting value `[*init.shape]`, fp32, of the new tensor with the full name `name`.

    Raises:
        ZooError: an unknown kind.
    """
    if init.kind not in KINDS:
        raise ZooError(f"init kind {init.kind!r} of {name} is unknown; it must be one of {', '.join(KINDS)}")
    generator = torch.Generator().manual_seed(tensor_seed(name, seed))
    value = KINDS[init.kind](init.shape, generator, **init.options)
    return value.reshape(init.shape).contiguous()


Shape = tuple[int, ...]


def _constant(shape: Shape, generator: torch.Generator, value: float) -> Tensor:
    return torch.full(shape, float(value))


def _normal(shape: Shape, generator: torch.Generator, std: float) -> Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _identity_conv(shape: Shape, generator: torch.Generator) -> Tensor:
    weight = torch.zeros(shape)
    weight[..., -1] = 1
    return weight


def _log_uniform(shape: Shape, generator: torch.Generator, low: float, high: float) -> Tensor:
    return torch.empty(shape).uniform_(math.log(low), math.log(high), generator=generator).exp()


def _linspace(shape: Shape, generator: torch.Generator, low: float, high: float) -> Tensor:
    return torch.linspace(low, high, math.prod(shape))


def _values(shape: Shape, generator: torch.Generator, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def orthogonal_features(shape: Shape, generator: torch.Generator) -> Tensor:
    """Gaussian rows `[M, K]` in blocks of K that are orthogonal to each other (Choromanski et al. 2020, arXiv
    2009.14794): each row has the distribution of a Gaussian vector, and their kernel estimate the lesser variance."""
    rows, dim = shape
    draws = torch.randn(-(-rows // dim), dim, dim, generator=generator, dtype=torch.float64, device="cpu")
    columns, triangle = torch.linalg.qr(draws)
    columns = columns * triangle.diagonal(dim1=1, dim2=2).sign()[:, None]  # without it the signs follow the draw
    directions = columns.mT.reshape(-1, dim)[:rows]
    lengths = torch.randn(rows, dim, generator=generator, dtype=torch.float64, device="cpu").norm(dim=-1, keepdim=True)
    return (directions * lengths).float()


KINDS: dict[str, Callable[..., Tensor]] = {
    "zeros": lambda shape, generator: torch.zeros(shape),
    "ones": lambda shape, generator: torch.ones(shape),
    "constant": _constant,
    "normal": _normal,
    "identity_conv": _identity_conv,
    "log_uniform": _log_uniform,
    "linspace": _linspace,
    "values": _values,
    "orthogonal_features": orthogonal_features,
}
