#!/usr/bin/env python3
"""Backups of a store at work: `--backup` again and again while clients add and delete responses in small
segments, once beside a server that was killed (-9). Each copy is served: it opens, and what was
acknowledged before the backup began is there as it was, what was deleted before is not. Then
directories that cannot be used.

Usage: service_backup.py SERVER WRITE_TINY_MODEL [SECONDS [PAUSE]]
"""
import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

server, write_tiny_model = sys.argv[1:3]
seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 2.5
pause = float(sys.argv[4]) if len(sys.argv) > 4 else 0.25
CLIENTS, KEPT = 6, 12  # responses that a client keeps before it deletes its oldest


def serve(model, store, log, *more):
    process = subprocess.Popen([server, "--model", model, "--alias", "tiny", "--port", "0", "--store", store,
                                "--threads", "1", "--log-file", log, *more], stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{store} does not open:\n" + open(log).read())
    return process, int(re.search(r":(\d+) ", line)[1])


def end(process, number=signal.SIGTERM):
    process.send_signal(number)
    process.wait(30)
    process.stdout.close()


def call(link, method, path, body=None):
    link.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
    reply = link.getresponse()
    return reply.status, reply.read()


class Told:
    """What the server acknowledged: by id the text of the answer (None: only accepted)."""

    def __init__(self):
        self.lock = threading.Lock()
        self.texts, self.leaving, self.gone = {}, set(), set()
        self.added = self.deleted = 0

    def snapshot(self):
        with self.lock:
            alive = {name: text for name, text in self.texts.items() if name not in self.leaving}
            return alive, set(self.gone)


def client(number, port, told, over, failures):
    chance, mine, link = random.Random(number), [], None
    while not over.is_set():
        try:
            link = link or http.client.HTTPConnection("127.0.0.1", port[0], timeout=30)
            background = chance.random() < 0.3
            status, body = call(link, "POST", "/v1/responses",
                                {"model": "tiny", "input": "x" * chance.randrange(1, 400), "max_output_tokens": 1,
                                 "background": background})
            assert status in (200, 202, 503), (status, body)
            if status == 503:  # it stops
                continue
            one = json.loads(body)
            with told.lock:
                told.texts[one["id"]] = None if background else body
                told.added += 1
            mine.append(one["id"])
            if len(mine) <= KEPT:
                continue
            oldest = mine.pop(0)
            with told.lock:
                told.leaving.add(oldest)
            status, body = call(link, "DELETE", f"/v1/responses/{oldest}")
            assert status in (200, 404), (status, body)  # 404: a try before was not answered
            with told.lock:
                told.gone.add(oldest)
                del told.texts[oldest]
                told.deleted += 1
        except (OSError, http.client.HTTPException):  # it was killed
            link = None
            time.sleep(0.02)
        except BaseException as error:  # noqa: BLE001: told below
            failures.append(f"client {number}: {error!r}")
            return


def back_up(store, copy):
    began = time.monotonic()
    done = subprocess.run([server, "--store", store, "--backup", copy], capture_output=True, text=True)
    return done, time.monotonic() - began


def check(copy, model, folder, alive, gone, left):
    """`left`: ids whose deletion was asked for while the backup ran."""
    process, port = serve(model, copy, os.path.join(folder, "copy.log"))
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    found, after = set(), ""
    while True:
        status, body = call(link, "GET", f"/v1/responses?limit=100{after}")
        assert status == 200, (status, body)
        page = json.loads(body)
        found |= {one["id"] for one in page["data"]}
        if not page["has_more"]:
            break
        after = "&after=" + page["last_id"]
    missing = set(alive) - found - left
    assert not missing, f"{copy}: {len(missing)} of {len(alive)} acknowledged responses are missing"
    assert not found & gone, f"{copy}: {len(found & gone)} deleted responses are back"
    for name in random.sample(sorted(set(alive) & found), min(40, len(set(alive) & found))):
        status, body = call(link, "GET", f"/v1/responses/{name}")
        assert status == 200, (status, body)
        assert alive[name] in (None, body), (alive[name], body)
    link.close()
    end(process)
    log = open(os.path.join(folder, "copy.log")).read()
    assert not re.search(r"damage|recovery|torn|journal", log), log
    os.remove(os.path.join(folder, "copy.log"))
    shutil.rmtree(copy)
    return len(found)


def under_load(folder, model):
    store, log = os.path.join(folder, "store"), os.path.join(folder, "server.log")
    small = ("--segment-bytes", "65536", "--quiet")
    process, number = serve(model, store, log, *small)
    port, told, over, failures = [number], Told(), threading.Event(), []
    clients = [threading.Thread(target=client, args=(i, port, told, over, failures)) for i in range(CLIENTS)]
    for one in clients:
        one.start()
    began, count, took, held, killed = time.monotonic(), 0, [], [], False
    try:
        while time.monotonic() < began + seconds and not failures:
            due = time.monotonic() + pause
            if killed is False and time.monotonic() > began + seconds / 2:
                end(process, signal.SIGKILL)  # in the middle of the load; the next copy is made beside nobody
                killed = True
            alive, gone = told.snapshot()
            copy = os.path.join(folder, f"copy{count}")
            done, one = back_up(store, copy)
            assert done.returncode == 0, done.stderr
            with told.lock:
                left = set(told.leaving)
            if killed is True:
                process, port[0] = serve(model, store, log, *small)
                killed = "again"
            took.append(one)
            held.append(check(copy, model, folder, alive, gone, left))
            count += 1
            time.sleep(max(0, due - time.monotonic()))
    finally:
        over.set()
        for one in clients:
            one.join()
        end(process)
    assert not failures, failures[0]
    assert killed == "again" and count >= 3 and told.deleted > 0, (killed, count, told.added, told.deleted)
    segments = sorted(name for name in os.listdir(store) if name.endswith((".journal", ".copy")))
    print(f"service_backup: {count} copies beside {told.added} responses and {told.deleted} deletions in "
          f"{time.monotonic() - began:.0f} s, the newest segment is {segments[-1]}; a copy took "
          f"{sorted(took)[len(took) // 2]:.2f} s (median), {max(took):.2f} s at most, and held {max(held)} responses")
    return store


def refusals(folder, store):
    def refused(words, copy, of=store):
        done, _ = back_up(of, copy)
        assert done.returncode == 1 and words in done.stderr, (words, done)

    def path(name):
        return os.path.join(folder, name)

    open(path("file"), "w").close()
    os.mkdir(path("used"))
    open(path("used/notes"), "w").close()
    os.mkdir(path("empty"))
    refused("'notes' is there", path("used"))
    refused("is not a directory", path("file"))
    refused("the directory that is to hold it is missing", path("none/copy"))
    refused("holds no store", path("copy"), path("empty"))
    refused("is not a directory", path("copy2"), path("none"))
    assert not os.path.exists(path("copy2")) and not os.path.exists(path("none"))
    done, _ = back_up(store, path("empty"))  # one that is there, and empty
    assert done.returncode == 0, done.stderr
    refused("is not empty", path("empty"))  # no copy is written over
    alone = subprocess.run([server, "--backup", path("copy3")], capture_output=True, text=True)
    assert alone.returncode == 1 and "--backup: needs --store DIR" in alone.stderr, alone
    if os.geteuid() != 0:
        os.mkdir(path("closed"), 0o500)
        refused("may not be written by this user", path("closed"))
    if subprocess.run(["unshare", "-rm", "true"], stderr=subprocess.DEVNULL).returncode:
        return print("no small disk here: mounting is not allowed")
    script = ('mount -t tmpfs -o size="$3" tmpfs "$1" && { [ "$3" = 16k ] || mount -o remount,ro "$1"; } && '
              '{ "$0" --store "$2" --backup "$1"; code=$?; ls -A "$1"; exit $code; }')
    for size, words in (("16k", "No space left on device"), ("17k", "lies on a read-only file system")):
        os.mkdir(path(size))
        full = subprocess.run(["unshare", "-rm", "sh", "-c", script, server, path(size), store, size],
                              capture_output=True, text=True)
        assert full.returncode == 1 and words in full.stderr, full
        assert full.stdout.split() in ([], ["lock"]), full  # nothing is left that looks like a copy


with tempfile.TemporaryDirectory() as folder:
    tiny = os.path.join(folder, "tiny.gguf")
    subprocess.run([write_tiny_model, tiny], check=True)
    refusals(folder, under_load(folder, tiny))
