"""The contract of block forms: how norms, residuals, mixer and channel are wired.

B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from zoo import registry
from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.mixer import Args, Context, Mixer, Part, narrow_values


class Block(GradientCheckpointingLayer):
    """One residual layer. A file in `blocks/` exports its subclass as `MODULE`.

    A subclass makes its norms in `build` and defines `wire`; `mix` and `transform` run the two parts.
    """

    options: ClassVar[type[Args]] = Args
    mixer: Mixer | None
    channel: Part | None

    def __init__(self, config: DecoderConfig, layer: Layer) -> None:
        super().__init__()
        self.reads: tuple[str, ...] = ()
        self.mixer = self._part("mixers", layer.mixer, layer.mixer_args, config)
        self.channel = self._part("channels", layer.channel, layer.channel_args, config)
        self.build(config, type(self).parse(layer.block_args))

    @classmethod
    def parse(cls, args: object) -> Args:
        from zoo.architectures.core.config import build

        return build(cls.options, args)  # type: ignore[arg-type]

    def _part(self, kind: str, name: str | None, args: object, config: DecoderConfig):  # type: ignore[no-untyped-def]
        if name is None:
            return None
        cls = registry.get(kind, name, "MODULE")
        parsed = cls.parse(args)
        self.reads += cls.reads_of(parsed)
        return cls(config, parsed)

    def build(self, config: DecoderConfig, args: Args) -> None:
        """Make norms and other parts of the wiring."""

    def wire(self, x: Tensor, run: Run) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define wire")

    def forward(
        self, x: Tensor, ctx: Context, cache: LayerCache | None = None, values: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`x [B, T, D]` to `(x [B, T, D], values written for later layers)`; `values` are those of earlier layers."""
        ctx = replace(ctx, values=values) if values else ctx
        run = Run(self, ctx, cache)
        return self.wire(x, run), run.written

    def replay(self, x: Tensor, ctx: Context, cache: LayerCache, values: dict[str, Tensor], length: int) -> None:
        """Bring `cache` from before a call to after its first `length` tokens."""
        with torch.no_grad():
            self.forward(x[:, :length], ctx.narrow(length), cache, narrow_values(values, x.shape[1], length))
        cache.advance(length)

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        """Bytes of cache for one sequence of `length` tokens."""
        return sum(part.state_bytes(length, itemsize) for part in (self.mixer, self.channel) if part is not None)


class Run:
    """One call of a block: runs its parts with the call's context and collects what they write."""

    def __init__(self, block: Block, ctx: Context, cache: LayerCache | None) -> None:
        self.block, self.ctx, self.cache = block, ctx, cache
        self.written: dict[str, Tensor] = {}

    def _run(self, part: Part, x: Tensor, cache: object) -> Tensor:
        out = part(x, self.ctx, cache)
        if isinstance(out, tuple):
            self.written.update(out[1])
            return out[0]
        return out

    def mix(self, x: Tensor) -> Tensor:
        """The token mixer of `x [B, T, D]`."""
        assert self.block.mixer is not None
        return self._run(self.block.mixer, x, self.cache)

    def transform(self, x: Tensor) -> Tensor:
        """The channel of `x [B, T, D]`; its state, if any, is nested under `channel/`."""
        assert self.block.channel is not None
        return self._run(self.block.channel, x, None if self.cache is None else self.cache.view("channel"))
