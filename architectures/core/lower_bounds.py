"""Forget gates with a lower bound that rises with depth, as HGRN (arXiv 2311.04823) and HGRN2 (2404.07904) have them.

    f = b_l + (1 - b_l) sigmoid(z),   b_l = sum over 0 < i <= l of softmax(gamma)_i over the layers;  b_0 = 0

B batch, T tokens, N channels, L layers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import keep_fp32, wide
from zoo.architectures.core.token_shift import DepthArgs


class LowerBounds(nn.Module):
    """gamma, `[L, N]`, which all layers share."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.gamma = keep_fp32(nn.Parameter(torch.zeros(depth, width, dtype=torch.float32)))

    def forward(self, layer_index: int) -> Tensor:
        """`[N]` in fp32: b_l of a layer after the first."""
        shares = wide(self.gamma).softmax(dim=0)
        return shares[1 : layer_index + 1].sum(0)


class BoundedForget(nn.Module):
    """`forward(z [B, T, N]) -> log f [B, T, N]` in fp32. The first layer has no bound and no parameters."""

    def __init__(self, args: DepthArgs, width: int) -> None:
        super().__init__()
        self.layer_index = args.layer_index
        if args.layer_index:
            self.bounds = LowerBounds(args.depth, width)

    def forward(self, z: Tensor) -> Tensor:
        if not self.layer_index:
            return F.logsigmoid(wide(z))
        bound = self.bounds(self.layer_index)
        return (bound + (1 - bound) * wide(z).sigmoid()).log().clamp(max=0)


def rising(decoder: DecoderConfig) -> DecoderConfig:
    """`decoder` with each layer's index in its mixer arguments, and one gamma for all layers."""
    depth = len(decoder.layers)
    layers = []
    for index, layer in enumerate(decoder.layers):
        args = {**layer.mixer_args, "layer_index": index, "depth": depth}
        share = {"mixer.forget.bounds": "bounds"} if index and depth > 2 else {}
        layers.append(replace(layer, mixer_args=args, share=share))
    return replace(decoder, layers=tuple(layers))
