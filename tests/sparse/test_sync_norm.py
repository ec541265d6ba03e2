"""Batch norm over two processes is batch norm over all their cells; processes are threads here."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fquant.sparse import SparseTensor, batch_norm, nn, sync_batch_norm

MEAN, VAR = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.3, 1.0])
GAMMA, BETA = torch.tensor([1.5, -0.5, 2.0]), torch.tensor([0.1, 0.2, 0.3])


def on_two_ranks(run):
    """[run(0, group), run(1, group)], each in a thread with a gloo group of its own."""
    store = dist.HashStore()

    def one(rank):
        return run(rank, dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60)))

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(one, range(2)))


def cells(features):
    rows = torch.arange(len(features))
    coords = torch.stack([rows * 0, rows], dim=1)
    return SparseTensor(features, coords, (max(1, len(features)),), 1)


def scene(sizes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, generator=g) * 3 + 1 for n in sizes]


def loss(norm, features, gamma, beta):
    y, mean, var = norm(
        cells(features), MEAN, VAR, gamma, beta, training=True, momentum=0.3, eps=1e-3
    )
    return y.features.sin().sum(), (y.features, mean, var)


def gradients_of_gradients(norm, features):
    """Of order 1 by features, gamma and beta, and of order 2 by features; and the results."""

    def first(features, gamma, beta):
        call = torch.func.grad(lambda *args: loss(norm, *args), (0, 1, 2), has_aux=True)
        by, results = call(features, gamma, beta)
        return by[0].cos().sum(), (*by, *results)

    second, found = torch.func.grad(first, has_aux=True)(features, GAMMA, BETA)
    return second, *found


@pytest.mark.parametrize("sizes", [(5, 9), (0, 7), (1, 1)])
def test_two_ranks_are_one(sizes):
    parts = scene(sizes)

    def run(rank, group):
        return gradients_of_gradients(
            lambda *args, **options: sync_batch_norm(*args, **options, group=group), parts[rank]
        )

    a, b = on_two_ranks(run)
    expected = gradients_of_gradients(batch_norm, torch.cat(parts))
    for i, (first, second, whole) in enumerate(zip(a, b, expected, strict=True)):
        if i in (2, 3):  # parameters: each rank has the part of its cells
            found = first + second
        elif i in (5, 6):  # running statistics: the same on both
            assert torch.equal(first, second)
            found = first
        else:
            found = torch.cat([first, second])
        # The float32 of batch_norm against float64: a few roundings of values of order 10.
        assert torch.allclose(found, whole, rtol=1e-4, atol=1e-4), i


def test_a_large_mean_does_not_drown_the_variance():
    parts = [part + 5000 for part in scene((20, 30))]
    a, b = on_two_ranks(
        lambda rank, group: (
            sync_batch_norm(cells(parts[rank]), MEAN, VAR, training=True, group=group)[0].features
        )
    )
    exact = batch_norm(cells(torch.cat(parts).double()), MEAN.double(), VAR.double(), training=True)
    # float32 sums of squares of 25 million leave a variance of 9 no digit.
    assert torch.allclose(torch.cat([a, b]).double(), exact[0].features, atol=1e-5)


def test_autograd_gives_the_same_as_func_grad():
    parts = scene((4, 6))

    def run(rank, group):
        leaf = parts[rank].clone().requires_grad_()
        norm = lambda *args, **options: sync_batch_norm(*args, **options, group=group)  # noqa: E731
        value, _ = loss(norm, leaf, GAMMA, BETA)
        by_autograd = torch.autograd.grad(value, leaf)[0]
        return by_autograd, gradients_of_gradients(norm, parts[rank])[1]

    for by_autograd, by_transform in on_two_ranks(run):
        assert torch.allclose(by_autograd, by_transform, rtol=1e-6)


def test_modules_on_two_ranks_become_the_module_on_one():
    parts = scene((5, 9))
    for momentum in (0.2, None):
        whole = nn.SparseBatchNorm(3, momentum=momentum)
        expected = [whole(cells(torch.cat(parts))).features for _ in range(2)][1]

        def run(rank, group, momentum=momentum):
            module = nn.SparseSyncBatchNorm(3, momentum=momentum, process_group=group)
            y = [module(cells(parts[rank])).features for _ in range(2)][1]
            return y, module.state_dict()

        (a, state), (b, _) = on_two_ranks(run)
        assert torch.allclose(torch.cat([a, b]), expected, atol=1e-5)
        for name, value in whole.state_dict().items():
            assert torch.allclose(state[name], value, atol=1e-5), name
        inference = nn.SparseSyncBatchNorm(3).eval()  # exchanges nothing: there is no group
        inference.load_state_dict(state)
        assert torch.allclose(
            inference(cells(a)).features, whole.eval()(cells(a)).features, atol=1e-5
        )


def test_without_a_cell_or_with_one_statistics_stay():
    for sizes in ((0, 0), (0, 1)):
        parts = scene(sizes)
        for _, mean, var in on_two_ranks(
            lambda rank, group, parts=parts: sync_batch_norm(
                cells(parts[rank]), MEAN, VAR, training=True, group=group
            )
        ):
            assert torch.equal(mean, MEAN)
            assert torch.equal(var, VAR)


def test_inputs_are_not_written_and_half_types_stay():
    features = scene((4,))[0].half()
    before = features.clone(), MEAN.clone(), VAR.clone()
    y, mean, _ = on_two_ranks(
        lambda rank, group: sync_batch_norm(cells(features), MEAN, VAR, training=True, group=group)
    )[0]
    assert (y.features.dtype, mean.dtype) == (torch.float16, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, (features, MEAN, VAR), strict=True))


def test_what_is_missing_is_named():
    x = cells(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match=r"sync_batch_norm: group must be .*has batch_norm"):
        sync_batch_norm(x, MEAN, VAR, training=True)
    with pytest.raises(ValueError, match=r"sync_batch_norm: weight must have shape \(3,\)"):
        sync_batch_norm(x, MEAN, VAR, torch.ones(2), training=True)
    plain, alone = nn.SparseBatchNorm(3), nn.SparseSyncBatchNorm(3)
    assert torch.equal(alone(x).features, plain(x).features)
    assert torch.equal(alone.running_var, plain.running_var)
