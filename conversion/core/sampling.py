"""Rows sampled from the teacher itself, for healing without any data.

B rows of a batch, N rows, L tokens per row, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache


@torch.no_grad()
def sample_rows(
    model: Any, start: list[int], count: int, length: int, seed: int, batch: int = 256
) -> NDArray[np.int32]:
    """Rows [N, L] drawn at temperature 1 from `model` after the ids `start`; an end token does not end a row.

    The same seed gives the same rows on the same device.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    parts = [sample_batch(model, start, min(batch, count - done), length, generator) for done in range(0, count, batch)]
    return torch.cat(parts).cpu().numpy().astype(np.int32)


def sample_batch(model: Any, start: list[int], count: int, length: int, generator: torch.Generator) -> Tensor:
    """Rows [B, L] through a growing cache: one of fixed size would be read to its end for every token."""
    prompt = start[: length - 1]
    rows = torch.empty(count, length, dtype=torch.long, device=model.device)
    rows[:, : len(prompt)] = torch.tensor(prompt, device=model.device)
    cache = DynamicCache(config=model.config)
    fed = 0
    for end in range(len(prompt), length):
        out = model(rows[:, fed:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
        rows[:, end] = draw(out.logits[:, -1], generator)
        fed = end
    return rows


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One id per row of logits [B, V], by the exponential race: no sum over the vocabulary, no host sync."""
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
    return (logits.float() - noise.log()).argmax(-1)
