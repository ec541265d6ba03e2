"""A tensor class of the user's own, from plan to integers: nothing of the library is patched.

The demands are those of a forum thread on `convert_fx` with sparse tensors: a record that quantizes by
itself, one's own line in the lowering table, Q/DQ merged on some edges and kept on others, and a table
of scales to read.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

import fquant as fq
from fquant.graph import (
    DEFAULT_TABLE,
    Lowering,
    integer_input,
    integer_weight,
    is_dequantize,
    quantization_of,
    site_integers,
)
from fquant.pytree import record, static


@record
class Cloud:
    """Points with features, of which each point reads a fixed number of others."""

    features: Tensor
    readers: Tensor
    name: str = static(default="cloud")

    def with_features(self, features):
        return replace(self, features=features)


LIBRARY = torch.library.Library("cloud_test", "DEF")


def _gather_sum(features, readers, weight):
    return features[readers].sum(dim=1) @ weight.T


def _gather_sum_int8(q, readers, weight, scale):
    total = q.double()[readers].sum(dim=1) @ weight.double().T
    return (total.float() * scale).round().clamp(-128, 127).to(torch.int8)


for name, schema, function in (
    ("gather_sum", "(Tensor features, Tensor readers, Tensor weight) -> Tensor", _gather_sum),
    (
        "gather_sum_int8",
        "(Tensor q, Tensor readers, Tensor weight, Tensor scale) -> Tensor",
        _gather_sum_int8,
    ),
):
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")


@fq.quantizable(inputs=("cloud",), weight="weight")
def mix(cloud, weight):
    y = torch.ops.cloud_test.gather_sum(cloud.features, cloud.readers, weight)
    return cloud.with_features(y)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 4) / 4)
        self.second = nn.Parameter(torch.randn(8, 8) / 4)
        self.head = nn.Linear(8, 3)

    def forward(self, cloud):
        cloud = mix(mix(cloud, self.first), self.second)
        return self.head(cloud.features.mean(dim=0, keepdim=True))


def build(editor, pattern):
    """The user's own line: `gather_sum` between DQ and Q is `gather_sum_int8`."""
    cloud, readers, w = pattern.anchor.args
    x, weight = integer_input(editor, cloud), integer_weight(editor, w)
    if pattern.quantize is None:
        raise fq.graph.NotLowered("its result is used as floats")
    out = editor.value(quantization_of(pattern.quantize).scale)
    scale = editor.add_state("cloud.scale", editor.value(x.scale) * weight.scale / out)
    stored = editor.add_state("cloud.weight", weight.q)
    target = torch.ops.cloud_test.gather_sum_int8.default
    return editor.call(target, x.input, readers, stored, scale, before=pattern.last)


TABLE = (
    Lowering("gather_sum_int8", (torch.ops.cloud_test.gather_sum.default,), build, absorbs=()),
    *DEFAULT_TABLE,
)


def test_a_record_of_ones_own_is_quantized_exported_and_lowered():
    model = Network()
    cloud = Cloud(torch.randn(50, 4), torch.randint(0, 50, (50, 3)))
    params = {n: p.detach() for n, p in model.named_parameters()}
    # The plan and its scales are there to read, before anything is converted.
    plan = fq.make_plan(model, fq.w8a8(), (cloud,))
    assert [site.name for site in plan.sites] == ["mix#0", "mix#1", "head/linear#0"]
    stats = fq.calibrate_model(model, plan, params, [cloud], progress=False)
    qstate = fq.finalize(plan, stats)
    program = fq.export_qdq(model, plan, params, qstate, (cloud,))
    assert torch.equal(program.module()(cloud), fq.fake_quant(model, plan)(params, qstate, cloud))
    # Without a line for it the layer stays, and the report says so.
    plain = fq.lower(program).report
    assert plain.layers[0].reason == "the table has no lowering for gather_sum"
    # With one it runs in integers; the head is kept for a runtime that wants to see its Q/DQ nodes.
    lowered, report = fq.lower(program, TABLE, edges={"head/.*": "keep"})
    assert [layer.kernel for layer in report.layers] == ["gather_sum_int8", "", ""]
    assert report.layers[1].reason == "its result is used as floats"
    assert {"head/linear#0.input", "head/linear#0.weight"} <= set(report.kept)
    kept = [n for n in lowered.graph.nodes if is_dequantize(n)]
    assert {"head/linear#0.input", "head/linear#0.weight"} <= {
        quantization_of(n).name for n in kept
    }
    text = str(report)
    for site in ("mix#0", "mix#1", "head/linear#0"):
        scale = qstate[f"{site}.input"].item()
        assert f"{site} " in text
        assert f"{scale:.4g}" in text
    before, after = site_integers(program, cloud), site_integers(lowered, cloud)
    for name in after:
        assert (before[name].int() - after[name].int()).abs().max() <= 1
    compiled = torch.compile(
        lowered.module(check_guards=False), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(cloud), lowered.module()(cloud))
    # Nothing was written, and the default table is what it was.
    assert len(DEFAULT_TABLE) == len(fq.graph.DEFAULT_TABLE) == len(TABLE) - 1
