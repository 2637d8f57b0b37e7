"""The training loop of healing: stages of steps over one mixture of rows, resumable at every step.

B rows of a batch, L tokens per row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from zoo.conversion.core.optim import Stage, make_optimizer, parameter_groups, set_rates
from zoo.conversion.core.progress import Meter
from zoo.conversion.core.rows import Mixture
from zoo.conversion.core.work import Interrupt, Work


@dataclass
class Progress:
    """Where a run is: `stage` and `step` are the next to be done; `curves` holds `(tokens, loss)` pairs by stage.

    `unread` is the sum of the losses since the last pair, in `count` steps.
    """

    stage: int = 0
    step: int = 0
    rows: int = 0
    seconds: float = 0.0
    unread: float = 0.0
    count: int = 0
    curves: dict[str, list[list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loop:
    """How steps are taken.

    Args:
        batch: B, rows per step over all processes.
        passes: parts of a batch that run one after the other, to save memory.
        length: L.
        clip: largest norm of the gradient.
        weight_decay: of AdamW.
        log_every: steps between two readings of the loss (a reading waits for the device).
        save_minutes: minutes between two checkpoints.
    """

    batch: int
    length: int
    passes: int = 1
    clip: float = 1.0
    weight_decay: float = 0.01
    log_every: int = 10
    save_minutes: float = 10.0


class Trainer:
    """Runs stages on a student.

    Args:
        student: the model that trains; its parameters are fp32.
        new: names of the parameters that conversion added.
        mixture: rows of the whole run.
        work: where the state is kept.
    """

    def __init__(
        self, student: nn.Module, new: Sequence[str], mixture: Mixture, loop: Loop, work: Work, accelerator: Accelerator
    ) -> None:
        self.student, self.new, self.mixture, self.loop, self.work = student, new, mixture, loop, work
        self.accelerator, self.interrupt = accelerator, Interrupt()
        self.progress = Progress()
        self.waiting: dict[str, Any] | None = None  # optimizer state of a resumed stage

    def resume(self) -> None:
        """Take up the state that `work` holds, if any."""
        state = self.work.load(self.accelerator.device)
        if state is None:
            return
        self.student.load_state_dict(state["student"])
        self.progress, self.waiting = Progress(**state["progress"]), state["optimizer"]

    def run(self, index: int, stage: Stage, objective: nn.Module, meter: Meter) -> None:
        """Stage number `index`, from where the progress stands. `objective(ids [B, L])` is its loss.

        Raises:
            KeyboardInterrupt: a signal came; the state has been saved.
        """
        if self.progress.stage != index or not stage.steps:
            return
        groups = parameter_groups(self.student.named_parameters(), self.new, stage, self.loop.weight_decay)
        optimizer = make_optimizer(groups, self.accelerator.device)
        if self.waiting is not None:
            optimizer.load_state_dict(self.waiting)
            self.waiting = None
        module, prepared = self.accelerator.prepare(objective, optimizer)
        self.student.train()
        with self.interrupt.held():
            self._steps(stage, module, prepared, meter)
        self.progress.stage, self.progress.step = index + 1, 0
        self._save(None)
        self.accelerator.free_memory(module, prepared)
        if self.interrupt.asked:
            raise KeyboardInterrupt(f"stopped after {stage.name}")

    def skip(self, index: int) -> None:
        """Leave stage number `index` out."""
        if self.progress.stage == index:
            self.progress.stage = index + 1

    def _steps(self, stage: Stage, module: nn.Module, optimizer: Any, meter: Meter) -> None:
        place, saved = self.progress, time.monotonic()
        began = saved - place.seconds
        unread = torch.full((), place.unread, dtype=torch.float64, device=self.accelerator.device)
        while place.step < stage.steps:
            set_rates(optimizer, stage.factor(place.step))
            unread += self._step(module, optimizer)
            place.step, place.rows, place.count = place.step + 1, place.rows + self.loop.batch, place.count + 1
            place.seconds = time.monotonic() - began
            if place.count == self.loop.log_every or place.step == stage.steps:
                self._log(stage, unread.item() / place.count, optimizer, meter)
                unread, place.count = torch.zeros_like(unread), 0
            stop = self.interrupt.asked and place.step < stage.steps
            if stop or time.monotonic() - saved > 60 * self.loop.save_minutes:
                place.unread, saved = unread.item(), time.monotonic()
                self._save(optimizer)
            if stop:
                raise KeyboardInterrupt(f"stopped after step {place.step} of {stage.name}")
        place.unread = 0.0

    def _step(self, module: nn.Module, optimizer: Any) -> Tensor:
        loss = torch.zeros((), device=self.accelerator.device)
        ids = self._batch()
        parts = ids.split(-(-len(ids) // self.loop.passes))
        for part in parts:
            share = module(part) * (len(part) / len(ids))
            self.accelerator.backward(share)
            loss += share.detach()
        self.accelerator.clip_grad_norm_(self.student.parameters(), self.loop.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def _batch(self) -> Tensor:
        """This process's rows `[B / processes, L]` of the next step."""
        start, count = self.progress.rows, self.loop.batch // self.accelerator.num_processes
        start += count * self.accelerator.process_index
        return self.rows(start, start + count)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `[stop - start, L]` of the run on the device."""
        ids = torch.from_numpy(self.mixture.batch(start, stop))
        if self.accelerator.device.type == "cuda":
            ids = ids.pin_memory()
        return ids.to(self.accelerator.device, non_blocking=True)

    def _log(self, stage: Stage, loss: float, optimizer: Any, meter: Meter) -> None:
        tokens = self.progress.step * self.loop.batch * self.loop.length
        self.progress.curves.setdefault(stage.name, []).append([tokens, loss])
        meter.update(stage.name, tokens, loss)
        if self.accelerator.is_main_process:
            rates = {f"lr_{n}": group["lr"] for n, group in enumerate(optimizer.param_groups)}
            place = {"stage": stage.name, "step": self.progress.step, "tokens": tokens, "loss": loss}
            self.work.log({**place, "seconds": round(self.progress.seconds, 2), **rates})

    def _save(self, optimizer: Any) -> None:
        if not self.accelerator.is_main_process:
            return
        state = None if optimizer is None else optimizer.state_dict()
        self.work.save({"student": self.student.state_dict(), "optimizer": state, "progress": vars(self.progress)})
