"""The texts that a model gives at temperature 0, over HTTP, to the letter.

Usage: texts_check.py URL MODEL [smollm2|qwen25-coder]
       (a running server with that model, precision fine; the word is a folder in tests/data)
"""
import json
import os
import pathlib
import sys
import urllib.request

# Of SmolLM2 those that every runtime gives; of a folder not named here, all.
CHOSEN = {"smollm2": ("capital", "dogs", "empty-system", "pirate", "rewrite", "summary", "sum",
                      "special-spelled")}
url, model = sys.argv[1:3]
folder = sys.argv[3] if len(sys.argv) > 3 else "smollm2"
path = pathlib.Path(__file__).parent / "data" / folder / "prompts.json"
prompts = json.loads(path.read_text(encoding="utf-8"))
chosen = CHOSEN.get(folder, [prompt["name"] for prompt in prompts])
failed = 0
for prompt in prompts:
    if prompt["name"] not in chosen:
        continue
    body = {"model": model, "temperature": 0, "max_output_tokens": len(prompt["greedy"]),
            "input": [{"role": m["role"], "content": m["content"]} for m in prompt["messages"]]}
    request = urllib.request.Request(url + "/v1/responses", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        raw = reply.read().decode()
    assert os.environ.get("VALAR_MODELS", " ") not in raw, raw
    text = json.loads(raw)["output"][0]["content"][0]["text"]
    same = text == prompt["text"]
    failed += not same
    print(prompt["name"], "equal" if same else f"DIFFERS: {text!r}")
print(f"{len(chosen) - failed} passed, {failed} failed")
sys.exit(failed != 0)
