#!/usr/bin/env python3
"""JSON schemas as applications write them, each with values that it allows: the same ones every time.

    schemas.py [COUNT]      prints a line of JSON for each: {"name", "schema", "values"}

A piece of a schema is made together with the function that draws its values, so that what is valid
is known without asking a validator (one is asked all the same by whoever uses them).
"""
import json
import random
import string
import sys

WORDS = """account address amount author balance batch body budget category channel city code color comment
company condition contact content country created currency customer date day delivery description device
discount distance duration email end error event expiry file first flag format gender group hash height
host id image index item key kind label language last latitude length level limit line link location
longitude manager message method model month name note number offset order origin owner page parent path
payment person phone plan platform point port price priority product profile project quantity query rank
rate rating reason record region request result review role room rule score sender service session size
sku source stage start state status step street summary table tag target task tax team text theme time
title token topic total type unit url user value vendor version view volume weight width year zone""".split()
ACTIONS = ["create", "read", "update", "delete", "list", "move", "attack", "defend", "trade", "wait"]
FORMATS = {
    "date": lambda r: f"{r.randint(1990, 2039)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}",
    "time": lambda r: f"{r.randint(0, 23):02}:{r.randint(0, 59):02}:{r.randint(0, 59):02}Z",
    "date-time": lambda r: FORMATS["date"](r) + "T" + FORMATS["time"](r),
    "uuid": lambda r: "-".join("".join(r.choices("0123456789abcdef", k=n)) for n in (8, 4, 4, 4, 12)),
    "email": lambda r: f"{r.choice(WORDS)}.{r.choice(WORDS)}@{r.choice(WORDS)}.com",
    "ipv4": lambda r: ".".join(str(r.randint(0, 255)) for _ in range(4)),
    "uri": lambda r: f"https://{r.choice(WORDS)}.com/{r.choice(WORDS)}?{r.choice(WORDS)}={r.randint(0, 99)}",
    "hostname": lambda r: f"{r.choice(WORDS)}.{r.choice(WORDS)}.org",
    "duration": lambda r: f"P{r.randint(1, 9)}DT{r.randint(1, 23)}H",
}
PATTERNS = {
    "^[A-Z]{2,3}-[0-9]{4,6}$": lambda r: "".join(r.choices(string.ascii_uppercase, k=2)) + f"-{r.randint(1000, 999999)}",
    "^\\+?[0-9]{7,15}$": lambda r: f"+{r.randint(10**8, 10**12)}",
    "^#[0-9a-fA-F]{6}$": lambda r: f"#{r.randint(0, 0xffffff):06x}",
    "^[a-z0-9]+(-[a-z0-9]+)*$": lambda r: f"{r.choice(WORDS)}-{r.choice(WORDS)}-{r.randint(1, 99)}",
    "^v\\d+\\.\\d+\\.\\d+(-(alpha|beta|rc)\\.\\d+)?$": lambda r: f"v{r.randint(0, 9)}.{r.randint(0, 20)}.0-rc.1",
    "^(https?)://[^\\s/$.?#].[^\\s]*$": lambda r: FORMATS["uri"](r),
    "^\\w+( \\w+){0,4}$": lambda r: " ".join(r.choices(WORDS, k=3)),
    "^[01]?\\d:[0-5]\\d (AM|PM)$": lambda r: f"{r.randint(1, 12)}:{r.randint(10, 59)} PM",
}
DEEPEST = 4


def words(r, low, high):
    return " ".join(r.choices(WORDS, k=r.randint(low, high)))


class Maker:
    """Makes one schema; `r` decides its shape."""

    def __init__(self, r):
        self.r, self.definitions = r, {}

    def note(self, schema):
        """Some carry the annotations that people write."""
        if self.r.random() < 0.4:
            schema["description"] = words(self.r, 3, 12)
        return schema

    def text(self):
        kind = self.r.randrange(6)
        if kind == 0:
            name = self.r.choice(list(FORMATS))
            return {"type": "string", "format": name}, FORMATS[name]
        if kind == 1:
            pattern = self.r.choice(list(PATTERNS))
            return {"type": "string", "pattern": pattern}, PATTERNS[pattern]
        if kind == 2:
            most = self.r.choice([10, 40, 255, 2000])
            return ({"type": "string", "minLength": 1, "maxLength": most},
                    lambda r: words(r, 1, 30)[:most].strip() or "x")
        return {"type": "string"}, lambda r: words(r, 1, 12).capitalize() + r.choice([".", "!", " \u00e9\u4e16", ' "so"'])

    def number(self):
        kind = self.r.randrange(5)
        if kind == 0:
            low, high = sorted(self.r.sample(range(-1000, 100000), 2))
            return {"type": "integer", "minimum": low, "maximum": high}, lambda r: r.randint(low, high)
        if kind == 1:
            return {"type": "integer", "minimum": 0}, lambda r: r.randint(0, 10**6)
        if kind == 2:
            return {"type": "number", "minimum": 0, "maximum": 1}, lambda r: r.randint(0, 1000) / 1000
        if kind == 3:
            return {"type": "integer", "multipleOf": 5}, lambda r: 5 * r.randint(0, 500)
        return {"type": "number"}, lambda r: r.randint(-10**6, 10**6) / 100

    def one_of_names(self, most):
        count = self.r.randint(2, most)
        names = list(dict.fromkeys(self.r.choice(WORDS) + self.r.choice(["", "_", "-"]) + self.r.choice(WORDS)
                                   for _ in range(count)))
        schema = {"enum": names} if self.r.random() < 0.3 else {"type": "string", "enum": names}
        return schema, lambda r: r.choice(names)

    def leaf(self):
        return self.r.choice([self.text, self.text, self.number, lambda: self.one_of_names(12),
                              lambda: ({"type": "boolean"}, lambda r: r.random() < 0.5)])()

    def optional(self, depth):
        schema, draw = self.piece(depth + 1)
        if self.r.random() < 0.5 and isinstance(schema.get("type"), str) and "enum" not in schema:
            return dict(schema, type=[schema["type"], "null"]), lambda r: None if r.random() < 0.3 else draw(r)
        return {"anyOf": [schema, {"type": "null"}]}, lambda r: None if r.random() < 0.3 else draw(r)

    def array(self, depth):
        schema, draw = self.piece(depth + 1)
        low, high = self.r.choice([(0, 3), (1, 5), (2, 2), (0, 20)])
        out = {"type": "array", "items": schema}
        if self.r.random() < 0.5:
            out.update(minItems=low, maxItems=high)
        return out, lambda r: [draw(r) for _ in range(r.randint(low, min(high, low + 3)))]

    def tuple(self, depth):
        pieces = [self.leaf() for _ in range(self.r.randint(2, 4))]
        return ({"type": "array", "prefixItems": [s for s, _ in pieces], "items": False, "minItems": len(pieces)},
                lambda r: [draw(r) for _, draw in pieces])

    def mapping(self, depth):
        schema, draw = self.piece(depth + 1)
        if self.r.random() < 0.3:
            return ({"type": "object", "patternProperties": {"^[a-z_]+$": schema}, "additionalProperties": False},
                    lambda r: {k: draw(r) for k in r.sample(WORDS, r.randint(0, 3))})
        return ({"type": "object", "additionalProperties": schema},
                lambda r: {k: draw(r) for k in r.sample(WORDS, r.randint(0, 3))})

    def union(self, depth):
        """Objects that a word tells apart, as discriminated unions are written."""
        kinds = self.r.sample(WORDS, self.r.randint(2, 5))
        key = self.r.choice(["type", "kind", "action"])
        members = []
        for kind in kinds:
            schema, draw = self.object(depth + 1)
            schema["properties"] = {key: {"const": kind},
                                    **{k: v for k, v in schema["properties"].items() if k != key}}
            schema["required"] = [key] + [k for k in schema["required"] if k != key]
            members.append((schema, lambda r, kind=kind, draw=draw:
                            {key: kind, **{k: v for k, v in draw(r).items() if k != key}}))
        return ({self.r.choice(["anyOf", "oneOf"]): [s for s, _ in members]},
                lambda r: r.choice(members)[1](r))

    def object(self, depth, most=6):
        names = self.r.sample(WORDS, self.r.randint(1, most))
        pieces = {name: self.piece(depth + 1) for name in names}
        required = [n for n in names if self.r.random() < 0.7]
        schema = {"type": "object", "properties": {n: self.note(s) for n, (s, _) in pieces.items()},
                  "required": required}
        if self.r.random() < 0.7:
            schema["additionalProperties"] = False
        tied = None
        if len(names) > 2 and self.r.random() < 0.08:
            tied = names[0], names[-1]
            schema["dependentRequired"] = {tied[0]: [tied[1]]}

        def draw(r):
            kept = {n for n in names if n in required or r.random() < 0.5}
            if tied and tied[0] in kept:
                kept.add(tied[1])
            return {n: pieces[n][1](r) for n in names if n in kept}
        return schema, draw

    def conditional(self, depth):
        kinds = self.r.sample(WORDS, 3)
        extra = self.r.choice([w for w in WORDS if w != "kind"])
        schema, draw = self.leaf()
        out = {"type": "object", "properties": {"kind": {"enum": kinds}, extra: schema}, "required": ["kind"],
               "additionalProperties": False,
               "if": {"properties": {"kind": {"const": kinds[0]}}}, "then": {"required": [extra]}}

        def value(r):
            kind = r.choice(kinds)
            return {"kind": kind, **({extra: draw(r)} if kind == kinds[0] or r.random() < 0.5 else {})}
        return out, value

    def tree(self, depth):
        name = f"node{len(self.definitions)}"
        leaf, draw = self.leaf()
        reference = {"$ref": f"#/$defs/{name}"}
        self.definitions[name] = {
            "type": "object", "properties": {"value": leaf, "children": {"type": "array", "items": reference}},
            "required": ["value"], "additionalProperties": False}

        def value(r, left=3):
            out = {"value": draw(r)}
            if left and r.random() < 0.7:
                out["children"] = [value(r, left - 1) for _ in range(r.randint(0, 2))]
            return out
        return dict(reference), value

    def piece(self, depth):
        if depth >= DEEPEST or self.r.random() < 0.62:
            return self.leaf()
        makers = [self.object, self.object, self.object, self.array, self.array, self.optional, self.tuple,
                  self.mapping, self.union, self.conditional, self.tree]
        return self.r.choice(makers)(depth)


def make(index):
    r = random.Random(index)
    maker = Maker(r)
    if index % 20 == 0:  # a large enumeration
        big, draw_big = maker.one_of_names(200)
        schema, draw = maker.object(1)
        schema["properties"]["choice"] = big
        schema["required"] = schema["required"] + ["choice"]
        inner = draw
        draw = lambda r: {**inner(r), "choice": draw_big(r)}  # noqa: E731
    elif index % 7 == 0:
        schema, draw = maker.union(0)
    elif index % 11 == 0:
        schema, draw = maker.array(0)
    else:
        schema, draw = maker.object(0, 12)
    schema = dict(schema)
    if maker.definitions:
        schema["$defs"] = maker.definitions
    values = [draw(random.Random(1000 * index + i)) for i in range(3)]
    return {"name": f"s{index:04}", "schema": schema, "values": values}


if __name__ == "__main__":
    for i in range(int(sys.argv[1]) if len(sys.argv) > 1 else 1000):
        print(json.dumps(make(i), ensure_ascii=False))
