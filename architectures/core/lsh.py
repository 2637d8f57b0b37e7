"""Locality-sensitive hashing of vectors by their direction.

    sign_codes        which side of P random planes a vector lies on, as P bits (SimHash, Charikar 2002): two vectors at
                      angle a agree in a bit with probability p = 1 - a / pi
    rotation_buckets  argmax of [x R, -x R] for a random R (Andoni et al. 2015, arXiv 1509.02897)

K width of the vectors, L hash tables, P bits of a code, R rounds, N buckets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.architectures.core.choosing import slices
from zoo.architectures.core.mixer import wide

MOST_BITS = 15  # of a code of 16 bits with a sign


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers, fp32, the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sign_codes(x: Tensor, planes: Tensor) -> Tensor:
    """Codes `[B, S, G, L]`, int16, of `x [B, S, G, K]` by `planes [L, P, K]`."""
    tables, bits, width = planes.shape
    places = 2 ** torch.arange(bits, device=x.device)
    normals = planes.to(wide(x[:, :0])).flatten(0, 1).mT
    codes = torch.empty(*x.shape[:-1], tables, dtype=torch.int16, device=x.device)
    for part in slices(x.shape[1], x.shape[0] * x.shape[2] * tables * bits):
        sides = (wide(x[:, part]) @ normals).unflatten(-1, (tables, bits)) > 0
        codes[:, part] = (sides * places).sum(-1).to(torch.int16)
    return codes


def agreements(codes: Tensor, own: Tensor) -> Tensor:
    """In how many tables the codes `[B, S, G, L]` are those of a query `[B, G, M, L]`: `[B, G, M, S]`."""
    b, s, g, tables = codes.shape
    found = torch.empty(b, g, own.shape[2], s, dtype=torch.int16, device=codes.device)
    for part in slices(s, b * g * own.shape[2] * tables):
        same = codes[:, part].movedim(1, 2)[:, :, None] == own[:, :, :, None]
        found[..., part] = same.sum(-1).to(torch.int16)
    return found


def collision(cosine: Tensor, bits: int, tables: int) -> Tensor:
    """The probability, fp64, that two vectors of this cosine share their codes in two tables or more."""
    same = 1 - torch.arccos(cosine.double().clamp(-1, 1)) / math.pi
    once = same**bits
    none = tables * torch.log1p(-once.clamp(max=1 - 1e-15))
    return -torch.expm1(none) - tables * once * torch.exp(none * (tables - 1) / tables)


def rotation_buckets(x: Tensor, rotations: Tensor) -> Tensor:
    """Buckets `[B, S, H, R]` of `x [B, S, H, K]` by `rotations [R, H, K, N / 2]`."""
    turned = torch.einsum("bshk,rhkn->bshrn", wide(x.detach()), rotations.to(wide(x[:, :0]).dtype))
    return torch.cat([turned, -turned], -1).argmax(-1)
