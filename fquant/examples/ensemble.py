"""An ensemble of quantization settings in one `vmap`: four calibrations of one network at once.

Run it: `python -m fquant.examples.ensemble`.
"""

import torch
from torch import nn
from torch.func import functional_call, vmap

import fquant as fq
from fquant.examples.dense_recipe import load_images, parameters, train

SPEC = fq.QuantSpec(4)
SETTINGS: dict[str, fq.Observer] = {
    "max": fq.MaxObserver(),
    "99.9 %": fq.HistogramObserver(percentile=99.9),
    "99 %": fq.HistogramObserver(percentile=99.0),
    "least squares": fq.HistogramObserver(method="mse"),
}


def main(steps: int = 150) -> dict[str, float]:
    """Returns the accuracy of every setting in percent, all from one call."""
    torch.manual_seed(0)
    data = load_images()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    params = train(lambda p, x: functional_call(model, p, (x,)), parameters(model), data, steps,
                   lambda step: 0.005)  # fmt: skip
    scales = []
    for observer in SETTINGS.values():  # the grids are the same, so the plans differ in scales only
        inputs = fq.Quantizer(SPEC, observer=observer)
        rules = [fq.OpRule(weight=fq.QuantSpec(4, narrow_range=True), inputs=inputs)]
        plan = fq.make_plan(model, rules, (data.train_images[:2],))
        stats = fq.calibrate_model(model, plan, params, [data.train_images[:512]], progress=False)
        scales.append(fq.finalize(plan, stats))
    stacked = {name: torch.stack([q[name] for q in scales]) for name in scales[0]}

    forward = fq.fake_quant(model, plan)
    with torch.no_grad():  # (settings, images, classes)
        logits = vmap(forward, in_dims=(None, 0, None))(params, stacked, data.test_images)
    right = (logits.argmax(-1) == data.test_labels).float().mean(1) * 100
    together = (logits.softmax(-1).mean(0).argmax(-1) == data.test_labels).float().mean() * 100
    return {**dict(zip(SETTINGS, right.tolist(), strict=True)), "together": together.item()}


if __name__ == "__main__":
    print(main())
