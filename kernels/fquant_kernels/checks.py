"""Argument checks shared by the ops: dtype, shape and device, never values."""

import torch
from torch import Tensor


def require_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: tuple[object, ...],
    like: Tensor,
) -> None:
    """Raises unless a tensor is what the op takes; runs on fake tensors too.

    Args:
        op: the op's name, which begins the message.
        name: the argument's name.
        tensor: the argument.
        dtype: what it must be.
        shape: its sizes; a string stands for any size, and names it in the message.
        like: a tensor on the device it must be on: the features.

    Raises:
        TypeError: the dtype differs.
        ValueError: the shape or the device differs.
    """
    where = f"{op}: {name} must"
    if tensor.dtype != dtype:
        raise TypeError(f"{where} be {dtype}, got {tensor.dtype}.")
    if tensor.ndim != len(shape) or any(
        isinstance(want, int | torch.SymInt) and have != want
        for have, want in zip(tensor.shape, shape, strict=True)
    ):
        raise ValueError(f"{where} have shape {shape}, got {tuple(tensor.shape)}.")
    if tensor.device != like.device:
        raise ValueError(f"{where} be on {like.device} like features, got {tensor.device}.")


def check_epilogue(
    op: str,
    features: Tensor,
    num_outputs: int,
    num_channels: int,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
) -> None:
    """Checks the arguments of the int8 epilogue for a result of `(num_outputs, num_channels)`."""
    require_tensor(op, "scale", scale, torch.float32, (num_channels,), features)
    if bias is not None:
        require_tensor(op, "bias", bias, torch.float32, (num_channels,), features)
    if (residual is None) != (residual_scale is None):
        raise ValueError(
            f"{op}: residual and residual_scale must be given together, "
            f"got residual {'absent' if residual is None else 'given'}, "
            f"residual_scale {'absent' if residual_scale is None else 'given'}."
        )
    if residual is not None and residual_scale is not None:
        out_shape = (num_outputs, num_channels)
        require_tensor(op, "residual", residual, torch.int8, out_shape, features)
        require_tensor(op, "residual_scale", residual_scale, torch.float32, (), features)
