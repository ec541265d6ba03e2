"""Which implementation serves which op on which device, and why others do not.

An op module offers each of its backends once, at import: `offer(op, "cpu", "cpp", ...)`. Where the
backend cannot run here the reference stays in place, and `backends()` gives the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fquant_kernels import triton_support
from fquant_kernels.library import register_backend


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    `unavailable` is the reason it is not in use, or None where it serves its device.
    """

    op: str
    device: str
    name: str
    unavailable: str | None
    implementation: Callable[..., Any]
    detail: str = ""

    def __str__(self) -> str:
        if self.unavailable is None:
            state = f"in use, {self.detail}" if self.detail else "in use"
        else:
            state = f"not in use: {self.unavailable}"
        return f"{self.op} on {self.device}, {self.name}: {state}"


_offered: list[Backend] = []


def offer(
    op: Any,
    device: str,
    name: str,
    check_args: Callable[..., None],
    implementation: Callable[..., Any],
    why_unavailable: Callable[[], str | None],
    detail: str = "",
) -> None:
    """Registers an implementation for tensors of one device type, if it can run here.

    Args:
        op: what `define_inference_op` returned.
        device: "cpu" or "cuda".
        name: what `backends()` calls it.
        check_args: the op's own.
        implementation: same arguments and same results as the reference, bit for bit; imports
            optional packages inside, not at the top of its module.
        why_unavailable: returns the reason it cannot run, or None; called once, now.
        detail: which variant of it runs here, for `backends()`.
    """
    reason = why_unavailable()
    if reason is None:
        register_backend(op, device, check_args, implementation)
    _offered.append(Backend(op.name(), device, name, reason, implementation, detail))


def backends() -> list[Backend]:
    """Returns every backend that was offered. The reference serves every op and device without one.

    Example:
        >>> for backend in backends():
        ...     print(backend)
        fquant::...
    """
    on_cuda = [
        Backend(op, "cuda", "triton", triton_support.why_unavailable(), implementation)
        for op, implementation in triton_support.triton_ops().items()
    ]
    return [*_offered, *on_cuda]
