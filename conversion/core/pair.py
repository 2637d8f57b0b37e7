"""Teacher and student of a healing run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from zoo.architectures.core.checkpoint import read_json
from zoo.architectures.core.load import from_pretrained
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.errors import ZooError

RECORD = "zoo_conversion.json"


def new_parameters(student: Path) -> list[str]:
    """Names of the parameters that conversion added, as it recorded them."""
    if not (student / RECORD).is_file():
        raise ZooError(f"{student} has no {RECORD}; student must be a directory that convert wrote")
    new = read_json(student / RECORD, "conversion record").get("new")
    if not isinstance(new, list):
        raise ZooError(f"{student / RECORD} does not list the new parameters; convert again")
    return new


def load_teacher(teacher: str | Path | nn.Module, cuda: bool) -> ZooForCausalLM:
    """The teacher, frozen, in evaluation mode: bf16 on a GPU, fp32 on a CPU."""
    if isinstance(teacher, nn.Module):
        if not isinstance(teacher, ZooForCausalLM):
            raise ZooError(f"teacher is a {type(teacher).__name__}; load it with zoo.from_pretrained, or pass its path")
        return teacher.eval().requires_grad_(False)
    model = from_pretrained(teacher, dtype=torch.bfloat16 if cuda else torch.float32)
    return model.eval().requires_grad_(False)


def load_student(folder: Path, teacher: ZooForCausalLM) -> ZooForCausalLM:
    """The student with fp32 parameters.

    Raises:
        ZooError: it was not made from this teacher.
    """
    model = from_pretrained(folder, dtype=torch.float32)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        ours, theirs = getattr(model.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ZooError(
                f"the student has {name} {ours}, the teacher {theirs}; give the student's own source as teacher"
            )
    return model
