#!/usr/bin/env python3
"""Compares the chat-template interpreter with PyPI `jinja2`, set up as Hugging Face does.

    pip install jinja2
    template_check.py PATH/TO/template_dump      every case: the same text, or both fail
    template_check.py --write                    writes jinja2's answers into the data files

Cases: tests/data/templates/snippets.json (one template a line, with its context and the answer),
and each *.jinja there with each context of contexts.json (answers in renders.json). The C++ tests
read the same files, so they need no Python.
"""
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

DATA = Path(__file__).parent / "data" / "templates"
NOW = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=1790000000)
OWN = {"bos_token": "<s>", "eos_token": "</s>"}


class Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller):
        return caller()


def environment():
    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = NOW.strftime
    return env


def answer(env, template, context):
    try:
        return env.from_string(template).render(**context)
    except Exception:
        return None


def main():
    snippets = json.loads((DATA / "snippets.json").read_text())
    contexts = json.loads((DATA / "contexts.json").read_text())
    renders = json.loads((DATA / "renders.json").read_text())
    env, cases, wrong = environment(), [], 0
    for s in snippets:
        theirs = answer(env, s["template"], {**OWN, **s.get("context", {})})
        if sys.argv[1] == "--write":
            s["text"] = theirs
        cases.append((s["template"], s["template"], s.get("context", {}), s["text"], theirs))
    for path in sorted(DATA.glob("*.jinja")):
        for name, context in contexts.items():
            key, source = f"{path.stem}/{name}", path.read_text()
            theirs = answer(env, source, {**OWN, **context})
            if sys.argv[1] == "--write":
                renders[key] = theirs
            cases.append((key, source, context, renders.get(key), theirs))
    if sys.argv[1] == "--write":
        line = ",\n".join(json.dumps(s, ensure_ascii=False) for s in snippets)
        (DATA / "snippets.json").write_text(f"[\n{line}\n]\n")
        (DATA / "renders.json").write_text(json.dumps(renders, ensure_ascii=False, indent=0) + "\n")
        return 0
    def split(context):
        request = {k: v for k, v in context.items() if k in ("messages", "tools")}
        own = {k: v for k, v in context.items() if k not in request}
        return {"request": request, "own": {**OWN, **own}}

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([{"template": c[1], **split(c[2])} for c in cases], file)
        file.flush()
        made = subprocess.run([sys.argv[1], file.name], stdout=subprocess.PIPE, check=True)
    lines = made.stdout.decode().split("\n")[:-1]
    if len(lines) != len(cases):
        sys.exit(f"{len(cases)} cases, {len(lines)} answers")
    for (key, _, _, stored, theirs), line in zip(cases, map(json.loads, lines)):
        if line.get("text") != theirs or stored != theirs:
            wrong += 1
            print(f"{key!r}\n  jinja2 {theirs!r}\n  stored {stored!r}\n  valar  {line}")
    print(f"{len(cases)} cases, {wrong} differ")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
