#!/usr/bin/env python3
"""Which addresses a server calls: service_addresses.py SERVE_FAKE

In a network namespace of its own, whose only device is the loopback and takes every address there is, with a
name server of the test's: 120 webhooks and more lead to private networks, to this machine, to metadata services,
by address, by embedded address, in odd spellings, by name. Not one connection is made. A name that answers
with another address at each question is judged at each; of several addresses only a global one is called.
"""
import http.client
import http.server
import ipaddress
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

PORT, PUBLIC, KEY = 8081, "93.184.216.34", "sk-addresses-0123456789"

REFUSED = """0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.254 127.0.0.1 127.0.0.2 127.255.255.254
    169.254.169.254 169.254.0.1 172.16.0.1 172.31.255.254 192.0.0.1 192.0.0.170 192.0.2.1 192.31.196.1 192.52.193.1
    192.88.99.1 192.168.0.1 192.168.255.254 192.175.48.1 198.18.0.1 198.19.255.254 198.51.100.1 203.0.113.1
    224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255
    [::] [::1] [::2] [fc00::1] [fd12:3456:789a::1] [fe80::1] [fec0::1] [ff02::1] [ff0e::1] [100::1] [2001:db8::1]
    [2001:10::1] [2001:20::1] [2001:2::1] [3fff::1] [5f00::1] [4000::1] [e000::1] [2620:4f:8000::1]""".split()
INSIDE = "127.0.0.1 10.0.0.1 169.254.169.254 192.168.1.1 172.16.0.1".split()
SPELLINGS = """2130706433 017700000001 0x7f000001 0x7F.0.0.1 0x7f.1 0177.0.0.1 0177.0.0.01 127.1 127.0.1 127.0.0.1.
    127.000.000.001 127.0.0.01 127.0.0.1.0 0 0x0 0.0 1 127.0.0.256 256.0.0.1 127.0.0.1%20 127.0.0.1%00 %31%32%37.0.0.1
    127%2e0%2e0%2e1 127.0.0.1,a.test [::1 ::1 [::1]] [[::1]] [::1%25lo] [::1%lo] [0:0:0:0:0:0:0:1] [::0001]
    [127.0.0.1] [0x7f.1] a..test .a.test a.test.. a_b.0x7f 1.2.3.4.5""".split()
AROUND = [f"http://public.test@127.0.0.1:{PORT}/", f"http://127.0.0.1:{PORT}@public.test/", "http://a:b@public.test/",
          f"http://127.0.0.1:{PORT}\\@public.test/", "http://public.test\\.a.test/", f"http:\\\\127.0.0.1:{PORT}\\",
          f"http://public.test\r\nHost: 127.0.0.1:{PORT}/", "http://public.test/\r\nX: y", "http://public.test/a b",
          f"http://\t127.0.0.1:{PORT}/", f" http://127.0.0.1:{PORT}/", f"http:127.0.0.1:{PORT}/", "http:/127.0.0.1/",
          "http:///127.0.0.1/", "http://", f"//127.0.0.1:{PORT}/", f"ftp://127.0.0.1:{PORT}/", "file:///etc/passwd",
          f"gopher://127.0.0.1:{PORT}/_x", "unix:/run/x.sock", f"https://127.0.0.1:{PORT}/", "http://public.test:0/",
          "http://public.test:65536/", "http://public.test:x/", "http://public.test:80:81/", "http://\u2460.test/",
          "http://\uff11\uff12\uff17.0.0.1/", f"http://127\u30020.0.1:{PORT}/", "http://public.test/\u00e4", "x"]
# What the name server says: the answers to one question after the other, the last for good.
NAMES = {"public.test": [[PUBLIC]], "mixed.test": [["127.0.0.1", PUBLIC, "10.0.0.1"]],
         "turns.test": [[PUBLIC], ["127.0.0.1"]], "private.test": [["10.0.0.1"]],
         "metadata.test": [["169.254.169.254"]], "loopback.test": [["127.0.0.1"]], "all.test": [["10.0.0.1", "127.0.0.1", "192.168.1.1", "::1", "fc00::1"]],
         "six.test": [["::1"]], "local.test": [["fe80::1"]], "unique.test": [["fd00::1"]], "zero.test": [["0.0.0.0"]],
         "mapped.test": [["::ffff:127.0.0.1"]], "nat64.test": [["64:ff9b::7f00:1"]], "6to4.test": [["2002:7f00:1::1"]],
         "teredo.test": [["2001::80ff:fffe"]], "broadcast.test": [["255.255.255.255"]]}


def embedded(inside):
    """The ways to write an IPv4 address into an IPv6 one."""
    number = int(ipaddress.IPv4Address(inside))
    high, low = number >> 16, number & 0xFFFF
    return [f"[::ffff:{inside}]", f"[::ffff:{high:x}:{low:x}]", f"[::{high:x}:{low:x}]", f"[64:ff9b::{high:x}:{low:x}]",
            f"[64:ff9b:1::{high:x}:{low:x}]", f"[2002:{high:x}:{low:x}::1]",
            f"[2001:0:1:2:3:4:{high ^ 0xFFFF:x}:{low ^ 0xFFFF:x}]", f"[fe80::5efe:{high:x}:{low:x}]"]


def hostile():
    hosts = REFUSED + [one for inside in INSIDE for one in embedded(inside)] + SPELLINGS
    hosts += ["localhost", "LOCALHOST", *(name for name, turns in NAMES.items() if PUBLIC not in turns[0])]
    return [f"http://{host}:{PORT}/" for host in hosts] + AROUND


def enter(script):
    """Runs this script again where there is no network but its own."""
    entered = os.environ.get("VALAR_NAMESPACE")
    if entered is None:
        again = ["unshare", "--net", "--mount", "--", "true"]
        try:
            able = subprocess.run(again, stderr=subprocess.DEVNULL).returncode == 0
        except OSError:
            able = False
        if not able:
            print("skipped: no network namespaces here")
            sys.exit(77)
        os.environ["VALAR_NAMESPACE"] = os.readlink("/proc/self/ns/net")
        os.execvp("unshare", again[:-1] + [sys.executable, *script])
    assert os.readlink("/proc/self/ns/net") != entered
    run = lambda *words: subprocess.run(words, check=True)  # noqa: E731
    run("ip", "link", "set", "lo", "up")
    assert [name for _, name in socket.if_nameindex()] == ["lo"]
    run("ip", "route", "add", "local", "0.0.0.0/0", "dev", "lo")
    run("ip", "-6", "route", "add", "local", "::/0", "dev", "lo")
    for path, text in (("/etc/resolv.conf", "nameserver 127.0.0.53\noptions attempts:1\n"),
                       ("/etc/nsswitch.conf", "hosts: files dns\n"),
                       ("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")):
        with tempfile.NamedTemporaryFile("w", delete=False) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        run("mount", "--bind", file.name, path)
        os.unlink(file.name)


class Names:
    """The name server. `asked`: how often for a name's IPv4 addresses."""

    def __init__(self):
        self.asked = {}
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.53", 53))
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            question, peer = self.socket.recvfrom(512)
            self.socket.sendto(self.answer(question), peer)

    def answer(self, question):
        labels, at = [], 12
        while question[at]:
            labels.append(question[at + 1:at + 1 + question[at]].decode())
            at += 1 + question[at]
        name, kind = ".".join(labels).lower(), struct.unpack(">H", question[at + 1:at + 3])[0]
        turns = NAMES.get(name, [[]])
        turn = self.asked.get(name, 0)
        if kind == 1:
            self.asked[name] = turn + 1
        packed = [ipaddress.ip_address(one).packed for one in turns[min(turn, len(turns) - 1)]]
        size = {1: 4, 28: 16}.get(kind)
        packed = [one for one in packed if len(one) == size]
        head = question[:2] + struct.pack(">HHHHH", 0x8180 if name in NAMES else 0x8183, 1, len(packed), 0, 0)
        rows = b"".join(struct.pack(">HHHIH", 0xC00C, kind, 1, 0, len(one)) + one for one in packed)
        return head + question[12:at + 5] + rows


class Handler(http.server.BaseHTTPRequestHandler):
    """Tells where each connection went to."""
    made, script = [], {}

    def setup(self):
        Handler.made.append(self.request.getsockname()[0].removeprefix("::ffff:"))
        super().setup()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.script.get(self.path, 200))
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.close_connection = True

    def log_message(self, *_):
        pass


class Everywhere(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6  # and IPv4, mapped
    daemon_threads = True


def wait_for(what, seconds=30):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def call(port, method, path, body=None):
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    link.request(method, path, json.dumps(body) if body else None, {"Authorization": f"Bearer {KEY}"})
    reply = link.getresponse()
    data = reply.read()
    link.close()
    assert reply.status == 200, (reply.status, data)
    return data.decode()


def check(port):
    def post(url):
        call(port, "POST", "/v1/responses", {"model": "fake", "input": "x", "metadata": {"completion_webhook": url}})

    def ended(outcome):
        found = re.search(rf'valar_webhooks_total{{outcome="{outcome}"}} (\d+)', call(port, "GET", "/metrics"))
        return int(found[1]) if found else 0

    urls = hostile()
    assert len(urls) >= 120 and len(set(urls)) == len(urls), len(urls)
    for url in urls:
        post(url)
    wait_for(lambda: ended("refused") == len(urls))
    assert not Handler.made, f"{Handler.made} were called"
    # the same server calls what it may
    names = Names.here.asked
    post(f"http://{PUBLIC}:{PORT}/")
    post(f"http://public.test:{PORT}/")
    post(f"http://mixed.test:{PORT}/")
    wait_for(lambda: ended("delivered") == 3)
    assert Handler.made == [PUBLIC] * 3, Handler.made
    # what a name said once is no word for the next try
    Handler.script["/again"] = 503
    post(f"http://turns.test:{PORT}/again")
    wait_for(lambda: ended("refused") == len(urls) + 1)
    assert Handler.made == [PUBLIC] * 4 and names["turns.test"] == 2, (Handler.made, names)
    print(f"service_addresses.py: {len(urls)} hostile URLs, no connection; {len(Handler.made)} good ones")


enter(sys.argv)
Names.here = Names()
for listener in (Everywhere(("::", at), Handler) for at in (PORT, 80, 443)):
    threading.Thread(target=listener.serve_forever, daemon=True).start()
server = subprocess.Popen([sys.argv[1], "0", KEY], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
try:
    check(int(server.stdout.readline()))
finally:
    server.kill()
    server.wait()
