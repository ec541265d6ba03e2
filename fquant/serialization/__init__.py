"""Files: trees of tensors, records, plans and rules, as safetensors with JSON in the metadata.

atomic       a file appears whole or not at all
container    tensors and one JSON document, with a format version and a checksum
tree         a tree as a document and tensors, and back
"""

from fquant.serialization.tree import load, save

__all__ = ["load", "save"]
