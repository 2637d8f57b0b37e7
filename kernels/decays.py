"""Log decays inside one chunk: the three forms behind one interface.

Shapes: `...` is [M, B, H] (chunks, batch, heads); C tokens of a chunk (a power of two), K channels.
Every exponent is the sum of the log decays between two tokens: never positive, and never the difference of two rounded
sums, so strong decay neither overflows nor loses digits.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zoo.kernels.packed import product


class NoDecay:
    """Every token stays."""

    def __init__(self, low: torch.dtype | None) -> None:
        self.low = low

    def scores(self, q: Tensor, k: Tensor, *, exclusive: bool = False, diagonal: bool = True) -> Tensor:
        return product(q, k.mT, self.low).tril(0 if diagonal else -1)

    def cross(self, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> list[list[Tensor]]:
        """`scores` of every one of `rows` with every one of `columns`."""
        return [[self.scores(q, k) for k in columns] for q in rows]

    def from_start(self, q: Tensor, *, exclusive: bool = False) -> Tensor:
        return q

    def to_end(self, k: Tensor) -> Tensor:
        return k

    def total(self) -> Tensor | None:
        return None


class HeadDecay(NoDecay):
    """One log decay per token and head, [..., C]."""

    def __init__(self, decay: Tensor, low: torch.dtype | None) -> None:
        self.low = low
        # Bounded where exp is zero anyway, so that -1e4 does not swamp the digits of the others; in fp64, where that
        # exists, so that differences of long sums keep fp32 accuracy.
        bounded = decay.clamp(min=-800.0 if decay.dtype == torch.float64 else -120.0)
        self.step = bounded if decay.device.type == "mps" else bounded.double()
        self.sum = self.step.cumsum(-1)
        self.dtype = decay.dtype
        self.inclusive: Tensor | None = None  # the delta rule scores twice under one matrix

    def _exp(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).exp()

    def _matrix(self, exclusive: bool) -> Tensor:
        """[..., C, C] of exp(decay from token j to token i), zero above the diagonal (and on it with `exclusive`)."""
        size = self.sum.shape[-1]
        seen = torch.ones(size, size, dtype=torch.bool, device=self.sum.device).tril(-1 if exclusive else 0)
        rows = self.sum - self.step if exclusive else self.sum
        gap = (rows[..., :, None] - self.sum[..., None, :]).to(self.dtype)
        return gap.masked_fill(~seen, -torch.inf).exp()

    def scores(self, q: Tensor, k: Tensor, *, exclusive: bool = False, diagonal: bool = True) -> Tensor:
        """[..., C, C]: (q_i . k_j) times the decay between them; `exclusive` leaves out the decay of token i itself."""
        if exclusive:
            return product(q, k.mT, self.low) * self._matrix(True)
        if self.inclusive is None:
            self.inclusive = self._matrix(False)
        scores = product(q, k.mT, self.low) * self.inclusive
        return scores if diagonal else scores.tril(-1)

    def from_start(self, q: Tensor, *, exclusive: bool = False) -> Tensor:
        """q times the decay since the chunk began."""
        return q * self._exp(self.sum - self.step if exclusive else self.sum)[..., None]

    def to_end(self, k: Tensor) -> Tensor:
        """k times the decay until the chunk ends."""
        return k * self._exp(self.sum[..., -1:] - self.sum)[..., None]

    def total(self) -> Tensor:
        """exp(decay over the chunk), [..., 1, 1]."""
        return self._exp(self.sum[..., -1])[..., None, None]


class ChannelDecay:
    """One log decay per token, head and channel, [..., C, K].

    The chunk is halved again and again: between the two halves of a block the decay factors at the border into a part
    of the row and a part of the column, so each level is one batched product.
    """

    def __init__(self, decay: Tensor, low: torch.dtype | None) -> None:
        self.low = low
        self.step = decay
        self.sum = decay.cumsum(-2)
        self.rest = _exclusive(decay.flip(-2).cumsum(-2)).flip(-2)

    def scores(self, q: Tensor, k: Tensor, *, exclusive: bool = False, diagonal: bool = True) -> Tensor:
        own = (q * k).sum(-1) if diagonal else torch.zeros_like(q[..., 0])
        blocks = own[..., None, None]
        for size, rows, columns in halves(self.step, exclusive):
            low = product(half(1, q, size) * rows.exp(), (half(0, k, size) * columns.exp()).mT, self.low)
            blocks = doubled(blocks, low)
        return blocks.squeeze(-3)

    def cross(self, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> list[list[Tensor]]:
        """All rows of a token stand together, and all columns: they share its decay."""
        r, p = len(rows), len(columns)
        q, k = torch.stack(list(rows), -2), torch.stack(list(columns), -2)
        blocks, q, k = q @ k.mT, q.flatten(-3, -2), k.flatten(-3, -2)
        for size, since, until in halves(self.step, False):
            left = half(1, q, size * r) * since.exp().repeat_interleave(r, -2)
            right = half(0, k, size * p) * until.exp().repeat_interleave(p, -2)
            blocks = doubled(blocks, product(left, right.mT, self.low))
        together = blocks.squeeze(-3).unflatten(-1, (-1, p)).unflatten(-3, (-1, r))  # [..., C, r, C, p]
        return [list(row.unbind(-1)) for row in together.unbind(-3)]

    def from_start(self, q: Tensor, *, exclusive: bool = False) -> Tensor:
        return q * (_exclusive(self.sum) if exclusive else self.sum).exp()

    def to_end(self, k: Tensor) -> Tensor:
        return k * self.rest.exp()

    def total(self) -> Tensor:
        """exp(decay over the chunk), [..., K, 1]."""
        return self.sum[..., -1, :, None].exp()

    def values(self, scores: Tensor, v: Tensor, *, exclusive: bool = False) -> Tensor:
        """[..., C, V]: sum over j of scores_ij v_j times the decay from j to i, for decay on the value axis."""
        out = (scores.diagonal(dim1=-2, dim2=-1)[..., None] * v)[..., None, :]
        for size, rows, columns in halves(self.step, exclusive):
            low = product(below(scores, size), half(0, v, size) * columns.exp(), self.low)
            first, second = pairs(out)
            out = torch.cat([first, second + rows.exp() * low], -2)
        return out.squeeze(-3)


Decay = NoDecay | HeadDecay | ChannelDecay


def _exclusive(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :]], -2)


def doubled(blocks: Tensor, low: Tensor) -> Tensor:
    """Diagonal blocks [..., n, size, size] joined in pairs with `low` between them: [..., n / 2, 2 size, 2 size]."""
    first, second = pairs(blocks)
    top = torch.cat([first, torch.zeros_like(low)], -1)
    return torch.cat([top, torch.cat([low, second], -1)], -2)


def pairs(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Every first and every second block of [..., n, size, D], by `unbind`: slices would fill gradients with zeros."""
    first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
    return first, second


def half(which: int, x: Tensor, size: int) -> Tensor:
    """First (0) or second halves of the blocks of 2 * size rows: [..., C, D] to [..., C / 2 size, size, D]."""
    return x.unflatten(-2, (-1, 2, size)).unbind(-3)[which]


def below(x: Tensor, size: int) -> Tensor:
    """The lower left quarters of the diagonal blocks of 2 * size: [..., C, C] to [..., C / 2 size, size, size]."""
    x = x.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))  # [..., n, 2, size, n, 2, size]
    return x[..., :, 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def halves(decay: Tensor, exclusive: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For block sizes 1, 2, .. C / 2: the size, the log decay from the middle of each block to its rows in the second
    half, and from the columns in the first half to the middle; each [..., C / 2 size, size, K]."""
    since = decay.unsqueeze(-2)  # [..., n, size, K] from the start of a block up to and with each token
    until = torch.zeros_like(since)  # from after each token to the end of its block
    for level in range(decay.shape[-2].bit_length() - 1):
        (first, second), (rest_first, rest_second) = pairs(since), pairs(until)
        yield 1 << level, _exclusive(second) if exclusive else second, rest_first
        since = torch.cat([first, second + first[..., -1:, :]], -2)
        until = torch.cat([rest_first + second[..., -1:, :], rest_second], -2)
