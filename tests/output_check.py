#!/usr/bin/env python3
"""Calls and thoughts as published templates write them into a history come back as items.

    pip install jinja2
    output_check.py PATH/TO/output_dump ARCHIVE ...

ARCHIVES: see data/templates/published.txt. A template renders a turn with a thought and calls; the
text after its generation prompt, as tokens and as plain text, must parse to just these. What a
template cannot render (no calls, or not two) is counted apart.
"""
import copy
import json
import re
import subprocess
import sys
import tempfile

from template_check import OWN, answer, environment, published

ARGUMENTS = [{"city": "K\"ö n", "days": 3, "more": {"a": [1, "z", None], "b": False}, "now": True,
              "code": "a\n  <b>x</b>"}, {"city": "B"}]
NAMES = ["weather", "find_x"]
THOUGHT = "First this,\nthen that."
TOOLS = [{"name": name, "parameters": {"type": "object", "properties": {
    "city": {"type": "string", "description": "d"}, "days": {"type": "integer", "description": "d"},
    "more": {"type": "object", "description": "d"}, "now": {"type": "boolean", "description": "d"},
    "code": {"type": "string", "description": "d"}}, "required": ["city"]}} for name in NAMES]
# Written in ways that no row has: their calls stay text.
UNKNOWN = re.compile("GigaChat3-10B|Kimi-K3|MiniMax-M3|functionary-medium-v3.2|muse.glimmer")
ENDS = re.compile(r"(<\|(im_end|eot_id|eom_id|eot|end_of_text|end|return|observation|tool_response|calls|"
                  r"END_OF_TURN_TOKEN|START_OF_TURN_TOKEN|CHATBOT_TOKEN|START_THINKING|END_THINKING|role_end|message_sep|end_of_msg|eom)\|?>|</s>|<eos>|<end_of_turn>|<turn\|>|<sep>|"
                  r"<｜end▁of▁sentence｜>|<｜Assistant｜>|\[e~\[|\[\|endofturn\|\]|<seed:eos>|<end_of_sentence>|"
                  r"<｜hy_eos:opensource｜>|</assistant>|<SPECIAL_12>)\s*$")


def calls(count, text):
    made = [{"id": f"abcdefgh{i}", "type": "function",
             "function": {"name": n, "description": "", "arguments": json.dumps(a) if text else a}}
            for i, (n, a) in enumerate(zip(NAMES, ARGUMENTS))]
    return copy.deepcopy(made[:count])


def render(env, source, messages, prompt):
    tools = [{"type": "function", "function": {"description": "d", **t}} for t in TOOLS]
    return answer(env, source, {**OWN, "messages": messages, "tools": tools,
                                "add_generation_prompt": prompt})


def turn(env, source):
    """Prompt, text and number of calls of a turn with calls, or None."""
    user = [{"role": "user", "content": "Question"}]
    prompt = render(env, source, user, True)
    for count in (2, 1):
        for text in (False, True):
            for content in ("", None):
                said = {"role": "assistant", "content": content, "tool_calls": calls(count, text),
                        "reasoning_content": THOUGHT, "reasoning": THOUGHT}
                made = render(env, source, user + [said], False)
                if not made or not prompt or '"B"' not in made.replace("B'", 'B"').replace(
                        ">B<", '>"B"<').replace("\nB\n", '\n"B"\n') and "weather" not in made.split("Question")[-1]:
                    continue
                size = 0
                while size < min(len(prompt), len(made)) and prompt[size] == made[size]:
                    size += 1
                if size < len(prompt):  # not in the middle of a mark
                    size = max(made.rfind(c, 0, size) for c in ">]\n:") + 1
                text_of = made[size:]
                while ENDS.search(text_of):
                    text_of = ENDS.sub("", text_of)
                if "weather" in text_of:
                    start = prompt if "reasoning steps:" in prompt else prompt[:size]
                    text_of = text_of.removeprefix("</think>") if not start.endswith("think>") else text_of
                    return start, text_of, 2 if "find_x" in text_of else 1
    return None


def main():
    env, cases, seen, without, unknown = environment(), [], set(), [], []
    for archive in sys.argv[2:]:
        for name, source in published(archive):
            if source in seen:
                continue
            seen.add(source)
            found = turn(env, source)
            if not found:
                without.append(name.split("/")[-1])
                continue
            if UNKNOWN.search(name):
                unknown.append(name.split("/")[-1])
                continue
            prompt, text, count = found
            marks = {m for m in re.findall(r"</?\|?[^<>\s=\"']{1,50}\|?>|\[/?[A-Z_]+\]", text)
                     if m not in ("<b>", "</b>")}
            for tokens in ([sorted(marks)] if "<|message|>" in marks else ([], sorted(marks))):
                for constrained in (False, True):
                    cases.append((name.split("/")[-1], count, {
                        "template": source, "tokens": tokens, "prompt": prompt, "text": text,
                        "tools": TOOLS, "constrained": constrained}))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([c for _, _, c in cases], file)
        file.flush()
        lines = subprocess.run([sys.argv[1], file.name], stdout=subprocess.PIPE,
                               check=True).stdout.decode().splitlines()
    wrong, formats = {}, {}
    for (name, count, case), line in zip(cases, lines):
        made = json.loads(line)
        want = [["call", n, a] for n, a in zip(NAMES[:count], ARGUMENTS)]
        if THOUGHT in case["text"]:
            want.insert(0, ["reasoning", "", THOUGHT])
        got = [[i["kind"], i["name"], json.loads(i["text"]) if i["kind"] == "call" and i["ended"]
                else i["text"]] for i in made.get("items", [])]
        formats.setdefault(made.get("format"), set()).add(name)
        if got != want:
            wrong.setdefault(name, (made.get("format"), case, got))
    for name, (form, case, got) in wrong.items():
        print(f"WRONG {name} ({form}, tokens {len(case['tokens'])}, constrained {case['constrained']})\n"
              f"  text {case['text']!r}\n  got  {got}")
    for form, names in formats.items():
        print(f"{form}: {len(names)}: {' '.join(sorted(names))[:150]}")
    print(f"not known: {' '.join(unknown)}")
    print(f"without calls: {' '.join(without)}")
    names = {n for n, _, _ in cases}
    print(f"{len(names)} templates with calls, {len(cases)} cases, {len(wrong)} templates wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
