"""The networks of `fquant.sparse.models` in spconv's modules, with the same parameters."""

import copy
from typing import Any

import torch
from torch import nn as torch_nn

from fquant.interop.spconv import to_spconv_state_dict
from fquant.sparse import models, nn


def to_spconv_modules(model: torch_nn.Module, package: Any) -> torch_nn.Module:
    """Returns the model for spconv's tensors; `package` is `spconv.pytorch`.

    Rulebooks are shared by the model's own indice keys, and nothing is computed that the model does
    not compute.
    """
    made = _Maker(package).module(model)
    made.load_state_dict(to_spconv_state_dict(model.state_dict(), model))
    return made.train(model.training)


class _Maker:
    def __init__(self, package: Any) -> None:
        self.package = package
        block, up, unet = _classes(package)
        self.classes = {
            nn.SparseSequential: package.SparseSequential,
            models.BenchmarkNet: package.SparseSequential,
            models.SparseBasicBlock: block,
            models.MinkUNet: unet,
            torch_nn.ModuleList: torch_nn.ModuleList,
            **{type(stage): up for stage in models.MinkUNet(widths=(1, 1, 1)).up},
        }

    def module(self, module: torch_nn.Module) -> torch_nn.Module:
        name = type(module).__name__
        if isinstance(module, nn.SparseConvolution):
            return self.convolution(module)
        if isinstance(module, nn.SparsePool):
            g = module.geometry
            return getattr(self.package, name)(*map(list, g.sizes), indice_key=module.indice_key)
        if isinstance(module, nn.SparseReLU):
            return self.package.SparseReLU()
        if isinstance(module, nn.SparseBatchNorm):
            return self.package.SparseBatchNorm(
                module.num_features, eps=module.eps, momentum=module.momentum
            )
        if type(module) in self.classes:
            made = self.classes[type(module)]()
        elif isinstance(
            module, nn.SparseModule
        ):  # a backbone, whose forward asks for nothing of ours
            made = _blank(type(module))
        else:
            return copy.deepcopy(module)
        for child_name, child in module._modules.items():
            made._modules[child_name] = None if child is None else self.module(child)
        return made

    def convolution(self, module: nn.SparseConvolution) -> torch_nn.Module:
        cls = getattr(self.package, type(module).__name__)
        options = {"bias": module.bias is not None, "indice_key": module.indice_key}
        if module.geometry is not None:
            options |= {
                "stride": list(module.geometry.stride),
                "padding": list(module.geometry.padding),
                "dilation": list(module.geometry.dilation),
            }
        sizes = (module.in_channels, module.out_channels, list(module.kernel_size))
        return cls(*sizes, **options)


def _blank(cls: type) -> torch_nn.Module:
    made: torch_nn.Module = object.__new__(cls)
    torch_nn.Module.__init__(made)
    return made


def _classes(package: Any) -> tuple[type, type, type]:
    """What these modules do to spconv's tensors."""

    class Block(package.SparseModule):
        def forward(self, x: Any) -> Any:
            shortcut = self._modules.get("downsample")
            identity = x if shortcut is None else shortcut(x)
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return self.relu(y + identity)

    class Up(package.SparseModule):
        def forward(self, x: Any, skip: Any) -> Any:
            x = self.conv(x)
            return self.blocks(x.replace_feature(torch.cat([x.features, skip.features], dim=1)))

    class UNet(package.SparseModule):
        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            kept = []
            for stage in self.down:
                kept.append(x)
                x = stage(x)
            for stage in self.up:
                x = stage(x, kept.pop())
            head = self._modules.get("classifier")
            return x if head is None else x.replace_feature(head(x.features))

    return Block, Up, UNet
