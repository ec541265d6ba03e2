"""State dicts of spconv for this library's modules, and back: names and shapes are the same."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from fquant.sparse import nn as sparse_nn

POINTWISE = ("spconv", "weight")
_COUNTER = "_max_num_voxels_during_training"


def from_spconv_state_dict(
    state: Mapping[str, Tensor],
    model: nn.Module,
    *,
    pointwise: str = "spconv",
    layout: str = "KRSC",
) -> dict[str, Tensor]:
    """Returns what `model.load_state_dict` takes, from the state dict of the same model in spconv.

    Args:
        state: tensors by name; shared where nothing is to be changed. spconv's voxel counters are left
            out.
        model: the model in this library's modules, for which of its layers are convolutions.
        pointwise: "spconv" if weights of 1 x 1 convolutions mean what spconv computes with them in
            float, `x @ weight.view(in, out)`; "weight" if they mean `x @ weight.T`, as in its int8 path.
        layout: "KRSC", (out, *kernel, in), or that of spconv 1, "RSCK", (*kernel, in, out).

    Raises:
        ValueError: pointwise or layout is none of these.

    Example:
        >>> model = fquant.sparse.nn.SubMConv1d(2, 2, 1, bias=False)
        >>> state = {"weight": torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])}
        >>> from_spconv_state_dict(state, model)["weight"].flatten(1)
        tensor([[1., 3.],
                [2., 4.]])
    """
    if layout not in ("KRSC", "RSCK"):
        raise ValueError(
            f"from_spconv_state_dict: layout must be 'KRSC' or 'RSCK', got {layout!r}."
        )
    _require_pointwise("from_spconv_state_dict", pointwise)
    convs = _convolutions(model)
    result = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        if leaf == _COUNTER:
            continue
        if path in convs and leaf == "weight":
            if layout == "RSCK":
                tensor = tensor.movedim(-1, 0).contiguous()
            if pointwise == "spconv" and is_pointwise(convs[path]):
                tensor = true_pointwise(tensor)
        result[name] = tensor
    return result


def to_spconv_state_dict(
    state: Mapping[str, Tensor], model: nn.Module, *, pointwise: str = "spconv"
) -> dict[str, Tensor]:
    """Returns the state dict of the same model in spconv; `from_spconv_state_dict` undoes it.

    Args:
        state: tensors by name, `model.state_dict()`; shared where nothing is to be changed.
        model: the model in this library's modules.
        pointwise: as there.

    Raises:
        ValueError: pointwise is neither "spconv" nor "weight".
    """
    _require_pointwise("to_spconv_state_dict", pointwise)
    convs = _convolutions(model)
    result = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        rearranged = pointwise == "spconv" and leaf == "weight" and path in convs
        if rearranged and is_pointwise(convs[path]):
            channels = tensor.reshape(tensor.shape[0], tensor.shape[-1])
            tensor = channels.T.contiguous().view(tensor.shape)
        result[name] = tensor
    return result


def is_pointwise(conv: sparse_nn.SparseConvolution) -> bool:
    """Whether spconv computes a convolution as one matrix product: one tap, and no stride."""
    if math.prod(conv.kernel_size) != 1:
        return False
    geometry = conv.geometry
    return geometry is None or math.prod(geometry.stride) == 1


def true_pointwise(weight: Tensor) -> Tensor:
    """Returns W, (out, 1, ..., in), with `x @ W.T == x @ weight.view(in, out)`."""
    out_channels, in_channels = weight.shape[0], weight.shape[-1]
    return weight.reshape(in_channels, out_channels).T.contiguous().view(weight.shape)


def _convolutions(model: nn.Module) -> dict[str, sparse_nn.SparseConvolution]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, sparse_nn.SparseConvolution)
    }


def _require_pointwise(function: str, pointwise: str) -> None:
    if pointwise not in POINTWISE:
        raise ValueError(f"{function}: pointwise must be one of {POINTWISE}, got {pointwise!r}.")
