"""Sparse networks from the literature, at any width."""

from fquant.sparse.models.backbones import BenchmarkNet, VoxelBackBone8x, VoxelResBackBone8x
from fquant.sparse.models.blocks import SparseBasicBlock
from fquant.sparse.models.unet import MinkUNet

__all__ = [
    "BenchmarkNet",
    "MinkUNet",
    "SparseBasicBlock",
    "VoxelBackBone8x",
    "VoxelResBackBone8x",
]
