"""Batch norm in quantization: folded after training, folded while training, estimated anew.

    fold_batch_norm            parameters of an inference network, once, or inside a loss
    folded_conv_batch_norm     a block's forward that folds with the statistics of its batch
    estimate_batch_norm        running statistics of the quantized network, from data

All are functions of parameter dicts; no module is written.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fquant.interception.stack import current, unseen
from fquant.sparse.nn.convolution import SparseConvolution


def fold_batch_norm(
    model: nn.Module, params: Mapping[str, Tensor], pairs: Mapping[str, str]
) -> dict[str, Tensor]:
    """Returns params in which batch norms are part of the convolutions before them.

        factor = gamma / sqrt(var + eps)
        weight' = weight * factor,    bias' = beta + (bias - mean) * factor

    The batch norms become identities (mean 0, variance 1 - eps, gamma 1, beta bias'), so the same model
    runs with the folded tensors; the convolution's own bias, if any, becomes 0. gamma = 0 gives a zero
    weight and leaves beta. Differentiable in params; nothing is divided by gamma.

    Args:
        model: for the layers' kinds and eps; not read for tensors that params has.
        params: parameters and buffers by name, `running_mean` and `running_var` among them.
        pairs: `{path of the convolution or linear layer: path of the batch norm that follows it}`.

    Raises:
        ValueError: a path names no such layer, or params lack one of its tensors.
    """
    modules = dict(model.named_modules())
    folded = dict(params)
    for conv, norm in pairs.items():
        layer, bn = modules.get(conv), modules.get(norm)
        if not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd | SparseConvolution):
            raise ValueError(
                f"fold_batch_norm: pairs must name convolutions or linear layers, got {conv!r}."
            )
        if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"fold_batch_norm: pairs must name batch norms, got {norm!r}.")
        names = [f"{norm}.running_mean", f"{norm}.running_var", f"{conv}.weight"]
        for name in names:
            if name not in params:
                raise ValueError(f"fold_batch_norm: params must have {name!r} for {norm!r}.")
        mean, variance, weight = (params[name] for name in names)
        gamma = params.get(f"{norm}.weight", torch.ones_like(mean))
        beta = params.get(f"{norm}.bias", torch.zeros_like(mean))
        factor = gamma * torch.rsqrt(variance + bn.eps)
        folded[f"{conv}.weight"] = _scale_outputs(layer, weight, factor)
        shift = -mean
        if f"{conv}.bias" in params:
            shift = params[f"{conv}.bias"] - mean
            folded[f"{conv}.bias"] = torch.zeros_like(mean)
        bias = beta + shift * factor
        if not bn.affine:
            folded[f"{norm}.running_mean"] = -bias
        else:
            folded[f"{norm}.running_mean"] = torch.zeros_like(mean)
            folded[f"{norm}.weight"] = torch.ones_like(mean)
            folded[f"{norm}.bias"] = bias
        folded[f"{norm}.running_var"] = torch.full_like(variance, 1.0 - bn.eps)
    return folded


def folded_conv_batch_norm(
    layer: nn.Module, norm: nn.modules.batchnorm._BatchNorm, x: Tensor
) -> Tensor:
    """Returns `norm(layer(x))` by one convolution or product with the batch norm in its weight.

        factor = gamma / sqrt(var + eps)
        y = layer(x; weight * factor, beta + (bias - mean) * factor)

    What is quantized is the folded weight, as it will be after training. In train mode mean and var are
    those of `layer(x)` in this batch, which costs a second convolution, and the running statistics move
    as torch moves them; in eval mode they are the running ones. Nothing is divided by gamma or by the
    factor, so gamma = 0 has a value and a gradient.

    For a block's forward, by `replace_forward`: the site is `path of the block/conv2d#0`.

    Args:
        layer: nn.Linear or a convolution, not transposed.
        norm: the batch norm that follows it.
        x: the layer's input.

    Raises:
        TypeError: layer is of another kind.
        ValueError: the input of a linear layer is not two-dimensional.

    Example:
        >>> block = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        >>> def folded(block, x):
        ...     return folded_conv_batch_norm(block[0], block[1], x)
        >>> ops = fquant.replace_forward(fquant.DEFAULT_OPS, torch.nn.Sequential, folded)
        >>> x = torch.randn(8, 2)
        >>> plan = fquant.make_plan(block, fquant.w8a8(), (x,), ops=ops)
        >>> list(plan.quantizers)
        ['linear#0.input', 'linear#0.weight']

    References:
        Jacob et al. 2018, arXiv 1712.05877, section 3.2; Krishnamoorthi 2018, arXiv 1806.08342.
    """
    if not _is_foldable(layer):
        raise TypeError(
            "folded_conv_batch_norm: layer must be nn.Linear or a convolution that is not transposed, "
            f"got {type(layer).__name__}."
        )
    parameters: Any = layer
    weight, bias = parameters.weight, parameters.bias
    running: Any = (norm.running_mean, norm.running_var)
    if norm.training or running[0] is None:
        mean, variance = _hidden(_batch_statistics, layer, norm, x)
    else:
        mean, variance = running
    factor = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        factor = norm.weight * factor
    shift = -mean if bias is None else bias - mean
    shift = shift * factor if norm.bias is None else norm.bias + shift * factor
    return _apply(layer, x, _scale_outputs(layer, weight, factor), shift)


def estimate_batch_norm(
    model: nn.Module,
    forward: Callable[..., Any],
    params: Mapping[str, Tensor],
    batches: Iterable[Any],
) -> dict[str, Tensor]:
    """Returns params with running statistics that are averages over batches, of any forward.

    Quantization moves the statistics that a float network was trained with; this takes them anew.

    Args:
        model: for its batch norms; not written.
        forward: `(params, batch) -> (output, buffers)`, in train mode: for example
            `lambda p, x: fake_quant(model, plan, train=True, with_buffers=True)(p, qstate, x)`.
        params: parameters and buffers by name; other entries come back as they are.
        batches: what forward is called with; equally many values in each, for an unbiased average.

    Raises:
        ValueError: no batch, or params lack a running statistic of the model.

    Example:
        >>> model = torch.nn.BatchNorm1d(1, affine=False)
        >>> def forward(p, x):
        ...     p = {name: tensor.clone() for name, tensor in p.items()}
        ...     return torch.func.functional_call(model, p, (x,)), p
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> estimate_batch_norm(model, forward, dict(model.named_buffers()), [x])["running_mean"]
        tensor([2.])

    References:
        `torch.optim.swa_utils.update_bn`, whose averages these are.
    """
    momenta = {
        f"{path}.{name}" if path else name: 1.0 if norm.momentum is None else norm.momentum
        for path, norm in model.named_modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats
        for name in ("running_mean", "running_var")
    }
    missing = sorted(momenta.keys() - params.keys())
    if missing:
        raise ValueError(f"estimate_batch_norm: params must have {missing}.")
    # From zero, one update leaves momentum times the batch's statistics.
    counters = {name.rpartition("running_")[0] + "num_batches_tracked" for name in momenta}
    empty = {n: torch.zeros_like(params[n]) for n in (*momenta, *counters) if n in params}
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in batches:
        with torch.no_grad():
            _, after = forward({**params, **empty}, batch)
        count += 1
        for name, momentum in momenta.items():
            seen = after[name] / momentum
            sums[name] = sums[name] + seen if name in sums else seen
    if count == 0:
        raise ValueError("estimate_batch_norm: batches must hold at least one, got none.")
    return {**params, **{name: total / count for name, total in sums.items()}}


def _is_foldable(layer: nn.Module) -> bool:
    convolution = isinstance(layer, nn.modules.conv._ConvNd)
    return isinstance(layer, nn.Linear) or (convolution and not layer.transposed)


def _apply(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)


def _batch_statistics(layer: Any, norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the layer's output; the running statistics move."""
    y = _apply(layer, x, layer.weight, layer.bias)
    if isinstance(layer, nn.Linear) and y.ndim != 2:
        raise ValueError(
            f"folded_conv_batch_norm: x must be (batch, features) for nn.Linear, got {tuple(x.shape)}."
        )
    axes = [a for a in range(y.ndim) if a != 1]
    norm(y)  # moves the running statistics by torch's own rules
    variance, mean = torch.var_mean(y, dim=axes, correction=0)
    return mean, variance


def _hidden(function: Callable[..., Any], *args: Any) -> Any:
    """Runs what is no site, inside of a transform or not."""
    return function(*args) if current() is None else unseen(function, *args)


def _scale_outputs(layer: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    if not getattr(layer, "transposed", False):
        return weight * factor.view(-1, *[1] * (weight.ndim - 1))
    groups = int(layer.groups)  # type: ignore[arg-type]
    by_group = weight.reshape(groups, -1, *weight.shape[1:])
    factors = factor.view(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    return (by_group * factors).reshape(weight.shape)
