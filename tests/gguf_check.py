#!/usr/bin/env python3
"""Compares our GGUF reader and writer with PyPI's `gguf` (pip install gguf).

usage: gguf_check.py GGUF_DUMP WRITE_TINY_MODEL [MODEL ...]

Files written by `gguf` and read by ours: every kind of key, alignment, split files. Files written
by ours and read by `gguf`: the tiny model. Each MODEL is read by both. The two type tables are
compared too: a tensor of every type goes through both.
"""

import hashlib
import pathlib
import struct
import subprocess
import sys
import tempfile

import gguf
import numpy as np

TYPE_NAMES = ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "boolean", "string", "array", "u64",
              "i64", "f64"]
NOT_IN_FILES = {"Q8_1", "Q8_K"}  # activations of ggml, never stored


def show(kind, part):
    if kind == gguf.GGUFValueType.STRING:
        return f"'{bytes(part).hex()}'"
    if kind in (gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.FLOAT64):
        return struct.pack(">d", float(part[0])).hex()
    return str(int(part[0]))


def dump(*paths):
    """What gguf_dump prints, as `gguf` sees it: the keys of the first file, tensors of all."""
    lines = []
    readers = [gguf.GGUFReader(path) for path in paths]
    for name, field in readers[0].fields.items():
        if name.startswith("GGUF."):
            continue
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        kind = field.types[-1]
        words = ["key", name, TYPE_NAMES[kind]] + ([f"[{len(field.data)}]"] if array else [])
        lines.append(" ".join(words + [show(kind, field.parts[i]) for i in field.data]))
    for tensor in (tensor for reader in readers for tensor in reader.tensors):
        digest = hashlib.sha256(tensor.data.tobytes()).hexdigest()
        shape = [str(int(dim)) for dim in tensor.shape]
        lines.append(" ".join(["tensor", tensor.name, tensor.tensor_type.name, *shape, digest]))
    return lines


def compare(what, program, *paths):
    result = subprocess.run([program, str(paths[0])], capture_output=True, text=True)
    ours, theirs = result.stdout.splitlines(), dump(*paths)
    if result.returncode != 0 or ours != theirs:
        print(f"FAILED: {what}: {result.stderr.strip()}")
        for a, b in zip(ours, theirs):
            if a != b:
                print("  ours  ", a[:200], "\n  theirs", b[:200])
                break
        sys.exit(1)
    print(f"ok: {what}: {len(ours)} lines")


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_everything(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    for bits in (8, 16, 32, 64):
        getattr(writer, f"add_uint{bits}")(f"u{bits}", 2**bits - 1)
        getattr(writer, f"add_int{bits}")(f"i{bits}", -(2 ** (bits - 1)))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "na\u00efve \U0001f600 \0 end")
    writer.add_array("texts", ["", "a", "\u4f60\u597d"] * 1000)
    writer.add_array("ints", list(range(-5, 5)))
    writer.add_array("floats", [0.5, -1e30])
    writer.add_array("flags", [True, False])
    random = np.random.default_rng(1)
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name in NOT_IN_FILES:
            continue
        # Tensors of three dimensions, of two blocks a row, as raw bytes.
        raw = random.integers(0, 256, (3, 5, 2 * size), dtype=np.uint8)
        writer.add_tensor("tensor." + kind.name, raw, raw_dtype=kind)
    finish(writer)


def write_parts(folder):
    writer = gguf.GGUFWriter(folder / "parts.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"tensor.{i}", np.full((3, 32), i, dtype=np.float32))
    finish(writer)
    return sorted(folder.glob("parts-*.gguf"))


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    program, write_tiny = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_everything(folder / "everything.gguf")
        compare("every kind of key and tensor", program, folder / "everything.gguf")
        parts = write_parts(folder)
        assert len(parts) == 3, parts
        compare("split files", program, *parts)
        for architecture in ("llama", "qwen2"):
            path = folder / f"{architecture}.gguf"
            subprocess.run([write_tiny, str(path), architecture, "mixed"], check=True)
            compare(f"tiny {architecture} of ours", program, path)
    for path in sys.argv[3:]:
        compare(path, program, path)


if __name__ == "__main__":
    main()
