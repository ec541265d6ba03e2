"""What every test and docstring example may use."""

import pytest
import torch

import fquant


@pytest.fixture(autouse=True)
def _example_names(doctest_namespace):
    doctest_namespace.update(torch=torch, fquant=fquant)
