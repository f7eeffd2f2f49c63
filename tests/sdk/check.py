"""The official Python client against a running server: check.py BASE_URL KEY MODEL

BASE_URL ends in /v1; KEY is one that the server knows; MODEL is an id or alias it answers to.
Needs PyPI's openai and jsonschema. The client is used as it comes, and no reply may name the
directory of the models. What the model says does not matter, whatever it is: its form does.
"""
import enum
import json
import os
import pathlib
import sys
import typing

import jsonschema
import openai
import pydantic

base_url, key, model = sys.argv[1:4]
schema = json.loads((pathlib.Path(__file__).parent / "response.schema.json").read_text())
keys = schema["required"]


def names_no_directory(reply):
    reply.read()
    assert os.environ.get("VALAR_MODELS", " ") not in reply.text, reply.text


client = openai.OpenAI(base_url=base_url, api_key=key, http_client=openai.DefaultHttpxClient(
    event_hooks={"response": [names_no_directory]}))
checks = 0


def check(condition, what):
    global checks
    checks += 1
    if not condition:
        sys.exit(f"check.py: {what}")


def check_response(raw):
    """Every key, in order, each of its type."""
    body = json.loads(raw.text if isinstance(raw.text, str) else raw.text())
    jsonschema.validate(body, schema)
    check(list(body) == keys, f"keys or their order: {list(body)}")
    usage = body["usage"]
    check(usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"], "total_tokens")
    check(usage["prompt_tokens"] == usage["input_tokens"], "prompt_tokens")
    check(usage["completion_tokens"] == usage["output_tokens"], "completion_tokens")
    return body


def refused(error, status, code, param, call):
    try:
        call()
    except error as caught:
        what = f"{error.__name__}: {caught.status_code} {caught.code} {caught.param}"
        check(type(caught) is error, f"{what}: is a {type(caught).__name__}")
        check((caught.status_code, caught.code, caught.param) == (status, code, param), what)
        check(len(caught.message) > 10, f"{what}: no message")
        check(caught.request_id and len(caught.request_id) == 36, f"{what}: no request id")
        return
    check(False, f"no {error.__name__} for {code} {param}")


# models
listed = [entry.id for entry in client.models.list()]
check(model in listed, f"{model} is not among {listed}")
for name in listed:
    check(client.models.retrieve(name).id == name, f"models.retrieve({name})")

# a response, and the same again
response = client.responses.create(model=model, input="Say hello.", max_output_tokens=12)
check(response.status == "completed", response.status)
check(response.output_text, "no text")
check(response.usage.output_tokens > 0, "no usage")
raw = client.responses.with_raw_response.create(
    model=model,
    input=[
        {"role": "user", "content": [{"type": "input_text", "text": "Name a colour."}]},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another one, please."},
    ],
    instructions="Answer in one word.",
    temperature=0,
    max_output_tokens=6,
    metadata={"purpose": "check"},
    include=["message.output_text.logprobs"],
    top_logprobs=2,
)
body = check_response(raw)
check(len(raw.headers["x-request-id"]) == 36, "X-Request-ID")
check(body["metadata"] == {"purpose": "check"} and body["temperature"] == 0, "echo")
part = body["output"][0]["content"][0]
check(0 < len(part["logprobs"]) <= body["usage"]["output_tokens"], "log-probabilities")
check(all(len(token["top_logprobs"]) == 2 for token in part["logprobs"]), "top_logprobs")
kept = client.responses.with_raw_response.retrieve(body["id"])
check(check_response(kept) == body, "retrieve() differs from create()")

# an earlier output is a valid input
again = client.responses.create(
    model=model,
    input=[
        {"role": "user", "content": "Hello."},
        *response.output,
        {"role": "user", "content": "Go on."},
    ],
    max_output_tokens=4,
)
check(again.status == "completed", again.status)

# the same request and seed, the same text
texts = {
    client.responses.create(
        model=model, input="Tell me a story.", max_output_tokens=8, extra_body={"seed": 7}
    ).output_text
    for _ in range(2)
}
check(len(texts) == 1, f"one seed, several texts: {texts}")

# an answer that is an instance of a class
class Mood(enum.Enum):
    good = "good"
    bad = "bad"


class Guest(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=1, le=99)


class Party(pydantic.BaseModel):
    """A party and who comes."""
    day: typing.Literal["friday", "saturday"]
    mood: Mood
    guests: list[Guest] = pydantic.Field(min_length=1, max_length=2)
    note: typing.Optional[str] = pydantic.Field(max_length=20)


for seed in range(2):
    parsed = client.responses.parse(model=model, input="Ann (31) comes on Friday.", text_format=Party,
                                    temperature=1, extra_body={"seed": seed})
    check(parsed.status == "completed" and not parsed.incomplete_details, parsed.status)
    check(isinstance(parsed.output_parsed, Party), f"not parsed: {parsed.output_text}")

# calls: the tools that may be called, and arguments that fit
class Weather(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=16)
    unit: typing.Literal["C", "F"]


def function_tool(of, name):
    """As responses.parse() wants it."""
    return {"type": "function", **openai.pydantic_function_tool(of, name=name)["function"]}


tools = [function_tool(Guest, "invite"), function_tool(Weather, "weather")]
question = [{"role": "user", "content": "Is it cold in Oslo?"}]
named = {"type": "function", "name": "weather"}
for choice, names in [
    ("required", {"invite", "weather"}),
    (named, {"weather"}),
    ({"type": "allowed_tools", "mode": "required", "tools": [named]}, {"weather"}),
]:
    called = client.responses.parse(model=model, input=question, tools=tools, tool_choice=choice,
                                    parallel_tool_calls=False, temperature=1, extra_body={"seed": 5})
    calls = [item for item in called.output if item.type == "function_call"]
    check(len(calls) == 1 == len(called.output), f"{choice}: {called.output}")
    check(calls[0].name in names, f"{choice}: {calls[0].name}")
    {"invite": Guest, "weather": Weather}[calls[0].name].model_validate(calls[0].parsed_arguments)

# a loop of tools until the final text
question += called.output
for call in calls:
    question.append({"type": "function_call_output", "call_id": call.call_id, "output": "12 C"})
final = client.responses.create(model=model, input=question, tools=tools, tool_choice="none",
                                max_output_tokens=8)
check([item.type for item in final.output] == ["message"], final.output)
listed = [item.type for item in client.responses.input_items.list(final.id, order="asc")]
check(listed == ["message", "function_call", "function_call_output"], listed)

# a custom tool: its text fits
note = {"type": "custom", "name": "note", "description": "Keeps a note.",
        "format": {"type": "grammar", "syntax": "regex", "definition": "(buy|sell) [a-z]{3,8}"}}
noted = client.responses.create(model=model, input="Note: buy apples.", tools=[note],
                                tool_choice="required", parallel_tool_calls=False)
check([item.type for item in noted.output] == ["custom_tool_call"], noted.output)
check(noted.output[0].input.split()[0] in ("buy", "sell"), noted.output[0].input)

# Chat Completions: whole, and streamed the same
asked = {"model": model, "messages": [{"role": "user", "content": "Tell me a story."}],
         "max_completion_tokens": 24, "temperature": 0, "seed": 7}
whole = client.chat.completions.create(**asked)
choice = whole.choices[0]
check(choice.message.role == "assistant" and choice.message.content, choice)
check(whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens, whole.usage)
chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
said = [chunk.choices[0] for chunk in chunks if chunk.choices]
joined = "".join(part.delta.content or "" for part in said)
check(joined == choice.message.content, f"{joined!r} is not {choice.message.content!r}")
check(len([part for part in said if part.delta.content]) > 1, "it came in one piece")
check([part.finish_reason for part in said if part.finish_reason] == [choice.finish_reason], said[-1])
check(chunks[-1].usage.total_tokens == whole.usage.total_tokens, chunks[-1])
check(len({chunk.id for chunk in chunks}) == 1, "ids of chunks")

parsed = client.chat.completions.parse(model=model, response_format=Party, temperature=1, seed=1,
                                       messages=[{"role": "user", "content": "Ann (31) comes on Friday."}])
check(isinstance(parsed.choices[0].message.parsed, Party), parsed.choices[0])

asked = {"model": model, "messages": [{"role": "user", "content": "Is it cold in Oslo?"}],
         "tools": [openai.pydantic_function_tool(Guest, name="invite"),
                   openai.pydantic_function_tool(Weather, name="weather")],
         "tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
choice = client.chat.completions.parse(**asked).choices[0]
calls = choice.message.tool_calls
check(len(calls) == 1 and choice.finish_reason == "tool_calls", choice)
check(isinstance(calls[0].function.parsed_arguments, (Guest, Weather)), calls[0])
with client.chat.completions.stream(**asked) as stream:
    streamed = stream.get_final_completion().choices[0]
check(streamed.finish_reason == "tool_calls" and len(streamed.message.tool_calls) == 1, streamed)
check(streamed.message.tool_calls[0].function == calls[0].function, streamed)
asked["messages"] += [choice.message, {"role": "tool", "tool_call_id": calls[0].id, "content": "12 C"}]
final = client.chat.completions.create(**{**asked, "tool_choice": "none"}, max_completion_tokens=8)
check(final.choices[0].message.content and not final.choices[0].message.tool_calls, final.choices[0])

# refusals
stranger = openai.OpenAI(base_url=base_url, api_key="sk-not-a-key-of-this-server")
refused(openai.AuthenticationError, 401, "invalid_api_key", None, stranger.models.list)
refused(openai.NotFoundError, 404, "model_not_found", "model",
        lambda: client.responses.create(model="no/such-model", input="x"))
refused(openai.NotFoundError, 404, "model_not_found", "model",
        lambda: client.models.retrieve("no/such-model"))
refused(openai.NotFoundError, 404, "not_found", None,
        lambda: client.responses.retrieve("resp_000000000000000000000000"))
for code, param, fields in [
    ("decimal_above_max_value", "temperature", {"temperature": 3}),
    ("decimal_below_min_value", "top_p", {"top_p": -1}),
    ("integer_below_min_value", "max_output_tokens", {"max_output_tokens": 0}),
    ("invalid_type", "max_output_tokens", {"max_output_tokens": "many"}),
    ("integer_above_max_value", "top_logprobs", {"top_logprobs": 21}),
    ("string_below_min_length", "input", {"input": ""}),
    ("array_below_min_length", "input", {"input": []}),
    ("invalid_value", "input[0].role", {"input": [{"role": "boss", "content": "x"}]}),
    ("invalid_value", "reasoning.effort", {"reasoning": {"effort": "huge"}}),
    ("invalid_type", "metadata.k", {"metadata": {"k": 1}}),
    ("unsupported_value", "truncation", {"truncation": "auto"}),
    ("unsupported_value", "store", {"store": False}),
    ("unsupported_value", "include[0]", {"include": ["reasoning.encrypted_content"]}),
    ("unsupported_parameter", "previous_response_id", {"previous_response_id": "resp_1"}),
    ("unsupported_value", "tools[0].type", {"tools": [{"type": "file_search"}]}),
    ("invalid_value", "tool_choice", {"tool_choice": "required"}),
    ("unsupported_parameter", "input[0].content[0].type",
     {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]}),
]:
    refused(openai.BadRequestError, 400, code, param,
            lambda: client.responses.create(**{"model": model, "input": "x", **fields}))

print(f"check.py: {checks} checks passed with openai {openai.__version__}")
