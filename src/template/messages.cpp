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

TemplateInput input_of_turns(const std::vector<ChatTurn>& turns, const TemplateShape& shape,
                             std::string_view bos, std::string_view eos, int64_t now_s) {
    TemplateInput input;
    input.request.set("messages", messages_of(turns, shape.parts))
        .set("tools", shape.empty_tools ? Json::array() : Json())
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

/// Whether it renders these messages and loses none of their texts.
bool takes(const ChatTemplate& chat_template, const std::vector<ChatTurn>& turns,
           const TemplateShape& shape) {
    const auto made = chat_template.render(input_of_turns(turns, shape, "<s>", "</s>", 0));
    for (const ChatTurn& turn : turns)
        if (!made || made->text.find(turn.text) == std::string::npos) return false;
    return true;
}

/// How it takes a user's text alone; false: in no way that is known here.
bool find_content(const ChatTemplate& chat_template, TemplateShape* shape) {
    for (int way = 0; way < 4; ++way) {
        shape->parts = way & 1;
        shape->empty_tools = way & 2;
        if (takes(chat_template, {{Role::user, "probe-of-user"}}, *shape)) return true;
    }
    shape->parts = shape->empty_tools = false;
    return false;
}

TemplateShape shape_of(const ChatTemplate& chat_template, TemplateShape shape) {
    const ChatTurn system{Role::system, "probe-of-system"}, late{Role::system, "probe-of-late"};
    const ChatTurn first{Role::user, "probe-of-user"}, second{Role::user, "probe-of-second"};
    const ChatTurn answer{Role::assistant, "probe-of-assistant"};
    const ChatTurn developer{Role::developer, "probe-of-developer"};
    const auto all = [&](const std::vector<ChatTurn>& turns) {
        return takes(chat_template, turns, shape);
    };
    // Where it takes nothing, its own words on a request are clearer than what is said here.
    if (!find_content(chat_template, &shape)) return shape;
    shape.system = all({system, first});
    shape.developer = shape.developer && all({developer, first});
    shape.late_system = shape.system && all({system, first, answer, late, second}) &&
                        all({system, late, first}) &&
                        (!shape.developer || all({system, first, answer, developer, second}));
    shape.joins = !all({first, second}) || !all({first, answer, answer, second});
    return shape;
}

}  // namespace

Result<ChatTemplate> ChatTemplate::open(std::string source) {
    auto made = parse(std::move(source));
    if (made) made->shape_ = shape_of(*made, made->shape_);
    return made;
}

namespace {

/// Texts of system messages that it does not take go before the user's next text.
std::vector<ChatTurn> with_known_roles(std::vector<ChatTurn> turns, const TemplateShape& shape) {
    std::vector<ChatTurn> made;
    std::string waiting;
    for (ChatTurn& turn : turns) {
        if (turn.role == Role::developer && !shape.developer) turn.role = Role::system;
        const bool orders = turn.role == Role::system || turn.role == Role::developer;
        const bool leading = made.empty() || made.back().role == Role::system ||
                             made.back().role == Role::developer;
        const bool known = turn.role == Role::developer || shape.system;
        if (orders && !(known && (shape.late_system || leading))) {
            add_text(waiting, turn.text);
            continue;
        }
        if (orders && !shape.late_system && !made.empty() && made.back().role == turn.role) {
            add_text(made.back().text, turn.text);
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
    return input_of_turns(turns, shape, bos, eos, now_s);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
