"""From a fine-tuned model to a deployed one: the Q/DQ graph, and what is made of it.

qdq_ops    the two nodes, their arguments, and how to recognise them
export     a model under a plan -> program with Q/DQ nodes
editor     how programs are rewritten: copied, never written
fold       batch norms in the scales of the layers before them
tidy       exact rewrites that bring Q/DQ nodes next to the layers they belong to
pattern    what a line of a lowering table is about
kernels    the lines that come with fquant; epilogue works out their constants
lowering   program -> program with integer layers; report says what became of each
onnx       program with Q/DQ nodes -> ONNX
prepack    program -> program for this machine's CPU
decomposed torch's own quantized_decomposed nodes, for tools that want them
card       lowered sparse network -> network card
files      program -> a small file without pickle
integers   what a program computes at each quantizer
"""

from fquant.graph.card import card_of_program
from fquant.graph.decomposed import to_quantized_decomposed
from fquant.graph.editor import Editor
from fquant.graph.export import dynamic_rows, export_qdq, store_integers
from fquant.graph.files import save_program
from fquant.graph.fold import fold_norms
from fquant.graph.integers import site_integers
from fquant.graph.kernels import DEFAULT_TABLE
from fquant.graph.lowering import Lowered, lower
from fquant.graph.onnx import to_onnx
from fquant.graph.pattern import Lowering, NotLowered, Pattern, integer_input, integer_weight
from fquant.graph.prepack import prepack
from fquant.graph.qdq_ops import (
    Quantization,
    format_from_text,
    format_to_text,
    granularity_of,
    is_dequantize,
    is_quantize,
    quantization_of,
)
from fquant.graph.report import LayerReport, LoweringReport, QuantizedOperand

__all__ = [
    "DEFAULT_TABLE",
    "Editor",
    "LayerReport",
    "Lowered",
    "Lowering",
    "LoweringReport",
    "NotLowered",
    "Pattern",
    "Quantization",
    "QuantizedOperand",
    "card_of_program",
    "dynamic_rows",
    "export_qdq",
    "fold_norms",
    "format_from_text",
    "format_to_text",
    "granularity_of",
    "integer_input",
    "integer_weight",
    "is_dequantize",
    "is_quantize",
    "lower",
    "prepack",
    "quantization_of",
    "save_program",
    "site_integers",
    "store_integers",
    "to_onnx",
    "to_quantized_decomposed",
]
