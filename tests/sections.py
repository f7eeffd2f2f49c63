"""Proves the order of the file: a section uses only what stands above it.

Deals the two halves of valar.hpp out section by section (declarations, then implementation, before
the next section's declarations) and compiles the result once: what reaches below itself does not
compile. Usage: sections.py VALAR_HPP [COMPILER]
"""
import os
import re
import subprocess
import sys
import tempfile

MARKER = re.compile(r"^// >>([a-z]+)$", re.M)


def split(text):
    """The text before the first marker, and [(name, text)]; halves of one name are joined."""
    marks = list(MARKER.finditer(text))
    parts = {}
    for mark, following in zip(marks, marks[1:] + [None]):
        end = following.start() if following else len(text)
        parts[mark[1]] = parts.get(mark[1], "") + text[mark.start():end]
    return text[:marks[0].start()], parts


def main():
    header = open(sys.argv[1], encoding="ascii").read()
    compiler = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("CXX", "c++")
    half = header.index("#ifdef VALAR_IMPLEMENTATION\n")
    declarations, implementation = header[:half], header[half:]
    declarations = declarations[:declarations.rindex('#pragma pop_macro("max")')]
    opening, declared = split(declarations)
    prologue, implemented = split(implementation)
    if list(declared) != list(implemented):
        sys.exit(f"sections differ: {list(declared)} declared, {list(implemented)} implemented")
    last = list(implemented)[-1]
    implemented[last], closing = re.split(r"(?=^#if defined\(__GNUC__\) && !defined\(__clang__\)\n"
                                          r"#pragma GCC pop_options)", implemented[last], flags=re.M)
    dealt = opening + prologue
    for name in declared:
        dealt += declared[name] + implemented[name]
    dealt += closing + '#pragma pop_macro("max")\n#pragma pop_macro("min")\n#endif\n'
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "dealt.cpp")
        with open(path, "w", encoding="ascii") as file:
            file.write("#define VALAR_IMPLEMENTATION\n" + dealt)
        result = subprocess.run([compiler, "-std=c++20", "-fsyntax-only", path])
    print(f"{len(declared)} sections, in order: {' '.join(declared)}")
    sys.exit(result.returncode)


main()
