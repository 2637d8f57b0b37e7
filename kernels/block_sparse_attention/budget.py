"""How many blocks a query block lists."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BudgetSchedule:
    """The number of blocks listed of the n that a query block could list; exactly one rule is given.

        fixed      that many
        fraction   fraction * n, rounded up
        alpha      alpha * n ** exponent, rounded up
        mass       as few, best first, as hold that share of the weight of all n

    `least` and `most` bound every rule. Raises ValueError where a number is out of range.
    """

    fixed: int | None = None
    fraction: float | None = None
    alpha: float | None = None
    exponent: float = 0.5
    mass: float | None = None
    least: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        rules = {name: getattr(self, name) for name in ("fixed", "fraction", "alpha", "mass")}
        given = [name for name, value in rules.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"budget has {', '.join(given) or 'no rule'}; it must have one of {', '.join(rules)}")
        for name in ("fixed", "least", "most"):
            value, low = getattr(self, name), 0 if name == "least" else 1
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least {low}")
        for name, top in (("fraction", 1.0), ("mass", 1.0), ("exponent", 1.0), ("alpha", math.inf)):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value <= top and (value or name == "exponent")):
                raise ValueError(f"{name} is {value!r}; it must be a number above 0 and at most {top}")
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most is {self.most}; it must be at least {self.least} as least is")

    def width(self, blocks: int) -> int:
        """The longest list that any n up to `blocks` gives."""
        longest: float = blocks
        if self.fixed is not None:
            longest = self.fixed
        elif self.fraction is not None:
            longest = self.fraction * blocks
        elif self.alpha is not None:
            longest = self.alpha * blocks**self.exponent
        longest = max(math.ceil(longest - 1e-9), self.least)
        return min(longest, blocks, self.most or blocks)

    def counts(self, visible: Tensor, weights: Tensor) -> Tensor:
        """Blocks to list of `visible` [...] ones whose weights [..., n] are sorted, best first."""
        n = visible.double()
        if self.mass is not None:
            sums = weights.double().cumsum(-1)
            enough = sums >= self.mass * sums[..., -1:] * (1 - 1e-9)
            found = weights.shape[-1] - enough.sum(-1) + 1
        elif self.fraction is not None or self.alpha is not None:
            exact = self.fraction * n if self.fraction is not None else (self.alpha or 0.0) * n**self.exponent
            found = (exact - 1e-9).ceil().long()
        else:
            found = torch.full_like(visible, self.fixed or 0)
        return torch.minimum(found.clamp(self.least, self.most), visible)


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
