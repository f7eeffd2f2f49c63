#!/usr/bin/env python3
"""examples/gateway.cpp in front of two servers: service_gateway.py GATEWAY SERVE_FAKE

What is asked through it is answered as without it: whole, streamed, with tools, on all three surfaces. A server
that is killed in the middle makes a record that says so, and the next request goes to the other one. Where none
is left, that is said, until one comes back. A client that goes is heard by the server that answers it. What was
taken in the background has its answer though the gateway is killed.
"""
import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

gateway, fake = sys.argv[1:3]
VOLATILE = {"id", "created_at", "completed_at", "created", "system_fingerprint", "item_id", "response_id", "call_id",
            "timings", "sequence_number",
            "temperature", "top_p"}  # what a server takes where none is given: nobody else knows


class Program:
    """A server, in a `with`; `port` is said on its first line."""

    def __init__(self, arguments, **environment):
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                        env=os.environ | environment)
        line = self.process.stdout.readline()
        assert line, arguments
        self.port = int(line.split(" serves ")[0].rsplit(":", 1)[-1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def ask(self, method, path, body=None, **headers):
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            link.request(method, path, None if body is None else json.dumps(body), headers)
            yield link.getresponse()
        finally:
            link.close()

    def call(self, method, path, body=None, **headers):
        with self.ask(method, path, body, **headers) as reply:
            return reply.status, json.loads(reply.read())

    def metric(self, name):
        with self.ask("GET", "/metrics") as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def server(pace_ms=0, port=0):
    return Program([fake, str(port), "", "openai", "", "0", str(pace_ms)])


def front(*servers, store=None, dialect="openai", **environment):
    flags = [flag for one in servers for flag in ("--upstream", one.url)] + ["--upstream-refresh", "1"]
    return Program([gateway, "--port", "0", "--dialect", dialect, *flags] + (["--store", store] if store else []),
                   **environment)


def wait_for(condition, what):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, f"in vain: {what}"
        time.sleep(0.02)


def events(reply):
    """Of a stream: what each event holds."""
    for line in reply:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[6:])


def constant(value):
    """Without what differs from one answer to the next."""
    if isinstance(value, dict):
        return {key: constant(one) for key, one in value.items() if key not in VOLATILE}
    return [constant(one) for one in value] if isinstance(value, list) else value


def joined(found):
    """Events, their deltas joined as far as they follow each other: how they are cut into pieces is free."""
    whole = []
    for event in map(constant, found):
        for name in ("logprobs", "index"):
            event.pop(name, None)
        same = whole and isinstance(event.get("delta"), str) and whole[-1].get("type") == event["type"]
        if same:
            whole[-1]["delta"] += event["delta"]
        else:
            whole.append(event)
    return whole


def chat_text(found):
    return "".join(choice["delta"].get("content") or "" for event in found for choice in event.get("choices", []))


TOOL = {"name": "get_weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}
QUESTIONS = [
    ("/v1/responses", {"input": "one two three"}),
    ("/v1/responses", {"input": "one two three", "max_output_tokens": 2, "temperature": 0.5}),
    ("/v1/responses", {"input": "weather?", "tools": [{"type": "function", **TOOL}]}),
    ("/v1/responses", {"input": "json", "text": {"format": {"type": "json_schema", "name": "a",
                                                            "schema": {"type": "object"}}}}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "four five"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "weather?"}],
                              "tools": [{"type": "function", "function": TOOL}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a stop b"}], "stop": ["stop"], "logprobs": True}),
    ("/v1/messages", {"max_tokens": 50, "messages": [{"role": "user", "content": "six seven"}]}),
    ("/v1/messages", {"max_tokens": 50, "messages": [{"role": "user", "content": "a stop b"}],
                      "stop_sequences": ["none", "stop"]}),
    ("/v1/completions", {"prompt": "eight"}),
]


def check_same(direct, through):
    for path, question in QUESTIONS:
        body = {"model": "fake"} | question
        (status, one), (other_status, other) = (each.call("POST", path, body) for each in (direct, through))
        assert status == other_status == 200, (path, one, other)
        assert constant(one) == constant(other), (path, one, other)
        streams = []
        for each in (direct, through):
            with each.ask("POST", path, body | {"stream": True}) as reply:
                assert reply.status == 200, (path, reply.read())
                streams.append(list(events(reply)))
        if "chat" in path:
            one, other = map(chat_text, streams)
        elif path == "/v1/completions":
            one, other = ("".join(event["choices"][0]["text"] for event in stream) for stream in streams)
        else:
            one, other = map(joined, streams)
        assert one == other, (path, one, other)
    names = [[model["id"] for model in each.call("GET", "/v1/models")[1]["data"]] for each in (direct, through)]
    assert names[0] == names[1], names
    print(f"{len(QUESTIONS)} questions: the same answers through the gateway, whole and streamed")


def check_refused(through):
    status, body = through.call("POST", "/v1/responses", {"model": "unknown", "input": "hi"})
    assert status == 404 and body["error"]["code"] == "model_not_found", body
    status, body = through.call("POST", "/v1/responses", {"model": "fake", "input": "hi", "temperature": 9})
    assert status == 400, body
    process = subprocess.run([gateway, "--port", "0", "--upstream", "https://example.org"], capture_output=True,
                             text=True)
    assert process.returncode and "--upstream" in process.stderr, process.stderr


def check_killed():
    with server(pace_ms=60) as slow, server() as other, front(slow, other) as through:
        names = []
        for question in ({"input": "one two three four five six seven eight nine ten"}, {"input": "later"}):
            with through.ask("POST", "/v1/responses", {"model": "fake", "stream": True} | question) as reply:
                for event in events(reply):
                    names.append(event["type"])
                    if event["type"] == "response.failed":
                        failed = event["response"]["id"]
                    if event["type"] == "response.output_text.delta" and slow.process.poll() is None:
                        slow.kill()
        assert names.count("response.failed") == 1 and names[-1] == "response.completed", names
        # The first went to the slow one: both were idle then, and it stands first.
        _, record = through.call("GET", f"/v1/responses/{failed}")
        assert record["status"] == "failed" and record["error"]["code"] == "upstream_error", record
        for _ in range(10):
            status, body = through.call("POST", "/v1/responses", {"model": "fake", "input": "on"})
            assert status == 200 and body["status"] == "completed", body
        other.kill()
        status, body = through.call("POST", "/v1/responses", {"model": "fake", "input": "nobody"})
        assert status == 502 or body["status"] == "failed", (status, body)
        wait_for(lambda: through.call("GET", "/health")[0] == 503, "that it is not ready")
        status, body = through.call("POST", "/v1/responses", {"model": "fake", "input": "nobody"})
        assert status == 502 and body["error"]["code"] == "upstream_error", (status, body)
        with server(port=other.port):
            wait_for(lambda: through.call("POST", "/v1/responses", {"model": "fake", "input": "x"})[0] == 200,
                     "that one is back")
        print("killed in the middle: upstream_error, the other one goes on; none: told, until one is back")


def check_repeated():
    """What failed is told once more under its key, as it was the first time."""
    for dialect in ("openai", "valar"):
        for path, question in (("/v1/chat/completions", {}), ("/v1/messages", {"max_tokens": 50})):
            with server(pace_ms=60) as slow, front(slow, dialect=dialect) as through:
                ask = {"model": "fake", "messages": [{"role": "user", "content": "word " * 100}]} | question
                threading.Timer(0.3, slow.process.kill).start()
                first, second = (through.call("POST", path, ask, **{"Idempotency-Key": "k"}) for _ in range(2))
                for one in (first, second):
                    one[1].pop("request_id", None)
                assert first == second and first[0] == 502, (dialect, path, first, second)
                assert first[1]["error"]["code"] == "upstream_error", first
    print("what failed fails the same way under its key")


def check_gone():
    with server(pace_ms=60) as slow, front(slow) as through:
        with through.ask("POST", "/v1/chat/completions",
                         {"model": "fake", "stream": True,
                          "messages": [{"role": "user", "content": "word " * 200}]}) as reply:
            next(events(reply))
        wait_for(lambda: through.metric("valar_model_requests_running") == 0, "that the gateway lets it go")
        began = time.monotonic()
        wait_for(lambda: chat_answers(slow), "that the server is free for the next")
        assert time.monotonic() - began < 6, "the answer that nobody wants was made to its end"
        print("a client that goes ends the work at the server")


def chat_answers(slow):
    """Answers come one after the other there: this one as soon as no other is made."""
    status, body = slow.call("POST", "/v1/chat/completions",
                             {"model": "fake", "messages": [{"role": "user", "content": "hi"}]})
    return status == 200 and body["choices"][0]["message"]["content"] == "echo: hi"


def check_durable():
    with server(pace_ms=30) as one, tempfile.TemporaryDirectory() as folder:
        with front(one, store=folder) as through:
            _, body = through.call("POST", "/v1/responses",
                                   {"model": "fake", "input": "a b c d e f g h i j k l m", "background": True})
            record = f"/v1/responses/{body['id']}"
            wait_for(lambda: through.call("GET", record)[1]["status"] == "in_progress", "that it is worked on")
        with front(one, store=folder) as through:
            def ended():
                return through.call("GET", record)[1]["status"] == "completed"
            wait_for(ended, "the answer after a restart")
            keyed = {"model": "fake", "input": "once"}
            first, second = (through.call("POST", "/v1/responses", keyed, **{"Idempotency-Key": "k"})[1]
                             for _ in range(2))
            assert first == second, (first, second)
        print("background work outlives the gateway; a key is answered once")


with server() as first, server() as second:
    with front(first, second) as through:
        check_same(first, through)
        check_refused(through)
check_killed()
check_repeated()
check_gone()
check_durable()
