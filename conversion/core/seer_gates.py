"""Distillation of SeerAttention's gates (Gao et al. 2024, arXiv 2410.13276) from the attention of the model itself.

    target_b = max of softmax(scale q K^T) over block b's keys, and over the queries of a block (prefill gate) or the
               heads of a KV head (decode gate), as shares of the past blocks
    loss = KL(target || score), mean over the rows with two past blocks or more, of all gates of all layers

The model is frozen; only gates learn, each from its own layer's inputs, so that one forward pass serves all.

B batch, T tokens, R rows, N blocks that ended, H query heads, G KV heads, K head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.mixer import Context, wide
from zoo.architectures.core.watched import watched
from zoo.architectures.core.windows import ended
from zoo.errors import ZooError
from zoo.kernels.checks import default_scale

MIXER = "seer_attention"


def gated_layers(model: Any) -> list[int]:
    """The layers of a model that have gates."""
    return [index for index, layer in enumerate(model.config.layers) if layer.get("mixer") == MIXER]


def train_gates(
    model: Any, batches: Iterable[Tensor], *, lr: float = 1e-3, budget: Any = None, threshold: float | None = None
) -> list[float]:
    """Train the gates of all layers of a `ZooForCausalLM`, whose other weights stay as they are.

    Args:
        batches: token ids `[B, T]` without padding, of more than two blocks; each is one step of AdamW.
        budget, threshold: what the layers choose by from now on (None: as before).

    Returns:
        The loss of each step, in nats.

    Raises:
        ZooError: no layer has gates, or there were no batches.
    """
    layers = gated_layers(model)
    if not layers:
        raise ZooError(f"no layer of this model is {MIXER}; convert some layers first")
    mixers = {index: model.model.layers[index].mixer for index in layers}
    weights = [weight for mixer in mixers.values() for weight in mixer.gates.buffers()]
    losses = []
    with learning(list(mixers.values()), weights):
        optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
        for ids in batches:
            with torch.no_grad(), watched(model, layers) as seen:
                model.model(input_ids=ids, use_cache=False)
            loss = torch.stack([gate_loss(mixers[i], seen[i].x, seen[i].ctx) for i in layers]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    if not losses:
        raise ZooError("there were no batches; the gates have learned nothing")
    for index in layers:
        _mark(model, index, {"trained": True} | _given(budget=budget, threshold=threshold))
    return losses


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _mark(model: Any, index: int, options: dict[str, Any]) -> None:
    """Set options of a layer's mixer, in the config that is saved with it."""
    mixer = model.model.layers[index].mixer
    mixer.args = replace(mixer.args, **options)
    mixer.args.check_method()
    model.config.layers[index]["mixer_args"] |= options


@contextmanager
def learning(mixers: Sequence[Any], weights: Sequence[Tensor]) -> Iterator[None]:
    """Attention is dense and the gates' weights have gradients."""
    for mixer in mixers:
        mixer.learning = True
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.learning = False
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def gate_loss(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    """Mean KL in nats of one layer's gates, from the layer's inputs `x [B, T, D]`.

    Raises:
        ZooError: the text has fewer than three blocks.
    """
    block = mixer.args.block
    with torch.no_grad():
        plain, k = mixer.plain_queries(x)[0], mixer.plain_keys(x)
        q, rotated = mixer.rotated_queries(plain, ctx), mixer.rotated(k, "k_norm", ctx)
    found = ended({"gate_k": k}, replace(ctx, padding_mask=None), None, block, block)
    if found.index.shape[0] < 3:
        raise ZooError(f"the text has {x.shape[1]} tokens; gates learn from three blocks of {block} or more")
    keys = {phase: mixer.gate_keys(phase, found) for phase in mixer.gates}
    positions, sums, rows = ctx.positions.expand(x.shape[:2]), x.new_zeros((), dtype=torch.float32), 0
    for begin in range(2 * block, x.shape[1], block):
        part = slice(begin, min(begin + block, x.shape[1]))
        at, past = positions[:, part], begin // block
        strongest = block_maxima(q[:, part], rotated[:, : part.stop], at, block, past, mixer.args.scale)
        for phase, known in keys.items():
            target = shares(strongest, phase, mixer.kv_heads)
            queries = mixer.gate_queries(phase, plain[:, part], at)
            step = block if phase == "prefill" else 1
            scores = mixer.gate_scores(queries, known[:, :past], at[:, ::step])[0]
            sums = sums + (target * (target.clamp(min=1e-20).log() - scores)).sum().to(sums.dtype)
            rows += target[..., 0].numel()
    return sums / rows


@torch.no_grad()
def block_maxima(q: Tensor, k: Tensor, at: Tensor, block: int, past: int, scale: float | None) -> Tensor:
    """The largest attention of each query to a key of each of the `past` first blocks, `[B, H, R, past]`.

    q: `[B, R, H, K]` at positions `at [B, R]`; k: `[B, S, G, K]`, up to the last query's.
    """
    scale = default_scale(scale, q)
    scores = scale * torch.einsum("brgxk,bsgk->bgxrs", wide(q).unflatten(2, (k.shape[2], -1)), wide(k)).flatten(1, 2)
    seen = torch.arange(k.shape[1], device=k.device) <= at[:, None, :, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return weights[..., : past * block].unflatten(-1, (past, block)).amax(-1)


def shares(strongest: Tensor, phase: str, kv_heads: int) -> Tensor:
    """Targets of a gate: `[B, H, 1, N]` of all queries together, or `[B, G, R, N]` of all heads of a KV head."""
    found = strongest.amax(2, keepdim=True) if phase == "prefill" else strongest.unflatten(1, (kv_heads, -1)).amax(2)
    return found / found.sum(-1, keepdim=True).clamp(min=1e-20)
