"""Argument checks shared by the public functions, with messages of one form.

`{function}: {argument} must be {requirement}, got {value}.`
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fquant.granularity import meets

_FAKE_MODE = torch._C._TorchDispatchModeKey.FAKE


def values_readable(*tensors: Tensor) -> bool:
    """Whether the numbers in these tensors can be looked at here and now.

    False under `torch.compile` and `torch.export`, inside `torch.func` transforms, and for tensors
    without data (meta, fake): there, checks of values are left out and the formulas stand alone.
    """
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_FAKE_MODE) is not None:
        return False
    return not any(
        torch._C._functorch.is_functorch_wrapped_tensor(t) or t.is_meta or isinstance(t, FakeTensor)
        for t in tensors
    )


def require_floating(function: str, argument: str, value: object) -> None:
    """Raises TypeError unless `value` is a float16, bfloat16, float32 or float64 tensor."""
    requirement = f"{function}: {argument} must be a floating-point tensor"
    if not isinstance(value, Tensor):
        raise TypeError(f"{requirement}, got {type(value).__name__}.")
    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{requirement}, got dtype {value.dtype}.")


def require_int(function: str, argument: str, value: object, low: int, high: int | None) -> None:
    """Raises ValueError unless `value` is an integer from `low` to `high` (None: without end)."""
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < low
        or (high is not None and value > high)
    ):
        end = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{function}: {argument} must be an integer {end}, got {value!r}.")


def require_positive(function: str, argument: str, value: Tensor) -> None:
    """Raises ValueError if a value is 0 or negative; not checked where values cannot be read."""
    if values_readable(value) and bool((value <= 0).any()):
        raise ValueError(f"{function}: {argument} must be positive, got {value.min().item()}.")


def require_not_negative(function: str, argument: str, value: Tensor) -> None:
    """Raises ValueError if a value is negative; not checked where values cannot be read."""
    if values_readable(value) and bool((value < 0).any()):
        least = value[value < 0].min().item()
        raise ValueError(f"{function}: {argument} must not be negative, got {least}.")


def as_broadcastable(
    function: str, argument: str, value: Tensor | float, inputs: Tensor, dtype: torch.dtype
) -> Tensor:
    """Returns `value` as a tensor of `dtype` that meets `inputs` by the rule of `granularity`.

    Raises:
        TypeError: it is not a number or a real tensor.
        ValueError: its shape does not broadcast to the shape of `inputs`, or its device is another
            one (a tensor of one element may live on the CPU).
    """
    if isinstance(value, int | float):
        return torch.full((), value, dtype=dtype, device=inputs.device)
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        got = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{function}: {argument} must be a number or a real tensor, got {got}.")
    if value.device != inputs.device and value.ndim > 0:
        raise ValueError(
            f"{function}: {argument} must be on {inputs.device} like the inputs, "
            f"got a tensor on {value.device}."
        )
    if not meets(value.shape, inputs.shape):
        raise ValueError(
            f"{function}: {argument} must have a shape that broadcasts to the inputs' "
            f"{tuple(inputs.shape)}, got {tuple(value.shape)}."
        )
    return value.to(inputs.device, dtype)


def require_same_device(function: str, argument: str, value: Tensor, like: Tensor) -> None:
    """Raises ValueError unless two tensors are on one device."""
    if value.device != like.device:
        raise ValueError(
            f"{function}: {argument} must be on {like.device} like the features, "
            f"got {value.device}."
        )


def require_no_derivative(function: str, x: Tensor) -> None:
    """Raises RuntimeError where `torch.func` differentiates by x; integers would give silent zeros."""
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            raise RuntimeError(
                f"{function} has no derivative: it computes in integers. Train with fquant.fake_quant; "
                "this is for deployment."
            )
        x = functorch.get_unwrapped(x)


def require_data(function: str, argument: str, value: Tensor) -> None:
    """Raises ValueError if a tensor is on the meta device, where there are no values to read."""
    if value.is_meta:
        raise ValueError(
            f"{function}: {argument} must have data, because its values are read, got a tensor on meta."
        )


def compute_dtype(inputs: Tensor) -> torch.dtype:
    """The dtype that arithmetic on `inputs` is done in: float32, or float64 for float64.

    Half types are computed in float32, because compiled code would otherwise round less often
    than eager code (12 % of bfloat16 values one step apart when it was tried).
    """
    return torch.float64 if inputs.dtype == torch.float64 else torch.float32


def divide(a: Tensor | float, b: Tensor | float) -> Tensor:
    """Returns a / b correctly rounded, where either is a number.

    torch computes `number / tensor` as `reciprocal * number`, and `tensor / number` likewise on
    CUDA: one unit in the last place off, and different from device to device.
    """
    like = a if isinstance(a, Tensor) else b
    assert isinstance(like, Tensor)
    return torch.as_tensor(a, dtype=like.dtype, device=like.device) / torch.as_tensor(
        b, dtype=like.dtype, device=like.device
    )
