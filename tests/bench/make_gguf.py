#!/usr/bin/env python3
"""Writes a model of a known shape with random weights, for benchmarks: speed does not depend on values.

The types are those that llama.cpp's quantizer gives each matrix. Blocks are random bytes under scales
that keep every product's gain near one, so logits stay finite at any depth. The same arguments give
the same file. The vocabulary is a byte-level BPE of the right size: bytes, pairs, triples.

Usage: make_gguf.py A|B|C|D15m|D260k f16|q4_0|q8_0|q4_k_m OUT.gguf      (needs numpy and gguf)
"""
import math
import os
import sys
import zlib

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, LlamaFileType

SHAPES = {
    "A": dict(name="Qwen2.5-0.5B", arch="qwen2", layers=24, width=896, ff=4864, heads=14, kv=2,
              vocabulary=151936, context=32768, base=1e6, pre="qwen2"),
    "B": dict(name="Llama-3.2-1B", arch="llama", layers=16, width=2048, ff=8192, heads=32, kv=8,
              vocabulary=128256, context=131072, base=5e5, pre="llama-bpe", rope_factor=32),
    "C": dict(name="SmolLM2-135M", arch="llama", layers=30, width=576, ff=1536, heads=9, kv=3,
              vocabulary=49152, context=8192, base=1e5, pre="smollm"),
    "D15m": dict(name="stories15M", arch="llama", layers=6, width=288, ff=768, heads=6, kv=6,
                 vocabulary=32000, context=4096, base=1e4, pre="smollm"),
    "D260k": dict(name="stories260K", arch="llama", layers=5, width=64, ff=172, heads=8, kv=4,
                  vocabulary=512, context=4096, base=1e4, pre="smollm"),
}
FILE_TYPES = {"f16": LlamaFileType.MOSTLY_F16, "q4_0": LlamaFileType.MOSTLY_Q4_0,
              "q8_0": LlamaFileType.MOSTLY_Q8_0, "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
            "'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def vocabulary(size):
    """Tokens, their kinds and the merges that make them."""
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    tokens, merges = SPECIAL + letters, []
    parts = letters
    while len(tokens) < size:  # every pair of letters, then every pair and a letter
        made = [(a, b) for a in parts for b in letters][:size - len(tokens)]
        merges += [f"{a} {b}" for a, b in made]
        parts = [a + b for a, b in made]
        tokens += parts
    kinds = [3] * len(SPECIAL) + [1] * (size - len(SPECIAL))
    return tokens, kinds, merges or ["a b"]


def more_bits(layer, layers):
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensor_type(file_type, tensor, layer, layers, columns):
    """As llama_tensor_get_type chooses."""
    wanted = {"f16": Type.F16, "q4_0": Type.Q4_0, "q8_0": Type.Q8_0, "q4_k_m": Type.Q4_K}[file_type]
    if tensor == "token_embd":  # the output matrix, too
        wanted = {Type.Q4_0: Type.Q6_K, Type.Q4_K: Type.Q6_K}.get(wanted, wanted)
    elif file_type == "q4_k_m" and tensor in ("attn_v", "ffn_down") and more_bits(layer, layers):
        wanted = Type.Q6_K
    if columns % 256:
        wanted = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}.get(wanted, wanted)
    return wanted if columns % 32 == 0 else Type.F16


def halves(blocks, at, values):
    blocks[:, at:at + 2] = np.asarray(values, np.float16).reshape(-1, 1).view(np.uint8)


def pack_scales(scales):
    """Eight 6-bit scales, and equal minimums, in the 12 bytes of a Q4_K block."""
    low, high = scales[:, :4], scales[:, 4:]
    first = low | (high >> 4) << 6
    return np.concatenate([first, first, (high & 15) | (high & 15) << 4], axis=1)


def random_matrix(rng, kind, rows, columns):
    """(rows, bytes of a row); standard deviation of a weight 1 / sqrt(columns)."""
    spread = 1 / math.sqrt(columns)
    if kind == Type.F16:  # random sign and fraction, one exponent
        exponent = 15 + round(math.log2(spread / 1.53))
        bits = np.frombuffer(rng.bytes(rows * columns * 2), np.uint16)
        return (bits & 0x83ff | exponent << 10).astype(np.uint16).view(np.float16).reshape(rows, columns)
    size, length = {Type.Q4_0: (18, 32), Type.Q5_0: (22, 32), Type.Q8_0: (34, 32), Type.Q4_K: (144, 256),
                    Type.Q6_K: (210, 256)}[kind]
    blocks = np.frombuffer(bytearray(rng.bytes(rows * columns // length * size)), np.uint8).reshape(-1, size)
    scales = rng.uniform(0.8, 1.2, len(blocks)) * spread
    if kind == Type.Q4_0:
        halves(blocks, 0, scales / 4.6)
    elif kind == Type.Q5_0:
        halves(blocks, 0, scales / 9.2)
    elif kind == Type.Q8_0:
        np.maximum(blocks[:, 2:].view(np.int8), -127, out=blocks[:, 2:].view(np.int8))
        halves(blocks, 0, scales / 73.6)
    elif kind == Type.Q4_K:  # minimums that centre the codes
        halves(blocks, 0, scales / (48 * 4.6))
        halves(blocks, 2, scales / (48 * 4.6) * 7.5)
        blocks[:, 4:16] = pack_scales(blocks[:, 4:12] % 32 + 32)
    else:
        blocks[:, 192:208] = blocks[:, 192:208] % 32 + 32
        halves(blocks, 208, scales / (48 * 18.5))
    return blocks.reshape(rows, -1)


def llama3_factors(base, head_dim, factor):
    """Frequencies whose waves are longer than the original context turn slower (Llama 3.1)."""
    factors = []
    for pair in range(head_dim // 2):
        turns = 8192 / (2 * math.pi * base ** (2 * pair / head_dim))
        smooth = min(max((turns - 1) / (4 - 1), 0), 1)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in SHAPES or sys.argv[2].lower() not in FILE_TYPES:
        sys.exit(__doc__)
    shape_name, file_type, path = sys.argv[1], sys.argv[2].lower(), sys.argv[3]
    s = SHAPES[shape_name]
    width, ff, layers = s["width"], s["ff"], s["layers"]
    head_dim = width // s["heads"]
    kv_width = s["kv"] * head_dim

    writer = GGUFWriter(path + ".part", s["arch"])
    writer.add_name(f"{s['name']} shape, random weights")
    writer.add_file_type(FILE_TYPES[file_type])
    writer.add_quantization_version(2)
    writer.add_block_count(layers)
    writer.add_context_length(s["context"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv"])
    writer.add_rope_freq_base(s["base"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(s["vocabulary"])
    tokens, kinds, merges = vocabulary(s["vocabulary"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(s["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)

    def random_of(name):
        return np.random.default_rng(zlib.crc32(f"{shape_name} {name}".encode()))

    def matrix(name, rows, columns, layer=0):
        kind = tensor_type(file_type, name.split(".")[-1], layer, layers, columns)
        writer.add_tensor(f"{name}.weight", random_matrix(random_of(name), kind, rows, columns), raw_dtype=kind)

    def vector(name, values):
        writer.add_tensor(name, np.asarray(values, np.float32))

    matrix("token_embd", s["vocabulary"], width)
    vector("output_norm.weight", np.ones(width))
    if "rope_factor" in s:
        vector("rope_freqs.weight", llama3_factors(s["base"], head_dim, s["rope_factor"]))
    for layer in range(layers):
        prefix = f"blk.{layer}."
        vector(prefix + "attn_norm.weight", np.ones(width))
        vector(prefix + "ffn_norm.weight", np.ones(width))
        for name, rows, columns in (("attn_q", width, width), ("attn_k", kv_width, width),
                                    ("attn_v", kv_width, width), ("attn_output", width, width),
                                    ("ffn_gate", ff, width), ("ffn_up", ff, width), ("ffn_down", width, ff)):
            matrix(prefix + name, rows, columns, layer)
            if s["arch"] == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                vector(prefix + name + ".bias", random_of(prefix + name + ".bias").normal(0, 0.1, rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(path + ".part", path)


main()
