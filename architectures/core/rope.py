"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): tables made by the decoder, applied by mixers.

B batch, T tokens, H heads, R rotated channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, initialization
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from zoo.architectures.core.config import Rope
from zoo.errors import ZooError

STATIC_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the input's length


class RotaryTable(nn.Module):
    """cos and sin of every position. `forward(positions [B, T]) -> (cos, sin)`, each `[B, T, R]` in fp32."""

    inv_freq: Tensor

    def __init__(self, rope: Rope, max_position: int) -> None:
        super().__init__()
        kind = rope.scaling.get("rope_type", "default")
        if kind not in STATIC_TYPES:
            raise ZooError(f"rope_type {kind!r} is not supported; it must be one of {', '.join(STATIC_TYPES)}")
        self.rope, self.max_position = rope, max_position
        with torch.device("cpu"):  # scaled frequencies need values, also where modules are made on the meta device
            inv_freq, self.attention_scaling = self._frequencies()
        self.register_buffer("inv_freq", inv_freq.to(torch.empty(0).device), persistent=False)

    def _frequencies(self) -> tuple[Tensor, float]:
        rope, kind = self.rope, self.rope.scaling.get("rope_type", "default")
        if kind == "default":
            exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
            return 1.0 / (rope.theta**exponents), 1.0
        parameters = {**rope.scaling, "rope_theta": rope.theta}
        sizes = dict(head_dim=rope.dim, hidden_size=rope.dim, num_attention_heads=1)
        config = PreTrainedConfig(max_position_embeddings=self.max_position, **sizes)
        config.rope_parameters = parameters
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return inv_freq, float(scaling)

    def reset(self) -> None:
        """Fill the buffer again; needed when the module was made on the meta device."""
        with torch.device("cpu"):
            inv_freq, self.attention_scaling = self._frequencies()
        initialization.copy_(self.inv_freq, inv_freq)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device_type=positions.device.type, enabled=False):
            angles = positions[..., None].float() * self.inv_freq.float()
            paired = torch.cat([angles, angles], -1) if self.rope.pairing == "half" else angles.repeat_interleave(2, -1)
            return paired.cos() * self.attention_scaling, paired.sin() * self.attention_scaling


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
