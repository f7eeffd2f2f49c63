"""What connections, slow clients and large bodies cost the server: server_load.py SERVE_FAKE [PEER]

SERVE_FAKE is tests/serve_fake, PEER a build of httplib_peer.cpp. Needs `wrk`. VALAR_STORE_DIR names a
folder on a real disk, for what is stored. Prints a table of what was measured beside the bar that we
set; the last line says how many fell short.
"""
import asyncio
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time

IDLE, DRIP, BIG = 5_000, 2_000, 30 << 20
short = 0


def row(name, value, bar, good):
    global short
    short += not good
    print(f"{name:52} {value:>16}   {bar:16} {'ok' if good else 'SHORT'}", flush=True)


def serve(program, *args):
    process = subprocess.Popen([program, *args], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return process, int(process.stdout.readline())


def resident_bytes(pid):
    text = open(f"/proc/{pid}/status", encoding="ascii").read()
    return int(re.search(r"RssAnon:\s+(\d+)", text)[1]) * 1024


def ask(port, target="/health"):
    """Seconds to the whole answer on a new connection."""
    start = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        reply = b""
        while chunk := peer.recv(65536):
            reply += chunk
    assert reply.startswith(b"HTTP/1.1 200"), reply[:80]
    return time.perf_counter() - start


def post(port, body):
    peer = socket.create_connection(("127.0.0.1", port))
    peer.sendall(f"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 f"Content-Length: {len(body)}\r\n\r\n".encode())
    return peer


def p99(times):
    return sorted(times)[int(len(times) * 0.99)]


def idle(program):
    server, port = serve(program)
    ask(port)
    before = resident_bytes(server.pid)
    peers = [socket.create_connection(("127.0.0.1", port)) for _ in range(IDLE)]
    for peer in peers:
        peer.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    for peer in peers:
        peer.recv(65536)
    time.sleep(0.5)
    each = (resident_bytes(server.pid) - before) / IDLE
    worst = max(ask(port) for _ in range(100))
    row(f"{IDLE} idle connections: bytes each", f"{each:.0f}", "<= 1024", each <= 1024)
    row("a new client beside them, worst of 100", f"{worst * 1e3:.1f} ms", "<= 10 ms", worst <= 0.01)
    for peer in peers:
        peer.close()
    server.kill()


async def drip(program):
    server, port = serve(program)
    cut = []

    async def client():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        start = time.perf_counter()
        reply = asyncio.ensure_future(reader.read(100))
        for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: yyyyyyyyyyyyyyyyyyyyyyy":
            if reply.done():
                break
            writer.write(bytes([byte]))
            await asyncio.wait([reply], timeout=1)
        assert (await reply).startswith(b"HTTP/1.1 408"), await reply
        cut.append(time.perf_counter() - start)
        writer.close()

    clients = [asyncio.ensure_future(client()) for _ in range(DRIP)]
    await asyncio.sleep(3)
    times = [await asyncio.to_thread(ask, port) for _ in range(200)]
    await asyncio.gather(*clients)
    row(f"a client beside {DRIP} that drip, p99 of 200", f"{p99(times) * 1e3:.1f} ms", "<= 20 ms",
        p99(times) <= 0.02)
    row("the dripping are cut after, last", f"{max(cut):.1f} s", "10 s timeout", max(cut) < 12.5)
    server.kill()


def large(program):
    server, port = serve(program)
    body = b'{"model":"fake","input":"' + b"w" * BIG + b'"}'
    times, stop = [], time.perf_counter() + 8
    submitted = 0
    peer = None
    while time.perf_counter() < stop:
        if peer is None:
            peer, view = post(port, body), memoryview(body)
            peer.setblocking(False)
        try:
            if view:
                view = view[peer.send(view[:1 << 20]):]
            else:
                peer.recv(1 << 20)  # the answer begins; its rest is not wanted
                submitted += 1
                peer.close()
                peer = None
        except BlockingIOError:
            pass
        times.append(ask(port))
    row(f"GET /health beside {submitted} bodies of 30 MB, p99", f"{p99(times) * 1e3:.1f} ms", "< 20 ms",
        p99(times) < 0.02)
    server.kill()


def sync_rate(folder):
    """How many 1 KB appends a second this disk makes durable, one after another."""
    with open(os.path.join(folder, "probe"), "wb", buffering=0) as file:
        count, stop = 0, time.perf_counter() + 1
        while time.perf_counter() < stop:
            file.write(bytes(1024))
            os.fdatasync(file.fileno())
            count += 1
    return count


def background(program):
    """Background requests on a FileStore: each is synced before it is acknowledged."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("VALAR_STORE_DIR")) as folder:
        syncs = sync_rate(folder)
        server, port = serve(program, "0", "", "valar", os.path.join(folder, "store"))
        body = '{"model":"fake","input":"' + "x" * 500 + '","background":true}'
        script = os.path.join(folder, "post.lua")
        with open(script, "w", encoding="ascii") as file:
            file.write(f"wrk.method = 'POST' wrk.body = '{body}' "
                       "wrk.headers['Content-Type'] = 'application/json'")
        out = wrk(port, "/v1/responses", "-s", script)
        assert "Non-2xx" not in out, out
        count = int(re.search(r"(\d+) requests in", out)[1])
        acknowledged = float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1])
        time.sleep(2)  # the last are finished
        peer = socket.create_connection(("127.0.0.1", port))
        peer.sendall(b"GET /v1/responses?limit=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        last = re.search(r"resp_\w+", peer.recv(65536).decode())[0]
        peer.sendall(f"GET /v1/responses/{last} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        reply = peer.recv(65536).decode().split("\r\n\r\n", 1)[1]
        assert '"status":"completed"' in reply, reply
        store = os.path.join(folder, "store")
        journal = sum(os.path.getsize(os.path.join(store, name)) for name in os.listdir(store))
        payload = count * (len(body) + len(reply))
        row(f"background requests, 64 connections ({count})", f"{acknowledged:.0f}/s", ">= 5000/s",
            acknowledged >= 5000)
        row("this disk's own syncs", f"{syncs}/s", "", True)
        row("the journal to what was asked and answered", f"{journal / payload:.2f}", "<= 1.2",
            journal <= 1.2 * payload)
        server.kill()
        server.wait()


def wrk(port, target, *args):
    return subprocess.run(["wrk", "-t1", "-c64", "-d4", "--latency", *args,
                           f"http://127.0.0.1:{port}{target}"],
                          capture_output=True, text=True, check=True).stdout


def rate(port, target):
    out = wrk(port, target)
    value, unit = re.search(r"99%\s+([\d.]+)(us|ms|s)", out).groups()
    return (float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]),
            float(value) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit])


def rates(program, peer_program):
    server, port = serve(program)
    body = b'{"model":"fake","input":"' + b"x" * 60 + b'"}'
    peer = post(port, body)
    peer.sendall(body)
    reply = peer.recv(65536).decode()
    target = "/v1/responses/" + re.search(r"resp_\w+", reply)[0]
    size = len(reply.split("\r\n\r\n", 1)[1])
    peer_server, peer_port = serve(peer_program)
    pairs = [(rate(port, target), rate(peer_port, "/1k")) for _ in range(3)]
    ratios = sorted(ours[0] / theirs[0] for ours, theirs in pairs)
    worst = sorted(ours[1] for ours, _ in pairs)[1]
    ours, theirs = sorted(pairs)[1]
    row(f"GET of a response ({size} bytes), 64 connections", f"{ours[0]:.0f}/s", "", True)
    row("cpp-httplib, 1 KB", f"{theirs[0]:.0f}/s", "", True)
    row("ratio, median of 3 turns", f"{ratios[1]:.2f}", ">= 1.2", ratios[1] >= 1.2)
    row("p99", f"{worst:.2f} ms", "< 3 ms", worst < 3)
    server.kill()
    peer_server.kill()


resource.setrlimit(resource.RLIMIT_NOFILE, (20_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
idle(sys.argv[1])
asyncio.run(drip(sys.argv[1]))
large(sys.argv[1])
background(sys.argv[1])
if len(sys.argv) > 2:
    rates(sys.argv[1], sys.argv[2])
print(f"{short} fell short")
