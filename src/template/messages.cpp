// From the items of a request to the messages that a template expects.
#include "prologue.hpp"

#include "api_internal.hpp"
#include "template/internal.hpp"

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

struct ChatTurn {
    Role role;
    std::string text;
};

Json message_of(const ChatTurn& turn, bool parts) {
    Json message = Json::object().set("role", role_name(turn.role));
    if (!parts) return message.set("content", turn.text);
    Json part = Json::object().set("type", "text").set("text", turn.text);
    return message.set("content", Json::array().push(std::move(part)));
}

Json messages_of(const std::vector<ChatTurn>& turns, bool parts) {
    Json messages = Json::array();
    for (const ChatTurn& turn : turns) messages.push(message_of(turn, parts));
    return messages;
}

TemplateInput input_of_messages(Json messages, std::string_view bos, std::string_view eos,
                                int64_t now_s) {
    TemplateInput input;
    input.request.set("messages", std::move(messages))
        .set("tools", nullptr)
        .set("documents", nullptr);
    input.own.set("add_generation_prompt", true).set("bos_token", bos).set("eos_token", eos);
    input.now_s = now_s;
    return input;
}

void add_text(std::string& text, const std::string& more) {
    if (!text.empty() && !more.empty()) text += "\n\n";
    text += more;
}

// ---- what a template takes --------------------------------------------------------------------

// Texts that no template has: found in what it renders, they were not lost.
constexpr const char* probe_system = "probe-of-system";
constexpr const char* probe_first = "probe-of-user";
constexpr const char* probe_answer = "probe-of-assistant";
constexpr const char* probe_second = "probe-of-second";

}  // namespace

/// Whether it renders these messages and `word` is in what it makes of them.
bool ChatTemplate::takes(const Json& messages, std::string_view word) const {
    const auto made = render(input_of_messages(messages, "<s>", "</s>", 0));
    return made && made->text.find(word) != std::string::npos;
}

void ChatTemplate::find_shape() {
    const ChatTurn system{Role::system, probe_system}, first{Role::user, probe_first};
    const ChatTurn answer{Role::assistant, probe_answer}, second{Role::user, probe_second};
    const auto turns = [&](std::vector<ChatTurn> these, std::string_view word) {
        return takes(messages_of(these, shape_.parts), word);
    };
    if (!turns({first}, probe_first)) {
        shape_.parts = true;
        if (!turns({first}, probe_first)) {
            // It takes neither way: what it says of a request is clearer than what is said here.
            shape_.parts = false;
            return;
        }
    }
    const ChatTurn both{Role::user, std::string(probe_system) + "\n\n" + probe_first};
    shape_.system = turns({system, first}, probe_system) || !turns({both}, probe_system);
    shape_.late_system = shape_.system && turns({first, answer, system, second}, probe_system);
    shape_.joins = !turns({first, second}, probe_second) ||
                   !turns({first, answer, answer, second}, probe_second) ||
                   (shape_.system && !turns({system, system, first}, probe_first));
    shape_.developer = shape_.developer &&
                       turns({{Role::developer, probe_system}, first}, probe_system);
}

Result<ChatTemplate> ChatTemplate::open(std::string source) {
    auto made = parse(std::move(source));
    if (made) made->find_shape();
    return made;
}

namespace {

/// Texts of system messages that it does not take go before the user's next text.
std::vector<ChatTurn> with_known_roles(std::vector<ChatTurn> turns, const TemplateShape& shape) {
    std::vector<ChatTurn> made;
    std::string waiting;
    for (ChatTurn& turn : turns) {
        if (turn.role == Role::developer && !shape.developer) turn.role = Role::system;
        const bool leading = made.empty() || made.back().role == Role::system;
        const bool taken = shape.system && (shape.late_system || leading);
        if (turn.role == Role::system && !taken) {
            add_text(waiting, turn.text);
            continue;
        }
        if (turn.role == Role::user && !waiting.empty()) {
            add_text(waiting, turn.text);
            turn.text = std::exchange(waiting, {});
        }
        made.push_back(std::move(turn));
    }
    if (!waiting.empty()) made.push_back({Role::user, std::move(waiting)});
    return made;
}

std::vector<ChatTurn> with_neighbours_joined(std::vector<ChatTurn> turns) {
    std::vector<ChatTurn> made;
    for (ChatTurn& turn : turns) {
        if (made.empty() || made.back().role != turn.role) made.push_back(std::move(turn));
        else add_text(made.back().text, turn.text);
    }
    return made;
}

}  // namespace

Result<TemplateInput> chat_input(const Request& request, const ChatTemplate& chat_template,
                                 std::string_view bos, std::string_view eos, int64_t now_s) {
    std::vector<ChatTurn> turns;
    if (!request.instructions.empty()) turns.push_back({Role::system, request.instructions});
    if (request.input.items.empty()) turns.push_back({Role::user, request.input.text});
    for (size_t i = 0; i < request.input.items.size(); ++i) {
        const Item& item = request.input.items[i];
        if (item.kind == Item::Kind::message) turns.push_back({item.role, item.text()});
        else if (item.kind != Item::Kind::reasoning)
            return make_error(ErrorKind::unsupported, "calls of tools are not in this version",
                              "unsupported_parameter", format("input[%zu].type", i));
    }
    const TemplateShape& shape = chat_template.shape();
    turns = with_known_roles(std::move(turns), shape);
    if (shape.joins) turns = with_neighbours_joined(std::move(turns));
    return input_of_messages(messages_of(turns, shape.parts), bos, eos, now_s);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
