#pragma once

#include "template/values.hpp"

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {
namespace jinja {

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
    void fail(const std::string& what) {
        error_ = template_error(ErrorKind::bad_data, line_, what);
    }
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

class Parser {
public:
    explicit Parser(TemplateProgram& program, std::vector<Lexeme> lexemes)
        : p_(program), lexemes_(std::move(lexemes)) {}
    Result<void> run() {
        p_.root = body({});
        if (const auto loop = name_ids_.find("loop"); loop != name_ids_.end())
            p_.loop_name = loop->second;
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
        }
        ~Nested() { --parser_.depth_; }
        Nested(const Nested&) = delete;
        Parser& parser_;
    };

    const Lexeme& now() const { return lexemes_[at_]; }
    const Lexeme& peek() const { return lexemes_[std::min(at_ + 1, lexemes_.size() - 1)]; }
    Lexeme next();
    uint32_t fail(const std::string& what);
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
    uint32_t node(Op op, uint32_t line, uint32_t value, const Ids& children, bool flag = false);
    uint32_t name_id(std::string_view name);
    uint32_t expect_name();
    uint32_t constant(Value value, uint32_t line);

    uint32_t body(std::initializer_list<const char*> ends);
    uint32_t statement();
    uint32_t end_block(std::initializer_list<const char*> ends);
    uint32_t if_statement(uint32_t line);
    uint32_t for_statement(uint32_t line);
    uint32_t set_statement(uint32_t line);
    uint32_t macro_statement(uint32_t line);
    uint32_t filter_statement(uint32_t line);
    uint32_t with_statement(uint32_t line);
    uint32_t generation_statement(uint32_t line);
    uint32_t break_statement(uint32_t line);
    uint32_t continue_statement(uint32_t line);
    uint32_t target(bool fields);
    uint32_t single_target(bool fields);

    uint32_t expression(bool conditionals = true);
    uint32_t tuple(bool conditionals, bool parenthesised = false);
    uint32_t logic(Op op);
    uint32_t negation();
    uint32_t comparison();
    uint32_t arithmetic(size_t level);
    uint32_t unary(bool filters);
    uint32_t primary();
    uint32_t word();
    uint32_t string();
    uint32_t number();
    uint32_t list();
    uint32_t dict();
    bool postfix(Ids& chain);
    bool filter_or_test(Ids& chain);
    uint32_t subscript();
    uint32_t test();
    Ids arguments();
    Ids filters();
    uint32_t chained(uint32_t line, const Ids& chain);

    TemplateProgram& p_;
    std::vector<Lexeme> lexemes_;
    std::unordered_map<std::string, uint32_t> name_ids_ = {};
    size_t at_ = 0;
    uint32_t depth_ = 0;
    uint32_t loops_ = 0;  // around this place
    std::optional<Error> error_ = {};
};

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar
