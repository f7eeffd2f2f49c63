#!/usr/bin/env python3
"""examples/quantize on the tiny model: packed files compute the same, mistakes are explained.

Usage: quantize_check.py QUANTIZE WRITE_TINY_MODEL TINY_LOGITS [--peer]

--peer compares every type that it makes, byte by byte, with PyPI's `gguf`.
"""
import os
import struct
import subprocess
import sys
import tempfile

import hub_folder

quantize, write_tiny_model, tiny_logits = sys.argv[1:4]


def read(path):
    with open(path, "rb") as file:
        return file.read()


def folders(folder, run, logits):
    """Folders of the hub: the same values in other types and files make the same file."""
    at = lambda *names: os.path.join(folder, *names)

    def make(name, *args, **more):
        hub_folder.write_folder(at(name), *args, **more)
        run("--model", at(name), "--type", "f32", "--out", at(name + ".gguf"))
        return read(at(name + ".gguf"))

    tensors = hub_folder.llama_tensors()
    plain = make("plain", tensors)
    assert make("sharded", hub_folder.with_dtype(tensors, "BF16"), shards=3) == plain
    assert len(logits(at("plain.gguf"))) > 1000
    # rows of each head's halves become neighbours
    rows = [tensors["model.layers.0.self_attn.q_proj.weight"][2][i * 64:i * 64 + 64] for i in (0, 8)]
    assert struct.pack("<128f", *rows[0], *rows[1]) in plain
    small, wide = hub_folder.with_fp8(tensors)
    assert make("fp8", small) == make("wide", wide)
    run("--model", at("fp8"), "--type", "q4_k_m", "--out", at("fp8.q4_k_m.gguf"))
    run("--model", at("fp8"), "--packed", "--out", at("fp8.packed.gguf"))
    assert logits(at("fp8.packed.gguf")) == logits(at("fp8.gguf"))  # BF16 holds F8 with such scales
    assert logits(at("fp8.q4_k_m.gguf")) != logits(at("fp8.gguf"))
    for name, unigram in (("spaced", False), ("unigram", True)):
        assert b"add_space_prefix" in make(name, tensors, tokenizer=hub_folder.spaced_tokenizer(unigram))
    # what makers leave out is what the class has, and a model that sees has a part that speaks
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    embedding = {"language_model.model.embed_tokens.weight": tensors["model.embed_tokens.weight"],
                 "vision_tower.patches.weight": ("F32", [2], [0, 0])}
    gemma = make("gemma", embedding, {"architectures": ["Gemma3ForConditionalGeneration"],
                                      "text_config": text})
    assert b"gemma3.attention.key_length" + struct.pack("<II", 4, 256) in gemma
    mistakes(at, run, tensors)


def mistakes(at, run, tensors):
    """What is wrong with a folder is said with the file, the key or the tensor."""
    config, name = hub_folder.CONFIG, "model.layers.1.mlp.up_proj.weight"
    header = '{"a.weight":{"dtype":"F32","shape":[2,2],"data_offsets":%s}}'
    cases = [
        ({"config": {**config, "architectures": ["MambaForCausalLM"]}}, "'MambaForCausalLM'"),
        ({"config": {**config, "num_key_value_heads": 3}}, "num_key_value_heads"),
        ({"config": {**config, "num_attention_heads": 7, "num_key_value_heads": 7}}, "k_proj"),
        ({"config": {**config, "rope_scaling": {"rope_type": "odd"}}}, "'odd'"),
        ({"tokenizer": {**hub_folder.byte_level_tokenizer(),
                        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                            {"type": "Split", "pattern": {"Regex": "x+"}}, {"type": "ByteLevel"}]}}},
         "--pre"),
        ({"tokenizer": {"model": {"type": "WordPiece"}}}, "WordPiece"),
        ({"tensors": {**tensors, name.replace("up", "sideways"): tensors[name]}}, "sideways_proj"),
        ({"tensors": {**tensors, name: ("I8", [96, 64], bytes(96 * 64))}}, name),
    ]
    for number, (change, words) in enumerate(cases):
        folder = at(f"wrong{number}")
        hub_folder.write_folder(folder, **{"tensors": tensors, **change})
        error = run("--model", folder, "--out", at("wrong.gguf"), status=1)
        assert words in error and error.count("\n") == 1, error
    hub_folder.write_folder(at("raw"), tensors)
    for text, words in ((header % "[0,8]", "as many bytes"), (header % "[0,99]", "outside"),
                        (header % "[8,0]", "outside"), ("{", "line 1"), ("{}", "no embedding"),
                        ('{"a":{"dtype":"F9","shape":[],"data_offsets":[0,0]}}', "unknown dtype"),
                        ('{"a":{"dtype":"F32","shape":[%d,%d],"data_offsets":[0,16]}}'
                         % (1 << 62, 4), "no room")):
        with open(at("raw", "model.safetensors"), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text.encode() + bytes(16))
        error = run("--model", at("raw"), "--out", at("wrong.gguf"), status=1)
        assert words in error and "safetensors" in error, error
    with open(at("raw", "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", 1 << 40))
    assert "header" in run("--model", at("raw"), "--out", at("wrong.gguf"), status=1)
    assert not os.path.exists(at("wrong.gguf"))


K_QUANTS = {"q4_k_m": (0.06, 0.085), "q5_k_m": (0.03, 0.042), "q6_k": (0.014, 0.02)}


def peer_k(folder, run):
    """Of normal values, what of their size is lost on average; a good Q4_K loses 0.07 of it."""
    import gguf
    import numpy as np
    path = os.path.join(folder, "wide.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    source = np.random.default_rng(1).normal(0, 0.02, (64, 1024)).astype(np.float32)
    for layer in range(8):
        for name in ("attn_q", "attn_v", "ffn_down"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", source)
    writer.add_tensor("token_embd.weight", source)
    writer.add_tensor("blk.0.ffn_up.weight", source[:, :992].copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, (least, most) in K_QUANTS.items():
        out = os.path.join(folder, name + ".gguf")
        run("--model", path, "--type", name, "--out", out)
        types = {}
        for tensor in gguf.GGUFReader(out).tensors:
            types[tensor.name] = tensor.tensor_type.name
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            error = np.sqrt(((values - source[:, :values.shape[1]]) ** 2).mean()) / 0.02
            if tensor.name == "blk.0.attn_q.weight":
                assert least < error < most, (name, error)
        more = [types[f"blk.{layer}.attn_v.weight"] == "Q6_K" for layer in range(8)]
        assert more == [name == "q6_k" or layer in (0, 3, 6, 7) for layer in range(8)], more
        assert types["token_embd.weight"] == "Q6_K"
        assert types["blk.0.ffn_up.weight"] == {"q4_k_m": "Q5_0", "q5_k_m": "Q5_1", "q6_k": "Q8_0"}[name]
    print("quantize: Q4_K, Q5_K and Q6_K lose no more than they have to")


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
    folders(folder, run, logits)
    if "--peer" in sys.argv[4:]:
        peer(folder, model, run)
        peer_k(folder, run)
