"""Checks that run new layers in several ways that must agree: by each kernel, token by token, and beside padding.

B batch, T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.checkpoint import Checkpoint
from zoo.architectures.core.watched import main_output
from zoo.conversion.core import models
from zoo.conversion.core.planner import Plan
from zoo.conversion.core.verify import TOLERANCE, Check, bounded, error, layer_mixer, skipped, with_context
from zoo.kernels import dispatch

BACKENDS = ("chunked", "triton")
GPU_TOLERANCE = 1e-2  # fp32 with products in tf32
PADS = 7


def kernels(plan: Plan, out: Checkpoint, hidden: Mapping[int, list[Tensor]]) -> Check:
    """New layers by every backend that can run them equal their reference loops: in fp64, on a GPU in fp32."""
    cuda = torch.cuda.is_available()
    place: tuple[str, torch.dtype] = ("cuda", torch.float32) if cuda else ("cpu", torch.float64)
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for index in plan.swaps:
        mixer = layer_mixer(plan, index, out.get, plan.config.decoder_config.layers[index])
        x, ctx = next(with_context(plan, hidden[index][-1:]))
        expected = _run("reference", mixer, x, ctx)
        mixer.to(*place)
        for backend in BACKENDS:
            try:
                found = _run(backend, mixer, x.to(*place), ctx.to(place[0]))
                errors[f"{index} {backend}"] = error(expected, found.cpu())
            except ValueError as reason:
                reasons[backend] = str(reason)
    if not errors:
        return skipped(f"no backend beside the reference runs these layers here ({reasons})")
    return bounded(errors, GPU_TOLERANCE if cuda else TOLERANCE) | ({"not_run": reasons} if reasons else {})


@torch.no_grad()
def _run(backend: str, mixer: Any, x: Tensor, ctx: Any) -> Tensor:
    with dispatch.use(backend):
        return main_output(mixer(x, ctx))


def decode(plan: Plan, model: Any, ids: Tensor) -> Check:
    """A prefill of half the tokens and then single tokens through the cache give the logits of one forward."""
    if inconsistent := _without(plan, model, "phase_consistent"):
        return skipped(f"layer {inconsistent[0]} decodes by another function than it prefills")
    expected, half = models.logits(model, ids), ids.shape[1] // 2
    cache: Any = None
    parts: list[Tensor] = []
    with torch.no_grad():
        for piece in ids.split([half, *[1] * (ids.shape[1] - half)], dim=1):
            found = model(piece, past_key_values=cache, use_cache=True)
            cache, parts = found.past_key_values, [*parts, found.logits]
    return bounded({"logits": error(expected, torch.cat(parts, dim=1))})


def padding(model: Any, ids: Tensor) -> Check:
    """In a batch, a row and a shorter one with padding on its left have the logits that each has alone."""
    short = ids[1:2, PADS:]
    batch = torch.cat([ids[:1], torch.cat([torch.zeros_like(ids[1:2, :PADS]), short], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :PADS] = 0
    with torch.no_grad():
        found = model(batch, attention_mask=mask, use_cache=False).logits
    alone = models.logits(model, ids[:1]), models.logits(model, short)
    return bounded({"long": error(alone[0], found[:1]), "padded": error(alone[1], found[1:, PADS:])})


def _without(plan: Plan, model: Any, flag: str) -> list[int]:
    return [index for index in plan.swaps if not getattr(model.model.layers[index].mixer, flag)]
