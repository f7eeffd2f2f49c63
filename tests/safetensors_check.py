#!/usr/bin/env python3
"""examples/quantize on folders of safetensors: random models of every architecture against the
float64 logits of their classes, and against the files of llama.cpp's converter. By hand:

    pip install torch transformers sentencepiece gguf
    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python   (unpack it)
    safetensors_check.py .../vendor/llama.cpp QUANTIZE TINY_LOGITS [NAME ...]

The models are those of make_references.py, saved by `save_pretrained` in several files. Ours, in
F32, has to be within 1e-4 of the largest logit. Of the converter's file every tensor has to be there
with the same values, and keys that differ are printed.
"""
import argparse
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import traceback

import numpy as np

import make_references as references

IDS = [(i * 37 + 11) % references.VOCAB for i in range(references.POSITIONS)]


def run(*words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words[:3]))}: {done.stderr.strip()}")


def contents(path):
    import gguf

    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()
            if not name.startswith("GGUF.")}
    return keys, {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                  for tensor in reader.tensors}


def same(a, b):
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
    return a == b


def compare(ours, theirs):
    keys, tensors = contents(ours)
    their_keys, their_tensors = contents(theirs)
    assert tensors.keys() == their_tensors.keys(), tensors.keys() ^ their_tensors.keys()
    for name, value in their_tensors.items():
        mine = tensors[name].reshape(value.shape)
        # rope_freqs are computed in another precision
        assert np.allclose(mine, value, rtol=1e-5 if "rope" in name else 0, atol=0), name
    skipped = ("general.", "tokenizer.chat_template")
    for name in sorted(keys.keys() | their_keys.keys()):
        mine, other = keys.get(name), their_keys.get(name)
        if not name.startswith(skipped) and not same(mine, other):
            print(f"    {name}: ours {str(mine)[:60]}, theirs {str(other)[:60]}")


def check(name, programs, folder):
    class_name, settings, extra = references.CASES[name]
    model = references.make_model(name, class_name, settings)
    source = folder / "tiny"
    model.save_pretrained(source, max_shard_size="1GB" if name in references.CHANGES else "40KB")
    references.save_tokenizer(source)
    if name in references.CHANGES:
        references.change(source, references.CHANGES[name])
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    run(programs.quantize, "--model", source, "--type", "f32", "--out", ours)
    try:
        references.convert(source, theirs, "ALL_F32", extra)
    except BaseException:
        traceback.print_exc()
    else:
        compare(ours, theirs)
    logits = folder / "logits"
    run(programs.tiny_logits, ours, logits, "fine", "f32", *IDS)
    mine = np.fromfile(logits, np.float32).reshape(references.POSITIONS, -1)
    expected = references.float64_logits(model)
    error = np.abs(mine - expected).max() / np.abs(expected).max()
    print(f"{name}: {error:.1e} of the largest logit", flush=True)
    assert error < 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=pathlib.Path)
    parser.add_argument("quantize", type=pathlib.Path)
    parser.add_argument("tiny_logits", type=pathlib.Path)
    parser.add_argument("names", nargs="*")
    programs = parser.parse_intermixed_args()
    references.load_converter(programs.llama_cpp)
    logging.disable(logging.WARNING)
    references.transformers.utils.logging.disable_progress_bar()
    failed = []
    for name in programs.names or references.CASES:
        child = os.fork()  # what one changes in torch is gone with it
        if child == 0:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    check(name, programs, pathlib.Path(folder))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        if os.waitpid(child, 0)[1] != 0:
            failed.append(name)
    sys.exit(f"failed: {' '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
