"""Packed sequences."""

from __future__ import annotations

from typing import Any

import torch


def packed(*lengths: int) -> tuple[dict[str, Any], int, int]:
    """The option cu_seqlens for sequences of these lengths, how many tokens they have and how many they are."""
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return {"cu_seqlens": ends}, int(ends[-1]), len(lengths)
