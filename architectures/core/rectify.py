"""Rectification of the cache (ReSA, Sun et al. 2025, arXiv 2506.04108): tokens that were decoded with few keys pass
through the model again, densely and all at once, and their keys and values are rewritten.

B batch, S tokens so far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from zoo.architectures.core.cache import LayerCache
from zoo.errors import ZooError

NAMES = ("pages", "seen")  # notes of `core/pages.py`, which still hold for the tokens before those taken back


@torch.no_grad()
def rectify(model: Any, cache: Cache, ids: Tensor, tokens: int, attention_mask: Tensor | None = None) -> None:
    """Rewrite what the cache holds of its last `tokens` tokens, at least 2: as if they had been prefilled.

    Args:
        model: a causal language model, ours or one of transformers'.
        ids: `[B, n]`, the last n tokens in the cache, `tokens` or more.
        attention_mask: `[B, S]`, where some are padding.

    Raises:
        ZooError: a layer keeps something beside keys and values.
    """
    for layer in cache.layers:
        if not isinstance(layer, LayerCache):
            layer.crop(tokens)
            continue
        kept = {name: layer.notes[name] for name in NAMES if name in layer.notes}
        try:
            layer.rewind(tokens)
        except RuntimeError as error:
            raise ZooError(f"{error}; give the layers that rectify frequency 0") from None
        layer.notes.update(kept)
        layer.unrectified = 0
    inputs: dict[str, Any] = {} if attention_mask is None else {"attention_mask": attention_mask}
    model(ids[:, -tokens:], past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)


def rectify_decoded(
    model: Any, cache: Cache, ids: Tensor, new: int, attention_mask: Tensor | None, continued: bool
) -> None:
    """Called before `generate` feeds the last `new` of `ids [B, n]`: rectifies once as many tokens as the model's
    layers ask for were decoded, and whatever was decoded before a new prompt is read (`continued`)."""
    mixers = (getattr(block.mixer, "rectified_every", 0) for block in model.model.layers)
    every = min(filter(None, mixers), default=0)
    if not every or not cache.layers or not isinstance(cache.layers[0], LayerCache):
        return
    decoded = cache.layers[0].unrectified
    if decoded >= (1 if continued else every):
        mask = None if attention_mask is None else attention_mask[:, : attention_mask.shape[1] - new]
        rectify(model, cache, ids[:, : ids.shape[1] - new], max(decoded, 2), mask)
    for layer in () if continued else cache.layers:
        layer.unrectified += new
