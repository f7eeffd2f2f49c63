"""Anthropic's Python client against a running server: messages.py BASE_URL KEY MODEL DIALECT

BASE_URL ends in /v1; DIALECT is valar or openai, as the server was told: the first does not stream.
Needs PyPI's anthropic, used as it comes. What the model says does not matter, whatever it is: its
form does. A scripted model (fake) calls what it may until it sees a result.
"""
import sys
import typing

import anthropic
import pydantic
from extras import extras

base_url, key, model, dialect = sys.argv[1:5]
base_url = base_url.removesuffix("/v1")
client = anthropic.Anthropic(base_url=base_url, api_key=key, max_retries=0)
messages = client.messages
scripted, streams = model == "fake", dialect == "openai"
checks = 0


def check(condition, what):
    global checks
    checks += 1
    if not condition:
        sys.exit(f"messages.py: {what}")


def valid(message):
    known = anthropic.types.Message.model_validate(message.to_dict())
    check(not list(extras(known)), f"unknown: {list(extras(known))}")
    check(message.id.startswith("msg_") and message.model == model, message)
    usage = message.usage
    check(usage.input_tokens + usage.cache_read_input_tokens > 0, usage)
    return message


def shown(message):
    """Without what differs from one answer to the next (ids, what the cache had), and without what the
    client adds to streamed blocks."""
    said = message.to_dict(exclude_none=True)
    for block in said["content"]:
        block.pop("parsed_output", None)
        block.pop("id", None)
    usage = said["usage"]
    tokens = usage["input_tokens"] + usage["cache_read_input_tokens"]
    return {**said, "id": None, "usage": (tokens, usage["output_tokens"])}


def streamed(**request):
    """The same request as events, each in its place, and what the client makes of them."""
    if not streams:
        return None
    blocks, place, ended = 0, "begin", False
    for event in messages.create(**request, stream=True):
        check(not ended, f"{event.type} after message_stop")
        if event.type == "message_start":
            check(place == "begin" and event.message.content == [], event)
            place = "between"
        elif event.type == "content_block_start":
            check(place == "between" and event.index == blocks, event)
            place, kind = "within", event.content_block.type
        elif event.type == "content_block_delta":
            check(place == "within" and event.index == blocks, event)
            check(event.delta.type in {"text": ["text_delta"], "tool_use": ["input_json_delta"],
                                       "thinking": ["thinking_delta", "signature_delta"]}[kind], event)
        elif event.type == "content_block_stop":
            check(place == "within" and event.index == blocks, event)
            place, blocks = "between", blocks + 1
        elif event.type == "message_delta":
            check(place == "between", event)
            place = "end"
        else:
            check(event.type == "message_stop" and place == "end", event)
            ended = True
    check(ended, "no message_stop")
    with messages.stream(**request) as stream:
        texts = "".join(stream.text_stream)
        final = stream.get_final_message()
    check(texts == "".join(block.text for block in final.content if block.type == "text"), texts)
    return final


def both(**request):
    """The answer, which is the same in events. The newest models have no temperature, so clients no
    argument for it."""
    request = {"model": model, "extra_body": {"temperature": 0, "seed": 7}, **request}
    whole = valid(messages.create(**request))
    final = streamed(**request)
    check(final is None or shown(final) == shown(whole), f"{final}\nis not\n{whole}")
    return whole


def refused(error, status, kind, call):
    try:
        call()
    except error as caught:
        check(type(caught) is error and caught.status_code == status, f"{caught!r}")
        check(caught.type == kind and len(caught.message) > 10, f"{caught.type}: {caught}")
        check(caught.request_id and len(caught.request_id) == 36, f"{caught!r}: no request id")
        return
    check(False, f"no {error.__name__}")


hello = [{"role": "user", "content": "Tell me a story of a king."}]

# text, whole and in pieces, with what may stand beside it
whole = both(max_tokens=16, messages=hello)
check([block.type for block in whole.content] == ["text"] and whole.content[0].text, whole)
check(scripted or (whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 16), whole)
check(whole._request_id and len(whole._request_id) == 36, "request-id")
word = whole.content[0].text.split()[2]
stopped = both(max_tokens=16, messages=hello, stop_sequences=["never this", word])
check(stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == word, stopped)
check(word not in stopped.content[0].text, stopped)
cached = {"type": "ephemeral"}
both(max_tokens=8, system=[{"type": "text", "text": "Be brief.", "cache_control": cached}],
     messages=[{"role": "user", "content": [{"type": "text", "text": "Hello.", "cache_control": cached}]},
               {"role": "assistant", "content": whole.content},
               {"role": "user", "content": "Go on."}],
     metadata={"user_id": "ann"}, service_tier="auto", extra_body={"top_k": 5, "top_p": 0.9, "seed": 7},
     thinking={"type": "enabled", "budget_tokens": 1024})
bearer = anthropic.Anthropic(base_url=base_url, auth_token=key, api_key=None, max_retries=0)
check(bearer.messages.create(model=model, max_tokens=2, messages=hello).content, "Authorization")

# the tokens of a prompt
counted = messages.count_tokens(model=model, messages=hello, system="Be brief.")
usage = messages.create(model=model, max_tokens=1, messages=hello, system="Be brief.").usage
check(counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens, counted)


# an answer that is an instance of a class; the client sends no bounds of strings
class Guest(pydantic.BaseModel):
    name: typing.Literal["Ann", "Bob"]
    comes: bool


if not scripted:
    asked = {"model": model, "max_tokens": 200, "output_format": Guest,
             "messages": [{"role": "user", "content": "Ann comes, Bob does not."}]}
    check(isinstance(messages.parse(**asked).parsed_output, Guest), "messages.parse()")
    if streams:
        with messages.stream(**asked) as stream:
            check(isinstance(stream.get_final_message().parsed_output, Guest), "messages.stream()")

# a call, its result, the answer
schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 16}},
          "required": ["city"], "additionalProperties": False}
tools = [{"name": name, "description": f"The {name} in a city.", "input_schema": schema, "strict": True}
         for name in ("weather", "time")]
question = [{"role": "user", "content": "Is it cold in Oslo?"}]
for choice, names in [({"type": "any", "disable_parallel_tool_use": True}, {"weather", "time"}),
                      ({"type": "tool", "name": "time"}, {"time"})]:
    called = both(max_tokens=64, messages=question, tools=tools, tool_choice=choice)
    calls = [block for block in called.content if block.type == "tool_use"]
    check(called.stop_reason == "tool_use" and len(calls) == 1, called)
    check(calls[0].name in names and list(calls[0].input) == ["city"], calls)
results = [{"type": "tool_result", "tool_use_id": calls[0].id, "content": "noon", "is_error": False}]
question += [{"role": "assistant", "content": called.content}, {"role": "user", "content": results}]
final = both(max_tokens=8, messages=question, tools=tools, tool_choice={"type": "none"})
check([block.type for block in final.content] == ["text"], final)
if scripted:  # a thought and two calls
    called = both(max_tokens=64, messages=question[:1], tools=tools)
    check([block.type for block in called.content] == ["thinking", "tool_use", "tool_use"], called)
    check(called.content[0].signature, called)
    both(max_tokens=64, tools=tools, messages=[question[0], {"role": "assistant", "content": called.content}, {
        "role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "cold"}
                                    for block in called.content[1:]]}])

# the client's own loop of tools
asked = []


@anthropic.beta_tool(strict=True)
def weather(city: typing.Literal["Oslo", "Paris"]) -> str:
    """The weather in a city."""
    asked.append(city)
    return f"It rains in {city}."


loop = client.beta.messages.tool_runner(
    model=model, max_tokens=64, tools=[weather], messages=hello, max_iterations=2,
    **({} if scripted else {"tool_choice": {"type": "tool", "name": "weather"}}))
turns = list(loop)
check(len(turns) == 2 and len(asked) >= 1, f"{turns} {asked}")
check(not scripted or "It rains in Oslo." in turns[-1].content[0].text, turns[-1])

# refusals
stranger = anthropic.Anthropic(base_url=base_url, api_key="sk-not-a-key-of-this-server", max_retries=0)
fine = {"model": model, "max_tokens": 4, "messages": hello}
refused(anthropic.AuthenticationError, 401, "authentication_error",
        lambda: stranger.messages.create(**fine))
refused(anthropic.NotFoundError, 404, "not_found_error",
        lambda: messages.create(**{**fine, "model": "no/such-model"}))
for fault in [{"max_tokens": 0}, {"messages": []}, {"extra_body": {"temperature": 3}},
              {"messages": [*hello, {"role": "assistant", "content": "Once"}]},
              {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
              {"thinking": {"type": "enabled", "budget_tokens": 1}}]:
    for stream in (False, True):
        refused(anthropic.BadRequestError, 400, "invalid_request_error",
                lambda: messages.create(**{**fine, **fault}, stream=stream))
if not streams:
    refused(anthropic.BadRequestError, 400, "invalid_request_error",
            lambda: messages.create(**fine, stream=True))

print(f"messages.py: {checks} checks passed in the {dialect} dialect with anthropic {anthropic.__version__}")
