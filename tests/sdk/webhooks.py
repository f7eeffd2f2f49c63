"""Deliveries that official libraries verify: webhooks.py SERVE_FAKE NODE_FOLDER

A server sends the end of a response to this script, which has it verified by PyPI's openai
(webhooks.unwrap), by PyPI's standardwebhooks and by npm's openai (webhooks.mjs in NODE_FOLDER): what was
sent is taken, another body, another secret or another id is not.
"""
import base64
import http.server
import json
import os
import queue
import subprocess
import sys
import urllib.request

import openai
import standardwebhooks

program, folder = sys.argv[1:3]
SECRET = "whsec_" + base64.b64encode(os.urandom(24)).decode()
OTHER = "whsec_" + base64.b64encode(os.urandom(24)).decode()
delivered = queue.Queue()


class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        delivered.put((dict(self.headers), body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def check_refused(error, verify, *given):
    try:
        verify(*given)
    except error:
        return
    sys.exit(f"webhooks.py: {verify} took what was not sent")


def respond(port, url):
    metadata = {"completion_webhook": url, "webhook_token": SECRET}
    body = {"model": "fake", "input": "gr\u00fc\u00dfe", "metadata": metadata}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/responses", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=20).read())


def check(response, headers, body):
    assert json.loads(body) == response
    changed = body.replace('"completed"', '"failed"')
    assert changed != body
    stranger = headers | {"webhook-id": "resp_other"}

    client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
    event = client.webhooks.unwrap(body, headers)
    assert event.id == response["id"], event
    unwrap = client.webhooks.unwrap
    check_refused(openai.InvalidWebhookSignatureError, unwrap, changed, headers)
    check_refused(openai.InvalidWebhookSignatureError, unwrap, body, stranger)
    check_refused(openai.InvalidWebhookSignatureError,
                  openai.OpenAI(api_key="none", webhook_secret=OTHER).webhooks.unwrap, body, headers)

    verify = standardwebhooks.Webhook(SECRET).verify
    assert verify(body, headers) == response
    refused = standardwebhooks.WebhookVerificationError
    check_refused(refused, verify, changed, headers)
    check_refused(refused, verify, body, stranger)
    check_refused(refused, standardwebhooks.Webhook(OTHER).verify, body, headers)

    cases = [[body, headers, SECRET, True], [changed, headers, SECRET, False], [body, stranger, SECRET, False],
             [body, headers, OTHER, False]]
    node = subprocess.run(["node", os.path.join(folder, "webhooks.mjs")], input=json.dumps(cases), text=True,
                          capture_output=True)
    assert node.returncode == 0, node.stderr
    assert json.loads(node.stdout) == [response["id"], None, None, None], node.stdout


receiver = http.server.HTTPServer(("127.0.0.1", 0), Receiver)
server = subprocess.Popen([program, "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
try:
    sent = respond(int(server.stdout.readline()), f"http://127.0.0.1:{receiver.server_address[1]}/hook")
    receiver.timeout = 20
    receiver.handle_request()
    check(sent, *delivered.get(timeout=1))
finally:
    server.kill()
    server.wait()
print("webhooks.py: openai (Python, Node) and standardwebhooks take what was sent, and nothing else")
