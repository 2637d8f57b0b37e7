"""Tiny models of transformers, and what the tests of methods inside them share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from zoo.architectures.core import methods

SIZES: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
WINDOWS = {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 512},
    "gemma2": {**WINDOWS, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "gemma3_text": {**WINDOWS, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "gpt2": {"n_positions": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 97},
}
QUEST = {"page": 16, "budget": 1.0}
ids = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(0))
padded = torch.ones_like(ids)
padded[0, :9] = 0
generate: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)


def dense(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
def stepwise(model: Any, mask: Tensor, cache: Any, last: int = 4) -> Tensor:
    """Logits `[B, T, V]` of the prompt in two chunks and of tokens one by one; then some of them once more."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    total = ids.shape[1]
    bounds = [0, 20, *range(total - last, total + 1)]

    def call(start: int, end: int) -> Tensor:
        options = dict(position_ids=positions[:, start:end], past_key_values=cache, use_cache=True)
        out: Tensor = model(ids[:, start:end], attention_mask=mask[:, :end], **options).logits
        return out

    parts = [call(start, end) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    if all(layer.is_croppable for layer in cache.layers):
        cache.crop(-3)
        parts += [call(start, start + 1) for start in range(total - 3, total)]
    return torch.cat(parts, 1)


def shown(logits: Tensor) -> Tensor:
    """Where `stepwise` gave the logits of real tokens."""
    return torch.cat([padded, padded[:, -3:]], 1)[:, : logits.shape[1]].bool()


def options_in(module: Any, args: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in args.items() if name not in methods.COMMON}
