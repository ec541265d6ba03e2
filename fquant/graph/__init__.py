"""From a fine-tuned model to a deployed one: the Q/DQ graph, and what is made of it.

qdq_ops    the two nodes, their arguments, and how to recognise them
export     a model under a plan -> program with Q/DQ nodes
"""

from fquant.graph.export import dynamic_rows, export_qdq, store_integers
from fquant.graph.qdq_ops import (
    Quantization,
    format_from_text,
    format_to_text,
    granularity_of,
    is_dequantize,
    is_quantize,
    quantization_of,
)

__all__ = [
    "Quantization",
    "dynamic_rows",
    "export_qdq",
    "format_from_text",
    "format_to_text",
    "granularity_of",
    "is_dequantize",
    "is_quantize",
    "quantization_of",
    "store_integers",
]
