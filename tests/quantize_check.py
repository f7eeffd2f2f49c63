#!/usr/bin/env python3
"""examples/quantize on the tiny model: packed files compute the same, mistakes are explained.

Usage: quantize_check.py QUANTIZE WRITE_TINY_MODEL TINY_LOGITS [--peer]

--peer compares every type that it makes, byte by byte, with PyPI's `gguf`.
"""
import os
import subprocess
import sys
import tempfile

quantize, write_tiny_model, tiny_logits = sys.argv[1:4]


def peer(folder, model, run):
    import gguf
    import numpy as np
    tensors = {t.name: t for t in gguf.GGUFReader(model).tensors}
    for name in ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "IQ4_NL"):
        out = os.path.join(folder, name + ".gguf")
        run("--model", model, "--type", name.lower(), "--output-type", name, "--out", out)
        kind = gguf.GGMLQuantizationType[name]
        reader = gguf.GGUFReader(out)
        assert len(reader.tensors) == len(tensors)
        assert int(reader.fields["general.file_type"].parts[-1][0]) >= 1
        for tensor in reader.tensors:
            source = tensors[tensor.name]
            if len(source.shape) < 2:
                assert tensor.tensor_type == gguf.GGMLQuantizationType.F32, tensor
                assert np.array_equal(tensor.data, source.data), tensor
                continue
            assert tensor.tensor_type == kind, tensor
            if name == "IQ4_NL":  # gguf does not make it; it reads it
                error = gguf.quants.dequantize(tensor.data, kind) - source.data
                share = np.sqrt((error ** 2).mean() / (source.data ** 2).mean())
                assert 0.01 < share < 0.08, (tensor.name, share)
                continue
            expected = gguf.quants.quantize(source.data, kind)
            assert np.array_equal(tensor.data.view(np.uint8), expected.view(np.uint8)), tensor
    print("quantize: every type equals gguf's")


with tempfile.TemporaryDirectory() as folder:
    model = os.path.join(folder, "tiny.gguf")
    packed = os.path.join(folder, "packed.gguf")

    def run(*flags, status=0):
        done = subprocess.run([quantize, *flags], capture_output=True, text=True)
        assert done.returncode == status, (flags, done)
        return done.stdout if status == 0 else done.stderr

    def logits(path):
        out = path + ".logits"
        subprocess.run([tiny_logits, path, out, "fast", "f16", *map(str, range(3, 43))], check=True)
        with open(out, "rb") as file:
            return file.read()

    for architecture, kind in (("qwen2", "mixed"), ("llama", "Q4_K")):
        subprocess.run([write_tiny_model, model, architecture, kind], check=True)
        assert "tensors" in run("--model", model, "--packed", "--out", packed)
        assert len(logits(model)) > 1000 and logits(packed) == logits(model), kind

    subprocess.run([write_tiny_model, model], check=True)
    small, both = (os.path.join(folder, name) for name in ("small.gguf", "both.gguf"))
    run("--model", model, "--type", "q4_0", "--out", small)
    assert os.path.getsize(small) < os.path.getsize(model) / 3
    run("--model", model, "--type", "Q4_0", "--packed", "--out", both)
    assert logits(small) == logits(both) != logits(model)

    before = sorted(os.listdir(folder))
    other = os.path.join(folder, "other.gguf")
    for flags, words in (
            (["--model", model, "--packed"], "--out"),
            (["--model", model, "--out", other], "nothing to do"),
            (["--model", model, "--out", model, "--packed"], "model itself"),
            (["--model", model, "--out", other, "--type", "q9_9"], "q9_9"),
            (["--model", packed, "--out", other, "--packed"], "packed already"),
            (["--model", other, "--out", packed, "--packed"], "other.gguf"),
            (["--model", model, "--out", os.path.join(folder, "no", "x.gguf"), "--packed"], "x.gguf")):
        error = run(*flags, status=1)
        assert words in error and error.count("\n") == 1, error
    assert sorted(os.listdir(folder)) == before, os.listdir(folder)
    if "--peer" in sys.argv[4:]:
        peer(folder, model, run)
