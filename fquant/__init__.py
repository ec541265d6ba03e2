"""Quantization as pure functions over trees of tensors, composed with `torch.func`."""
