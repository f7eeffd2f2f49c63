// >>template
// In this order: values, the program (a flat syntax tree), lexer, parser, renderer, what operators and
// formats do, the tables of
// filters, tests, methods and functions, and last the way from a request to a prompt.
#include "prologue.hpp"

#include "api_internal.hpp"
#include "template/parser.hpp"
#include "template/renderer.hpp"

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
    return ChatTemplate(program);
}

Result<ChatTemplate> ChatTemplate::open(std::string source, bool has_chatml_tokens) {
    if (!source.empty()) return parse(std::move(source));
    if (!has_chatml_tokens)
        return make_error(ErrorKind::unsupported,
                          "the model has no chat template (tokenizer.chat_template) and no "
                          "tokens <|im_start|> and <|im_end|> for the default one");
    return parse(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}");
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

Result<TemplateInput> chat_input(const Request& request, const ChatTemplate& chat_template,
                                 std::string_view bos, std::string_view eos, int64_t now_s) {
    const bool knows_developer = chat_template.mentions(role_name(Role::developer));
    Json messages = Json::array();
    const auto add = [&](Role role, std::string text) {
        if (role == Role::developer && !knows_developer) role = Role::system;
        messages.push(Json::object().set("role", role_name(role)).set("content", std::move(text)));
    };
    if (!request.instructions.empty()) add(Role::system, request.instructions);
    if (request.input.items.empty()) add(Role::user, request.input.text);
    for (size_t i = 0; i < request.input.items.size(); ++i) {
        const Item& item = request.input.items[i];
        if (item.kind == Item::Kind::message) add(item.role, item.text());
        else if (item.kind != Item::Kind::reasoning)
            return make_error(ErrorKind::unsupported, "calls of tools are not in this version",
                              "unsupported_parameter", format("input[%zu].type", i));
    }
    TemplateInput input;
    input.request.set("messages", std::move(messages))
        .set("tools", nullptr)
        .set("documents", nullptr);
    input.own.set("add_generation_prompt", true).set("bos_token", bos).set("eos_token", eos);
    input.now_s = now_s;
    return input;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
