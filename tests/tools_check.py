#!/usr/bin/env python3
"""Calls of tools by a real model, over HTTP: are there some where they are due, and do they fit?

    pip install jsonschema
    tools_check.py URL MODEL [--generated N] [--weak] [--inspect PROGRAM FILE.gguf]

A server with Qwen2.5-Coder must answer the conversations of data/qwen25-coder with calls as they are due;
N generated prompts with 1 to 8 tools each (default 200) must give calls that validate, with `auto` and with
`required`, with `auto` nine of ten a call and eight of ten the right one. --weak: another model, of which
only what is promised is wanted.
--inspect: prompts, as examples/inspect renders them, equal jinja2's to the byte.
"""
import argparse
import concurrent.futures
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import urllib.request

import jsonschema

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("model")
parser.add_argument("--generated", type=int, default=200)
parser.add_argument("--weak", action="store_true")
parser.add_argument("--inspect", nargs=2)
options = parser.parse_args()
path = pathlib.Path(__file__).parent / "data/qwen25-coder/rendered.json"
conversations = [c for c in json.loads(path.read_text(encoding="utf-8")) if "tools" in c]
NOT_DUE = ("tool-none", "tool-result")  # small talk, and a result to tell of
failed = []


def check(condition, *words):
    if not condition:
        failed.append(words)
        print("FAILED", *words)


def respond(tools, turns, **more):
    body = {"model": options.model, "input": turns, "temperature": 0, "max_output_tokens": 200,
            **({"tools": tools} if tools else {}), **more}
    request = urllib.request.Request(options.url + "/v1/responses", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)


def at_once(function, jobs):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(function, jobs))


def calls_of(reply):
    return [item for item in reply["output"] if item["type"] == "function_call"]


def text_of(reply):
    return "".join(part["text"] for item in reply["output"] if item["type"] == "message" for part in item["content"])


def check_calls(reply, tools, *where):
    """Every call is of a declared tool and validates, whatever the model is."""
    schemas = {tool["name"]: tool["parameters"] for tool in tools}
    for call in calls_of(reply):
        check(call["name"] in schemas, *where, "no such tool", call)
        try:
            jsonschema.validate(json.loads(call["arguments"]), schemas[call["name"]],
                                format_checker=jsonschema.FormatChecker())
        except (ValueError, jsonschema.ValidationError) as error:
            check(False, *where, call, error)


def strict(tools):
    return [{"type": "function", **tool["function"], "strict": True} for tool in tools]


def items(messages):
    """A conversation of jinja2's kind as input items."""
    made, last = [], None
    for message in messages:
        for call in message.get("tool_calls", []):
            last = f"call_{len(made)}"
            made.append({"type": "function_call", "call_id": last, "name": call["function"]["name"],
                         "arguments": json.dumps(call["function"]["arguments"])})
        if message["role"] == "tool":
            made.append({"type": "function_call_output", "call_id": last,
                         "output": message["content"]})
        elif not message.get("tool_calls"):
            made.append({"role": message["role"], "content": message["content"]})
    return made


# ---- The conversations ------------------------------------------------------------------------

def rendered(body):
    program, model = options.inspect
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(body, file)
        file.flush()
        made = subprocess.run([program, model, "--json", "--render", file.name], check=True,
                              capture_output=True)
    return "".join(piece["text"] for piece in json.loads(made.stdout)["pieces"])


def conversation(job):
    one, choice = job
    return respond(strict(one["tools"]), items(one["messages"]), tool_choice=choice)


def run_conversations():
    named = [{"type": "function", "name": c["tools"][-1]["function"]["name"]} for c in conversations]
    jobs = [(c, choice) for c, name in zip(conversations, named)
            for choice in ("auto", "required", name)]
    for (one, choice), reply in zip(jobs, at_once(conversation, jobs)):
        tools, made = strict(one["tools"]), calls_of(reply)
        word = choice if isinstance(choice, str) else "named"
        print(f"{one['name']:13} {word:9}",
              [(c["name"], c["arguments"]) for c in made] or text_of(reply))
        check_calls(reply, tools, one["name"], word)
        if word == "named":
            check([c["name"] for c in made] == [choice["name"]], one["name"], word)
        elif word == "required":
            check(made, one["name"], word)
        elif not options.weak:
            due = one["name"] not in NOT_DUE
            check(bool(made) == due, one["name"], word)
            check(not due or made and made[0]["name"] == tools[0]["name"], one["name"], word, "another tool")
    if options.inspect:
        for one in conversations:
            body = {"input": items(one["messages"]), "tools": strict(one["tools"])}
            check(rendered(body) == one["prompt"], one["name"], "prompt")
        print(f"{len(conversations)} prompts compared to the byte")


# ---- Generated prompts ------------------------------------------------------------------------

def field(kind, description="", **more):
    return {"type": kind, **({"description": description} if description else {}), **more}


def words(*values):
    return {"type": "string", "enum": list(values)}


CITIES = ("Lisbon", "Oslo", "Kyoto", "Nairobi", "Quito")
NAMES = ("Ada", "Bruno", "Chen", "Dalia")
# name, description, required fields, other fields, what a user would say
TOOLS = [
    ("get_weather", "Current weather of a city", {"city": field("string", "Name of the city")},
     {"unit": words("celsius", "fahrenheit")},
     ("What is the weather in {city}?", "Is it raining in {city} right now?")),
    ("book_room", "Book a hotel room", {"city": field("string"), "nights": field("integer", minimum=1, maximum=30)},
     {"breakfast": field("boolean")},
     ("Book a room in {city} for {n} nights.", "I need a hotel room in {city}, {n} nights, with breakfast.")),
    ("send_email", "Send an e-mail", {"to": field("string", "Address", format="email"), "subject": field("string", maxLength=60)},
     {"body": field("string")},
     ("Send an email to {name}@example.org with the subject 'Meeting on {day}'.",
      "Email {name}@example.org that I will be late on {day}.")),
    ("set_alarm", "Set an alarm clock", {"time": field("string", "HH:MM", pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$")},
     {"label": field("string", maxLength=40)}, ("Wake me up at 0{n}:30.", "Set an alarm for 1{n}:15 please.")),
    ("convert_currency", "Convert an amount of money", {"amount": field("number", minimum=0), "from": words("EUR", "USD", "JPY", "GBP"), "to": words("EUR", "USD", "JPY", "GBP")},
     {}, ("How much is {n}0 EUR in USD?", "Convert {n}00 JPY to GBP.")),
    ("search_files", "Search a pattern in the files of a project", {"pattern": field("string")},
     {"path": field("string"), "max_results": field("integer", minimum=1)},
     ("Find all uses of 'parse_{day}' under src.", "Search the project files for 'TODO {name}'.")),
    ("create_event", "Create an event in the calendar", {"title": field("string"), "date": field("string", format="date")},
     {"guests": field("array", items={"type": "string"}, maxItems=5)},
     ("Add 'lunch with {name}' to my calendar on 2025-03-0{n}.",
      "Create a calendar event 'review' on 2025-11-1{n} with {name}.")),
    ("translate", "Translate a text", {"text": field("string"), "language": words("French", "German", "Spanish", "Japanese")},
     {}, ("Translate 'good morning, {name}' into German.", "Translate 'see you on {day}' to French.")),
    ("play_music", "Play music", {"query": field("string", "Artist, song or genre")}, {"shuffle": field("boolean")},
     ("Play some jazz.", "Play music by the band '{city} Nights'.")),
    ("get_stock_price", "Price of a share", {"symbol": field("string", pattern="^[A-Z]{1,5}$")}, {},
     ("What is the stock price of AAPL?", "How much is a share of MSFT today?")),
    ("set_light", "Switch or dim the lights of a room", {"room": words("kitchen", "bedroom", "office"), "brightness": field("integer", "Percent", minimum=0, maximum=100)},
     {}, ("Dim the bedroom lights to {n}0 percent.", "Turn the kitchen lights up to 100 percent.")),
    ("find_route", "Find a route between two places", {"from": field("string"), "to": field("string")},
     {"by": words("car", "train", "bike")},
     ("How do I get from {city} to Berlin by train?", "Find a route from {city} to Madrid by car.")),
    ("run_sql", "Run an SQL query on the shop's database", {"query": field("string")}, {"limit": field("integer", minimum=1, maximum=1000)},
     ("Run a SQL query that counts the rows of the table orders.", "Query the database: all customers named {name}.")),
    ("create_ticket", "Open a ticket in the issue tracker",
     {"title": field("string"), "priority": words("low", "normal", "urgent")},
     {"assignee": field("object", properties={"name": {"type": "string"}}, required=["name"], additionalProperties=False)},
     ("Open an urgent ticket: 'login page is down', assign it to {name}.", "Create a ticket 'fix typo' with low priority.")),
    ("order_pizza", "Order a pizza", {"size": words("small", "medium", "large"), "toppings": field("array", items=words("cheese", "ham", "olives", "mushrooms"), minItems=1, maxItems=4, uniqueItems=True)},
     {}, ("Order a large pizza with cheese and olives.", "I would like a small pizza with mushrooms.")),
    ("roll_dice", "Roll dice", {"count": field("integer", minimum=1, maximum=10), "sides": {"enum": [4, 6, 8, 10, 12, 20]}},
     {}, ("Roll {n} dice with 6 sides.", "Roll two 20-sided dice.")),
]


def declare(row):
    name, description, required, other, _ = row
    return {"type": "function", "name": name, "description": description, "strict": True,
            "parameters": {"type": "object", "properties": {**required, **other},
                           "required": list(required), "additionalProperties": False}}


def generate(count):
    draw = random.Random(17)
    for i in range(count):
        chosen = draw.sample(TOOLS, i % 8 + 1)
        due = draw.choice(chosen)
        question = draw.choice(due[4]).format(city=draw.choice(CITIES), name=draw.choice(NAMES),
                                              n=draw.randint(2, 9), day=draw.choice(("Monday", "Friday")))
        yield due[0], question, [declare(row) for row in chosen]


def run_generated(choice):
    jobs = list(generate(options.generated))
    replies = at_once(lambda job: respond(job[2], job[1], tool_choice=choice), jobs)
    called = right = cut = 0
    for (due, question, tools), reply in zip(jobs, replies):
        made = calls_of(reply)
        check_calls(reply, tools, question)
        is_cut = reply["incomplete_details"] is not None
        cut += is_cut
        called += bool(made)
        right += bool(made) and made[0]["name"] == due
        check(made or is_cut or choice == "auto", choice, question)
        if choice == "auto" and not made and not options.weak:
            print("  no call:", question, "|", text_of(reply)[:70])
    print(f"{choice}: {len(jobs)} prompts, {called} with calls, {right} of the right tool "
          f"({100 * right / len(jobs):.0f} %), {cut} cut by the limit")
    if choice == "auto" and not options.weak:
        check(called >= 0.9 * len(jobs), choice, "calls are missing")
        check(right >= 0.8 * len(jobs), choice, "wrong tools")


run_conversations()
for way in ("auto", "required"):
    run_generated(way)
print(f"{len(failed)} failed")
sys.exit(bool(failed))
