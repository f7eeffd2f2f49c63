"""What a body of POST /v1/responses may hold beside its fields: service_fields.py SERVE_FAKE

Over 200 bodies with one foreign, misspelt or future field each. By the rule of the contract a field is
honoured, or a name of another surface or within two letters of ours is refused with the right name, or
it stands in X-Ignored-Fields; never is it dropped without a word. The fields of requests that clients
send unasked are not refused, in the dialect that they are for.
"""
import json
import subprocess
import sys
import urllib.error
import urllib.request

program = sys.argv[1]

# Fields of ours, each with a value that is legal in both dialects.
OURS = {
    "instructions": "be short", "max_output_tokens": 9, "max_tool_calls": 2, "temperature": 0.5, "top_p": 0.9,
    "top_k": 5, "min_p": 0.1, "top_logprobs": 2, "seed": 7, "user": "me", "prompt_cache_key": "a",
    "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.1, "background": False,
    "parallel_tool_calls": True, "store": True, "stream": False, "stream_options": {}, "metadata": {"a": "b"},
    "text": {}, "reasoning": {}, "truncation": "disabled", "tools": [], "tool_choice": "auto", "include": [],
    "service_tier": "auto", "stop": ["x"], "logit_bias": {},
}
FOREIGN = {  # of other surfaces and servers: what stands for them here
    "messages": "input", "contents": "input", "system": "instructions", "system_prompt": "instructions",
    "max_tokens": "max_output_tokens", "max_completion_tokens": "max_output_tokens",
    "max_new_tokens": "max_output_tokens", "n_predict": "max_output_tokens",
    "num_predict": "max_output_tokens", "response_format": "text.format", "format": "text.format",
    "json_schema": "text.format", "grammar": "text.format", "guided_json": "text.format",
    "guided_regex": "text.format", "guided_choice": "text.format", "guided_grammar": "text.format",
    "output_config": "text.format", "reasoning_effort": "reasoning.effort", "thinking": "reasoning.effort",
    "functions": "tools", "function_call": "tool_choice", "stop_sequences": "stop",
    "repeat_penalty": "repetition_penalty", "logprobs": "message.output_text.logprobs",
    "n": "a request for each answer", "best_of": "a request for each answer", "prompt": "input",
}
FUTURE = ["context_management", "client_metadata", "safety_identifier", "prompt_cache_retention",
          "verbosity_level", "agent", "budget", "modalities", "prediction", "audio", "web_search_options",
          "mirostat", "typical_p", "options", "keep_alive", "x-vendor", "ignore_eos", "lora", "a",
          "of_tomorrow", "Größe", "with space", "a.b", "quote\"d"]
NESTED = [  # a place, and how the header calls it
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "text", "shade": 1}}}, "text.format.shade"),
    ({"reasoning": {"budget": 5}}, "reasoning.budget"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options.include_obfuscation"),
    ({"input": [{"role": "user", "content": "a", "mood": 1}]}, "input.mood"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "hue": 1}]}]},
     "input.content.hue"),
    ({"input": [{"role": "user", "content": "a"}, {"type": "reasoning", "summary": [], "depth": 1}]},
     "input.depth"),
    ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "rank": 1}]},
     "tools.rank"),
]


class Server:
    def __init__(self, dialect):
        self.process = subprocess.Popen([program, "0", "", dialect], stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL)
        self.port = int(self.process.stdout.readline())

    def post(self, body):
        """The status, the error, the names in X-Ignored-Fields."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/responses",
                                         json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return reply.status, {}, reply.headers.get("X-Ignored-Fields", "")
        except urllib.error.HTTPError as reply:
            return reply.code, json.load(reply)["error"], ""


def slips(name):
    """The name with a letter less, with two changed places, with a letter more."""
    middle = len(name) // 2
    swapped = name[:middle - 1] + name[middle] + name[middle - 1] + name[middle + 1:]
    return {name[:middle] + name[middle + 1:], swapped, name + "s", name.capitalize()} - {name}


def printable(name):
    return "".join(c if " " < c < "\x7f" and c not in '"\\' else "".join(f"\\x{byte:02x}" for byte in c.encode()) for c in name)


def check(server):
    plain = {"model": "fake", "input": "a"}
    count = 0
    for name, value in OURS.items():
        status, error, ignored = server.post({**plain, name: value})
        assert status == 200 and not ignored, (name, status, error, ignored)
        for slip in slips(name) - set(OURS) - set(FOREIGN):
            status, error, _ = server.post({**plain, slip: value})
            assert status == 400 and error["code"] == "unknown_parameter" and error["param"] == slip, \
                (slip, status, error)
            assert "did you mean '" in error["message"], error
            count += 1
        count += 1
    for name, here in FOREIGN.items():
        status, error, _ = server.post({**plain, name: "x"})
        assert status == 400 and error["param"] == name and here in error["message"], (name, error)
        assert error["code"] in ("unknown_parameter", "unsupported_parameter"), error
        count += 1
    for name in FUTURE:
        status, error, ignored = server.post({**plain, name: "x"})
        assert status == 200 and ignored == printable(name), (name, status, error, ignored)
        count += 1
    for fields, shown in NESTED:
        status, error, ignored = server.post({**plain, **fields})
        assert status == 200 and ignored == shown, (fields, status, error, ignored)
        count += 1
    return count


def check_clients(server):
    """What OpenAI's own clients and Codex send unasked."""
    codex = {"model": "fake", "instructions": "", "input": [{"type": "message", "role": "user",
             "content": [{"type": "input_text", "text": "a"}]}], "tools": [{"type": "web_search"}],
             "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"effort": "low", "summary": "auto"},
             "store": False, "stream": True, "include": ["reasoning.encrypted_content"],
             "prompt_cache_key": "0", "text": {"verbosity": "medium"}, "client_metadata": {"a": "b"}}
    agents = {"model": "fake", "input": [{"role": "user", "content": "a"}], "instructions": "b", "include": [],
              "tools": [], "previous_response_id": None, "metadata": None, "prompt_cache_retention": "24h"}
    for body in (codex, agents):
        status, error, _ = server.post(body)
        assert status == 200, error


total = 0
for dialect in ("valar", "openai"):
    server = Server(dialect)
    try:
        total += check(server)
        if dialect == "openai":
            check_clients(server)
    finally:
        server.process.terminate()
    assert server.process.wait(20) == 0
assert total >= 200
print(f"{total} bodies: refused with the right name, honoured, or named")
