"""Convolutions by lists of pairs: those of the table, on every path."""

from typing import Any

import pytest
import torch
from hypothesis import given

import fquant_kernels
from fquant_kernels import PairRulebook, native, pair_rulebook
from fquant_kernels.conv_int8 import cpu, reference
from fquant_kernels.kernel_map.pairs import pair_rulebook_reference
from tests.kernels.library import needs_library, num_threads
from tests.kernels.strategies import SETTINGS, ConvCase, conv_cases
from tests.kernels.test_conv_int8_cpu import each_isa, random_case


def assert_same(got: PairRulebook, want: PairRulebook) -> None:
    for name, have, expected in zip(PairRulebook._fields, got, want, strict=True):
        assert have.dtype == expected.dtype, name
        assert torch.equal(have, expected), name


@each_isa
@needs_library
@SETTINGS
@given(case=conv_cases())
def test_every_path_lists_and_reads_the_pairs_of_the_reference(isa: str, case: ConvCase) -> None:
    want = pair_rulebook_reference(case.neighbors)
    got = pair_rulebook(case.neighbors, case.features.shape[0], isa)
    assert_same(got, want)
    # A table of zeros beside the lists: what is read are the lists.
    table = torch.zeros_like(case.neighbors)
    y = cpu.sparse_conv_int8(case.features, case.weight, table, *case[3:], isa=isa, pairs=got)
    assert torch.equal(y, reference.sparse_conv_int8(*case))


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 700])
def test_the_lists_say_what_the_table_says(rows: int) -> None:
    table = random_case(rows, 4, 4, taps=3).neighbors
    splits, inputs, outputs = pair_rulebook_reference(table)
    again = torch.full_like(table, -1)
    for segment in range(splits.shape[0] - 1):
        block, tap = divmod(segment, 3)
        for p in range(int(splits[segment]), int(splits[segment + 1])):
            again[tap, 256 * block + int(outputs[p])] = inputs[p]
    assert torch.equal(again, table)


@needs_library
def test_the_op_equals_the_one_by_table_on_any_number_of_threads() -> None:
    case = random_case(3000, 32, 32)
    pairs = pair_rulebook(case.neighbors, 3000)
    want = fquant_kernels.sparse_conv_int8(*case)
    features, weight, neighbors, *epilogue = case
    for threads in (1, 2, 5):
        with num_threads(threads):
            got = fquant_kernels.sparse_conv_int8_pairs(
                features, weight, neighbors, pairs, *epilogue
            )
        assert torch.equal(got, want)


def test_opcheck() -> None:
    features, weight, neighbors, *epilogue = random_case(20, 5, 6)
    pairs = pair_rulebook(neighbors, 20)
    op = torch.ops.fquant.sparse_conv_int8_pairs.default
    torch.library.opcheck(op, (features, weight, neighbors, *pairs, *epilogue))


def test_one_graph_serves_every_map() -> None:
    case = random_case(40, 8, 8)
    frames = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        frames.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def run(features: torch.Tensor, table: torch.Tensor, pairs: PairRulebook) -> torch.Tensor:
        return fquant_kernels.sparse_conv_int8_pairs(
            features, case.weight, table, pairs, case.scale
        )

    for rows in (40, 300, 700):
        features, _, table, *_ = random_case(rows, 8, 8)
        want = reference.sparse_conv_int8(features, case.weight, table, case.scale)
        assert torch.equal(run(features, table, pair_rulebook(table, rows)), want)
    assert len(frames) == 1


@pytest.mark.parametrize("isa", ["reference", "library"])
def test_bad_tables_are_refused(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa == "reference":
        monkeypatch.setattr(native, "why_unavailable", lambda: "not for this test")
    table = random_case(300, 4, 4).neighbors
    with pytest.raises(IndexError, match="pair_rulebook: neighbors must be below"):
        pair_rulebook(table, int(table.max()))
    with pytest.raises(TypeError, match="must be int32"):
        pair_rulebook(table.long(), 300)
    with pytest.raises(ValueError, match=r"must be \(K, M\)"):
        pair_rulebook(table[0], 300)


def test_lists_of_another_size_are_refused() -> None:
    features, weight, neighbors, scale, *_ = random_case(300, 4, 4)
    pairs = pair_rulebook(neighbors, 300)
    run = fquant_kernels.sparse_conv_int8_pairs
    with pytest.raises(ValueError, match="splits must have shape"):
        run(features, weight, neighbors, pairs._replace(splits=pairs.splits[1:]), scale)
    with pytest.raises(ValueError, match="rows must have shape"):
        run(features, weight, neighbors, pairs._replace(rows=pairs.rows[1:]), scale)
    with pytest.raises(TypeError, match="inputs must be"):
        run(features, weight, neighbors, pairs._replace(inputs=pairs.inputs.long()), scale)
