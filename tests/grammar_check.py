"""Holds compiled grammars against other validators. Usage:

    grammar_check.py DUMP suite FOLDER        the JSON Schema Test Suite: FOLDER/draft7, FOLDER/draft2020-12
    grammar_check.py DUMP walks MODEL [N]     N schemas, drawn; texts by uniform draws from the model's vocabulary
    grammar_check.py DUMP regexes MODEL [N]   N patterns, drawn, against Python's re
    grammar_check.py DUMP server URL [N]      N schemas, drawn; what a model answers at temperature 1

DUMP is the program grammar_dump; URL is a server's, such as http://127.0.0.1:8080. Needs
jsonschema[format-nongpl], which checks durations too, and jsonschema-rs.
"""
import concurrent.futures
import glob
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

CLAIMED = """type properties required additionalProperties items prefixItems minItems maxItems enum const anyOf oneOf
allOf ref defs minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minLength maxLength pattern
patternProperties minProperties maxProperties dependentRequired if-then-else not contains minContains maxContains
uniqueItems boolean_schema default propertyNames additionalItems dependentSchemas dependencies infinite-loop-detection
unevaluatedProperties anchor id dynamicRef date time date-time uuid email ipv4 ipv6 uri uri-reference duration
hostname""".split()
# Valid texts that are not written, of (file, group, test): what a second way of `anyOf` or an `if` evaluates.
NARROWER = {
    ("unevaluatedProperties", "unevaluatedProperties with anyOf", "when two match and has no unevaluated properties"),
    ("unevaluatedProperties", "unevaluatedProperties can see annotations from if without then and else",
     "valid in case if is evaluated"),
}
# The suite of jsonschema 4.26.0: tests at least, refused schemas at most.
FEWEST_TESTS, MOST_REFUSED = 2200, 30


class Dump:
    def __init__(self, *command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def in_order(schema, value):
    """The value with its keys in the order of the schema, as far as that shows."""
    if isinstance(value, list):
        return [in_order({}, v) for v in value]
    if isinstance(value, dict):
        order = []

        def look(s):
            if isinstance(s, dict):
                order.extend(s.get("properties", {}) if isinstance(s.get("properties"), dict) else [])
                for v in s.values():
                    look(v)
            elif isinstance(s, list):
                for v in s:
                    look(v)
        look(schema)
        keys = sorted(value, key=lambda k: order.index(k) if k in order else len(order))
        return {k: in_order(schema, value[k]) for k in keys}
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    return value


def spellings(value):
    """The value; an object of few keys in all their orders."""
    if not isinstance(value, dict) or len(value) > 4:
        return [value]
    return [dict(items) for items in itertools.permutations(value.items())]


def suite(dump, folder):
    claimed, faults, refused = 0, 0, {}
    for draft in ("draft7", "draft2020-12"):
        for path in sorted(glob.glob(f"{folder}/{draft}/**/*.json", recursive=True)):
            name = os.path.basename(path)[:-5]
            if name not in CLAIMED:
                continue
            for group in json.load(open(path, encoding="utf-8")):
                schema = group["schema"]
                if draft == "draft7" and isinstance(schema, dict):
                    schema = {"$schema": "http://json-schema.org/draft-07/schema#", **schema}
                tests = group["tests"]
                texts, owners = [], []
                for i, t in enumerate(tests):
                    for spelling in spellings(in_order(schema, t["data"])):
                        texts.append(json.dumps(spelling, ensure_ascii=False, separators=(",", ":")))
                        owners.append(i)
                reply = dump.ask(schema=schema, strict=True, texts=texts)
                if not reply["ok"]:
                    # A schema that nothing satisfies is refused, too: right where the suite has nothing valid.
                    if "nothing matches" in reply["error"] and not any(t["valid"] for t in tests):
                        claimed += len(tests)
                        continue
                    refused.setdefault(f"{draft}/{name}", []).append(f"{group['description']}: {reply['error']}")
                    continue
                for i, test in enumerate(tests):
                    claimed += 1
                    accepted = any(a for a, owner in zip(reply["accepts"], owners) if owner == i)
                    text = texts[owners.index(i)]
                    narrower = (name, group["description"], test["description"]) in NARROWER
                    if accepted != (test["valid"] and not narrower):
                        faults += 1
                        print(f"{draft}/{name}: {group['description']} / {test['description']}: {text} is "
                              f"{'valid' if test['valid'] else 'invalid'}, schema {json.dumps(schema)[:300]}")
    for place, reasons in refused.items():
        for reason in reasons:
            print(f"refused {place}: {reason}")
    refusals = sum(map(len, refused.values()))
    print(f"{claimed} tests, {faults} faults, {len(NARROWER)} held tighter, {refusals} schemas refused")
    return faults + (claimed < FEWEST_TESTS) + (refusals > MOST_REFUSED)


def draw_string(rng):
    kind = rng.randrange(6)
    if kind == 0:
        return {"type": "string"}
    if kind == 1:
        low = rng.randrange(8)
        return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(1, 30)}
    if kind == 2:
        return {"type": "string", "pattern": rng.choice(
            [r"^[A-Z]{2}-\d{3,5}$", r"^[a-z0-9_-]{1,20}$", r"\d+", r"^(foo|ba[rz])+$", r"^[^\s]+ .*$", r"^\+?[0-9 ]{7,15}$"])}
    if kind == 3:
        return {"type": "string", "format": rng.choice(
            "date time date-time uuid email ipv4 ipv6 uri uri-reference duration hostname".split())}
    if kind == 4:
        return {"enum": rng.sample(["red", "green", "blue", "a\"b", "\u00e9t\u00e9", "", 1, None, True, 2.5], rng.randrange(1, 6))}
    return {"const": rng.choice(["x", 5, None, {"a": [1]}])}


def draw_number(rng):
    out = {"type": rng.choice(["integer", "number"])}
    low = rng.randrange(-1000, 1000)
    if rng.random() < 0.5:
        out[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.5:
        out[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.randrange(5, 2000) + rng.choice([0, 0.5, 0.25])
    if rng.random() < 0.2:
        out["multipleOf"] = rng.choice([1, 2, 3, 5])
    return out


def draw_schema(rng, depth=0):
    kind = rng.randrange(10 if depth < 3 else 4)
    if kind < 2:
        return draw_string(rng)
    if kind == 2:
        return draw_number(rng)
    if kind == 3:
        return {"type": rng.choice(["boolean", "null", ["string", "null"], ["integer", "boolean"]])}
    if kind == 4:
        out = {"type": "array", "items": draw_schema(rng, depth + 1)}
        if rng.random() < 0.5:
            out["minItems"] = rng.randrange(3)
            out["maxItems"] = out["minItems"] + rng.randrange(1, 4)
        return out
    if kind == 5:
        ways = [draw_schema(rng, depth + 1) for _ in range(rng.randrange(2, 4))]
        return {"anyOf": ways}
    if kind == 6:
        out = {"oneOf": [{"type": "object", "properties": {"kind": {"const": k}, "v": draw_schema(rng, depth + 1)},
                          "required": ["kind", "v"], "additionalProperties": False} for k in "abc"[:rng.randrange(2, 4)]]}
        return out
    names = rng.sample(["name", "id", "n\u00e9", "tags", "size", "a b", "nested", "x"], rng.randrange(1, 6))
    out = {"type": "object", "properties": {n: draw_schema(rng, depth + 1) for n in names},
           "required": [n for n in names if rng.random() < 0.6]}
    choice = rng.random()
    if choice < 0.6:
        out["additionalProperties"] = False
    elif choice < 0.8:
        out["additionalProperties"] = draw_schema(rng, depth + 2)
    if rng.random() < 0.1:
        out["patternProperties"] = {"^x-": {"type": "integer"}}
    if rng.random() < 0.1 and len(names) > 1:
        out["dependentRequired"] = {names[0]: [names[1]]}
    if rng.random() < 0.1:
        out["minProperties"] = 1
    return out


NOISE = {"title": "A thing", "description": "Says what it is.", "default": None, "examples": [1, "x"], "$comment": "to do",
         "deprecated": True, "readOnly": True, "nullable": True, "x-order": 3, "markdownDescription": "*it*", "format": "int32"}


def noisy(rng, schema):
    """What schemas in the wild carry along, and does not count."""
    if isinstance(schema, dict) and "type" in schema and schema["type"] != "string":
        for key in rng.sample(list(NOISE), rng.choice([0, 0, 1, 3])):
            schema.setdefault(key, NOISE[key])
    return schema


def closed(properties, required=None, **more):
    return {"type": "object", "properties": properties, "required": list(properties) if required is None else required,
            "additionalProperties": False, **more}


def draw_wild(rng):
    """A schema as they are found in repositories and interface descriptions."""
    def value():
        return noisy(rng, rng.choice([draw_string, draw_number])(rng))

    def record():
        names = rng.sample(["id", "name", "kind", "url", "tags", "default", "$ref-like", "a/b", "size"], rng.randrange(1, 4))
        return noisy(rng, closed({n: value() for n in names}, [n for n in names if rng.random() < 0.5]))
    node = closed({"value": draw_number(rng), "children": {"type": "array", "items": {"$ref": "#/definitions/node"}, "maxItems": 2}}, ["value"])
    strings = {"type": "array", "items": {"type": "string", "maxLength": rng.choice([1, 5, 40])}, "uniqueItems": True,
               "minItems": rng.randrange(3), "maxItems": 4}
    kinds = rng.sample(["circle", "square", "line", "text"], 3)
    kind = rng.randrange(22)
    if kind == 0:
        return {"$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://example.com/a.json", "definitions": {"node": node},
                "$ref": "#/definitions/node", "type": "string"}
    if kind == 1:
        return {"$defs": {k: closed({"kind": {"const": k}, "v": value()}) for k in kinds}, "oneOf": [{"$ref": f"#/$defs/{k}"} for k in kinds]}
    if kind == 2:
        return {"allOf": [{"type": "object", "properties": {"id": value()}, "required": ["id"]}, {"properties": {"name": value()}},
                          {"$ref": "#/$defs/more"}], "$defs": {"more": {"properties": {"size": value()}}}, "unevaluatedProperties": False}
    if kind == 3:
        return closed({"kind": {"enum": kinds}, "radius": value(), "side": value()}, ["kind"],
                      **{"if": {"properties": {"kind": {"const": kinds[0]}}}, "then": {"required": ["radius"]}, "else": {"required": ["side"]}})
    if kind == 4:
        return closed({"card": value(), "address": value(), "note": value()}, [],
                      dependentSchemas={"card": {"required": ["address"]}}, dependentRequired={"note": ["card"]})
    if kind == 5:
        return closed({"tags": strings, "labels": {"type": "array", "items": {"enum": list("abcdefghijkl")}, "uniqueItems": True, "maxItems": 3}})
    if kind == 6:
        return closed({"code": {"type": "string", "pattern": rng.choice(["^(?!0)[0-9]{3}$", "^(?=.*[A-Z])(?=.*[0-9])[A-Za-z0-9]{4,8}$",
                                                                        "^(?!test)[a-z]{2,6}$"])}})
    if kind == 7:
        return {"enum": [f"value-{i}" for i in range(rng.choice([3, 400, 900]))], "title": "Many"}
    if kind == 8:
        return closed({"price": {"type": "number", "multipleOf": rng.choice([0.5, 0.25, 2.5, 10]), "minimum": 0}, "n": {"type": "integer", "multipleOf": 7}})
    if kind == 9:
        return closed({"any": True, "never": False, "some": {}}, ["some"], maxProperties=2)
    if kind == 10:
        return {"type": "object", "additionalProperties": {"anyOf": [value(), record()]}, "maxProperties": 3, "propertyNames": {"pattern": "^[a-z]{1,5}$"}}
    if kind == 11:
        return {"oneOf": [{"type": "string", "maxLength": 9}, {"type": "array", "items": value(), "maxItems": 3}, {"type": "null"}, record()]}
    if kind == 12:
        return {"oneOf": [closed({"a": value()}, []), closed({"a": value(), "b": value()}, []), closed({"b": value(), "c": value()}, ["c"])]}
    if kind == 13:
        return {"type": "object", "properties": {"a": value(), "b": value()}, "not": {"required": ["a", "b"]}, "additionalProperties": False}
    if kind == 14:
        return {"type": "object", "properties": {"x": {"$anchor": "x", **closed({"x": {"$ref": "#x"}}, [])}}, "additionalProperties": False}
    if kind == 15:
        return {"type": "array", "prefixItems": [value(), {"const": {"b": 1, "a": [None]}}], "items": False, "minItems": 2}
    if kind == 16:
        return {"type": "array", "contains": {"const": 0}, "minContains": 1, "maxContains": 2, "items": {"type": "integer", "minimum": -3, "maximum": 3},
                "maxItems": 5}
    if kind == 17:
        return {"definitions": {"positive": {"type": "integer", "minimum": 1}}, "type": "object", "properties": {
            "w": {"$ref": "#/definitions/positive"}, "h": {"allOf": [{"$ref": "#/definitions/positive"}, {"maximum": 99}]},
            "d": {"anyOf": [{"$ref": "#/definitions/positive"}, {"type": "null"}]}}, "required": ["w", "h"], "additionalProperties": False}
    if kind == 18:
        return closed({"s": {"type": "string", "not": {"enum": ["a", "b", ""]}, "maxLength": 2}, "n": {"type": "integer", "not": {"const": 0},
                                                                                                "minimum": -2, "maximum": 12}})
    if kind == 19:
        return {"type": "object", "properties": {"name": value()}, "patternProperties": {"^x-": {"type": "boolean"}, "^[0-9]+$": value()},
                "additionalProperties": False, "minProperties": 1, "maxProperties": 3}
    if kind == 20:
        return {"anyOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object", "properties": {"a": value(), "b": value(), "c": record()},
                "additionalProperties": False}
    return record()


def mutants(rng, value):
    """Values that differ in one place, keys where they were."""
    others = [None, True, 0, -7, 2.5, 1000, "", "a", "zz9", [], {}, [1], {"a": 1}]
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.3:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.1:
            return {**value, "zz": rng.choice(others)}
        return {k: mutants(rng, v) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        if rng.random() < 0.3:
            return value[:i] + value[i + 1:]
        if rng.random() < 0.3:
            return value + [rng.choice(value)]
        return value[:i] + [mutants(rng, value[i])] + value[i + 1:]
    if isinstance(value, str) and value and rng.random() < 0.5:
        i = rng.randrange(len(value))
        return value[:i] + rng.choice(["", "x", "7", "-", value[i] * 2]) + value[i + 1:]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 10])
    return rng.choice(others)


class Validators:
    """jsonschema and jsonschema-rs; a leap second is one for the latter alone."""
    def __init__(self, schema):
        import jsonschema
        import jsonschema_rs
        old = "draft-07" in str(schema.get("$schema")) if isinstance(schema, dict) else False
        python = jsonschema.Draft7Validator if old else jsonschema.Draft202012Validator
        rust = jsonschema_rs.Draft7Validator if old else jsonschema_rs.Draft202012Validator
        self.python = python(schema, format_checker=python.FORMAT_CHECKER)
        self.rust = rust(schema, validate_formats=True)

    def errors(self, value):
        return ([e.message for e in self.python.iter_errors(value) if not re.search(":60.* is not a '(date-)?time'", e.message)] +
                [e.message for e in self.rust.iter_errors(value)])

    def verdict(self, value):
        """Whether it is valid; None where the two do not agree."""
        verdicts = {self.python.is_valid(value), self.rust.is_valid(value)}
        return verdicts.pop() if len(verdicts) == 1 else None


def named_place(schema, reply):
    """Whether a refusal names a place in the schema."""
    at = schema
    for key in reply["param"].split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        at = at[int(key)] if isinstance(at, list) else at.get(key, None) if isinstance(at, dict) else None
    return at is not None and reply["error"].startswith(f"schema at '{reply['param']}'")


def check_text(text, validators, where):
    """Faults of one strict text."""
    try:
        why = validators.errors(json.loads(text))
    except ValueError as error:
        why = [repr(error)]
    if why:
        print(f"{why[0][:200]}: {text[:300]} for {json.dumps(where)[:600]}")
    return bool(why)


def ends_in_key(text):
    """Whether a text that was cut off is inside a long key."""
    opened, place = [], 0
    while place < len(text):
        char = text[place]
        string = re.compile(r'"(?:[^"\\]|\\.)*("|$)', re.S).match(text, place) if char == '"' else None
        if string and not string[1]:
            before = text[:place].rstrip()[-1:]
            return len(text) - place > 1000 and opened[-1:] == ["{"] and before in ("{", ",")
        if char in "{[":
            opened.append(char)
        elif char in "}]":
            opened.pop()
        place = string.end() if string else place + 1
    return False


def walks(dump, count):
    faults = texts = refused = unfinished = changed = 0
    for seed in range(count):
        rng = random.Random(seed)
        schema = draw_wild(rng) if seed % 3 == 0 else draw_schema(rng)
        request = {"schema": schema, "strict": True, "walks": 1, "seed": seed, "most": rng.choice([10, 40, 120]), "space": rng.randrange(3)}
        reply = dump.ask(**request)
        if not reply["ok"]:
            refused += 1
            if seed % 3 == 0 or "nothing matches" not in reply["error"] or not named_place(schema, reply):
                faults += 1
                print(f"refused: {reply['error']}: {json.dumps(schema)}")
            continue
        validators = Validators(schema)
        for walked in reply["walks"]:
            if "endless" in walked:  # the draws found no way out in time; of a key there is always one
                unfinished += 1
                if ends_in_key(walked["endless"]):
                    faults += 1
                    print(f"a key without an end: {walked['endless'][:100]} for {json.dumps(schema)[:600]}")
                continue
            texts += 1
            if "text" not in walked:
                faults += 1
                print(f"no way on: {walked} for {json.dumps(schema)[:600]}")
                continue
            faults += check_text(walked["text"], validators, schema)
            values = [mutants(rng, json.loads(walked["text"])) for _ in range(8)]
            spelled = [json.dumps(v, ensure_ascii=False, separators=(",", ":")) for v in values]
            for value, text, accepted in zip(values, spelled, dump.ask(schema=schema, texts=spelled)["accepts"]):
                verdict = validators.verdict(value)
                changed += 1
                # Python writes large numbers with exponents, which numbers with bounds do not take.
                if verdict is None or accepted == verdict or re.search(r"\de[+-]\d", text):
                    continue
                orders = [json.dumps(v, ensure_ascii=False, separators=(",", ":")) for v in spellings(value)]
                if accepted or not any(dump.ask(schema=schema, texts=orders)["accepts"]):
                    faults += 1
                    print(f"{'accepted' if accepted else 'not accepted'}: {text[:300]} for {json.dumps(schema)[:600]}")
    print(f"{texts} texts and {changed} changed ones, {faults} faults, {refused} schemas refused, {unfinished} texts not finished")
    return faults


def ask_server(url, model, seed):
    """The schema, and the status and object that its request is answered with."""
    rng = random.Random(seed)
    schema = draw_wild(rng) if seed % 3 == 0 else draw_schema(rng)
    text = {"format": {"type": "json_schema", "name": "drawn", "schema": schema, "strict": True}}
    body = {"model": model, "input": "Give me an example.", "text": text, "temperature": 1, "seed": seed,
            "max_output_tokens": rng.choice([100, 400])}
    request = urllib.request.Request(url + "/v1/responses", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            return schema, 200, json.load(reply)
    except urllib.error.HTTPError as error:
        return schema, error.code, json.load(error)


def server(url, count):
    with urllib.request.urlopen(url + "/v1/models") as reply:
        model = json.load(reply)["data"][0]["id"]
    faults = texts = refused = unfinished = 0
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for schema, status, reply in pool.map(lambda seed: ask_server(url, model, seed), range(count)):
            if status == 400 and "nothing matches" in reply["error"]["message"]:
                refused += 1
            elif status != 200 or reply["status"] != "completed":
                faults += 1
                print(f"{status} {json.dumps(reply)[:300]}: {json.dumps(schema)[:600]}")
            elif reply["incomplete_details"]:
                unfinished += 1
            else:
                texts += 1
                text = "".join(part["text"] for item in reply["output"] for part in item["content"])
                faults += check_text(text, Validators(schema), schema)
    print(f"{texts} texts, {faults} faults, {refused} schemas refused, {unfinished} texts not finished")
    return faults


def draw_pattern(rng, depth=0):
    def atom():
        return rng.choice(["a", "b", "x", r"\d", r"\w", r"\s", ".", "[a-f]", "[^a-z]", r"[\d_-]", r"\.", "\u00e9", r"\x41", r"\u00e9",
                           r"\W", r"\S", r"\D", "[^\\s]"] + ([f"({draw_pattern(rng, depth + 1)})", f"(?:{draw_pattern(rng, depth + 1)})"] if depth < 3 else []))

    def piece():
        return atom() + rng.choice(["", "", "", "*", "+", "?", "{2}", "{1,3}", "{2,}", "*?", "+?"])
    return "|".join("".join(piece() for _ in range(rng.randrange(1, 5))) for _ in range(rng.choice([1, 1, 1, 2, 3])))


def python_matches(pattern, text, flags=0):
    """Whether re says that it matches; None where it tries all ways for seconds."""
    def stop(*_):
        raise TimeoutError
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        return bool(re.fullmatch(pattern, text, flags))
    except TimeoutError:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def regexes(dump, count):
    faults = texts = undecided = 0
    for seed in range(count):
        rng = random.Random(seed)
        pattern = draw_pattern(rng)
        sample = ["".join(rng.choice("abxf1_-. A\u00e9") for _ in range(rng.randrange(6))) for _ in range(20)]
        reply = dump.ask(regex=pattern, walks=3, seed=seed, most=20, texts=sample)
        if not reply["ok"]:
            print(f"refused: {reply['error']}")
            faults += 1
            continue
        for walked in reply["walks"]:
            if "endless" in walked:
                continue
            texts += 1
            verdict = python_matches(pattern, walked["text"], re.S) if "text" in walked else False
            undecided += verdict is None
            if verdict is False:
                faults += 1
                print(f"{pattern!r} does not match {walked}")
        for text, accepted in zip(sample, reply["accepts"]):
            texts += 1
            verdict = python_matches(pattern, text)
            undecided += verdict is None
            # Of \\W, \\D and \\S only what all engines agree on is accepted.
            if verdict not in (None, accepted) and not (not accepted and "\u00e9" in text):
                faults += 1
                print(f"{pattern!r} and {text!r}: {accepted}")
    print(f"{texts} texts, {faults} faults, {undecided} that re did not decide in time")
    return faults


def main():
    command, kind, place = sys.argv[1], sys.argv[2], sys.argv[3]
    count = int(sys.argv[4]) if len(sys.argv) > 4 else None
    if kind == "suite":
        sys.exit(suite(Dump(command), place) > 0)
    if kind == "server":
        sys.exit(server(place, count or 5000) > 0)
    check = {"walks": walks, "regexes": regexes}[kind]
    sys.exit(check(Dump(command, place), count or {"walks": 5000, "regexes": 2000}[kind]) > 0)


if __name__ == "__main__":
    main()
