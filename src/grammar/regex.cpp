// >>grammar
// A pattern becomes a tree, the tree an automaton with empty moves (Thompson 1968), from its end to
// its beginning, and that one a deterministic one. Python, Rust and ECMA disagree on what \s, \D and
// \W hold beyond ASCII: they stand for what all three hold, so that a text passes every validator.
#include "prologue.hpp"

#include "grammar/regex.hpp"

#include "base/text.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr uint32_t kLastCode = 0x10FFFF;
constexpr size_t kMostNfaStates = 12'000;
constexpr uint32_t kMostGroups = 100;
using Set = std::vector<CodeRange>;

Set normal(Set set) {
    std::sort(set.begin(), set.end(), [](CodeRange a, CodeRange b) { return a.low < b.low; });
    Set out;
    for (const CodeRange r : set)
        if (!out.empty() && r.low <= out.back().high + 1)
            out.back().high = std::max(out.back().high, r.high);
        else out.push_back(r);
    return out;
}
Set complement(const Set& set) {
    Set out;
    uint32_t from = 0;
    for (const CodeRange r : normal(set)) {
        if (r.low > from) out.push_back({from, r.low - 1});
        from = r.high + 1;
    }
    if (from <= kLastCode) out.push_back({from, kLastCode});
    return out;
}
Set any_code() { return {{0, kLastCode}}; }

// Of all code points those with a property, found once for each that is asked for.
template <class Has>
Set codes_with(const Has& has) {
    Set out;
    for (uint32_t c = 0x80; c <= kLastCode; ++c)
        if (has(char32_t(c))) {
            if (out.empty() || out.back().high + 1 != c) out.push_back({c, c});
            else out.back().high = c;
        }
    return out;
}
const Set& wide_digits() {
    static const Set set = codes_with([](char32_t c) { return category(c) == Category::Nd; });
    return set;
}
const Set& wide_word() {
    static const Set set = codes_with([](char32_t c) {
        return is_letter(c) || is_mark(c) || is_number(c) || category(c) == Category::Pc ||
               category(c) == Category::Cn;
    });
    return set;
}
Set joined(Set a, const Set& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}
const Set kDigits = {{'0', '9'}};
const Set kWord = {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}};
const Set kSpace = {{9, 13},          {' ', ' '},       {0xA0, 0xA0},
                    {0x1680, 0x1680}, {0x2000, 0x200A}, {0x2028, 0x2029},
                    {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000}};
const Set kOtherSpace = {{0x1C, 0x1F}, {0x85, 0x85}, {0x180E, 0x180E}, {0xFEFF, 0xFEFF}};

std::optional<Set> shorthand(char c) {
    switch (c) {
        case 'd': return kDigits;
        case 'w': return kWord;
        case 's': return kSpace;
        case 'D': return complement(joined(kDigits, wide_digits()));
        case 'W': return complement(joined(kWord, wide_word()));
        case 'S': return complement(joined(kSpace, kOtherSpace));
    }
    return {};
}

// \p{...}: general categories, by their short names.
std::optional<Set> property(std::string_view name) {
    static constexpr std::string_view names =
        "LuLlLtLmLoMnMcMeNdNlNoPcPdPsPePiPfPoSmScSkSoZsZlZpCcCfCsCoCn";
    if (name.empty() || name.size() > 2) return {};
    bool known = false;
    for (size_t i = 0; i < names.size(); i += 2) known |= names.substr(i, name.size()) == name;
    if (!known) return {};
    const auto has = [&](char32_t c) {
        return names.substr(size_t(category(c)) * 2, name.size()) == name;
    };
    Set out = codes_with(has);
    for (uint32_t c = 0; c < 0x80; ++c)
        if (has(char32_t(c))) out.push_back({c, c});
    return normal(std::move(out));
}

class RegexParser {
public:
    explicit RegexParser(std::string_view text) : text_(text) {}
    Result<Regex> parse() {
        if (!utf8_valid(text_)) return refuse("it is not UTF-8");
        out_.root = choice();
        if (failed_) return std::move(error_);
        if (at_ < text_.size()) return refuse("unmatched )");
        return std::move(out_);
    }

private:
    using Kind = Regex::Kind;
    bool more() const { return at_ < text_.size() && !failed_; }
    bool take(std::string_view what) {
        if (text_.substr(at_, what.size()) != what) return false;
        at_ += what.size();
        return true;
    }
    Error refuse(std::string_view why) {
        return make_error(ErrorKind::invalid_request,
                          format("pattern '%s': %.*s (at byte %zu)", printable(text_, 80).c_str(),
                                 int(why.size()), why.data(), at_),
                          "invalid_json_schema");
    }
    uint32_t fail(std::string_view why) {
        if (!failed_) error_ = refuse(why);
        failed_ = true;
        return out_.add({});
    }
    uint32_t choice() {
        if (++depth_ > kMostGroups) return fail("groups nest deeper than 100");
        if (stack_.is_low()) return fail("groups nest too deep for this thread's stack");
        std::vector<uint32_t> parts = {sequence()};
        while (more() && take("|")) parts.push_back(sequence());
        --depth_;
        return parts.size() == 1 ? parts[0] : out_.add({Kind::choice, 0, 0, std::move(parts)});
    }
    uint32_t sequence() {
        std::vector<uint32_t> parts;
        while (more() && text_[at_] != '|' && text_[at_] != ')') parts.push_back(repeated());
        return parts.size() == 1 ? parts[0] : out_.add({Kind::sequence, 0, 0, std::move(parts)});
    }
    uint32_t repeated() {
        uint32_t part = atom();
        uint32_t least = 0, most = 0;
        while (more() && quantifier(&least, &most)) {
            if (failed_) return part;
            if (take("+")) return fail("possessive quantifiers are not supported");
            (void)take("?");  // lazy: the same texts
            const Kind kind = out_.nodes[part].kind;
            if (kind == Kind::begin || kind == Kind::end)
                return fail("repeats of an anchor are not supported");
            part = out_.add({Kind::repeat, least, most, {part}});
        }
        return part;
    }
    bool number(uint32_t* value) { return take_count(text_, &at_, value); }
    bool quantifier(uint32_t* least, uint32_t* most) {
        *least = 0, *most = unlimited;
        if (take("*")) return true;
        if (take("+")) return *least = 1, true;
        if (take("?")) return *most = 1, true;
        const size_t begin = at_;
        if (!take("{")) return false;
        if (number(least)) {
            *most = *least;
            if (take(",") && !number(most)) *most = unlimited;
            if (take("}")) {
                if (*least > *most) fail("{m,n} with m > n");
                if (*least > most_repeats || (*most > most_repeats && *most != unlimited))
                    fail("repeats more than 100,000 times");
                return true;
            }
        }
        at_ = begin;
        return false;
    }
    uint32_t set(Set ranges) { return out_.add({Kind::set, 0, 0, {}, normal(std::move(ranges))}); }
    uint32_t atom() {
        if (take("(")) return group();
        if (take("[")) return bracket();
        if (take("^")) return out_.add({Kind::begin});
        if (take("$")) return out_.add({Kind::end});
        if (take(".")) return set(complement({{'\n', '\n'}, {'\r', '\r'}, {0x2028, 0x2029}}));
        if (take("\\")) return escape();
        for (const std::string_view quantifier : {"*", "+", "?"})
            if (take(quantifier)) return fail("nothing to repeat");
        const uint32_t c = uint32_t(utf8_next(text_, &at_));
        return set({{c, c}});
    }
    uint32_t group() {
        if (take("?")) {
            if (take("=") || take("!") || take("<=") || take("<!"))
                return fail(
                    "lookaround is not supported, except for lookaheads behind a leading ^");
            if (take("P<") || take("<")) {
                const size_t end = text_.find('>', at_);
                if (end == text_.npos) return fail("unfinished group name");
                at_ = end + 1;
            } else if (!take(":")) {
                return fail("inline flags are not supported");
            }
        }
        const uint32_t inside = choice();
        return take(")") ? inside : fail("unmatched (");
    }
    // One character of an escape, in or outside of brackets.
    std::optional<uint32_t> character() {
        const char c = text_[at_++];
        static constexpr std::string_view names = "tnrfv0", values = "\t\n\r\f\v\0";
        static_assert(values.size() == 5);  // the literal ends at its zero
        if (c == '0' && (at_ >= text_.size() || text_[at_] < '0' || text_[at_] > '9')) return 0u;
        if (const size_t i = names.find(c); i < values.size()) return uint32_t(values[i]);
        if (c == 'x') return hex(2);
        if (c == 'u') return code_unit();
        if (c == 'c' && at_ < text_.size()) return uint32_t(text_[at_++]) & 31;
        const bool word = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
                          (c >= 'A' && c <= 'Z');
        if (word) return {};
        --at_;
        return uint32_t(utf8_next(text_, &at_));
    }
    std::optional<uint32_t> hex(int digits) {
        uint32_t v = 0;
        for (int i = 0; i < digits; ++i) {
            const int d = at_ < text_.size() ? hex_value(text_[at_]) : -1;
            if (d < 0) return {};
            v = v * 16 + uint32_t(d);
            ++at_;
        }
        return v;
    }
    std::optional<uint32_t> code_unit() {
        if (take("{")) {
            uint32_t v = 0;
            for (; at_ < text_.size() && text_[at_] != '}'; ++at_) {
                const int d = hex_value(text_[at_]);
                if (d < 0 || v > kLastCode) return {};
                v = v * 16 + uint32_t(d);
            }
            if (!take("}") || v > kLastCode) return {};
            return v;
        }
        auto high = hex(4);
        if (!high || *high < 0xD800 || *high > 0xDBFF) return high;
        const size_t begin = at_;
        if (take("\\u"))
            if (const auto low = hex(4); low && *low >= 0xDC00 && *low <= 0xDFFF)
                return 0x10000 + ((*high & 0x3FF) << 10) + (*low & 0x3FF);
        at_ = begin;
        return high;
    }
    std::optional<Set> named_set() {
        const char c = at_ < text_.size() ? text_[at_] : '\0';
        if (auto found = shorthand(c)) return ++at_, found;
        if (c != 'p' && c != 'P') return {};
        const size_t end = text_.find('}', at_);
        if (text_.substr(at_ + 1, 1) != "{" || end == text_.npos) return {};
        auto found = property(text_.substr(at_ + 2, end - at_ - 2));
        if (!found) return {};
        at_ = end + 1;
        return c == 'p' ? std::move(found) : complement(*found);
    }
    uint32_t escape() {
        if (at_ >= text_.size()) return fail("ends in a backslash");
        if (auto found = named_set()) return set(std::move(*found));
        const char c = text_[at_];
        if (c == 'b' || c == 'B') return fail("\\b and \\B are not supported");
        if ((c >= '1' && c <= '9') || c == 'k') return fail("back references are not supported");
        const auto code = character();
        if (!code) return fail("this escape is not supported");
        return set({{*code, *code}});
    }
    // One member of a bracket: a set, or a character that may begin a range.
    bool member(Set& out, std::optional<uint32_t>* single) {
        single->reset();
        if (!take("\\")) {
            *single = uint32_t(utf8_next(text_, &at_));
            return true;
        }
        if (at_ >= text_.size()) return false;
        if (auto found = named_set()) {
            out.insert(out.end(), found->begin(), found->end());
            return true;
        }
        if (take("b")) *single = 8;
        else *single = character();
        return single->has_value();
    }
    uint32_t bracket() {
        const bool negated = take("^");
        Set out;
        std::optional<uint32_t> low, high;
        while (more() && text_[at_] != ']') {
            if (!member(out, &low)) return fail("this escape is not supported");
            if (!low) continue;
            high = low;
            const size_t dash = at_;
            if (take("-") && more() && text_[at_] != ']') {
                if (!member(out, &high)) return fail("this escape is not supported");
                if (!high)
                    at_ = dash + 1, out.push_back({'-', '-'}), (void)member(out, &high), high = low;
            } else {
                at_ = dash;
            }
            if (*low > *high) return fail("a range that is out of order");
            out.push_back({*low, *high});
        }
        if (!take("]")) return fail("unmatched [");
        return set(negated ? complement(out) : std::move(out));
    }

    std::string_view text_;
    size_t at_ = 0;
    uint32_t depth_ = 0;
    const StackLimit stack_ = {};
    bool failed_ = false;
    Error error_;
    Regex out_;
};

// ---- The automaton with empty moves -----------------------------------------------------------

class Nfa : public Machine {
public:
    Nfa(Spelling spelling, Budget& budget) : spelling_(spelling), budget_(budget) {
        accept_ = add_state(Kind::accept);
    }
    bool failed() const { return states_.size() >= kMostNfaStates; }
    uint32_t accept() const { return accept_; }
    void begin_at(uint32_t state) {
        first_ = state;
        cuts_.set(*this);
        seen_.assign(states_.size(), 0);
    }
    uint32_t emit(const Regex& regex, uint32_t id, uint32_t next) {
        if (failed() || !budget_.take(1)) return next;
        const Regex::Node& node = regex.nodes[id];
        switch (node.kind) {
            case Regex::Kind::empty: return next;
            case Regex::Kind::set: return emit_set(node.set, next);
            case Regex::Kind::begin: return add_state(Kind::begin, {{0, 0, next}});
            case Regex::Kind::end: return add_state(Kind::end, {{0, 0, next}});
            case Regex::Kind::sequence:
                for (size_t i = node.parts.size(); i-- > 0;)
                    next = emit(regex, node.parts[i], next);
                return next;
            case Regex::Kind::choice: {
                std::vector<Edge> edges;
                for (const uint32_t part : node.parts)
                    edges.push_back({0, 0, emit(regex, part, next)});
                return add_state(Kind::split, edges);
            }
            case Regex::Kind::repeat: return emit_repeat(regex, node, next);
        }
        return next;
    }
    uint32_t emit_loop(const Set& set, uint32_t next) {  // set*
        const uint32_t loop = add_state(Kind::split, {{0, 0, next}, {0, 0, 0}});
        edges_[states_[loop].first + 1].to = emit_set(set, loop);
        return loop;
    }
    uint32_t emit_set(const Set& set, uint32_t next) {
        std::vector<Edge> edges;
        for (const CodeRange r : set)
            if (spelling_ == Spelling::raw) emit_range(r.low, r.high, next, edges);
            else emit_json_range(r.low, r.high, next, edges);
        return add_state(Kind::edges, edges);
    }
    // A state that reads one of these bytes, in the middle of a character.
    uint32_t emit_bytes(uint8_t low, uint8_t high, uint32_t to) {
        const auto [at, is_new] = middles_.try_emplace({low, high, to}, 0);
        if (is_new) {
            at->second = add_state(Kind::edges, {{low, high, to}});
            states_[at->second].middle = true;
        }
        return at->second;
    }
    /// Gives the loop of a JSON string its escapes: \" \\ \/ \b \f \n \r \t and \u, where a high
    /// surrogate and a low one are one character and neither stands alone.
    void add_json_escapes(uint32_t loop) {
        const auto hex = [&](std::initializer_list<std::string_view> firsts, uint32_t to) {
            std::vector<Edge> edges;
            for (const std::string_view r : firsts)
                edges.push_back({uint8_t(r[0]), uint8_t(r[1]), to});
            return middle_state(edges);
        };
        const auto any = [&](uint32_t to) { return hex({"09", "AF", "af"}, to); };
        const uint32_t two = any(any(loop));
        const uint32_t low = middle_state(
            {{'d', 'd', hex({"CF", "cf"}, two)}, {'D', 'D', hex({"CF", "cf"}, two)}});
        const uint32_t pair = any(any(emit_bytes('\\', '\\', emit_bytes('u', 'u', low))));
        const uint32_t high = middle_state(
            {{'0', '7', two}, {'8', '9', pair}, {'A', 'B', pair}, {'a', 'b', pair}});
        const uint32_t other = any(two);
        const uint32_t unit = middle_state({{'0', '9', other},
                                            {'A', 'C', other},
                                            {'a', 'c', other},
                                            {'E', 'F', other},
                                            {'e', 'f', other},
                                            {'D', 'D', high},
                                            {'d', 'd', high}});
        std::vector<Edge> edges = {{'u', 'u', unit}};
        for (const char c : std::string_view("\"\\/bfnrt"))
            edges.push_back({uint8_t(c), uint8_t(c), loop});
        const uint32_t escape = middle_state(edges);
        const uint32_t begin = add_state(Kind::edges, {{'\\', '\\', escape}});
        // A third way out of the loop's state.
        const uint32_t plain = edges_[states_[loop].first + 1].to;
        edges_[states_[loop].first + 1].to = add_state(Kind::split, {{0, 0, plain}, {0, 0, begin}});
    }

    Key first() override {
        Key key;
        ++stamp_;
        close(first_, true, false, key);
        std::sort(key.begin(), key.end());
        return key;
    }
    bool step(const Key& from, uint8_t byte, Key& to) override {
        ++stamp_;
        (void)budget_.take(from.size() / 4);
        for (const uint32_t s : from) {
            const State& state = states_[s];
            if (state.kind != Kind::edges) continue;
            for (uint32_t e = state.first; e < state.first + state.count; ++e)
                if (byte >= edges_[e].low && byte <= edges_[e].high)
                    close(edges_[e].to, false, false, to);
        }
        std::sort(to.begin(), to.end());
        return !to.empty();
    }
    int32_t label(const Key& key) override {
        Key reached;
        ++stamp_;
        for (const uint32_t s : key) {
            if (s == accept_) return 0;
            if (states_[s].kind == Kind::end)
                close(edges_[states_[s].first].to, false, true, reached);
        }
        return std::find(reached.begin(), reached.end(), accept_) == reached.end() ? -1 : 0;
    }
    bool boundary(const Key& key) override { return key.empty() || !states_[key[0]].middle; }

private:
    enum class Kind : uint8_t { accept, edges, split, begin, end };
    struct Edge {
        uint8_t low, high;
        uint32_t to;
    };
    struct State {
        Kind kind;
        bool middle;
        uint32_t first, count;
    };
    struct Middle {
        uint8_t low, high;
        uint32_t to;
        bool operator<(const Middle& o) const {
            return std::tuple(low, high, to) < std::tuple(o.low, o.high, o.to);
        }
    };
    uint32_t add_state(Kind kind, const std::vector<Edge>& edges = {}) {
        if (failed()) return 0;
        states_.push_back({kind, false, uint32_t(edges_.size()), uint32_t(edges.size())});
        edges_.insert(edges_.end(), edges.begin(), edges.end());
        if (kind == Kind::edges)
            for (const Edge& e : edges) cuts_.add(e.low, e.high);
        return uint32_t(states_.size() - 1);
    }
    uint32_t middle_state(const std::vector<Edge>& edges) {
        const uint32_t state = add_state(Kind::edges, edges);
        states_[state].middle = true;
        return state;
    }
    uint32_t emit_repeat(const Regex& regex, const Regex::Node& node, uint32_t next) {
        const uint32_t body = node.parts[0];
        if (node.most == unlimited) {
            const uint32_t loop = add_state(Kind::split, {{0, 0, next}, {0, 0, 0}});
            if (failed()) return next;
            const uint32_t inside = emit(regex, body, loop);
            edges_[states_[loop].first + 1].to = inside;
            next = node.least ? inside : loop;
            for (uint32_t i = 1; i < node.least && !failed(); ++i) next = emit(regex, body, next);
            return next;
        }
        const uint32_t exit = next;
        for (uint32_t i = node.most; i > node.least && !failed(); --i) {
            const uint32_t inside = emit(regex, body, next);
            next = add_state(Kind::split, {{0, 0, inside}, {0, 0, exit}});
        }
        for (uint32_t i = 0; i < node.least && !failed(); ++i) next = emit(regex, body, next);
        return next;
    }
    // Code points as sequences of byte ranges: cut where the length changes and where a byte behind
    // the first does not take its whole range.
    void emit_range(uint32_t low, uint32_t high, uint32_t next, std::vector<Edge>& out) {
        if (low <= 0xDFFF && high >= 0xD800) {  // surrogates are no characters
            if (low < 0xD800) emit_range(low, 0xD7FF, next, out);
            if (high > 0xDFFF) emit_range(0xE000, high, next, out);
            return;
        }
        static constexpr uint32_t lasts[] = {0x7F, 0x7FF, 0xFFFF};
        for (const uint32_t last : lasts)
            if (low <= last && high > last) {
                emit_range(low, last, next, out);
                return emit_range(last + 1, high, next, out);
            }
        const int length = low <= 0x7F ? 1 : low <= 0x7FF ? 2 : low <= 0xFFFF ? 3 : 4;
        for (int i = 1; i < length; ++i) {
            const uint32_t mask = (1u << (6 * i)) - 1;
            if ((low & ~mask) == (high & ~mask)) continue;
            if (low & mask) {
                emit_range(low, low | mask, next, out);
                return emit_range((low | mask) + 1, high, next, out);
            }
            if ((high & mask) != mask) {
                emit_range(low, (high & ~mask) - 1, next, out);
                return emit_range(high & ~mask, high, next, out);
            }
        }
        std::string from, to;
        utf8_append(from, char32_t(low));
        utf8_append(to, char32_t(high));
        for (size_t i = from.size() - 1; i > 0; --i)
            next = emit_bytes(uint8_t(from[i]), uint8_t(to[i]), next);
        out.push_back({uint8_t(from[0]), uint8_t(to[0]), next});
    }
    void emit_json_range(uint32_t low, uint32_t high, uint32_t next, std::vector<Edge>& out) {
        for (uint32_t c = low; c <= std::min(high, 0x1Fu); ++c) emit_escape(c, next, out);
        low = std::max(low, 0x20u);
        for (const uint32_t c : {uint32_t('"'), uint32_t('\\')})
            if (low <= c && c <= high) {
                if (low < c) emit_range(low, c - 1, next, out);
                emit_escape(c, next, out);
                low = c + 1;
            }
        if (low <= high) emit_range(low, high, next, out);
    }
    void emit_escape(uint32_t c, uint32_t next, std::vector<Edge>& out) {
        static constexpr std::string_view codes = "\b\t\n\f\r\"\\", names = "btnfr\"\\";
        if (const size_t i = codes.find(char(c)); i != codes.npos) {
            next = emit_bytes(uint8_t(names[i]), uint8_t(names[i]), next);
        } else {
            const std::string text = format("u%04x", unsigned(c));
            for (size_t j = text.size(); j-- > 0;)
                next = emit_bytes(uint8_t(text[j]), uint8_t(text[j]), next);
        }
        out.push_back({'\\', '\\', next});
    }
    void close(uint32_t state, bool at_begin, bool at_end, Key& out) {
        pending_.assign(1, state);
        while (!pending_.empty()) {
            const uint32_t s = pending_.back();
            pending_.pop_back();
            if (seen_[s] == stamp_) continue;
            seen_[s] = stamp_;
            const State& found = states_[s];
            const bool passes = found.kind == Kind::split ||
                                (found.kind == Kind::begin && at_begin) ||
                                (found.kind == Kind::end && at_end);
            if (!passes && found.kind != Kind::begin) out.push_back(s);
            for (uint32_t e = 0; passes && e < found.count; ++e)
                pending_.push_back(edges_[found.first + e].to);
        }
    }

    Spelling spelling_;
    Budget& budget_;
    std::vector<State> states_;
    std::vector<Edge> edges_;
    std::map<Middle, uint32_t> middles_;
    ByteClasses cuts_;
    uint32_t accept_ = 0, first_ = 0, stamp_ = 0;
    std::vector<uint32_t> seen_, pending_;
};

constexpr std::string_view kTooLarge = "the pattern needs too many states";
constexpr uint32_t kMostStates = 20'000;
constexpr uint64_t kMostWork = 100'000;

// Whether every text that the tree matches begins (ends) at the anchor.
bool anchored(const Regex& regex, uint32_t id, Regex::Kind anchor) {
    const Regex::Node& node = regex.nodes[id];
    if (node.kind == anchor) return true;
    if (node.kind == Regex::Kind::sequence && !node.parts.empty())
        return anchored(
            regex, anchor == Regex::Kind::begin ? node.parts.front() : node.parts.back(), anchor);
    if (node.kind != Regex::Kind::choice) return false;
    for (const uint32_t part : node.parts)
        if (!anchored(regex, part, anchor)) return false;
    return true;
}

// ---- Lookaheads -----------------------------------------------------------------------------------

// At the very beginning a lookahead is one more expression for the same text: it is taken out and
// the automata are intersected or subtracted. Elsewhere the parser refuses it.
struct Lookahead {
    bool positive;
    std::string inside;
};
// Where the group that is open at `at` closes; `bar`: the first | outside of groups ends it, too.
size_t group_end(std::string_view text, size_t at, bool bar) {
    int depth = 0;
    bool in_set = false;
    for (; at < text.size(); ++at) {
        const char c = text[at];
        if (c == '\\') ++at;
        else if (in_set) in_set = c != ']';
        else if (c == '[') in_set = true;
        else if (c == '(') ++depth;
        else if ((c == ')' && depth-- == 0) || (c == '|' && bar && depth == 0)) break;
    }
    return std::min(at, text.size());
}
std::string take_lookaheads(std::string_view pattern, bool search, std::vector<Lookahead>& out) {
    const std::string_view anchor = pattern.substr(0, 1) == "^" ? "^" : "";
    std::string_view rest = pattern.substr(anchor.size());
    if ((search && anchor.empty()) || group_end(rest, 0, true) < rest.size())
        return std::string(pattern);
    while (rest.substr(0, 3) == "(?=" || rest.substr(0, 3) == "(?!") {
        const size_t end = group_end(rest, 3, false);
        const std::string_view behind = rest.substr(std::min(end + 1, rest.size()), 1);
        if (end == rest.size() || (!behind.empty() && behind.find_first_of("*+?{") == 0)) break;
        out.push_back({rest[2] == '=', std::string(rest.substr(3, end - 3))});
        rest.remove_prefix(end + 1);
    }
    return std::string(anchor) + std::string(rest);
}

// ---- Formats ------------------------------------------------------------------------------------

// RFC 3339, 5321, 4122, 2673, 4291, 3986, 1123; ISO 8601 durations.
#define VALAR_OCTET "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
#define VALAR_IPV4 "(" VALAR_OCTET "\\.){3}" VALAR_OCTET
#define VALAR_YEAR4 "([0-9][0-9](0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
#define VALAR_DATE                                                                                \
    "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[" \
    "01])|"                                                                                       \
    "(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))|" VALAR_YEAR4 "-02-29"
#define VALAR_ZONE "([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
#define VALAR_TIME "(([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]+)?" VALAR_ZONE ")"
// Hyphens in the third and fourth place are for labels in Punycode.
#define VALAR_ALNUM "[A-Za-z0-9]"
#define VALAR_LDH "[A-Za-z0-9-]"
#define VALAR_LABEL                                                                \
    "(" VALAR_ALNUM "(" VALAR_LDH "{0,2}" VALAR_ALNUM ")?|(" VALAR_ALNUM VALAR_LDH \
    "(" VALAR_ALNUM VALAR_LDH "|-" VALAR_ALNUM ")|[Xx][Nn]--)" VALAR_LDH "{0,58}" VALAR_ALNUM ")"
#define VALAR_H16 "[0-9A-Fa-f]{1,4}"
#define VALAR_LS32 "(" VALAR_H16 ":" VALAR_H16 "|" VALAR_IPV4 ")"
#define VALAR_IPV6                                                                              \
    "((" VALAR_H16 ":){6}" VALAR_LS32 "|::(" VALAR_H16 ":){5}" VALAR_LS32 "|(" VALAR_H16        \
    ")?::(" VALAR_H16 ":){4}" VALAR_LS32 "|((" VALAR_H16 ":){0,1}" VALAR_H16 ")?::(" VALAR_H16  \
    ":){3}" VALAR_LS32 "|((" VALAR_H16 ":){0,2}" VALAR_H16 ")?::(" VALAR_H16 ":){2}" VALAR_LS32 \
    "|((" VALAR_H16 ":){0,3}" VALAR_H16 ")?::" VALAR_H16 ":" VALAR_LS32 "|((" VALAR_H16         \
    ":){0,4}" VALAR_H16 ")?::" VALAR_LS32 "|((" VALAR_H16 ":){0,5}" VALAR_H16 ")?::" VALAR_H16  \
    "|((" VALAR_H16 ":){0,6}" VALAR_H16 ")?::)"
#define VALAR_ATOM "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
#define VALAR_MAIL_HOST \
    "(" VALAR_LABEL "(\\." VALAR_LABEL ")*|\\[(" VALAR_IPV4 "|IPv6:" VALAR_IPV6 ")\\])"
#define VALAR_UNRESERVED "-A-Za-z0-9._~!$&'()*+,;="
#define VALAR_PCT "%[0-9A-Fa-f]{2}"
#define VALAR_PCHAR "([" VALAR_UNRESERVED ":@]|" VALAR_PCT ")"
#define VALAR_HOST "(\\[" VALAR_IPV6 "\\]|([" VALAR_UNRESERVED "]|" VALAR_PCT ")*)"
#define VALAR_AUTHORITY "(([" VALAR_UNRESERVED ":]|" VALAR_PCT ")*@)?" VALAR_HOST "(:[0-9]*)?"
#define VALAR_AFTER_PATH "(\\?(" VALAR_PCHAR "|[/?])*)?(#(" VALAR_PCHAR "|[/?])*)?"
#define VALAR_URI                                                                        \
    "[A-Za-z][A-Za-z0-9+.-]*:(//" VALAR_AUTHORITY "(/" VALAR_PCHAR "*)*|/?(" VALAR_PCHAR \
    "+(/" VALAR_PCHAR "*)*)?)" VALAR_AFTER_PATH

struct KnownFormat {
    std::string_view name;
    const char* pattern;
    uint32_t most = unlimited;     // characters
    const char* within = nullptr;  // must match, too
};
constexpr KnownFormat formats[] = {
    {"date", VALAR_DATE},
    {"time", VALAR_TIME},
    {"date-time", "(" VALAR_DATE ")[Tt]" VALAR_TIME},
    {"duration",
     "P([0-9]+W|[0-9]+Y([0-9]+M([0-9]+D)?)?|[0-9]+M([0-9]+D)?|[0-9]+D|"
     "([0-9]+Y([0-9]+M([0-9]+D)?)?|[0-9]+M([0-9]+D)?|[0-9]+D)?"
     "T([0-9]+H([0-9]+M([0-9]+S)?)?|[0-9]+M([0-9]+S)?|[0-9]+S))"},
    {"uuid", "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"},
    {"email", "(" VALAR_ATOM "(\\." VALAR_ATOM ")*|\"([ !#-[\\]-~]|\\\\[ -~])+\")@" VALAR_MAIL_HOST,
     254, "([!#-?A-~]{1,64}|\"([ !#-[\\]-~]{1,62}|([ !#-[\\]-~]|\\\\[ -~]){1,31})\")@[!#-?A-~]*"},
    {"ipv4", VALAR_IPV4},
    {"ipv6", VALAR_IPV6},
    {"hostname", VALAR_LABEL "(\\." VALAR_LABEL ")*", 253},
    {"uri", VALAR_URI},
    {"uri-reference", VALAR_URI "|(//" VALAR_AUTHORITY "(/" VALAR_PCHAR "*)*|/(" VALAR_PCHAR
                                "+(/" VALAR_PCHAR "*)*)?|([" VALAR_UNRESERVED "@]|" VALAR_PCT
                                ")+(/" VALAR_PCHAR "*)*)?" VALAR_AFTER_PATH},
};
#undef VALAR_OCTET
#undef VALAR_IPV4
#undef VALAR_YEAR4
#undef VALAR_DATE
#undef VALAR_ZONE
#undef VALAR_TIME
#undef VALAR_LABEL
#undef VALAR_ALNUM
#undef VALAR_LDH
#undef VALAR_H16
#undef VALAR_LS32
#undef VALAR_IPV6
#undef VALAR_ATOM
#undef VALAR_MAIL_HOST
#undef VALAR_UNRESERVED
#undef VALAR_PCT
#undef VALAR_PCHAR
#undef VALAR_HOST
#undef VALAR_AUTHORITY
#undef VALAR_AFTER_PATH
#undef VALAR_URI

// Second 60 is there at 23:59 UTC, at the end of June and of December; zones are whole or half hours
// away. `next_day`: where it is the day after already.
std::string leap_seconds(bool next_day) {
    std::string out;
    for (int hour = 0; hour < 24; ++hour) {
        std::vector<std::string> zones[2];  // of minutes 59 and 29
        if (next_day) {
            if (hour < 23) zones[0].push_back(format("\\+%02d:00", hour + 1));
            zones[1].push_back(format("\\+%02d:30", hour));
        } else {
            if (hour == 23) zones[0].push_back("[Zz]|\\+00:00");
            zones[0].push_back(format("-%02d:00", 23 - hour));
            zones[1].push_back(format("-%02d:30", 23 - hour));
        }
        for (int half = 0; half < 2; ++half)
            for (const std::string& zone : zones[half])
                out += format("%s%02d:%s:60(\\.[0-9]+)?(%s)", out.empty() ? "" : "|", hour,
                              half ? "29" : "59", zone.c_str());
    }
    return "(" + out + ")";
}
std::string leap_of(std::string_view format) {
    if (format == "time") return "|" + leap_seconds(false) + "|" + leap_seconds(true);
    if (format != "date-time") return "";
    return "|[1-9][0-9]{3}-(12-31|06-30)[Tt]" + leap_seconds(false) +
           "|[1-9][0-9]{3}-(01-01|07-01)[Tt]" + leap_seconds(true);
}

Result<DfaPtr> regex_dfa_within(const Regex& regex, uint32_t root, Spelling spelling, bool search,
                                Budget& budget) {
    Nfa nfa(spelling, budget);
    uint32_t next = nfa.accept();
    if (search && !anchored(regex, root, Regex::Kind::end)) next = nfa.emit_loop(any_code(), next);
    next = nfa.emit(regex, root, next);
    if (nfa.failed() || budget.spent()) return budget_error();
    if (search && !anchored(regex, root, Regex::Kind::begin))
        next = nfa.emit_loop(any_code(), next);
    nfa.begin_at(next);
    return make_dfa(nfa, budget);
}

// Ours, and tested: neither refused nor held to what a request's patterns may cost.
DfaPtr make_fixed(std::string_view pattern, Spelling spelling) {
    Budget budget;
    auto regex = RegexParser(pattern).parse();
    VALAR_ASSERT(regex.ok());
    auto dfa = regex_dfa_within(*regex, regex->root, spelling, false, budget);
    VALAR_ASSERT(dfa.ok());
    return *dfa;
}

DfaPtr make_format(const KnownFormat& f, Spelling spelling) {
    const DfaPtr all = make_fixed(f.pattern + leap_of(f.name), spelling);
    if (!f.within) return all;
    Budget budget;
    auto both = intersect(all, make_fixed(f.within, spelling), budget);
    VALAR_ASSERT(both.ok());
    return *both;
}

DfaPtr make_any_string() {
    Budget budget;
    Nfa nfa(Spelling::raw, budget);
    const uint32_t loop = nfa.emit_loop({{0x20, 0x21}, {0x23, 0x5B}, {0x5D, kLastCode}},
                                        nfa.accept());
    nfa.add_json_escapes(loop);
    nfa.begin_at(loop);
    return *make_dfa(nfa, budget);
}

}  // namespace

bool take_count(std::string_view text, size_t* at, uint32_t* value) {
    const size_t begin = *at;
    uint64_t v = 0;
    for (; *at < text.size() && text[*at] >= '0' && text[*at] <= '9'; ++*at)
        v = std::min<uint64_t>(v * 10 + uint64_t(text[*at] - '0'), most_repeats + 1);
    *value = uint32_t(v);
    return *at > begin;
}

Result<Regex> parse_regex(std::string_view pattern) {
    if (pattern.size() > most_pattern_bytes)
        return make_error(ErrorKind::invalid_request, "the pattern is longer than 2,048 bytes",
                          "invalid_json_schema");
    return RegexParser(pattern).parse();
}

bool is_too_large(const Error& error) { return error.message == kTooLarge; }

// Of the budget one automaton takes a part at most: what needs more is better several of them.
Result<DfaPtr> regex_dfa(const Regex& regex, uint32_t root, Spelling spelling, bool search,
                         Budget& budget) {
    Budget part = budget.part({kMostStates, kMostWork, budget.bytes});
    auto dfa = regex_dfa_within(regex, root, spelling, search, part);
    budget.give_back(part);
    if (budget.spent()) return budget_error();
    if (!dfa) return make_error(ErrorKind::invalid_request, kTooLarge, "invalid_json_schema");
    return dfa;
}

Result<DfaPtr> pattern_dfa(std::string_view pattern, Spelling spelling, bool search,
                           Budget& budget) {
    std::vector<Lookahead> lookaheads;
    const std::string rest = take_lookaheads(pattern, search, lookaheads);
    auto regex = parse_regex(rest);
    if (!regex) return std::move(regex.error());
    auto dfa = regex_dfa(*regex, regex->root, spelling, search, budget);
    for (size_t i = 0; i < lookaheads.size() && dfa; ++i) {
        auto ahead = pattern_dfa("^(?:" + lookaheads[i].inside + ")", spelling, true, budget);
        if (!ahead) return ahead;
        dfa = lookaheads[i].positive ? intersect(*dfa, *ahead, budget)
                                     : subtract(*dfa, *ahead, budget);
    }
    return dfa;
}

const DfaPtr& any_string_dfa() {
    static const DfaPtr dfa = make_any_string();
    return dfa;
}

const DfaPtr& any_text_dfa(Spelling spelling) {
    static const DfaPtr dfas[2] = {make_fixed("[^]*", Spelling::raw),
                                   make_fixed("[^]*", Spelling::json)};
    return dfas[size_t(spelling)];
}

bool is_format(std::string_view name) { return most_format_chars(name) > 0; }
uint32_t most_format_chars(std::string_view name) {
    for (const KnownFormat& f : formats)
        if (f.name == name) return f.most;
    return 0;
}

// Each is made when it is first asked for, and kept.
Result<DfaPtr> format_dfa(std::string_view name, Spelling spelling) {
    static std::mutex mutex;
    static DfaPtr made[std::size(formats)][2];
    for (size_t i = 0; i < std::size(formats); ++i) {
        if (formats[i].name != name) continue;
        const std::lock_guard<std::mutex> lock(mutex);
        DfaPtr& known = made[i][size_t(spelling)];
        if (!known) known = make_format(formats[i], spelling);
        return known;
    }
    return make_error(ErrorKind::invalid_request, "no such format", "invalid_json_schema");
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif
