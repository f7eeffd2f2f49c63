"""Is the document true? openapi_check.py SERVE_FAKE [SECONDS [EXAMPLES]]

For both dialects GET /openapi.json must pass openapi-spec-validator, and schemathesis must not find a
request (at most EXAMPLES of a kind, for about SECONDS) whose answer is a 5xx, has a status or a type
that is not documented, or is not as documented. Schemathesis loads this file for its hook.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request

CHECKS = ("not_a_server_error,status_code_conformance,content_type_conformance,"
          "response_headers_conformance,response_schema_conformance")


def check_document(port):
    import openapi_spec_validator
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json") as reply:
        openapi_spec_validator.validate(json.load(reply))


def begin_server(dialect):
    server = subprocess.Popen([sys.argv[1], "0", "", dialect], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)
    return server, int(server.stdout.readline())


def begin_client(port, seconds, examples, folder):
    here, name = os.path.split(os.path.abspath(__file__))
    environment = os.environ | {"PYTHONPATH": here, "SCHEMATHESIS_HOOKS": name.removesuffix(".py")}
    limits = ["--max-time", str(seconds)] if seconds else []
    return subprocess.Popen(
        [os.path.join(os.path.dirname(sys.executable), "schemathesis"), "run",
         f"http://127.0.0.1:{port}/openapi.json", "--checks", CHECKS, "--no-color", "--workers", "1",
         "--phases", "coverage,fuzzing,stateful", "--max-examples", str(examples), "--seed", "1",
         "--generation-database", "none", *limits],  # with one, Hypothesis' own search may fail (IndexError)
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder)  # it leaves notes there


def main():
    seconds, examples = (int(sys.argv[i]) if len(sys.argv) > i else usual
                         for i, usual in ((2, 60), (3, 50)))
    running = {dialect: begin_server(dialect) for dialect in ("valar", "openai")}
    failed = False
    folder = tempfile.TemporaryDirectory()
    try:
        for _, port in running.values():
            check_document(port)
        clients = {dialect: begin_client(port, seconds, examples, folder.name)
                   for dialect, (_, port) in running.items()}
        for dialect, client in clients.items():
            said, _ = client.communicate()
            if client.returncode != 0:
                print(said)
            cases = re.search(r"\d+ generated.*", said)
            print(f"{dialect}: {cases[0] if cases else 'no cases'}")
            failed |= client.returncode != 0 or not cases
    finally:
        for server, _ in running.values():
            server.terminate()
            failed |= server.wait() != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
else:
    import schemathesis

    @schemathesis.hook
    def map_body(context, body):
        """Of most requests the model is one that is there, so that they go further than to 404."""
        if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body) % 4:
            body["model"] = "fake"
        return body
