#!/usr/bin/env python3
"""Compares the tokenizer with PyPI `tokenizers` and `sentencepiece`, id by id.

    pip install tokenizers sentencepiece gguf
    tokenizer_check.py PATH/TO/tokenizer_dump

Small vocabularies are trained here, written as GGUF and read back by tokenizer_dump: for each
pre-tokenizer 1,000 varied texts (as request text and as template text), every assigned character
of Unicode 14 up to U+1FFFF in a fixed setting, and for SentencePiece the same texts with
combinations of dummy prefix and byte fallback. Ends with 0 when all ids are equal.
"""
import io
import json
import random
import struct
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import gguf
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

MODERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im_end|>>"]
USER = ["<tool>", "<tool>x", "\n\n\n", "  x", "\u00e9\u00e9"]

SCRAPS = [
    "the quick brown fox", "Call me Ishmael.", "Grüße aus Köln", "crème brûlée", "Привет, мир",
    "γειά σου Κόσμε", "你好,世界", "こんにちは", "안녕하세요", "สวัสดีชาวโลก", "नमस्ते दुनिया",
    "مرحبا بالعالم", "שלום עולם", "Tiếng Việt", "İstanbul ıssız", "straße ſtraſse", "ǅungla",
    "e\u0301\u0302", "a\u0308\u0323", "\u1100\u1161\u11a8", "가각", "\u212b\u2126", "ﬁﬂﬆ", "n\u0303",
    "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "☃\ufe0f",
    "\U0001d54f\U0001d7d8", "x²³¹¼Ⅷ", "٠١٢٣٤٥", "१२३", "1234567", "3.14159", "1,000,000",
    "0x1F", "2026-11-23", "I'm", "we'll", "they've", "don't", "she'd", "it's", "you're", "I'M",
    "WE'LL", "'S", "'ſx", "'Tis", "rock'n'roll", "''", "' s", "'re'", "\u2019s", "for (int i=0;",
    "if(x==1){\n\treturn;\n}", "def f(a, *b):\n    pass\n", "#include <vector>", "a->b::c", "/* */",
    "<p class=\"x\">", "https://example.com/a?b=c&d=%20", "\\n\\t", "a_b_c", "CamelCase", "___",
    "...", "!?!?", "---", "=====", "()[]{}", "$€£¥", "±×÷", "«»", "\u2028", "\u2029",
    "\x00", "\x01\x02", "\x1b[0m", "\x7f", "\x85", "\x1c", "\u200b", "\ufeff", "\u00ad", "\u180e",
    "\ufffd", "\u2581", "\ue000", "\U000e0041", "\U0010ffff", "<|im_start|>", "<|im_end|>",
    "<|im_end|>>", "<|im_", "end|>", "<tool>", "<tool>x", "<tool", "<s>", "</s>", "<unk>", "<0x41>",
]
SPACES = [" ", " ", " ", "  ", "   ", "\n", "\n\n", "\n\n\n", "\r\n", "\t", " \n", "\n ", " \t ",
          "\u00a0", "\u3000", "\u2003 ", "\v", "\f", "\x85", " \n \n  ", "", "", ""]


def texts(seed, count):
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        parts = []
        for _ in range(rng.choice([1, 2, 5, 12, 40])):
            kind = rng.random()
            if kind < 0.75:
                parts.append(rng.choice(SCRAPS))
            elif kind < 0.85:
                parts.append(chr(rng.choice([rng.randrange(0x20, 0x7F), rng.randrange(0xA0, 0x530),
                                             rng.randrange(0x4E00, 0x9FA6)])) * rng.randrange(1, 9))
            else:
                parts.append("".join(rng.choice("etaoin shrdlu 's19.\n") for _ in range(20)))
            parts.append(rng.choice(SPACES) * rng.choice([1, 1, 1, 2, 7]))
        made.append("".join(parts))
    return made + ["", " ", "\n", "a" * 3000, " " * 3000, "ab" * 700 + "c", "\U0001f600" * 500]


def characters():
    # U+1DF6: tokenizers orders marks as Unicode 9 does, which did not have it
    return ["a%sa %s1%s %s\u0301\n%s" % ((chr(c),) * 5) for c in range(0x20000)
            if unicodedata.category(chr(c)) not in ("Cn", "Cs") and c != 0x1DF6]


def dump(program, model, inputs, *flags):
    with tempfile.NamedTemporaryFile() as file:
        for text in inputs:
            data = text.encode()
            file.write(struct.pack("<Q", len(data)) + data)
        file.flush()
        out = subprocess.run([program, model, file.name, *flags], check=True, capture_output=True)
    return [[int(i) for i in line.split()] for line in out.stdout.decode().split("\n")[:-1]]


def compare(name, inputs, ours, theirs):
    assert len(ours) == len(theirs) == len(inputs), (name, len(ours), len(theirs))
    bad = [i for i in range(len(inputs)) if ours[i] != theirs[i]]
    print(f"{name:44} {len(inputs) - len(bad):7} of {len(inputs):7} equal", flush=True)
    for i in bad[:3]:
        print("  ", ascii(inputs[i][:200]), "\n   ours  ", ours[i][:40], "\n   theirs", theirs[i][:40])
    return len(bad)


def write_gguf(path, model, pre, tokens, types, **more):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in more.items():
        getattr(writer, "add_" + name)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level(pre, corpus):
    """A trained vocabulary, without added tokens."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), level]
    elif pre == "gpt-2":
        steps = [level]
    else:
        digits = "{1,3}" if pre == "llama-bpe" else ""
        steps = [pre_tokenizers.Split(Regex(MODERN % digits), "isolated"), level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if pre == "smollm":  # the real one has no token for some bytes either
        alphabet = [c for c in alphabet if c not in "\u0104\u0106\u0120\u00ff"]
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    data = json.loads(tokenizer.to_str())
    if pre == "smollm":
        data["model"]["vocab"].pop("\u00ff", None)
    if pre == "llama-bpe":  # words that only `ignore_merges` can find
        data["model"]["ignore_merges"] = True
        for word in ["\u0120brown", "Ishmael", "\u0120worldwide", "123", "...\u010a"]:
            data["model"]["vocab"].setdefault(word, len(data["model"]["vocab"]))
    return data


def check_byte_level(program, folder, pre, inputs):
    data = byte_level(pre, texts(7, 1500))
    with_user = Tokenizer.from_str(json.dumps(data))
    with_user.add_tokens([AddedToken(t, normalized=False) for t in USER])
    with_all = Tokenizer.from_str(with_user.to_str())
    with_all.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])

    size = with_all.get_vocab_size()
    tokens = [with_all.id_to_token(i) for i in range(size)]
    types = [4 if t in USER else 3 if t in SPECIAL else 1 for t in tokens]
    path = f"{folder}/{pre}.gguf"
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    write_gguf(path, "gpt2", pre, tokens, types, token_merges=merges)

    def theirs(tokenizer, some):
        return [e.ids for e in tokenizer.encode_batch(some, add_special_tokens=False)]
    bad = compare(f"{pre}, request", inputs, dump(program, path, inputs), theirs(with_user, inputs))
    bad += compare(f"{pre}, template", inputs, dump(program, path, inputs, "--template"),
                   theirs(with_all, inputs))
    every = characters()
    return bad + compare(f"{pre}, characters", every, dump(program, path, every),
                         theirs(with_user, every))


def with_unused(proto):
    """Makes some normal pieces of a model unused: only steps to longer ones."""
    rng, out, at = random.Random(3), b"", 0

    def varint(at):
        value, shift = 0, 0
        while True:
            value |= (proto[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if proto[at - 1] < 128:
                return value, at
    while proto[at:at + 1] == b"\x0a":  # field 1, pieces; all stand first
        size, at = varint(at + 1)
        piece = proto[at:at + size]
        at += size
        if piece[-2:-1] != b"\x18" and rng.random() < 0.4:  # no type: normal
            piece += b"\x18\x05"
        assert len(piece) < 128
        out += b"\x0a" + bytes([len(piece)]) + piece
    return out + proto[at:]


def check_sentencepiece(program, folder, prefix, fallback, inputs, unused=False):
    model = io.BytesIO()
    corpus = [line for text in texts(7, 1500) for line in text.replace("\0", "").split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, model_type="bpe", vocab_size=1800,
        byte_fallback=fallback, add_dummy_prefix=prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", character_coverage=0.98, minloglevel=2,
        user_defined_symbols=[t for t in USER if " " not in t] + ["\u2581\u2581", "\u2581\u2581\u2581"],
        hard_vocab_limit=False)
    proto = with_unused(model.getvalue()) if unused else model.getvalue()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto)
    tokens = [theirs.id_to_piece(i) for i in range(theirs.get_piece_size())]
    assert not unused or sum(theirs.is_unused(i) for i in range(len(tokens))) > 300
    user = set(USER) | {"\u2581\u2581", "\u2581\u2581\u2581"}

    def kind(i):
        return (2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else
                5 if theirs.is_unused(i) else 6 if theirs.is_byte(i) else 4 if tokens[i] in user else 1)
    path = f"{folder}/sp-{prefix}-{fallback}-{unused}.gguf"
    write_gguf(path, "llama", None, tokens, [kind(i) for i in range(len(tokens))],
               token_scores=[theirs.get_score(i) for i in range(len(tokens))],
               unk_token_id=theirs.unk_id(), bos_token_id=theirs.bos_id(),
               eos_token_id=theirs.eos_id(), add_space_prefix=prefix)
    name = f"sentencepiece, prefix {prefix}, bytes {fallback}" + (", unused" if unused else "")
    return compare(name, inputs, dump(program, path, inputs), [theirs.encode(t) for t in inputs])


def main():
    program = str(Path(sys.argv[1]).resolve())
    inputs = texts(1, 1000)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
            bad += check_byte_level(program, folder, pre, inputs)
        for prefix in (True, False):
            for fallback in (True, False):
                bad += check_sentencepiece(program, folder, prefix, fallback, inputs)
        bad += check_sentencepiece(program, folder, True, True, inputs, unused=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
