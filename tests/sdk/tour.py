"""The life of a response through the official Python client: tour.py BASE_URL KEY MODEL DIALECT

Create, background and poll, cancel, delete, list, input items, idempotent retries, errors by class;
DIALECT is valar or openai, as the server was told. Every object is validated without mercy: in the
valar dialect against response.schema.json, in the openai dialect against the models of the packages
openai and openresponses-types, unknown and missing keys included.
Needs PyPI's openai, jsonschema and openresponses-types.
"""
import json
import pathlib
import sys
import time
import uuid

import jsonschema
import openai
import openresponses_types.types as openresponses
from extras import extras
from openai.types.responses import Response
from openai.types.responses.response_item_list import ResponseItemList

base_url, key, model, dialect = sys.argv[1:5]
native = dialect == "valar"
schema = json.loads((pathlib.Path(__file__).parent / "response.schema.json").read_text())
client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)
responses = client.responses.with_raw_response
checks = 0
waiting = ("pending", "running") if native else ("queued", "in_progress")

# Where the two packages contradict each other, we send what either asks for.
ONLY_OPENRESPONSES = {"presence_penalty", "frequency_penalty", "store"}
ONLY_OPENAI = {"usage.input_tokens_details.cache_write_tokens", "output.status",  # of a thought
               "conversation"}


def check(condition, what):
    global checks
    checks += 1
    if not condition:
        sys.exit(f"tour.py: {what}")


def unknown(sent, known, path=""):
    """Keys that were sent and that a model dropped."""
    if isinstance(sent, dict) and isinstance(known, dict):
        for name, value in sent.items():
            if name not in known:
                yield path + name
            else:
                yield from unknown(value, known[name], f"{path}{name}.")
    elif isinstance(sent, list) and isinstance(known, list):
        for one, other in zip(sent, known):
            yield from unknown(one, other, path)


def valid(reply, left_out=(), beyond=False):
    """A response object; `left_out`: keys that an entry of a list does without; `beyond`: it shows
    what openresponses-types does not know, custom tools or a schema."""
    body = reply if isinstance(reply, dict) else json.loads(reply.http_response.text)
    whole = {"input": "", "instructions": None, "tools": [], **body} if left_out else body
    if native:
        jsonschema.validate(whole, schema)
    else:
        whole = {name: value for name, value in whole.items() if name != "input"}
        strict = extras(Response.model_validate(whole))
        check(set(strict) <= ONLY_OPENRESPONSES, f"openai: {list(extras(Response(**whole)))}")
        if not beyond:
            parsed = openresponses.ResponseResource.model_validate(whole)
            dropped = set(unknown(whole, parsed.model_dump(mode="json", exclude_unset=True)))
            check(dropped <= ONLY_OPENAI, f"openresponses: {dropped}")
    check(not any(name in body for name in left_out), f"{left_out} in an entry")
    return body


def refused(error, status, code, call):
    try:
        call()
    except error as caught:
        check((caught.status_code, caught.code) == (status, code), f"{caught!r}")
        return
    check(False, f"no {error.__name__} for {code}")


def until_done(name):
    for _ in range(3000):
        body = valid(responses.retrieve(name))
        if body["status"] not in waiting:
            return body
        time.sleep(0.02)
    sys.exit("tour.py: it never ended")


# at once, and cut
done = valid(responses.create(model=model, input="Say hello.", max_output_tokens=2, top_logprobs=2,
                              include=["message.output_text.logprobs"], user="u",
                              reasoning={"effort": "low", "generate_summary": "auto"}))
check(done["status"] == ("completed" if native else "incomplete"), done["status"])
check(done["incomplete_details"] == {"reason": "max_output_tokens"}, "incomplete_details")
check(done["reasoning"] == {"effort": "low", "summary": "auto"}, done["reasoning"])

# in the background, and polled
accepted = responses.create(model=model, input="Count.", background=True, max_output_tokens=4,
                            metadata={"completion_window": "flex"})
check(accepted.http_response.status_code == 202, accepted.http_response.status_code)
body = valid(accepted)
check(body["status"] == waiting[0] and body["background"], body["status"])
ended = until_done(body["id"])
check(ended["status"] in ("completed", "incomplete") and ended["output"], ended["status"])

# cancelled; once more changes nothing; what is not in the background cannot be
body = valid(responses.create(model=model, input="Tell a long story.", background=True,
                              max_output_tokens=100_000 if "fake" in model else 900))
cancelled = valid(responses.cancel(body["id"]))
check(cancelled["status"] in ("cancelled", "completed"), cancelled["status"])
check(valid(responses.cancel(body["id"])) == cancelled, "cancelled twice, and different")
refused(openai.BadRequestError, 400, "invalid_value", lambda: client.responses.cancel(done["id"]))

# input items
said = valid(responses.create(model=model, max_output_tokens=2, input=[
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "input_text", "text": "One."}]},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three."}]))
page = client.responses.input_items.with_raw_response.list(said["id"], limit=3)
raw = json.loads(page.http_response.text)
check(set(raw) == {"object", "data", "first_id", "last_id", "has_more"} and raw["has_more"], raw)
parsed = ResponseItemList.model_validate(raw)
check(not list(extras(parsed)), f"input items: {list(extras(parsed))}")
check([item["role"] for item in raw["data"]] == ["user", "assistant", "user"], raw)
check(len(list(client.responses.input_items.list(said["id"], limit=1, order="asc"))) == 4, "pages")

# the list, newest first
listed = client.get("/responses?limit=2", cast_to=object)
check([entry["id"] for entry in listed["data"]][0] == said["id"], "newest first")
check(listed["has_more"] and listed["object"] == "list", listed)
for entry in listed["data"]:
    valid(entry, ("input", "instructions", "tools"))

# a retry under its key is the same response
name = {"Idempotency-Key": str(uuid.uuid4())}
first = responses.create(model=model, input="Once.", max_output_tokens=2, extra_headers=name)
again = responses.create(model=model, input="Once.", max_output_tokens=2, extra_headers=name)
check(first.http_response.text == again.http_response.text, "a retry, and different bytes")
check(again.headers.get("idempotent-replayed") == "true", "Idempotent-Replayed")
check("idempotent-replayed" not in first.headers, "the first is no replay")
refused(openai.BadRequestError, 400, "idempotency_key_reused",
        lambda: client.responses.create(model=model, input="Twice.", extra_headers=name))

# deleted
client.responses.delete(said["id"])
refused(openai.NotFoundError, 404, "not_found", lambda: client.responses.retrieve(said["id"]))
refused(openai.NotFoundError, 404, "not_found", lambda: client.responses.delete(said["id"]))
refused(openai.NotFoundError, 404, "not_found",
        lambda: client.responses.input_items.list(said["id"]))

# the cases of the Open Responses compliance suite that do not stream
def turn(role, text, **more):
    return {"type": "message", "role": role, "content": text, **more}


def conforms(body):
    openresponses.ResponseResource.model_validate(body)
    check(body["status"] == "completed" and body["output"], body["status"])
    return [item["type"] for item in body["output"]]


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "description": "Of a city", "parameters": CITY}
for case, turns in {
    "basic-response": [turn("user", "Greet me in three words.")],
    "assistant-phase": [turn("assistant", "I look up the number.", phase="commentary"),
                        turn("assistant", "It is four.", phase="final_answer"),
                        turn("user", "Only the number, please.")],
    "system-prompt": [turn("system", "Talk like a sailor."), turn("user", "Greet me.")],
    "multi-turn": [turn("user", "I am Alice."), turn("assistant", "Hello, Alice!"),
                   turn("user", "Who am I?")],
}.items():
    limit = {} if "fake" in model else {"max_output_tokens": 20}
    if native or not limit:  # in the openai dialect what is cut is not `completed`
        answer = valid(responses.create(model=model, input=turns, **limit))
        check(conforms(answer) == ["message"], f"{case}: {answer['output']}")
        # response-output-phase-schema is of the suite's own making; here phases come back as they went
        shown = client.responses.input_items.list(answer["id"], order="asc")
        check([getattr(item, "phase", None) for item in shown] ==
              [one.get("phase") for one in turns], f"{case}: phases")
if "fake" in model:
    kinds = conforms(valid(responses.create(model=model, input=[turn("user", "Rain in Oslo?")],
                                            tools=[WEATHER])))
    check("function_call" in kinds, f"tool-calling: {kinds}")

# what only the openai dialect has
follow = {"model": model, "input": "And then?", "max_output_tokens": 2}
if native:
    refused(openai.BadRequestError, 400, "unsupported_value",
            lambda: client.responses.create(**follow, store=False))
    refused(openai.BadRequestError, 400, "unsupported_parameter",
            lambda: client.responses.create(**follow, previous_response_id=done["id"]))
else:
    unkept = valid(responses.create(**follow, store=False))
    check(unkept["store"] is False, "store")
    refused(openai.NotFoundError, 404, "not_found", lambda: client.responses.retrieve(unkept["id"]))
    next_turn = valid(responses.create(**follow, previous_response_id=done["id"]))
    check(next_turn["previous_response_id"] == done["id"], "previous_response_id")
    check(next_turn["usage"]["input_tokens"] > unkept["usage"]["input_tokens"], "earlier turns")
    refused(openai.BadRequestError, 400, "previous_response_not_found",
            lambda: client.responses.create(**follow, previous_response_id=unkept["id"]))

    # streamed: the same text; and those of a background response once more, from an event on
    story = {"model": model, "input": "Tell a story of a king.", "temperature": 0, "max_output_tokens": 16}
    whole = client.responses.create(**story)
    with client.responses.stream(**story) as stream:
        events = list(stream)
        # The client has a final response only of what no limit cut, as the scripted model's.
        final = stream.get_final_response() if "fake" in model else events[-1].response
    check(events[0].type == "response.created", events[0].type)
    check(events[-1].type == f"response.{whole.status}" and final.status == whole.status, final.status)
    check(final.output_text == whole.output_text != "", f"streamed: {final.output_text!r}")
    events = list(client.responses.create(**story, background=True, stream=True))
    check([event.sequence_number for event in events] == list(range(len(events))), events)
    named = events[0].response.id
    for after in (0, 2):
        rest = list(client.responses.retrieve(named, stream=True, starting_after=after))
        check([event.sequence_number for event in rest] ==
              list(range(after + 1, after + 1 + len(rest))), f"after {after}: {rest}")
        check(rest[-1].type == f"response.{whole.status}", rest[-1].type)
        check(rest[-1].response.output_text == whole.output_text, rest[-1])

    # a conversation, its items, and responses that go on with it
    talk = client.conversations.create(metadata={"topic": "kings"},
                                       items=[{"role": "user", "content": "I am Alice."}])
    check(client.conversations.retrieve(talk.id).metadata == {"topic": "kings"}, "metadata")
    check(client.conversations.update(talk.id, metadata={"a": "b"}).metadata == {"a": "b"}, "update")
    items = client.conversations.items
    added = items.create(talk.id, items=[{"role": "assistant", "content": "Hello!"}])
    check(items.retrieve(added.data[0].id, conversation_id=talk.id).content[0].text == "Hello!", "item")
    said = valid(responses.create(**follow, conversation=talk.id))
    check(said["conversation"]["id"] == talk.id, said)
    check(said["usage"]["input_tokens"] > unkept["usage"]["input_tokens"], "earlier items")
    page = items.list(talk.id, order="asc", limit=3)
    check([item.type for item in page.data] == ["message"] * 3 and page.has_more, page)
    check(len(list(items.list(talk.id, limit=2))) == 4, "all pages")
    check(items.delete(added.data[0].id, conversation_id=talk.id).id == talk.id, "item deleted")
    check(client.conversations.delete(talk.id).deleted, "deleted")
    refused(openai.NotFoundError, 404, "not_found", lambda: client.conversations.retrieve(talk.id))
    refused(openai.NotFoundError, 404, "not_found",
            lambda: client.responses.create(**follow, conversation=talk.id))

    # legacy completions
    prompt = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**prompt, logprobs=1)
    check(len(whole.choices[0].logprobs.tokens) == whole.usage.completion_tokens, whole)
    pieces = list(client.completions.create(**prompt, stream=True,
                                            stream_options={"include_usage": True}))
    check("".join(one.choices[0].text for one in pieces if one.choices) == whole.choices[0].text, pieces)
    check(pieces[-1].usage.completion_tokens == whole.usage.completion_tokens, pieces[-1])
    check(client.completions.create(**prompt, echo=True).choices[0].text ==
          prompt["prompt"] + whole.choices[0].text, "echo")
    refused(openai.BadRequestError, 400, "unsupported_value",
            lambda: client.completions.create(**prompt, n=2))

    # how far the prompt is read
    chunks = list(client.chat.completions.create(
        model=model, messages=[turn("user", "Hi.")], max_tokens=2, stream=True,
        stream_options={"prompt_progress": True}))
    told = [one.prompt_progress for one in chunks if getattr(one, "prompt_progress", None)]
    check(told and told[-1]["processed"] == told[-1]["total"], chunks)

# tools: a call, its result, the answer; custom tools and a schema
if "fake" in model:
    weather = {"type": "function", "name": "weather", "description": "Of a city", "strict": True,
               "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                              "required": ["city"], "additionalProperties": False}}
    note = {"type": "custom", "name": "note",
            "format": {"type": "grammar", "syntax": "regex", "definition": "[a-z ]+"}}
    asked = [{"role": "user", "content": "Rain?"}]
    options = {"model": model, "parallel_tool_calls": False, "max_tool_calls": 2}
    called = responses.create(**options, input=asked, tools=[weather], reasoning={"effort": "high"},
                              tool_choice={"type": "function", "name": "weather"})
    body = valid(called)
    check([item["type"] for item in body["output"]] == ["reasoning", "function_call"], body["output"])
    check(body["tools"] == [weather] and body["max_tool_calls"] == 2, body["tools"])
    output = called.parse().output
    given = {"type": "function_call_output", "call_id": output[1].call_id, "output": "no"}
    answered = valid(responses.create(**options, input=[*asked, *output, given], tools=[weather],
                                      tool_choice="required"))
    check(answered["output"][0]["type"] == "message", answered["output"])
    page = client.responses.input_items.with_raw_response.list(answered["id"], order="asc")
    raw = json.loads(page.http_response.text)
    check(not list(extras(ResponseItemList.model_validate(raw))), f"input items: {raw}")
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "custom", "name": "note"}]}
    custom = valid(responses.create(
        **options, input="Note it.", tools=[note, weather], tool_choice=allowed,
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}),
        beyond=True)
    check(custom["output"][1]["type"] == "custom_tool_call", custom["output"])
    check(custom["text"]["format"]["name"] == "n", custom["text"])
    given = {"type": "custom_tool_call_output", "call_id": "call_other", "output": "done"}
    refused(openai.BadRequestError, 400, "invalid_value",
            lambda: client.responses.create(**options, tools=[note], input=[*asked, given]))

print(f"tour.py: {checks} checks passed in the {dialect} dialect with openai {openai.__version__}")
