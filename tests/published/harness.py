"""One contract for every published format: transformers' own logits, however the tokens are fed, and back again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import zoo

TOKENS, PREFILL, PADS = 150, 70, 7  # longer than every window and chunk of the tests
LEAST, NOISE = 2e-5, 10.0


def make_reference(
    config: dict[str, Any], seed: int = 0, std: float = 0.05, derived: Sequence[str] = ()
) -> PreTrainedModel:
    """transformers' model of `config` (a `config.json` with `model_type`), no weight or buffer at a special value.

    `derived` are last names of buffers that follow from the config: they stay as they are.
    """
    fields = dict(config)
    made = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and not name.endswith(tuple(derived)):
                tensor.add_(std * torch.randn(tensor.shape, generator=generator))
    return model


def ids_of(model: PreTrainedModel, tokens: int = TOKENS, rows: int = 1) -> Tensor:
    """Random ids, none of them special."""
    size = model.config.get_text_config().vocab_size
    return torch.randint(3, size, (rows, tokens), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits `[B, T, V]` of one forward without a cache."""
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs).logits


def tolerance(reference: PreTrainedModel, ids: Tensor, expected: Tensor) -> float:
    """The largest difference that is no error, in standard deviations of the logits: fp32 noise on the embeddings."""
    table = reference.get_input_embeddings().weight
    kept = table.detach().clone()
    with torch.no_grad():
        table.mul_(1 + 1e-7 * torch.randn(table.shape, generator=torch.Generator().manual_seed(2)))
        moved = logits(reference, ids)
        table.copy_(kept)
    return max(LEAST, NOISE * ((moved - expected).abs().max() / expected.std()).item())


def assert_near(found: Tensor, expected: Tensor, bound: float, what: str) -> None:
    """Every logit within `bound` standard deviations."""
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    assert torch.isfinite(found).all(), what
    error = ((found - expected).abs().max() / expected.std()).item()
    assert error <= bound, f"{what}: {error:.2e} of the logits' spread; allowed {bound:.2e}"


def step_by_step(model: Any, ids: Tensor, prefill: int = PREFILL) -> Tensor:
    """Logits of a prefill and then one token at a time through the cache."""
    cache = DynamicCache()
    with torch.no_grad():
        pieces = [
            model(piece, past_key_values=cache, use_cache=True).logits
            for piece in ids.split([prefill, *[1] * (ids.shape[1] - prefill)], 1)
        ]
    return torch.cat(pieces, 1)


def left_padded(model: Any, ids: Tensor, pads: int = PADS) -> Tensor:
    """Logits of the real tokens of a row that starts with padding."""
    row = torch.cat([torch.full((ids.shape[0], pads), 2), ids], 1)
    mask = torch.ones_like(row)
    mask[:, :pads] = 0
    return logits(model, row, attention_mask=mask)[:, pads:]


def assert_published(
    config: dict[str, Any], folder: Path, tokens: int = TOKENS, seed: int = 0, derived: Sequence[str] = (), **load: Any
) -> Any:
    """The whole contract for one random model of `config`; returns our model of it (`derived`: see `make_reference`).

    transformers saves the model, we load it: equal logits for one forward, for a prefill and single tokens, and with
    left padding. We save it as published, transformers loads it: the same tensors and logits.
    """
    reference = make_reference(config, seed, derived=derived)
    ids = ids_of(reference, tokens)
    expected = logits(reference, ids)
    bound = tolerance(reference, ids, expected)
    reference.save_pretrained(folder / "theirs")
    ours = zoo.from_pretrained(folder / "theirs", attn_implementation="eager", **load)
    foreign = {type(m).__module__ for m in ours.modules() if type(m).__module__.startswith("transformers.models")}
    assert not foreign, foreign
    assert_near(logits(ours, ids), expected, bound, "one forward")
    assert_near(step_by_step(ours, ids, min(PREFILL, tokens // 2)), expected, bound, "prefill and single tokens")
    assert_near(left_padded(ours, ids), expected, bound, "left padding")
    zoo.save(ours, folder / "back", format="published")
    assert_same_model(reference, folder / "back", ids, expected, bound, derived)
    return ours


def assert_same_model(
    reference: PreTrainedModel, folder: Path, ids: Tensor, expected: Tensor, bound: float, derived: Sequence[str] = ()
) -> None:
    """transformers loads `folder` into `reference`'s class with every tensor, and computes the same."""
    again, info = type(reference).from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    missing = [name for name in info["missing_keys"] if not name.endswith(tuple(derived))]
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], info
    state = again.state_dict()
    for name, tensor in reference.state_dict().items():
        assert name.endswith(tuple(derived)) or torch.equal(state[name], tensor), f"{name} changed on its way"
    assert_near(logits(again, ids), expected, bound, "saved as published")
