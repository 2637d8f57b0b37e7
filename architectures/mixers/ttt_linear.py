"""TTT-Linear (Sun et al. 2024, arXiv 2407.04620): the state is a linear model, trained on every token it sees.

model(x; W) = x W1 + b1,  W1 [K, K];   the rest: see `core/ttt.py`
"""

from __future__ import annotations

from zoo.architectures.core import ttt

EXAMPLE = {"heads": 2, "head_dim": 16, "mini_batch": 4}
VARIANTS = {"mamba": {"heads": 2, "head_dim": 12, "mini_batch": 5, "gate": True, "shared_qk": True}}


class TTTLinear(ttt.TTT):
    options = ttt.Args
    inner = "linear"

    @staticmethod
    def shapes(head_dim: int) -> dict[str, tuple[int, ...]]:
        return {"W1": (head_dim, head_dim), "b1": (head_dim,)}


MODULE = TTTLinear
