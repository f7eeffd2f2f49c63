// >>template
// In this order: values, the program (a flat syntax tree), lexer, parser, renderer, what operators
// and formats do, the tables of filters, tests, methods and functions, and last the way from a
// request to a prompt.
#include "prologue.hpp"

#include "template/parser.hpp"
#include "template/renderer.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

/// As Jinja reads it: every kind of line end is \n, and the last one does not count.
std::string normalized_lines(std::string_view source) {
    std::string out;
    for (size_t i = 0; i < source.size(); ++i) {
        out += source[i] == '\r' ? '\n' : source[i];
        if (source[i] == '\r' && i + 1 < source.size() && source[i + 1] == '\n') ++i;
    }
    if (!out.empty() && out.back() == '\n') out.pop_back();
    return out;
}

}  // namespace

// ---- from a request to a prompt ---------------------------------------------------------------

ChatTemplate::ChatTemplate(std::shared_ptr<const TemplateProgram> program)
    : program_(std::move(program)) {}

Result<ChatTemplate> ChatTemplate::parse(std::string source) {
    if (source.size() > max_source_bytes)
        return make_error(ErrorKind::bad_data, "chat template: over 1 MiB");
    if (!utf8_valid(source)) return make_error(ErrorKind::bad_data, "chat template: not UTF-8");
    const std::string text = normalized_lines(source);
    const auto program = std::make_shared<TemplateProgram>();
    program->source = std::move(source);
    if (auto parsed = jinja::parse(*program, text); !parsed) return parsed.error();
    ChatTemplate made(program);
    made.shape_.developer = made.mentions("developer");
    return made;
}

Result<MarkedText> ChatTemplate::render(const TemplateInput& input) const {
    return jinja::Renderer(*program_, input.now_s).run(input);
}

const std::string& ChatTemplate::source() const { return program_->source; }

bool ChatTemplate::mentions(std::string_view word) const {
    for (const auto& constant : program_->constants)
        if (jinja::is_string(constant) && jinja::chars(constant).find(word) != std::string::npos)
            return true;
    return false;
}

bool ChatTemplate::has_word(std::string_view word) const {
    return std::any_of(program_->constants.begin(), program_->constants.end(),
                       [&](const auto& constant) {
                           return jinja::is_string(constant) && jinja::chars(constant) == word;
                       });
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
