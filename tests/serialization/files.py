"""How a tree comes back from a file, and whether it is the same one."""

import collections
import dataclasses
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fquant as fq
from fquant.serialization import container

pytest.importorskip("safetensors")


def assert_identical(a, b):
    """Same types, dtypes, shapes and bytes, all the way down."""
    assert type(a) is type(b) or isinstance(a, collections.abc.Mapping)
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        raw = [container.bytes_of(x) for x in (a, b)]
        assert torch.equal(*raw)
    elif isinstance(a, collections.abc.Mapping):
        assert list(a) == list(b)
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    elif isinstance(a, float):
        assert struct.pack("d", a) == struct.pack("d", b) or (a != a and b != b)
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_identical(getattr(a, field.name), getattr(b, field.name))
    else:
        assert a == b


def round_trip(tree, *classes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree.safetensors"
        fq.save(path, tree)
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        return fq.load(path, *classes)
