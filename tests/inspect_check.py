#!/usr/bin/env python3
"""examples/inspect on tiny models: what it says is so, and no file makes it crash.

Usage: inspect_check.py INSPECT WRITE_TINY_MODEL
"""
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

inspect, write_tiny_model = sys.argv[1:3]


def run(path, *flags, status=0):
    done = subprocess.run([inspect, path, *flags], capture_output=True)
    assert done.returncode == status, (flags, done)
    return (done.stdout if status == 0 else done.stderr).decode()


def report_of(path, *flags):
    return json.loads(run(path, "--json", *flags))


def check_report(path):
    report = report_of(path)
    assert report["runs"] and report["notes"] == [] and report["architecture"] == "llama", report
    layers, spec = report["layers"], report["spec"]
    assert [(row["layers"], row["window"]) for row in layers] == [("0", 8), ("1", 0)], layers
    assert sum(row["count"] for row in layers) == spec["layers"]
    types, tensors = report["types"], report["tensors"]
    assert sum(row["tensors"] for row in types) == sum(row["count"] for row in tensors) == report["tensor_count"]
    assert sum(row["bytes"] for row in types) == report["tensor_bytes"]
    assert sum(row["bytes_each"] * row["count"] for row in tensors) == report["tensor_bytes"]
    assert {"blk.*.attn_q.weight", "token_embd.weight"} <= {row["name"] for row in report["tensors"]}
    memory = report["memory"]
    assert memory[-1]["context"] == spec["context"] == report["metadata"]["llama.context_length"]
    for row in memory:
        assert row["total"] == row["weights"] + row["keys_and_values"] + row["scratch"] > 0
    half = report_of(path, "--ctx", "64", "--kv-type", "f16")["memory"]
    whole = report_of(path, "--ctx", "64", "--kv-type", "f32")["memory"]
    assert len(half) == 1 and whole[0]["keys_and_values"] == 2 * half[0]["keys_and_values"] > 0
    assert "--ctx" in run(path, "--ctx", "513", status=1)
    tokenizer = report["tokenizer"]
    assert sum(tokenizer["kinds"].values()) == tokenizer["size"] == spec["vocabulary"]
    assert any(token["ends_answer"] for token in tokenizer["special"])
    assert run(path, "--template") == report["chat_template"]["text"]
    table = run(path)
    for word in ("llama", "0-1", "blk.*.attn_q.weight", "special tokens", tokenizer["pre"]):
        assert word in table, word


def check_text(path, folder):
    special = next(token["text"] for token in report_of(path)["tokenizer"]["special"] if "eos" in token["role"])
    text = f"one {special} two"
    tokens = json.loads(run(path, "--tokenize", text, "--json"))
    assert "".join(token["piece"] for token in tokens) == text, tokens
    assert all(token["kind"] == "normal" for token in tokens), tokens
    assert "normal" in run(path, "--tokenize", text)
    request = os.path.join(folder, "request.json")
    with open(request, "w", encoding="utf-8") as file:
        json.dump({"instructions": "Be brief.", "input": text}, file)
    prompt = json.loads(run(path, "--render", request, "--json"))
    by_request = [piece["text"] for piece in prompt["pieces"] if piece["from"] == "request"]
    assert by_request == ["Be brief.", text] and prompt["tokens"] > 5, prompt
    assert special in "".join(p["text"] for p in prompt["pieces"] if p["from"] == "template"), prompt
    assert f'request  {json.dumps(text)}' in run(path, "--render", request)
    plain = os.path.join(folder, "plain.jinja")
    with open(plain, "w") as file:
        file.write("{{ messages[1].content }}!")
    prompt = json.loads(run(path, "--render", request, "--json", "--chat-template", plain))
    assert [piece["text"] for piece in prompt["pieces"]] == [text, "!"], prompt
    for bad, words in (("{", "JSON"), ('{"input": 3}', "input"), ("{}", "input")):
        with open(request, "w") as file:
            file.write(bad)
        assert words in run(path, "--render", request, status=1), bad


def check_unknown(data, path):
    """A file that does not run is shown all the same."""
    for old, new, words in ((b"llama", b"lxamq", "architecture 'lxamq'"),
                            (b"blk.1.ffn_down", b"blk.1.ffn_dowm", "blk.1.ffn_dow")):
        with open(path, "wb") as file:
            file.write(data.replace(old, new))
        report = report_of(path)
        assert not report["runs"] and words in report["notes"][-1], report["notes"]
        assert report["tensor_count"] == 20 and report["metadata"] and report["tokenizer"]["size"] > 20
        assert "does not run here" in run(path)


def check_bare(path):
    """No words, no model: layers here and there of equal tensors."""
    def text(string):
        return struct.pack("<Q", len(string.encode())) + string.encode()

    layers = (0, 1, 2, 3, 4, 5, 6, 10, 11)
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(layers) + 1, 2)
    header += text("general.architecture") + struct.pack("<I", 8) + text("strange\n\u00e9")
    header += text("strange.many") + struct.pack("<IIQ", 9, 6, 3) + struct.pack("<3f", 1, 2.5, float("nan"))
    for i, layer in enumerate((*layers, "x")):
        wide = layer in (2, 5, 11)
        header += text(f"blk.{layer}.norm") + struct.pack("<IQIQ", 1, 16 if wide else 8, 0, 64 * i)
    with open(path, "wb") as file:
        file.write(header + bytes(-len(header) % 32 + 64 * (len(layers) + 1)))
    report = report_of(path)
    rows = [(row["name"], row["layers"], row["count"], row["shape"]) for row in report["tensors"]]
    assert rows == [("blk.x.norm", "", 1, "8"), ("blk.*.norm", "0-1, 3-4, 6, 10", 6, "8"),
                    ("blk.*.norm", "2, 5, 11", 3, "16")], rows
    assert report["architecture"] == "strange\n\u00e9" and report["metadata"]["strange.many"][1] == 2.5
    assert not report["runs"] and report["spec"] is report["tokenizer"] is None
    assert "strange\\n" in run(path)
    for flag in ("--tokenize", "--render"):
        assert "tokenizer.ggml.model" in run(path, flag, path, status=1)


def check_damage(data, header, path):
    """Cut anywhere: an error. Any byte another one: an error or a report."""
    chance = random.Random(16)
    for size in [0, 1, 3, *chance.sample(range(4, header), 100), *chance.sample(range(header, len(data)), 20)]:
        with open(path, "wb") as file:
            file.write(data[:size])
        assert path in run(path, "--json", status=1), size
    for _ in range(250):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 4))):
            changed[chance.randrange(header)] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        with open(path, "wb") as file:
            file.write(changed)
        done = subprocess.run([inspect, path, "--json"], capture_output=True)
        assert done.returncode in (0, 1), (done.returncode, done.stderr)
        json.loads(done.stdout) if done.returncode == 0 else done.stderr.decode().index(path)


with tempfile.TemporaryDirectory() as folder:
    model, other = (os.path.join(folder, name) for name in ("tiny.gguf", "other.gguf"))
    subprocess.run([write_tiny_model, model, "llama", "mixed", "8", "2"], check=True)
    with open(model, "rb") as file:
        data = file.read()
    check_report(model)
    check_text(model, folder)
    check_unknown(data, other)
    check_bare(other)
    check_damage(data, len(data) - report_of(model)["tensor_bytes"] - 4096, other)
    none = os.path.join(folder, "none.gguf")
    assert none in run(none, status=1)
print("inspect: all as it should be")
