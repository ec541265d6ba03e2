"""ONNX from a Q/DQ program.

types     which ONNX type holds a format's codes
qdq       QuantizeLinear and DequantizeLinear for the two nodes
sparse    the domain "fquant" of sparse layers
export    a program -> a file
"""

from fquant.graph.onnx.export import to_onnx

__all__ = ["to_onnx"]
