"""What is easy to lose: the compile time of valar.hpp, the lines of its parts, long functions.

Times are user and system seconds of a processor. Machines are slow and noisy, so all is compiled in
pairs with the header of version 0.1.0 (commit de85366), both at the same time. Fails where an including
file takes longer than then (the best of five; a third is noise), where a part is over 1,500 lines, or,
asked for pairs of the implementation (minutes each), where a byte of it costs more than one of that
version did (their median; a tenth is noise).
Usage: budget.py [PAIRS], 0 unless given.
"""
import os
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
FIRST = "de85366"
PAIRS = int(sys.argv[1]) if len(sys.argv) > 1 else 0
UNIT = '#define VALAR_IMPLEMENTATION\n#include "valar.hpp"\n'


def compile_seconds(source, *includes):
    """The seconds that a unit takes at -O2 with valar.hpp from each of these folders, all at once."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "unit.cpp")
        with open(path, "w", encoding="ascii") as file:
            file.write(source)
        # The driver waits for its compiler: what wait4 says of it holds for both.
        running = [subprocess.Popen([os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-I", include,
                                     "-c", path, "-o", os.path.join(folder, f"unit{i}.o")])
                   for i, include in enumerate(includes)]
        seconds = []
        for process in running:
            _, status, usage = os.wait4(process.pid, 0)
            if status != 0:
                sys.exit("the unit does not compile")
            seconds.append(usage.ru_utime + usage.ru_stime)
        return seconds


def count_lines(path):
    with open(path, encoding="ascii") as file:
        return sum(1 for _ in file)


def main():
    parts = [os.path.join(folder, name) for folder, _, names in os.walk(os.path.join(ROOT, "src"))
             for name in names if name.endswith((".hpp", ".cpp"))]
    longest = max(parts, key=count_lines)
    print(f"{len(parts)} parts, the longest {os.path.relpath(longest, ROOT)} with "
          f"{count_lines(longest)} lines (1,500)")
    failed = count_lines(longest) > 1500
    old = subprocess.run(["git", "-C", ROOT, "show", f"{FIRST}:valar.hpp"], capture_output=True)
    if old.returncode != 0:
        print(f"skipped: the pairs of compilations, for {FIRST} is not in this clone")
        sys.exit(failed)
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "valar.hpp"), "wb") as file:
            file.write(old.stdout)
        pairs = [compile_seconds('#include "valar.hpp"\n', ROOT, folder) for _ in range(5)]
        include, before = (min(seconds) for seconds in zip(*pairs))
        print(f"an including file: {include:.2f} s, {include / before:.2f} times that of {FIRST} (1)")
        failed |= include / before > 1.33
        ratios = []
        for _ in range(PAIRS):
            now, then = compile_seconds(UNIT, ROOT, folder)
            ratios.append(now / then)
            print(f"implementation: {now:.1f} s, that of {FIRST} {then:.1f} s: {ratios[-1]:.2f}",
                  flush=True)
    if not ratios:
        sys.exit(failed)
    with open(os.path.join(ROOT, "valar.hpp"), "rb") as file:
        longer = len(file.read()) / len(old.stdout)
    ratio = statistics.median(ratios)
    print(f"{ratio:.2f} times as long, with {longer:.2f} times the bytes: {ratio / longer:.2f} (1)")
    sys.exit(failed or ratio / longer > 1.1)


main()
