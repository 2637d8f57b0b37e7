"""Hashes of random planes and rotations, against angles and axes written out."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.architectures.core import lsh


def test_hashes_agree_as_often_as_the_angle_says() -> None:
    x = torch.tensor([[1.0, 0.0], [math.cos(1.0), math.sin(1.0)]])
    planes = lsh.draw((20000, 1, 2), 0)
    codes = lsh.sign_codes(x[None, :, None], planes)[0, :, 0]
    assert (codes[0] == codes[1]).double().mean().item() == pytest.approx(1 - 1 / math.pi, abs=0.01)
    found = lsh.collision(torch.tensor(math.cos(1.0)), 3, 5).item()
    p = (1 - 1 / math.pi) ** 3
    assert found == pytest.approx(sum(math.comb(5, n) * p**n * (1 - p) ** (5 - n) for n in range(2, 6)), rel=1e-6)
    assert lsh.collision(torch.tensor(-1.0), 10, 150).item() == pytest.approx(0, abs=1e-12)


def test_a_rotation_bucket_is_the_nearest_of_its_axes() -> None:
    x, rotations = torch.randn(1, 9, 2, 4), torch.randn(3, 2, 4, 5)
    buckets = lsh.rotation_buckets(x, rotations)
    assert buckets.shape == (1, 9, 2, 3)
    for s in range(9):
        for h in range(2):
            for r in range(3):
                turned = x[0, s, h] @ rotations[r, h]
                assert buckets[0, s, h, r] == torch.cat([turned, -turned]).argmax()
