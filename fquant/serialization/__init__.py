"""Files: trees of tensors, records, plans and rules, as safetensors with JSON in the metadata.

atomic       a file appears whole or not at all
container    tensors and one JSON document, with a format version and a checksum
tree         a tree as a document and tensors, and back
network_card an int8 sparse network for other engines; run_card runs it here
"""

from fquant.serialization.network_card import (
    CardLayer,
    CardMap,
    NetworkCard,
    load_network_card,
    network_card,
    save_network_card,
)
from fquant.serialization.run_card import card_maps, run_card
from fquant.serialization.tree import load, save

__all__ = [
    "CardLayer",
    "CardMap",
    "NetworkCard",
    "card_maps",
    "load",
    "load_network_card",
    "network_card",
    "run_card",
    "save",
    "save_network_card",
]
