"""Metrics that tools accept: service_metrics.py SERVE_FAKE SOURCE_DIR

GET /metrics holds the rules of Prometheus' text format, its counters only grow, its histograms add up,
README lists what it has and the dashboard of examples/deploy shows it all. Where they are installed,
Prometheus' own Python parser reads it, too, `promtool` finds nothing in it nor in the dashboard's queries, and
Grafana's own types hold the whole dashboard.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

program, source = sys.argv[1:3]
SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:\w+="[^"\\\n]*",?)*)\})? (\S+)')
PARTS = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}


def call(port, path, body=None):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()


def families(text):
    """{name: (type, help, {(sample, labels): value})}, each family in one piece."""
    assert text.endswith("\n") and "\r" not in text
    found, name = {}, ""
    for line in text.splitlines():
        head = re.fullmatch(r"# (HELP|TYPE) (\S+) (\S.*)", line)
        if head and head[1] == "HELP":
            name = head[2]
            assert name not in found, f"{name} comes twice"
            found[name] = ["", head[3], {}]
        elif head:
            assert head[2] == name and head[3] in PARTS and not found[name][0], line
            found[name][0] = head[3]
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample, line
            kind, _, values = found[name]
            assert sample[1] in [name + part for part in PARTS[kind]], line
            labels = tuple(sorted(re.findall(r'(\w+)="([^"]*)"', sample[2] or "")))
            assert (sample[1], labels) not in values, line
            values[sample[1], labels] = float(sample[3])
    return found


def check_names(found):
    for name, (kind, text, _) in found.items():
        assert re.fullmatch(r"valar_[a-z_]+", name) and text.endswith("."), name
        assert name.endswith("_total") == (kind == "counter"), name
        if kind == "histogram":
            assert name.endswith("_seconds"), name


def check_histograms(found):
    count = 0
    for name, (kind, _, values) in found.items():
        if kind != "histogram":
            continue
        count += 1
        buckets = [(float(dict(labels)["le"]), value) for (sample, labels), value in values.items()
                   if sample == name + "_bucket"]
        assert buckets == sorted(buckets) and [b[1] for b in buckets] == sorted(b[1] for b in buckets)
        assert buckets[-1] == (float("inf"), values[name + "_count", ()]), name
    return count


def check_growth(before, after):
    for name, (kind, _, values) in before.items():
        for key, value in values.items():
            if kind != "gauge":
                assert after[name][2][key] >= value, (name, key)
    requests = ("valar_http_requests_total", (("route", "/v1/responses"), ("status", "200")))
    grown = after[requests[0]][2][requests] - before[requests[0]][2][requests]
    assert grown == 5, grown
    for name in ("valar_response_queue_seconds", "valar_response_first_token_seconds"):
        assert after[name][2][name + "_count", ()] - before[name][2][name + "_count", ()] == 5, name


def check_readme(found):
    rows = "\n".join(f"| `{name}` | {kind} | {text} |" for name, (kind, text, _) in found.items())
    with open(os.path.join(source, "README.md"), encoding="utf-8") as file:
        assert rows in file.read(), "README's table of metrics is not:\n" + rows


def dashboard():
    """It, and its queries, as Prometheus gets them."""
    with open(os.path.join(source, "examples", "deploy", "grafana.json"), encoding="utf-8") as file:
        board = json.load(file)
    charts = [panel for panel in board["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in charts for target in panel["targets"]]
    queries += [one["expr"] for one in board["annotations"]["list"]]
    return board, [one.replace("$__rate_interval", "5m") for one in queries]


def check_dashboard(found):
    board, queries = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(x, y) for panel in panels for at in [panel["gridPos"]]
              for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])]
    assert len(set(places)) == len(places) and max(x for x, _ in places) < 24, "panels overlap"
    shown = set(re.findall(r"valar_\w+", " ".join(queries)))
    shown |= set(re.findall(r"valar_\w+", json.dumps(board["templating"])))
    samples = {name + (part if kind != "histogram" else "_bucket"): kind
               for name, (kind, _, _) in found.items() for part in PARTS[kind]}
    assert shown == set(samples), shown ^ set(samples)
    for query in queries:
        for name in re.findall(r"valar_\w+", query):  # what only grows is shown by its rate
            assert (f"rate({name}{{" in query) == (samples[name] != "gauge"), query


def check_dashboard_by_tools():
    used = []
    board, queries = dashboard()
    try:
        from grafana_foundation_sdk.cog.encoder import JSONEncoder
        from grafana_foundation_sdk.models.dashboard import Dashboard
        read = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
        check_held(board, read, "dashboard")
        used.append("Grafana's types")
    except ImportError:
        pass
    if shutil.which("promtool"):
        rules = [{"record": f"check:rule_{i}", "expr": query} for i, query in enumerate(queries)]
        with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:  # JSON is YAML
            json.dump({"groups": [{"name": "dashboard", "rules": rules}]}, file)
            file.flush()
            done = subprocess.run(["promtool", "check", "rules", file.name], text=True, capture_output=True)
        assert done.returncode == 0 and f"{len(rules)} rules found" in done.stdout, done
    return used


def check_held(given, read, path):
    """All that is given has been read."""
    if isinstance(given, dict):
        for key, value in given.items():
            assert key in read, f"{path}.{key} is none of Grafana's"
            check_held(value, read[key], f"{path}.{key}")
    elif isinstance(given, list):
        assert len(given) == len(read), path
        for i, value in enumerate(given):
            check_held(value, read[i], f"{path}[{i}]")
    else:
        assert given == read, (path, given, read)


def check_by_tools(text):
    used = []
    try:
        from prometheus_client.parser import text_string_to_metric_families
        assert len(list(text_string_to_metric_families(text))) > 30
        used.append("prometheus_client")
    except ImportError:
        pass
    if shutil.which("promtool"):
        done = subprocess.run(["promtool", "check", "metrics"], input=text, text=True,
                              capture_output=True)
        assert done.returncode == 0 and not done.stdout + done.stderr, done
        used.append("promtool")
    return used


server = subprocess.Popen([program, "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
try:
    port = int(server.stdout.readline())
    body = {"model": "fake", "input": "some words"}
    call(port, "/v1/responses", body)
    before = families(call(port, "/metrics"))
    for _ in range(5):
        call(port, "/v1/responses", body)
    for path, refused in (("/v1/responses", {"model": "none", "input": "a"}), ('/no"ne\\', None)):
        call(port, path, refused)
    text = call(port, "/metrics")
    after = families(text)
    check_names(after)
    histograms = check_histograms(after)
    check_growth(before, after)
    check_readme(after)
    check_dashboard(after)
    started = after["valar_start_time_seconds"][2]["valar_start_time_seconds", ()]
    assert abs(started - time.time()) < 60, started
    (info,) = after["valar_build_info"][2]
    assert dict(info[1])["version"], info
    used = check_by_tools(text) + check_dashboard_by_tools()
    print(f"{len(after)} metrics, {histograms} histograms, read by {used or 'no other tool'}")
finally:
    server.terminate()
assert server.wait(20) == 0
