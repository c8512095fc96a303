#!/usr/bin/env python3
"""Writes a GGUF of the Llama family as a folder in Hugging Face layout: to_safetensors.py IN.gguf FOLDER

It reads the file, dequantizes and orders rows by itself, with the standard library alone, so that what Bindery makes
of the folder checks what it makes of the GGUF. Knows F32, Q4_1 and Q8_0, and the tokenizer of SmolLM2.
"""

import array
import json
import os
import struct
import sys
from pathlib import Path

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


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
        return self.data[self.at - length:self.at].decode()

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.take("I"), self.take("Q")
            return [self.value(inner) for _ in range(count)]
        return self.take(SCALARS[kind])

    def tensor(self):
        """Name, shape (outermost first), type and place in the data."""
        name = self.string()
        shape = [self.take("Q") for _ in range(self.take("I"))]
        return name, shape[::-1], self.take("I"), self.take("Q")


def read(data):
    """The metadata, the tensors and where their data begins."""
    reader = Reader(data)
    _magic, _version, n_tensors, n_keys = (reader.take(form) for form in ("4s", "I", "Q", "Q"))
    metadata = {}
    for _ in range(n_keys):
        key = reader.string()
        metadata[key] = reader.value(reader.take("I"))
    tensors = [reader.tensor() for _ in range(n_tensors)]
    return metadata, tensors, -(-reader.at // 32) * 32


def halves(numbers):
    """Numbers as the bits of half-precision floats, rounded to the nearest."""
    return struct.unpack(f"<{len(numbers)}H", struct.pack(f"<{len(numbers)}e", *numbers))


def q4_1(data):
    """Blocks of 32 numbers: scale, minimum, and nibbles whose low halves come first."""
    out = array.array("H")
    for scale, least, nibbles in struct.iter_unpack("<ee16s", data):
        number = halves([scale * nibble + least for nibble in range(16)])
        out.extend([number[byte & 15] for byte in nibbles])
        out.extend([number[byte >> 4] for byte in nibbles])
    return out


def q8_0(data):
    """Blocks of 32 numbers: scale and signed bytes."""
    out = array.array("H")
    for scale, *numbers in struct.iter_unpack("<e32b", data):
        out.extend(halves([scale * number for number in numbers]))
    return out


def half_split(numbers, shape, heads):
    """The rows of each head's neighbouring pairs (2j, 2j + 1), brought half a head apart."""
    rows, cols = shape
    head_dim = rows // heads
    out = array.array("H")
    for first in range(0, rows, head_dim):
        for row in [*range(0, head_dim, 2), *range(1, head_dim, 2)]:
            out.extend(numbers[(first + row) * cols:(first + row + 1) * cols])
    return out


def renamed(name):
    if name in NAMES:
        return NAMES[name]
    _blk, layer, part, end = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.{end}"


def converted(metadata, tensor, data):
    """The dtype and bytes of a tensor whose data begins where `data` does."""
    name, shape, kind, _at = tensor
    size = 1
    for dimension in shape:
        size *= dimension
    if kind == F32:
        return "F32", data[:size * 4]
    numbers = q4_1(data[:size // 32 * 20]) if kind == Q4_1 else q8_0(data[:size // 32 * 34])
    if ".attn_q." in name:
        numbers = half_split(numbers, shape, metadata["llama.attention.head_count"])
    if ".attn_k." in name:
        numbers = half_split(numbers, shape, metadata["llama.attention.head_count_kv"])
    if sys.byteorder == "big":
        numbers.byteswap()
    return "F16", numbers.tobytes()


def write_weights(path, metadata, tensors, data):
    header, parts, end = {}, [], 0
    for tensor in tensors:
        name, shape, kind, at = tensor
        if kind not in (F32, Q4_1, Q8_0):
            raise ValueError(f"tensor {name} is of type {kind}, wanted F32, Q4_1 or Q8_0")
        dtype, bytes_ = converted(metadata, tensor, data[at:])
        header[renamed(name)] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(bytes_)]}
        parts.append(bytes_)
        end += len(bytes_)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.writelines(parts)


def config(metadata):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "vocab_size": metadata["llama.vocab_size"],
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
    }


def tokenizer(metadata):
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    control = [(id_, text) for id_, text in enumerate(tokens) if kinds[id_] == 3]
    return {
        "version": "1.0",
        "added_tokens": [{"id": id_, "content": text, **flags} for id_, text in control],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, {**byte_level, "use_regex": True}],
        },
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {text: id_ for id_, text in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config(metadata):
    tokens = metadata["tokenizer.ggml.tokens"]
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    texts = {f"{short}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for short, name in named.items()}
    return {**texts, "chat_template": metadata["tokenizer.chat_template"]}


def convert(source: Path, folder: Path) -> None:
    data = source.read_bytes()
    metadata, tensors, begin = read(data)
    write_weights(folder / "model.safetensors", metadata, tensors, memoryview(data)[begin:])
    for name, make in [("config", config), ("tokenizer", tokenizer), ("tokenizer_config", tokenizer_config)]:
        (folder / f"{name}.json").write_text(json.dumps(make(metadata)))


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    os.makedirs(folder, exist_ok=True)
    convert(source, folder)


if __name__ == "__main__":
    main()
