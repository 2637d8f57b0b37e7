"""Hashes that tell models, tokenizers and files apart: another weight, another hash."""

from __future__ import annotations

import hashlib
import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

PASSING = ("_name_or_path", "name_or_path", "transformers_version", "_attn_implementation_autoset")


def hashed(value: Any) -> str:
    """Hash of plain JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def model_hash(model: Any) -> str:
    """Hash of every byte of the weights and buffers, their names, dtypes and shapes, and of the config."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else vars(model.config)
    digest.update(hashed({key: value for key, value in config.items() if key not in PASSING}).encode())
    return digest.hexdigest()[:32]


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of all that decides the ids of a text; "" without a tokenizer."""
    if tokenizer is None:
        return ""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = fast.to_str() if fast is not None else sorted(tokenizer.get_vocab().items())
    special = getattr(tokenizer, "special_tokens_map", None)
    return hashed([type(tokenizer).__name__, words, special, getattr(tokenizer, "chat_template", None)])


def path_hash(path: str | Path) -> str:
    """Hash of a file, or of the names and contents of a directory's files."""
    path = Path(path)
    if path.is_dir():
        return hashed({file.name: path_hash(file) for file in sorted(path.iterdir()) if file.is_file()})
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(2**22):
            digest.update(part)
    return digest.hexdigest()[:32]


@cache
def commit() -> str:
    """The commit of this library where it is a git checkout, else its version."""
    import zoo

    folder = Path(zoo.__file__).resolve().parent
    command = ("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12")
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found = ""
    return found or zoo.__version__
