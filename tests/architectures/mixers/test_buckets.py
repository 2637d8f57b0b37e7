"""Attention inside hash buckets and clusters (Reformer, Routing Transformer) against its definition, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from naive import inputs, make_mixer
from torch import Tensor
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention
from zoo_models import ROPES, VOCAB, WIDTH, draw, error, feed, forward, same, stir, swiglu_layer

from zoo import registry
from zoo.architectures.core.config import DecoderConfig
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.modeling import ZooForCausalLM
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.errors import ZooError

H, K, T = 2, 8, 29
CONFIG = DecoderConfig(vocab_size=VOCAB, hidden_size=WIDTH, layers=(), ropes=ROPES)


def context(causal: bool) -> tuple[Tensor, Context]:
    x, ctx = inputs(T)
    return x, Context(phase="train", positions=ctx.positions, causal=causal, ropes=ctx.ropes)


def by_head(x: Tensor) -> Tensor:
    """`[B, T, H K]` to `[B, H, T, K]`."""
    return x.unflatten(-1, (H, K)).transpose(1, 2)


def lists(kinds: list[int], size: int, before: int | None, causal: bool, own: bool) -> list[list[int]]:
    """The keys of every token of one text by the buckets of its tokens, in the words of the paper."""
    order = sorted(range(len(kinds)), key=lambda j: (kinds[j], j))
    found = []
    for i in range(len(kinds)):
        at = order.index(i)
        if before is None:
            mates = [j for j in order if kinds[j] == kinds[i]]
            me = mates.index(i)
            seen = mates[max(0, me - size) : me + 1 + (0 if causal else size)]
        else:
            chunk = at // size
            seen = order[max(0, chunk - before) * size : (chunk + 1) * size]
        found.append([j for j in seen if (j != i or own) and (j <= i or not causal)])
    return found


REFORMER = dict(heads=H, head_dim=K, chunk=4, buckets=4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("before", [None, 0, 1, 2])
def test_reformer_is_its_definition(before: int | None, causal: bool) -> None:
    module, (x, ctx) = make_mixer("reformer", **REFORMER, before=before, rounds=2), context(causal)
    with torch.no_grad():
        q, v = by_head(module.q_proj(x)), by_head(module.v_proj(x))
        k, out, alone = q / q.norm(dim=-1, keepdim=True), torch.zeros_like(q), 0
        for b in range(len(x)):
            for h in range(H):
                rounds = []
                for rotation in module.rotations[:, h].double():
                    turned = k[b, h] @ rotation
                    kinds = torch.cat([turned, -turned], -1).argmax(-1).tolist()
                    rounds.append(lists(kinds, 4, before, causal, own=False))
                for i in range(T):
                    often = torch.zeros(T).double()
                    for found in rounds:
                        often[found[i]] += 1
                    weights = often * (k[b, h] @ q[b, h, i]).exp()
                    alone += not often.any()
                    out[b, h, i] = weights @ v[b, h] / weights.sum() if often.any() else v[b, h, i]
        assert alone >= (2 * H if causal else 0)
        same(module(x, ctx), module.o_proj(out.transpose(1, 2).flatten(-2)), 1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rounds", [1, 3])
def test_reformer_is_transformers_reformer_without_its_wrapping_chunks(causal: bool, rounds: int) -> None:
    sizes = dict(hidden_size=WIDTH, num_attention_heads=H, attention_head_size=K, num_hashes=rounds, num_buckets=4)
    kind = dict(lsh_attn_chunk_length=4, lsh_num_chunks_before=0, is_decoder=causal, hash_seed=3)
    theirs = LSHSelfAttention(ReformerConfig(**sizes, **kind)).double().eval()
    stir(theirs, std=0.5)
    x = torch.randn(2, 32, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    module = make_mixer("reformer", **REFORMER, before=0, rounds=rounds)
    with torch.no_grad():
        torch.manual_seed(3)
        module.rotations = torch.randn(H, K, rounds, 2, dtype=torch.float64).permute(2, 0, 1, 3)
        module.q_proj.weight.copy_(theirs.query_key.weight)
        module.v_proj.weight.copy_(theirs.value.weight)
        expected = module.o_proj(theirs(x).hidden_states)
        ctx = Context(phase="train", positions=torch.arange(32).expand(2, -1), causal=causal)
        same(module(x, ctx), expected, 1e-6)


ROUTING = dict(heads=2 * H, head_dim=K, local_heads=H, window=3, clusters=4, rope=None)


def routed(module: Any, x: Tensor, pick: Any) -> Tensor:
    """The output of the heads that route, of which `pick(likeness [T, C], h)` gives (cluster's members, reader)."""
    q, v = F.layer_norm(by_head(module.q_proj(x)), (K,)), by_head(module.v_proj(x))
    out = torch.zeros_like(q)
    for b in range(len(x)):
        for h in range(H):
            reads = pick(q[b, h] @ module.centroids[h].double().T)
            for i, clusters in enumerate(reads):
                for keys in clusters:
                    weights = (q[b, h, keys] @ q[b, h, i] * K**-0.5).softmax(0)
                    out[b, h, i] += weights @ v[b, h, keys] / len(clusters)
    return out.transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("assign", ["top", "nearest"])
def test_routing_is_its_definition(assign: str, causal: bool) -> None:
    members = 9 if assign == "top" else 3
    module, (x, ctx) = make_mixer("routing_transformer", **ROUTING, members=members, assign=assign), context(causal)

    def pick(likeness: Tensor) -> list[list[list[int]]]:
        if assign == "nearest":
            return [[keys] for keys in lists(likeness.argmax(-1).tolist(), members, None, causal, own=True)]
        clusters = [sorted(likeness[:, c].topk(members).indices.tolist()) for c in range(4)]
        return [[[j for j in c if j <= i or not causal] for c in clusters if i in c] for i in range(T)]

    with torch.no_grad():
        expected = module.o_proj(routed(module, x, pick)) + module.local(x, ctx)
        same(module(x, ctx), expected, 1e-12)
        same(module.routed(x, ctx, None).flatten(-2), routed(module, x, pick), 1e-12)


def test_centroids_follow_the_tokens_nearest_to_them_once_a_step() -> None:
    module, (x, ctx) = make_mixer("routing_transformer", **ROUTING, members=9, decay=0.9), context(True)
    module.centroids[0, 2] = -50 * torch.ones(K)  # nobody's, as the mean of a normed vector is 0
    module.centroids[0, 2, 0] = 350
    k, before = F.layer_norm(by_head(module.q_proj(x)), (K,)), module.centroids.clone()
    module.eval()(x.requires_grad_(), ctx).sum().backward()
    assert torch.equal(module.centroids, before)
    y = module.train()(x, ctx)
    assert torch.equal(module.centroids, before)
    y.sum().backward()
    for h in range(H):
        nearest = (k[:, h] @ before[h].T.double()).argmax(-1)
        for c in range(4):
            mine = k[:, h][nearest == c]
            mean = mine.mean(0) if len(mine) else before[h, c]
            same(module.centroids[h, c], 0.9 * before[h, c] + 0.1 * mean, 1e-6)


MIXERS = {
    "reformer": dict(heads=4, head_dim=16, chunk=3, buckets=4),
    "routing_transformer": dict(heads=4, head_dim=16, clusters=3, members=4, window=3),
}
CONSISTENT = {"reformer": dict(before=None), "routing_transformer": dict(assign="nearest")}


def one_layer(name: str, **more: Any) -> ZooForCausalLM:
    layer = swiglu_layer(name, {**MIXERS[name], **more})
    config = DecoderConfig(vocab_size=VOCAB, hidden_size=WIDTH, layers=(layer,), ropes=ROPES)
    torch.manual_seed(0)
    model = ZooForCausalLM(ZooConfig.from_decoder(config, "test")).eval()
    stir(model, std=0.2)
    return model


@pytest.mark.parametrize("name", MIXERS)
def test_a_decoded_token_reads_what_it_does_as_the_last_of_its_text(name: str) -> None:
    model, ids = one_layer(name), draw(2, 24)
    assert not model.model.layers[0].mixer.phase_consistent
    found, _ = feed(model, ids, (17, *[1] * 7))
    for t in range(17, 24):
        same(found[:, t], forward(model, ids[:, : t + 1])[:, -1])
    with pytest.raises(AssertionError):  # tokens to come have a say in what is read
        same(found, forward(model, ids), 1e-3)


@pytest.mark.parametrize("name", MIXERS)
def test_the_causal_rule_does_not_depend_on_tokens_to_come(name: str) -> None:
    model, ids = one_layer(name, **CONSISTENT[name]), draw(2, 24)
    whole = forward(model, ids)
    same(feed(model, ids, (9, *[1] * 7, 8))[0], whole)
    other = ids.clone()
    other[:, 12:] = draw(2, 12, seed=5)
    same(forward(model, other)[:, :12], whole[:, :12], 1e-6)
    assert error(forward(model, other)[:, 12:], whole[:, 12:])[0] > 1e-2


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("reformer", dict(buckets=3), "buckets was 3; it must be even"),
        ("reformer", dict(before=-1), "before was -1"),
        ("reformer", dict(rounds=0), "rounds was 0"),
        ("routing_transformer", dict(assign="best"), "assign was 'best'"),
        ("routing_transformer", dict(local_heads=4), "local_heads was 4"),
        ("routing_transformer", dict(decay=1.5), "decay was 1.5"),
        ("routing_transformer", dict(members=0), "members was 0"),
    ],
)
def test_wrong_options_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    cls = registry.get("mixers", name, "MODULE")
    with pytest.raises(ZooError, match=message):
        cls.parse({"heads": 4, "head_dim": 16, **args}).check(CONFIG)
