"""Speed beside llama.cpp (npm's node-llama-cpp, prebuilt) on the same file and threads.

Runs the two in turns, so that a machine whose speed drifts does not favour one, and prints the ratio
of each pair and their median. Needs node and `npm install node-llama-cpp` in PEER_FOLDER.

Usage: compare.py MODEL BENCH_PROGRAM PEER_FOLDER [--threads 2] [--prompt 512] [--decode 64] [--pairs 7]
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model")
parser.add_argument("bench_program")
parser.add_argument("peer_folder")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--prompt", type=int, default=512)
parser.add_argument("--decode", type=int, default=64)
parser.add_argument("--pairs", type=int, default=7)
arguments = parser.parse_args()

peer = os.path.join(arguments.peer_folder, "peer.mjs")
shutil.copy(os.path.join(os.path.dirname(os.path.abspath(__file__)), "peer.mjs"), peer)
shape = [str(x) for x in (arguments.threads, arguments.prompt, arguments.decode, 3)]


def run(*command):
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def run_bench():
    report = run(os.path.abspath(arguments.bench_program), "--model", arguments.model, "--json", "--columns", "1",
                 "--stream-mib", "0", *sum(zip(("--threads", "--prompt", "--decode", "--repeat"), shape), ()))
    return {r["test"]: r["tokens_per_second"] for r in report["results"]}  # the start's prompt is overwritten


pairs = []
for i in range(arguments.pairs):
    ours, theirs = run_bench(), run("node", peer, os.path.abspath(arguments.model), *shape)
    pairs.append((ours, theirs))
    print(f"pair {i}: " + "; ".join(
        f"{key} {ours[key]:.0f} against {theirs[key]:.0f} tok/s, {ours[key] / theirs[key]:.2f}x"
        for key in ("prefill", "decode")), flush=True)
for key in ("prefill", "decode"):
    ratios = sorted(ours[key] / theirs[key] for ours, theirs in pairs)
    print(f"{key}: median {statistics.median(ratios):.2f}x (from {ratios[0]:.2f} to {ratios[-1]:.2f}); "
          f"ours {statistics.median(o[key] for o, _ in pairs):.0f} tok/s, "
          f"llama.cpp {statistics.median(t[key] for _, t in pairs):.0f} tok/s")
