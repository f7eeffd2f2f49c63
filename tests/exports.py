"""Proves what a shared library of valar shows: all public names, and nothing of valar::detail but what public
classes derive from or inline functions of public templates call. Usage: exports.py LIBRARY OBJECTS, the folder of
what it was linked from.
"""
import os
import re
import subprocess
import sys

# Of detail: the base of both stores, and what Result calls from the host's own code.
SHOWN = re.compile(r"valar::v1::detail::(IndexedStore\b|(box|copy|free)_error\()")

names = subprocess.run(["nm", "-D", "--defined-only", "-C", sys.argv[1]], check=True,
                       capture_output=True, text=True).stdout.splitlines()
names = [line.split(maxsplit=2)[2] for line in names]
ours = [name for name in names if "valar::" in name]
# A name belongs to detail when what it names does, not when an argument's type does.
subject = re.compile(r"^(?:typeinfo (?:name )?for |vtable for |VTT for |guard variable for )?"
                     r"(?:[^(]* )?(valar::v1::detail::[^(]*\(?)")
hidden = sorted({name for name in ours if (found := subject.match(name)) and not SHOWN.match(found[1])})
print("\n".join(hidden))
print(f"{len(names)} symbols, {len(ours)} of valar, {len(hidden)} that should be hidden")

# The other way round: what programs can name, from the declaration part, and the library keeps to itself
# was left without VALAR_API.
header = open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "valar.hpp"), encoding="ascii").read()
public = header[:header.index("#define VALAR_IMPLEMENTED")]
declared = set(re.findall(r"^(?:class|struct) (?:VALAR_API )?(\w+)", public, re.M))
declared |= set(re.findall(r"^(?!class|struct|enum|constexpr|inline|template)\w[^(;={]*\b(\w+)\(", public, re.M))
objects = [os.path.join(folder, file) for folder, _, files in os.walk(sys.argv[2]) for file in files
           if file.endswith(".o")]
strong = subprocess.run(["nm", "--defined-only", "--extern-only", "-C", *objects], check=True,
                        capture_output=True, text=True).stdout.splitlines()  # W: an inline function
kept = re.compile(r"^\w+ [TDRB] ((?:[^(]* )?valar::v1::(\w+)(?:::~?\w+)*(?:\(.*|$))")
unmarked = sorted({found[1] for line in strong if (found := kept.match(line))
                   and found[2] in declared and found[1] not in names})
print("\n".join(unmarked))
print(f"{len(declared)} public names, {len(unmarked)} functions of theirs without VALAR_API")
sys.exit(len(unmarked) > 0 or len(declared) < 60 or len(hidden) > 0 or len(ours) < 100)
