"""TTT-MLP (Sun et al. 2024, arXiv 2407.04620): the state is a two-layer network, trained on every token it sees.

model(x; W) = gelu(x W1 + b1) W2 + b2,  W1 [K, 4K], W2 [4K, K];   the rest: see `core/ttt.py`
"""

from __future__ import annotations

from dataclasses import dataclass

from zoo.architectures.core import ttt

EXAMPLE = {"heads": 2, "head_dim": 16, "mini_batch": 4}
VARIANTS = {"mamba": {"heads": 2, "head_dim": 12, "mini_batch": 5, "gate": True, "shared_qk": True}}


@dataclass(frozen=True, kw_only=True)
class Args(ttt.Args):
    base_lr: float = 0.1


class TTTMLP(ttt.TTT):
    options = Args
    inner = "mlp"

    @staticmethod
    def shapes(head_dim: int) -> dict[str, tuple[int, ...]]:
        wide = 4 * head_dim
        return {"W1": (head_dim, wide), "b1": (wide,), "W2": (wide, head_dim), "b2": (head_dim,)}


MODULE = TTTMLP
