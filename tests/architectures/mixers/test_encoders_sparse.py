"""Sparse encoders: BigBird and Longformer against transformers' own, ClusterFormer against its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from naive import inputs, make_mixer
from torch import Tensor
from transformers import BigBirdConfig, LongformerConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from zoo_models import ROPES, VOCAB, WIDTH, same, stir

import zoo
from zoo import registry
from zoo.architectures.core.config import DecoderConfig, Layer
from zoo.architectures.core.mixer import Context
from zoo.architectures.core.modeling import ZooForMaskedLM
from zoo.architectures.core.zoo_config import ZooConfig
from zoo.architectures.mixers.bigbird import scattered
from zoo.errors import ZooError

H, K = 4, 16
CONFIG = DecoderConfig(vocab_size=VOCAB, hidden_size=WIDTH, layers=(), ropes=ROPES)
BIASES = dict(q_bias=True, k_bias=True, v_bias=True, o_bias=True)


def text(tokens: int, padding: int = 0) -> tuple[Tensor, Context]:
    """`x [2, tokens, 64]` of which the second row ends in padding."""
    x = torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(2)).double()
    mask = torch.ones(2, tokens, dtype=torch.bool)
    if padding:
        mask[1, -padding:] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return x, Context(phase="train", positions=positions, causal=False, padding_mask=mask if padding else None)


def take(module: Any, theirs: Any, **names: str) -> None:
    with torch.no_grad():
        for mine, other in names.items():
            module.get_submodule(mine).weight.copy_(theirs.get_submodule(other).weight)
            module.get_submodule(mine).bias.copy_(theirs.get_submodule(other).bias)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("padding", [0, 5])
def test_longformer_is_transformers_longformer(count: int, padding: int) -> None:
    config = LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=H, attention_window=[8], attention_probs_dropout_prob=0.0
    )
    theirs = LongformerSelfAttention(config, 0).double().eval()
    stir(theirs, std=0.2)
    module = make_mixer("longformer", heads=H, head_dim=K, window=8, global_tokens=count, **BIASES)
    take(module, theirs, q_proj="query", k_proj="key", v_proj="value")
    take(module, theirs, global_q_proj="query_global", global_k_proj="key_global", global_v_proj="value_global")
    x, ctx = text(40, padding)
    mask = torch.zeros(2, 40).double()
    mask[:, :count] = 10000.0
    if ctx.padding_mask is not None:
        mask = mask.masked_fill(~ctx.padding_mask, -10000.0)
    with torch.no_grad():
        expected = theirs(x.clone(), mask, mask < 0, mask > 0, bool((mask > 0).any()))[0]
        found = module(x, ctx)
    real = torch.ones(2, 40, dtype=torch.bool) if ctx.padding_mask is None else ctx.padding_mask
    same(found[real], module.o_proj(expected)[real], 1e-6)  # their softmax is in fp32


@pytest.mark.parametrize("padding", [0, 16])
@pytest.mark.parametrize("random", [1, 2])
def test_bigbird_is_transformers_bigbird_with_our_random_blocks(random: int, padding: int) -> None:
    tokens, size = 160, 16
    config = BigBirdConfig(
        hidden_size=WIDTH, num_attention_heads=H, block_size=size, num_random_blocks=random, use_bias=True
    )
    theirs = BigBirdBlockSparseAttention(config, seed=0).double().eval()
    stir(theirs, std=0.2)
    module = make_mixer("bigbird", heads=H, head_dim=K, block=size, random=random, seed=5, **BIASES)
    take(module, theirs, q_proj="query", k_proj="key", v_proj="value")
    x, ctx = text(tokens)
    x = x[:, : tokens - padding]
    ctx = Context(phase="train", positions=ctx.positions[:, : tokens - padding], causal=False)
    count = x.shape[1] // size
    blocks = module.random_blocks(torch.arange(count), torch.full((1, 1, 1, 1), count))[0][0]
    assert (blocks[:, 1:-1] >= 0).all() and len({tuple(head.flatten().tolist()) for head in blocks}) == H
    theirs._bigbird_block_rand_mask_with_head = lambda **_: list(np.asarray(blocks[:, 1:-1]))
    masks = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(2, count * size).double(), size)
    order = ("blocked_encoder_mask", "band_mask", "from_mask", "to_mask")
    made = dict(zip(order, masks, strict=True))
    with torch.no_grad():
        expected = theirs(
            x, made["band_mask"], made["from_mask"], made["to_mask"], *[made["blocked_encoder_mask"]] * 2
        )[0]
        same(module(x, ctx), module.o_proj(expected), 1e-10)


@pytest.mark.parametrize("args", [dict(window=3, random=2), dict(window=1, random=3, global_blocks=2, kv_heads=2)])
def test_bigbird_reads_window_ends_and_random_blocks_of_any_length(args: dict[str, Any]) -> None:
    module, (x, ctx) = make_mixer("bigbird", heads=H, head_dim=K, block=1, **args), text(13)
    count, ends, half = 13, args.get("global_blocks", 1), args["window"] // 2
    picked = module.random_blocks(torch.arange(count), torch.full((1, 1, 1, 1), count))[0][0]
    with torch.no_grad():
        q, k, v = module.expanded_qkv(x, ctx)
        out = torch.zeros_like(q)
        for h in range(H):
            for i in range(count):
                seen = {j for j in range(count) if abs(i - j) <= half or j < ends or j >= count - ends}
                more = [j for j in picked[h, i].tolist() if j >= 0]
                assert not seen & set(more) and len(set(more)) == len(more) == min(args["random"], count - len(seen))
                keys = list(range(count)) if i < ends or i >= count - ends else sorted(seen | set(more))
                weights = torch.einsum("bk,bjk->bj", q[:, i, h], k[:, keys, h]) * K**-0.5
                out[:, i, h] = torch.einsum("bj,bjk->bk", weights.softmax(-1), v[:, keys, h])
        same(module(x, ctx), module.o_proj(out.flatten(-2)), 1e-12)


def test_random_blocks_are_spread_evenly_and_depend_on_the_seed() -> None:
    number = torch.arange(200)
    drawn = scattered(1, number[:, None], number)
    assert drawn.unique().numel() > 0.99 * drawn.numel()
    low = (drawn < 2**31).double()
    assert low.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (low.mean(0) - 0.5).abs().max() < 0.2 and (low.mean(1) - 0.5).abs().max() < 0.2
    assert not torch.equal(drawn, scattered(2, number[:, None], number))
    assert torch.equal(drawn, scattered(1, number[:, None], number))


def naive_clusterformer(module: Any, x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Output, new centroids and cluster of every word of one text `x [T, D]`."""
    asked = centroids @ module.centroid_proj.weight.T
    moved = torch.stack([(x @ c * WIDTH**-0.5).softmax(0) @ x for c in asked])
    owners = [int(torch.cosine_similarity(moved, word[None], dim=-1).argmax()) for word in x]
    order = sorted(range(len(x)), key=lambda j: (owners[j], j))
    q, k, v = (module.get_submodule(f"{n}_proj")(x).unflatten(-1, (H, K)) for n in "qkv")
    out, size = torch.zeros_like(q), module.args.chunk
    for at, i in enumerate(order):
        keys = order[max(0, at // size - 1) * size : (at // size + 1) * size]
        for h in range(H):
            out[i, h] = (k[keys, h] @ q[i, h] * K**-0.5).softmax(0) @ v[keys, h]
    return module.o_proj(out.flatten(-2)), moved, owners


def test_clusterformer_is_its_definition() -> None:
    first = make_mixer("clusterformer", heads=H, head_dim=K, chunk=4, clusters=5)
    second = make_mixer("clusterformer", heads=H, head_dim=K, chunk=4)
    x, _ = inputs(19)
    ctx = Context(phase="train", positions=torch.arange(19).expand(2, -1), causal=False)
    with torch.no_grad():
        y, values = first.eval()(x, ctx)
        later = Context(phase="train", positions=ctx.positions, causal=False, values=values)
        again, _ = second.eval()(y, later)
        for b in range(2):
            expected, moved, owners = naive_clusterformer(first, x[b], first.centroids)
            assert len(set(owners)) > 2
            same(y[b], expected, 1e-12)
            same(values["clusterformer_centroids"][b], moved, 1e-12)
            same(again[b], naive_clusterformer(second, y[b], moved)[0], 1e-12)


def test_clusterformers_terms_join_the_loss_in_training_alone() -> None:
    kind = dict(heads=H, head_dim=K, chunk=4, clusters=5, clustering=0.3, sorting=0.2)
    module, (x, _) = make_mixer("clusterformer", **kind), inputs(19)
    ctx = Context(phase="train", positions=torch.arange(19).expand(2, -1), causal=False)
    module.eval()(x, ctx)[0].sum().backward()
    assert module.centroids.grad is None
    module.train()(x, ctx)[0].sum().backward()
    found = [module.centroids.grad.clone(), module.centroid_proj.weight.grad.clone()]
    module.zero_grad()
    moved = module.moved(x, ctx)
    near = torch.cosine_similarity(x[:, :, None], moved[:, None], dim=-1).amax(-1)
    alike = torch.cosine_similarity(moved[:, 1:], moved[:, :-1], dim=-1)
    (-0.3 * near.mean() - 0.2 * alike.mean()).backward()
    for grad, expected in zip(found, (module.centroids.grad, module.centroid_proj.weight.grad), strict=True):
        same(grad, expected, 1e-10)


def test_training_brings_words_and_centroids_together() -> None:
    args = dict(heads=H, head_dim=K, chunk=4, clusters=4, clustering=1.0)
    layer = Layer(mixer="clusterformer", mixer_args=args, channel="swiglu", channel_args=dict(intermediate_size=32))
    config = DecoderConfig(vocab_size=VOCAB, hidden_size=WIDTH, layers=(layer,))
    torch.manual_seed(0)
    model = ZooForMaskedLM(ZooConfig.from_decoder(config, "test")).train()
    ids, losses = torch.randint(0, VOCAB, (4, 32)), []
    mixer = model.model.layers[0].mixer
    mixer.loss = lambda *given: losses.append(type(mixer).loss(mixer, *given)) or losses[-1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(15):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert losses[-1].item() < losses[0].item() - 0.05


@pytest.mark.parametrize("name", ["longformer", "bigbird", "clusterformer", "reformer", "routing_transformer"])
def test_a_layout_string_makes_an_encoder(name: str) -> None:
    layout = {"reformer": "reformer(chunk=8,buckets=4)", "bigbird": "bigbird(block=16)"}.get(name, name)
    if registry.get("mixers", name, "MODULE").encoder_only:
        model = zoo.create("hybrid", layout=f"{layout}*2")
        assert type(model) is ZooForMaskedLM and model.state_bytes(100) == 0
    else:
        assert zoo.create("hybrid", layout=f"{layout}*2").state_bytes(100) > 0


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("longformer", dict(window=3), "window was 3; it must be even"),
        ("longformer", dict(window=4, global_tokens=0), "global_tokens was 0"),
        ("longformer", dict(window=4, qk_norm="rms"), "qk_norm"),
        ("bigbird", dict(block=8), "block was 8"),
        ("bigbird", dict(window=2), "window was 2; it must be odd"),
        ("bigbird", dict(random=-1), "random was -1"),
        ("clusterformer", dict(clusters=1), "clusters was 1"),
        ("clusterformer", dict(clustering=0.0), "clustering must be above 0"),
    ],
)
def test_wrong_options_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    cls = registry.get("mixers", name, "MODULE")
    with pytest.raises(ZooError, match=message):
        cls.parse({"heads": 4, "head_dim": 16, **args}).check(CONFIG)
