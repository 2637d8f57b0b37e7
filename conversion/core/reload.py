"""Run in a fresh process by `verify`: load a checkpoint, write its logits. `python -m ... FOLDER IDS OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from zoo.architectures.core.load import from_pretrained


def main(folder: str, ids: str, out: str) -> None:
    """Write the fp32 logits of the checkpoint in `folder` for the token ids in the file `ids`."""
    model = from_pretrained(Path(folder), dtype=torch.float32)
    with torch.no_grad():
        logits = model(load_file(ids)["ids"], use_cache=False).logits
    save_file({"logits": logits.contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
