"""`fquant demo`: a sparse network on handwritten digits, from float training to int8.

data      1,797 scans of 8 x 8 pixels that ship with scikit-learn, as sparse images
network   six sparse convolutions with one residual, as a torch module that is never mutated
training  torch.func.grad, functional_call and Adam as pure functions over the parameter dict
quantize  what to quantize, calibration, the fake-quantized and the int8 forward pass
report    the table and the picture
"""
