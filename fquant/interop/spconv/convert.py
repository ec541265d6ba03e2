"""A model of spconv's modules in this library's."""

from typing import Any

import spconv.pytorch as package
from spconv.pytorch import conv as conv_module
from spconv.pytorch import modules as small
from spconv.pytorch import pool as pool_module
from spconv.pytorch import tables
from torch import nn

from fquant.interop.spconv.state import POINTWISE, is_pointwise, true_pointwise
from fquant.sparse import nn as ours


def convert_spconv(
    model: nn.Module, *, pointwise: str = "spconv", max_pool_floor: bool = False
) -> nn.Module:
    """Returns the same model in this library's modules; it takes and returns `SparseTensor`s.

    Paths, names and parameters are the model's own, tensors shared (but for the weights of 1 x 1
    convolutions, see pointwise), and the model is not written. Modules of other classes are copied
    with their children converted and their forwards as they are: `x.features`, `x.indices`,
    `x.replace_feature(...)`, `x.dense()` and `x + y` are there for them.

    Args:
        model: any module.
        pointwise: "spconv" to keep what 1 x 1 convolutions compute in float, by a rearranged copy of
            their weights; "weight" to take the weights as they stand, as its int8 path does.
        max_pool_floor: whether max pools of negative values give 0, as on spconv's CPU build.

    Raises:
        ValueError: pointwise is neither; a convolution has groups, a fused activation, or is a
            transposed one with dilation, the size of whose output spconv computes without it.
        TypeError: a module of spconv has no counterpart here.

    Example:
        >>> import spconv.pytorch
        >>> model = torch.nn.Sequential(spconv.pytorch.SubMConv1d(2, 3, 3, bias=False))
        >>> convert_spconv(model)
        Sequential( (0): SubMConv1d(2, 3, subm k3, bias=False) )
    """
    if pointwise not in POINTWISE:
        raise ValueError(
            f"convert_spconv: pointwise must be one of {POINTWISE}, got {pointwise!r}."
        )
    return _Converter(pointwise == "spconv", max_pool_floor).module(model, "")


_SIMPLE: dict[type, Any] = {
    small.SparseReLU: ours.SparseReLU,
    small.SparseIdentity: ours.SparseIdentity,
    package.Identity: ours.SparseIdentity,
    package.RemoveGrid: ours.SparseIdentity,
    package.ToDense: ours.ToDense,
    tables.AddTable: ours.AddTable,
    tables.JoinTable: ours.JoinTable,
    tables.AddTableMisaligned: ours.AddTableMisaligned,
    pool_module.SparseGlobalMaxPool: ours.SparseGlobalMaxPool,
}


class _Converter:
    def __init__(self, rearrange: bool, floor: bool) -> None:
        self.rearrange = rearrange
        self.floor = floor
        self.done: dict[int, nn.Module] = {}

    def module(self, module: nn.Module, path: str) -> nn.Module:
        if id(module) not in self.done:
            made = self._made(module, path)
            made.training = module.training  # not train(): children have their own
            self.done[id(module)] = made
        return self.done[id(module)]

    def _made(self, module: Any, path: str) -> nn.Module:
        if isinstance(module, conv_module.SparseConvolution):
            return self._convolution(module, path)
        if isinstance(module, pool_module.SparseMaxPool):
            pool = _counterpart("SparseMaxPool", module.ndim)(**_window(module))
            return ours.SparseSequential(pool, ours.SparseReLU()) if self.floor else pool
        if isinstance(module, pool_module.SparseAvgPool):
            cls = _counterpart("SparseAvgPool", module.ndim)
            return cls(**_window(module), count_absent=False)
        if isinstance(module, pool_module.SparseGlobalAvgPool):
            return ours.SparseGlobalAvgPool(count_absent=False)
        if type(module) in _SIMPLE:
            return _SIMPLE[type(module)]()
        if type(module) is package.SparseSequential:
            return self._filled(ours.SparseSequential(), module, path)
        if type(module) is tables.ConcatTable:
            return self._filled(ours.ConcatTable(), module, path)
        if isinstance(module, small.SparseSyncBatchNorm):
            return self._copied(module, path, ours.SparseSyncBatchNorm)
        if isinstance(module, small.SparseBatchNorm):
            return self._copied(module, path, ours.SparseBatchNorm)
        if type(module).__module__.startswith("spconv."):
            raise TypeError(
                f"convert_spconv: module {path!r} must have a counterpart, got {type(module).__name__}."
            )
        return self._copied(module, path, type(module))

    def _copied(self, module: Any, path: str, cls: type) -> nn.Module:
        """A shallow copy, tensors shared, children converted."""
        copy: nn.Module = object.__new__(cls)
        state = dict(vars(module))
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            state[name] = state[name].copy()
        vars(copy).update(state)
        vars(copy)["_modules"] = {}
        self._filled(copy, module, path)
        if small.is_spconv_module(module):
            vars(copy)["takes_records"] = True
        return copy

    def _filled(self, target: nn.Module, module: nn.Module, path: str) -> nn.Module:
        for name, child in module._modules.items():
            below = f"{path}.{name}" if path else name
            target._modules[name] = None if child is None else self.module(child, below)
        return target

    def _convolution(self, module: Any, path: str) -> nn.Module:
        name = type(module).__name__
        spread = max(module.dilation) > 1
        activation = module.act_type != conv_module.tv.gemm.Activation.None_
        if module.groups != 1 or activation or (module.transposed and spread):
            raise ValueError(
                f"convert_spconv: {name} {path!r} must have one group, no fused activation, and if "
                f"transposed no dilation, got groups {module.groups}, {module.act_type}, "
                f"{module.dilation}."
            )
        kind = "SparseConv"
        if module.subm:
            kind = "SubMConv"
        elif module.inverse:
            kind = "SparseInverseConv"
        elif module.transposed:
            kind = "SparseConvTranspose"
        options: dict[str, Any] = {"indice_key": module.indice_key, "device": "meta"}
        if kind != "SparseInverseConv":
            options["dilation"] = tuple(module.dilation)
            options["stride"] = 1 if module.subm else tuple(module.stride)
            options["padding"] = 0 if module.subm else tuple(module.padding)
        if kind == "SparseConvTranspose":
            options["output_padding"] = tuple(module.output_padding)
        made = _counterpart(kind, module.ndim)(
            module.in_channels,
            module.out_channels,
            tuple(module.kernel_size),
            bias=module.bias is not None,
            **options,
        )
        weight = module.weight
        if self.rearrange and is_pointwise(made):
            weight = nn.Parameter(true_pointwise(weight.detach()), weight.requires_grad)
        made._parameters["weight"] = weight
        made._parameters["bias"] = module.bias
        return made


def _window(pool: Any) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation")
    return {name: tuple(getattr(pool, name)) for name in names} | {"indice_key": pool.indice_key}


def _counterpart(name: str, axes: int) -> Any:
    return getattr(ours, f"{name}{axes}d")
