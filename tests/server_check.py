#!/usr/bin/env python3
"""examples/server as its users start it: with settings that are empty or wrong, and with standard
streams closed; and that it reaches every option of the library.

Usage: server_check.py SERVER WRITE_TINY_MODEL SOURCE_DIR
"""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

server, write_tiny_model, source = sys.argv[1:4]
KEY = "sk-valar-check-0123456789"


def read(*path):
    with open(os.path.join(source, *path), encoding="utf-8") as file:
        return file.read()


# ---- Options -------------------------------------------------------------------------------------

# Options that no flag sets, and why.
NOT_A_FLAG = {
    "UpstreamOptions": {
        "max_queued": "the server's, with the same flag",
        "retry_ms": "a second is right",
        "log": "--quiet and --log-json",
    },
    "EngineOptions": {
        "model_bytes": "for hosts: memory of theirs",
        "model_reader": "for hosts: a callback",
        "parallel_for": "for hosts: a callback",
        "allocator": "for hosts: a callback",
        "log": "--quiet and --log-json",
        "max_queued": "the server's, with the same flag",
        "chat_template": "--chat-template names its file, or a known one",
    },
    "ServerOptions": {
        "keys": "--keys names their file, --api-key one of them",
        "require_keys": "follows from --keys and --api-key",
        "log": "--quiet and --log-json",
        "store": "--store names its directory",
        "memory_store": "its own options",
        "orphans_ms": "--orphans, which has a unit",
    },
    "MemoryStoreOptions": {
        "max_bytes": "--store-bytes, for both stores",
        "retention_s": "--retention, for both stores",
    },
    "FileStoreOptions": {
        "max_bytes": "--store-bytes, for both stores",
        "own_thread": "for hosts: the program needs the thread",
        "log": "--quiet and --log-json",
    },
}
VARIABLES = {"EngineOptions": r"(?:model|options)", "ServerOptions": "server",
             "MemoryStoreOptions": "memory_store", "FileStoreOptions": "journal",
             "UpstreamOptions": "upstream"}


def check_options():
    headers = read("src", "engine", "engine.hpp") + read("src", "server", "server.hpp") \
        + read("src", "store", "store.hpp") + read("src", "upstream", "upstream.hpp")
    program = read("examples", "server.cpp") + read("examples", "serving.hpp") + read("examples", "gateway.cpp")
    common = read("examples", "common.hpp")
    common = common[common.index("add_model_flags"):common.index("add_model_flags") + 3000]
    for struct, excepted in NOT_A_FLAG.items():
        body = re.search(r"struct %s \{\n(.*?)\n\};" % struct, headers, re.S).group(1)
        fields = re.findall(r"^    (?!//)[\w:<>\s*]+?[\s>*](\w+)(?: = [^;]*)?;", body, re.M)
        assert len(fields) >= 2, (struct, fields)
        text = program + (common if struct == "EngineOptions" else "")
        for field in fields:
            variable = r"&(?:settings\.)?%s\.%s\b" % (VARIABLES[struct], field)
            set_by = re.search(r'flags\s*\.add\w*(?:<[^>]*>)?\(\s*"[\w-]+",[^;]*?' + variable, text)
            assert bool(set_by) != (field in excepted), \
                f"{struct}::{field}: no flag sets it, or it stands among the exceptions, too"
        assert set(excepted) <= set(fields), (struct, set(excepted) - set(fields))


def check_readme():
    """README's table holds what --help prints, in its order, but for what is so on one machine."""
    told = subprocess.run([server, "--help"], capture_output=True, text=True, check=True).stdout
    told = re.sub(r"; here: [^)]*", "", told)
    flags = re.findall(r"^  --([\w-]+) (\S*) +(\S.*)$", told, re.M)
    assert len(flags) > 40, told
    rows = [(f"--{name} {value}".strip().replace("|", "\\|"), text) for name, value, text in flags]
    wanted = "\n".join(f"| `{flag}` | {text} |" for flag, text in rows)
    assert wanted in read("README.md"), "README's table of flags is not:\n" + wanted


def check_defaults(model):
    """--help says what a default is here, of the model and limits that are named beside it."""
    def here(flag, *arguments):
        told = subprocess.run([server, "--help", "--model", model, *arguments], capture_output=True,
                              text=True, check=True).stdout
        return re.search(rf"^  --{flag} .*; here: ([^)]*)\)$", told, re.M)[1]

    refused = subprocess.run([server, "--model", model, "--ctx", "1000000"], capture_output=True,
                             text=True)
    context = re.search(r"error --ctx: 1000000 is not in 1\.\.(\d+)\n", refused.stderr)[1]
    assert here("ctx") == context and here("ctx", "--ctx", "64") == "64", (here("ctx"), context)
    assert re.fullmatch(r"\d+M", here("memory")), here("memory")
    assert here("parallel") == "16"
    threads = int(here("threads"))
    assert 1 <= threads <= len(os.sched_getaffinity(0)), threads
    one_core = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), server, "--help"]
    if shutil.which("taskset"):
        told = subprocess.run(one_core, capture_output=True, text=True, check=True).stdout
        assert "(default: physical cores; here: 1)" in told, told


# ---- Settings ------------------------------------------------------------------------------------

# What is said: the flag, what was given, what it may be.
SAID = [
    (["--sync-timeout", "4294968"], "--sync-timeout: '4294968' is not SECONDS: 0..4294967"),
    (["--port", "65536"], "--port: '65536' is not N: 0..65535"),
    (["--port", "8o8o"], "--port: '8o8o' is not N: 0..65535"),
    (["--threads", "0"], "--threads: '0' is not N: 1..1024"),
    (["--threads", "99999999999999999999"], "is not N: 1..1024"),
    (["--keep-loaded", "2000h"], "--keep-loaded: '2000h' is not TIME: 0..4294967"),
    (["--retention", "0"], "--retention: '0' is not HOURS: 1..878400"),
    (["--temperature", "2.5"], "--temperature: '2.5' is not T: 0..2"),
    (["--memory", "0K"], "--memory: '0K' is not BYTES"),
    (["--recover=perhaps"], "--recover: 'perhaps' is not true or false"),
    (["--prefix-cache", "maybe"], "--prefix-cache: 'maybe' is not on|off"),
    (["--parallel", "5000"], "--parallel: 5000 is not in 1..1024"),
    (["--max-body-bytes", "0"], "--max-body-bytes: must not be 0"),
    (["--alias", ""], "--alias needs ID, which is empty here"),
    (["--host", "0.0.0.0"], "pass keys, or --allow-open to let anybody in"),
    (["--segment-bytes", "1M"], "--segment-bytes: needs --store DIR"),
]
LIBRARYS_NAMES = r"sync_timeout|max_running|context_tokens|retention_s|keep_loaded_ms|allow_open"


def check_words(model, folder):
    for arguments, words in SAID:
        port = [] if "--port" in arguments else ["--port", "0"]
        done = subprocess.run([server, *port, "--model", model, *arguments], timeout=60,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode in (1, 2) and words in done.stderr, (arguments, done)
        assert not re.search(LIBRARYS_NAMES, done.stderr), done.stderr
    # A store that is held, and one that is not there to be made.
    store = os.path.join(folder, "words")
    with Serving([], "--model", model, "--store", store, "--recover=false", "--log-json=false"):
        for path, words in ((store, "is in use by another process"),
                            (os.path.join(folder, "a", "b"), "cannot be made")):
            done = subprocess.run([server, "--port", "0", "--model", model, "--store", path],
                                  timeout=60, capture_output=True, text=True)
            assert done.returncode == 1 and f"--store: '{path}' {words}" in done.stderr, done


def check_switches(model, folder):
    """A switch that is set to false is off: no recovery, no JSON."""
    store = os.path.join(folder, "switches")
    os.mkdir(store)
    with open(os.path.join(store, "manifest"), "w", encoding="ascii") as out:
        out.write("damaged")
    for switch, recovers in (("--recover=false", False), ("--recover=true", True)):
        process = subprocess.Popen([server, "--port", "0", "--model", model, "--store", store, switch],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        ready = process.stdout.readline()
        process.terminate()
        said = process.communicate(timeout=60)[1]
        assert bool(ready) == recovers, (switch, ready, said)
        assert recovers or "--recover keeps what is whole" in said, said
    for switch, is_json in (("--log-json=false", False), ("--log-json", True)):
        process = subprocess.Popen([server, "--port", "0", "--model", model, switch],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        port = int(re.search(r"http://[^ ]*:(\d+) ", process.stdout.readline())[1])
        call(port, "/v1/models")
        process.terminate()
        said = process.communicate(timeout=60)[1]
        line = next(one for one in said.splitlines() if "/v1/models" in one)
        assert line.startswith("{") == is_json, said


def check_refusals(model, folder):
    def file(name, text):
        path = os.path.join(folder, name)
        with open(path, "wb") as out:
            out.write(text)
        os.chmod(path, 0o600)
        return path

    hash_line = b"one default " + b"0" * 64
    secret = file("unreadable", hash_line)
    os.chmod(secret, 0)
    fifo = os.path.join(folder, "fifo")
    os.mkfifo(fifo)
    no_keys = [file("none", b""), file("comments", b"# one\n#two\n"), file("blank", b"\n \t\n\n"),
               file("mark", b"\xef\xbb\xbf"), file("mark_comment", b"\xef\xbb\xbf# a\r\n\r\n"),
               file("windows", b"\r\n#\r\n\r\n"), file("line", b"one default\n"),
               folder, fifo, "/dev/null", "/dev/zero", os.path.join(folder, "absent")]
    if os.getuid() != 0:
        no_keys.append(secret)
    empty = ["", " ", "\t", "\n"]
    help_text = subprocess.run([server, "--help"], capture_output=True, text=True).stdout
    with_value = re.findall(r"^  --([\w-]+) \S", help_text, re.M)
    assert {"keys", "api-key", "model", "store", "cors-origin"} <= set(with_value)
    cases = [("keys", ["--keys", path]) for path in no_keys]
    cases += [("keys", ["--api-key", KEY, "--keys", no_keys[0]])]
    for name in with_value:  # every one, strings and numbers alike
        cases += [(name, [f"--{name}", text]) for text in empty[:2]]
        cases += [(name, [f"--{name}={text}"]) for text in empty]
        cases += [(name, [f"--{name}"]), (name, [f"--{name}", "--quiet"])]
    cases += [
        ("api-key", ["--api-key", "short"]), ("api-key", ["--api-key", "has a blank inside it"]),
        ("api-key", ["--api-key", KEY, "--api-key", KEY]), ("port", ["--port", "1", "--port", "2"]),
        ("port", ["--port", "65536"]), ("port", ["--port", "-1"]), ("port", ["--port", "8o8o"]),
        ("port", ["--port", " 80"]), ("threads", ["--threads", "99999999999999999999"]),
        ("threads", ["--threads", "2000"]), ("ctx", ["--ctx", "1000000"]),
        ("parallel", ["--parallel", "0"]), ("step-tokens", ["--step-tokens", "0"]),
        ("page-tokens", ["--page-tokens", "17"]), ("windows", ["--windows", "asap,fast"]),
        ("windows", ["--windows", "asap,"]), ("windows", ["--windows", "asap,asap"]),
        ("sync-timeout", ["--sync-timeout", "4294968"]), ("sync-timeout", ["--sync-timeout", "-1"]),
        ("max-connections", ["--max-connections", "0"]),
        ("max-body-bytes", ["--max-body-bytes", "0"]),
        ("max-queued", ["--max-queued", "-1"]), ("retention", ["--retention", "-1"]),
        ("retention", ["--retention", "0"]), ("store-bytes", ["--store-bytes", "0"]),
        ("retention", ["--retention", "9223372036854775807"]),
        ("memory", ["--memory", "1K"]), ("temperature", ["--temperature", "nan"]),
        ("host", ["--host", "example.org"]), ("host", ["--host", "0.0.0.0"]),
        ("allow-host", ["--allow-host", "http://a/"]), ("cors-origin", ["--cors-origin", "*"]),
        ("cors-origin", ["--cors-origin", "https://"]), ("dialect", ["--dialect", "Valar"]),
        ("chat-template", ["--chat-template", no_keys[0]]),
        ("chat-template", ["--chat-template", fifo]),
        ("chat-template", ["--chat-template", folder]),
        ("chat-template", ["--chat-template", os.path.join(folder, "absent")]),
        ("chat-template", ["--chat-template", "no-such-name"]),
        ("tool-format", ["--tool-format", "no-such-name"]),
        ("quiet", ["--quiet=no"]), ("quiet", ["--quiet", "--quiet"]),
        ("recover", ["--recover"]), ("store", ["--store", no_keys[0]]),
        ("alias", ["--model", model, "--alias", "one", "--model", model, "--alias", "one"]),
        ("model-id", ["--model-id", "one", "--model", model, "--model", model]),
        ("memory", ["--memory", "1K", "--model", model, "--model", model]),
        ("kyes", ["--kyes", "x"]), ("model", ["--model", fifo]), ("model", ["--model", folder]),
    ]
    for flag, arguments in cases:
        command = [server, "--port", "0", "--model", model] if flag not in ("port", "model") else \
            [server, "--port", "0"] if flag == "model" else [server, "--model", model]
        try:
            done = subprocess.run(command + arguments, stdin=subprocess.DEVNULL, timeout=60,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except subprocess.TimeoutExpired:
            sys.exit(f"it serves, or waits, with {arguments}")
        text = done.stderr.decode()
        if flag == "model" and arguments[0] == "--model":
            assert done.returncode in (1, 2) and ("--model" in text or arguments[1] in text), text
        else:
            assert done.returncode in (1, 2) and f"--{flag}" in text, (arguments, done)
    return len(cases)


# ---- Standard streams ----------------------------------------------------------------------------

def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def call(port, path, body=None):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", f"Bearer {KEY}")
    with urllib.request.urlopen(request, timeout=60) as reply:
        text = reply.read()
    assert tempfile.gettempdir().encode() not in text, text  # where model and store lie
    return json.loads(text)


class Serving:
    """The program with some of its streams closed, in a `with`."""

    def __init__(self, closed, *arguments, under=()):
        self.closed, self.arguments, self.under = closed, arguments, under

    def __enter__(self):
        for _ in range(5):
            self.port = free_port()
            streams = " ".join(f"{fd}<&-" if fd == 0 else f"{fd}>&-" for fd in self.closed)
            self.process = subprocess.Popen(
                [*self.under, "sh", "-c", f'exec "$@" {streams}', "sh", server, "--port", str(self.port),
                 "--api-key", KEY, *self.arguments, "--alias", "tiny"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            until = time.monotonic() + 60
            while self.process.poll() is None and time.monotonic() < until:
                try:
                    call(self.port, "/health")
                    return self
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.02)
            self.__exit__()
        sys.exit(f"it does not start without the streams {self.closed}")

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.status = self.process.wait(60)


def check_streams(model, folder):
    for mask in range(8):
        closed = [fd for fd in range(3) if mask >> fd & 1]
        store = os.path.join(folder, f"store{mask}")
        ids = []
        with Serving(closed, "--model", model, "--store", store, "--log-json") as serving:
            for text in ("One", "Two", "Three"):
                body = {"model": "tiny", "input": text, "max_output_tokens": 2}
                ids.append(call(serving.port, "/v1/responses", body)["id"])
            if sys.platform == "linux":
                for fd in range(3):
                    leads_to = os.readlink(f"/proc/{serving.process.pid}/fd/{fd}")
                    assert leads_to == "/dev/null", (closed, leads_to)
        assert serving.status == 0, (closed, serving.status)
        assert os.path.getsize(os.path.join(store, "lock")) == 0, closed
        with Serving([], "--model", model, "--store", store) as serving:  # damage would stop it
            kept = [one["id"] for one in call(serving.port, "/v1/responses")["data"]]
        assert kept == ids[::-1], (closed, kept, ids)


def check_descriptors(model, folder):
    """A limit of 64: more clients than that, the journal among them."""
    store = os.path.join(folder, "few")
    few = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh"]
    with Serving([], "--model", model, "--store", store, under=few) as serving:
        ids, idle = [], []
        for count in (0, 20, 80):
            idle += [socket.create_connection(("127.0.0.1", serving.port)) for _ in range(count)]
            if count == 80:  # as many of them are taken as there is room for; the others wait
                time.sleep(0.3)
                for one in idle:
                    one.close()
            for _ in range(3):
                body = {"model": "tiny", "input": "One", "max_output_tokens": 2}
                ids.append(call(serving.port, "/v1/responses", body)["id"])
    assert serving.status == 0, serving.status
    with Serving([], "--model", model, "--store", store) as serving:
        kept = [one["id"] for one in call(serving.port, "/v1/responses")["data"]]
    assert kept == ids[::-1], (kept, ids)


def check_models(model):
    """Several models under one limit that has room for one: each answers to its own names."""
    flags = ["--memory", "6M", "--ctx", "256", "--model", model, "--model-id", "one", "--alias", "uno",
             "--model", model, "--model-id", "two", "--keep-loaded", "1s"]
    with Serving([], *flags) as serving:
        told = [one["id"] for one in call(serving.port, "/v1/models")["data"]]
        assert told == ["one", "uno", "two", "tiny"], told
        for name in ("one", "two", "uno", "two"):
            body = {"model": name, "input": "One", "max_output_tokens": 2}
            reply = call(serving.port, "/v1/responses", body)
            assert reply["status"] == "completed" and reply["model"] == name, reply
    assert serving.status == 0, serving.status


with tempfile.TemporaryDirectory() as folder:
    model = os.path.join(folder, "tiny.gguf")
    subprocess.run([write_tiny_model, model], check=True)
    check_options()
    check_readme()
    check_defaults(model)
    check_words(model, folder)
    check_switches(model, folder)
    count = check_refusals(model, folder)
    check_streams(model, folder)
    check_descriptors(model, folder)
    check_models(model)
    print(f"server: {count} settings refused, records kept without any of the streams")
