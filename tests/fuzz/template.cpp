// Any bytes as a template, rendered with a fixed conversation: no crash, no hang, and marks that
// are ascending, disjoint and inside of the text. The same again with each string of the request in
// letters that no template of the corpus has: none of them may be without a mark.
#include "template/internal.hpp"
#include "unicode_internal.hpp"

#include <cstdint>
#include <cstdlib>

namespace {

void require(bool condition) {
    if (!condition) std::abort();
}

const valar::detail::TemplateInput& input() {
    static const valar::detail::TemplateInput made = [] {
        valar::detail::TemplateInput in;
        auto request = valar::Json::parse(
            R"({"messages": [{"role": "system", "content": "\u0411\u0423\u0414\u042c \u043a\u0440"},
                {"role": "user", "content": "  \u043f\u0440\u0438,\u043c\u0438\u0440\n\u0434\u0430 "},
                {"role": "assistant", "content": null, "tool_calls": [{"id": "\u0436", "function":
                    {"name": "\u043f\u043e", "arguments": {"\u0433\u0434": [1, 2.5, true]}}}]},
                {"role": "\u044f", "content": [{"type": "text", "text": "\u0434\u0430"}]}],
               "tools": [{"function": {"name": "\u043f", "parameters": {"type": "object",
                    "properties": {"x": {"type": "string"}}}}}],
               "x": "\u0430\u0431\u0432", "n": 12, "l": ["\u0438", "\u0451"]})");
        in.request = std::move(*request);
        in.own.set("add_generation_prompt", true).set("bos_token", "<s>").set("eos_token", "</s>");
        in.now_s = 1'790'000'000;
        return in;
    }();
    return made;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::string source(reinterpret_cast<const char*>(data), size);
    const auto parsed = valar::detail::ChatTemplate::parse(source);
    if (!parsed) return 0;
    const auto made = parsed->render(input());
    if (!made)
        return require(!made.error().message.empty() || source.find("raise") != std::string::npos),
               0;
    size_t end = 0;
    bool first = true;
    for (const valar::detail::ByteRange& r : made->from_request) {
        require(r.begin < r.end && r.end <= made->text.size() && (first || r.begin > end));
        end = r.end;
        first = false;
    }
    require(valar::detail::utf8_valid(made->text));
    // U+0400 to U+047F are two bytes, 0xd0 or 0xd1 and one more.
    for (char c : source)
        if (uint8_t(c) >= 0x80 || c == '\\') return 0;
    auto mark = made->from_request.begin();
    for (size_t i = 0; i < made->text.size(); ++i) {
        while (mark != made->from_request.end() && mark->end <= i) ++mark;
        const bool marked = mark != made->from_request.end() && mark->begin <= i;
        require(marked || uint8_t(made->text[i]) < 0x80);
    }
    return 0;
}
