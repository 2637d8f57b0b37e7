"""Runs that verification compares: the source in transformers, the plan in this process, the output in a fresh one.

B batch, T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.architectures.core.load import Deferred, assemble, from_pretrained
from zoo.conversion.core.planner import Plan, build_plan
from zoo.errors import ZooError

SAMPLE_TEXT = (
    "It was late when the traveller reached the inn by the river. The keeper, an old man with a lantern, asked for a "
    "name and a coin, wrote both in his book, and led the way up the narrow stairs without another word."
)


def sample_ids(plan: Plan, length: int) -> Tensor:
    """`[2, length]` token ids: a text, as far as it reaches, and random ones."""
    vocabulary = plan.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, length), generator=generator)
    text = torch.tensor(encode(plan.source.checkpoint.path, [SAMPLE_TEXT])[0][:length], dtype=torch.int64)
    ids[0, : len(text)] = text % vocabulary  # a test model may have fewer rows than its tokenizer has words
    return ids


def encode(path: Path, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, by the tokenizer in a checkpoint directory."""
    from zoo.architectures.core.load import tokenizer

    return [list(ids) for ids in tokenizer(path)(texts)["input_ids"]]


def unswapped(plan: Plan, dtype: torch.dtype = torch.float32) -> Any:
    """The plan's source as our decoder: the plan with no layer swapped."""
    return swapped(build_plan(plan.source, {}, plan.seed), dtype)


def swapped(plan: Plan, dtype: torch.dtype = torch.float32) -> Any:
    """The plan's result, from its tensors and not from what was written."""
    state = {row.target: Deferred(partial(plan.tensor, row.target), row.shape, row.dtype) for row in plan.rows}
    return assemble(plan.config, state, dtype=dtype)[0]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a checkpoint directory."""
    return from_pretrained(folder, dtype=dtype).eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    """`[B, T, V]` for ids `[B, T]`, without a cache."""
    with torch.no_grad():
        result: Tensor = model(ids, use_cache=False).logits
    return result


def transformers_logits(path: Path, ids: Tensor, *, eager: bool = False) -> Tensor:
    """Logits of transformers' own class for a published checkpoint, in fp32; `eager` attention is its definition."""
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": "eager"} if eager else {}
    return logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options), ids)


def fresh_logits(folder: Path, ids: Tensor) -> Tensor:
    """Logits of a checkpoint directory, loaded by a new Python process.

    Raises:
        ZooError: the process failed; the message has its last line.
    """
    import zoo

    assert zoo.__file__ is not None
    root = str(Path(zoo.__file__).parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as scratch:
        given, made = (str(Path(scratch, name)) for name in ("ids.safetensors", "logits.safetensors"))
        save_file({"ids": ids}, given)
        command = [sys.executable, "-m", "zoo.conversion.core.reload", str(folder.absolute()), given, made]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ZooError(f"verification 'reload' failed: a fresh process could not load the output ({last})")
        return load_file(made)["logits"]


def mixer_inputs(plan: Plan, ids: Tensor, *, whole: bool) -> dict[int, list[Tensor]]:
    """For each swapped layer, inputs `[B, T, D]` of its mixer in fp32: random ones, and those of real tokens.

    The latter come from running the source, or, where that is too large, are the tokens' embeddings.
    """
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(*ids.shape, plan.config.hidden_size, generator=generator)
    if not whole:
        rows = plan.source.get("model.embed_tokens.weight")[ids].float()
        real = rows / rows.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
        return {index: [random, real] for index in plan.swaps}
    model = unswapped(plan)
    seen: dict[int, Tensor] = {}
    for index in plan.swaps:
        mixer = model.model.layers[index].mixer
        mixer.register_forward_pre_hook(lambda module, args, index=index: seen.update({index: args[0]}))
    logits(model, ids)
    return {index: [random, seen[index]] for index in plan.swaps}
