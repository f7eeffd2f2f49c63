"""The host's macros (src/host_macros.txt): headers that define them all, and what compilers say of them.

    host_macros.py --headers FOLDER   writes host_macros.hpp, which defines every name in each spelling
                                      (as functions where HOST_FUNCTIONS is defined), and
                                      host_macros_kept.hpp, which fails where one is lost and ends them
    host_macros.py --update           renews the sections on system headers with the compilers at hand
    host_macros.py --check            fails where a compiler at hand finds more than these sections say,
                                      or where valar.hpp changes a macro of the host
"""
import os
import re
import shutil
import subprocess
import sys
import textwrap

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
SRC = os.path.join(ROOT, "src")
sys.path.insert(0, SRC)
sys.dont_write_bytecode = True
import assemble  # noqa: E402

LIST = os.path.join(SRC, "host_macros.txt")
COMPILERS = {"POSIX": ["g++", "clang++-14", "clang++-14 -stdlib=libc++", "aarch64-linux-gnu-g++"],
             "Windows": ["x86_64-w64-mingw32-g++"]}


def spellings(names):
    return {spelling for name in names for spelling in (name, name.lower(), name.upper())}


def preprocess(compiler, source, *options):
    run = subprocess.run([*compiler.split(), "-std=gnu++20", "-O2", "-pthread", "-I", SRC, "-I", ROOT, "-E",
                          *options, "-x", "c++", "-"], input=source, capture_output=True, text=True)
    return run.stdout if run.returncode == 0 else None


def system_includes():
    """Every system header that valar.hpp includes on the compiler's machine."""
    parts = [os.path.relpath(os.path.join(folder, name), SRC) for folder, _, names in os.walk(SRC)
             for name in names if name.endswith((".hpp", ".cpp"))]
    headers = {header for part in parts if part not in assemble.SYSTEM
               for header in assemble.SYSTEM_INCLUDE.findall(assemble.read(part))}
    return "".join(f"#include {header}\n" for header in sorted(headers)) + \
        "".join(f'#include "{part}"\n' for part in assemble.SYSTEM)


def examine():
    """Of all spellings, what the system headers use as names and what they define as macros."""
    all_spellings, found = spellings(assemble.host_macros()["names"]), {}
    for system, compilers in COMPILERS.items():
        uses, defines = found[system + " uses"], found[system + " defines"] = set(), set()
        for compiler in filter(lambda name: shutil.which(name.split()[0]), compilers):
            text = preprocess(compiler, system_includes(), "-P")
            if text is None:  # a standard library that is not installed
                continue
            macros = set(re.findall(r"^#define (\w+)", preprocess(compiler, system_includes(), "-dM"), re.M))
            uses |= assemble.identifiers(re.sub(r"^\s*#.*", "", text, flags=re.M)) & all_spellings
            defines |= macros & all_spellings
        uses -= defines
    return found


def update():
    with open(LIST, encoding="ascii") as file:
        text = file.read().split("\n[POSIX uses]")[0].rstrip("\n") + "\n"
    for title, names in examine().items():
        text += f"\n[{title}]\n" + textwrap.fill(" ".join(sorted(names)), 99, break_long_words=False,
                                                 break_on_hyphens=False) + "\n"
    with open(LIST, "w", encoding="ascii") as file:
        file.write(text)


def tested():
    """All spellings that a host may define: not what a system header defines itself."""
    of = assemble.host_macros()
    return sorted(spellings(of["names"]) - set(of["POSIX defines"]) - set(of["Windows defines"]))


def write_headers(folder):
    where, header = {}, ""
    with open(LIST, encoding="ascii") as file:
        for line in file.read().split("[POSIX uses]")[0].split("[names", 1)[1].splitlines()[1:]:
            header = line.split(": ")[0] if ": " in line else header
            for spelling in spellings(line.split(": ")[-1].split()):
                where.setdefault(spelling, header)
    names = tested()
    define = "#pragma GCC system_header  // quiet about keywords\n#if defined(HOST_FUNCTIONS)\n"
    define += "".join(f"#define {name}(x) @ {i}  // {where[name]}\n" for i, name in enumerate(names))
    define += "#else\n"
    define += "".join(f"#define {name} @ {i}  // {where[name]}\n" for i, name in enumerate(names)) + "#endif\n"
    kept = "".join(f"#ifndef {name}\n#error lost: {name}\n#endif\n#undef {name}\n" for name in names)
    for name, text in (("host_macros.hpp", define), ("host_macros_kept.hpp", kept)):
        path = os.path.join(folder, name)
        if not os.path.exists(path) or open(path, encoding="ascii").read() != text:
            with open(path, "w", encoding="ascii") as file:
                file.write(text)


def changed(compiler, begin, *options):
    """Names whose macro expands otherwise after valar.hpp than before it."""
    names = tested()
    form = "{}(x)" if "-DHOST_FUNCTIONS" in options else "{}"
    probes = "".join(f"\nprobe {i} {form.format(name)} ." for i, name in enumerate(names))
    defines = "".join(f"#define {form.format(name)} @ {i}\n" for i, name in enumerate(names))
    text = preprocess(compiler, begin + defines + '#include "valar.hpp"\n' + probes, "-P", *options)
    kept = set(re.findall(r"^probe (\d+) @ (\d+) \.$", text, re.M))
    return [name for i, name in enumerate(names) if (str(i), str(i)) not in kept]


def check():
    of, faults = assemble.host_macros(), []
    for title, names in examine().items():
        if more := sorted(names - set(of[title])):
            faults.append(f"{title} in src/host_macros.txt lacks {' '.join(more)}: host_macros.py --update")
    for compiler in (compilers[0] for compilers in COMPILERS.values() if shutil.which(compilers[0])):
        for half in ("", "#define VALAR_IMPLEMENTATION\n"):
            for options in ((), ("-DHOST_FUNCTIONS",)):
                if lost := changed(compiler, half, *options):
                    faults.append(f"{compiler}: valar.hpp changes {' '.join(lost)}")
    print("\n".join(faults) or f"{len(tested())} spellings of {len(of['names'])} names are kept")
    sys.exit(bool(faults))


if sys.argv[1] == "--headers":
    write_headers(sys.argv[2])
else:
    {"--update": update, "--check": check}[sys.argv[1]]()
