"""What a server's clients get of the engine's own speed: serving.py --server S --bench B --model FILE

CLIENTS chat clients, each asks again as soon as it is answered: prompts of about PROMPT tokens that
share nothing but the template, ANSWER tokens back. Compared with the time that the same tokens would
take at `bench`'s prefill and at its decode with as many sequences, measured right before and after.
The time to the first token is what the server's log says of each request: queue and prefill.
"""
import argparse
import http.client
import json
import random
import re
import statistics
import subprocess
import tempfile
import threading
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--server", required=True)
parser.add_argument("--bench", required=True)
parser.add_argument("--model", required=True)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--clients", type=int, default=16)
parser.add_argument("--requests", type=int, default=3, help="of each client")
parser.add_argument("--prompt", type=int, default=150)
parser.add_argument("--answer", type=int, default=64)
parser.add_argument("--precision", default="fast")
options = parser.parse_args()


def own_speed():
    """Tokens a second of prefill, and of decode with `clients` sequences."""
    out = subprocess.run(
        [options.bench, "--model", options.model, "--threads", str(options.threads), "--prompt", "512",
         "--decode", str(options.answer), "--columns", str(options.clients), "--repeat", "2",
         "--stream-mib", "0", "--precision", options.precision, "--json"],
        capture_output=True, text=True, check=True).stdout
    results = json.loads(out)["results"]
    prefill = next(one for one in results if one["test"] == "prefill" and one["tokens"] == 512)
    decode = next(one for one in results
                  if one["test"] == "decode" and one["columns"] == options.clients)
    return prefill["tokens_per_second"], decode["tokens_per_second"]


def ask(link, words, chance):
    text = " ".join(chance.choice(WORDS) for _ in range(words))
    link.request("POST", "/v1/responses", json.dumps(
        {"model": "served", "input": text, "max_output_tokens": options.answer, "temperature": 0}),
        {"Content-Type": "application/json"})
    reply = link.getresponse()
    body = json.loads(reply.read())
    assert reply.status == 200, body
    return body["usage"]


def client(port, words, number, usages):
    chance = random.Random(number)
    link = http.client.HTTPConnection("127.0.0.1", port)
    for _ in range(options.requests):
        usages.append(ask(link, words, chance))


def serve_all():
    """Seconds, tokens in, tokens out, and the log's lines."""
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [options.server, "--model", options.model, "--threads", str(options.threads - 1),
             "--precision", options.precision, "--alias", "served", "--parallel", str(options.clients),
             "--port", "0", "--log-json"], stdout=subprocess.PIPE, stderr=log, text=True)
        port = int(re.search(r":(\d+) ", server.stdout.readline())[1])
        probe = http.client.HTTPConnection("127.0.0.1", port)
        none, many = (ask(probe, words, random.Random(0))["input_tokens"] for words in (1, 101))
        words = max(1, round((options.prompt - none) * 100 / (many - none)))
        usages = []
        clients = [threading.Thread(target=client, args=(port, words, 1 + number, usages))
                   for number in range(options.clients)]
        start = time.perf_counter()
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        seconds = time.perf_counter() - start
        server.terminate()
        server.wait()
        log.seek(0)
        lines = [json.loads(line) for line in log if line.startswith("{")]
    assert len(usages) == options.clients * options.requests, "a client failed"
    fresh = sum(u["input_tokens"] - u["input_tokens_details"]["cached_tokens"] for u in usages)
    return seconds, fresh, sum(u["output_tokens"] for u in usages), lines[2:]


WORDS = ("river stone amber field quiet lantern copper winter orchard signal harbour "
         "meadow thunder canvas pepper ladder saddle violet marble timber").split()
before = own_speed()
seconds, fresh, out, lines = serve_all()
after = own_speed()
prefill, decode = ((one + other) / 2 for one, other in zip(before, after))
first = [(line["queue_ms"] + line["prefill_ms"]) / 1e3 for line in lines]
burst, later = sorted(first[:options.clients]), sorted(first[options.clients:])
print(f"{options.clients} clients: {fresh} prompt tokens and {out} generated in {seconds:.1f} s, "
      f"{out / seconds:.0f} generated a second")
print(f"the engine alone: prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s; the clients get "
      f"{(fresh / prefill + out / decode) / seconds:.0%} of both together")
for name, times in ("when all come at once", burst), ("later", later):
    if times:
        print(f"first token {name}: {statistics.median(times):.2f} s (median), {times[-1]:.2f} s (longest)")
