"""Cuts a GGUF model of the Llama family down to its first layers: small_model.py IN.gguf OUT.gguf LAYERS

What remains loads and runs as any model does, many times faster, and says nothing sensible. For load tests.
"""

import pathlib
import struct
import sys

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
BLOCK_COUNT = b"llama.block_count"


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, form):
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def string(self):
        length = self.take("Q")
        self.at += length
        return self.data[self.at - length:self.at]

    def skip(self, kind):
        if kind == STRING:
            self.string()
        elif kind == ARRAY:
            inner, count = self.take("I"), self.take("Q")
            for _ in range(count):
                self.skip(inner)
        else:
            self.take(SCALARS[kind])


def layer(name):
    return int(name.split(b".")[1]) if name.startswith(b"blk.") else -1


def main():
    source, target, layers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    reader = Reader(pathlib.Path(source).read_bytes())
    magic, version, n_tensors, n_keys = (reader.take(form) for form in ("4s", "I", "Q", "Q"))
    pairs = []
    for _ in range(n_keys):
        begin = reader.at
        key, kind = reader.string(), reader.take("I")
        value_at = reader.at
        reader.skip(kind)
        pair = bytearray(reader.data[begin:reader.at])
        if key == BLOCK_COUNT:
            struct.pack_into("<" + SCALARS[kind], pair, value_at - begin, layers)
        pairs.append(bytes(pair))
    infos = []
    for _ in range(n_tensors):
        name = reader.string()
        shape = [reader.take("Q") for _ in range(reader.take("I"))]
        infos.append((name, shape, reader.take("I"), reader.take("Q")))
    base = -(-reader.at // 32) * 32
    ends = sorted(offset for *_, offset in infos)[1:] + [len(reader.data) - base]
    end_of = dict(zip(sorted(offset for *_, offset in infos), ends))
    kept = [info for info in infos if layer(info[0]) < layers]
    head = struct.pack("<4sIQQ", magic, version, len(kept), n_keys) + b"".join(pairs)
    body = b""
    for name, shape, kind, offset in kept:
        head += struct.pack("<Q", len(name)) + name
        head += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(body))
        body += reader.data[base + offset:base + end_of[offset]]
        body += bytes(-len(body) % 32)
    head += bytes(-len(head) % 32)
    pathlib.Path(target).write_bytes(head + body)


main()
