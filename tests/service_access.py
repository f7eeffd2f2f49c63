#!/usr/bin/env python3
"""Who gets in: keys that change while the server runs, a file of keys that others may read, a key from
the environment, what stays in memory of a secret, proxies, guesses, and connections that there is no
room for.

Usage: service_access.py SERVER WRITE_TINY_MODEL
"""
import concurrent.futures
import hashlib
import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

server, write_tiny_model = sys.argv[1:3]
STAYS, GOES, COMES = (f"sk-{name}-0123456789abcdef" for name in ("stays", "goes", "comes"))


class Serving:
    """The program in a `with`; its log is a file."""

    def __init__(self, *flags, environment=(), files=None, fails=False):
        self.log_path = os.path.join(folder, f"log-{time.monotonic_ns()}")
        limit = files and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)))
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [server, "--model", model, "--port", "0", "--alias", "tiny", *flags], stdout=subprocess.PIPE,
                stderr=log, text=True, preexec_fn=limit, env={**os.environ, **dict(environment)})
        if fails:
            assert self.process.wait(60) == 1, self.process.returncode
            self.process.stdout.close()
            return
        line = self.process.stdout.readline()
        assert line, self.log()
        self.port = int(re.search(r":(\d+) ", line)[1])
        while self.get("/health")[0] != 200:
            time.sleep(0.01)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(30)
        self.process.stdout.close()
        assert status == 0, (status, self.log())

    def log(self):
        with open(self.log_path, encoding="utf-8") as log:
            return log.read()

    def waits_for(self, text, count=1, limit_s=10):
        until = time.monotonic() + limit_s
        while self.log().count(text) < count:
            assert time.monotonic() < until, (text, self.log())
            time.sleep(0.005)

    def get(self, path, key=None, **headers):
        return self.call("GET", path, None, key, headers)

    def ask(self, key):
        body = json.dumps({"model": "tiny", "input": "One", "max_output_tokens": 2})
        return self.call("POST", "/v1/responses", body, key, {"Content-Type": "application/json"})

    def call(self, method, path, body, key, headers):
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            if key:
                headers = {"Authorization": f"Bearer {key}", **headers}
            link.request(method, path, body, headers)
            reply = link.getresponse()
            return reply.status, reply.read().decode(), reply.headers
        finally:
            link.close()


def key_file(*secrets, mode=0o600):
    """A new one in the place of the one before, at once."""
    lines = [f"{secret.split('-')[1]} default {hashlib.sha256(secret.encode()).hexdigest()}\n"
             for secret in secrets]
    with open(keys_path + ".new", "w", encoding="ascii") as file:
        file.writelines(lines)
    os.chmod(keys_path + ".new", mode)
    os.rename(keys_path + ".new", keys_path)


def check_hangup():
    """SIGHUP in the middle of 200 requests: no answer but those that the keys of that moment allow."""
    key_file(STAYS, GOES)
    with Serving("--keys", keys_path, "--keys-poll", "0") as serving:
        changed = threading.Event()  # the old key is gone, the new one is there
        halfway = threading.Event()

        def one(number):
            if number == 100:
                halfway.set()
            key = (STAYS, GOES, COMES)[number % 3]
            before = changed.is_set()
            status, body, _ = serving.ask(key)
            allowed = {200} if key == STAYS else {200, 401, 429}
            if before:
                allowed = {200} if key != GOES else {401, 429}
            elif key == COMES and not halfway.is_set():
                allowed = {401, 429}
            assert status in allowed, (number, key, status, body)
            assert status != 200 or json.loads(body)["status"] == "completed", body
            return key, status, before

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(one, number) for number in range(200)]
            halfway.wait(60)
            key_file(STAYS, COMES)
            serving.process.send_signal(signal.SIGHUP)
            serving.waits_for("keys: 2, 1 of them new; 1 are gone")
            changed.set()
            found = [each.result() for each in asked]
        assert (GOES, 200, False) in found and (COMES, 200, True) in found, found

        # what cannot be read changes nothing, and is said; nothing ends the server
        for number, break_it in enumerate((lambda: key_file(), lambda: key_file(STAYS, mode=0o644),
                                           lambda: os.remove(keys_path), lambda: os.mkdir(keys_path))):
            break_it()
            serving.process.send_signal(signal.SIGHUP)
            serving.waits_for("those of before stay", number + 1)
            assert serving.ask(STAYS)[0] == serving.ask(COMES)[0] == 200
        os.rmdir(keys_path)
        for _ in range(50):
            serving.process.send_signal(signal.SIGHUP)
        assert serving.ask(STAYS)[0] == 200


def check_poll():
    """Without a signal: within the time that --keys-poll gives, once nobody writes any more."""
    key_file(STAYS, GOES)
    with Serving("--keys", keys_path, "--keys-poll", "1") as serving:
        key_file(STAYS, COMES)
        began = time.monotonic()
        serving.waits_for("1 of them new; 1 are gone", limit_s=1.5)
        took = time.monotonic() - began
        assert serving.ask(GOES)[0] == 401 and serving.ask(COMES)[0] == 200
        key_file()
        serving.waits_for("holds no key; those of before stay")
        assert serving.ask(COMES)[0] == 200
        time.sleep(1.2)
        assert serving.log().count("those of before stay") == 1, "it is said again and again"
    return took


def check_background():
    """What a key began goes on when the key is gone."""
    key_file(STAYS, GOES)
    with Serving("--keys", keys_path, "--keys-poll", "0") as serving:
        body = json.dumps({"model": "tiny", "input": "One", "max_output_tokens": 100, "background": True})
        _, text, _ = serving.call("POST", "/v1/responses", body, GOES, {"Content-Type": "application/json"})
        key_file(STAYS)
        serving.process.send_signal(signal.SIGHUP)
        serving.waits_for("1 are gone")
        path = "/v1/responses/" + json.loads(text)["id"]
        assert serving.get(path, GOES)[0] == 401
        until = time.monotonic() + 30
        while json.loads(serving.get(path, STAYS)[1])["status"] != "completed":
            assert time.monotonic() < until
            time.sleep(0.02)


def check_modes():
    for mode in (0o644, 0o606, 0o620):
        key_file(STAYS, mode=mode)
        refused = Serving("--keys", keys_path, fails=True).log()
        assert f"--keys: '{keys_path}' has the mode {mode:04o}" in refused and "--insecure-keys" in refused, refused
        with Serving("--keys", keys_path, "--insecure-keys") as serving:
            assert serving.ask(STAYS)[0] == 200
    key_file(STAYS, mode=0o640)
    with Serving("--keys", keys_path) as serving:
        assert serving.ask(STAYS)[0] == 200


def memory(pid):
    """All that the process may write to."""
    with open(f"/proc/{pid}/maps", encoding="ascii") as maps, open(f"/proc/{pid}/mem", "rb") as bytes_:
        for line in maps:
            ends, mode = line.split()[:2]
            begin, end = (int(text, 16) for text in ends.split("-"))
            if mode.startswith("rw") and "[v" not in line:
                bytes_.seek(begin)
                yield bytes_.read(end - begin)


def check_secrets():
    """A key by flag or by the environment: who looks at the process finds none of it."""
    ways = [(["--api-key", STAYS], {}), ([f"--api-key={STAYS}"], {}), ([], {"VALAR_API_KEY": STAYS}),
            (["--api-key", STAYS], {"VALAR_API_KEY": GOES})]
    for flags, environment in ways:
        with Serving(*flags, environment=environment) as serving:
            if sys.platform == "linux":
                pid = serving.process.pid
                for name in ("cmdline", "environ"):
                    with open(f"/proc/{pid}/{name}", "rb") as file:
                        text = file.read()
                    assert b"0123456789abcdef" not in text, (name, flags, environment)
                for piece in memory(pid):
                    found = piece.find(b"0123456789abcdef")
                    around = piece[max(0, found - 64):found + 64]
                    assert STAYS.encode()[3:] not in piece, (flags, environment, around)
                    assert GOES.encode()[3:] not in piece, (flags, environment, around)
            assert serving.ask(STAYS)[0] == 200
            assert serving.ask(GOES)[0] == 401
    for wrong in ("", " ", "too short", "has a blank inside it"):
        assert "VALAR_API_KEY" in Serving(environment={"VALAR_API_KEY": wrong}, fails=True).log()
    told = subprocess.run([server, "--api-key", STAYS, "--ask", "One", "--max-output-tokens", "2", "--model", model],
                          capture_output=True, text=True, timeout=60)
    assert told.returncode == 0 and STAYS not in told.stdout + told.stderr, told


def check_proxies():
    names = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")
    with Serving() as serving:
        for name in names:
            status, body, _ = serving.get("/v1/models", **{name: "192.0.2.1"})
            error = json.loads(body)["error"]
            assert status == 403 and error["code"] == "proxy_not_allowed" and name in error["message"], body
        assert serving.get("/v1/models")[0] == 200
    for flags, key in ((["--trust-proxy"], None), (["--api-key", STAYS], STAYS)):
        with Serving(*flags) as serving:
            for name in names:
                assert serving.get("/v1/models", key, **{name: "192.0.2.1"})[0] == 200, (flags, name)


def check_guesses():
    with Serving("--api-key", STAYS) as serving:
        statuses = [serving.get("/v1/models", f"sk-guess-{number:016}")[0] for number in range(30)]
        limit = statuses.count(401)
        assert 20 <= limit <= 22 and set(statuses[limit:]) == {429}, statuses
        status, _, headers = serving.get("/v1/models")
        assert status == 429 and 1 <= int(headers["Retry-After"]) <= 3
        assert serving.get("/v1/models", STAYS)[0] == 200  # known, and not held up by others
        metrics = serving.get("/metrics", STAYS)[1]
        assert re.search(r"^valar_auth_refused_total 31$", metrics, re.M), metrics
        assert re.search(rf"^valar_auth_limited_total {31 - limit}$", metrics, re.M), metrics


def refusal(port):
    """Of a client that connects, then asks, then reads."""
    with socket.create_connection(("127.0.0.1", port), 10) as link:
        link.sendall(b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000\r\n\r\n" + b"x" * 3000)
        text = b""
        while piece := link.recv(65536):
            text += piece
    return text


def check_connections():
    """Clients that all wait in the middle of a request: the next are told that there is no room."""
    half = b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n"
    # flags, descriptors, clients, what the log says, what is counted
    cases = (
        (["--max-connections", "4"], None, 4, "refused with 503: 4 are open", "connections"),
        ([], 64, 64, "refused with 503: the process has no descriptor left", "descriptors"),
    )
    for flags, files, count, why, counter in cases:
        with Serving(*flags, files=files) as serving:
            time.sleep(0.1)  # the client that asked for /health is gone
            held = []
            for _ in range(count):
                held.append(socket.create_connection(("127.0.0.1", serving.port), 10))
                held[-1].sendall(half)
            time.sleep(0.3)
            for _ in range(30):
                text = refusal(serving.port)
                assert text.startswith(b"HTTP/1.1 503 "), text
                head, body = text.split(b"\r\n\r\n")
                assert json.loads(body)["error"]["code"] == "overloaded", body
                assert re.search(rb"\r\nRetry-After: \d+\r\n", head) and b"Connection: close" in head, head
            for one in held:
                one.close()
            time.sleep(0.7)
            assert serving.ask(None)[0] == 200
            refused = re.search(rf"^valar_http_{counter}_refused_total (\d+)$", serving.get("/metrics")[1], re.M)
            assert 30 <= int(refused[1]) <= 30 + count, refused
            assert serving.log().count(why) == 1, serving.log()


def check_early_hangup():
    """SIGHUP before it serves: it starts all the same."""
    key_file(STAYS)
    process = subprocess.Popen([server, "--model", model, "--port", "0", "--keys", keys_path],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while True:  # its handler is there once its bit is among those that are caught
        with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
            caught = int(re.search(r"^SigCgt:\s*(\w+)$", status.read(), re.M)[1], 16)
        if caught & 1 << signal.SIGHUP - 1:
            break
    process.send_signal(signal.SIGHUP)
    port = int(re.search(r":(\d+) ", process.stdout.readline())[1])
    with socket.create_connection(("127.0.0.1", port), 10) as link:
        link.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert link.recv(100).startswith(b"HTTP/1.1 ")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    process.stdout.close()


with tempfile.TemporaryDirectory() as folder:
    model, keys_path = os.path.join(folder, "tiny.gguf"), os.path.join(folder, "keys")
    subprocess.run([write_tiny_model, model], check=True)
    check_hangup()
    took = check_poll()
    check_background()
    check_modes()
    check_secrets()
    check_proxies()
    check_guesses()
    check_connections()
    if sys.platform == "linux":
        check_early_hangup()
print(f"access: keys changed in the middle of 200 requests, and by themselves after {took:.1f} s")
