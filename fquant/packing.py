"""Packed storage: codes of up to 4 bits, two or four to a byte."""

import torch
from torch import Tensor

from fquant.formats import Format
from fquant.pytree import record, static
from fquant.records import QTensor
from fquant.spec import INT8


@record
class PackedTensor:
    """A QTensor whose codes share bytes; `pack` makes it, `unpack` and `dequantize` read it.

    Attributes:
        packed: uint8; along the last axis 2 codes of 3 or 4 bits to a byte, or 4 of 2, the first in
            the lowest bits; unused bits are 0.
        scale: as in QTensor.
        zero_point: as in QTensor.
        spec: the grid.
        length: of the last axis, in codes.
        dtype: as in QTensor.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    spec: Format = static(default=INT8)
    length: int = static(default=0)
    dtype: torch.dtype = static(default=torch.float32)

    @property
    def shape(self) -> torch.Size:
        """The shape of the codes."""
        return torch.Size([*self.packed.shape[:-1], self.length])


def pack(x: QTensor) -> PackedTensor:
    """Returns x with its codes packed; `unpack` gives x back exactly.

    Raises:
        TypeError: x is not a QTensor.
        ValueError: codes wider than 4 bits, or a 0-d x.

    Example:
        >>> x = fquant.quantize(torch.tensor([1.0, -2.0, 7.0]), 1.0, spec=fquant.QuantSpec(4))
        >>> pack(x).packed, unpack(pack(x)).q
        (tensor([225,   7], dtype=torch.uint8), tensor([ 1, -2,  7], dtype=torch.int8))
    """
    if not isinstance(x, QTensor):
        raise TypeError(f"pack: x must be a QTensor, got {type(x).__name__}.")
    per_byte = _codes_per_byte("pack", x.spec)
    if x.q.ndim == 0:
        raise ValueError("pack: x must have at least one axis, got a 0-d one.")
    width = 8 // per_byte
    length = x.q.shape[-1]
    codes = x.q.to(torch.int32) & (2**width - 1)
    codes = torch.nn.functional.pad(codes, (0, -length % per_byte))
    codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    shifts = torch.arange(per_byte, dtype=torch.int32, device=codes.device) * width
    packed = (codes << shifts).sum(-1).to(torch.uint8)
    return PackedTensor(packed, x.scale, x.zero_point, x.spec, length, x.dtype)


def unpack(x: PackedTensor) -> QTensor:
    """Returns the QTensor that was packed."""
    if not isinstance(x, PackedTensor):
        raise TypeError(f"unpack: x must be a PackedTensor, got {type(x).__name__}.")
    per_byte = _codes_per_byte("unpack", x.spec)
    width = 8 // per_byte
    shifts = torch.arange(per_byte, dtype=torch.int32, device=x.packed.device) * width
    codes = (x.packed.to(torch.int32).unsqueeze(-1) >> shifts) & (2**width - 1)
    codes = codes.flatten(-2)[..., : x.length]
    if x.spec.dtype == torch.int8 and x.spec.q_min < 0:  # two's complement
        codes = torch.where(codes >= 2 ** (width - 1), codes - 2**width, codes)
    return QTensor(codes.to(x.spec.dtype), x.scale, x.zero_point, x.spec, x.dtype)


def _codes_per_byte(function: str, spec: Format) -> int:
    if spec.num_bits > 4:
        raise ValueError(
            f"{function}: spec must have codes of at most 4 bits, got {spec.num_bits}."
        )
    return 4 if spec.num_bits <= 2 else 2
