#!/usr/bin/env python3
"""Writes the generated block of >>unicode from Python's unicodedata.

    python3 generate_unicode.py              prints the block
    python3 generate_unicode.py src/unicode_tables.hpp    replaces the block in that file

Every table is a list of small numbers, spelled in digits of 5 bits, lowest first; 32 is added to
a digit when another follows. A digit d is the character 35 + d, but `~` and `}` stand for the
backslash and the question mark. A signed number n is 2n, or -2n-1 when negative.
"""
import hashlib
import sys
import unicodedata

UNICODE = "14.0.0"
CATEGORIES = ("Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp "
              "Cc Cf Cs Co Cn").split()
ALTERNATING = 30  # Lu, Ll, Lu, Ll ...
END = 0x110000


def digit(value):
    return chr(35 + value).replace("\\", "~").replace("?", "}")


def number(value):
    text = ""
    while value > 31:
        text += digit(value % 32 + 32)
        value //= 32
    return text + digit(value)


def signed(value):
    return number(2 * value if value >= 0 else -2 * value - 1)


def category_runs():
    """[start, length, category], from 0 without gaps; alternating capital and small in one."""
    runs = []
    for code in range(END):
        kind = CATEGORIES.index(unicodedata.category(chr(code)))
        if runs and runs[-1][2] == kind:
            runs[-1][1] += 1
        else:
            runs.append([code, 1, kind])
    joined = []
    for start, length, kind in runs:
        last = joined[-1] if joined else [0, 0, -1]
        if last[2] == ALTERNATING and length == 1 and kind == last[1] % 2:
            last[1] += 1
        elif last[1] == 1 and last[2] == 0 and length == 1 and kind == 1:
            last[1:] = [2, ALTERNATING]
        else:
            joined.append([start, length, kind])
    return joined


def category_table():
    # one digit for the category, with 32 added when the run is longer than 1; then length - 2
    runs = category_runs()
    return len(runs), "".join(digit(kind + 32) + number(length - 2) if length > 1 else digit(kind)
                              for _, length, kind in runs)


def simple_case(code, change):
    if code == 0x130:  # its full mapping has two code points, unicodedata has no other
        return 0x69 if change is str.lower else code
    text = change(chr(code))
    if len(text) > 1 and change is str.upper:
        text = chr(code).title()
    return ord(text) if len(text) == 1 else code


def case_table(change):
    """Runs of codes that move by the same distance, each 1 or 2 behind the one before."""
    runs = []
    for code in range(END):
        moved = simple_case(code, change) - code
        if not moved:
            continue
        if runs:
            start, count, step, distance = runs[-1]
            gap = code - (start + (count - 1) * step)
            if distance == moved and gap <= 2 and (count == 1 or gap == step):
                runs[-1] = [start, count + 1, gap, distance]
                continue
        runs.append([code, 1, 1, moved])
    text, last = "", 0
    for start, count, step, distance in runs:
        text += number(start - last) + number(2 * (count - 1) + step - 1) + signed(distance)
        last = start
    return len(runs), text


def combining_table():
    runs = []
    for code in range(END):
        kind = unicodedata.combining(chr(code))
        if kind and runs and runs[-1][2] == kind and sum(runs[-1][:2]) == code:
            runs[-1][1] += 1
        elif kind:
            runs.append([code, 1, kind])
    text, last = "", 0
    for start, length, kind in runs:
        text += number(start - last) + number(length - 1) + number(kind)
        last = start
    return len(runs), text


def decompositions():
    """(code, first, second or 0, composes) of every canonical mapping but Hangul's."""
    for code in range(END):
        parts = unicodedata.decomposition(chr(code))
        if parts and not parts.startswith("<"):
            first, second = ([int(part, 16) for part in parts.split()] + [0])[:2]
            yield code, first, second, unicodedata.normalize("NFC", chr(code)) == chr(code)


def decomposition_table():
    text, count, last = "", 0, (0, 0, 0)
    for code, first, second, composes in decompositions():
        text += (number(2 * (code - last[0]) + composes) + signed(first - last[1]) +
                 signed(second - last[2]))
        last = (code, first, second)
        count += 1
    return count, text


def composition_table():
    """Places in the table above, ordered by (first, second)."""
    pairs = [(first, second, place) for place, (_, first, second, composes)
             in enumerate(decompositions()) if composes]
    text, last = "", 0
    for _, _, place in sorted(pairs):
        text += signed(place - last)
        last = place
    return len(pairs), text


def block():
    tables = {"category": category_table(), "lower": case_table(str.lower),
              "upper": case_table(str.upper), "combining": combining_table(),
              "decomposition": decomposition_table(), "composition": composition_table()}
    with open(__file__, "rb") as script:
        digest = hashlib.sha256(script.read()).hexdigest()
    lines = [f"// BEGIN GENERATED unicode sha256={digest}",
             f"// Unicode {UNICODE}, by tests/generate_unicode.py"]
    for name, (count, text) in tables.items():
        lines += [f"constexpr size_t unicode_{name}_count = {count};",
                  f"constexpr char unicode_{name}_text[] ="]
        pieces = [text[i:i + 94] for i in range(0, len(text), 94)]
        lines += [f'    "{piece}"' for piece in pieces]
        lines[-1] += ";"
    return "\n".join(lines + ["// END GENERATED"]) + "\n"


def main():
    if unicodedata.unidata_version != UNICODE:
        sys.exit(f"this Python has Unicode {unicodedata.unidata_version}, wanted {UNICODE}")
    if len(sys.argv) < 2:
        sys.stdout.write(block())
        return
    with open(sys.argv[1], newline="") as file:
        text = file.read()
    begin = text.index("// BEGIN GENERATED unicode")
    end = text.index("// END GENERATED\n", begin) + len("// END GENERATED\n")
    with open(sys.argv[1], "w", newline="") as file:
        file.write(text[:begin] + block() + text[end:])


main()
