"""The settings of a healing run, their defaults by device, and what the run reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from zoo.conversion.core.optim import Stage
from zoo.conversion.core.trainer import Loop
from zoo.errors import ZooError


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run beside teacher, student and machine.

    Args:
        data: sources and their shares.
        align_tokens, distill_tokens: budgets of the two stages, in tokens.
        length: tokens per row. batch_size: rows per step.
        lr_align: rate of new parameters in stage align.
        lr_new, lr_copied: rates in stage distill of new and of transferred parameters.
        warmup, hold: shares of a stage's steps, see `Stage`.
        passes: parts of a batch that run one after the other.
        chunk: tokens whose logits are held at once.
        pool_tokens, pool_uses, sample_batch: of `self` data, see `data.Plan`.
    """

    data: str
    align_tokens: int
    distill_tokens: int
    length: int
    batch_size: int
    seed: int = 0
    lr_align: float = 1e-2
    lr_new: float = 2e-3
    lr_copied: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: float = 0.05
    hold: float = 0.2
    passes: int = 1
    chunk: int = 8192
    pool_tokens: int = 131_072
    pool_uses: int = 6
    sample_batch: int = 128

    def __post_init__(self) -> None:
        for name in ("align_tokens", "distill_tokens"):
            if getattr(self, name) < 0:
                raise ZooError(f"{name} was {getattr(self, name)}; it must be 0 (leave the stage out) or more")
        for name in ("length", "batch_size", "passes", "chunk", "pool_tokens", "pool_uses", "sample_batch"):
            least = 2 if name == "length" else 1
            if getattr(self, name) < least:
                raise ZooError(f"{name} was {getattr(self, name)}; it must be at least {least}")
        if self.align_tokens + self.distill_tokens == 0:
            raise ZooError("align_tokens and distill_tokens were both 0; nothing would train")

    @property
    def stages(self) -> tuple[Stage, Stage]:
        """Align, then distill; a stage without tokens has no steps."""
        step = self.batch_size * self.length
        schedule = {"warmup": self.warmup, "hold": self.hold}
        return (
            Stage("align", -(-self.align_tokens // step), (self.lr_align, 0.0), **schedule),
            Stage("distill", -(-self.distill_tokens // step), (self.lr_new, self.lr_copied), **schedule),
        )

    @property
    def rows(self) -> int:
        """Rows of the whole run."""
        return sum(stage.steps for stage in self.stages) * self.batch_size

    def loop(self, cuda: bool) -> Loop:
        """How steps are taken."""
        return Loop(
            batch=self.batch_size,
            length=self.length,
            passes=self.passes,
            clip=self.clip,
            weight_decay=self.weight_decay,
            log_every=20 if cuda else 5,
        )


def choose(cuda: bool, longest: int, given: dict[str, Any]) -> Settings:
    """The settings of a run: those `given` (None: not given), else the defaults of the device.

    Args:
        cuda: runs on a GPU.
        longest: tokens that the teacher can read.

    Raises:
        ZooError: an unknown setting, or a value that cannot be.
    """
    known = [each.name for each in fields(Settings)]
    if unknown := sorted(set(given) - set(known)):
        raise ZooError(f"unknown setting {unknown[0]!r}; heal takes {', '.join(known)}")
    values = {name: value for name, value in given.items() if value is not None}
    length = values.setdefault("length", min(longest, 2048 if cuda else 256))
    if length > longest:
        raise ZooError(f"length was {length}; the teacher reads at most {longest} tokens")
    # on two CPU cores a 4M-parameter model takes about three minutes for these budgets
    small: dict[str, Any] = {"align_tokens": 40_000, "distill_tokens": 160_000, "batch_size": max(1, 2048 // length)}
    small |= {"lr_new": 4e-3, "lr_copied": 2e-3}  # few steps: higher rates end lower
    large = {"align_tokens": 10_000_000, "distill_tokens": 50_000_000, "batch_size": max(1, 32_768 // length)}
    large |= {"pool_tokens": 4_194_304, "sample_batch": 512}
    return Settings(**{**(large if cuda else small), **values})


@dataclass(frozen=True)
class HealReport:
    """What a run did.

    Args:
        settings: see `Settings`.
        curves: by stage, `[tokens, loss]` pairs: relative error of the mixers, then KL per token in nats.
        tokens: tokens trained on, both stages.
        seconds: time of the training steps, over all sessions of the run.
        device: where it ran.
    """

    settings: dict[str, Any]
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        ends = [f"{name} loss {curve[0][1]:.4g} to {curve[-1][1]:.4g}" for name, curve in self.curves.items()]
        return ", ".join([f"{self.tokens:,} tokens in {self.seconds:.0f} s", *ends])
