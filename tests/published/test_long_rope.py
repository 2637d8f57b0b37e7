"""LongRoPE: two lists of frequencies, and the length at which a text goes over from one to the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import logits, make_reference

import zoo
from zoo.conversion.sources import phi3


def config(switch: int) -> dict[str, Any]:
    """A small Phi whose frequencies change beyond `switch` tokens; transformers fills in the nested fields."""
    factors = dict(short_factor=[1.0, 1.1, 1.3, 1.4], long_factor=[1.0, 2.0, 4.5, 9.0])
    return dict(
        model_type="phi3",
        vocab_size=101,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=switch,
        rope_parameters=dict(rope_type="longrope", rope_theta=1000.0, **factors),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def long_phi(folder: Path) -> tuple[Any, Any]:
    """transformers' model of a Phi whose frequencies change at 20 tokens, and ours."""
    reference = make_reference(config(20))
    reference.save_pretrained(folder)
    return reference, zoo.from_pretrained(folder, attn_implementation="eager")


def test_phi_changes_its_frequencies_where_transformers_does(tmp_path: Path) -> None:
    theirs, ours = long_phi(tmp_path)
    for length in (19, 20, 21, 40):
        ids = torch.arange(3, 3 + length)[None]
        torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), atol=1e-5, rtol=1e-5)
    short, long = (ours.model.ropes["default"](torch.arange(length)[None])[0] for length in (20, 21))
    assert not torch.equal(short, long[:, :20])


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_older_phi_configs_call_the_same_otherwise(kind: str) -> None:
    older = config(20)
    scaling = older.pop("rope_parameters")
    older["rope_theta"] = scaling.pop("rope_theta")
    older["rope_scaling"] = {**scaling, "rope_type": None, "type": kind}
    assert phi3.decoder(older) == phi3.decoder(config(20))


def test_rows_change_their_frequencies_each_for_itself(tmp_path: Path) -> None:
    _, ours = long_phi(tmp_path)
    ids = torch.arange(3, 33)[None]
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :15] = 0
    together = logits(ours, ids.expand(2, -1), attention_mask=mask)
    torch.testing.assert_close(together[1:, 15:], logits(ours, ids[:, 15:]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[:1], logits(ours, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("padded", [False, True])
def test_a_text_that_grows_beyond_the_switch_is_read_again(tmp_path: Path, padded: bool, cache: dict[str, Any]) -> None:
    theirs, ours = long_phi(tmp_path)
    ids = torch.arange(3, 21).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, : 5 * padded] = 0
    options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
    found = ours.generate(ids, attention_mask=mask, pad_token_id=0, eos_token_id=None, **options, **cache)
    for step, logit in enumerate(found.logits):
        for row, skipped in enumerate((0, 5 * padded)):
            text = found.sequences[row : row + 1, skipped : 18 + step]
            torch.testing.assert_close(logit[row], logits(theirs, text)[0, -1], atol=2e-5, rtol=1e-4)
