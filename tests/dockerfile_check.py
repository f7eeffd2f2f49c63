#!/usr/bin/env python3
"""The steps of examples/deploy/Dockerfile without Docker: dockerfile_check.py TREE MODEL [NAME=VALUE ...]

TREE is a bare Debian tree, as mmdebstrap makes it, in the place of the image that it names; each stage works in a
copy of it, by chroot, as root. NAME=VALUE are build arguments. Then the entry point runs as the image's user: it
wants a key, and with one answers and keeps what it answered.
"""
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

tree, model = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
given = dict(argument.split("=", 1) for argument in sys.argv[3:])
root = pathlib.Path(__file__).resolve().parent.parent
KEY = "a-key-for-the-check"


class Stage:
    """A tree, and what the steps so far said of it."""

    def __init__(self, folder):
        self.folder, self.variables, self.directory, self.user = folder, {}, "/", "root"
        self.entry = []
        subprocess.run(["cp", "-a", tree, folder], check=True)
        shutil.copy("/etc/resolv.conf", folder / "etc/resolv.conf")

    def path(self, name):
        return self.folder / os.path.join(self.directory, name).lstrip("/")

    def command(self, words):
        return ["chroot", f"--userspec={self.user}", self.folder, "/usr/bin/env", "-i",
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                *(f"{name}={value}" for name, value in self.variables.items()), *words]


def copy(stages, stage, words):
    """COPY [--from=STAGE] SOURCE... TARGET"""
    source = root
    if words[0].startswith("--from="):
        source = stages[words.pop(0).split("=")[1]].folder
    *names, target = words
    for name in names:
        found, into = source / name.lstrip("/"), stage.path(target)
        if found.is_dir():
            shutil.copytree(found, into, dirs_exist_ok=True)
        else:
            into = into / found.name if target.endswith("/") else into
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, into)


def build(text, folder):
    """The last stage."""
    stages, stage = {}, None
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, rest = line.split(None, 1)
        words = shlex.split(rest)
        if word == "FROM":
            assert words[0] == "debian:bookworm-slim", line
            name = words[2] if len(words) == 3 else "last"
            stage = stages[name] = Stage(folder / name)
        elif word == "ARG":
            name, value = rest.split("=", 1)
            stage.variables[name] = given.pop(name, value)
        elif word == "RUN":
            print("RUN", rest, flush=True)
            inside = f"cd {stage.directory} && {rest}"
            subprocess.run(stage.command(["DEBIAN_FRONTEND=noninteractive", "sh", "-ec", inside]), check=True,
                           stdout=subprocess.DEVNULL)
        elif word == "WORKDIR":
            stage.directory = rest
            stage.path("").mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            copy(stages, stage, words)
        elif word == "USER":
            stage.user = rest
        elif word == "ENTRYPOINT":
            stage.entry = json.loads(rest)
        else:
            assert word in ("VOLUME", "EXPOSE", "STOPSIGNAL"), line
    assert not given, f"no such arguments: {given}"
    return stage


def run(image):
    (image.folder / "models").mkdir()
    shutil.copy(model, image.folder / "models/model.gguf")
    at = image.entry.index("0.0.0.0:8080")
    image.entry[at] = "0.0.0.0:0"  # the machine's other programs have theirs
    flags = image.command([*image.entry, "--model", "/models/model.gguf", "--alias", "check"])
    refused = subprocess.run(flags, capture_output=True, text=True)
    assert refused.returncode and "pass keys" in refused.stderr, refused
    image.variables["VALAR_API_KEY"] = KEY
    flags = image.command([*image.entry, "--model", "/models/model.gguf", "--alias", "check"])
    for _ in range(2):
        process = subprocess.Popen(flags, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        port = re.search(r":(\d+) serves", process.stdout.readline())[1]

        def ask(path, body=None):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body and json.dumps(body).encode(),
                                             {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"})
            for _ in range(300):
                try:
                    with urllib.request.urlopen(request) as reply:
                        return json.load(reply)
                except urllib.error.HTTPError as error:
                    if error.code != 503:
                        raise
                    time.sleep(0.1)
            raise AssertionError("it is never ready")

        kept = len(ask("/v1/responses")["data"])
        ask("/v1/responses", {"model": "check", "input": "hi", "max_output_tokens": 4})
        with open(f"/proc/{process.pid}/status") as lines:
            assert re.search(r"Uid:\s+(\d+)", lines.read())[1] != "0", "it runs as root"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        process.stdout.close()
    assert kept == 1, f"the second start knows {kept} responses"


with tempfile.TemporaryDirectory() as folder:
    image = build((root / "examples/deploy/Dockerfile").read_text(), pathlib.Path(folder))
    size = (image.path("/usr/local/bin/valar")).stat().st_size
    run(image)
    print(f"the image answers, as its own user; its program has {size / 1e6:.1f} MB")
