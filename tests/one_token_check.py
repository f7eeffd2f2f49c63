#!/usr/bin/env python3
"""examples/one_token.cpp gives the backend's logits, bit for bit: tiny models, those of every
architecture in data/references, and SmolLM2 in F32.

Usage: one_token_check.py ONE_TOKEN WRITE_TINY_MODEL TINY_LOGITS

SmolLM2 needs VALAR_MODELS, a folder with SmolLM2-135M-Instruct.F32.gguf (tests/make_f32.py).
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile

one_token, write_tiny_model, tiny_logits = sys.argv[1:4]
REAL_TOKENS = 40
REFERENCE_TOKENS = 27  # more than their windows and the shorter of their original contexts
DATA = pathlib.Path(__file__).parent / "data"

# Flags before the path, words after it: architecture, type, window, every which layer sees all.
VARIANTS = [(flags, words)
            for flags in ((), ("--untied",), ("--factors",), ("--scales",),
                          ("--untied", "--factors", "--scales"))
            for words in (("llama",), ("qwen2",), ("llama", "F32", "20"),
                          ("qwen2", "F32", "270", "2"))]


def compare(folder, model, ids):
    """How many logits the last of the ids has; they are the same, or this fails."""
    ours, theirs = (os.path.join(folder, name) for name in ("ours", "theirs"))
    text = subprocess.run([one_token, "--model", model, "--tokens", ",".join(map(str, ids)),
                           "--logits", ours], check=True, capture_output=True, text=True,
                          errors="replace").stdout
    subprocess.run([tiny_logits, model, theirs, "fast", "f32", *map(str, ids)], check=True)
    ours, theirs = (pathlib.Path(path).read_bytes() for path in (ours, theirs))
    assert len(theirs) == len(ours) * len(ids) and len(ours) >= 1000, (model, len(ours))
    theirs = theirs[-len(ours):]
    differing = sum(ours[i:i + 4] != theirs[i:i + 4] for i in range(0, len(ours), 4))
    assert not differing, f"{model}: {differing} of {len(ours) // 4} logits differ"
    assert text.count("\n") >= 5, text
    return len(ours) // 4


def check_tiny(folder):
    model = os.path.join(folder, "tiny.gguf")
    ids = [(i * 37 + 11) % 299 for i in range(300)]  # a segment of attention ends at 256
    answers = set()
    for flags, words in VARIANTS:
        subprocess.run([write_tiny_model, *flags, model, *words], check=True)
        lengths = (1, 40, 300) if len(flags) != 1 or "270" in words else (1, 40)
        count = sum(compare(folder, model, ids[:length]) for length in lengths)
        answers.add(pathlib.Path(folder, "ours").read_bytes())
        print(*flags, *words, f"- {count} logits equal")
    assert len(answers) == len(VARIANTS), "some variants are the same model"


def check_real(folder):
    model = pathlib.Path(os.environ.get("VALAR_MODELS", "")) / "SmolLM2-135M-Instruct.F32.gguf"
    if not os.environ.get("VALAR_MODELS") or not model.exists():
        print("skipped: VALAR_MODELS names no folder with SmolLM2-135M-Instruct.F32.gguf")
        return
    text = DATA / "smollm2/moby-dick-ids.json"
    ids = json.loads(text.read_text(encoding="utf-8"))[:REAL_TOKENS]
    print(f"SmolLM2, {len(ids)} tokens - {compare(folder, str(model), ids)} logits equal")


def check_references(folder):
    ids = [(i * 37 + 11) % 260 for i in range(REFERENCE_TOKENS)]
    models = sorted((DATA / "references").glob("*.gguf"))
    assert len(models) > 50, len(models)
    for model in models:
        compare(folder, str(model), ids)
    print(f"{len(models)} references, {len(ids)} tokens each - logits equal")


def check_refused(folder):
    model = os.path.join(folder, "tiny.gguf")
    subprocess.run([write_tiny_model, model, "llama", "Q4_0"], check=True)
    told = subprocess.run([one_token, "--model", model, "--tokens", "1"], capture_output=True, text=True)
    assert told.returncode == 1 and "'token_embd.weight' is missing, or not F32" in told.stderr, told


with tempfile.TemporaryDirectory() as scratch:
    check_tiny(scratch)
    check_references(scratch)
    check_refused(scratch)
    check_real(scratch)
