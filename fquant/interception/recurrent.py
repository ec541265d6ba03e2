"""LSTM and GRU written out over time, so that their products are operations that rules can reach.

Each layer and direction is one site, `path/lstm#k` or `path/gru#k` in the order of computation:
layer 0 forward, layer 0 reverse, layer 1 forward, ... Its operands are

    input        the layer's whole input sequence
    hidden       the hidden state at every step, under one quantizer
    weight_ih    (gates * hidden_size, input_size), channels on axis 0
    weight_hh    (gates * hidden_size, hidden_size), channels on axis 0

LSTMCell and GRUCell are sites of the same kind. Weights are rounded once per call, not once per step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fquant.interception.operation import Op, Slot
from fquant.interception.stack import operands_of, unseen

_SLOTS = (
    Slot("input", "inputs", -1, axis=-1),
    Slot("hidden", "inputs", -1, axis=-1),
    Slot("weight_ih", "weight", -1, axis=0),
    Slot("weight_hh", "weight", -1, axis=0),
)
LSTM = Op("lstm", _SLOTS)
GRU = Op("gru", _SLOTS)
RECURRENT_OPS = (LSTM, GRU)
State = tuple[Tensor, ...]


def lstm(module: Any, x: Any, hx: Any = None) -> Any:
    """Returns what `nn.LSTM.forward` returns: `(output, (h, c))`."""
    return _recurrent(module, x, hx, LSTM, _lstm_step)


def gru(module: Any, x: Any, hx: Any = None) -> Any:
    """Returns what `nn.GRU.forward` returns: `(output, h)`."""
    y, (h,) = _recurrent(module, x, None if hx is None else (hx,), GRU, _gru_step)
    return y, h


def lstm_cell(module: Any, x: Tensor, hx: Any = None) -> State:
    """Returns what `nn.LSTMCell.forward` returns: `(h, c)`."""
    h, c = _cell(module, x, hx, LSTM, _lstm_step)
    return h, c


def gru_cell(module: Any, x: Tensor, hx: Any = None) -> Tensor:
    """Returns what `nn.GRUCell.forward` returns: h."""
    return _cell(module, x, None if hx is None else (hx,), GRU, _gru_step)[0]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product that is part of a site, and not one of its own: its operands are quantized already."""
    return unseen(F.linear, x, weight, bias)


def _lstm_step(projected: Tensor, recurrent: Tensor, state: State) -> State:
    i, f, g, o = (projected + recurrent).chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(projected: Tensor, recurrent: Tensor, state: State) -> State:
    r_x, z_x, n_x = projected.chunk(3, dim=-1)
    r_h, z_h, n_h = recurrent.chunk(3, dim=-1)
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    n = (n_x + r * n_h).tanh()
    return ((1.0 - z) * n + z * state[0],)


def _cell(module: Any, x: Tensor, state: State | None, op: Op, step: Any) -> State:
    operand = operands_of(op)
    if state is None:
        zero = x.new_zeros((*x.shape[:-1], module.hidden_size))
        state = (zero, zero) if op is LSTM else (zero,)
    projected = _linear(operand("input", x), operand("weight_ih", module.weight_ih), module.bias_ih)
    hidden = _linear(
        operand("hidden", state[0]), operand("weight_hh", module.weight_hh), module.bias_hh
    )
    return step(projected, hidden, state)


def _recurrent(module: Any, x: Any, hx: State | None, op: Op, step: Any) -> tuple[Tensor, State]:
    if isinstance(x, nn.utils.rnn.PackedSequence):
        raise TypeError(
            f"{op.name}: input must be a padded tensor under quantization, got PackedSequence. "
            "pad_packed_sequence turns one into the other."
        )
    batched = x.dim() == 3
    if not batched:
        x = x.unsqueeze(0 if module.batch_first else 1)
        hx = None if hx is None else tuple(t.unsqueeze(1) for t in hx)
    if module.batch_first:
        x = x.transpose(0, 1)
    directions = 2 if module.bidirectional else 1
    finals: list[State] = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            state = None if hx is None else tuple(t[number] for t in hx)
            y, last = _direction(module, x, state, layer, direction == 1, op, step)
            outputs.append(y)
            finals.append(last)
        x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
        if module.dropout and module.training and layer + 1 < module.num_layers:
            x = F.dropout(x, module.dropout)
    final = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    y = x.transpose(0, 1) if module.batch_first else x
    if not batched:
        y = y.squeeze(0 if module.batch_first else 1)
        final = tuple(t.squeeze(1) for t in final)
    return y, final


def _direction(
    module: Any, x: Tensor, state: State | None, layer: int, reverse: bool, op: Op, step: Any
) -> tuple[Tensor, State]:
    """One layer in one direction over (time, batch, features)."""
    operand = operands_of(op)
    suffix = f"_l{layer}_reverse" if reverse else f"_l{layer}"
    bias_ih, bias_hh = (
        getattr(module, name + suffix) if module.bias else None for name in ("bias_ih", "bias_hh")
    )
    w_ih = operand("weight_ih", getattr(module, "weight_ih" + suffix))
    w_hh = operand("weight_hh", getattr(module, "weight_hh" + suffix))
    w_hr = getattr(module, "weight_hr" + suffix) if getattr(module, "proj_size", 0) else None
    projected = _linear(operand("input", x), w_ih, bias_ih)
    if state is None:
        cell = x.new_zeros((x.shape[1], module.hidden_size))
        h = cell if w_hr is None else x.new_zeros((x.shape[1], module.proj_size))
        state = (h, cell) if op is LSTM else (h,)
    steps = range(x.shape[0] - 1, -1, -1) if reverse else range(x.shape[0])
    outputs = []
    for t in steps:
        state = step(projected[t], _linear(operand("hidden", state[0]), w_hh, bias_hh), state)
        if w_hr is not None:
            state = (_linear(state[0], w_hr), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state
