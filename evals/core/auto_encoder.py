"""MAD's model for compression: a causal model reads a row, and a small network reads the row back from its last state.

B batch, L length, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class AutoEncoder(nn.Module):
    """`encoder` with a decoder of two hidden layers that do not expand (Poli et al. 2024, arXiv:2403.17844).

    Args:
        encoder: a causal language model; its hidden states are used, not its logits.
    """

    reads_rows_back = True

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        width = encoder.config.hidden_size
        self.decoder = nn.Sequential(
            nn.RMSNorm(width), nn.Linear(width, width), nn.GELU(),
            nn.RMSNorm(width), nn.Linear(width, width), nn.GELU(),
            nn.RMSNorm(width), nn.Linear(width, encoder.config.vocab_size),
        )  # fmt: skip

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """Logits `[B, L, V]` of the tokens of `input_ids [B, L]`, from the state after the last of them."""
        hidden = self.encoder.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[:, -1:]
        return SimpleNamespace(logits=self.decoder(hidden + places(input_ids.shape[1], hidden)))


def places(length: int, like: Tensor) -> Tensor:
    """Sines and cosines `[L, D]` that name a position."""
    half = like.shape[-1] // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half, device=like.device) / max(1, half - 1))
    angles = torch.arange(length, device=like.device)[:, None] * rates
    found = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.nn.functional.pad(found, (0, like.shape[-1] - 2 * half)).to(like.dtype)
