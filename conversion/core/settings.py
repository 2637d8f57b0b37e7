"""The settings of a healing run: a recipe, what was given besides, defaults by device; and what the run reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from zoo.conversion.core.stages import Stage, make_stage
from zoo.conversion.core.trainer import Loop
from zoo.errors import ZooError


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run beside teacher, student and machine.

    Args:
        stages: in order.
        seed: of the data's order.
        weight_decay: of AdamW. clip: largest norm of the gradient.
        passes: parts of a batch that run one after the other.
        chunk: tokens whose logits are held at once.
        pool_tokens, pool_uses, sample_batch: of `self` data, see `data.Plan`.
    """

    stages: tuple[Stage, ...]
    seed: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    passes: int = 1
    chunk: int = 8192
    pool_tokens: int = 131_072
    pool_uses: int = 6
    sample_batch: int = 128

    @property
    def tokens(self) -> int:
        """Tokens that the whole run trains on."""
        return sum(stage.steps * stage.step_tokens for stage in self.stages)

    def loop(self, cuda: bool) -> Loop:
        """How steps are taken."""
        return Loop(passes=self.passes, clip=self.clip, weight_decay=self.weight_decay, log_every=20 if cuda else 5)

    def flat(self) -> dict[str, Any]:
        """One entry per value, those of a stage as `align.tokens`."""
        values = asdict(self)
        stages = values.pop("stages")
        return values | {f"{stage['name']}.{key}": value for stage in stages for key, value in stage.items()}


def choose(cuda: bool, longest: int, recipe: Mapping[str, Any]) -> Settings:
    """The settings of a run: those of its recipe, the rest by the device.

    Args:
        cuda: runs on a GPU.
        longest: tokens that the teacher can read.
        recipe: what `recipe.read` and `recipe.override` returned.

    Raises:
        ZooError: stages that cannot be.
    """
    values = dict(recipe)
    entries, data = values.pop("stages"), values.pop("data", "self")
    stages: list[Stage] = []
    for entry in entries:
        kind = entry["stage"]
        count = sum(stage.kind == kind for stage in stages)
        name = f"{kind}_{count + 1}" if count else kind
        fields = {"data": data, **{key: value for key, value in entry.items() if key != "stage"}}
        if fields.get("tokens") != 0:
            stages.append(make_stage(kind, name, fields, cuda, longest))
    if not stages:
        raise ZooError("every stage has 0 tokens (align_tokens, distill_tokens); nothing would train")
    device = {"pool_tokens": 4_194_304, "sample_batch": 512} if cuda else {}
    return Settings(**{"stages": tuple(stages), **device, **values})


@dataclass(frozen=True)
class HealReport:
    """What a run did.

    Args:
        settings: see `Settings`.
        curves: by stage, `[tokens, loss]` pairs: relative error of the mixers, then the loss per token in nats.
        tokens: tokens trained on, all stages.
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
