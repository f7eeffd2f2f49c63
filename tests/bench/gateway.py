#!/usr/bin/env python3
"""What a gateway adds: gateway.py GATEWAY SERVE_FAKE [SERVER MODEL]

Time of a chat's answer at a server that answers at once and through a gateway in front of it, in turn; with SERVER
and MODEL (a GGUF file) also tokens a second of 8 streams, in pairs, all on this machine: the gateway takes its time
of a processor from the model.
"""
import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time

gateway, fake = sys.argv[1:3]
ROUNDS, PAIRS, STREAMS, TOKENS = 2000, 15, 8, 96
running = []


def start(*arguments):
    """Its port."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    running.append(process)
    return int(process.stdout.readline().split(" serves ")[0].rsplit(":", 1)[-1])


def front(port):
    return start(gateway, "--port", "0", "--dialect", "openai", "--upstream", f"http://127.0.0.1:{port}", "--quiet")


def post(link, question):
    link.request("POST", "/v1/chat/completions", json.dumps(question), {"Content-Type": "application/json"})
    reply = link.getresponse()
    text = reply.read().decode()
    assert reply.status == 200, text
    return text


def delays(ports):
    links = [http.client.HTTPConnection("127.0.0.1", port) for port in ports]
    for stream in (False, True):
        question = {"model": "fake", "stream": stream, "messages": [{"role": "user", "content": "hello there"}]}
        took = [[], []]
        for _ in range(ROUNDS):
            for link, times in zip(links, took):
                began = time.perf_counter()
                post(link, question)
                times.append((time.perf_counter() - began) * 1e3)
        for name, part in (("median", 0.5), ("p99", 0.99)):
            direct, through = (sorted(times)[int(ROUNDS * part)] for times in took)
            print(f"{'streamed' if stream else 'whole'}, {name}: {direct:.2f} ms direct, {through:.2f} ms through "
                  f"the gateway, {through - direct:.2f} ms added")


def tokens_a_second(port):
    counts = []

    def one(number):
        question = {"model": "m", "stream": True, "seed": number, "max_tokens": TOKENS,
                    "stream_options": {"include_usage": True},
                    "messages": [{"role": "user", "content": f"Tell story {number}."}]}
        text = post(http.client.HTTPConnection("127.0.0.1", port), question)
        counts.append(int(re.findall(r'"completion_tokens": ?(\d+)', text)[-1]))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(STREAMS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


try:
    direct = start(fake, "0", "", "openai")
    delays((direct, front(direct)))
    if len(sys.argv) > 4:
        direct = start(sys.argv[3], "--model", sys.argv[4], "--port", "0", "--dialect", "openai", "--alias", "m",
                       "--quiet")
        tokens_a_second(direct)  # waits for the model, too: a gateway lists no model before
        through = front(direct)
        tokens_a_second(through)
        pairs = [(tokens_a_second(direct), tokens_a_second(through)) for _ in range(PAIRS)]
        ratio = statistics.median(second / first for first, second in pairs)
        print(f"{STREAMS} streams: {statistics.median(first for first, _ in pairs):.0f} tokens a second direct, "
              f"{ratio:.3f} times that through the gateway (median of {PAIRS} pairs)")
finally:
    for process in running:
        process.kill()
