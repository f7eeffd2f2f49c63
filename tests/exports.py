"""Proves what a shared library of valar shows: public names, and nothing of valar::detail but what public
classes derive from or inline functions of public templates call. Usage: exports.py LIBRARY
"""
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
sys.exit(len(hidden) > 0 or len(ours) < 100)
