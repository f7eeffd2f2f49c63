#!/usr/bin/env python3
"""Webhooks: service_webhooks.py SERVE_FAKE [ROUNDS [RESPONSES]]

A receiver that fails, redirects, resets, stalls and is not there: what ended is delivered all the same, as
GET shows it, signed, never before it can be read, at most two at once to a host and 16 in all; also where the
server is killed (-9) in between, where the response was deleted, and where it is a batch's. What fails four
times is given up. What may not be called is not called. With ROUNDS (0) also the limit of those that wait, and
so many rounds of RESPONSES (200) against receivers that do all of that at random and die, each with two kills
of the server.
"""
import atexit
import base64
import hashlib
import hmac
import http.client
import http.server
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

program = sys.argv[1]
rounds, many = (int(sys.argv[i]) if len(sys.argv) > i else usual for i, usual in ((2, 0), (3, 200)))
TOKEN = "whsec_" + base64.b64encode(b"a secret of the receiver").decode()


class Receiver:
    """On a port of its own. `script` says what a path does at each try: a status, or a word."""

    def __init__(self, port=0, host="127.0.0.1"):
        outer = self
        self.host = host
        self.script, self.seen, self.lock = {}, [], threading.Lock()
        self.active = self.most = 0
        self.stall_s = 0.3
        self.look = None  # called with (path, headers, body) of each
        self.problems = []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.close_connection = True
                if outer.look:
                    try:
                        outer.look(self.path, self.headers, body)
                    except Exception as error:  # noqa: BLE001: told in the main thread
                        outer.problems.append(f"{self.path}: {error!r}")
                with outer.lock:
                    outer.active += self.path != "/deleted"
                    outer.most = max(outer.most, outer.active)
                    tries = sum(1 for one in outer.seen if one[0] == self.path)
                    outer.seen.append((self.path, self.headers, body, time.monotonic()))
                    steps = outer.script.get(self.path, [200])
                step = steps[min(tries, len(steps) - 1)]
                if step == "stall":
                    time.sleep(outer.stall_s)
                    step = 200
                with outer.lock:  # before the caller can know
                    outer.active -= self.path != "/deleted"
                if step == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return self.connection.close()
                self.send_response(step)
                if step == 307:
                    self.send_header("Location", f"http://127.0.0.1:{outer.port}/elsewhere")
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, *_):
                pass

            def handle_one_request(self):
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):
                pass

        self.listen = lambda at: Server((host, at), Handler)
        self.server, self.port = None, port
        self.revive()

    def revive(self):
        self.server = self.listen(self.port)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def die(self):
        self.server.shutdown()
        self.server.server_close()

    def url(self, path):
        return f"http://{self.host}:{self.port}{path}"

    def of(self, path):
        with self.lock:
            return [one for one in self.seen if one[0] == path]


class Program:
    """serve_fake, whose first line is the port."""
    running = []

    def __init__(self, log, store="", key="", delay="20", port="0"):
        self.key = key
        self.log = open(log, "ab")
        self.process = subprocess.Popen([program, port, key, "valar", store, delay], stdout=subprocess.PIPE,
                                        stderr=self.log)
        Program.running.append(self)
        self.port = int(self.process.stdout.readline())

    def kill(self):
        Program.running.remove(self)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def call(self, method, path, body=None, timeout=30):
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        fields = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        link.request(method, path, json.dumps(body) if body is not None else None, fields)
        reply = link.getresponse()
        data = reply.read()
        link.close()
        return reply.status, data

    def post(self, url, text="hello", token=TOKEN, **more):
        metadata = {"completion_webhook": url} | ({"webhook_token": token} if token else {})
        status, body = self.call("POST", "/v1/responses",
                                 {"model": "fake", "input": text, "metadata": metadata} | more)
        assert status in (200, 202), (status, body)
        return json.loads(body)

    def metric(self, line):
        text = self.call("GET", "/metrics")[1].decode()
        found = [one for one in text.splitlines() if one.startswith(line + " ")]
        return float(found[0].split()[-1]) if found else 0.0


def wait_for(what, seconds=20):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def check_signed(fields, body, token=TOKEN):
    """Both signatures, by Python's own means."""
    name = fields["X-Valar-Response-Id"]
    assert name == json.loads(body)["id"]
    assert fields["Content-Type"] == "application/json"
    assert fields["Authorization"] == f"Bearer {token}"
    stamp, signature = (part.split("=", 1)[1] for part in fields["X-Valar-Signature"].split(","))
    assert abs(int(stamp) - time.time()) < 60, stamp
    wanted = hmac.new(token.encode(), f"{stamp}.{name}.".encode() + body, hashlib.sha256).hexdigest()
    assert signature == wanted
    assert fields["webhook-id"] == name and fields["webhook-timestamp"] == stamp
    secret = base64.b64decode(token.removeprefix("whsec_"))
    wanted = hmac.new(secret, f"{name}.{stamp}.".encode() + body, hashlib.sha256).digest()
    assert fields["webhook-signature"] == "v1," + base64.b64encode(wanted).decode()


def check_delivery(folder):
    """Sync, background, deleted; each failure and what follows; what is told of it."""
    receiver = Receiver()
    log, store = os.path.join(folder, "log"), os.path.join(folder, "store")
    server = Program(log, store)
    idle = Program(log + "-idle", delay="60000")

    def look(path, fields, body):
        """It can be read when it is told, with the same bytes."""
        if path.startswith("/deleted"):
            return
        assert server.call("GET", "/v1/responses/" + fields["X-Valar-Response-Id"])[1] == body

    receiver.look = look
    receiver.script = {"/failing": [500, "reset", 200], "/moved": [307, 200], "/slow": ["stall"],
                       "/deleted-later": [503, 200]}
    done = server.post(receiver.url("/sync?a=b"))
    assert done["status"] == "completed" and done["metadata"]["webhook_token"] == "***"
    wait_for(lambda: receiver.of("/sync?a=b"))
    _, fields, body, _ = receiver.of("/sync?a=b")[0]
    check_signed(fields, body)
    assert json.loads(body) == done and fields["Host"] == f"127.0.0.1:{receiver.port}"
    server.post(receiver.url("/bare"), token="")
    server.post(receiver.url("/plain"), token="no-standard-secret")
    # by name, and on another surface
    status, reply = server.call("POST", "/v1/chat/completions", {
        "model": "fake", "messages": [{"role": "user", "content": "x"}],
        "metadata": {"completion_webhook": f"http://localhost:{receiver.port}/chat"}})
    assert status == 200, reply
    wait_for(lambda: receiver.of("/chat") and receiver.of("/bare") and receiver.of("/plain"))
    for i in range(8):
        server.post(receiver.url("/slow"), text=str(i), background=True)
    for path in ("/failing", "/moved"):
        server.post(receiver.url(path), background=True)
    gone = idle.post(receiver.url("/deleted"), background=True)["id"]
    assert idle.call("DELETE", f"/v1/responses/{gone}")[0] == 200
    later = server.post(receiver.url("/deleted-later"))["id"]
    wait_for(lambda: receiver.of("/deleted-later"))
    assert server.call("DELETE", f"/v1/responses/{later}")[0] == 200
    assert server.call("GET", f"/v1/responses/{later}")[0] == 404
    wait_for(lambda: len(receiver.of("/slow")) == 8 and len(receiver.of("/deleted-later")) == 2 and
             receiver.of("/deleted") and len(receiver.of("/moved")) == 2)
    assert "Authorization" not in receiver.of("/bare")[0][1]
    assert "X-Valar-Signature" in receiver.of("/plain")[0][1]
    assert "webhook-id" not in receiver.of("/plain")[0][1]
    assert json.loads(receiver.of("/deleted")[0][2])["status"] == "cancelled"
    first, second = receiver.of("/deleted-later")
    assert first[2] == second[2] and 0.7 < second[3] - first[3] < 3, second[3] - first[3]
    wait_for(lambda: len(receiver.of("/failing")) == 3)
    first, second, third = receiver.of("/failing")
    assert first[2] == second[2] == third[2] and 3.9 < third[3] - second[3] < 8, third[3] - second[3]
    check_signed(third[1], third[2])  # with a time of its own
    assert not receiver.of("/elsewhere"), "a redirect was followed"
    assert receiver.most == 2, f"{receiver.most} at once"
    assert not receiver.problems, receiver.problems
    wait_for(lambda: server.metric("valar_webhooks_queued") == 0)
    assert server.metric('valar_webhooks_total{outcome="delivered"}') == 15
    assert server.metric("valar_webhook_tries_total") == 19
    server.kill()
    idle.kill()
    with open(log) as file:
        lines = [line for line in file if "event=webhook" in line]
        file.seek(0)
        assert TOKEN not in file.read()
    assert len(lines) == 15 and all("outcome=delivered" in line for line in lines), lines
    assert any("status=200 tries=3" in line for line in lines)


def check_killed(folder):
    """The receiver is away, the server dies; then both are there again."""
    log, store = os.path.join(folder, "log"), os.path.join(folder, "store")
    place = socket.socket()  # is the receiver's later; nobody listens yet
    place.bind(("127.0.0.1", 0))
    port = place.getsockname()[1]
    server = Program(log, store)
    names = {server.post(f"http://127.0.0.1:{port}/x", text=str(i))["id"] for i in range(4)}
    deleted = server.post(f"http://127.0.0.1:{port}/x")["id"]
    wait_for(lambda: server.metric("valar_webhook_tries_total") >= 5)
    for method, path in (("GET", "responses"), ("DELETE", "responses"), ("GET", "conversations"),
                         ("DELETE", "conversations"), ("GET", "batches")):
        assert server.call(method, f"/v1/{path}/hook_{deleted}")[0] == 404, (method, path)
    listed = json.loads(server.call("GET", "/v1/responses")[1])["data"]
    assert {one["id"] for one in listed} == names | {deleted}
    assert server.call("DELETE", f"/v1/responses/{deleted}")[0] == 200
    server.kill()
    place.close()
    receiver = Receiver(port)
    server = Program(log, store, delay="60000")
    wait_for(lambda: {one[1]["X-Valar-Response-Id"] for one in receiver.of("/x")} == names | {deleted})
    bodies = {json.loads(body)["id"]: body for _, _, body, _ in receiver.of("/x")}
    for name in names:
        assert server.call("GET", f"/v1/responses/{name}")[1] == bodies[name]
    assert json.loads(bodies[deleted])["status"] == "completed"
    late = {server.post(receiver.url("/late"), text=str(i), background=True)["id"] for i in range(4)}
    server.kill()  # before they are answered
    assert not receiver.of("/late")
    server = Program(log, store)
    wait_for(lambda: {one[1]["X-Valar-Response-Id"] for one in receiver.of("/late")} == late)
    for _, fields, body, _ in receiver.of("/late"):
        check_signed(fields, body)
        assert server.call("GET", "/v1/responses/" + json.loads(body)["id"])[1] == body
    wait_for(lambda: server.metric("valar_webhooks_queued") == 0)
    server.kill()
    seen = len(receiver.seen)
    server = Program(log, store)
    time.sleep(0.3)
    assert len(receiver.seen) == seen, "what was delivered was sent again"
    server.kill()


def settle(server):
    """What the server was told before this is kept after it."""
    for _ in range(2):
        assert server.call("POST", "/v1/responses", {"model": "fake", "input": "x"})[0] == 200


def check_given_up(folder):
    """After four tries, however often the server is killed in between."""
    receiver = Receiver()
    receiver.script = {"/never": [500]}
    log, store = os.path.join(folder, "log"), os.path.join(folder, "store")
    server = Program(log, store)
    server.post(receiver.url("/never"))
    for tries in (2, 3, 4):
        wait_for(lambda: len(receiver.of("/never")) == tries)
        settle(server)
        if tries < 4:  # it need not wait for the next one's time
            server.kill()
            server = Program(log, store)
    wait_for(lambda: server.metric('valar_webhooks_total{outcome="failed"}') == 1)
    settle(server)
    server.kill()
    server = Program(log, store)
    settle(server)
    assert server.metric("valar_webhooks_queued") == 0 and len(receiver.of("/never")) == 4
    server.kill()
    with open(log) as file:
        lines = [line for line in file if "event=webhook" in line]
    assert len(lines) == 1 and "outcome=failed status=500 tries=4" in lines[0], lines


def check_at_once(folder):
    """16 in all, two to a host."""
    receivers = []
    try:
        receivers = [Receiver(host=f"127.0.0.{i}") for i in range(2, 14)]
    except OSError:
        return print("skipped: 127.0.0.2 is no address of this system")
    server = Program(os.path.join(folder, "log"))
    active, most, lock = 0, 0, threading.Lock()

    def look(*_):
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        time.sleep(0.3)
        with lock:
            active -= 1

    for receiver in receivers:
        receiver.look = look
        receiver.script = {"/slow": ["stall"]}
        receiver.stall_s = 0.1
    for _ in range(4):
        for receiver in receivers:
            server.post(receiver.url("/slow"), background=True)
    wait_for(lambda: all(len(receiver.of("/slow")) == 4 for receiver in receivers))
    assert most == 16, most
    assert all(receiver.most <= 2 for receiver in receivers), [receiver.most for receiver in receivers]
    server.kill()


def check_batch(folder):
    """A batch's responses are delivered like others, over a kill, and what is cancelled before it began; a
    webhook that cannot be used is told of once."""
    receiver = Receiver()
    log, store = os.path.join(folder, "log"), os.path.join(folder, "store")

    def send(path, count):
        good = {"completion_webhook": receiver.url(path), "webhook_token": TOKEN}
        requests = [{"custom_id": f"n{i}", "params": {"model": "fake", "input": str(i), "metadata":
                                                      good if i % 10 else {"completion_webhook": "nonsense"}}}
                    for i in range(count)]
        status, body = server.call("POST", "/v1/batches", {"endpoint": "/v1/responses", "requests": requests})
        assert status == 200, body
        return json.loads(body)["id"]

    def check(name, path, count, status):
        wait_for(lambda: len({one[2] for one in receiver.of(path)}) == count - (count + 9) // 10)
        bodies = {json.loads(one[2])["id"]: one[2] for one in receiver.of(path)}
        for i in range(count):
            body = server.call("GET", f"/v1/batches/{name}/n{i}")[1]
            assert bodies.pop(json.loads(body)["id"], None) == (body if i % 10 else None), (i, body)
            assert json.loads(body)["status"] == status
        assert not bodies
        for _, fields, body, _ in receiver.of(path):
            check_signed(fields, body)

    server = Program(log, store, delay="100")
    name = send("/batch", 150)
    waiting = json.loads(server.call("GET", f"/v1/batches/{name}/n149")[1])
    assert waiting["metadata"]["webhook_token"] == "***"
    wait_for(lambda: len(receiver.of("/batch")) > 20)
    server.kill()
    server = Program(log, store)
    check(name, "/batch", 150, "completed")
    server.kill()
    server = Program(log, store, delay="60000")
    name = send("/cancelled", 200)
    assert server.call("POST", f"/v1/batches/{name}/cancel")[0] == 200
    check(name, "/cancelled", 200, "cancelled")
    wait_for(lambda: server.metric("valar_webhooks_queued") == 0)
    assert server.metric('valar_webhooks_total{outcome="refused"}') == 20
    server.kill()
    with open(log) as file:
        lines = [line for line in file if "outcome=refused" in line]
        file.seek(0)
        assert TOKEN not in file.read()
    assert len(lines) == 2 and "batch=" in lines[0] and "count=15" in lines[0], lines


def check_refused(folder):
    """A server for others calls nothing near it; a URL that cannot be used is no error."""
    receiver = Receiver()
    log = os.path.join(folder, "log")
    server = Program(log, key="sk-webhooks-0123456789")
    urls = [receiver.url("/x"), f"http://localhost:{receiver.port}/x", f"http://[::1]:{receiver.port}/x",
            f"http://[::ffff:127.0.0.1]:{receiver.port}/x", f"http://2130706433:{receiver.port}/x",
            f"http://user@127.0.0.1:{receiver.port}/x", "https://127.0.0.1/x", "http://169.254.169.254/",
            "http://10.0.0.1/x", "", "nonsense"]
    for url in urls:
        assert server.post(url)["status"] == "completed", url
    wait_for(lambda: server.metric('valar_webhooks_total{outcome="refused"}') == len(urls))
    assert server.metric("valar_webhooks_queued") == 0
    server.kill()
    # without keys this machine may be called, but for the server itself
    server = Program(log)
    server.post(f"http://127.0.0.1:{server.port}/v1/responses")
    server.post("http://93.184.216.34/")
    wait_for(lambda: server.metric('valar_webhooks_total{outcome="refused"}') == 2)
    server.kill()
    assert not receiver.seen
    with open(log) as file:
        lines = [line for line in file if "outcome=refused" in line]
    assert len(lines) == len(urls) + 2, lines


def check_cap(folder):
    """10,000 may wait, of an organisation."""
    receiver = Receiver()
    receiver.script, receiver.stall_s = {"/stall": ["stall"]}, 600
    server = Program(os.path.join(folder, "log"), os.path.join(folder, "store"), delay="5")
    requests = [{"custom_id": f"n{i}", "params": {"model": "fake", "input": "x", "metadata": {
        "completion_webhook": receiver.url("/stall")}}} for i in range(10_300)]
    assert server.call("POST", "/v1/batches", {"endpoint": "/v1/responses", "requests": requests}, 120)[0] == 200
    wait_for(lambda: server.metric("valar_batches_live") == 0, 300)
    wait_for(lambda: server.metric('valar_webhooks_total{outcome="dropped"}') == 300)
    assert server.metric("valar_webhooks_queued") == 10_000
    server.kill()


def check_round(folder, number):
    """What ends is delivered or given up after four tries, whoever dies meanwhile. Nine in ten are a batch's."""
    rng, began = random.Random(number), time.monotonic()
    receivers = [Receiver(host=f"127.0.0.{i}") for i in range(2, 10)]
    log, store = os.path.join(folder, f"log{number}"), os.path.join(folder, f"store{number}")
    server = Program(log, store, delay="5")
    port = str(server.port)

    def look(path, fields, body):
        """Of some: it can be read when it is told."""
        check_signed(fields, body)
        if int(path[1:]) % 16 == 0:
            try:
                assert server.call("GET", "/v1/responses/" + fields["X-Valar-Response-Id"])[1] == body
            except (OSError, http.client.HTTPException):
                pass  # the server is gone

    def metadata(i):
        steps = rng.choices([200, 500, 307, "reset", "stall"], [70, 10, 5, 10, 5], k=8)
        receivers[i % 8].script[f"/{i}"] = steps
        return {"completion_webhook": receivers[i % 8].url(f"/{i}"), "webhook_token": TOKEN}

    def seen():
        return [one for receiver in receivers for one in list(receiver.seen)]

    for receiver in receivers:
        receiver.look, receiver.stall_s = look, 0.05
    requests = [{"custom_id": f"n{i}", "params": {"model": "fake", "input": str(i), "metadata": metadata(i)}}
                for i in range(many) if i % 10]
    singles = {i: metadata(i) for i in range(0, many, 10)}

    def send_singles():
        for i, hook in singles.items():
            while True:  # who is not answered asks again, and may have two responses then
                try:
                    body = {"model": "fake", "input": str(i), "background": True, "metadata": hook}
                    if server.call("POST", "/v1/responses", body)[0] == 202:
                        break
                except (OSError, http.client.HTTPException):
                    pass
                time.sleep(0.02)

    status, body = server.call("POST", "/v1/batches", {"endpoint": "/v1/responses", "requests": requests}, 120)
    assert status == 200, body
    batch = json.loads(body)["id"]
    sender = threading.Thread(target=send_singles)
    sender.start()
    for share in sorted(rng.uniform(0.05, 0.9) for _ in range(2)):
        wait_for(lambda: sum(len(receiver.seen) for receiver in receivers) > many * share, 600)
        dead = rng.sample(receivers, 2)
        for receiver in dead:
            receiver.die()
        time.sleep(rng.uniform(0.1, 1))
        server.kill()
        server = Program(log, store, delay="5", port=port)
        for receiver in dead:
            receiver.revive()
    sender.join()
    wait_for(lambda: server.metric("valar_batches_live") == 0, 600)
    wait_for(lambda: server.metric("valar_webhooks_queued") == 0, 600)
    settle(server)
    arrived = {}
    for _, fields, body, _ in seen():
        arrived.setdefault(fields["X-Valar-Response-Id"], set()).add(body)
    with open(log) as file:
        lines = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in file if "event=webhook" in line]
    delivered = {one["response"] for one in lines if one["outcome"] == "delivered"}
    given_up = {one["response"] for one in lines if one["outcome"] == "failed"}
    assert all(int(one["tries"]) == 4 for one in lines if one["outcome"] == "failed")
    assert {one["outcome"] for one in lines} <= {"delivered", "failed"}
    shown = [server.call("GET", f"/v1/batches/{batch}/{one['custom_id']}")[1] for one in requests]
    told = {json.loads(body)["id"]: body for body in shown}
    for name in set(arrived) - set(told):
        told[name] = server.call("GET", f"/v1/responses/{name}")[1]
    assert len(told) >= many
    for name, body in told.items():
        assert json.loads(body)["status"] == "completed"
        assert name in delivered or name in given_up, f"{name} was forgotten"
        assert arrived.get(name, {body}) == {body}, name
        assert name in arrived or name not in delivered, name
    problems = [one for receiver in receivers for one in receiver.problems]
    assert not problems, problems[:3]
    server.kill()
    for receiver in receivers:
        receiver.die()
    print(f"round {number}: {len(told)} responses, {len(seen())} requests, {len(delivered)} delivered, "
          f"{len(given_up)} given up, {time.monotonic() - began:.0f} s", flush=True)


def kill_all():
    for server in list(Program.running):
        server.kill()


atexit.register(kill_all)
checks = [check_delivery, check_killed, check_given_up, check_at_once, check_batch, check_refused]
failures = []


def guarded(check):
    with tempfile.TemporaryDirectory() as folder:
        try:
            check(folder)
        except BaseException as error:  # noqa: BLE001: told below
            failures.append((check.__name__, error))


threads = [threading.Thread(target=guarded, args=(check,)) for check in checks]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for name, error in failures:
    print(f"{name}:", file=sys.stderr)
    sys.excepthook(type(error), error, error.__traceback__)
assert not failures
if rounds:
    with tempfile.TemporaryDirectory() as folder:
        check_cap(folder)
for number in range(rounds):
    with tempfile.TemporaryDirectory() as folder:
        check_round(folder, number)
print("service_webhooks.py: delivered, signed, retried, after kill -9, refused")
