#!/usr/bin/env python3
"""examples/bench on the tiny model: what it prints has the promised shape. No timing is judged.

Usage: check.py BENCH WRITE_TINY_MODEL
"""
import csv
import json
import os
import subprocess
import sys
import tempfile

bench, write_tiny_model = sys.argv[1:3]
with tempfile.TemporaryDirectory() as folder:
    model = os.path.join(folder, "tiny.gguf")
    subprocess.run([write_tiny_model, model, "llama", "Q8_0"], check=True)

    def run(*flags, status=0, stdin=""):
        words = [bench, *flags]
        for name, value in (("--model", model), ("--threads", 2), ("--prompt", 40), ("--decode", 3), ("--columns", 5),
                            ("--repeat", 2), ("--stream-mib", 4)):
            words += [] if name in flags else [name, str(value)]
        done = subprocess.run(words, input=stdin, capture_output=True, text=True)
        assert done.returncode == status, (flags, done)
        return done.stdout if status == 0 else done.stderr

    report = json.loads(run("--depth", "0,20", "--json"))
    assert list(report) == ["machine", "limits", "results"], report
    assert report["machine"]["cores"] >= 1 and report["machine"]["kernels"], report
    limits = report["limits"]
    for name in ("bandwidth_gb_s", "integer_gop_s"):
        assert limits[name] > 0 and limits[name + "_1_thread"] > 0, limits
    tests = [(r["test"], r["tokens"], r["depth"], r["columns"]) for r in report["results"]]
    assert tests == [("prefill", 100, 0, 1), ("prefill", 40, 0, 1), ("decode", 3, 0, 1), ("decode", 3, 20, 1),
                     ("decode", 3, 0, 2), ("decode", 3, 0, 4), ("decode", 3, 0, 5)], tests
    for r in report["results"]:
        assert 0 < r["min"] <= r["tokens_per_second"] <= r["max"], r
        assert r["share"] > 0 and r["limited_by"] in ("bandwidth", "integer peak"), r
        assert r["rounds"] == (1 if r["tokens"] == 100 else 2), r
        assert 0 < r["load_ms"] < r["first_token_ms"], r
        assert r["planned_memory_mib"] > 0 and r["peak_memory_mib"] > 0, r
    one, deep, two = (report["results"][i] for i in (2, 3, 4))
    # Two layers of 2 heads of 64, keys and values, two bytes each, 20 positions further on.
    assert deep["bytes_per_token"] - one["bytes_per_token"] == 20 * 2 * 2 * 2 * 64 * 2, (one, deep)
    assert two["bytes_per_token"] < one["bytes_per_token"] and two["operations_per_token"] == one["operations_per_token"]
    fine = json.loads(run("--precision", "fine", "--kv", "f32", "--json"))["results"][2]
    assert fine["precision"] == "fine" and fine["operations_per_token"] > one["operations_per_token"], fine

    small = json.loads(run("--depth", "0,20", "--kv", "q8_0", "--json"))["results"]
    assert small[3]["kv"] == "q8_0", small
    assert small[3]["bytes_per_token"] - small[2]["bytes_per_token"] == 20 * 2 * 2 * 2 * (64 + 4), small

    turns = [json.loads(line) for line in run("--turns", stdin="\n\n").splitlines()]
    assert len(turns) == 2 and all(r["rounds"] == 1 for turn in turns for r in turn["results"]), turns

    lines = list(csv.DictReader(run("--depth", "0,20", "--csv").splitlines()))
    assert [list(line) for line in lines] == [list(r) for r in report["results"]], lines
    assert "prefill" in run() and "loaded after" in run("--prompt", "0", "--decode", "0", "--stream-mib", "0")
    assert "--columns" in run("--help")
    for flags, word, status in ((["--columns", "0"], "--columns", 2), (["--depth", "1,x"], "1,x", 2),
                                (["--model", os.path.join(folder, "none.gguf")], "none.gguf", 1)):
        error = run(*flags, status=status)
        assert word in error and error.count("\n") == 1, error
