// >>grammar
#include "prologue.hpp"

#include "grammar/grammar.hpp"

#include "unicode_internal.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

// A tree of an expression as parts of a grammar: what is small enough becomes one automaton, the
// repeats above it are counted.
class PatternParts {
public:
    PatternParts(GrammarBuilder& builder, const Regex& regex, Spelling spelling)
        : builder_(builder), regex_(regex), spelling_(spelling) {}
    Result<Part> part(uint32_t id) {
        const Regex::Node& node = regex_.nodes[id];
        using Kind = Regex::Kind;
        if (node.kind != Kind::begin && node.kind != Kind::end) {
            auto dfa = regex_dfa(regex_, id, spelling_, false, builder_.budget());
            if (dfa) return builder_.terminal(std::move(*dfa));
            if (!is_too_large(dfa.error())) return std::move(dfa.error());
        }
        std::vector<Part> parts;
        for (const uint32_t p : node.parts) {
            auto made = part(p);
            if (!made) return made;
            parts.push_back(*made);
        }
        if (node.kind == Kind::sequence) return builder_.sequence(std::move(parts));
        if (node.kind == Kind::choice) return builder_.choice(std::move(parts));
        if (node.kind == Kind::repeat) return repeat(parts[0], node.least, node.most);
        return builder_.bytes("");
    }

private:
    // Few repeats are written out: only then may what repeats be empty.
    Part repeat(Part part, uint32_t least, uint32_t most) {
        if (most > kMostWritten) return builder_.repeat(part, least, most);
        std::vector<Part> parts(least, part);
        for (uint32_t i = least; i < most; ++i) parts.push_back(builder_.optional(part));
        return builder_.sequence(std::move(parts));
    }
    static constexpr uint32_t kMostWritten = 4;
    GrammarBuilder& builder_;
    const Regex& regex_;
    Spelling spelling_;
};

// Anchors only where the whole begins and ends: there they are what is assumed anyway.
bool has_inner_anchor(const Regex& regex, uint32_t id, bool at_begin, bool at_end) {
    const Regex::Node& node = regex.nodes[id];
    if (node.kind == Regex::Kind::begin) return !at_begin;
    if (node.kind == Regex::Kind::end) return !at_end;
    const bool whole = node.kind == Regex::Kind::sequence;
    for (size_t i = 0; i < node.parts.size(); ++i) {
        const bool first = whole && at_begin && i == 0;
        const bool last = whole && at_end && i + 1 == node.parts.size();
        if (has_inner_anchor(regex, node.parts[i], first, last)) return true;
    }
    return false;
}

bool begins_with(const Regex& regex, uint32_t id, Regex::Kind kind, bool front) {
    const Regex::Node& node = regex.nodes[id];
    if (node.kind == kind) return true;
    return node.kind == Regex::Kind::sequence && !node.parts.empty() &&
           begins_with(regex, front ? node.parts.front() : node.parts.back(), kind, front);
}

}  // namespace

Result<Part> add_pattern_part(GrammarBuilder& builder, std::string_view pattern, Spelling spelling,
                              bool search) {
    auto dfa = pattern_dfa(pattern, spelling, search, builder.budget());
    if (dfa) return builder.terminal(std::move(*dfa));
    if (!is_too_large(dfa.error())) return std::move(dfa.error());
    auto regex = parse_regex(pattern);
    if (!regex) return std::move(regex.error());
    if (has_inner_anchor(*regex, regex->root, true, true))
        return make_error(ErrorKind::invalid_request,
                          "anchors inside of a pattern that repeats so often are not supported",
                          "invalid_json_schema");
    auto part = PatternParts(builder, *regex, spelling).part(regex->root);
    if (!part || !search) return part;
    const Part any = builder.terminal(any_text_dfa(spelling));
    const bool begin = begins_with(*regex, regex->root, Regex::Kind::begin, true);
    const bool end = begins_with(*regex, regex->root, Regex::Kind::end, false);
    return builder.sequence(
        {begin ? builder.bytes("") : any, *part, end ? builder.bytes("") : any});
}

Result<Part> add_regex(GrammarBuilder& builder, std::string_view pattern) {
    return add_pattern_part(builder, pattern, Spelling::raw, false);
}

Result<GrammarPtr> compile_regex(std::string_view pattern) {
    GrammarBuilder builder;
    return builder.build(add_regex(builder, pattern));
}

Result<GrammarPtr> compile_choices(std::vector<std::string> choices) {
    GrammarBuilder builder;
    for (const std::string& choice : choices)
        if (!utf8_valid(choice))
            return make_error(ErrorKind::invalid_request, "a choice is not UTF-8", "invalid_value");
    return builder.build(builder.texts(std::move(choices)));
}

Result<GrammarPtr> compile_gbnf(std::string_view text) {
    GrammarBuilder builder;
    return builder.build(add_gbnf(builder, text));
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif
