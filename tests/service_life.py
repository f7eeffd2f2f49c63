#!/usr/bin/env python3
"""A service's life: how it starts, what it says to a service manager, how it stops.

Usage: service_life.py SERVE_FAKE [SERVER WRITE_TINY_MODEL]
"""
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time

fake = sys.argv[1]
server, write_tiny_model = (sys.argv[2:4] + [None, None])[:2]


class Program:
    """serve_fake, in a `with`: its first line is the port."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen([fake, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.port = int(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def post(link, text="hello", **more):
    link.request("POST", "/v1/responses", json.dumps({"model": "fake", "input": text} | more))
    reply = link.getresponse()
    return reply, reply.read()


def get(link, path):
    link.request("GET", path)
    reply = link.getresponse()
    return reply, reply.read()


def check_refusal(reply, body):
    assert reply.status == 503, (reply.status, body)
    assert json.loads(body)["error"]["code"] == "overloaded", body
    assert reply.getheader("Connection") == "close", reply.getheaders()
    assert int(reply.getheader("Retry-After")) >= 1, reply.getheaders()


def check_drain():
    """64 clients over connections that they keep: every request that reaches the server before it closes
    the port is answered whole, or with 503."""
    counts = {"whole": 0, "refused": 0, "gone": 0}
    lock = threading.Lock()
    with Program("0", "", "valar", "", "30") as program:
        stopped = threading.Event()

        def client(number):
            link = http.client.HTTPConnection("127.0.0.1", program.port, timeout=30)
            link.connect()
            for i in range(10_000):
                text = f"{number}-{i}"
                fresh = link.sock is None
                try:
                    reply, body = post(link, text)
                except (OSError, http.client.HTTPException):
                    # Only a connection that was made anew, to a port that is closed, finds nobody.
                    assert fresh and stopped.is_set(), f"client {number}: no answer to request {i}"
                    with lock:
                        counts["gone"] += 1
                    return
                if reply.status == 503:
                    assert stopped.is_set()
                    check_refusal(reply, body)
                    with lock:
                        counts["refused"] += 1
                    continue
                assert reply.status == 200, (reply.status, body)
                assert json.loads(body)["output"][0]["content"][0]["text"] == f"echo: {text}"
                with lock:
                    counts["whole"] += 1

        failures = []

        def guarded(number):
            try:
                client(number)
            except BaseException as error:  # noqa: BLE001: told below
                failures.append(error)

        clients = [threading.Thread(target=guarded, args=(number,)) for number in range(64)]
        for one in clients:
            one.start()
        while counts["whole"] < 300 and not failures:
            time.sleep(0.01)
        stopped.set()
        program.process.send_signal(signal.SIGTERM)
        for one in clients:
            one.join()
        assert not failures, failures[0]
        assert program.process.wait(10) == 0
    assert counts["gone"] == 64 and counts["whole"] >= 300, counts
    return counts


def check_cut():
    """What runs longer than --drain: 503 with a body; in the background it is parked and goes on."""
    with tempfile.TemporaryDirectory() as store:
        with Program("0", "", "valar", store, "60000", "0", "300") as program:
            link = http.client.HTTPConnection("127.0.0.1", program.port, timeout=30)
            _, body = post(link, "later", background=True)
            name = json.loads(body)["id"]
            waiting = http.client.HTTPConnection("127.0.0.1", program.port, timeout=30)
            waiting.request("POST", "/v1/responses", json.dumps({"model": "fake", "input": "x"}))
            time.sleep(0.2)
            began = time.monotonic()
            program.process.send_signal(signal.SIGTERM)
            reply = waiting.getresponse()
            body = reply.read()
            took = time.monotonic() - began
            check_refusal(reply, body)
            assert 0.2 < took < 5, took
            program.process.kill() if program.process.poll() is None and took > 5 else None
            # serve_fake's own thread sleeps for its delay
        with Program("0", "", "valar", store, "1") as program:
            link = http.client.HTTPConnection("127.0.0.1", program.port, timeout=30)
            for _ in range(200):
                object_ = json.loads(get(link, f"/v1/responses/{name}")[1])
                if object_["status"] == "completed":
                    break
                time.sleep(0.02)
            assert object_["status"] == "completed", object_


def check_second():
    with Program("0", "", "valar", "", "60000") as program:
        waiting = http.client.HTTPConnection("127.0.0.1", program.port, timeout=30)
        waiting.request("POST", "/v1/responses", json.dumps({"model": "fake", "input": "x"}))
        time.sleep(0.2)
        program.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert program.process.poll() is None
        program.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        reply = waiting.getresponse()
        check_refusal(reply, reply.read())
        assert time.monotonic() - began < 3


# ---- The program ---------------------------------------------------------------------------------

class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=30)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self.path)


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.02)
    sys.exit("it does not come to that")


def check_manager(model, folder, abstract):
    """READY=1 once the model is loaded, WATCHDOG=1 in between, STOPPING=1 with SIGTERM; over a Unix
    socket, whose stale file is replaced."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.settimeout(20)
    name = f"@valar-{os.getpid()}" if abstract else os.path.join(folder, "notify")
    manager.bind("\0" + name[1:] if abstract else name)
    path = os.path.join(folder, "http")
    left = socket.socket(socket.AF_UNIX)
    left.bind(path)
    left.close()
    environment = dict(os.environ, NOTIFY_SOCKET=name, WATCHDOG_USEC="400000")
    command = [server, "--listen", f"unix:{path}", "--model", model, "--alias", "tiny"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout.readline().decode().startswith(f"unix:{path} serves tiny")
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
        assert manager.recv(1000) == b"READY=1"
        link = UnixConnection(path)
        assert get(link, "/health")[0].status == 200
        reply, body = post(link, "One", model="tiny", max_output_tokens=2)
        assert json.loads(body)["status"] == "completed", body
        second = subprocess.run(command, capture_output=True, timeout=20)
        assert second.returncode == 1 and path.encode() in second.stderr, second
        began = time.monotonic()
        for _ in range(4):
            assert manager.recv(1000) == b"WATCHDOG=1"
        assert time.monotonic() - began < 2.5
        process.send_signal(signal.SIGTERM)
        while (told := manager.recv(1000)) == b"WATCHDOG=1":
            pass
        assert told == b"STOPPING=1", told
        assert process.wait(20) == 0
        assert not os.path.exists(path)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        manager.close()
    if not abstract:
        os.unlink(name)


def check_alias(model, folder):
    """Work that was left for an alias waits for a start with it."""
    store = os.path.join(folder, "orphans")
    with Program("0", "", "valar", store, "60000", "0", "0") as program:
        link = http.client.HTTPConnection("127.0.0.1", program.port, timeout=30)
        name = json.loads(post(link, "later", background=True, max_output_tokens=2)[1])["id"]
        program.process.kill()
    for flags, wanted in (([], "pending"), (["--alias", "fake"], "completed")):
        process = subprocess.Popen([server, "--listen", "127.0.0.1:0", "--model", model, "--store", store, *flags],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            port = int(process.stdout.readline().split("http://127.0.0.1:")[1].split()[0])
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            wait_for(lambda: get(link, "/health")[0].status == 200)
            wait_for(lambda: json.loads(get(link, f"/v1/responses/{name}")[1])["status"] == wanted)
        finally:
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=20)
        assert process.returncode == 0
        assert ("the model 'fake'" in log) == (wanted == "pending"), log


def check_full_disk():
    """A disk of 8 MiB, in a namespace of our own: what the server says when it is full, and that DELETE
    works. False: such a disk may not be made here."""
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=8m none "$1" && exec "$2" 0 "" valar "$1"', "sh"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            tried = subprocess.run([*mount, folder, "true"], capture_output=True)
        except OSError:
            return False
        if tried.returncode != 0:
            return False
        process = subprocess.Popen([*mount, folder, fake], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        log = []
        reader = threading.Thread(target=lambda: log.extend(process.stderr), daemon=True)
        reader.start()
        try:
            link = http.client.HTTPConnection("127.0.0.1", int(process.stdout.readline()), timeout=20)
            names, reply = [], None
            for _ in range(100):
                reply, body = post(link, "w" * 200_000)
                if reply.status != 200:
                    break
                names.append(json.loads(body)["id"])
            assert reply.status == 503 and int(reply.getheader("Retry-After")) >= 1, (reply.status, body)
            assert folder.encode() not in body, body
            wait_for(lambda: get(link, "/health")[0].status == 503)
            reply, body = get(link, "/health")
            assert json.loads(body)["error"]["code"] == "store" and folder.encode() not in body, body
            assert get(link, "/health?live")[0].status == 200
            metrics = get(link, "/metrics")[1].decode()
            assert "valar_store_free_bytes " in metrics and 'valar_store_errors_total{kind="overloaded"} ' in metrics
            wait_for(lambda: int(post(link)[0].getheader("Retry-After")) >= 2)
            for name in names:
                link.request("DELETE", f"/v1/responses/{name}")
                reply = link.getresponse()
                assert reply.read() and reply.status == 200, reply.status
                assert get(link, f"/v1/responses/{name}")[0].status == 404
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        reader.join(5)
        process.stderr.close()
        causes = [line for line in log if line.startswith(b"store: cannot")]
        assert len(causes) == 1 and b"No space left" in causes[0], causes
    return True


def check_words(model):
    told = subprocess.run([server, "--version"], capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.startswith("valar "), told
    assert "Exit codes: 0:" in subprocess.run([server, "--help"], capture_output=True, text=True).stdout
    for flags, word in ((["--listen", "127.0.0.1"], "--listen"), (["--listen", "unix:"], "--listen"),
                        (["--listen", "a:b:c"], "--listen"), (["--keep-alive", "0"], "--keep-alive"),
                        (["--listen", "127.0.0.1:0", "--port", "0"], "--listen"),
                        (["--listen", "0.0.0.0:0"], "--listen")):
        done = subprocess.run([server, "--model", model, *flags], capture_output=True, text=True, timeout=20)
        assert done.returncode == (2 if word == "--keep-alive" else 1), (flags, done)
        assert f"{word}: " in done.stderr, (flags, done)


def check_keep_alive(model):
    """--listen with a port, and a connection that is closed after its second without a request."""
    command = [server, "--listen", "127.0.0.1:0", "--model", model, "--alias", "tiny", "--keep-alive", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        line = process.stdout.readline().decode()
        port = int(line.split("http://127.0.0.1:")[1].split()[0])
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        wait_for(lambda: get(link, "/health")[0].status == 200)
        began = time.monotonic()
        assert link.sock.recv(1) == b""
        assert 0.7 < time.monotonic() - began < 5
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        process.stdout.close()


def check_early(model):
    """SIGTERM as soon as it says that it serves: it ends as always."""
    for _ in range(10):
        process = subprocess.Popen([server, "--port", "0", "--model", model], stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL)
        assert b" serves " in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        process.stdout.close()


drained = check_drain()
check_cut()
check_second()
if server:
    with tempfile.TemporaryDirectory() as folder:
        model = os.path.join(folder, "tiny.gguf")
        subprocess.run([write_tiny_model, model], check=True)
        for abstract in (False, True) if sys.platform == "linux" else (False,):
            check_manager(model, folder, abstract)
        check_early(model)
        check_words(model)
        check_keep_alive(model)
        check_alias(model, folder)
full = check_full_disk()
print(f"service_life: stopped under 64 clients: {drained}; a full disk: {'seen' if full else 'none may be made here'}")
