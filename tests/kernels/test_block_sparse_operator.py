"""Block-sparse attention: what it refuses, and what compilers see of it."""

from __future__ import annotations

import pytest
import torch
from sparse_calls import inputs, lists

from zoo.kernels.block_sparse_attention import block_sparse_attention

BAD = [
    ({"block": 8}, "block is 8; it must be 1 or an integer of 16 to 128"),
    ({"block": 200}, "block is 200; it must be 1 or an integer of 16 to 128, or a multiple of 128 up to 4096"),
    ({"query_block": 129}, "query_block is 129"),
    ({"query_block": 256}, "query_block is 256"),
    ({"query_block": True}, "query_block is True"),
    ({"window": -1}, "window is -1"),
    ({"sink_tokens": 1.5}, "sink_tokens is 1.5"),
    ({"causal": None}, "causal is None"),
    ({"blocks": torch.zeros(2, 3, 5, 3, dtype=torch.int64)}, "blocks has shape [2, 3, 5, 3]"),
    ({"blocks": torch.zeros(2, 2, 4, 3, dtype=torch.int64)}, "blocks has shape [2, 2, 4, 3]"),
    ({"blocks": torch.zeros(2, 2, 5, 0, dtype=torch.int64)}, "blocks has shape [2, 2, 5, 0]"),
    ({"blocks": torch.zeros(2, 2, 5, 3)}, "blocks has dtype torch.float32"),
    ({"counts": torch.zeros(2, 2, 4, dtype=torch.int64)}, "counts has shape"),
    ({"columns": torch.zeros(2, 4, 3, dtype=torch.int64)}, "columns has shape"),
    ({"bias": torch.zeros(2, 2, 5, 3)}, "bias has dtype torch.float32"),
    ({"bias": torch.zeros(2, 2, 5, 2).double()}, "bias has shape"),
    ({"q_positions": torch.arange(4)}, "q_positions has shape"),
    ({"q_positions": torch.arange(5).flip(0)}, "q_positions is [4, 3, 2, 1, 0]; it must count up by one"),
    ({"starts": torch.zeros(3, dtype=torch.int64)}, "starts has shape"),
    ({"starts": torch.zeros(2)}, "starts has dtype"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_argument_is_named(change, message):
    tensors, given = lists(inputs(5), 1, 16)
    with pytest.raises(ValueError) as caught:
        block_sparse_attention(**tensors | given | change)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["q_positions", "starts"])
def test_packed_sequences_have_no_padding(name):
    cu_seqlens, tensors = torch.tensor([0, 5], dtype=torch.int32), inputs(5, b=1)
    tensors, given = lists(tensors, 1, 16, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=f"{name} is given beside cu_seqlens"):
        block_sparse_attention(**tensors, **given, cu_seqlens=cu_seqlens, **{name: torch.arange(5)})


def test_the_op_is_well_formed():
    tensors, given = lists(inputs(20, dtype=torch.float32), 16, 16, columns=3, bias=True)
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    args = [tensors["q"], tensors["k"], tensors["v"], given["blocks"], given["counts"], given["columns"]]
    args += [tensors["bias"], None, None, None, 16, 16, True, 2, 1, 0.4]
    torch.library.opcheck(torch.ops.zoo.block_sparse_attention_chunked.default, tuple(args))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_in_one_graph(packed, evaluate, assert_close):
    cu_seqlens = torch.tensor([0, 3, 3, 20], dtype=torch.int32) if packed else None
    tensors, given = lists(inputs(20, b=1, dtype=torch.float32), 16, 16, columns=2, bias=True, cu_seqlens=cu_seqlens)
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    options = {"return_lse": True, "window": 2, "cu_seqlens": cu_seqlens, **given}
    assert_close(evaluate(compiled, tensors, **options), evaluate(block_sparse_attention, tensors, **options), 1e-5)
