import pytest
import torch

from fquant_kernels import mask_order, tile_rulebook
from fquant_kernels.kernel_map.rulebook import neighbors_of_rulebook


def random_table(seed: int, num_taps: int, num_outputs: int, density: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 100, (num_taps, num_outputs), generator=generator)
    present = torch.rand(num_taps, num_outputs, generator=generator) < density
    return torch.where(present, rows, -1).to(torch.int32)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize(
    ("num_taps", "num_outputs", "density"),
    [(27, 100, 0.2), (27, 64, 0.02), (1, 33, 0.0), (0, 20, 0.5), (27, 0, 0.5), (125, 70, 0.1)],
)
def test_rulebook_holds_the_table(
    compact: bool, sort: bool, num_taps: int, num_outputs: int, density: float
) -> None:
    table = random_table(3, num_taps, num_outputs, density)
    order = mask_order(table) if sort else None
    rulebook = tile_rulebook(table, 16, order, compact)
    assert all(part.dtype == torch.int32 for part in rulebook)
    assert torch.equal(neighbors_of_rulebook(rulebook, num_taps), table)


def test_compact_rulebook_has_no_empty_segment_and_each_tap_once() -> None:
    rulebook = tile_rulebook(random_table(0, 27, 200, 0.05), 16)
    assert (rulebook.rows >= 0).any(dim=1).all()
    ends = rulebook.spans.flatten().tolist()
    assert ends[0] == 0
    assert ends[-1] == len(rulebook.taps)
    assert ends[1:-1:2] == ends[2::2]
    for begin, end in rulebook.spans.tolist():
        taps = rulebook.taps[begin:end].tolist()
        assert taps == sorted(set(taps))


def test_rulebook_of_four_rows_by_hand() -> None:
    table = torch.full((2, 18), -1, dtype=torch.int32)
    table[0, 3], table[1, 17] = 7, 8
    spans, taps, rows, order = tile_rulebook(table, 16)
    assert spans.tolist() == [[0, 1], [1, 2]]
    assert taps.tolist() == [0, 1]
    assert rows[0].tolist() == [-1, -1, -1, 7] + [-1] * 12
    assert rows[1].tolist() == [-1, 8] + [-1] * 14
    assert order.tolist() == list(range(18))


def test_mask_order_follows_the_gray_code() -> None:
    # Neighbours in the reflected Gray code differ in one bit: 000 001 011 010 110 111 101 100.
    masks = [0b100, 0b010, 0b111, 0b000, 0b011, 0b110, 0b001, 0b101]
    bits = torch.tensor([[mask >> (2 - tap) & 1 for mask in masks] for tap in range(3)])
    ordered = [masks[i] for i in mask_order((bits - 1).to(torch.int32)).tolist()]
    assert ordered == [0b000, 0b001, 0b011, 0b010, 0b110, 0b111, 0b101, 0b100]


def test_mask_order_is_a_stable_permutation_past_64_taps() -> None:
    table = random_table(1, 125, 300, 0.5)
    table[:, 150:] = table[:, :150]  # every mask twice
    order = mask_order(table).long()
    assert torch.equal(order.sort().values, torch.arange(300))
    assert torch.equal(order[1::2], order[0::2] + 150)


def test_mask_order_makes_tiles_fuller() -> None:
    table = random_table(2, 9, 2000, 0.3)
    plain = tile_rulebook(table, 16)
    assert tile_rulebook(table, 16, mask_order(table)).rows.shape[0] < 0.7 * plain.rows.shape[0]


@pytest.mark.parametrize("tile_rows", [0, 8, 48, -16])
def test_odd_tile_heights_are_refused(tile_rows: int) -> None:
    with pytest.raises(ValueError, match=f"tile_rulebook: tile_rows .* got {tile_rows}"):
        tile_rulebook(random_table(0, 2, 5), tile_rows)
