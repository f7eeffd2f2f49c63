#!/usr/bin/env python3
"""Writes a model of a known shape with random weights, for benchmarks: speed does not depend on values.

The types are those that llama.cpp's quantizer gives each matrix; shape T has one type throughout, to
measure it. Blocks are random bytes under scales that keep every product's gain near one, so logits stay
finite at any depth. The same arguments give the same file. The vocabulary is a byte-level BPE of the
right size: bytes, pairs, triples. M and G have experts and fewer layers than the models they are
named after, to fit in 8 GB; the types of G are those of its publisher.

Usage: make_gguf.py A|B|C|D15m|D260k|M|G f16|q4_0|q8_0|q4_k_m|mxfp4 OUT.gguf    (needs numpy and gguf)
       make_gguf.py T q2_k|iq4_xs|... OUT.gguf
"""
import functools
import math
import os
import sys
import zlib

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter, LlamaFileType, quants
from gguf import GGMLQuantizationType as Type

SHAPES = {
    "A": dict(name="Qwen2.5-0.5B", arch="qwen2", layers=24, width=896, ff=4864, heads=14, kv=2,
              vocabulary=151936, context=32768, base=1e6, pre="qwen2"),
    "B": dict(name="Llama-3.2-1B", arch="llama", layers=16, width=2048, ff=8192, heads=32, kv=8,
              vocabulary=128256, context=131072, base=5e5, pre="llama-bpe", rope_factor=32),
    "C": dict(name="SmolLM2-135M", arch="llama", layers=30, width=576, ff=1536, heads=9, kv=3,
              vocabulary=49152, context=8192, base=1e5, pre="smollm"),
    "T": dict(name="half of Llama-3.2-1B", arch="llama", layers=8, width=2048, ff=8192, heads=32, kv=8,
              vocabulary=32000, context=8192, base=5e5, pre="llama-bpe"),
    "M": dict(name="Qwen3-30B-A3B", arch="qwen3moe", layers=12, width=2048, ff=768, heads=32, kv=4, head=128,
              vocabulary=151936, context=32768, base=1e6, pre="qwen2", experts=128, used=8),
    "G": dict(name="gpt-oss-20b", arch="gpt-oss", layers=10, width=2880, ff=2880, heads=64, kv=8, head=64,
              vocabulary=201088, context=131072, base=1.5e5, pre="gpt-4o", experts=32, used=4, window=128),
    "D15m": dict(name="stories15M", arch="llama", layers=6, width=288, ff=768, heads=6, kv=6,
                 vocabulary=32000, context=4096, base=1e4, pre="smollm"),
    "D260k": dict(name="stories260K", arch="llama", layers=5, width=64, ff=172, heads=8, kv=4,
                  vocabulary=512, context=4096, base=1e4, pre="smollm"),
}
FILE_TYPES = {"f16": LlamaFileType.MOSTLY_F16, "q4_0": LlamaFileType.MOSTLY_Q4_0,
              "q8_0": LlamaFileType.MOSTLY_Q8_0, "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
              "mxfp4": LlamaFileType.MOSTLY_MXFP4_MOE}
# Where a block has binary16 scales.
HALVES = {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "IQ4_NL": [0], "Q6_K": [208], "Q3_K": [108], "IQ4_XS": [0],
          "IQ3_S": [0], "IQ3_XXS": [0], "IQ2_S": [0], "IQ2_XS": [0], "IQ2_XXS": [0], "IQ1_S": [0],
          "TQ1_0": [52], "TQ2_0": [64], "Q4_1": [0], "Q5_1": [0], "Q2_K": [80], "Q4_K": [0], "Q5_K": [0]}
# And what follows: a minimum that centres the values, in units of that scale.
MINIMUMS = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}
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


def tensor_type(shape, file_type, tensor, layer, layers, columns):
    """As llama_tensor_get_type chooses."""
    if shape == "T":
        return Type[file_type.upper()]
    if file_type == "mxfp4":
        return Type.MXFP4 if tensor.endswith("exps") else Type.Q8_0
    wanted = {"f16": Type.F16, "q4_0": Type.Q4_0, "q8_0": Type.Q8_0, "q4_k_m": Type.Q4_K}[file_type]
    if tensor in ("token_embd", "output"):  # of many models one matrix is both
        wanted = {Type.Q4_0: Type.Q6_K, Type.Q4_K: Type.Q6_K}.get(wanted, wanted)
    elif file_type == "q4_k_m" and tensor in ("attn_v", "ffn_down", "ffn_down_exps") and more_bits(layer, layers):
        wanted = Type.Q6_K
    if columns % 256:
        wanted = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}.get(wanted, wanted)
    return wanted if columns % 32 == 0 else Type.F16


def halves(blocks, at, values):
    blocks[:, at:at + 2] = np.asarray(values, np.float16).reshape(-1, 1).view(np.uint8)


def set_scales(kind, blocks, scales):
    """Numbers of blocks times `scales`; they are centred where their type allows it."""
    name = kind.name
    if name == "MXFP4":
        blocks[:, 0] = 127 + np.round(np.log2(scales))
    elif name == "NVFP4":  # E4M3 from 2^-9 to 2^8, and each block has four
        blocks[:, :4] = np.clip(7 + np.round(np.log2(scales)), 1, 14).astype(np.uint8)[:, None] << 3
    elif name == "IQ1_M":  # a binary16 number in the upper halves of four bytes
        bits = np.asarray(scales, np.float16).view(np.uint16)
        for i in range(4):
            blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | (bits >> 4 * i & 15) << 4
    for at in HALVES.get(name, ()):
        halves(blocks, at, scales)
        if name in MINIMUMS:
            halves(blocks, at + 2, scales * MINIMUMS[name])


def tame(kind, blocks):
    """Changes what makes some of the random numbers much larger than the others, or not centred."""
    if kind == Type.Q8_0:
        np.maximum(blocks[:, 2:].view(np.int8), -127, out=blocks[:, 2:].view(np.int8))
    elif kind in (Type.Q4_K, Type.Q5_K):  # minimums like the scales: 6 bits each in 12 bytes
        scales = blocks[:, 4:12] % 32 + 32
        low, high = scales[:, :4], scales[:, 4:]
        first = low | (high >> 4) << 6
        blocks[:, 4:16] = np.concatenate([first, first, (high & 15) | (high & 15) << 4], axis=1)
    elif kind == Type.Q2_K:
        blocks[:, :16] = (blocks[:, :16] & 15) * 17
    elif kind == Type.Q6_K:
        blocks[:, 192:208] = blocks[:, 192:208] % 32 + 32


def random_blocks(rng, kind, count):
    blocks = np.frombuffer(bytearray(rng.bytes(count * GGML_QUANT_SIZES[kind][1])), np.uint8).reshape(count, -1)
    tame(kind, blocks)
    return blocks


@functools.cache
def spread_of(kind):
    """The standard deviation of numbers under scales of 1."""
    blocks = random_blocks(np.random.default_rng(1), kind, 256)
    set_scales(kind, blocks, np.ones(len(blocks)))
    return float(quants.dequantize(blocks, kind).std())


def random_matrix(rng, kind, rows, columns):
    """(rows, bytes of a row); standard deviation of a weight 1 / sqrt(columns)."""
    spread = 1 / math.sqrt(columns)
    if kind == Type.F16:  # random sign and fraction, one exponent
        exponent = 15 + round(math.log2(spread / 1.53))
        bits = np.frombuffer(rng.bytes(rows * columns * 2), np.uint16)
        return (bits & 0x83ff | exponent << 10).astype(np.uint16).view(np.float16).reshape(rows, columns)
    blocks = random_blocks(rng, kind, rows * columns // GGML_QUANT_SIZES[kind][0])
    set_scales(kind, blocks, rng.uniform(0.8, 1.2, len(blocks)) * spread / spread_of(kind))
    return blocks.reshape(rows, -1)


def llama3_factors(base, head_dim, factor):
    """Frequencies whose waves are longer than the original context turn slower (Llama 3.1)."""
    factors = []
    for pair in range(head_dim // 2):
        turns = 8192 / (2 * math.pi * base ** (2 * pair / head_dim))
        smooth = min(max((turns - 1) / (4 - 1), 0), 1)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


class Tensors:
    """Writes tensors one after the other, made when it is their turn: they need not fit in memory."""

    def __init__(self, writer, shape, file_type):
        self.writer, self.shape, self.file_type, self.made = writer, shape, file_type, []

    def random_of(self, name):
        return np.random.default_rng(zlib.crc32(f"{self.shape} {name}".encode()))

    def matrix(self, name, rows, columns, layer=0, count=1):
        kind = tensor_type(self.shape, self.file_type, name.split(".")[-1], layer, SHAPES[self.shape]["layers"],
                           columns)
        length, size = GGML_QUANT_SIZES[kind]
        shape = (rows, columns // length * size) if kind != Type.F16 else (rows, columns)
        dtype, width = (np.dtype(np.uint8), 1) if kind != Type.F16 else (np.dtype(np.float16), 2)
        self.writer.add_tensor_info(f"{name}.weight", (count,) * (count > 1) + shape, dtype,
                                    count * shape[0] * shape[1] * width, kind)
        self.made.append(lambda: random_matrix(self.random_of(name), kind, count * rows, columns))

    def vector(self, name, values):
        values = np.asarray(values, np.float32)
        self.writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        self.made.append(lambda: values)

    def normal(self, name, *shape):
        self.vector(name, self.random_of(name).normal(0, 0.1, shape))

    def write(self):
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        for make in self.made:
            self.writer.write_tensor_data(make())


def add_hyperparameters(writer, s, head_dim):
    writer.add_block_count(s["layers"])
    writer.add_context_length(s["context"])
    writer.add_embedding_length(s["width"])
    writer.add_feed_forward_length(s["ff"])
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv"])
    writer.add_rope_freq_base(s["base"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(s["vocabulary"])
    if "head" in s:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if "experts" in s:
        writer.add_expert_count(s["experts"])
        writer.add_expert_used_count(s["used"])
        writer.add_expert_feed_forward_length(s["ff"])
    if "window" in s:
        writer.add_sliding_window(s["window"])


def add_tokenizer(writer, s):
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


def add_layer(tensors, s, layer, head_dim):
    width, ff, arch, prefix = s["width"], s["ff"], s["arch"], f"blk.{layer}."
    q_width, kv_width = s["heads"] * head_dim, s["kv"] * head_dim
    for name in ("attn_norm", "post_attention_norm" if arch == "gpt-oss" else "ffn_norm"):
        tensors.vector(f"{prefix}{name}.weight", np.ones(width))
    for name, rows, columns in (("attn_q", q_width, width), ("attn_k", kv_width, width),
                                ("attn_v", kv_width, width), ("attn_output", width, q_width)):
        tensors.matrix(prefix + name, rows, columns, layer)
        if arch == "gpt-oss" or (arch == "qwen2" and name != "attn_output"):
            tensors.normal(f"{prefix}{name}.bias", rows)
    if arch == "gpt-oss":
        tensors.normal(prefix + "attn_sinks.weight", s["heads"])
    if arch == "qwen3moe":
        for name in ("attn_q_norm", "attn_k_norm"):
            tensors.vector(f"{prefix}{name}.weight", np.ones(head_dim))
    if "experts" in s:
        tensors.normal(prefix + "ffn_gate_inp.weight", s["experts"], width)
        if arch == "gpt-oss":
            tensors.normal(prefix + "ffn_gate_inp.bias", s["experts"])
    for name, rows, columns in (("ffn_gate", ff, width), ("ffn_up", ff, width), ("ffn_down", width, ff)):
        if "experts" not in s:
            tensors.matrix(prefix + name, rows, columns, layer)
            continue
        tensors.matrix(f"{prefix}{name}_exps", rows, columns, layer, s["experts"])
        if arch == "gpt-oss":
            tensors.normal(f"{prefix}{name}_exps.bias", s["experts"], rows)


def main():
    if len(sys.argv) != 4 or sys.argv[1] not in SHAPES:
        sys.exit(__doc__)
    shape_name, file_type, path = sys.argv[1], sys.argv[2].lower(), sys.argv[3]
    if file_type not in FILE_TYPES and (shape_name != "T" or file_type.upper() not in Type.__members__):
        sys.exit(__doc__)
    s = SHAPES[shape_name]
    head_dim = s.get("head", s["width"] // s["heads"])

    writer = GGUFWriter(path + ".part", s["arch"])
    writer.add_name(f"{s['name']} shape, random weights")
    writer.add_file_type(FILE_TYPES.get(file_type, LlamaFileType.GUESSED))
    writer.add_quantization_version(2)
    add_hyperparameters(writer, s, head_dim)
    add_tokenizer(writer, s)
    tensors = Tensors(writer, shape_name, file_type)
    tensors.matrix("token_embd", s["vocabulary"], s["width"])
    if "experts" in s:
        tensors.matrix("output", s["vocabulary"], s["width"])
    tensors.vector("output_norm.weight", np.ones(s["width"]))
    if "rope_factor" in s:
        tensors.vector("rope_freqs.weight", llama3_factors(s["base"], head_dim, s["rope_factor"]))
    for layer in range(s["layers"]):
        add_layer(tensors, s, layer, head_dim)
    tensors.write()
    writer.close()
    os.replace(path + ".part", path)


main()
