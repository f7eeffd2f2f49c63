#!/usr/bin/env python3
"""Speed beside llama.cpp (npm's node-llama-cpp, prebuilt), on the same files and threads.

Both programs stay loaded and take turns, a round each, so that a machine whose speed drifts does not
favour one; what counts is the ratio of each pair of rounds, and the share of the limits (memory
bandwidth, integer products) that examples/bench measures in the same round.

    compare.py --bench build/release/bench                 every file: about a quarter of an hour
    compare.py --bench build/release/bench A-q4_0 my.gguf  some shapes, or files of yours
    compare.py --readme                                    tables and plot of the last results

Models with random weights are made in FOLDER by make_gguf.py (numpy, gguf), the peer is installed
there by npm, results.json holds the figures; files measured again replace theirs. --readme needs
matplotlib.
"""
import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import textwrap
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
REAL = "SmolLM2-135M-Instruct.Q4_1"
FILES = [f"{shape}-{kind}" for shape in "ABC" for kind in ("q4_0", "q8_0", "q4_k_m")] + [REAL]
DEEP = ("A-q4_0", "A-q8_0", "B-q4_0")  # decode after 2,048 tokens, too
BATCHED = ("A-q4_0", "B-q4_0")         # 4, 8 and 16 sequences at once, too
STARTED = ("A-q4_0", "A-q8_0", "B-q4_0", REAL)
START_TOKENS = 100


class Turns:
    """A program that runs one round for each line it is sent."""

    def __init__(self, command, greets):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.answer() if greets else {}

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args[0]} ended with status {self.process.wait()}")
        return json.loads(line)

    def round(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def test_name(row):
    if row["columns"] > 1:
        return f"decode x{row['columns']}"
    return f"{row['test']}@{row['depth']}" if row["depth"] else row["test"]


def by_test(report, value="tokens_per_second"):
    return {test_name(row): row[value] for row in report["results"][1:]}  # the first is the start's prompt


def install_peer(folder):
    """node-llama-cpp with the CPU build for this machine alone; returns its folder with peer.mjs."""
    peer = os.path.join(folder, "peer")
    os.makedirs(peer, exist_ok=True)
    if not os.path.exists(os.path.join(peer, "node_modules", "node-llama-cpp")):
        build = {"x86_64": "linux-x64", "aarch64": "linux-arm64"}[platform.machine()]
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--omit=optional",
                        "--prefix", peer, "node-llama-cpp", f"@node-llama-cpp/{build}"], check=True)
    shutil.copy(os.path.join(HERE, "peer.mjs"), peer)
    return os.path.join(peer, "peer.mjs")


def find_model(name, options):
    """The path of a file or of a shape's name, which is made where it is missing; None: not here."""
    if os.path.exists(name):
        return name
    if name == REAL:
        folders = [os.environ.get("VALAR_MODELS", ""), os.path.expanduser("~/.cache/valar")]
        return next(filter(os.path.exists, (os.path.join(f, name + ".gguf") for f in folders)), None)
    path = os.path.join(options.folder, name + ".gguf")
    if not os.path.exists(path):
        shape, kind = name.split("-")
        subprocess.run([sys.executable, os.path.join(HERE, "make_gguf.py"), shape, kind, path], check=True)
        os.sync()  # or writing goes on beside the first rounds
    return path


def measure_turns(name, path, options, peer):
    """Rounds of us, llama.cpp and us with two planes, in turns."""
    depth = 2048 if name in DEEP and not options.quick else 0
    columns = [4, 8, 16] if name in BATCHED or options.quick else []
    common = [options.bench, "--model", path, "--threads", str(options.threads), "--prompt", str(options.prompt),
              "--decode", str(options.decode), "--turns"]
    programs = {
        "valar": Turns([*common, "--depth", f"0,{depth}" if depth else "0", "--columns", str(max(columns, default=1))],
                       False),
        "llama.cpp": Turns(["node", peer, path, json.dumps(dict(
            threads=options.threads, prompt=options.prompt, decode=options.decode, depth=depth, columns=columns))], True),
        "fine": Turns([*common, "--columns", "1", "--precision", "fine", "--stream-mib", "0"], False),
    }
    for program in programs.values():  # all are loaded, and warm
        program.round()
    rounds = []
    for i in range(options.pairs):
        answers = {}
        for who in list(programs)[:3 - i % 2][::1 if i % 4 < 2 else -1]:
            answers[who] = programs[who].round()
            time.sleep(0.2)  # the other's threads go to sleep
        ours = answers["valar"]
        rounds.append({"valar": by_test(ours), "share": by_test(ours, "share"), "limits": ours["limits"],
                       "llama.cpp": answers["llama.cpp"]})
        if "fine" in answers:  # every other round
            rounds[-1]["fine"] = by_test(answers["fine"])
    for program in programs.values():
        program.close()
    return rounds, ours["machine"], programs["llama.cpp"].about


def timed(command):
    start = time.monotonic()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return (time.monotonic() - start) * 1e3, json.loads(output.strip().splitlines()[-1])


def drop_from_cache(path):
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_ms(path):
    start = time.monotonic()
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 22):
            pass
    return (time.monotonic() - start) * 1e3


def measure_start(path, options, peer):
    """Process start to first token, the file in memory and not, and the most memory in use."""
    ours = [options.bench, "--model", path, "--threads", str(options.threads), "--prompt", "0", "--decode", "0",
            "--columns", "1", "--repeat", "1", "--stream-mib", "0", "--json"]
    theirs = ["node", peer, path, json.dumps(dict(threads=options.threads, start=START_TOKENS))]
    samples = []
    for cold in (False, True):
        for _ in range(3):
            sample = {"cold": cold}
            for who, run in (("read", lambda: (read_ms(path), None)), ("valar", lambda: timed(ours)),
                             ("llama.cpp", lambda: timed(theirs))):
                if cold:
                    drop_from_cache(path)
                sample[who], report = run()
                if who == "valar":
                    sample["memory"] = report["results"][0]["peak_memory_mib"]
                    sample["planned"] = report["results"][0]["planned_memory_mib"]
                if who == "llama.cpp":  # without Node's own start, which is not llama.cpp's fault
                    sample["llama.cpp inside"] = report["first_token_ms"]
                    sample["llama.cpp memory"] = report["peak_memory_mib"] - report["memory_before_mib"]
            samples.append(sample)
    return samples


def spread(values):
    values = sorted(values)
    return statistics.median(values), values[0], values[-1]


def fine_ratio(result, test):
    return statistics.median(r["fine"][test] / r["valar"][test] for r in result["rounds"] if "fine" in r)


def print_file(name, result):
    for test in result["rounds"][0]["llama.cpp"]:
        ours, theirs, share = ([r[who][test] for r in result["rounds"]] for who in ("valar", "llama.cpp", "share"))
        ratio, least, most = spread([a / b for a, b in zip(ours, theirs)])
        print(f"{name:28} {test:12} {statistics.median(ours):8.1f} against {statistics.median(theirs):7.1f} tok/s, "
              f"{ratio:5.2f}x ({least:.2f} to {most:.2f}), {statistics.median(share):4.0%} of the limit", flush=True)
    print(f"{name:28} fine against fast: prefill {fine_ratio(result, 'prefill'):.2f}x, "
          f"decode {fine_ratio(result, 'decode'):.2f}x")
    for cold in (False, True):
        starts = [s for s in result.get("starts", ()) if s["cold"] == cold]
        if starts:
            middle = {who: statistics.median(s[who] for s in starts) for who in starts[0]}
            print(f"{name:28} first token, {'cold' if cold else 'warm'}: {middle['valar']:.0f} ms, llama.cpp "
                  f"{middle['llama.cpp inside']:.0f} ({middle['llama.cpp']:.0f} with Node's start), reading "
                  f"{middle['read']:.0f}; memory {middle['memory']:.0f} MiB of {middle['planned']:.0f} planned, "
                  f"llama.cpp {middle['llama.cpp memory']:.0f}")


# ---- README ----------------------------------------------------------------------------------


def middle(result, who, test):
    return statistics.median(r[who][test] for r in result["rounds"])


def cells(result, test):
    ratio, least, most = spread([r["valar"][test] / r["llama.cpp"][test] for r in result["rounds"]])
    return (f"{middle(result, 'valar', test):,.0f} / {middle(result, 'llama.cpp', test):,.0f}",
            f"{ratio:.1f}x ({least:.1f}-{most:.1f})", f"{middle(result, 'share', test):.0%}")


def speed_text(results):
    files = results["files"]
    limits = [r["limits"] for f in files.values() for r in f["rounds"]]
    bandwidth, integers = (spread([x[key] for x in limits]) for key in ("bandwidth_gb_s", "integer_gop_s"))
    any_file = next(iter(files.values()))
    text = textwrap.wrap(
        f"{results['threads']} threads of {results['machine']['cpu']}, kernels `{results['machine']['kernels']}`, "
        f"{results['machine']['compiler'].split(' (')[0]}; limits {bandwidth[0]:.0f} GB/s "
        f"({bandwidth[1]:.0f}-{bandwidth[2]:.0f}) and {integers[0]:,.0f} GOP/s; beside {results['peer']['peer']}. "
        f"Medians of {len(any_file['rounds'])} rounds in turns, tok/s of valar / llama.cpp, the ratio of each pair "
        "(least to most), and our share of the limit. A, B and C have the shapes of Qwen2.5-0.5B, Llama-3.2-1B and "
        "SmolLM2-135M with random weights; SmolLM2-135M-Instruct is the real file.", 100)
    text += ["", "| file | prefill 512 | ratio | share | decode | ratio | share |", "|---|---|---|---|---|---|---|"]
    for name, result in files.items():
        text.append("| " + " | ".join((name.replace("-", " ", 1), *cells(result, "prefill"), *cells(result, "decode"))) + " |")
    text += ["", "| | tok/s of all | ratio | share |", "|---|---|---|---|"]
    for name, result in files.items():
        for test in list(result["rounds"][0]["llama.cpp"])[2:]:
            what = test.replace("decode@", "decode after ").replace("decode x", "sequences at once: ")
            text.append("| " + " | ".join((f"{name.replace('-', ' ', 1)}, {what}", *cells(result, test))) + " |")
    text += ["", "| process start to first token (prompt of 100), ms | valar warm / cold | llama.cpp warm / cold | "
             "memory, MiB: valar / llama.cpp |", "|---|---|---|---|"]
    for name, result in files.items():
        starts = result.get("starts")
        if starts:
            ms = {who: [statistics.median(s[who] for s in starts if s["cold"] == cold) for cold in (False, True)]
                  for who in ("valar", "llama.cpp inside")}
            memory = [statistics.median(s[who] for s in starts) for who in ("memory", "llama.cpp memory")]
            text.append(f"| {name.replace('-', ' ', 1)} | {ms['valar'][0]:,.0f} / {ms['valar'][1]:,.0f} | "
                        f"{ms['llama.cpp inside'][0]:,.0f} / {ms['llama.cpp inside'][1]:,.0f} | "
                        f"{memory[0]:,.0f} / {memory[1]:,.0f} |")
    fine = {test: spread([fine_ratio(f, test) for f in files.values()]) for test in ("prefill", "decode")}
    text += ["", *textwrap.wrap(
        "llama.cpp is counted without Node's own start and memory. With `precision = fine` prefill runs at "
        f"{fine['prefill'][1]:.2f} to {fine['prefill'][2]:.2f} and decode at {fine['decode'][1]:.2f} to "
        f"{fine['decode'][2]:.2f} of these speeds.", 100)]
    return "\n".join(text) + "\n"


def draw(results, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plot
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "valar", "font.size": 9})
    files = results["files"]
    figure, axes = plot.subplots(1, 2, figsize=(9, 0.4 * len(files) + 1.3), sharey=True)
    for axis, test, limit in zip(axes, ("decode", "prefill"), ("memory bandwidth", "integer peak")):
        for at, (name, result) in enumerate(files.items()):
            share = middle(result, "share", test)
            peer = statistics.median(r["share"][test] * r["llama.cpp"][test] / r["valar"][test] for r in result["rounds"])
            for value, who, offset, color in ((share, "valar", -0.2, "#1b6ca8"), (peer, "llama.cpp", 0.2, "#b8b8b8")):
                axis.barh(at + offset, value * 100, 0.38, color=color)
                axis.text(value * 100 + 1, at + offset, f"{middle(result, who, test):,.0f}", va="center", fontsize=8)
        axis.set_xlim(0, 108)
        axis.set_title(f"{test}: % of the {limit} (bar), tok/s (number)", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(files)), [name.replace("-", " ", 1).replace("-Instruct.", " ") for name in files])
    axes[0].invert_yaxis()
    figure.legend(handles=[plot.Rectangle((0, 0), 1, 1, color=c) for c in ("#1b6ca8", "#b8b8b8")],
                  labels=["valar", "llama.cpp"], loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    figure.savefig(path, metadata={"Date": None})


def write_readme(results):
    path = os.path.join(ROOT, "README.md")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    begin, end = "<!-- compare.py: begin -->\n", "<!-- compare.py: end -->"
    head, tail = text.split(begin)[0], text.split(end)[1]
    with open(path, "w", encoding="utf-8") as file:
        file.write(head + begin + speed_text(results) + end + tail)
    draw(results, os.path.join(HERE, "speed.svg"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help=f"paths, or of {', '.join(FILES)}")
    parser.add_argument("--bench", help="the program built from examples/bench.cpp")
    parser.add_argument("--folder", default=os.path.join(ROOT, "build", "compare"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one small file, one pair: does it all still work?")
    parser.add_argument("--readme", action="store_true", help="write README's tables and its plot from results.json")
    options = parser.parse_args()
    if options.quick:
        options.files, options.pairs, options.prompt, options.decode = ["C-q4_0"], 1, 64, 4
    os.makedirs(options.folder, exist_ok=True)
    results_path = os.path.join(options.folder, "quick.json" if options.quick else "results.json")
    results = {"files": {}}
    if os.path.exists(results_path):
        with open(results_path) as file:
            results = json.load(file)

    if options.bench:
        options.bench = os.path.abspath(options.bench)
        peer = install_peer(options.folder)
        for name in options.files or FILES:
            path = find_model(name, options)
            if not path:
                print(f"{name}: not here (examples/fetch_model.py brings it)")
                continue
            rounds, results["machine"], results["peer"] = measure_turns(name, path, options, peer)
            results["threads"] = options.threads
            result = results["files"][os.path.basename(name).removesuffix(".gguf")] = {"rounds": rounds}
            if name in STARTED or options.quick:
                result["starts"] = measure_start(path, options, peer)
            print_file(name, result)
            with open(results_path, "w") as file:
                json.dump(results, file, indent=1)
    elif not options.readme:
        parser.error("--bench is needed to measure")
    if options.readme:
        order = {name: i for i, name in enumerate(FILES)}
        results["files"] = dict(sorted(results["files"].items(), key=lambda f: order.get(f[0], len(order))))
        write_readme(results)


main()
