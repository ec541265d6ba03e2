"""spconv's models, tensors and state dicts (`pip install fquant[spconv]`, or `spconv` for CPU).

    ops = spconv_ops()                        make_plan, observe, fake_quant on spconv's own modules:
    plan = make_plan(model, rules, (x,), ops=ops, fake=False)
    ours = convert_spconv(model)              the same model in this library's modules: trains on CPU,
                                              compiles, is exported and runs in int8

Paths and operations have the same names in both, so a plan's rules, statistics and scales carry over,
but for scales per channel of 1 x 1 weights, which `pointwise="spconv"` rearranges: observe them anew.

Where spconv 2.3.8 differs from torch's dense operators, this library follows torch:

    1 x 1 convolutions multiply by the weight's memory viewed as (in, out); its int8 path by the weight
        itself. `pointwise="spconv"` (the default of all functions here) keeps what it computes in float.
    max pools of negative values give 0 on CPU. `convert_spconv(max_pool_floor=True)` keeps that.
    the grid of a transposed convolution is computed without dilation: one with dilation is refused.
    average pools are over the active cells: kept, by `count_absent=False`.
    the global average pool returns channel 0: not kept.
    `SparseSequential` skips dense modules where there is no cell: not kept.

On CPU spconv must run with one thread (OMP_NUM_THREADS=1): its strided convolutions race otherwise.
"""

try:
    import spconv.pytorch  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fquant.interop.spconv: spconv must be installed ({error}). "
        "pip install 'fquant[spconv]' for CUDA 11.8, or spconv for CPU."
    ) from error

from fquant.interop.spconv.convert import convert_spconv
from fquant.interop.spconv.operations import spconv_ops
from fquant.interop.spconv.state import from_spconv_state_dict, to_spconv_state_dict
from fquant.interop.spconv.tensors import from_spconv, to_spconv

__all__ = [
    "convert_spconv",
    "from_spconv",
    "from_spconv_state_dict",
    "spconv_ops",
    "to_spconv",
    "to_spconv_state_dict",
]
