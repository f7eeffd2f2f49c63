#!/usr/bin/env python3
"""Binds the parts of src/ into one header, ../valar.hpp: the same bytes on every machine.

    assemble.py            writes valar.hpp where it is stale
    assemble.py --check    fails where it is stale, writes nothing

The declaration part is what the public headers (x.hpp) include, in their order; the implementation
part is the prologue, then section by section the internal headers and .cpp files. A part appears once,
under a banner that names its file, where it is first needed. System headers are gathered: those of
declarations at the top, the others in the prologue, before the first instruction-set region. Around all
stands what lays the host's macros down (host_macros.txt). server/page.html becomes a part before that,
server/page_text.cpp.
"""
import base64
import hashlib
import os
import re
import sys

SRC = os.path.dirname(os.path.abspath(__file__))
TARGET = os.path.join(SRC, "..", "valar.hpp")

# The sections in their order: public header, then the parts of the implementation. A section uses
# only sections above it (tests/sections.py proves that from the includes).
SECTIONS = {
    "base": ["base/base.hpp", "base/base.cpp", "base/text.cpp", "base/files.cpp", "base/threads.cpp", "base/limits.cpp", "base/sockets.cpp"],
    "digest": ["digest.cpp"],
    "unicode": ["unicode.cpp"],
    "json": ["json.hpp", "json.cpp"],
    "api": ["api.hpp", "api.cpp", "api/names.cpp", "api/response.cpp", "api/events.cpp", "api/surface.cpp",
            "api/document.cpp", "api/chat.cpp", "api/messages.cpp", "api/completions.cpp"],
    "gguf": ["gguf.hpp", "gguf.cpp"],
    "kernels": ["kernels/kernels.hpp", "kernels/exact.cpp", "kernels/layout.cpp", "kernels/scalar.cpp",
                "kernels/avx2.cpp", "kernels/avx512.cpp", "kernels/arm.cpp", "kernels/wasm.cpp",
                "kernels/choice.cpp", "kernels/team.cpp"],
    "tokenizer": ["tokenizer/tokenizer.hpp", "tokenizer/split.cpp", "tokenizer/normalize.cpp",
                  "tokenizer/vocabulary.cpp", "tokenizer/tokenizer.cpp"],
    "template": ["template/values.cpp", "template/parser.cpp",
                 "template/renderer.cpp", "template/operations.cpp", "template/formatting.cpp",
                 "template/text_builtins.cpp", "template/builtins.cpp", "template/template.cpp",
                 "template/messages.cpp", "template/syntax.cpp", "template/literal.cpp",
                 "template/output.cpp", "template/channels.cpp", "template/marks.cpp"],
    "grammar": ["grammar/dfa.cpp", "grammar/regex.cpp", "grammar/number.cpp", "grammar/program.cpp", "grammar/state.cpp",
                "grammar/mask.cpp", "grammar/schema_document.cpp", "grammar/schema.cpp", "grammar/gbnf.cpp",
                "grammar/grammar.cpp", "grammar/answer.cpp"],
    "model": ["model.hpp", "model.cpp"],
    "backend": ["backend/backend.hpp", "backend/cpu_layout.cpp", "backend/cpu_machine.cpp",
                "backend/cpu_loading.cpp", "backend/cpu_decoder.cpp", "backend/cpu_stages.cpp", "backend/cpu_experts.cpp",
                "backend/cpu_attention.cpp", "backend/cpu.cpp", "backend/fingerprint.cpp"],
    "sampler": ["sampler.cpp"],
    "engine": ["engine/engine.hpp", "engine/loaded_model.cpp", "engine/plan.cpp", "engine/pages.cpp",
               "engine/prompt.cpp", "engine/draft.cpp", "engine/prefix_cache.cpp", "engine/desk.cpp",
               "engine/answer.cpp", "engine/scheduler.cpp", "engine/batch.cpp", "engine/engine.cpp",
               "engine/conversation.cpp", "engine/pool.hpp", "engine/pool.cpp"],
    "http": ["http/http.hpp", "http/text.cpp", "http/url.cpp", "http/parser.cpp", "http/server.cpp", "http/sse.cpp", "http/client.cpp"],
    "upstream": ["upstream/upstream.hpp", "upstream/request.cpp", "upstream/answer.cpp", "upstream/upstream.cpp"],
    "store": ["store/store.hpp", "store/index.cpp", "store/journal.cpp", "store/recover.cpp",
              "store/commit.cpp", "store/backup.cpp"],
    "server": ["server/server.hpp", "server/words.cpp", "server/options.cpp", "server/keys.cpp", "server/log.cpp", "server/loop.cpp",
               "server/access.cpp", "server/responses.cpp", "server/streams.cpp", "server/life.cpp",
               "server/webhooks.cpp", "server/reading.cpp", "server/metrics.cpp", "server/conversations.cpp",
               "server/batches.cpp", "server/usage.cpp", "server/openapi.cpp",
               "server/page.cpp", "server/page_text.cpp"],
}
# Sections between VALAR_COLD_BEGIN and _END (prologue.hpp), but for the parts that make token masks.
COLD = ["api", "template", "grammar", "upstream", "store", "server"]
WARM = ["grammar/dfa.cpp", "grammar/state.cpp", "grammar/mask.cpp"]
# Who uses valar.hpp reads its declaration part from end to end: it stays short enough for that. What it
# lacks room for belongs into an internal header, or replaces something.
MOST_DECLARATION_LINES = 1985
SYSTEM = ["base/system.hpp", "kernels/intrinsics.hpp"]  # conditional system headers: to the prologue
# A page as a part; compilers join at most some 64 KB of literals, MSVC 16 KB.
PAGE, PAGE_PART, PAGE_PIECE = "server/page.html", "server/page_text.cpp", 8000
SYSTEM_MARK = "// (system headers)\n"
RESTORE_MARK = "// (host's macros)\n"

OWN_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.M)
SYSTEM_INCLUDE = re.compile(r"^#include (<[^>]+>)\n", re.M)
TOKEN = re.compile(r"//[^\n]*|/\*.*?\*/|^\s*#\s*include[^\n]*|\"(?:\\.|[^\"\\\n])*\"|\.?\d(?:'?[\w.])*|"
                   r"'(?:\\.|[^'\\\n])+'|([A-Za-z_]\w*)", re.S | re.M)

def read(path):
    with open(os.path.join(SRC, path), encoding="ascii", newline="") as file:
        return file.read()

def parts_of(kind):
    """The listed parts with that ending, in order."""
    return [part for parts in SECTIONS.values() for part in parts if part.endswith(kind)]

HOST_MACROS = """\
// Another header's macro may have a name that stands in this text: each of these is laid down here and
// put back as it was at the end. Declarations and implementation are read once, however often this file
// is included; with no more to do the rest of it is skipped.
#if !defined(VALAR_HPP) || (defined(VALAR_IMPLEMENTATION) && !defined(VALAR_IMPLEMENTED))

"""

class Binder:
    def __init__(self):
        self.bound = {"prologue.hpp", *SYSTEM}
        self.system = set()  # headers that stand in what was bound so far

    def bind(self, path, headers):
        """The part and, before it, the parts that it includes and that were not bound yet."""
        if path in self.bound:
            return ""
        self.bound.add(path)
        text = read(path)
        before = "".join(self.bind(used, headers) for used in OWN_INCLUDE.findall(text))
        headers.update(SYSTEM_INCLUDE.findall(text))
        text = SYSTEM_INCLUDE.sub("", OWN_INCLUDE.sub("", text)).replace("#pragma once\n", "", 1)
        banner = f"// ---- src/{path} ".ljust(99, "-")
        return before + f"{banner}\n\n{text.strip()}\n\n"

    def include(self, headers):
        """Those of `headers` that no include has brought yet."""
        wanted = sorted(headers - self.system)
        self.system.update(wanted)
        return "".join(f"#include {header}\n" for header in wanted)

def body_of(path):
    return read(path).replace("#pragma once\n", "", 1)

def tidy(text):
    """No more than one empty line in a row."""
    return re.sub(r"\n{3,}", "\n\n", text)

def host_macros():
    """The sections of host_macros.txt, each a list of names."""
    sections = {}
    for line in read("host_macros.txt").splitlines():
        if line.startswith("["):
            names = sections.setdefault(line[1:].split(":")[0].rstrip("]"), [])
        elif line and not line.startswith("#"):
            names += line.split(": ")[-1].split()
    return sections

def identifiers(text):
    return {match[1] for match in TOKEN.finditer(text) if match[1]}

def lines_of(words):
    """As many words in a line as fit."""
    out = [""]
    for word in words:
        if out[-1] and len(out[-1]) + len(word) > 98:
            out.append("")
        out[-1] += word if not out[-1] else " " + word
    return "".join(line + "\n" for line in out)

def laid_down(text):
    """Names by the systems where their macros would break `text` or the system headers it includes."""
    of = {title: set(names) for title, names in host_macros().items()}
    listed = {name.lower() for name in of["names"]}
    mine = {name for name in identifiers(text) if name.lower() in listed}
    everywhere = (mine | of["POSIX uses"]) - of["POSIX defines"] - of["Windows defines"]
    return {"": sorted(everywhere), "#if defined(_WIN32)\n": sorted(of["Windows uses"] - everywhere),
            "#if !defined(_WIN32)\n": sorted(of["POSIX uses"] & of["Windows defines"])}

def guarded(text, why):
    """What stands before and behind `text`, so that no macro of the host reaches it, and none is lost."""
    before, behind = why, ""
    for condition, names in laid_down(text).items():
        end = condition and "#endif\n"
        before += condition + lines_of(f'_Pragma("push_macro(\\"{name}\\")")' for name in names)
        before += "".join(f"#undef {name}\n" for name in names) + end
        behind += condition + lines_of(f'_Pragma("pop_macro(\\"{name}\\")")' for name in names) + end
    return before, behind

def cooled(part, text):
    cold = part not in WARM and any(part in SECTIONS[section] for section in COLD)
    return f"VALAR_COLD_BEGIN\n\n{text}VALAR_COLD_END\n\n" if cold else text

def page_pieces(page):
    """Its lines, as many in a piece as may stand in one literal."""
    pieces = [""]
    for line in page.splitlines(keepends=True):
        if len(pieces[-1]) + len(line) > PAGE_PIECE:
            pieces.append("")
        pieces[-1] += line
    return pieces

def literal(piece):
    """The lines of a piece as literals that the compiler joins."""
    return "\n".join('    "' + re.sub(r'([\\"]|(?<=\?)\?)', r"\\\1", line) + '\\n"'
                     for line in piece.splitlines())  # two question marks may begin a trigraph

def page_part():
    """The page, with what its Content-Security-Policy allows: its own script and style, by hash."""
    page = read(PAGE)
    [style, script] = (re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S) for tag in ("style", "script"))
    allowed = [[base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
               for texts in (script, style)]
    return f"""\
// The page at GET /, made from page.html by assemble.py: edit that one.
#include "prologue.hpp"

#include "server/page.hpp"

#ifndef VALAR_NO_SERVER
namespace valar {{
inline namespace v1 {{
namespace detail {{

// clang-format off
// BEGIN GENERATED page sha256={hashlib.sha256(page.encode()).hexdigest()}
static const char* const server_page_pieces[] = {{
{(","+chr(10)).join(map(literal, page_pieces(page)))}
}};
const ServerPageText server_page_text = {{
    server_page_pieces,
    "{hashlib.sha256(page.encode()).hexdigest()[:16]}",
    "sha256-{allowed[0][0]}",
    "sha256-{allowed[1][0]}",
}};
// END GENERATED
// clang-format on

}}  // namespace detail
}}  // namespace v1
}}  // namespace valar
#endif  // VALAR_NO_SERVER
"""

def assemble():
    binder = Binder()
    config, headers = body_of("config.hpp").strip() + "\n", set()
    binder.bound.add("config.hpp")
    public = parts_of(".hpp")
    declarations = "".join(binder.bind(part, headers) for part in public)
    if hidden := binder.bound - {"config.hpp", "prologue.hpp", *SYSTEM, *public}:
        sys.exit(f"public headers include internal ones: {', '.join(sorted(hidden))}")
    out = "#ifndef VALAR_HPP\n#define VALAR_HPP\n\n"
    out += config + "\n" + binder.include(headers) + "\n" + declarations
    out += "#endif  // VALAR_HPP\n\n"
    if (lines := tidy(out).count("\n")) > MOST_DECLARATION_LINES:
        sys.exit(f"the declaration part of valar.hpp has {lines:,} lines, {MOST_DECLARATION_LINES:,} are "
                 "the limit: move what only the implementation needs to internal headers")
    headers = set()
    implementation = "".join(cooled(part, binder.bind(part, headers)) for part in parts_of(".cpp"))
    implementation = implementation.replace("VALAR_COLD_END\n\nVALAR_COLD_BEGIN\n\n", "")
    prologue = body_of("prologue.hpp").strip() + "\n"
    system = binder.include(headers) + "\n" + "".join(body_of(part).strip() + "\n" for part in SYSTEM)
    out += "#if defined(VALAR_IMPLEMENTATION) && !defined(VALAR_IMPLEMENTED)\n#define VALAR_IMPLEMENTED\n"
    out += prologue.replace(SYSTEM_MARK, system) + "\n" + implementation
    before, behind = guarded(out, HOST_MACROS)
    return tidy(read("opening.txt") + before + "\n" + out + read("closing.txt").replace(RESTORE_MARK, behind))

def update(path, text):
    """False where the file was stale; it is written unless --check is given."""
    with open(path, encoding="ascii", newline="") as file:
        if file.read() == text:
            return True
    if "--check" not in sys.argv[1:]:
        with open(path, "w", encoding="ascii", newline="") as file:
            file.write(text)
        return True
    print(f"{os.path.relpath(path, os.path.dirname(TARGET))} is stale: run src/assemble.py and commit it "
          "with the parts it comes from")
    return False

def main():
    fresh = update(os.path.join(SRC, PAGE_PART), page_part())
    return 0 if update(TARGET, assemble()) and fresh else 1

if __name__ == "__main__":
    sys.exit(main())
