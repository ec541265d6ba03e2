"""spconv's convolutions as operations that rules can quantize: their forward is one site."""

from typing import Any

from spconv.pytorch.conv import SparseConvolution
from torch import Tensor

from fquant.checks import values_readable
from fquant.interception.ops import DEFAULT_OPS, Ops, replace_forward
from fquant.interception.stack import quantizable


def spconv_ops(ops: Ops = DEFAULT_OPS) -> Ops:
    """Returns a table in which spconv's convolutions are operations.

    Their names are this library's: `subm_conv`, `sparse_conv`, `sparse_conv_transpose`,
    `sparse_inverse_conv`; weights have their output channels on axis 0. Use it with
    `make_plan(..., fake=False)`, because spconv computes on memory only; the same limit keeps
    `torch.func`, compile and export out, and on its CPU build training too: `convert_spconv` lifts it.

    Args:
        ops: the table to extend.

    Example:
        >>> import spconv.pytorch
        >>> x = spconv.pytorch.SparseConvTensor(torch.ones(1, 2), torch.tensor([[0, 3]]).int(), [4], 1)
        >>> model = spconv.pytorch.SubMConv1d(2, 3, 3, bias=False)
        >>> plan = fquant.make_plan(model, fquant.w8a8(), (x,), ops=spconv_ops(), fake=False)
        >>> print(plan)
        site         module      [rule]  operands
        subm_conv#0  SubMConv1d  [0]  input 1x2 int8; weight 3x3x2 int8 axis 0
    """
    return replace_forward(ops, SparseConvolution, _forward)


def _forward(module: Any, x: Any, add_input: Any = None) -> Any:
    if not values_readable(x.features):
        raise ValueError(
            f"{type(module).__name__}: spconv must have tensors with data, outside of transforms, got "
            "others. make_plan(..., fake=False) plans on the example; convert_spconv lifts the limit."
        )
    operation = _subm_conv
    if not module.subm:
        operation = _sparse_conv
        if module.inverse:
            operation = _sparse_inverse_conv
        elif module.transposed:
            operation = _sparse_conv_transpose
    return operation(x.features, module.weight, module, x, add_input)


def _run(features: Tensor, weight: Tensor, module: Any, x: Any, add_input: Any) -> Any:
    """The class's own forward, on a copy of the module that has another weight."""
    copy = object.__new__(type(module))
    state = {name: value for name, value in vars(module).items() if name != "forward"}
    vars(copy).update(state)
    vars(copy)["_parameters"] = {**module._parameters, "weight": weight}
    return type(module).forward(copy, x.replace_feature(features), add_input)


@quantizable(inputs=("features",), weight="weight", name="subm_conv")
def _subm_conv(features: Tensor, weight: Tensor, module: Any, x: Any, add_input: Any) -> Any:
    return _run(features, weight, module, x, add_input)


@quantizable(inputs=("features",), weight="weight", name="sparse_conv")
def _sparse_conv(features: Tensor, weight: Tensor, module: Any, x: Any, add_input: Any) -> Any:
    return _run(features, weight, module, x, add_input)


@quantizable(inputs=("features",), weight="weight", name="sparse_conv_transpose")
def _sparse_conv_transpose(
    features: Tensor, weight: Tensor, module: Any, x: Any, add_input: Any
) -> Any:
    return _run(features, weight, module, x, add_input)


@quantizable(inputs=("features",), weight="weight", name="sparse_inverse_conv")
def _sparse_inverse_conv(
    features: Tensor, weight: Tensor, module: Any, x: Any, add_input: Any
) -> Any:
    return _run(features, weight, module, x, add_input)
