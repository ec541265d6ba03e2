"""A damaged, truncated, foreign or newer file is a ValueError, and loads nothing."""

import copy
import hashlib
import json
import random
import struct

import pytest
import torch

import fquant as fq
from fquant.serialization import container, tree

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a file with a bit of everything in it."""
    path = tmp_path_factory.mktemp("whole") / "file"
    model = torch.nn.Linear(3, 2)
    params = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.ones(1, 3)
    plan = fq.make_plan(model, fq.w4a8(), (x,))
    stats = fq.calibrate_model(model, plan, params, [x], progress=False)
    weight = fq.quantize(params["weight"], 0.1, spec=fq.QuantSpec(4))
    fq.save(
        path,
        {
            **{"params": params, "plan": plan, "stats": stats, "qstate": fq.finalize(plan, stats)},
            **{"weight": weight, "packed": fq.pack(weight), "shape": (2, 3), "nan": float("nan")},
            **{"wide": torch.ones(3, dtype=torch.complex128), "dtype": torch.float16},
        },
    )
    return path.read_bytes()


def split(data):
    """(header as a dict, tensor bytes)."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def flip_bits(data, random):
    damaged = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 8])):
        damaged[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(damaged)


def truncate(data, random):
    return data[: random.randrange(len(data))]


def lie_about_the_header(data, random):
    (size,) = struct.unpack("<Q", data[:8])
    near = size + random.choice([-64, -8, -1, 1, 8, 64, len(data)])
    lie = random.choice([near, 0, random.randrange(2**64), 2**64 - 1, 2**31])
    return struct.pack("<Q", lie) + data[8:]


def damage_the_header(data, random):
    header, body = split(data)
    text = json.dumps(header, separators=(",", ":"))  # a space more or less is no damage
    at = random.randrange(len(text))
    wrong = random.choice([x for x in '{}[]",:0919eE-xyz\\' if x != text[at]])
    text = text[:at] + random.choice([wrong, "", text[at] * 2]) + text[at + 1 :]
    return struct.pack("<Q", len(text)) + text.encode() + body


def swap_entries(data, random):
    """Another dtype, shape or place for tensors, the bytes as they were."""
    header, body = split(data)
    names = [n for n in header if n != "__metadata__"]
    a, b = random.sample([n for n in names if 0 not in header[n]["shape"]], 2)
    match random.randrange(5):
        case 0:
            dtypes = ["F32", "I32", "U8", "I8", "BOOL", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4"]
            header[a]["dtype"] = random.choice([d for d in dtypes if d != header[a]["dtype"]])
        case 1:
            header[a]["shape"] = random.choice([[1, *header[a]["shape"]], [2**62, 4], [-1], [7]])
        case 2:
            offsets = header[a]["data_offsets"]
            header[a]["data_offsets"] = [offsets[0] + random.choice([-8, 1, 8, 2**63]), offsets[1]]
        case 3:
            header[a], header[b] = header[b], header[a]
        case 4:
            del header[a]
    return join(header, body)


def change_metadata(data, random):
    header, body = split(data)
    metadata = header["__metadata__"]
    key = random.choice(["format", "version", "document", "sha256"])
    match random.randrange(3):
        case 0:
            del metadata[key]
        case 1:
            at = random.randrange(len(metadata[key]))
            text = metadata[key]
            metadata[key] = text[:at] + chr(ord(text[at]) + 1) + text[at + 1 :]
        case 2:
            metadata[key] = random.choice(["", "0", "null", "[" * 100_000, 7, None, {}])
    return join(header, body)


def patch(data, random):
    """A stretch of zeros, noise or other bytes of the file; or bytes too many."""
    size = random.randrange(1, 64)
    at = random.randrange(len(data))
    other = random.randrange(len(data))
    piece = random.choice([bytes(size), random.randbytes(size), data[other : other + size]])
    return random.choice([data[:at] + piece + data[at + size :], data[:at] + piece + data[at:]])


def foreign(data, random):
    header, body = split(data)
    del header["__metadata__"]
    choices = [b"", b"PK\x03\x04" + random.randbytes(99), random.randbytes(random.randrange(400))]
    return random.choice([*choices, join(header, body), join({}, b""), json.dumps(header).encode()])


KINDS = {
    flip_bits: 300,
    truncate: 150,
    lie_about_the_header: 50,
    damage_the_header: 150,
    swap_entries: 150,
    change_metadata: 100,
    patch: 80,
    foreign: 20,
}
assert sum(KINDS.values()) == 1000


@pytest.mark.parametrize("damage", KINDS, ids=lambda f: f.__name__)
def test_1000_damaged_files(damage, whole, tmp_path):
    path = tmp_path / "damaged"
    fuzz = random.Random(damage.__name__)
    for _ in range(KINDS[damage]):
        data = whole
        while data == whole:
            data = damage(whole, fuzz)
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"^load: .* must be "):
            fq.load(path)


def nodes_of(node, found):
    if isinstance(node, dict):
        found += [(node, key) for key in node]
        for item in node.values():
            nodes_of(item, found)
    elif isinstance(node, list):
        found += [(node, i) for i in range(len(node))]
        for item in node:
            nodes_of(item, found)
    return found


ODD = (
    None,
    True,
    -1,
    2**70,
    0.5,
    "",
    "QTensor",
    "Plan",
    "NonFiniteWarning",
    [],
    {},
    [[]],
    "device",
)


def test_a_document_that_lies_with_a_right_checksum(whole, tmp_path):
    """Whoever makes a file by hand gets an error or what the file says, never a crash."""
    header, _ = split(whole)
    tensors = safetensors.load(whole)
    document = json.loads(header["__metadata__"]["document"])
    fuzz = random.Random(0)
    errors = []
    for _ in range(150):
        changed = copy.deepcopy(document)
        for _ in range(fuzz.choice([1, 1, 3])):
            parent, key = fuzz.choice(nodes_of(changed, []))
            donor, name = fuzz.choice(nodes_of(document, []))
            parent[key] = copy.deepcopy(fuzz.choice([fuzz.choice(ODD), donor[name]]))
        container.write_container(tmp_path / "x", tree.FORMAT, tree.VERSION, changed, tensors)
        try:
            fq.load(tmp_path / "x")
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) > 50
    assert all(message.startswith("load: ") for message in errors)


def test_a_deep_document_is_refused(tmp_path):
    deep = "[" * 200_000
    tensors = {}
    metadata = {"format": tree.FORMAT, "version": "1", "document": deep}
    digest = hashlib.sha256(json.dumps([tree.FORMAT, "1", deep]).encode()).hexdigest()
    safetensors.save_file(tensors, tmp_path / "deep", {**metadata, "sha256": digest})
    with pytest.raises(ValueError, match=r"load: .* its document is not JSON"):
        fq.load(tmp_path / "deep")


def test_a_newer_file_says_so(tmp_path):
    container.write_container(tmp_path / "x", tree.FORMAT, 2, None, {})
    with pytest.raises(ValueError, match="version 1 or older, got 2: a newer fquant wrote it"):
        fq.load(tmp_path / "x")


def test_a_file_of_another_program_says_so(tmp_path):
    safetensors.save_file({"x": torch.ones(2)}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"'fquant\.tree', got 'a safetensors file of another"):
        fq.load(tmp_path / "x")
    safetensors.save_file({"x": torch.ones(2)}, tmp_path / "x", {"format": "pt"})
    with pytest.raises(ValueError, match=r"'fquant\.tree', got 'pt'"):
        fq.load(tmp_path / "x")


def test_a_pickle_is_not_even_opened(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"load: .* not a whole safetensors file"):
        fq.load(tmp_path / "x")


def test_no_file_is_a_file_not_found(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(FileNotFoundError, match="load: path must be a file"):
            fq.load(path)
