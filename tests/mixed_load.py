"""Everything at once, for the sanitizers: mixed_load.py SERVE_FAKE [SECONDS [CLIENTS]]

Each client does one thing after another, drawn by its seed: asks, in the background or not, with keys
that others use too, with webhooks whose receiver is as it pleases, in batches, reads, lists, deletes, cancels,
sends nonsense, leaves in the middle. Every answer must be one that the API allows; at the end the server
must still be well and stop with code 0.
"""
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time

program = sys.argv[1]
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 60
clients = int(sys.argv[3]) if len(sys.argv) > 3 else 24
done = {}
known = [""]  # ids of late, all clients'
batches = ["batch_none"]
receiver_port = 0


async def call(port, method, target, body=b"", fields="", leave=None):
    """Status and body; None when it left before the answer, after `leave` of its bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        wire = (f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                f"Content-Length: {len(body)}\r\n{fields}\r\n").encode() + body
        writer.write(wire if leave is None else wire[:int(leave * len(wire))])
        await writer.drain()
        if leave is not None:
            return None
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        size = re.search(r"content-length: (\d+)", head, re.I)
        status = int(head.split()[1])
        return status, await reader.readexactly(int(size[1]) if size and method != "HEAD" else 0)
    finally:
        writer.close()


def question(chance, **more):
    size = chance.choice([1, 10, 100, 100_000]) if chance.random() < 0.2 else 20
    return json.dumps({"model": "fake", "input": "w" * size, **more}).encode()


JSON = "Content-Type: application/json\r\n"


async def ask(port, chance):
    background = chance.random() < 0.6
    more = {"background": True} if background else {}
    if chance.random() < 0.2:
        windows = ["asap", "standard", "flex"][:2 + background]
        more["metadata"] = {"completion_window": chance.choice(windows)}
    if chance.random() < 0.4:
        more.setdefault("metadata", {}).update(webhook(chance))
    status, body = await call(port, "POST", "/v1/responses", question(chance, **more), JSON)
    assert status in (200, 202, 503), (status, body)
    if status < 300:
        known.append(json.loads(body)["id"])
        del known[:-200]


def webhook(chance):
    url = f"http://{chance.choice(['localhost', '127.0.0.1', '[::1]'])}:{receiver_port}/"
    return {"completion_webhook": chance.choice([url, url, url, "nonsense"]), "webhook_token": "whsec_c2VjcmV0"}


async def receive(reader, writer):
    """A webhook's receiver: it answers well, badly, by halves or not at all."""
    chance = random.Random()
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"Content-Length: (\d+)", head)[1]))
        done["delivery"] = done.get("delivery", 0) + 1
        writer.write(chance.choice([b"HTTP/1.1 204 \r\n\r\n"] * 4 + [b"HTTP/1.1 500 \r\nContent-Length: 3\r\n\r\nx",
                                   b"HTTP/1.1 307 \r\nLocation: http://127.0.0.1:1/\r\n\r\n", b"nonsense\r\n", b""]))
        await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def send_batch(port, chance):
    requests = [{"custom_id": f"n{i}", "params": {"model": "fake", "input": str(i)}}
                for i in range(chance.randint(1, 90))]
    for one in requests:
        if chance.random() < 0.2:
            one["params"]["metadata"] = webhook(chance)
    body = json.dumps({"endpoint": "/v1/responses", "requests": requests}).encode()
    status, body = await call(port, "POST", "/v1/batches", body, JSON)
    assert status in (200, 503), (status, body)
    if status == 200:
        batches.append(json.loads(body)["id"])
        del batches[:-20]


async def follow_batch(port, chance):
    name = chance.choice(batches)
    method, target = chance.choice([("GET", f"/{name}"), ("GET", ""), ("GET", f"/{name}/n{chance.randrange(90)}"),
                                    ("POST", f"/{name}/cancel")])
    status, body = await call(port, method, f"/v1/batches{target}")
    assert status in (200, 404), status
    if target.startswith(f"/{name}/n") and status == 200:
        known.append(json.loads(body)["id"])


async def ask_keyed(port, chance):
    key = f"Idempotency-Key: key-{chance.randrange(50)}\r\n"
    body = b'{"model":"fake","input":"keyed","background":true}'
    if chance.random() < 0.1:
        body = question(chance)
    status, _ = await call(port, "POST", "/v1/responses", body, JSON + key)
    assert status in (200, 202, 400, 503), status


async def read(port, chance):
    path = chance.choice(["", "", "", "/input_items", "/nothing"])
    method = chance.choice(["GET", "GET", "HEAD"])
    status, _ = await call(port, method, f"/v1/responses/{chance.choice(known)}{path}")
    assert status in (200, 404), status


async def browse(port, chance):
    target = f"/v1/responses?limit={chance.randint(1, 100)}"
    for _ in range(5):
        status, body = await call(port, "GET", target)
        if status == 400 and "after=" in target:
            return  # deleted meanwhile
        page = json.loads(body)
        assert status == 200, page
        if not page["has_more"]:
            return
        target = f"/v1/responses?limit=50&after={page['last_id']}"


async def change(port, chance):
    name = chance.choice(known)
    method, target = chance.choice([("DELETE", ""), ("POST", "/cancel")])
    status, _ = await call(port, method, f"/v1/responses/{name}{target}")
    assert status in (200, 400, 404), status


async def look(port, chance):
    target = chance.choice(["/health", "/metrics", "/v1/models", "/v1/models/fake", "/v1/usage?range=7d",
                            "/v1/usage/breakdown"])
    status, _ = await call(port, "GET", target)
    assert status == 200, status


async def nonsense(port, chance):
    body = bytearray(question(chance))
    for _ in range(chance.randint(1, 4)):
        body[chance.randrange(len(body))] = chance.randrange(256)
    status, _ = await call(port, "POST", chance.choice(["/v1/responses", "/v1/nothing"]), bytes(body),
                           JSON)
    assert status in (200, 400, 404, 503), status


async def leave(port, chance):
    await call(port, "POST", "/v1/responses", question(chance), JSON, leave=chance.random() * 1.2)


async def client(port, number, stop):
    chance = random.Random(number)
    acts = [ask, ask, ask, ask_keyed, ask_keyed, read, read, browse, change, look, nonsense, leave,
            send_batch, follow_batch]
    while time.monotonic() < stop:
        act = chance.choice(acts)
        await act(port, chance)
        done[act.__name__] = done.get(act.__name__, 0) + 1


async def load(port):
    global receiver_port
    receiver = await asyncio.start_server(receive, "127.0.0.1", 0)
    receiver_port = receiver.sockets[0].getsockname()[1]
    stop = time.monotonic() + seconds
    await asyncio.gather(*(client(port, number, stop) for number in range(clients)))
    status, _ = await call(port, "GET", "/health")
    assert status == 200, status
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # of deliveries that come now


with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
    server = subprocess.Popen([program, "0", "", "valar", folder, "20"], stdout=subprocess.PIPE,
                              stderr=log)
    try:
        asyncio.run(load(int(server.stdout.readline())))
    finally:
        server.terminate()
        if server.wait(60):
            log.seek(0)
            lines = log.read().decode(errors="replace").splitlines()
            print(*(line for line in lines if not line.startswith("id=")), sep="\n")
            sys.exit(f"the server ended with {server.returncode}")
print(", ".join(f"{count} {name}" for name, count in sorted(done.items())))
