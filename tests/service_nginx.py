#!/usr/bin/env python3
"""nginx in front, with the block that README shows. Every request of a client is found in nginx's log
and in the server's, joined by both ids, and has the client's address in both. Then the server is restarted
while clients ask: who was accepted gets a whole answer or 503, whoever finds nobody listening gets nginx's
502, and nothing else happens. Ends with 77 where nginx is not installed.

Usage: service_nginx.py SERVER WRITE_TINY_MODEL [REQUESTS RESTARTS]
"""
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

server, write_tiny_model = sys.argv[1:3]
nginx = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
if not nginx:
    print("nginx is not installed")
    sys.exit(77)
CLIENTS, REQUESTS = 8, 25
total, restarts = (int(sys.argv[i]) if len(sys.argv) > i else usual for i, usual in ((3, 1200), (4, 2)))

CONFIG = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 256; }}
http {{
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    {block}
}}
"""


def readme_block(changes):
    """As README shows it, with what this machine has elsewhere."""
    readme = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "README.md")
    block = re.search(r"^```nginx\n(.*?)^```$", open(readme).read(), re.S | re.M)[1]
    for here, there in changes.items():
        assert block.count(here) == 1, here
        block = block.replace(here, there)
    return block


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start_nginx(folder, port):
    for _ in range(5):
        front = free_port()
        with open(os.path.join(folder, "nginx.conf"), "w") as file:
            file.write(CONFIG.format(folder=folder, block=readme_block({
                "127.0.0.1:8080": f"127.0.0.1:{port}", "listen 80;": f"listen 127.0.0.1:{front};",
                "/var/log/nginx/valar.log": f"{folder}/access.log"})))
        process = subprocess.Popen([nginx, "-p", folder, "-c", os.path.join(folder, "nginx.conf")],
                                   stderr=subprocess.DEVNULL)
        until = time.monotonic() + 10
        while process.poll() is None and time.monotonic() < until:
            try:
                socket.create_connection(("127.0.0.1", front), 1).close()
                return process, front
            except OSError:
                time.sleep(0.02)
        process.kill()
        process.wait()
    sys.exit("nginx does not start:\n" + open(os.path.join(folder, "error.log")).read())


def client(front, number, seen, failures):
    """From an address of its own; one spoofed header in each request."""
    address = f"127.0.1.{number + 1}"
    link = http.client.HTTPConnection("127.0.0.1", front, timeout=60, source_address=(address, 0))
    try:
        for i in range(REQUESTS):
            kinds = [("GET", "/v1/models", None), ("GET", "/none", None), ("POST", "/v1/responses", "{"),
                     ("POST", "/v1/responses", '{"model":"tiny","input":"One","max_output_tokens":2}')]
            method, path, body = kinds[i % len(kinds)]
            link.request(method, path, body, {"Content-Type": "application/json", "X-Forwarded-For": "6.6.6.6"})
            reply = link.getresponse()
            reply.read()
            seen.append((reply.headers["X-Request-ID"], method, reply.status, address))
    except (OSError, http.client.HTTPException) as error:
        failures.append(repr(error))


def serve(model, port, log):
    process = subprocess.Popen([server, "--model", model, "--port", str(port), "--alias", "tiny", "--threads", "1",
                                "--log-json", "--log-file", log, "--trust-proxy"], stdout=subprocess.PIPE, text=True)
    return process, int(re.search(r":(\d+) ", process.stdout.readline())[1])


def end(process):
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    process.stdout.close()


def read_logs(folder):
    theirs = [json.loads(line) for line in open(os.path.join(folder, "access.log"))]
    ours = [line for line in map(json.loads, open(os.path.join(folder, "server.log"))) if "id" in line]
    return theirs, ours


def check_ids(folder, front):
    seen, failures = [], []
    clients = [threading.Thread(target=client, args=(front, number, seen, failures))
               for number in range(CLIENTS)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert not failures, failures
    return seen


def join_ids(folder, seen, theirs, ours):
    theirs = {line["id"]: line for line in theirs}
    ours = {line["id"]: line for line in ours}
    assert len(seen) == CLIENTS * REQUESTS, len(seen)
    for name, method, status, address in seen:
        one, other = ours[name], theirs[name]
        assert one["client_request_id"] == other["client_request_id"], (one, other)
        assert (one["method"], one["status"], one["client"]) == (method, status, address), one
        assert (other["request"].split()[0], other["status"], other["client"]) == (method, status, address), other
        assert (status == 200) != bool(one.get("code")), one


class Restarts:
    """Clients that ask and ask, while the server ends and begins."""

    def __init__(self, front):
        self.front, self.lock, self.failures = front, threading.Lock(), []
        self.counts = {"whole": 0, "refused": 0, "nobody": 0}

    def asked(self):
        return sum(self.counts.values())

    def ask(self, link, i):
        """How one request ended."""
        kind = i % 4  # a GET, an answer, a stream, an answer by way of chat
        streams = kind == 2
        if kind == 0:
            link.request("GET", "/v1/models")
        else:
            body = {"model": "tiny", "max_output_tokens": 1 + i % 9}
            body |= {"input": f"Say {i}"} if kind == 1 else {
                "messages": [{"role": "user", "content": f"Say {i}"}], "stream": streams}
            if kind > 1:
                body["max_completion_tokens"] = body.pop("max_output_tokens")
            link.request("POST", "/v1/responses" if kind == 1 else "/v1/chat/completions", json.dumps(body),
                         {"Content-Type": "application/json"})
        reply = link.getresponse()
        text = reply.read()  # raises where it ends too early
        if reply.status == 502:  # nginx's own; check_logs says whether that is right
            return "nobody"
        if reply.status == 503:
            assert json.loads(text)["error"]["code"] == "overloaded" and int(reply.headers["Retry-After"]) > 0, text
            return "refused"
        assert reply.status == 200, (reply.status, text)
        if streams:
            assert text.endswith(b"data: [DONE]\n\n"), text[-300:]
        else:
            json.loads(text)
        return "whole"

    def client(self, number):
        link = http.client.HTTPConnection("127.0.0.1", self.front, timeout=60)
        try:
            while self.asked() < total and not self.failures:
                end = self.ask(link, self.asked() + number)
                with self.lock:
                    self.counts[end] += 1
                if end != "whole":
                    time.sleep(0.02)
        except (OSError, AssertionError, http.client.HTTPException) as error:
            self.failures.append(f"client {number}: {error!r}")

    def run(self, process, model, port, log):
        clients = [threading.Thread(target=self.client, args=(number,)) for number in range(2 * CLIENTS)]
        for one in clients:
            one.start()
        for i in range(restarts):
            while self.asked() < (i + 0.5) * total / restarts and not self.failures:
                time.sleep(0.005)
            end(process)
            process, _ = serve(model, port, log)
        for one in clients:
            one.join()
        assert not self.failures, self.failures
        return process


def check_logs(folder, theirs, ours):
    """A 502 is of a request that never came to the server; nothing that came was lost."""
    came = {line["client_request_id"]: line for line in ours}
    for line in theirs:
        if line["status"] == 502:
            assert line["client_request_id"] not in came, (line, came[line["client_request_id"]])
        else:
            assert came[line["client_request_id"]]["status"] == line["status"], line
    errors = open(os.path.join(folder, "error.log")).read().splitlines()
    odd = [line for line in errors if "connect() failed (111: Connection refused)" not in line]
    assert not [line for line in odd if "[error]" in line or "[crit]" in line or "[alert]" in line], odd[:5]


with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o777)  # nginx's workers run as somebody else
    tiny, log = os.path.join(folder, "tiny.gguf"), os.path.join(folder, "server.log")
    subprocess.run([write_tiny_model, tiny], check=True)
    serving, port = serve(tiny, 0, log)
    front_process, front = start_nginx(folder, port)
    try:
        seen = check_ids(folder, front)
        again = Restarts(front)
        serving = again.run(serving, tiny, port, log)
    finally:
        front_process.send_signal(signal.SIGQUIT)
        front_process.wait(20)
        end(serving)
    theirs, ours = read_logs(folder)
    join_ids(folder, seen, theirs, ours)
    check_logs(folder, theirs, ours)
    assert again.counts["whole"] > total / 2, again.counts
    print(f"service_nginx: {len(seen)} requests of {CLIENTS} clients found in both logs; {again.asked()} requests "
          f"over {restarts} restarts: {again.counts['whole']} whole answers, {again.counts['refused']} times 503, "
          f"{again.counts['nobody']} found nobody")
