// >>grammar
// GBNF, the notation of llama.cpp: rules `name ::= alternatives`, "text" with escapes, [sets] of
// characters, `.`, groups, and the repeats * + ? {m} {m,} {m,n}; # begins a comment.
#include "prologue.hpp"

#include "base/text.hpp"
#include "grammar/grammar.hpp"
#include "json_internal.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr size_t kMostGbnfBytes = 1 << 20;
constexpr int kMostGbnfDepth = 64;

class GbnfReader {
public:
    GbnfReader(GrammarBuilder& builder, std::string_view text, Spelling spelling)
        : builder_(builder), text_(text), spelling_(spelling) {}
    Result<Part> read() {
        if (text_.size() > kMostGbnfBytes) return refuse("it is longer than 1 MiB");
        if (!utf8_valid(text_)) return refuse("it is not UTF-8");
        skip(true);
        while (at_ < text_.size() && !failed_) read_rule();
        if (failed_) return std::move(error_);
        for (const auto& [name, rule] : rules_)
            if (!rule.defined)
                return refuse("rule '" + printable(name, 60) + "' is used and not defined");
        const auto root = rules_.find("root");
        if (root == rules_.end()) return refuse("there is no rule 'root'");
        return root->second.part;
    }

private:
    struct Rule {
        Part part = no_part;
        bool defined = false;
    };
    Error refuse(std::string_view why) const {
        const size_t line = 1 + size_t(std::count(
                                    text_.begin(),
                                    text_.begin() + ptrdiff_t(std::min(at_, text_.size())), '\n'));
        return make_error(ErrorKind::invalid_request,
                          format("grammar, line %zu: %.*s", line, int(why.size()), why.data()),
                          "invalid_value");
    }
    Part fail(std::string_view why) {
        if (!failed_) error_ = refuse(why);
        failed_ = true;
        return no_part;
    }
    bool take(std::string_view what) {
        if (text_.substr(at_, what.size()) != what) return false;
        at_ += what.size();
        return true;
    }
    // White space and comments; line ends only where a rule may go on behind them.
    void skip(bool lines) {
        while (at_ < text_.size()) {
            const char c = text_[at_];
            if (c == '#') at_ = std::min(text_.find('\n', at_), text_.size());
            else if (c == ' ' || c == '\t' || (lines && (c == '\n' || c == '\r'))) ++at_;
            else return;
        }
    }
    std::string_view name() {
        const size_t begin = at_;
        const auto is_word = [](char c) {
            return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                   c == '-' || c == '_';
        };
        while (at_ < text_.size() && is_word(text_[at_])) ++at_;
        return text_.substr(begin, at_ - begin);
    }
    Rule& rule_named(std::string_view word) {
        Rule& rule = rules_[std::string(word)];
        if (!rule.part) rule.part = builder_.new_rule();
        return rule;
    }
    void read_rule() {
        const std::string_view word = name();
        if (word.empty()) return void(fail("a rule's name is missing"));
        skip(false);
        if (!take("::=")) return void(fail("'::=' is missing"));
        skip(true);
        Rule& rule = rule_named(word);
        if (rule.defined) return void(fail("a rule is defined twice"));
        rule.defined = true;
        builder_.define(rule.part, choice(false));
        if (!failed_ && at_ < text_.size() && text_[at_] != '\n' && text_[at_] != '\r')
            fail("something that is no part of a rule");
        skip(true);
    }
    Part choice(bool nested) {
        if (++depth_ > kMostGbnfDepth) return fail("groups nest deeper than 64");
        if (stack_.is_low()) return fail("groups nest too deep for this thread's stack");
        std::vector<Part> ways = {sequence(nested)};
        while (!failed_) {
            const size_t before = at_;
            skip(true);  // an alternative may begin on the next line
            if (!take("|")) {
                if (!nested) at_ = before;
                break;
            }
            skip(true);
            ways.push_back(sequence(nested));
        }
        --depth_;
        return builder_.choice(std::move(ways));
    }
    Part sequence(bool nested) {
        std::vector<Part> parts;
        while (!failed_) {
            skip(nested);
            if (at_ >= text_.size()) break;
            const char c = text_[at_];
            if (c == '|' || c == ')' || c == '\n' || c == '\r') break;
            Part part = element();
            repeats(part);
            parts.push_back(part);
        }
        return builder_.sequence(std::move(parts));
    }
    void repeats(Part& part) {
        while (!failed_) {
            uint32_t least = 0, most = unlimited;
            if (take("*")) {
            } else if (take("+")) least = 1;
            else if (take("?")) most = 1;
            else if (take("{")) {
                if (!number(&least)) return void(fail("a number is missing behind {"));
                most = least;
                if (take(",") && !number(&most)) most = unlimited;
                if (!take("}") || least > most)
                    return void(fail("{m,n} is not finished, or m > n"));
                if (least > most_repeats || (most > most_repeats && most != unlimited))
                    return void(fail("repeats more than 100,000 times"));
            } else {
                return;
            }
            part = builder_.repeat(part, least, most);
        }
    }
    bool number(uint32_t* value) { return take_count(text_, &at_, value); }
    Part element() {
        if (take("\"")) return quoted();
        if (take("[")) return bracket();
        if (take(".")) return set("[^]");
        if (take("(")) {
            skip(true);
            const Part inside = choice(true);
            skip(true);
            return take(")") ? inside : fail("unmatched (");
        }
        const std::string_view word = name();
        return word.empty() ? fail("a text, set, group or name is missing") : rule_named(word).part;
    }
    Part set(std::string_view pattern) {
        auto dfa = pattern_dfa(pattern, spelling_, false, builder_.budget());
        if (!dfa) return fail(dfa.error().message);
        return builder_.terminal(std::move(*dfa));
    }
    // One character, escapes read; false at the end of the text.
    bool character(char32_t* out) {
        if (at_ >= text_.size()) return false;
        if (!take("\\")) {
            *out = utf8_next(text_, &at_);
            return true;
        }
        if (at_ >= text_.size()) return false;
        const char c = text_[at_++];
        const int digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
        uint32_t v = 0;
        for (int i = 0; i < digits; ++i) {
            const int d = at_ < text_.size() ? hex_value(text_[at_]) : -1;
            if (d < 0 || v > 0x10FFFF) return false;
            v = v * 16 + uint32_t(d);
            ++at_;
        }
        *out = digits     ? char32_t(v)
               : c == 'n' ? U'\n'
               : c == 't' ? U'\t'
               : c == 'r' ? U'\r'
                          : char32_t(uint8_t(c));
        return true;
    }
    Part quoted() {
        std::string out;
        while (!take("\"")) {
            char32_t c = 0;
            if (!character(&c)) return fail("a text is not finished");
            utf8_append(out, c);
        }
        if (spelling_ == Spelling::raw) return builder_.bytes(out);
        std::string escaped;
        write_json_escaped(escaped, out);
        return builder_.bytes(escaped);
    }
    Part bracket() {
        std::string pattern = take("^") ? "[^" : "[";
        while (!take("]")) {
            char32_t low = 0;
            if (!character(&low)) return fail("a set is not finished");
            char32_t high = low;
            if (at_ + 1 < text_.size() && text_[at_] == '-' && text_[at_ + 1] != ']') {
                ++at_;
                if (!character(&high) || high < low) return fail("a range is not in order");
            }
            pattern += format("\\u{%x}-\\u{%x}", unsigned(low), unsigned(high));
        }
        return set(pattern + "]");
    }

    GrammarBuilder& builder_;
    std::string_view text_;
    const Spelling spelling_;
    size_t at_ = 0;
    int depth_ = 0;
    const StackLimit stack_ = {};
    bool failed_ = false;
    Error error_;
    std::map<std::string, Rule, std::less<>> rules_;
};

}  // namespace

Result<Part> add_gbnf(GrammarBuilder& builder, std::string_view text, Spelling spelling) {
    return GbnfReader(builder, text, spelling).read();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif
