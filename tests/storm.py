"""Idempotency under a storm: storm.py SERVE_FAKE [ROUNDS [CLIENTS [KEYS]]]

Each round CLIENTS clients send KEYS requests, each under its own idempotency key and 5 times at once;
all clients use the same keys. In the middle the server is killed (-9) and started again on its store;
requests that found no answer are sent again. Then every key must have one record, terminal, and
every answer for it must have been the same bytes, those that GET shows.
"""
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile

program = sys.argv[1]
rounds, clients, keys = (int(sys.argv[i]) if len(sys.argv) > i else usual
                         for i, usual in ((2, 3), (3, 64), (4, 50)))
REPEATS = 5
KEY = "sk-storm-0123456789"


def start(folder, port):
    server = subprocess.Popen([program, str(port), KEY, "valar", folder, "5"],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return server, int(server.stdout.readline())


async def call(reader, writer, method, target, body=b"", fields=""):
    writer.write(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
                 f"Content-Length: {len(body)}\r\n{fields}\r\n".encode() + body)
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    size = int(re.search(r"content-length: (\d+)", head, re.I)[1])
    reply = await reader.readexactly(size)
    assert tempfile.gettempdir().encode() not in head.encode() + reply, (head, reply)
    return int(head.split()[1]), head, reply


async def lane(port, answers, again, given):
    """One connection that asks for every key, and asks again when the server was gone."""
    link = None
    for key in range(keys):
        body = json.dumps({"model": "fake", "input": f"question {key}"}).encode()
        while True:
            try:
                link = link or await asyncio.open_connection("127.0.0.1", port)
                status, head, reply = await call(*link, "POST", "/v1/responses", body,
                                                 f"Idempotency-Key: key-{key}\r\n")
                if status == 200:
                    answers[key].add(reply)
                    given[0] += 1
                    break
                assert status == 503, (status, reply)  # no room: nothing was reserved
            except (OSError, asyncio.IncompleteReadError):
                again[0] += 1
                link = None
            await asyncio.sleep(0.02)
    link[1].close()


async def storm(number):
    random.seed(number)
    answers, again, given = [set() for _ in range(keys)], [0], [0]
    with tempfile.TemporaryDirectory() as folder:
        server, port = start(folder, 0)
        lanes = [asyncio.ensure_future(lane(port, answers, again, given))
                 for _ in range(clients * REPEATS)]
        before = int(clients * REPEATS * keys * random.uniform(0, 0.9))
        while given[0] < before:
            await asyncio.sleep(0.001)
        given_then = given[0]
        server.kill()
        server.wait()
        server, port = start(folder, port)
        await asyncio.wait_for(asyncio.gather(*lanes), 300)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        records, after = {}, ""
        while after is not None:
            page = json.loads((await call(reader, writer, "GET", f"/v1/responses?limit=100{after}"))[2])
            records |= {entry["id"]: entry["status"] for entry in page["data"]}
            after = f"&after={page['last_id']}" if page["has_more"] else None
        assert again[0] > 0, "the kill came too late"
        assert set(records.values()) == {"completed"}, records
        assert len(records) == keys, f"{len(records)} records for {keys} keys"
        for key, bodies in enumerate(answers):
            assert len(bodies) == 1, f"key {key}: {len(bodies)} different answers"
            [body] = bodies
            name = json.loads(body)["id"]
            assert (await call(reader, writer, "GET", f"/v1/responses/{name}"))[2] == body, name
        writer.close()
        server.kill()
        server.wait()
    print(f"round {number}: killed after {given_then} answers, {again[0]} requests found nobody", flush=True)


for number in range(rounds):
    asyncio.run(storm(number))
print(f"storm.py: {rounds} rounds of {clients} clients x {keys} keys x {REPEATS}: one record and one "
      "answer a key")
