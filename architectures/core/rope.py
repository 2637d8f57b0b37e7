"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): tables made by the decoder, applied by mixers.

B batch, T tokens, H heads, R rotated channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, initialization
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from zoo.architectures.core.config import Rope
from zoo.errors import ZooError

# "dynamic" frequencies, which change with every length, are left out
TYPES = ("default", "linear", "llama3", "yarn", "longrope")


class RotaryTable(nn.Module):
    """cos and sin of every position. `forward(positions [B, T]) -> (cos, sin)`, each `[B, T, R]` in fp32.

    `longrope` (Ding et al. 2024, arXiv 2402.13753) has two lists of frequencies: a row with a position at or beyond
    the length before stretching, `switch`, is turned by the long ones (of packed sequences the longest counts).
    """

    inv_freq: Tensor
    long_inv_freq: Tensor

    def __init__(self, rope: Rope, max_position: int) -> None:
        super().__init__()
        kind = rope.scaling.get("rope_type", "default")
        if kind not in TYPES:
            raise ZooError(f"rope_type {kind!r} is not supported; it must be one of {', '.join(TYPES)}")
        self.rope, self.max_position = rope, max_position
        self.switch: int | None = None
        if kind == "longrope":
            check_long_rope(rope)
            self.switch = rope.scaling["original_max_position_embeddings"]
        for name, value in self._tables().items():
            self.register_buffer(name, value.to(torch.empty(0).device), persistent=False)

    def _tables(self) -> dict[str, Tensor]:
        """The frequencies by name of their buffer, on the CPU."""
        with torch.device("cpu"):  # scaled ones need values, also where modules are made on the meta device
            if self.switch is None:
                inv_freq, self.attention_scaling = self._frequencies()
                return {"inv_freq": inv_freq}
            (short, self.attention_scaling), (long, _) = (self._frequencies(self.switch + step) for step in (0, 1))
            return {"inv_freq": short, "long_inv_freq": long}

    def _frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        rope, kind = self.rope, self.rope.scaling.get("rope_type", "default")
        if kind == "default":
            exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
            return 1.0 / (rope.theta**exponents), 1.0
        parameters = {**rope.scaling, "rope_theta": rope.theta}
        sizes = dict(head_dim=rope.dim, hidden_size=rope.dim, num_attention_heads=1)
        config = PreTrainedConfig(max_position_embeddings=self.max_position, **sizes)
        config.rope_parameters = parameters
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
        return inv_freq, float(scaling)

    def reset(self) -> None:
        """Fill the buffers again; needed when the module was made on the meta device."""
        for name, value in self._tables().items():
            initialization.copy_(self.get_buffer(name), value)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device_type=positions.device.type, enabled=False):
            inv_freq = self.inv_freq.float()
            if self.switch is not None:
                beyond = positions.amax(-1, keepdim=True)[..., None] >= self.switch
                inv_freq = torch.where(beyond, self.long_inv_freq.float(), inv_freq)
            angles = positions[..., None].float() * inv_freq
            paired = torch.cat([angles, angles], -1) if self.rope.pairing == "half" else angles.repeat_interleave(2, -1)
            return paired.cos() * self.attention_scaling, paired.sin() * self.attention_scaling

    def turn_back(self, x: Tensor, steps: Tensor) -> Tensor:
        """`x [B, T, H, K]`, rotated to some positions, as at positions lower by `steps` [1 or B, T]; of `longrope`
        the short frequencies are meant."""
        cos, sin = (part / self.attention_scaling for part in self(-steps))
        return apply_rope(x, (cos, sin), self.rope.pairing)


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor], pairing: str) -> Tensor:
    """Rotate the first R channels of `x [B, T, H, K]`; the others pass unchanged."""
    cos, sin = (part[:, :, None].to(x.dtype) for part in table)
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if pairing == "half":
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-rotated[..., 1::2], rotated[..., ::2]], dim=-1).flatten(-2)
    rotated = rotated * cos + turned * sin
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


def check_long_rope(rope: Rope) -> None:
    """Refuse a `longrope` table without its two lists of a factor for each frequency, or without its switch."""
    scaling = rope.scaling
    for name in ("short_factor", "long_factor"):
        found = scaling.get(name)
        if not isinstance(found, (list, tuple)) or len(found) != rope.dim // 2:
            size = f"{len(found)} numbers" if isinstance(found, (list, tuple)) else repr(found)
            raise ZooError(f"{name} of longrope was {size}; it must be a list of {rope.dim // 2} numbers")
    name = "original_max_position_embeddings"
    if type(length := scaling.get(name)) is not int or length < 2:
        raise ZooError(f"{name} of longrope was {length!r}; it must be the length before stretching, in tokens")


def turns_change(tables: Iterable[nn.Module], cache: Cache, ids: Tensor, new: int, mask: Tensor | None) -> bool:
    """Whether the last `new` tokens of a text bring a row to long frequencies whose keys in the cache have short ones.

    Args:
        tables: rotary tables.
        ids: `[B, S]`, the text; of a part that is less than the cache holds nothing can be made anew: False.
        mask: `[B, S]`, where some are padding.
    """
    switches = [table.switch for table in tables if isinstance(table, RotaryTable) and table.switch is not None]
    if not switches or not 0 < cache.get_seq_length() <= ids.shape[1] - new:
        return False
    lengths = torch.tensor([ids.shape[1]]) if mask is None else mask.sum(-1)
    return any(bool(((lengths - new <= switch) & (lengths > switch)).any()) for switch in switches)
