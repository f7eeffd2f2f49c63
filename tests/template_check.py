#!/usr/bin/env python3
"""Compares the chat-template interpreter with PyPI `jinja2`, set up as Hugging Face does.

    pip install jinja2
    template_check.py PATH/TO/template_dump      every case: the same text, or both fail
    template_check.py --write                    writes jinja2's answers into the data files
    template_check.py PATH/TO/template_dump ARCHIVE ...    every *.jinja in these archives, too
    template_check.py --unpack FOLDER ARCHIVE ...          puts those there, each text once

Published templates stand in archives that pip downloads (data/templates/published.txt says which).

Cases: tests/data/templates/snippets.json (one template a line, with its context and the answer),
and each *.jinja there with each context of contexts.json (answers in renders.json). The C++ tests
read the same files, so they need no Python. Beyond them, here alone: a grid of every filter, test
and method on values of every kind, where an error is right too for what jinja2 prints as an address
in memory, and for a pprint over several lines.
"""
import copy
import datetime
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

DATA = Path(__file__).parent / "data" / "templates"
NOW = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=1790000000)
OWN = {"bos_token": "<s>", "eos_token": "</s>"}


VALUES = """'abc def' | 'a<b>&"\\'' | ' Hello World ' | 12 | -7.5 | 2.5 | true | none | missing | [3, 1, 2]
| ['b','A','c'] | {'b': 2, 'a': 1} | ('x', 'y') | '' | [] | '42' | '3.7' | messages[0].content | messages"""
FILTERS = """abs attr('x') batch(2)|list batch(2,'-')|list capitalize center(20) center count d('x')
dictsort e escape first float forceescape format(1) groupby('role') indent indent(2,true) int
int(base=16) int(7) items|list join join('-') last length list lower max min pprint reverse
reverse|list round round(1) round(1,'floor') round(method='ceil') safe safe|e slice(2)|list
slice(2,'.')|list sort sort(reverse=true) string sum title tojson trim truncate(5) truncate(8,true)
truncate(6,false,'~',0) unique|list upper urlencode wordcount replace('a','X') replace('a','X',1)
default('z',true) map('upper')|list select|list reject|list selectattr('a')|list"""
TESTS = """boolean callable defined escaped even false float integer iterable lower mapping none
number odd sequence string true undefined upper divisibleby(3) eq(12) in([12,none]) sameas(none)
gt(1) filter test ne(12) le(12) ge(12) lt(12)"""
STRINGS = """'abcabc' | ' aB1 ' | '' | 'Hello World' | '-42' | '\u0663\u00bd\u00b2' | '\u00df\u03a3\u03c2'
| 'a\\tb\\nc\\td' | messages[1].content | messages[0].content | 'a<b'|safe"""
METHODS = """capitalize() casefold() center(11) center(12,'*') center(11,'*') count('b') count('b',2)
count('') endswith('c') endswith(('c','d')) endswith('c',1,3) expandtabs() expandtabs(4) find('b')
find('b',2) find('b',-2,9) find('',3) find('',99) format(1) index('b') index('zz') rindex('b')
isalnum() isalpha() isascii() isdecimal() isdigit() isidentifier() islower() isnumeric()
isprintable() isspace() istitle() isupper() join(['x','y']) ljust(9) ljust(9,'.') lower() lstrip()
lstrip('a_') partition('b') partition('_') removeprefix('a') removesuffix('c') replace('b','<>')
rfind('b') rjust(9) rjust(3,'.') rpartition('b') rpartition('zz') rsplit() rsplit('b',1) rstrip()
split() split('b') splitlines() startswith('a') startswith('b',1) strip() swapcase() title()
upper() zfill(7) zfill(2)"""
GRID_CONTEXT = {"messages": [
    {"role": "user", "content": "Stra\u00dfe <b>ab</b> & \"c\" it's"},
    {"role": "assistant", "content": "a,b ,c  d\te\n 12 -3"}]}


def grid():
    for value in VALUES.replace("\n", " ").split(" | "):
        yield from (f"{{{{ {value}|{name} }}}}" for name in FILTERS.split())
        yield from (f"{{{{ {value} is {name} }}}}" for name in TESTS.split())
    for value in STRINGS.replace("\n", " ").split(" | "):
        yield from (f"{{{{ ({value}).{name} }}}}" for name in METHODS.split())


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


def published(archive):
    """Name and text of each template in a wheel or an sdist."""
    if archive.endswith(".whl"):
        with zipfile.ZipFile(archive) as file:
            for name in sorted(file.namelist()):
                if name.endswith(".jinja"):
                    yield name, file.read(name).decode()
        return
    with tarfile.open(archive) as file:
        for member in sorted(file.getmembers(), key=lambda m: m.name):
            if member.name.endswith(".jinja") and "/templates/" in member.name:
                yield member.name, file.extractfile(member).read().decode()


def unpack(folder, archives):
    found = {}
    for archive in archives:
        for name, source in published(archive):
            found.setdefault(source, f"{Path(archive).name.split('-')[0]}-{Path(name).name}")
    Path(folder).mkdir(exist_ok=True)
    for source, name in found.items():
        (Path(folder) / name).write_text(source)
    print(f"{len(found)} templates")


def main():
    if sys.argv[1] == "--unpack":
        return unpack(sys.argv[2], sys.argv[3:])
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
    for archive in sys.argv[2:]:
        found = {source: name for name, source in published(archive)}  # each text once
        print(f"{archive}: {len(found)} templates")
        for source, file in found.items():
            for name, context in contexts.items():
                theirs = answer(env, source, {**OWN, **copy.deepcopy(context)})
                cases.append((f"{file}/{name}", source, context, theirs, theirs))
    if sys.argv[1] != "--write":
        for source in grid():
            context = copy.deepcopy(GRID_CONTEXT)  # `indent` changes a list
            theirs = answer(env, source, {**OWN, **context})
            cases.append((source, source, GRID_CONTEXT, theirs, theirs))
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
        unlike = " object at 0x" in str(theirs) or ("pprint" in key and "\n" in str(theirs))
        if unlike and "error" in line:
            continue
        if line.get("text") != theirs or stored != theirs:
            wrong += 1
            print(f"{key!r}\n  jinja2 {theirs!r}\n  stored {stored!r}\n  valar  {line}")
    print(f"{len(cases)} cases, {wrong} differ")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
