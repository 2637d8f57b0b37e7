"""transformers' Trainer trains a hybrid."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from zoo_models import draw, forward, same, stack

from zoo.architectures.core.modeling import ZooForCausalLM


def test_trainer_lowers_the_loss_of_a_hybrid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ZooForCausalLM(stack(["gated_delta_net", "gla", "attention/sinks", "mamba2", "hedgehog"], tied=True))
    rows = [{"input_ids": row, "labels": row} for row in draw(8, 16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        gradient_checkpointing=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5 and losses[-1] < 0.9 * losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    loaded, ids = ZooForCausalLM.from_pretrained(tmp_path / "saved"), draw(2, 9)
    same(forward(loaded, ids), forward(model.eval(), ids), 1e-6)
