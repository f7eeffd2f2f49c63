#!/usr/bin/env python3
"""Token masks and compiling beside llguidance and xgrammar, on the schemas of schemas.py, in one run.

    masks.py DUMP MODEL.gguf [COUNT]    DUMP is the program grammar_dump

All get the vocabulary of the model and the same tokens, one thread, no cache of compiled grammars. A
token's cost is its mask and the step behind it, in CPU time; of the peers the calls of their Python
packages are timed, which cost a microsecond or two by themselves. A schema counts as accepted where
its values (valid by jsonschema-rs) are; wrong are accepted texts that jsonschema-rs refuses. Fails where
valar accepts fewer schemas than COUNT, or a wrong text. Needs jsonschema-rs; llguidance and xgrammar
(with torch) where they are to be measured, too.
"""
import importlib
import importlib.metadata
import json
import pathlib
import random
import sys
import time

import jsonschema_rs

import schemas

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from grammar_check import Dump, mutants


def optional(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


llguidance, xgrammar = optional("llguidance"), optional("xgrammar")

dump, model = sys.argv[1:3]
count = int(sys.argv[3]) if len(sys.argv) > 3 else 1000
now = time.thread_time_ns


class Valar(Dump):
    """The program: it also says how the texts are tokens, and what the tokens are."""

    def run(self, schema, texts, tokens):
        reply = self.ask(schema=schema, strict=False, texts=texts, timing=texts)
        if not reply["ok"]:
            raise ValueError(reply["error"])
        return reply["compile_us"], reply["mask_us"], reply["accepts"]


class Peer:
    def run(self, schema, texts, tokens):
        begin = now()
        compiled = self.compile(schema)
        compile_us, mask_us, accepts = (now() - begin) / 1000, [], []
        for ids in tokens:
            step, ended = self.matcher(compiled)
            for token in ids:
                begin = now()
                taken = step(token)
                mask_us.append((now() - begin) / 1000)
                if not taken:
                    break
            accepts.append(bool(ids) and taken and ended())
        return compile_us, mask_us, accepts


class Llguidance(Peer):
    def __init__(self, pieces, end):
        class Vocabulary:
            eos_token_id = end
            bos_token_id = None
            tokens = pieces
            special_token_ids = [i for i, p in enumerate(pieces) if not p]

            def __call__(self, text):
                return list(text if isinstance(text, bytes) else text.encode())
        self.tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()), n_vocab=len(pieces))

    def compile(self, schema):
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        matcher = llguidance.LLMatcher(self.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def matcher(self, compiled):
        matcher = compiled.deep_copy()

        def step(token):
            matcher.compute_bitmask()
            return matcher.consume_token(token)
        return step, matcher.is_accepting


class Xgrammar(Peer):
    def __init__(self, pieces, end):
        self.info = xgrammar.TokenizerInfo(pieces, xgrammar.VocabType.RAW, stop_token_ids=[end])
        self.compiler = xgrammar.GrammarCompiler(self.info, max_threads=1, cache_enabled=False)
        self.mask = xgrammar.allocate_token_bitmask(1, len(pieces))

    def compile(self, schema):
        return self.compiler.compile_json_schema(json.dumps(schema), strict_mode=False)

    def matcher(self, compiled):
        matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)

        def step(token):
            matcher.fill_next_token_bitmask(self.mask)
            return matcher.accept_token(token)
        return step, matcher.is_terminated


def write(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def share(values, part):
    return sorted(values)[min(len(values) - 1, int(len(values) * part))] if values else 0


def main():
    valar = Valar(dump, model)
    pieces = [bytes.fromhex(p) for p in valar.ask(vocabulary=True)["pieces"]]
    end = valar.ask(vocabulary=True)["ends"][0]
    sides = {"valar": valar}
    for module, peer in ((llguidance, Llguidance), (xgrammar, Xgrammar)):
        if module:
            sides[f"{module.__name__} {importlib.metadata.version(module.__name__)}"] = peer(pieces, end)
    found = {name: {"compile": [], "mask": [], "accepted": 0, "wrong": 0} for name in sides}
    rng = random.Random(1)
    for index in range(count):
        made = schemas.make(index)
        judge = jsonschema_rs.Draft202012Validator(made["schema"], validate_formats=True)
        for value in made["values"]:
            judge.validate(value)
        bad = [b for b in (mutants(rng, v) for v in made["values"] for _ in range(3)) if not judge.is_valid(b)]
        texts = [write(v) for v in made["values"] + bad]
        tokens = valar.ask(encode=texts)["tokens"]
        for name, side in sides.items():
            row = found[name]
            try:
                compile_us, mask_us, accepts = side.run(made["schema"], texts, tokens)
            except Exception as error:  # what a side refuses, it does not accept
                print(f"{made['name']}: {name} refuses: {str(error)[:200]}", file=sys.stderr)
                continue
            row["compile"].append(compile_us)
            row["mask"] += mask_us
            row["accepted"] += all(accepts[:len(made["values"])])
            row["wrong"] += sum(accepts[len(made["values"]):])
            if name == "valar":
                for text, accept in zip(texts, accepts):
                    if accept != (text in texts[:len(made["values"])]):
                        print(f"{made['name']}: accepted is {accept}: {text}", file=sys.stderr)
    print(f"{len(pieces)} tokens, {count} schemas, {len(found['valar']['mask'])} masks")
    print("| | mask us: median | p90 | p99 | worst | compile ms: median | p99 | accepted | wrong accepts |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in found.items():
        masks = " | ".join(f"{share(row['mask'], p):.1f}" for p in (0.5, 0.9, 0.99, 1))
        compiles = " | ".join(f"{share(row['compile'], p) / 1000:.2f}" for p in (0.5, 0.99))
        print(f"| {name} | {masks} | {compiles} | {row['accepted']} | {row['wrong']} |")
    sys.exit(found["valar"]["accepted"] < count or found["valar"]["wrong"] > 0)


main()
