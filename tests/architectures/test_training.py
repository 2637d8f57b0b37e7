"""Gradients, precision and the vocabulary: what training and fine-tuning need of every mixer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo_models import VOCAB, case_config, draw, feed, forward, make, parts, same

from zoo.architectures.core.modeling import ZooForCausalLM


def backward(model: ZooForCausalLM) -> tuple[float, dict[str, torch.Tensor]]:
    ids = draw(2, 12)
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stirred", [False, True])
def test_every_parameter_gets_a_gradient(case: str, stirred: bool) -> None:
    torch.manual_seed(0)
    model = make(case) if stirred else ZooForCausalLM(case_config(case))
    _, gradients = backward(model.train())
    missing = [name for name, _ in model.named_parameters() if name not in gradients]
    assert not missing
    assert not [name for name, g in gradients.items() if not torch.isfinite(g).all() or not g.any()]


def test_gradient_checkpointing_changes_nothing(model: ZooForCausalLM) -> None:
    loss, expected = backward(model.train())
    model.gradient_checkpointing_enable()
    assert all(block.gradient_checkpointing for block in model.model.layers)
    again, found = backward(model)
    assert again == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        same(found[name], gradient, 1e-5)


def test_fp64_is_fp64_throughout(model: ZooForCausalLM) -> None:
    model, ids = model.double(), draw(2, 9)
    whole = forward(model, ids)
    assert whole.dtype == torch.float64
    if all(part.phase_consistent for part in parts(model)):
        same(feed(model, ids, (4, 1, 1, 3))[0], whole, 1e-11)


def test_bf16_keeps_decays_in_fp32(model: ZooForCausalLM, tmp_path: Path) -> None:
    wanted = {name: p for name, p in model.named_parameters() if getattr(p, "_zoo_fp32", False)}
    model.save_pretrained(tmp_path)
    loaded = dict(ZooForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).named_parameters())
    for name, parameter in loaded.items():
        if name in wanted:
            assert parameter.dtype == torch.float32, name
            assert torch.equal(parameter, wanted[name]), name
        else:
            assert parameter.dtype == torch.bfloat16, name


def test_a_long_bf16_roll_out_stays_near_fp32(model: ZooForCausalLM, tmp_path: Path) -> None:
    if any(part.chooses or getattr(part, "method", None) for part in parts(model)):
        pytest.skip("which keys are chosen depends on the rounding")
    model.save_pretrained(tmp_path)
    low, ids = ZooForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), draw(1, 48)
    steps = (20, *[1] * 28)
    found, expected = feed(low, ids, steps)[0].float(), forward(model, ids)
    size = ((found - expected).square().mean(-1) / expected.square().mean(-1)).sqrt()[0]
    early, late = size[:12].median(), size[-12:].median()  # a token may fall to another expert, a state must not drift
    assert late <= 0.05 and late <= 3 * early + 0.005, (early, late)


def test_autocast_trains(model: ZooForCausalLM) -> None:
    expected, _ = backward(model.train())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(draw(2, 12), labels=draw(2, 12)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=0.02)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_resized_embeddings_keep_the_old_logits(preset: str, tmp_path: Path) -> None:
    model = make(preset)
    ids, old = draw(2, 8), model.config.vocab_size
    before = forward(model, ids)
    model.resize_token_embeddings(old + 7)
    after = forward(model, ids)
    assert after.shape[-1] == old + 7 == model.config.vocab_size
    same(after[..., :old], before, 1e-6)
    model.save_pretrained(tmp_path)
    loaded = ZooForCausalLM.from_pretrained(tmp_path)
    new_ids = torch.full((1, 3), old + 6)
    same(forward(loaded, new_ids), forward(model, new_ids), 1e-6)
    tied = model.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_hidden_states_are_one_per_layer_and_the_embedding(model: ZooForCausalLM) -> None:
    ids = draw(2, 7)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 7, width)] * (layers + 1)
    positions = torch.arange(7).expand(2, 7)
    same(out.hidden_states[0], model.model.embed(ids, None, positions), 1e-6)
    same(model.logits(out.hidden_states[-1]), out.logits, 1e-6)
    assert model(ids).hidden_states is None


def test_inputs_embeds_equal_input_ids(model: ZooForCausalLM) -> None:
    ids = draw(2, 7)
    same(forward_embeds(model, ids), forward(model, ids), 1e-6)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def forward_embeds(model: ZooForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs_embeds=model.model.embed_tokens(ids), use_cache=False).logits


def test_labels_give_the_mean_next_token_loss(model: ZooForCausalLM) -> None:
    ids = draw(2, 7)
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        out = model(ids, labels=labels)
    logits = out.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert int(ids.max()) < VOCAB


def test_logits_to_keep_are_the_last(model: ZooForCausalLM) -> None:
    ids = draw(2, 7)
    whole = forward(model, ids)
    assert forward(model, ids, logits_to_keep=2).shape[1] == 2
    same(forward(model, ids, logits_to_keep=2), whole[:, -2:], 1e-6)
