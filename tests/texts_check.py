"""The texts that every runtime gives for SmolLM2-135M-Instruct at temperature 0, over HTTP.

Usage: texts_check.py URL MODEL      (a running server with that model, precision fine)
"""
import json
import pathlib
import sys
import urllib.request

EQUAL_EVERYWHERE = ("capital", "dogs", "empty-system", "pirate", "rewrite", "summary", "sum",
                    "special-spelled")
url, model = sys.argv[1:3]
path = pathlib.Path(__file__).parent / "data/smollm2/prompts.json"
failed = 0
for prompt in json.loads(path.read_text(encoding="utf-8")):
    if prompt["name"] not in EQUAL_EVERYWHERE:
        continue
    body = {"model": model, "temperature": 0, "max_output_tokens": len(prompt["greedy"]),
            "input": [{"role": m["role"], "content": m["content"]} for m in prompt["messages"]]}
    request = urllib.request.Request(url + "/v1/responses", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        text = json.load(reply)["output"][0]["content"][0]["text"]
    same = text == prompt["text"]
    failed += not same
    print(prompt["name"], "equal" if same else f"DIFFERS: {text!r}")
print(f"{len(EQUAL_EVERYWHERE) - failed} passed, {failed} failed")
sys.exit(failed != 0)
