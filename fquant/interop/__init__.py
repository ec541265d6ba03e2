"""Other libraries' models and tensors, each in a package that needs that library installed."""
