"""What a server's clients get of the engine's own speed: serving.py --server S --bench B --model FILE

CLIENTS chat clients, each asks again as soon as it is answered: prompts of about PROMPT tokens that
share nothing but the template, ANSWER tokens back. Compared with the time that the same tokens would
take at `bench`'s prefill and at its decode with as many sequences, measured right before and after.
The time to the first token is what the server's log says of each request: queue and prefill.

With --stream PAIRS instead: rounds of whole and of streamed answers in turn on one server. What streaming
leaves of the throughput, how long after the engine's first token its event is at the client, and the
gaps between events there. The clients are one Python process on the same cores.

With --long TOKENS: rounds without and with one more client that asks prompts of so many tokens, one after
the other, and how long the small ones then wait for their first token.
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
parser.add_argument("--stream", type=int, default=0, metavar="PAIRS")
parser.add_argument("--long", type=int, default=0, metavar="TOKENS")
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
    """Its usage, with the response's id."""
    text = " ".join(chance.choice(WORDS) for _ in range(words))
    link.request("POST", "/v1/responses", json.dumps(
        {"model": "served", "input": text, "max_output_tokens": options.answer, "temperature": 0}),
        {"Content-Type": "application/json"})
    reply = link.getresponse()
    body = json.loads(reply.read())
    assert reply.status == 200, body
    return body["usage"] | {"id": body["id"]}


def ask_stream(link, words, chance):
    """Its usage with the response's id, and when each event with text came, from the request on."""
    text, times = " ".join(chance.choice(WORDS) for _ in range(words)), []
    start = time.perf_counter()
    link.request("POST", "/v1/responses", json.dumps(
        {"model": "served", "input": text, "max_output_tokens": options.answer, "temperature": 0,
         "stream": True}), {"Content-Type": "application/json"})
    reply = link.getresponse()
    for line in reply:
        if line.startswith(b'data: {"type":"response.output_text.delta"'):
            times.append(time.perf_counter() - start)
        elif line.startswith(b'data: {"type":"response.') and b'"usage":{' in line:
            response = json.loads(line[6:])["response"]
    return response["usage"] | {"id": response["id"], "times": times}


def client(port, words, number, usages, way):
    chance = random.Random(number)
    link = http.client.HTTPConnection("127.0.0.1", port)
    for _ in range(options.requests):
        usages.append(way(link, words, chance))


def run_clients(port, words, first_number, way=ask):
    """Seconds, and what the replies say of tokens."""
    usages = []
    clients = [threading.Thread(target=client, args=(port, words, first_number + number, usages, way))
               for number in range(options.clients)]
    start = time.perf_counter()
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert len(usages) == options.clients * options.requests, "a client failed"
    return time.perf_counter() - start, usages


def with_server(work, *flags):
    """What work(port, words) gives, and the log's lines of its requests."""
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [options.server, "--model", options.model, "--threads", str(options.threads),
             "--precision", options.precision, "--alias", "served", "--parallel", str(options.clients),
             "--port", "0", "--log-json", *flags], stdout=subprocess.PIPE, stderr=log, text=True)
        port = int(re.search(r":(\d+) ", server.stdout.readline())[1])
        probe = http.client.HTTPConnection("127.0.0.1", port)
        none, many = (ask(probe, words, random.Random(0))["input_tokens"] for words in (1, 101))
        words = max(1, round((options.prompt - none) * 100 / (many - none)))
        made = work(port, words)
        server.terminate()
        server.wait()
        log.seek(0)
        lines = [json.loads(line) for line in log]
    return made, [line for line in lines if line.get("method") == "POST"][2:]


def compare_streams(port, words):
    """Of each pair the whole answers' speed, the streamed ones', and what was streamed."""
    pairs = []
    for pair in range(options.stream + 1):  # the first one warms up
        made = {}
        for way in (ask, ask_stream) if pair % 2 else (ask_stream, ask):
            seconds, usages = run_clients(port, words, 1000 * pair + 100 * (way is ask), way)
            made[way] = sum(u["output_tokens"] for u in usages) / seconds, usages
        pairs.append((made[ask][0], made[ask_stream][0], made[ask_stream][1]))
    return pairs[1:]


def first_tokens(lines):
    """Milliseconds from a request to its first token, by the response's id."""
    return {line["response"]: line["queue_ms"] + line["prefill_ms"] for line in lines if line.get("prefill_ms")}


def at(values, part):
    return values[min(len(values) - 1, int(len(values) * part))]


def beside_long(port, words):
    """The small ones' usages without and with a long prompt beside them, and how many of those there were."""
    usages, long_ones = {False: [], True: []}, 0
    for turn in range(7):
        stop = threading.Event()

        def ask_long(number):
            nonlocal long_ones
            chance, link = random.Random(number), http.client.HTTPConnection("127.0.0.1", port)
            while not stop.is_set():
                ask(link, round(words * options.long / options.prompt), chance)
                long_ones += 1
        other = threading.Thread(target=ask_long, args=(10_000 + 100 * turn,))
        if turn % 2:
            other.start()
            time.sleep(0.2)
        made = run_clients(port, words, 1000 * turn)[1]
        stop.set()
        if turn % 2:
            other.join()
        if turn:  # the first one warms up
            usages[turn % 2 == 1] += made
    return usages, long_ones


def report_long():
    (usages, long_ones), lines = with_server(beside_long)
    engine = first_tokens(lines)
    times = [sorted(engine[one["id"]] for one in usages[beside]) for beside in (False, True)]
    for name, one in zip(("alone", f"beside {long_ones} of {options.long}"), times):
        print(f"{options.clients} clients, first token {name}: {at(one, .5):.0f} ms (median), {at(one, .99):.0f} ms (p99)")
    print(f"p99 {at(times[1], .99) / at(times[0], .99):.2f} times as long")


def report_streams():
    pairs, lines = with_server(compare_streams, "--dialect", "openai")
    engine = first_tokens(lines)
    ratios = sorted(streamed / whole for whole, streamed, _ in pairs)
    streams = [one for _, _, usages in pairs for one in usages]
    late = sorted(one["times"][0] * 1e3 - engine[one["id"]] for one in streams)
    gaps = sorted((b - a) * 1e3 for one in streams for a, b in zip(one["times"], one["times"][1:]))
    print(f"{options.clients} clients, streamed: {statistics.median(ratios):.3f} of the whole answers' throughput "
          f"({ratios[0]:.3f} to {ratios[-1]:.3f} in {len(ratios)} pairs)")
    print(f"the first event comes {at(late, .5):.1f} ms after the engine's first token (median), "
          f"{at(late, .99):.1f} ms (p99); gaps between events {at(gaps, .5):.1f} ms and {at(gaps, .99):.1f} ms")


WORDS = ("river stone amber field quiet lantern copper winter orchard signal harbour "
         "meadow thunder canvas pepper ladder saddle violet marble timber").split()
if options.stream or options.long:
    report_streams() if options.stream else report_long()
    raise SystemExit
before = own_speed()
(seconds, usages), lines = with_server(lambda port, words: run_clients(port, words, 1))
fresh = sum(u["input_tokens"] - u["input_tokens_details"]["cached_tokens"] for u in usages)
out = sum(u["output_tokens"] for u in usages)
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
