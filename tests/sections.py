"""Proves the order of src/ from its includes, and that valar.hpp is what the parts make.

A section is a pair of files or a folder. Each of its parts includes only parts of its own section and
of sections above it, and system headers; each .cpp is bound into valar.hpp, and each header is
included by some part. No part makes an array by new. What the tests read of a server goes through
http_peer.hpp, which looks for directories in it. Usage: sections.py SRC
"""
import os
import re
import subprocess
import sys

SRC = sys.argv[1]
sys.path.insert(0, SRC)
sys.dont_write_bytecode = True
import assemble  # noqa: E402

OPEN_TO_ALL = {"config", "prologue"}


def section(part):
    """base/files.cpp and base.cpp are parts of base, unicode_internal.hpp and unicode.cpp of unicode."""
    name = part.split("/")[0]
    return re.sub(r"(_internal|_tables)?\.[a-z]+$", "", name)


def main():
    order = list(assemble.SECTIONS)
    parts = sorted(os.path.relpath(os.path.join(folder, name), SRC)
                   for folder, _, names in os.walk(SRC) for name in names
                   if name.endswith((".hpp", ".cpp")))
    faults, used = [], set(assemble.SYSTEM) | set(assemble.parts_of(".hpp"))
    for part in parts:
        text = assemble.read(part)
        includes = re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.M)
        used.update(includes)
        # The ARM EABI's cookie of 8 bytes before an array leaves over-aligned elements misaligned.
        faults += [f"{part}: {found}: std::vector aligns its elements on every machine, new[] does not"
                   for found in re.findall(r"make_unique<[^;]*?\[\]>|\bnew [\w:<>]+ ?\[", text)]
        mine = section(part)
        if mine not in order and mine not in OPEN_TO_ALL:
            faults.append(f"{part}: there is no section {mine}")
            continue
        for include in includes:
            other = section(include)
            if include not in parts:
                faults.append(f"{part}: there is no part {include}")
            elif other not in OPEN_TO_ALL and (mine in OPEN_TO_ALL or
                                               order.index(other) > order.index(mine)):
                faults.append(f"{part} includes {include}, which stands below it")
    tests = os.path.join(SRC, "..", "tests")
    for name in sorted(os.listdir(tests)):
        if not name.endswith((".cpp", ".hpp")) or name in ("http_peer.hpp", "base.cpp"):
            continue
        with open(os.path.join(tests, name), encoding="utf-8") as file:
            faults += [f"tests/{name}: {found} reads replies past http_peer.hpp" for found in
                       re.findall(r"\bhttp_call\(|\bSocket::connect\(|::recv\(", file.read())]
    listed = set(assemble.parts_of(".cpp"))
    faults += [f"{part} is not bound into valar.hpp" for part in parts
               if part.endswith(".cpp") and part not in listed]
    faults += [f"{part} is included by no part" for part in parts
               if part.endswith(".hpp") and part not in used and section(part) not in OPEN_TO_ALL]
    print("\n".join(faults) or f"{len(parts)} parts of {len(order)} sections, in order: {' '.join(order)}")
    stale = subprocess.run([sys.executable, os.path.join(SRC, "assemble.py"), "--check"]).returncode
    sys.exit(bool(faults) or stale)


main()
