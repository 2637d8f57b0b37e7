"""The contract of token mixers and channels.

B batch, T new tokens, D hidden size, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from zoo.architectures.core.config import DecoderConfig, build

if TYPE_CHECKING:
    from zoo.architectures.core.cache import LayerCache
    from zoo.architectures.core.plan import AttentionSpec, MixerPlan, Start

Phase = Literal["train", "prefill", "decode"]
Output = Tensor | tuple[Tensor, dict[str, Tensor]]
TensorT = TypeVar("TensorT", bound=Tensor)


@dataclass(frozen=True)
class Context:
    """What every layer of one forward call sees.

    Args:
        phase: "train" (no cache), "prefill" (cache still empty) or "decode"; never guessed from T.
        positions: `[B, T]` int64, position of each token in its own sequence (padding does not count).
        padding_mask: `[B, T]` bool, True on real tokens; None when every token is real.
        cu_seqlens: `[N + 1]` int32 boundaries of packed sequences, B = 1; None when not packed.
        max_seqlen: length of the longest packed sequence, in tokens.
        ropes: per rotary table, `(cos, sin)` of shape `[B, T, dim]`.
        values: tensors that earlier layers wrote and this one declared in `reads`.
        eager: compute softmax attention by plain matrix products (transformers' "eager"), not SDPA.
    """

    phase: Phase
    positions: Tensor
    causal: bool = True
    padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    ropes: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)
    eager: bool = False

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Context:
        """The context on another device, for models spread over several."""

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value

        return replace(
            self,
            positions=move(self.positions),
            padding_mask=move(self.padding_mask),
            cu_seqlens=move(self.cu_seqlens),
            ropes={name: (move(cos), move(sin)) for name, (cos, sin) in self.ropes.items()},
            values={name: move(value) for name, value in self.values.items()},
        )

    def mask(self, x: Tensor) -> Tensor:
        """`x [B, T, ...]` with zeros on padding, so that padding leaves no trace in a state."""
        if self.padding_mask is None:
            return x
        return x * self.padding_mask.view(*self.padding_mask.shape, *[1] * (x.dim() - 2)).to(x.dtype)

    def narrow(self, length: int) -> Context:
        """The context of the first `length` tokens."""
        return replace(
            self,
            positions=self.positions[:, :length],
            padding_mask=None if self.padding_mask is None else self.padding_mask[:, :length],
            ropes={name: (cos[:, :length], sin[:, :length]) for name, (cos, sin) in self.ropes.items()},
            values=narrow_values(self.values, self.positions.shape[1], length),
        )


@dataclass(frozen=True, kw_only=True)
class Args:
    """Base of the argument dataclasses of mixers and channels."""

    def check(self, config: DecoderConfig) -> None:
        """Raise `ZooError` if these arguments cannot stand in a decoder of `config`."""


class Part(nn.Module):
    """A mixer or a channel: `forward(x, ctx, cache) -> y`, or `(y, {name: tensor})` when it declares `writes`.

    A file in `mixers/` or `channels/` exports its class as `MODULE`. A value written for later layers is `[B, T, ...]`,
    or `[B, S, ...]` with the new tokens last (keys and values of all tokens so far).
    """

    options: ClassVar[type[Args]] = Args
    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ()
    packed: ClassVar[bool] = True  # honours cu_seqlens
    rollback: ClassVar[bool] = True  # its cache can go back within the last call
    phase_consistent: ClassVar[bool] = True  # prefill + decode compute the same function as one forward
    encoder_only: ClassVar[bool] = False  # sees tokens to come: for masked language models alone
    bidirectional: ClassVar[bool] = False  # a mixer that can also see tokens to come, when `ctx.causal` is False
    chooses: ClassVar[bool] = False  # which tokens it reads is a choice that rounding can turn

    @classmethod
    def parse(cls, args: Mapping[str, Any]) -> Any:
        """Typed arguments from a mapping; an unknown or missing one raises `ZooError`."""
        return build(cls.options, args)

    @classmethod
    def reads_of(cls, args: Any) -> tuple[str, ...]:
        """Names of the values that a part with these (typed) arguments reads from earlier layers."""
        return cls.reads

    @classmethod
    def writes_of(cls, args: Any) -> tuple[str, ...]:
        """Names of the values that a part with these (typed) arguments writes for later layers."""
        return cls.writes

    def forward(self, x: Tensor, ctx: Context, cache: LayerCache | None = None) -> Output:
        raise TypeError(f"{type(self).__name__} must define forward")

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        """Bytes of cache for one sequence of `length` tokens; `itemsize` is that of the model's dtype."""
        return 0

    def init_weights(self, std: float) -> None:
        """Initialise the parameters that are not plain linear layers; `std` is the model's initializer_range."""


class Mixer(Part):
    """A token mixer. `from_attention` is defined where softmax attention can be turned into it."""

    layer_type: ClassVar[str] = "zoo_recurrent"  # transformers' word for it, in `config.layer_types`
    by_head: ClassVar[bool] = True  # `from_attention` can take some heads of a layer
    keeps_softmax: ClassVar[bool] = False  # `from_attention` takes all options of softmax attention, or says which not
    starts: ClassVar[tuple[Start, ...]] = ()  # new tensors of `from_attention` that can start from measurements

    @classmethod
    def layer_type_of(cls, args: Mapping[str, Any]) -> str:
        """The word for a layer with these arguments."""
        return cls.layer_type

    @classmethod
    def default_args(cls, hidden_size: int, heads: int) -> dict[str, Any]:
        """What a layout string that names this mixer alone means: the sizes that `Args` requires."""
        usual = {"heads": heads, "head_dim": hidden_size // heads}
        required = (f.name for f in fields(cls.options) if f.default is MISSING)
        return {name: usual[name] for name in required if name in usual}

    @classmethod
    def from_attention(cls, spec: AttentionSpec, heads: tuple[int, ...] | None = None) -> MixerPlan:
        """Which tensors of softmax attention go through which operation to which parameter, and how new ones start."""
        from zoo.errors import ZooError

        raise ZooError(f"mixer {cls.__module__.rpartition('.')[2]!r} cannot be made from softmax attention")

    @classmethod
    def starts_of(cls, args: Any) -> tuple[Start, ...]:
        """`starts` of a mixer with these (typed) arguments."""
        return cls.starts

    def mix_values(self, x: Tensor, v: Tensor, ctx: Context, cache: LayerCache | None = None) -> Tensor:
        """What each head reads of the values `v [B, T, H, V]` for the input `x [B, T, D]`: `[B, T, H, V]`, linear in
        `v`, before norm, gate and output projection. With the basis vectors of time as values it is the head's mixing
        matrix."""
        from zoo.errors import ZooError

        raise ZooError(f"mixer {type(self).__name__} has no matrix by which each head mixes its values")

    def expanded_qkv(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, T, H, D]` after bias, qk-norm and RoPE, before feature map, convolution or
        normalisation, with KV heads expanded as `h // group`: softmax over these is the source's attention."""
        from zoo.errors import ZooError

        raise ZooError(f"mixer {type(self).__name__} has no softmax counterpart")


def narrow_values(values: Mapping[str, Tensor], tokens: int, length: int) -> dict[str, Tensor]:
    """Values as they were with the first `length` of a call's `tokens` tokens. Each is `[B, T, ...]` or `[B, S, ...]`.

    The buffers of a static cache are narrowed at an end that no token has reached yet.
    """
    return {name: value[:, : value.shape[1] - tokens + length] for name, value in values.items()}


def keep_fp32(parameter: TensorT) -> TensorT:
    """Mark a decay parameter, or a buffer: it stays fp32 under bf16 and gets no weight decay."""
    parameter._zoo_fp32 = True  # type: ignore[attr-defined]
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def grouped(x: Tensor, heads: int) -> Tensor:
    """`[B, T, H * K] -> [B, T, H, K]`."""
    return x.unflatten(-1, (heads, -1))


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """`[B, T, Hkv, K] -> [B, T, Hkv * groups, K]`, head `h` reading KV head `h // groups`."""
    return x if groups == 1 else torch.repeat_interleave(x, groups, dim=2)


def along(x: Tensor, index: Tensor) -> Tensor:
    """The tokens `index [B, N]` of each row of `x [B, T, ...]`, `[B, N, ...]`."""
    return torch.take_along_dim(x, index.view(*index.shape, *[1] * (x.dim() - 2)), dim=1)


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is when fp64: the dtype of gates, norms and states."""
    return x if x.dtype == torch.float64 else x.float()


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states beside `x`: fp32, or fp64 beside fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
