"""The digits of scikit-learn as batches of sparse images with their kernel maps."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fquant.sparse import KernelMap, SparseTensor, conv_map, subm_map

TEST_IMAGES = 450


class Maps(NamedTuple):
    """The kernel maps of the network, one per geometry: 8 x 8, 4 x 4, 2 x 2 and 1 x 1 cells."""

    fine: KernelMap
    fine_to_coarse: KernelMap
    coarse: KernelMap
    coarse_to_patch: KernelMap
    patch_to_image: KernelMap


class Batch(NamedTuple):
    """Images whose background is no cell, their maps and their digits."""

    x: SparseTensor
    maps: Maps
    labels: Tensor


class Split(NamedTuple):
    """Dense images `(N, 1, 8, 8)` in [0, 1] and their digits, for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Split:
    """Returns the 1,797 digits, shuffled once with a fixed seed: 1,347 to train, 450 to test."""
    from sklearn import datasets

    digits = datasets.load_digits()
    order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)[order]
    labels = torch.from_numpy(digits.target)[order]
    return Split(
        images[TEST_IMAGES:], labels[TEST_IMAGES:], images[:TEST_IMAGES], labels[:TEST_IMAGES]
    )


def make_batch(images: Tensor, labels: Tensor) -> Batch:
    """Returns the sparse batch of dense images; kernel maps depend on which pixels are set."""
    x = SparseTensor.from_dense(images)
    fine_to_coarse = conv_map(x, 2, stride=2)
    coarse_to_patch = conv_map(fine_to_coarse, 2, stride=2)
    maps = Maps(
        fine=subm_map(x, 3),
        fine_to_coarse=fine_to_coarse,
        coarse=subm_map(fine_to_coarse, 3),
        coarse_to_patch=coarse_to_patch,
        patch_to_image=conv_map(coarse_to_patch, 2, stride=2),
    )
    return Batch(x, maps, labels)


def shuffled_batches(
    images: Tensor, labels: Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[Batch]:
    """Yields one epoch of batches in random order."""
    for rows in torch.randperm(len(images), generator=generator).split(batch_size):
        yield make_batch(images[rows], labels[rows])
