#!/usr/bin/env python3
"""Splits a GGUF into two files, as llama.cpp's gguf-split names and marks them: split_gguf.py IN.gguf FOLDER"""

import os
import struct
import sys
from pathlib import Path

from to_safetensors import Reader

U16, I32 = 2, 5


def key(name, kind, form, value):
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I" + form, kind, value)


def split_keys(number, n_tensors):
    """Three entries of metadata."""
    return (
        key("split.no", U16, "H", number)
        + key("split.count", U16, "H", 2)
        + key("split.tensors.count", I32, "i", n_tensors)
    )


def ends(infos, size):
    """Where the data of each tensor ends, padding included, by where it begins."""
    begins = sorted(at for *_, at in infos)
    return dict(zip(begins, [*begins[1:], size]))


def write(path, metadata, n_keys, tensors):
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), n_keys) + metadata
    body = b""
    for name, shape, kind, data in tensors:
        head += struct.pack("<Q", len(name)) + name.encode()
        head += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(body))
        body += bytes(data) + bytes(-len(data) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)


def convert(source: Path, folder: Path) -> None:
    data = source.read_bytes()
    reader = Reader(data)
    _magic, _version, n_tensors, n_keys = (reader.take(form) for form in ("4s", "I", "Q", "Q"))
    begin = reader.at
    for _ in range(n_keys):
        reader.string()
        reader.value(reader.take("I"))
    metadata = data[begin:reader.at]
    infos = [reader.tensor() for _ in range(n_tensors)]
    tail = memoryview(data)[-(-reader.at // 32) * 32:]
    end = ends(infos, len(tail))
    tensors = [(name, shape, kind, tail[at:end[at]]) for name, shape, kind, at in infos]
    half = len(tensors) // 2
    write(folder / "model-00001-of-00002.gguf", metadata + split_keys(0, n_tensors), n_keys + 3, tensors[:half])
    write(folder / "model-00002-of-00002.gguf", split_keys(1, n_tensors), 3, tensors[half:])


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    os.makedirs(folder, exist_ok=True)
    convert(source, folder)


if __name__ == "__main__":
    main()
