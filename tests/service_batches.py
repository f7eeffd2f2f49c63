"""Batches of a real server: service_batches.py SERVE_FAKE [REQUESTS [KILLS]]

A batch is refused with the path of what is wrong, listed, shown, cancelled, repeated under its key;
its requests are answered once, whether the server is killed meanwhile or not. With REQUESTS (200) of
100,000, as the limit has it, the figures count: how long GET /health took while the batch was sent,
and the server's memory while it waits.
"""
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time

program = sys.argv[1]
count, kills = (int(sys.argv[i]) if len(sys.argv) > i else usual for i, usual in ((2, 200), (3, 1)))
TEXT = "x" * 2000


class Program:
    """serve_fake, in a `with`: its first line is the port. All answers that wait come after DELAY ms."""

    def __init__(self, store, delay, dialect="valar"):
        self.process = subprocess.Popen([program, "0", "", dialect, store, str(delay)],
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.port = int(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def call(self, method, path, body=None, **fields):
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            link.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body),
                         fields)
            reply = link.getresponse()
            return reply.status, json.loads(reply.read()), reply
        finally:
            link.close()

    def get(self, path):
        status, body, _ = self.call("GET", path)
        assert status == 200, (path, status, body)
        return body

    def memory(self):
        """Bytes in RAM that are not a file's."""
        with open(f"/proc/{self.process.pid}/status") as lines:
            return int(re.search(r"RssAnon:\s+(\d+) kB", lines.read())[1]) * 1024


def item(name, text="hi", **more):
    return {"custom_id": name, "params": {"model": "fake", "input": text} | more}


def batch(*requests, **more):
    return {"endpoint": "/v1/responses", "requests": list(requests)} | more


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def states(server, name):
    return {key: one["status"] for key, one in server.get(f"/v1/batches/{name}")["request_status"].items()}


def check_refusals(server):
    good = item("a")
    cases = [
        (batch(), "requests", "array_below_min_length"),
        ({"requests": [good]}, "endpoint", "missing_required_parameter"),
        ({"endpoint": "/v1/responses"}, "requests", "missing_required_parameter"),
        (batch(good) | {"endpoint": "/v1/messages"}, "endpoint", "unsupported_value"),
        (batch(good, label="x" * 257), "label", "string_above_max_length"),
        (batch(good, colour=1), "colour", "unknown_parameter"),
        (batch(good, item("A")), "requests[1].custom_id", "invalid_value"),
        (batch(good, item("a")), "requests[1].custom_id", "invalid_value"),
        (batch(good, {"custom_id": "b"}), "requests[1].params", "missing_required_parameter"),
        (batch(good, item("b") | {"x": 1}), "requests[1].x", "unknown_parameter"),
        (batch(good, item("b", stream=True)), "requests[1].params.stream", "unsupported_value"),
        (batch(good, item("b", background=False)), "requests[1].params.background", "unsupported_value"),
        (batch(good, item("b", store=False)), "requests[1].params.store", "unsupported_value"),
        (batch(good, item("b", temperature=3)), "requests[1].params.temperature", "decimal_above_max_value"),
        (batch(good, item("b", colour=3)), "requests[1].params.colour", "unknown_parameter"),
        (batch(good, item("b", metadata={"completion_window": "asap"})),
         "requests[1].params.metadata.completion_window", "invalid_value"),
        (batch(good, {"custom_id": "b", "params": {"model": "none", "input": "x"}}),
         "requests[1].params.model", "model_not_found"),
        (batch(good, {"custom_id": "b", "params": {"model": "fake"}}), "requests[1].params.input",
         "missing_required_parameter"),
        (batch(good, item("b", "x" * 9000)), None, None),
    ]
    for body, path, code in cases:
        status, reply, _ = server.call("POST", "/v1/batches", body)
        if path is None:
            assert status == 200, reply
            continue
        assert status == 400, (status, reply)
        assert (reply["error"]["param"], reply["error"]["code"]) == (path, code), (reply, path, code)
    status, reply, _ = server.call("POST", "/v1/batches", b'{"endpoint":"/v1/responses","requests":[{]}')
    assert (status, reply["error"]["code"]) == (400, "invalid_json"), reply
    for path in ("/v1/batches/batch_none", "/v1/batches/batch_none/a"):
        assert server.call("GET", path)[0] == 404


def check_life(server):
    """One batch from its start to its end, a list of several, one that is cancelled."""
    names = [f"n{i}" for i in range(150)]
    _, made, _ = server.call("POST", "/v1/batches", batch(
        *(item(name, f"question {name}", metadata={"completion_window": ["standard", "flex"][i % 2]})
          for i, name in enumerate(names)), label="first"))
    assert made["id"].startswith("batch_") and made["request_counts"] == 150 and made["label"] == "first", made
    last = server.get(f"/v1/batches/{made['id']}/n149")
    assert last["status"] in ("pending", "running", "completed") and last["background"], last
    assert server.get(f"/v1/responses/{last['id']}")["id"] == last["id"]
    wait_for(lambda: set(states(server, made["id"]).values()) == {"COMPLETED"})
    assert list(states(server, made["id"])) == names
    for name in ("n0", "n77", "n149"):
        got = server.get(f"/v1/batches/{made['id']}/{name}")
        assert got["status"] == "completed", got
        assert got["output"][0]["content"][0]["text"] == f"echo: question {name}", got
        assert server.get(f"/v1/responses/{got['id']}") == got
    assert server.call("GET", f"/v1/batches/{made['id']}/n150")[0] == 404

    more = [server.call("POST", "/v1/batches", batch(item("cancel")))[1]["id"] for _ in range(5)]
    listed = [one["id"] for one in server.get("/v1/batches")]
    assert listed[:5] == more[::-1] and made["id"] in listed, listed
    assert [one["id"] for one in server.get(f"/v1/batches?limit=2&after_id={more[3]}")] == more[2:0:-1]
    assert [one["id"] for one in server.get(f"/v1/batches?limit=2&before_id={more[1]}")] == more[3:1:-1]
    assert server.call("GET", "/v1/batches?after_id=batch_x")[0] == 400
    assert server.call("GET", "/v1/batches?limit=201")[0] == 400
    wait_for(lambda: server.get(f"/v1/batches/{more[0]}/cancel")["status"] == "completed")

    _, made, _ = server.call("POST", "/v1/batches", batch(*(item(f"n{i}") for i in range(1000))))
    status, shown, _ = server.call("POST", f"/v1/batches/{made['id']}/cancel")
    assert status == 200, shown
    assert "PENDING" not in {one["status"] for one in shown["request_status"].values()}, shown
    wait_for(lambda: set(states(server, made["id"]).values()) <= {"COMPLETED", "CANCELLED"})
    ended = states(server, made["id"])
    assert ended["n999"] == "CANCELLED", ended
    wait_for(lambda: server.get(f"/v1/batches/{made['id']}/n999")["status"] == "cancelled")
    assert server.call("POST", f"/v1/batches/{made['id']}/cancel")[0] == 200


def check_key(server):
    body = batch(item("a"), item("b"))
    key = {"Idempotency-Key": "k"}
    _, first, _ = server.call("POST", "/v1/batches", body, **key)
    spaced = json.dumps(body, indent=3).encode()
    status, again, reply = server.call("POST", "/v1/batches", spaced, **key)
    assert (status, again, reply.getheader("Idempotent-Replayed")) == (200, first, "true"), again
    status, other, _ = server.call("POST", "/v1/batches", batch(item("a")), **key)
    assert (status, other["error"]["type"]) == (400, "idempotency_error"), other
    assert sum(one["id"] == first["id"] for one in server.get("/v1/batches")) == 1


def send(server, body, times):
    """Sends a batch, while GET /health is asked again and again over a connection of its own."""
    over = threading.Event()

    def ask():
        link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        while not over.is_set():
            begun = time.monotonic()
            link.request("GET", "/health")
            link.getresponse().read()
            times.append(time.monotonic() - begun)
            time.sleep(0.001)
        link.close()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        status, made, _ = server.call("POST", "/v1/batches", body)
    finally:
        over.set()
        asking.join()
    assert status == 200, made
    return made["id"]


def check_kills(folder):
    body = json.dumps(batch(*(item(f"n{i}", f"{i} {TEXT}") for i in range(count)))).encode()
    times = []
    with Program(folder, 600_000) as server:  # nothing ends: it waits
        before = server.memory()
        begun = time.monotonic()
        name = send(server, body, times)
        took = time.monotonic() - begun
        time.sleep(1)
        waits = server.memory()
    for i in range(kills):
        with Program(folder, 1) as server:
            if i == 0:
                again = server.memory()
            wait_for(lambda: sum(one == "COMPLETED" for one in states(server, name).values())
                     >= count * (i + 1) // (kills + 2), 1800)
    with Program(folder, 1) as server:
        done = ("COMPLETED", "FAILED")
        wait_for(lambda: all(one in done for one in states(server, name).values()), 1800)
        ended = states(server, name)
        records, after = {}, ""
        while after is not None:
            page = server.get(f"/v1/responses?limit=100{after}")
            for one in page["data"]:
                assert one["id"] not in records, one
                records[one["id"]] = one["status"]
            after = f"&after={page['last_id']}" if page["has_more"] else None
        assert len(records) == count, (len(records), count)
        assert set(records.values()) <= {"completed", "failed"}, set(records.values())
        used = server.get("/v1/usage")["requests"]
        assert used <= count, used  # a kill loses what the last second counted, and nothing counts twice
        lost = sum(one == "failed" for one in records.values())
        assert lost == sum(one == "FAILED" for one in ended.values()), lost
        assert lost <= 130 * kills, lost  # in work at two kills, the first of which is of the server before
    times.sort()
    mb = 1 / 1e6
    print(f"{count} requests ({len(body) * mb:.0f} MB) accepted in {took:.1f} s; GET /health {len(times)} times, "
          f"p50 {times[len(times) // 2] * 1e3:.1f} ms, p99 {times[int(len(times) * 0.99)] * 1e3:.1f} ms; memory "
          f"{before * mb:.0f} MB before, {waits * mb:.0f} MB while it waits, {again * mb:.0f} MB after a start; "
          f"{kills} kills: one terminal record each, {lost} of them failed")


for dialect in ("valar", "openai"):
    with tempfile.TemporaryDirectory() as folder, Program(folder, 2, dialect) as server:
        if dialect == "openai":
            check_key(server)
            continue
        check_refusals(server)
        check_life(server)
        check_key(server)
with tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as folder:
    check_kills(folder)
