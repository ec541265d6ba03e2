"""What `benches.gpu` times: one submanifold layer, each way there is to compute it."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fquant.testing.scenes import Scene
from fquant_kernels import mask_order, pack_weight, sparse_conv_int8, tile_rulebook
from fquant_kernels.conv_half import reference as half_reference
from fquant_kernels.conv_int8 import reference

KERNEL, ONE = [3, 3, 3], [1, 1, 1]


class Layer(NamedTuple):
    """One submanifold layer, int8 and half."""

    features: Tensor
    weight: Tensor
    neighbors: Tensor
    scale: Tensor
    bias: Tensor
    half_features: Tensor
    half_weight: Tensor


class Way(NamedTuple):
    """One way to compute a layer."""

    run: Callable[[], Tensor]
    answer: Tensor
    exact: bool  # else: half precision, up to the order of its sums
    bytes_moved: int  # features, weight and index read once, output written once
    peer: bool = False  # another library's: where it fails it is left out, and the JSON says so


def make_layer(neighbors: Tensor, num_inputs: int, channels: int) -> Layer:
    """A layer of random int8 values whose outputs fill the int8 range, and its half twin."""
    generator = torch.Generator().manual_seed(channels)
    features = torch.randint(-128, 128, (num_inputs, channels), generator=generator)
    weight = torch.randint(-128, 128, (channels, neighbors.shape[0], channels), generator=generator)
    device = neighbors.device
    scale = torch.full((channels,), 0.005 / channels**0.5, device=device)
    bias = torch.randn(channels, generator=generator).to(device)
    features, weight = features.to(torch.int8).to(device), weight.to(torch.int8).to(device)
    return Layer(
        features,
        weight,
        neighbors,
        scale,
        bias,
        features.half() / 64,
        weight.half() / 1024,
    )


def ways(layer: Layer, scene: Scene, tile_heights: list[int], tune: bool) -> dict[str, Way]:
    """The callables to time, each with the answer it has to give.

    With `tune`, the int8 kernel in each of its candidate configurations too.
    """
    from fquant_kernels.conv_half.cuda_triton import sparse_conv_half_tiles
    from fquant_kernels.conv_int8.configs import candidates
    from fquant_kernels.conv_int8.cuda_triton import sparse_conv_int8_tiles

    features, weight, neighbors, scale, bias, half_features, half_weight = layer
    answer = reference.sparse_conv_int8(features, weight, neighbors, scale, bias, relu=True)
    half_answer = half_reference.sparse_conv_half(half_features, half_weight, neighbors)
    fixed = features.numel() + weight.numel() + answer.numel()
    packed, half_packed = pack_weight(weight), pack_weight(half_weight)

    def table_way() -> Tensor:
        return sparse_conv_int8(features, weight, neighbors, scale, bias, relu=True)

    found = {"int8 from the table": Way(table_way, answer, True, fixed + 4 * neighbors.numel())}
    for tile_rows in tile_heights:
        for name, order in (("", None), (" mask-sorted", mask_order(neighbors))):
            plan = tile_rulebook(neighbors, tile_rows, order)
            index = 4 * sum(part.numel() for part in plan)

            def int8_way(plan: Any = plan, config: Any = None) -> Tensor:
                return sparse_conv_int8_tiles(
                    features, packed, *plan, scale=scale, bias=bias, relu=True, config=config
                )

            def half_way(plan: Any = plan) -> Tensor:
                return sparse_conv_half_tiles(half_features, half_packed, plan)

            key = f"{tile_rows} rows{name}"
            found[f"int8 tiles of {key}"] = Way(int8_way, answer, True, fixed + index)
            found[f"fp16 tiles of {key}"] = Way(half_way, half_answer, False, 2 * fixed + index)
            if tune and order is not None:
                channels, on_gpu = features.shape[1], features.is_cuda
                capability = torch.cuda.get_device_capability() if on_gpu else (9, 0)
                for config in candidates(packed.shape[2], channels, tile_rows, capability)[1:]:
                    run = functools.partial(int8_way, config=config)
                    name = f"int8 tiles of {key} {tuple(config)}"
                    found[name] = Way(run, answer, True, fixed + index)
    found["fp16 torch, tap by tap"] = _torch_way(layer, half_answer, 2 * fixed)
    if importlib.util.find_spec("spconv") is not None:
        found["fp16 spconv"] = _spconv_way(layer, scene, half_answer, 2 * fixed)
    return found


def _torch_way(layer: Layer, answer: Tensor, fixed: int) -> Way:
    weight = layer.half_weight.permute(1, 2, 0).contiguous()
    pairs = []
    for row in layer.neighbors:
        out = (row >= 0).nonzero().squeeze(1)
        pairs.append((row[out].long(), out))

    def run() -> Tensor:
        total = torch.zeros(answer.shape, device=answer.device)
        for k, (source, out) in enumerate(pairs):
            total.index_add_(0, out, (layer.half_features[source] @ weight[k]).float())
        return total.half()

    return Way(run, answer, False, fixed + 16 * sum(len(out) for _, out in pairs))


def _spconv_way(layer: Layer, scene: Scene, answer: Tensor, fixed: int) -> Way:
    """With its own rulebook, which its first call builds and the others find."""
    cout, _, cin = layer.half_weight.shape

    @functools.cache
    def prepared() -> tuple[Any, Any]:
        import spconv.pytorch as spconv

        conv = spconv.SubMConv3d(cin, cout, 3, bias=False, indice_key="same").cuda().half().eval()
        with torch.no_grad():
            conv.weight.copy_(layer.half_weight.view(cout, *KERNEL, cin))
        coords = scene.coords.to(layer.features.device)
        shape = list(scene.spatial_shape)
        return conv, spconv.SparseConvTensor(layer.half_features, coords, shape, 1)

    def run() -> Tensor:
        conv, given = prepared()
        with torch.no_grad():
            return conv(given).features

    return Way(run, answer, False, fixed + 4 * layer.neighbors.numel(), peer=True)


def check(name: str, way: Way) -> str | None:
    """Returns why a peer is left out; raises where this library's own answer is wrong."""
    try:
        _check(name, way)
    except Exception as error:
        if not way.peer:
            raise
        return f"{type(error).__name__}: {error}"
    return None


def _check(name: str, way: Way) -> None:
    got = way.run()
    if way.exact:
        right = torch.equal(got, way.answer)
    else:
        # Half rounds to 2^-11 of a value; the sums before it to far less of their largest term.
        error = (got.float() - way.answer.float()).abs().max() if got.numel() else torch.zeros(())
        right = bool(error <= way.answer.float().abs().max() * 2**-9)
    if not right:
        raise AssertionError(f"{name}: a wrong answer; nothing is timed.")
