"""What tests of quantized code need: Hypothesis strategies, dense oracles, the transform matrix."""
