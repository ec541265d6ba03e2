"""What every test and docstring example may use."""

import warnings

import pytest
import torch

import fquant

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # spconv's own imports use what Python deprecates
    try:
        import spconv.pytorch  # noqa: F401
    except ImportError:  # tests say that they are skipped, but examples cannot
        collect_ignore_glob = ["fquant/interop/spconv/*"]


@pytest.fixture(autouse=True)
def _example_names(doctest_namespace):
    doctest_namespace.update(torch=torch, fquant=fquant)
