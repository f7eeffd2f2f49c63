#!/usr/bin/env python3
"""The log of examples/server: who reads it may die, stall or be slow, and the server goes on; every line
is one JSON object with --log-json; --log-file is opened anew after SIGHUP.

Usage: service_log.py SERVER WRITE_TINY_MODEL
"""
import http.client
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time

server, write_tiny_model = sys.argv[1:3]
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
LOST = re.compile(r"(\d+) log lines were lost")


class Serving:
    def __init__(self, *flags, stderr, **more):
        self.process = subprocess.Popen([server, "--model", model, "--port", "0", "--alias", "tiny", *flags],
                                        stdout=subprocess.PIPE, stderr=stderr, text=True, **more)
        self.port = int(re.search(r":(\d+) ", self.process.stdout.readline())[1])
        self.link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def call(self, method, path, body=None, headers=()):
        self.link.request(method, path, body and json.dumps(body), dict(headers))
        reply = self.link.getresponse()
        text = reply.read()
        return reply.status, text.decode(), reply.headers

    def ask(self, text="One", **more):
        return self.call("POST", "/v1/responses", {"model": "tiny", "input": text, "max_output_tokens": 2, "temperature": 0,
                                                   **more},
                         {"Content-Type": "application/json"})

    def lost(self):
        return int(re.search(r"^valar_log_lines_dropped_total (\d+)$", self.call("GET", "/metrics")[1], re.M)[1])

    def make_lines(self, count):
        """Long ones, of paths that are not there."""
        for i in range(count):
            status, _, _ = self.call("GET", f"/{i}-" + "x" * 190, headers={"X-Request-ID": "y" * 128})
            assert status == 404, status

    def stop(self, limit_s=20):
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(limit_s)
        self.process.stdout.close()
        assert status == 0, status
        return time.monotonic() - began


def check_dead_reader():
    end, stderr = os.pipe()
    os.close(end)
    serving = Serving(stderr=stderr)
    os.close(stderr)
    serving.make_lines(20)
    assert serving.ask()[0] == 200 and serving.call("GET", "/health")[0] == 200
    until = time.monotonic() + 10
    while serving.lost() < 21 and time.monotonic() < until:
        time.sleep(0.02)
    assert serving.lost() >= 21, serving.lost()
    serving.stop()


def check_stalled_reader():
    """Nobody reads until the queue is full: later lines are lost, counted, and told of."""
    end, stderr = os.pipe()
    serving = Serving(stderr=stderr)
    os.close(stderr)
    made = 0
    while serving.lost() == 0:
        serving.make_lines(200)
        made += 200
        assert made < 40000, "the queue has no end"
    assert serving.ask()[0] == 200 and serving.call("GET", "/health")[0] == 200
    lost = serving.lost()
    pieces = []

    def read():
        """Slowly at first."""
        for i in range(1 << 30):
            piece = os.read(end, 4096 if i < 20 else 1 << 16)
            if not piece:
                return
            pieces.append(piece)
            if i < 20:
                time.sleep(0.02)
    reader = threading.Thread(target=read)
    reader.start()
    until = time.monotonic() + 20
    while not any(b"log lines were lost" in piece for piece in pieces) and time.monotonic() < until:
        time.sleep(0.02)
    assert serving.ask("Two")[0] == 200
    serving.stop()
    reader.join()
    os.close(end)
    lines = b"".join(pieces).decode().splitlines()
    told = [int(found[1]) for found in map(LOST.search, lines) if found]
    assert sum(told) == lost, (told, lost)
    requests = [line for line in lines if " method=" in line]
    assert len(requests) + lost == made + 2, (len(requests), lost, made)
    assert all(re.match(TIME + " (info|warning|error) ", line) for line in lines), lines
    order = [i for i, line in enumerate(lines) if LOST.search(line)][0]
    assert " method=" in lines[order - 1] and "method=POST" in lines[order + 1], lines[order - 1:order + 2]


def check_stalled_end():
    """With the queue full and nobody reading it ends, too; also with stdout in the same pipe."""
    end, stderr = os.pipe()
    serving = Serving(stderr=stderr)
    while serving.lost() == 0:
        serving.make_lines(200)
    took = serving.stop(8)
    other = subprocess.Popen([server, "--model", model, "--port", "0"], stdout=stderr, stderr=stderr)
    time.sleep(2.5)  # what it says has no room
    other.terminate()
    assert other.wait(8) == 0
    os.close(stderr)
    os.close(end)
    return took


def check_file(folder):
    """Moved away and SIGHUP, again and again under load: each line is in one of the files, once."""
    path = os.path.join(folder, "server.log")
    with open(os.path.join(folder, "stderr"), "w+") as stderr:
        serving = Serving("--log-file", path, "--log-json", stderr=stderr)
        ids = []
        for turn in range(5):
            for _ in range(20):
                ids.append(serving.call("GET", "/v1/models")[2]["X-Request-ID"])
            os.rename(path, f"{path}.{turn}")
            serving.process.send_signal(signal.SIGHUP)
            until = time.monotonic() + 10
            while not os.path.exists(path):
                assert time.monotonic() < until, "it was not opened again"
                ids.append(serving.call("GET", "/v1/models")[2]["X-Request-ID"])
        serving.stop()
        stderr.seek(0)
        assert stderr.read() == "", "the log goes to the file"
    told = []
    for name in [f"{path}.{turn}" for turn in range(5)] + [path]:
        told += [json.loads(line) for line in open(name)]
    assert [line["id"] for line in told if "id" in line] == ids
    assert oct(os.stat(path).st_mode & 0o777) in ("0o640", "0o600"), os.stat(path)
    done = subprocess.run([server, "--model", model, "--log-file", folder], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("--log-file: cannot open"), done


def check_full_disk(folder):
    """A file that may not grow: what is lost is counted, and told of when it may again."""
    path = os.path.join(folder, "full.log")
    least = (6000, resource.RLIM_INFINITY)
    serving = Serving("--log-file", path, stderr=subprocess.DEVNULL, restore_signals=False,
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, least))
    until = time.monotonic() + 10
    while "loaded" not in open(path).read():  # beside the first requests
        assert time.monotonic() < until, "it does not load"
        time.sleep(0.02)
    serving.make_lines(40)
    while serving.lost() == 0 or os.path.getsize(path) < least[0]:
        assert time.monotonic() < until, serving.lost()
        time.sleep(0.02)
    time.sleep(0.2)
    lost = serving.lost()
    resource.prlimit(serving.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert serving.ask()[0] == 200
    serving.stop()
    lines = open(path).read().splitlines()
    torn = [line for line in lines if not re.search("decode_ms=|event=|lost$|loaded|context", line)]
    assert [int(found[1]) for found in map(LOST.search, lines) if found] == [lost], (lost, lines[-4:])
    whole = [line for line in lines if " method=" in line and line not in torn]
    assert len(torn) <= 1 and len(whole) == 41 - lost, (lost, torn, len(whole))


def check_json(folder):
    """Requests of many kinds, a kill, damage, recovery, refused starts: one object a line."""
    store = os.path.join(folder, "store")
    log = os.path.join(folder, "json.log")

    def lines():
        out = []
        for line in open(log, encoding="utf-8"):
            one = json.loads(line)
            assert isinstance(one, dict) and re.fullmatch(TIME, one["time"]), line
            assert one["level"] in ("info", "warning", "error"), line
            out.append(one)
        return out

    flags = ["--log-json", "--store", store]
    with open(log, "ab") as stderr:
        serving = Serving(*flags, "--dialect", "openai", stderr=stderr)
        status, text, headers = serving.ask("my secret words", stream=True)
        assert status == 200 and "event: " in text
        answered = headers["X-Request-ID"]
        wrong = serving.ask("my secret words", temperature="secret \u00e9\n")[2]["X-Request-ID"]
        for path in ("/", "/health", "/metrics", "/none\"%00", "/v1/responses?limit=3&after=secret"):
            serving.call("GET", path, headers={"X-Request-ID": "of-mine"})
        serving.call("DELETE", "/v1/responses/resp_none")
        serving.ask(background=True)
        # It leaves at the first event, and the model goes on: of no answer are these tokens the end.
        body = json.dumps({"model": "tiny", "input": "x " * 100, "max_output_tokens": 300, "stream": True,
                           "logit_bias": {"0": -100, "2": -100}})
        until = time.monotonic() + 20
        while not any(line.get("status") == 499 and line["output_tokens"] for line in lines()):
            assert time.monotonic() < until, "no client left in time"
            link = http.client.HTTPConnection("127.0.0.1", serving.port)
            link.request("POST", "/v1/responses", body, {"Content-Type": "application/json"})
            reply = link.getresponse()
            assert reply.status == 200, reply.read()
            while b"delta" not in reply.readline():
                pass
            reply.close()
            link.close()
            time.sleep(0.05)
        serving.process.kill()
        serving.process.wait()
        told = lines()
        by_id = {line["id"]: line for line in told if "id" in line}
        assert by_id[answered]["output_tokens"] == 2 and by_id[answered]["key"] == "open", by_id[answered]
        assert by_id[answered]["response"].startswith("resp_"), by_id[answered]
        assert by_id[wrong]["status"] == 400 and by_id[wrong]["code"] == "invalid_type", by_id[wrong]
        assert all(line["client"] == "127.0.0.1" for line in by_id.values())
        left = [line for line in by_id.values() if line["status"] == 499 and line["output_tokens"]]
        assert left[0]["input_tokens"] > 100 and left[0]["response"] and left[0]["decode_ms"], left
        assert not any(line["path"] in ("/health", "/metrics") for line in by_id.values())
        [start] = [line for line in told if line.get("event") == "start"]
        assert start["address"] == f"127.0.0.1:{serving.port}" and start["version"], start
        [loaded] = [line for line in told if line.get("message", "").startswith("loaded ")]
        assert re.search(r", \d+ threads?, \d+ MiB \(weights .* kernels \w+", loaded["message"]), loaded

        [journal] = [name for name in os.listdir(store) if name.endswith(".journal")]
        with open(os.path.join(store, journal), "r+b") as file:
            file.seek(200)
            byte = file.read(1)
            file.seek(200)
            file.write(bytes([byte[0] ^ 1]))
        refused = subprocess.run([server, "--model", model, *flags], stdout=subprocess.DEVNULL, stderr=stderr)
        assert refused.returncode == 1
        assert "--recover keeps what is whole" in lines()[-1]["message"], lines()[-1]
        refused = subprocess.run([server, "--model", "/none", *flags[:1]], stdout=subprocess.DEVNULL, stderr=stderr)
        assert refused.returncode == 1 and lines()[-1]["level"] == "error"
        serving = Serving(*flags, "--recover", "--log-health", stderr=stderr)
        serving.call("GET", "/health")
        serving.stop()
        told = lines()
        assert any("recovery: " in line.get("message", "") for line in told), told
        assert any(line.get("path") == "/health" for line in told)
        assert [line["event"] for line in told if "event" in line][-2:] == ["drain", "stop"], told[-5:]
    assert "secret" not in open(log, encoding="utf-8").read()
    return len(told)


with tempfile.TemporaryDirectory() as folder:
    model = os.path.join(folder, "tiny.gguf")
    subprocess.run([write_tiny_model, model], check=True)
    check_dead_reader()
    check_stalled_reader()
    took = check_stalled_end()
    check_file(folder)
    if sys.platform == "linux":
        check_full_disk(folder)
    count = check_json(folder)
    print(f"service_log: {count} lines of JSON; a dead, a stalled and a slow reader held nothing up "
          f"(SIGTERM: {took:.1f} s)")
