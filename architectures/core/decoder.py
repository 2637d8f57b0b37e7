"""The one decoder: embedding, layers, final norm. It knows residual streams, caches and layer order, and no family.

B batch, T new tokens, S all tokens so far, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from zoo import registry
from zoo.architectures.core.adopt import adopt
from zoo.architectures.core.block import Block
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import EMBEDDINGS, DecoderConfig
from zoo.architectures.core.mixer import Context, Phase
from zoo.architectures.core.norms import make_norm
from zoo.architectures.core.rope import RotaryTable
from zoo.errors import ZooError


@dataclass(frozen=True)
class Batch:
    """The input-side facts of a forward call, as the caller gave them (see `Context` for shapes)."""

    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    phase: Phase | None = None


class Decoder:
    """Layers of any mixers over one residual stream: what `ZooModel` is made of, apart from transformers' protocol."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module

    def build(self, config: DecoderConfig, causal: bool = True) -> None:
        """Make the submodules.

        Raises:
            ZooError: a mixer that cannot look in the direction of this model.
        """
        check_direction(config, causal)
        self.decoder_config, self.causal = config, causal
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.embed.learned_positions:
            self.embed_positions = nn.Embedding(config.embed.learned_positions, config.hidden_size)
        if config.embed.norm:
            self.embed_norm = make_norm(config.norm, config.hidden_size)
        blocks = [registry.get("blocks", layer.block, "MODULE")(config, layer) for layer in config.layers]
        self.layers = nn.ModuleList(blocks)
        self.shared = share_submodules(blocks, config)
        if config.head.norm:
            self.norm = make_norm(config.norm, config.hidden_size)
        self.ropes = nn.ModuleDict(
            {name: RotaryTable(rope, config.max_position_embeddings) for name, rope in config.ropes.items()}
        )

    def embed(self, ids: Tensor | None, embeds: Tensor | None, positions: Tensor) -> Tensor:
        x = self.embed_tokens(ids) if embeds is None else embeds
        config = self.decoder_config.embed
        if config.scale != 1.0:
            x = x * torch.tensor(config.scale, dtype=x.dtype, device=x.device)
        if config.learned_positions:
            x = x + self.embed_positions(positions)
        return self.embed_norm(x) if config.norm else x

    def run(self, ids: Tensor | None, embeds: Tensor | None, cache: Cache | None, batch: Batch, eager: bool) -> Tensor:
        """Hidden states `[B, T, D]` after the final norm."""
        shape = ids.shape if ids is not None else embeds.shape[:2]  # type: ignore[union-attr]
        device = ids.device if ids is not None else embeds.device  # type: ignore[union-attr]
        ctx = self._context(shape, device, cache, batch, eager)
        x = self.embed(ids, embeds, ctx.positions)
        values = {EMBEDDINGS: x}
        for index, block in enumerate(cast(Iterable[Block], self.layers)):
            layer_cache = None if cache is None else cache.layers[index]
            reads = {name: values[name] for name in block.reads if name in values}
            if layer_cache is not None and layer_cache.record_past:
                replay = partial(block.replay, x, ctx, layer_cache, reads)
                layer_cache.record(replay, shape[1])
            x, written = block(x, ctx, layer_cache, reads)
            values.update(written)
            if layer_cache is not None:
                layer_cache.advance(shape[1])
        return self.norm(x) if self.decoder_config.head.norm else x

    def context(self, ids: Tensor) -> Context:
        """What the layers are told when `ids [B, T]` are read without a cache."""
        return self._context(ids.shape, ids.device, None, Batch(), eager=False)

    def _context(
        self, shape: torch.Size, device: torch.device, cache: Cache | None, batch: Batch, eager: bool
    ) -> Context:
        layer = None if cache is None or not cache.layers else cache.layers[0]
        mask = real_tokens(batch.attention_mask, shape[1])
        if layer is not None and mask is not None:
            gaps = leaves_gaps(mask, layer.started)
            for each in cache.layers:  # type: ignore[union-attr]
                each.padded, each.gaps = True, each.gaps or gaps
        positions = token_positions(shape, device, batch, layer, mask)
        cu_seqlens = batch.cu_seqlens
        if cu_seqlens is None and cache is None and mask is None:
            cu_seqlens = boundaries(batch.position_ids)
        if cu_seqlens is not None:
            self._check_packed()
        return Context(
            phase=batch.phase or ("train" if layer is None else "decode" if layer.started else "prefill"),
            positions=positions,
            causal=self.causal,
            padding_mask=mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=batch.max_seqlen,
            ropes={name: table(positions) for name, table in self.ropes.items()},
            eager=eager,
        )

    def _check_packed(self) -> None:
        blocks = cast(Iterable[Block], self.layers)
        parts = (part for block in blocks for part in (block.mixer, block.channel) if part is not None)
        if names := sorted({type(part).__name__ for part in parts if not part.packed}):
            raise ValueError(f"{', '.join(names)} cannot keep packed sequences apart; give every sequence a row")

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        """Bytes of cache for one sequence of `length` tokens, all layers."""
        return sum(cast(Block, layer).state_bytes(length, itemsize) for layer in self.layers)


def encoder_only(config: DecoderConfig) -> bool:
    """Whether some layer sees tokens to come whatever it is asked, so that only a masked language model can use it."""
    return any(registry.get("mixers", x.mixer, "MODULE").encoder_only for x in config.layers if x.mixer is not None)


def check_direction(config: DecoderConfig, causal: bool) -> None:
    """Raise `ZooError` for a mixer that looks ahead in a causal model, or only back in a bidirectional one."""
    for index, layer in enumerate(config.layers):
        if layer.mixer is None:
            continue
        cls = registry.get("mixers", layer.mixer, "MODULE")
        if causal and cls.encoder_only:
            raise ZooError(
                f"layer {index} ({layer.mixer}) sees tokens to come and cannot predict them; use ZooForMaskedLM"
            )
        if not causal and not (cls.encoder_only or cls.bidirectional):
            raise ZooError(
                f"layer {index} ({layer.mixer}) only looks back; a masked language model needs mixers that see both "
                "sides, such as attention"
            )


def share_submodules(blocks: list[Any], config: DecoderConfig) -> dict[str, str]:
    """Make layers with the same share key use one copy of that submodule.

    Returns `{name of the copy: name of the first}`, both relative to the decoder.
    """
    first: dict[str, tuple[str, nn.Module]] = {}
    shared = {}
    for index, (block, layer) in enumerate(zip(blocks, config.layers, strict=True)):
        for path, key in layer.share.items():
            name = f"layers.{index}.{path}"
            if key not in first:
                first[key] = (name, block.get_submodule(path))
                continue
            parent, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(parent), leaf, first[key][1])
            shared[name] = first[key][0]
    return shared


def leaves_gaps(mask: Tensor, started: bool) -> bool:
    """Whether padding of a call, `mask [B, T]` True on real tokens, will lie behind real tokens in the cache.

    One token on a GPU is taken to be real, as to look would cost a wait for every token.
    """
    if torch.compiler.is_compiling() or (mask.is_cuda and mask.shape[1] == 1):
        return False
    return bool((~mask).any()) if started else bool((mask[:, :-1] & ~mask[:, 1:]).any() | (~mask[:, -1]).any())


def real_tokens(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """`[B, T]` True on real tokens, from a `[B, S]` mask; None when all S are real (read on the host in eager mode)."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions; it must be [batch, tokens]")
    if not torch.compiler.is_compiling() and bool(attention_mask.bool().all()):
        return None
    return attention_mask[:, -tokens:].bool()


def token_positions(
    shape: torch.Size, device: torch.device, batch: Batch, cache: LayerCache | None, mask: Tensor | None
) -> Tensor:
    """`[B, T]`: each token's position in its own sequence, not counting padding."""
    if mask is not None and batch.attention_mask is not None:
        counted = batch.attention_mask.long().cumsum(-1) - 1
        return counted[:, -shape[1] :].clamp(min=0)
    if batch.position_ids is not None:
        return batch.position_ids.expand(shape)
    steps = torch.arange(shape[1], device=device)
    if batch.cu_seqlens is not None:
        starts = batch.cu_seqlens.long()
        owner = torch.searchsorted(starts, steps, right=True) - 1
        return (steps - starts[owner])[None]
    past = 0 if cache is None else cache.cumulative_length
    past = past.to(device) if isinstance(past, Tensor) else past
    return (steps + past).expand(shape)


def boundaries(position_ids: Tensor | None) -> Tensor | None:
    """`cu_seqlens` of a packed row, told by positions that start again at 0 (transformers' flattening collator)."""
    if position_ids is None or position_ids.shape[0] != 1 or torch.compiler.is_compiling():
        return None
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    if len(starts) < 2 or int(starts[0]) != 0:
        return None
    end = torch.tensor([position_ids.shape[1]], device=starts.device)
    return torch.cat([starts, end]).int()


def prepare_cache(cache: Cache | None, use_cache: bool, layers: int) -> Cache | None:
    """The cache with our layers in it, or None when caching is off and none was given."""
    return adopt(cache, layers) if use_cache or cache is not None else None
