"""Floating-point formats that people call by name."""

from fquant.formats import FloatFormat

E4M3 = FloatFormat(4, 3, finite="fn")
E5M2 = FloatFormat(5, 2)
E4M3FNUZ = FloatFormat(4, 3, bias=8, finite="fnuz")
E5M2FNUZ = FloatFormat(5, 2, bias=16, finite="fnuz")
E2M3 = FloatFormat(2, 3, finite="all")
E3M2 = FloatFormat(3, 2, finite="all")
E2M1 = FloatFormat(2, 1, finite="all")
FP16 = FloatFormat(5, 10)
BF16 = FloatFormat(8, 7)
# QPyTorch: no code is lost to NaN, and ties go away from zero (its documentation says nearest even).
QPYTORCH_E4M3 = FloatFormat(4, 3, finite="all", rounding="half_away")
QPYTORCH_E5M2 = FloatFormat(5, 2, finite="all", rounding="half_away")
QPYTORCH_FP16 = FloatFormat(5, 10, finite="all", rounding="half_away")

# Microscaling formats (OCP MX v1.0) and NVFP4: blocks along the last axis. `dataclasses.replace` gives
# other axes; a kept axis before the last one needs `axis=(0, 1), block=(1, 32)` and so on.
NVFP4 = FloatFormat(2, 1, finite="all", axis=-1, block=16, scale_rule="two_level")
