"""mLSTM and sLSTM against transformers, their definitions and torch's LSTM."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from xlstm_calls import D64, flat, mlstm_inputs, slstm_inputs

from zoo.kernels.mlstm import mlstm
from zoo.kernels.slstm import slstm


@pytest.mark.parametrize("kind", ["recurrent", "chunkwise"])
@pytest.mark.parametrize("with_state", [True, False])
def test_mlstm_equals_transformers(kind, with_state, evaluate, assert_close):
    """[B, H, T, ...] there, and m [B, H, 1]."""
    from transformers.models.xlstm import modeling_xlstm as theirs

    tensors = mlstm_inputs(128, with_state=with_state, sizes=(2, 2, 8, 6))

    def run(q, k, v, input_gate, forget_gate, C=None, n=None, m=None):
        names = ("query", "key", "value", "igate", "fgate")
        given = dict(zip(names, (x.transpose(1, 2) for x in (q, k, v, input_gate, forget_gate)), strict=True))
        given |= {"c_initial": C, "n_initial": n, "m_initial": None if m is None else m.unsqueeze(-1)}
        if kind == "recurrent":
            function = theirs.mlstm_recurrent_sequence_native
            h, state = function(**given, return_last_states=True, dtype_state=D64)
        else:
            function = theirs.mlstm_chunkwise_native_autograd
            given = {name: x if x is None else x.contiguous() for name, x in given.items()}
            h, state = function(**given, return_last_states=True, chunk_size=32)
        return h.transpose(1, 2), state[0], state[1], state[2].squeeze(-1)

    assert_close(evaluate(flat("mlstm"), tensors), evaluate(run, tensors), 1e-10)


def test_mlstm_equals_its_unstabilised_definition():
    """C, n and the exponentials as the paper first writes them, without any maximum."""
    x = mlstm_inputs(40, with_state=False, spread=1.0, sizes=(2, 2, 8, 6))
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    forget = F.logsigmoid(x["forget_gate"]).cumsum(1).transpose(1, 2)
    gates = (forget[..., :, None] - forget[..., None, :] + x["input_gate"].transpose(1, 2)[..., None, :]).exp().tril()
    weights = (q @ k.mT) / 8**0.5 * gates
    expected = weights @ v / weights.sum(-1, keepdim=True).abs().clamp(min=1.0)
    h, _ = mlstm(**x)
    torch.testing.assert_close(h.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


def test_slstm_without_recurrent_weights_is_a_weighted_mean():
    """With R = 0 the cell is a mean of tanh(z), weighed by the input gate and the forget gates since."""
    x = slstm_inputs(40, with_state=False)
    x["recurrent"].zero_()
    forget = F.logsigmoid(x["forget_gate"]).cumsum(1)
    logits = forget[:, :, None] - forget[:, None] + x["input_gate"][:, None]
    seen = torch.ones(40, 40, dtype=torch.bool).tril()[None, :, :, None, None]
    mean = (logits.masked_fill(~seen, -torch.inf).softmax(2) * x["cell_input"].tanh()[:, None]).sum(2)
    h, _ = slstm(**x)
    torch.testing.assert_close(h, x["output_gate"].sigmoid() * mean)


def test_slstm_equals_a_plain_lstm_with_its_gates():
    """Where n stays 1 (i = 1 - f) the cell is torch's LSTM: log-odds of the gates make it so."""
    x = slstm_inputs(20, with_state=False, sizes=(1, 3))
    x["recurrent"][:2] = 0  # gates free of h, so that the input gate can follow the forget gate
    x["input_gate"] = F.logsigmoid(-x["forget_gate"])
    state = {name: torch.zeros(2, 1, 3, dtype=D64) for name in "cnhm"}
    state["n"] = torch.ones_like(state["n"])
    h, c = torch.zeros(2, 3, dtype=D64), torch.zeros(2, 3, dtype=D64)
    rows = []
    for t in range(20):
        z, o = (x[name][:, t, 0] + h @ x["recurrent"][g, 0] for g, name in ((2, "cell_input"), (3, "output_gate")))
        f = x["forget_gate"][:, t, 0].sigmoid()
        c = f * c + (1 - f) * z.tanh()
        h = o.sigmoid() * c
        rows.append(h)
    found, _ = slstm(**x, initial_state=tuple(state.values()))
    torch.testing.assert_close(found[:, :, 0], torch.stack(rows, 1))
