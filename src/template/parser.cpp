#include "prologue.hpp"

#include "base/text.hpp"
#include "json_internal.hpp"
#include "template/parser.hpp"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace jinja {
namespace {

// ---- lexer ----------------------------------------------------------------------------------

struct Lexeme {
    // clang-format off
    enum class Type : uint8_t { text, begin_print, end_print, begin_tag, end_tag, name, string,
                                integer, real, symbol, end };
    Type             type = Type::end;
    // clang-format on
    std::string_view text = {};
    uint32_t line = 1;
};

/// Cuts the source into text, tags and what stands in tags, and takes away the white space that
/// `-`, trim_blocks and lstrip_blocks remove. Lexemes borrow from the source.
class Lexer {
public:
    explicit Lexer(std::string_view source) : s_(source) {}
    std::vector<Lexeme> run();
    const std::optional<Error>& error() const { return error_; }

private:
    void advance(size_t to);
    void push(Lexeme::Type type, size_t to);
    void fail(std::string_view what) { error_ = template_error(ErrorKind::bad_data, line_, what); }
    size_t next_opener() const;
    void text_before(size_t opener, char sign, bool tag);
    size_t closed_at(size_t at, char kind) const;
    void comment();
    size_t raw_tag(size_t at, std::string_view word) const;
    void raw(size_t begin);
    void inside(char kind);
    void lexeme();
    size_t number_end(bool* real) const;
    bool bracket(char c);

    std::string_view s_;
    size_t at_ = 0;
    uint32_t line_ = 1;
    bool line_start_ = true;  // what was cut off last ended with a line
    std::string open_ = {};   // the closers of brackets that are open
    std::vector<Lexeme> out_ = {};
    std::optional<Error> error_ = {};
};

std::vector<Lexeme> Lexer::run() {
    while (at_ < s_.size() && !error_) {
        const size_t opener = next_opener();
        if (opener == s_.size()) {
            push(Lexeme::Type::text, opener);
            break;
        }
        const char kind = s_[opener + 1];
        const char next = opener + 2 < s_.size() ? s_[opener + 2] : '\0';
        const char sign = next == '-' || next == '+' ? next : '\0';
        text_before(opener, sign, kind != '{');
        advance(opener + (sign ? 3 : 2));
        const size_t raw_begin = kind == '%' ? raw_tag(at_, "raw") : std::string_view::npos;
        if (kind == '#') comment();
        else if (raw_begin != std::string_view::npos) raw(raw_begin);
        else inside(kind);
    }
    out_.push_back({Lexeme::Type::end, {}, line_});
    return std::move(out_);
}

void Lexer::advance(size_t to) {
    line_ += uint32_t(std::count(s_.begin() + ptrdiff_t(at_), s_.begin() + ptrdiff_t(to), '\n'));
    at_ = to;
}

void Lexer::push(Lexeme::Type type, size_t to) {
    if (type != Lexeme::Type::text || to > at_)
        out_.push_back({type, s_.substr(at_, to - at_), line_});
    advance(to);
}

size_t Lexer::next_opener() const {
    for (size_t i = at_; i + 1 < s_.size(); ++i)
        if (s_[i] == '{' && (s_[i + 1] == '{' || s_[i + 1] == '%' || s_[i + 1] == '#')) return i;
    return s_.size();
}

/// The text up to `opener`, without its end where a sign or, before a tag that stands first in its
/// line, lstrip_blocks takes it away.
void Lexer::text_before(size_t opener, char sign, bool tag) {
    const std::string_view text = s_.substr(at_, opener - at_);
    size_t keep = text.size();
    if (sign == '-') keep = stripped(text, nullptr, 2).end;
    else if (sign != '+' && tag) {
        const size_t line = text.rfind('\n') + 1;  // 0 when there is none
        const bool blank = stripped(text.substr(line), nullptr, 2).end == 0;
        if ((line > 0 || line_start_) && blank) keep = line;
    }
    push(Lexeme::Type::text, at_ + keep);
    advance(opener);
}

/// Behind the closer at `at`, and the white space it takes away; npos when none is there.
size_t Lexer::closed_at(size_t at, char kind) const {
    const char sign = s_[at] == '-' || (s_[at] == '+' && kind != '{') ? s_[at] : '\0';
    const size_t closer = at + (sign ? 1 : 0);
    if (closer + 1 >= s_.size() || s_[closer + 1] != '}') return std::string_view::npos;
    if (s_[closer] != (kind == '{' ? '}' : kind)) return std::string_view::npos;
    const size_t end = closer + 2;
    if (sign == '-') return end + stripped(s_.substr(end), nullptr, 1).begin;
    return end + (kind != '{' && !sign && end < s_.size() && s_[end] == '\n');
}

void Lexer::comment() {
    size_t end = s_.find("#}", at_);
    if (end == std::string_view::npos) return fail("a comment without end");
    if (end > at_ && (s_[end - 1] == '-' || s_[end - 1] == '+')) --end;
    advance(closed_at(end, '#'));
    line_start_ = s_[at_ - 1] == '\n';
}

/// Behind "word %}" at `at`; npos when something else is there.
size_t Lexer::raw_tag(size_t at, std::string_view word) const {
    const auto skip = [&] {
        while (at < s_.size() && is_space(s_[at])) ++at;
    };
    skip();
    if (s_.substr(at, word.size()) != word) return std::string_view::npos;
    at += word.size();
    skip();
    return at < s_.size() ? closed_at(at, '%') : std::string_view::npos;
}

/// {% raw %} ... {% endraw %}: text, whatever it looks like.
void Lexer::raw(size_t begin) {
    // The newline behind {% raw %} stays, unlike behind any other tag.
    if (s_[begin - 1] == '\n' && s_.substr(begin - 3, 2) == "%}" && s_[begin - 4] != '-') --begin;
    advance(begin);
    line_start_ = false;
    for (size_t i = begin; (i = s_.find("{%", i)) != std::string_view::npos; i += 2) {
        const char sign = i + 2 < s_.size() && (s_[i + 2] == '-' || s_[i + 2] == '+') ? s_[i + 2]
                                                                                      : '\0';
        const size_t end = raw_tag(i + (sign ? 3 : 2), "endraw");
        if (end == std::string_view::npos) continue;
        text_before(i, sign, true);
        advance(end);
        line_start_ = s_[at_ - 1] == '\n';
        return;
    }
    fail("raw without endraw");
}

/// From behind an opener to behind its closer.
void Lexer::inside(char kind) {
    const bool print = kind == '{';
    out_.push_back({print ? Lexeme::Type::begin_print : Lexeme::Type::begin_tag, {}, line_});
    open_.clear();
    while (!error_) {
        size_t next = at_;
        while (next < s_.size() && is_space(s_[next])) ++next;
        advance(next);
        if (at_ == s_.size()) return fail("a tag without end");
        const size_t end = open_.empty() ? closed_at(at_, kind) : std::string_view::npos;
        if (end == std::string_view::npos) {
            lexeme();
            continue;
        }
        out_.push_back({print ? Lexeme::Type::end_print : Lexeme::Type::end_tag, {}, line_});
        advance(end);
        line_start_ = s_[at_ - 1] == '\n';
        return;
    }
}

/// The end of the number at at_: an integer of any base, or digits with a fraction or an exponent.
size_t Lexer::number_end(bool* real) const {
    const auto digits = [&](size_t i) {
        while (i < s_.size() && (is_digit(s_[i]) || s_[i] == '_')) ++i;
        return i;
    };
    const auto digit_at = [&](size_t i) { return i < s_.size() && is_digit(s_[i]); };
    if (s_[at_] == '0' && at_ + 1 < s_.size() && std::strchr("xXoObB", s_[at_ + 1])) {
        size_t i = at_ + 2;
        while (i < s_.size() && is_name_char(s_[i])) ++i;
        return i;
    }
    size_t end = digits(at_);
    if (at_ > 0 && s_[at_ - 1] == '.') return end;  // the 0 of list.0.name
    if (end < s_.size() && s_[end] == '.' && digit_at(end + 1)) {
        *real = true;
        end = digits(end + 1);
    }
    if (end < s_.size() && (s_[end] == 'e' || s_[end] == 'E')) {
        const size_t sign = end + 1 < s_.size() && (s_[end + 1] == '+' || s_[end + 1] == '-');
        if (digit_at(end + 1 + sign)) {
            *real = true;
            end = digits(end + 1 + sign);
        }
    }
    return end;
}

/// Keeps track of brackets: inside of them }} and %} do not end a tag.
bool Lexer::bracket(char c) {
    if (c == '(' || c == '[' || c == '{') open_ += c == '(' ? ')' : c == '[' ? ']' : '}';
    if (c != ')' && c != ']' && c != '}') return true;
    if (open_.empty() || open_.back() != c) return false;
    open_.pop_back();
    return true;
}

void Lexer::lexeme() {
    const char c = s_[at_];
    if (is_digit(c)) {
        bool real = false;
        const size_t end = number_end(&real);
        return push(real ? Lexeme::Type::real : Lexeme::Type::integer, end);
    }
    if (is_name_char(c)) {
        size_t end = at_;
        while (end < s_.size() && is_name_char(s_[end])) ++end;
        return push(Lexeme::Type::name, end);
    }
    if (c == '"' || c == '\'') {
        size_t end = at_ + 1;
        while (end < s_.size() && s_[end] != c) end += s_[end] == '\\' ? 2 : 1;
        if (end >= s_.size()) return fail("a string without end");
        return push(Lexeme::Type::string, end + 1);
    }
    static const char* const pairs[] = {"//", "**", "==", "!=", ">=", "<="};
    for (const char* pair : pairs)
        if (s_.substr(at_, 2) == pair) return push(Lexeme::Type::symbol, at_ + 2);
    if (c == '\0' || !std::strchr("+-/*%~[](){}><=.:|,;", c) || !bracket(c))
        return fail(format("unexpected character \"%c\"", c >= ' ' && c < 127 ? c : '?'));
    push(Lexeme::Type::symbol, at_ + 1);
}

// ---- parser ---------------------------------------------------------------------------------
// Recursive descent in Jinja's own order of precedence. What chains from left to right becomes one
// node with many children, so that the tree is as deep as the source nests, no deeper. After the
// first error the parser stands at the end of the lexemes, where all loops end.

/// An operator between two operands. Those of one level chain from left to right; a higher level
/// binds tighter.
struct Operator {
    const char* spelling;
    uint8_t level;
    Op op;
};
constexpr uint8_t negation_level = 2, comparison_level = 3;
constexpr Operator operators[] = {
    {"or", 0, Op::any},       {"and", 1, Op::all},          {"==", 3, Op::equal},
    {"!=", 3, Op::not_equal}, {"<", 3, Op::less},           {"<=", 3, Op::less_equal},
    {">", 3, Op::greater},    {">=", 3, Op::greater_equal}, {"in", 3, Op::in},
    {"+", 4, Op::add},        {"-", 4, Op::subtract},       {"~", 5, Op::concat},
    {"*", 6, Op::multiply},   {"//", 6, Op::floor_divide},  {"/", 6, Op::divide},
    {"%", 6, Op::modulo},     {"**", 7, Op::power},
};
constexpr Operator not_in = {"not in", comparison_level, Op::not_in};

class Parser {
public:
    explicit Parser(TemplateProgram& program, std::vector<Lexeme> lexemes)
        : p_(program), lexemes_(std::move(lexemes)) {}
    Result<void> run() {
        p_.root = body({});
        p_.loop_name = known_name("loop");
        p_.caller_name = known_name("caller");
        p_.kwargs_name = known_name("kwargs");
        p_.varargs_name = known_name("varargs");
        if (error_) return *error_;
        return {};
    }

private:
    using Type = Lexeme::Type;
    using Ids = std::vector<uint32_t>;
    struct Statement {
        const char* name;
        uint32_t (Parser::*parse)(uint32_t line);
    };
    static const Statement statements[];

    /// One level of nesting of the source.
    struct Nested {
        explicit Nested(Parser& parser) : parser_(parser) {
            if (++parser_.depth_ > ChatTemplate::max_nesting) parser_.fail("nested too deep");
            else if (parser_.stack_.is_low()) parser_.fail(stack_too_small);
        }
        ~Nested() { --parser_.depth_; }
        Nested(const Nested&) = delete;
        Parser& parser_;
    };

    const Lexeme& now() const { return lexemes_[at_]; }
    const Lexeme& peek() const { return lexemes_[std::min(at_ + 1, lexemes_.size() - 1)]; }
    Lexeme next();
    uint32_t fail(std::string_view what);
    bool is(Type type, std::string_view text) const {
        return now().type == type && now().text == text;
    }
    bool is(const char* symbol) const { return is(Type::symbol, symbol); }
    bool is_word(const char* word) const { return is(Type::name, word); }
    bool take(const char* symbol);
    bool take_word(const char* word);
    void expect(const char* symbol);
    void expect_word(const char* word);
    void expect(Type type, const char* what);
    uint32_t node(Op op, uint32_t line, uint32_t value, std::span<const uint32_t> children,
                  bool flag = false);
    uint32_t node(Op op, uint32_t line, uint32_t value, std::initializer_list<uint32_t> children) {
        return node(op, line, value, std::span(children.begin(), children.size()));
    }
    uint32_t name_id(std::string_view name);
    std::optional<uint32_t> known_name(const char* name) const;
    uint32_t expect_name();
    uint32_t constant(Value value, uint32_t line);

    uint32_t body(std::initializer_list<const char*> ends);
    uint32_t statement();
    uint32_t end_block(std::initializer_list<const char*> ends);
    uint32_t else_block(const char* end);
    uint32_t if_statement(uint32_t line);
    uint32_t for_statement(uint32_t line);
    uint32_t set_statement(uint32_t line);
    uint32_t macro_statement(uint32_t line);
    void parameters(Ids& children);
    uint32_t macro(uint32_t line, uint32_t name, Ids children, const char* end);
    uint32_t special_names(uint32_t first) const;
    uint32_t call_statement(uint32_t line);
    uint32_t filter_statement(uint32_t line);
    uint32_t with_statement(uint32_t line);
    uint32_t generation_statement(uint32_t line);
    uint32_t break_statement(uint32_t line);
    uint32_t continue_statement(uint32_t line);
    uint32_t target(bool fields);
    uint32_t single_target(bool fields);

    uint32_t expression(bool conditionals = true);
    uint32_t tuple(bool conditionals, bool parenthesised = false);
    const Operator* find_operator() const;
    uint32_t operation(uint8_t level);
    uint32_t negation();
    uint32_t chain_of(uint8_t level, uint32_t begin, uint32_t first);
    uint32_t unary(bool filters);
    uint32_t primary();
    uint32_t word();
    uint32_t string();
    uint32_t number();
    uint32_t list();
    uint32_t dict();
    bool postfix(Ids& chain);
    bool filter_or_test(Ids& chain);
    uint32_t subscript(uint32_t of);
    uint32_t test();
    Ids arguments();
    uint32_t argument(Op* kind);
    Ids filters();
    uint32_t chained(uint32_t line, const Ids& chain);

    TemplateProgram& p_;
    const StackLimit stack_ = {};
    std::vector<Lexeme> lexemes_;
    std::unordered_map<std::string, uint32_t> name_ids_ = {};
    size_t at_ = 0;
    uint32_t depth_ = 0;
    uint32_t loops_ = 0;  // around this place
    std::optional<Error> error_ = {};
};

Lexeme Parser::next() {
    const Lexeme lexeme = now();
    if (at_ + 1 < lexemes_.size()) ++at_;
    return lexeme;
}

uint32_t Parser::fail(std::string_view what) {
    if (!error_) error_ = template_error(ErrorKind::bad_data, now().line, what);
    at_ = lexemes_.size() - 1;
    return 0;
}

bool Parser::take(const char* symbol) {
    const bool found = is(symbol);
    if (found) next();
    return found;
}
bool Parser::take_word(const char* word) {
    const bool found = is_word(word);
    if (found) next();
    return found;
}

void Parser::expect(const char* symbol) {
    if (!take(symbol)) fail(join({"expected \"", symbol, "\""}));
}
void Parser::expect_word(const char* word) {
    if (!take_word(word)) fail(join({"expected \"", word, "\""}));
}
void Parser::expect(Type type, const char* what) {
    if (now().type == type) next();
    else fail(join({"expected ", what}));
}

uint32_t Parser::node(Op op, uint32_t line, uint32_t value, std::span<const uint32_t> children,
                      bool flag) {
    const uint32_t first = uint32_t(p_.links.size());
    p_.links.insert(p_.links.end(), children.begin(), children.end());
    p_.nodes.push_back({op, flag, line, value, first, uint32_t(children.size())});
    return uint32_t(p_.nodes.size() - 1);
}

uint32_t Parser::name_id(std::string_view name) {
    const auto [place, fresh] = name_ids_.try_emplace(std::string(name), uint32_t(p_.names.size()));
    if (fresh) p_.names.emplace_back(name);
    return place->second;
}

std::optional<uint32_t> Parser::known_name(const char* name) const {
    const auto found = name_ids_.find(name);
    return found == name_ids_.end() ? std::nullopt : std::optional(found->second);
}

uint32_t Parser::expect_name() {
    if (now().type != Type::name) return fail("expected a name");
    return name_id(next().text);
}

uint32_t Parser::constant(Value value, uint32_t line) {
    p_.constants.push_back(std::move(value));
    return node(Op::constant, line, uint32_t(p_.constants.size() - 1), {});
}

// statements

const Parser::Statement Parser::statements[] = {
    {"if", &Parser::if_statement},       {"for", &Parser::for_statement},
    {"set", &Parser::set_statement},     {"macro", &Parser::macro_statement},
    {"call", &Parser::call_statement},   {"filter", &Parser::filter_statement},
    {"with", &Parser::with_statement},   {"generation", &Parser::generation_statement},
    {"break", &Parser::break_statement}, {"continue", &Parser::continue_statement},
};

/// Statements up to the tag that begins with one of `ends`, and stops at that word; with no ends,
/// up to the end of the source.
uint32_t Parser::body(std::initializer_list<const char*> ends) {
    const Nested nested(*this);
    const uint32_t line = now().line;
    Ids children;
    while (now().type != Type::end) {
        const Lexeme lexeme = next();
        if (lexeme.type == Type::text) {
            p_.texts.emplace_back(lexeme.text);
            children.push_back(node(Op::text, lexeme.line, uint32_t(p_.texts.size() - 1), {}));
        } else if (lexeme.type == Type::begin_print) {
            const uint32_t value = tuple(true);
            children.push_back(node(Op::print, lexeme.line, 0, {value}));
            expect(Type::end_print, "\"}}\"");
        } else {
            for (const char* end : ends)
                if (is_word(end)) return node(Op::body, line, 0, children);
            children.push_back(statement());
        }
    }
    if (ends.size() > 0) return fail(join({"expected \"", *(ends.end() - 1), "\" before the end"}));
    return node(Op::body, line, 0, children);
}

uint32_t Parser::statement() {
    if (now().type != Type::name) return fail("expected the name of a statement");
    for (const Statement& s : statements) {
        if (!is_word(s.name)) continue;
        const uint32_t line = next().line;
        const uint32_t made = (this->*s.parse)(line);
        expect(Type::end_tag, "\"%}\"");
        return made;
    }
    return fail(join({"unknown statement \"", now().text, "\""}));
}

/// "%} statements {% end", behind the end's name.
uint32_t Parser::end_block(std::initializer_list<const char*> ends) {
    expect(Type::end_tag, "\"%}\"");
    const uint32_t made = body(ends);
    next();
    return made;
}

/// The block behind "else", where there is one, up to behind the word `end`.
uint32_t Parser::else_block(const char* end) {
    if (take_word("else")) return end_block({end});
    next();
    return 0;
}

uint32_t Parser::if_statement(uint32_t line) {
    Ids children;
    for (;;) {
        children.push_back(tuple(false));
        expect(Type::end_tag, "\"%}\"");
        children.push_back(body({"elif", "else", "endif"}));
        if (!take_word("elif")) break;
    }
    children.push_back(else_block("endif"));
    return node(Op::choice, line, 0, children);
}

uint32_t Parser::for_statement(uint32_t line) {
    const uint32_t what = target(false);
    expect_word("in");
    const uint32_t iterable = tuple(false);
    const uint32_t condition = take_word("if") ? expression() : 0;
    const bool recursive = take_word("recursive");
    expect(Type::end_tag, "\"%}\"");
    ++loops_;
    const uint32_t inner = body({"else", "endfor"});
    --loops_;
    const uint32_t otherwise = else_block("endfor");
    const uint32_t children[] = {what, iterable, condition, inner, otherwise};
    return node(Op::loop, line, 0, children, recursive);
}

uint32_t Parser::set_statement(uint32_t line) {
    const uint32_t what = target(true);
    if (take("=")) return node(Op::set, line, 0, {what, tuple(true)});
    Ids children = {what, 0};
    const Ids pipes = filters();
    children.insert(children.end(), pipes.begin(), pipes.end());
    children[1] = end_block({"endset"});
    return node(Op::set_block, line, 0, children);
}

uint32_t Parser::macro_statement(uint32_t line) {
    const uint32_t name = expect_name();
    Ids children = {0, 0};
    parameters(children);
    return macro(line, name, std::move(children), "endmacro");
}

/// "(a, b = c)". Behind a parameter with a default all need one.
void Parser::parameters(Ids& children) {
    expect("(");
    bool defaults = false;
    for (const size_t first = children.size(); !take(")") && now().type != Type::end;) {
        if (children.size() > first) expect(",");
        const uint32_t at = now().line, parameter = expect_name();
        const bool has_default = take("=");
        if (defaults && !has_default) fail("a parameter without default behind one with a default");
        defaults = has_default;
        children.push_back(node(Op::keyword, at, parameter, {has_default ? expression() : 0}));
    }
}

/// Which of the Special names stand in nodes from `first` on.
uint32_t Parser::special_names(uint32_t first) const {
    const std::optional<uint32_t> ids[] = {known_name("caller"), known_name("kwargs"),
                                           known_name("varargs")};
    uint32_t found = 0;
    for (uint32_t i = first; i < p_.nodes.size(); ++i)
        for (uint32_t k = 0; k < 3 && p_.nodes[i].op == Op::name; ++k)
            if (ids[k] == p_.nodes[i].value) found |= 1u << k;
    return found;
}

uint32_t Parser::macro(uint32_t line, uint32_t name, Ids children, const char* end) {
    const uint32_t loops = std::exchange(loops_, 0), first = uint32_t(p_.nodes.size());
    children[0] = end_block({end});
    loops_ = loops;
    uint32_t special = special_names(first);
    for (uint32_t parameter : std::span(children).subspan(2)) {  // those with that name are it
        const Node& p = p_.nodes[parameter];
        const std::string& called = p_.names[p.value];
        if (called == "kwargs") special &= ~uint32_t(special_kwargs);
        if (called == "varargs") special &= ~uint32_t(special_varargs);
        if (called == "caller" && (special & special_caller) && !p_.children(p)[0])
            return fail("the parameter caller needs a default");
    }
    children[1] = special;
    return node(Op::macro, line, name, children);
}

/// {% call(a, b) f(c) %} body {% endcall %}: the body is a macro, which f knows as `caller`.
uint32_t Parser::call_statement(uint32_t line) {
    Ids children = {0, 0};
    if (is("(")) parameters(children);
    const uint32_t callee = unary(true);
    const auto& chain = p_.nodes[callee];
    if (chain.op != Op::chain || p_.nodes[p_.children(chain).back()].op != Op::call)
        return fail("expected a call");
    const uint32_t body = macro(line, name_id("caller"), std::move(children), "endcall");
    return node(Op::call_block, line, 0, {callee, body});
}

uint32_t Parser::filter_statement(uint32_t line) {
    const uint32_t first_line = now().line, name = expect_name();
    Ids children = {0, node(Op::filter, first_line, name, arguments())};
    const Ids pipes = filters();
    children.insert(children.end(), pipes.begin(), pipes.end());
    children[0] = end_block({"endfilter"});
    return node(Op::filter_block, line, 0, children);
}

/// {% with a = 1, b = 2 %}: a scope that begins with assignments.
uint32_t Parser::with_statement(uint32_t line) {
    Ids children;
    while (now().type == Type::name) {
        const uint32_t at = now().line, what = single_target(false);
        expect("=");
        children.push_back(node(Op::set, at, 0, {what, expression()}));
        if (!take(",")) break;
    }
    children.push_back(end_block({"endwith"}));
    return node(Op::scope, line, 0, {node(Op::body, line, 0, children)});
}

/// Marks what the assistant says, for training; here it only bounds the life of variables.
uint32_t Parser::generation_statement(uint32_t line) {
    return node(Op::scope, line, 0, {end_block({"endgeneration"})});
}

uint32_t Parser::break_statement(uint32_t line) {
    if (loops_ == 0) return fail("break outside of a loop");
    return node(Op::break_loop, line, 0, {});
}

uint32_t Parser::continue_statement(uint32_t line) {
    if (loops_ == 0) return fail("continue outside of a loop");
    return node(Op::continue_loop, line, 0, {});
}

/// What is assigned to: a name, names for the items of a list, a field of a namespace.
uint32_t Parser::target(bool fields) {
    const uint32_t line = now().line;
    Ids items = {single_target(fields)};
    if (!is(",")) return items[0];
    while (take(","))
        if (now().type == Type::name || is("(")) {
            if (is_word("in")) break;
            items.push_back(single_target(fields));
        }
    return node(Op::tuple, line, 0, items);
}

uint32_t Parser::single_target(bool fields) {
    const Nested nested(*this);
    const uint32_t line = now().line;
    if (take("(")) {
        const uint32_t inner = target(fields);
        expect(")");
        return inner;
    }
    static const char* const reserved[] = {"true", "false", "none", "True", "False", "None"};
    for (const char* w : reserved)
        if (is_word(w)) return fail(join({"cannot assign to ", w}));
    const uint32_t name = node(Op::name, line, expect_name(), {});
    return fields && take(".") ? node(Op::field, line, expect_name(), {name}) : name;
}

// expressions

/// "then if condition else otherwise", or what it is made of.
uint32_t Parser::expression(bool conditionals) {
    const Nested nested(*this);
    const uint32_t line = now().line;
    uint32_t made = operation(0);
    while (conditionals && take_word("if")) {
        const uint32_t condition = operation(0);
        const uint32_t otherwise = take_word("else") ? expression() : 0;
        made = node(Op::conditional, line, 0, {condition, made, otherwise});
    }
    return made;
}

/// Expressions with commas between them; a single one without comma is itself.
uint32_t Parser::tuple(bool conditionals, bool parenthesised) {
    const uint32_t line = now().line;
    Ids items;
    bool comma = false;
    for (bool more = true; more;) {
        if (now().type == Type::end_print || now().type == Type::end_tag || is(")")) break;
        items.push_back(expression(conditionals));
        more = take(",");
        comma = comma || more;
    }
    if (comma || (items.empty() && parenthesised)) return node(Op::tuple, line, 0, items);
    return items.empty() ? fail("expected an expression") : items[0];
}

/// The operator that stands here, or null.
const Operator* Parser::find_operator() const {
    const Lexeme& here = now();
    if (here.type != Type::symbol && here.type != Type::name) return nullptr;
    if (is_word("not")) return peek().type == Type::name && peek().text == "in" ? &not_in : nullptr;
    for (const Operator& o : operators)
        if (here.text == o.spelling) return &o;
    return nullptr;
}

/// Operands with operators of `level` and tighter ones between them: one loop for all levels, for a
/// function of each would take its part of the stack at every parenthesis.
uint32_t Parser::operation(uint8_t level) {
    const uint32_t begin = now().line;
    uint32_t made = level <= negation_level && is_word("not") ? negation() : unary(true);
    for (;;) {
        const Operator* const found = find_operator();
        if (!found || found->level < level) return made;
        made = chain_of(found->level, begin, made);
    }
}

VALAR_NOINLINE uint32_t Parser::negation() {
    const Nested nested(*this);
    const uint32_t line = next().line;
    return node(Op::negation, line, 0, {operation(negation_level)});
}

/// `first` and what operators of just this level append.
VALAR_NOINLINE uint32_t Parser::chain_of(uint8_t level, uint32_t begin, uint32_t first) {
    Ids items = {first};
    Op op = Op::chain;
    for (const Operator* o; (o = find_operator()) && o->level == level;) {
        const uint32_t line = next().line;
        if (o == &not_in) next();
        const uint32_t operand = operation(uint8_t(level + 1));
        if (level < negation_level) op = o->op;
        else if (level == comparison_level) op = Op::comparison;
        items.push_back(level < negation_level ? operand : node(o->op, line, 0, {operand}));
    }
    return node(op, begin, 0, items);
}

uint32_t Parser::chained(uint32_t line, const Ids& chain) {
    return chain.size() == 1 ? chain[0] : node(Op::chain, line, 0, chain);
}

uint32_t Parser::unary(bool with_filters) {
    const uint32_t line = now().line;
    const bool minus = is("-");
    Ids chain;
    if (minus || is("+")) {
        const Nested nested(*this);
        next();
        chain = {node(minus ? Op::minus : Op::plus, line, 0, {unary(false)})};
    } else {
        chain = {primary()};
    }
    while (postfix(chain)) {}
    while (with_filters && filter_or_test(chain)) {}
    return chained(line, chain);
}

VALAR_NOINLINE uint32_t Parser::primary() {
    switch (now().type) {
        case Type::name: return word();
        case Type::string: return string();
        case Type::integer:
        case Type::real: return number();
        default: break;
    }
    if (is("[")) return list();
    if (is("{")) return dict();
    if (!take("(")) return fail("expected an expression");
    const uint32_t made = tuple(true, true);
    expect(")");
    return made;
}

VALAR_NOINLINE uint32_t Parser::word() {
    static const struct {
        const char* word;
        Kind kind;
        int64_t value;
    } constants[] = {{"true", Kind::boolean, 1},  {"True", Kind::boolean, 1},
                     {"false", Kind::boolean, 0}, {"False", Kind::boolean, 0},
                     {"none", Kind::none, 0},     {"None", Kind::none, 0}};
    const Lexeme lexeme = next();
    for (const auto& c : constants)
        if (lexeme.text == c.word) return constant(make_kind(c.kind, c.value), lexeme.line);
    return node(Op::name, lexeme.line, name_id(lexeme.text), {});
}

/// Appends the escape behind the backslash at s[at - 1]; gives the place behind it, 0 when it is
/// malformed. As in Python, an unknown escape stands for itself.
size_t unescape(std::string_view s, size_t at, std::string& out) {
    static const char plain[] = "n\nt\tr\r\\\\'\'\"\"a\ab\bf\fv\v";
    const char c = s[at];
    for (size_t i = 0; plain[i]; i += 2) {
        if (plain[i] != c) continue;
        out += plain[i + 1];
        return at + 1;
    }
    if (c == '\n') return at + 1;
    const bool octal = c >= '0' && c <= '7';
    const size_t digits = octal ? 3 : c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (digits == 0) {
        out += '\\';
        return at;
    }
    uint32_t code = 0;
    size_t i = octal ? at : at + 1, end = std::min(i + digits, s.size());
    for (; i < end; ++i) {
        const char d = s[i];
        const int digit = is_digit(d)            ? d - '0'
                          : d >= 'a' && d <= 'f' ? d - 'a' + 10
                          : d >= 'A' && d <= 'F' ? d - 'A' + 10
                                                 : 16;
        if (digit >= (octal ? 8 : 16)) break;
        code = code * (octal ? 8 : 16) + uint32_t(digit);
    }
    if ((!octal && i != at + 1 + digits) || code > 0x10ffff) return 0;
    utf8_append(out, char32_t(code));
    return i;
}

/// A string literal, or several in a row, which are one.
uint32_t Parser::string() {
    const uint32_t line = now().line;
    std::string out;
    while (now().type == Type::string) {
        const std::string_view s = now().text.substr(1, now().text.size() - 2);
        for (size_t i = 0; i < s.size();) {
            if (s[i] != '\\') out += s[i++];
            else if (i = unescape(s, i + 1, out); i == 0) return fail("a malformed escape");
        }
        next();
    }
    return constant(make_text(Text{std::move(out), {}}), line);
}

uint32_t Parser::number() {
    const Lexeme lexeme = next();
    std::string digits;
    for (char c : lexeme.text)
        if (c != '_') digits += c;
    if (lexeme.type == Type::real) {
        const auto real = parse_double(digits);
        return real ? constant(make_real(*real), lexeme.line) : fail("a malformed number");
    }
    const char mark = digits.size() > 1 && digits[0] == '0' ? char(digits[1] | 32) : '\0';
    const int base = mark == 'x' ? 16 : mark == 'o' ? 8 : mark == 'b' ? 2 : 10;
    const char* begin = digits.c_str() + (base == 10 ? 0 : 2);
    char* end = nullptr;
    errno = 0;
    const long long value = std::strtoll(begin, &end, base);
    if (errno != 0 || *end != '\0' || end == begin) return fail("a malformed or too large number");
    return constant(make_int(value), lexeme.line);
}

VALAR_NOINLINE uint32_t Parser::list() {
    const uint32_t line = next().line;
    Ids items;
    while (!take("]") && now().type != Type::end) {
        if (!items.empty()) expect(",");
        if (take("]")) break;
        items.push_back(expression());
    }
    return node(Op::list, line, 0, items);
}

VALAR_NOINLINE uint32_t Parser::dict() {
    const uint32_t line = next().line;
    Ids items;
    while (!take("}") && now().type != Type::end) {
        if (!items.empty()) expect(",");
        if (take("}")) break;
        items.push_back(expression());
        expect(":");
        items.push_back(expression());
    }
    return node(Op::dict, line, 0, items);
}

bool Parser::postfix(Ids& chain) {
    const uint32_t line = now().line;
    if (take(".")) {
        if (now().type == Type::integer) chain.push_back(node(Op::item, line, 0, {number()}));
        else chain.push_back(node(Op::attribute, line, expect_name(), {}));
    } else if (is("[")) {
        chain.push_back(subscript(chain.size() == 1 ? chain[0] : 0));
    } else if (is("(")) {
        chain.push_back(node(Op::call, line, 0, arguments()));
    } else {
        return false;
    }
    return true;
}

VALAR_NOINLINE bool Parser::filter_or_test(Ids& chain) {
    const uint32_t line = now().line;
    if (is("|")) {
        const Ids pipes = filters();
        chain.insert(chain.end(), pipes.begin(), pipes.end());
    } else if (take_word("is")) {
        chain.push_back(test());
    } else if (is("(")) {
        chain.push_back(node(Op::call, line, 0, arguments()));
    } else {
        return false;
    }
    return true;
}

/// `of`: the value itself, or 0 where it is no single expression.
uint32_t Parser::subscript(uint32_t of) {
    const Nested nested(*this);
    const uint32_t line = next().line;
    uint32_t parts[3] = {};
    size_t count = 0;
    bool slice = false;
    for (; count < 3; ++count) {
        if (!is(":") && !is("]")) parts[count] = expression();
        if (!take(":")) break;
        slice = true;
    }
    expect("]");
    const Op op = p_.nodes[of].op;
    const bool constant = op == Op::constant || op == Op::list || op == Op::tuple || op == Op::dict;
    if (slice) return node(Op::slice, line, 0, parts, constant);
    return parts[0] ? node(Op::item, line, 0, {parts[0]}) : fail("expected an index");
}

Parser::Ids Parser::filters() {
    Ids made;
    while (take("|")) {
        const uint32_t line = now().line, name = expect_name();
        made.push_back(node(Op::filter, line, name, arguments()));
    }
    return made;
}

/// Behind "is". One argument may stand without parentheses: `x is divisibleby 3`.
uint32_t Parser::test() {
    const uint32_t line = now().line;
    const bool negated = take_word("not");
    const uint32_t name = expect_name();
    Ids values;
    if (is("(")) values = arguments();
    else if (now().type == Type::string || now().type == Type::integer ||
             now().type == Type::real || is("[") || is("{") ||
             (now().type == Type::name && !is_word("else") && !is_word("or") && !is_word("and"))) {
        if (is_word("is")) return fail("a test of a test");
        Ids chain = {primary()};
        while (postfix(chain)) {}
        values = {chained(line, chain)};
    }
    return node(Op::test, line, name, values, negated);
}

/// "(a, b, name = c, *list, **dict)", or nothing at all.
Parser::Ids Parser::arguments() {
    Ids made;
    if (!take("(")) return made;
    Op last = Op::body;  // then keyword, spread
    bool all = false;    // a ** was there
    while (!take(")") && now().type != Type::end) {
        if (!made.empty()) expect(",");
        if (take(")")) break;
        Op kind = Op::body;
        const uint32_t id = argument(&kind);
        const bool mapping = kind == Op::spread && p_.nodes[id].flag;
        if (all || (kind == Op::body && last != Op::body) ||
            (kind == Op::spread && !mapping && last == Op::spread))
            fail("an argument behind one that must be last");
        all = mapping;
        last = std::max(last, kind);
        made.push_back(id);
    }
    return made;
}

uint32_t Parser::argument(Op* kind) {
    const uint32_t line = now().line;
    const bool mapping = is("**");
    if (mapping || is("*")) {
        next();
        *kind = Op::spread;
        const uint32_t value = expression();
        return node(Op::spread, line, 0, std::span(&value, 1), mapping);
    }
    if (now().type != Type::name || peek().type != Type::symbol || peek().text != "=")
        return expression();
    *kind = Op::keyword;
    const uint32_t name = expect_name();
    next();
    return node(Op::keyword, line, name, {expression()});
}

}  // namespace

Result<void> parse(TemplateProgram& program, std::string_view source) {
    Lexer lexer(source);
    std::vector<Lexeme> lexemes = lexer.run();
    if (lexer.error()) return *lexer.error();
    return Parser(program, std::move(lexemes)).run();
}

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
