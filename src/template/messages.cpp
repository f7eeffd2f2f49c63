// From the items of a request to the messages that a template expects.
#include "prologue.hpp"

#include "api_internal.hpp"
#include "template/syntax.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
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
namespace {

struct ChatCall {
    std::string id, name;
    std::string arguments;  // JSON
    size_t number = 0;      // among the conversation's calls
};

struct ChatTurn {
    Role role;
    std::string text;
    std::string thought = {};
    std::vector<ChatCall> calls = {};
    ChatCall result_of = {};  // of a tool
};

// The nine characters are always the same of one id.
std::string id_of(const ChatCall& call, const TemplateShape& shape) {
    switch (shape.ids) {
        case TemplateShape::Ids::any: break;
        case TemplateShape::Ids::nine: return derive_id({}, call.id).substr(0, 9);
        case TemplateShape::Ids::named:
            return "functions." + call.name + ":" + std::to_string(call.number);
    }
    return call.id;
}

Json arguments_of(const ChatCall& call, const TemplateShape& shape) {
    if (shape.text_arguments) return call.arguments;
    auto object = Json::parse(call.arguments.empty() ? "{}" : call.arguments);
    return object && object->is_object() ? std::move(*object) : Json(call.arguments);
}

Json calls_of(const ChatTurn& turn, const TemplateShape& shape) {
    Json calls = Json::array();
    for (const ChatCall& call : turn.calls)
        calls.push(Json::object()
                       .set("id", id_of(call, shape))
                       .set("type", "function")
                       .set("function", Json::object()
                                            .set("name", call.name)
                                            .set("arguments", arguments_of(call, shape))));
    return calls;
}

Json content_of(const ChatTurn& turn, const TemplateShape& shape) {
    if (shape.null_content && turn.text.empty() && !turn.calls.empty()) return nullptr;
    if (!shape.parts) return turn.text;
    return Json::array().push(Json::object().set("type", "text").set("text", turn.text));
}

Json message_of(const ChatTurn& turn, const TemplateShape& shape) {
    Json message = Json::object().set("role", role_name(turn.role));
    if (!turn.thought.empty()) message.set(shape.thought, turn.thought);
    message.set("content", content_of(turn, shape));
    if (!turn.calls.empty()) message.set("tool_calls", calls_of(turn, shape));
    if (!turn.result_of.id.empty())
        message.set("name", turn.result_of.name).set("tool_call_id", id_of(turn.result_of, shape));
    return message;
}

TemplateInput input_of_turns(const std::vector<ChatTurn>& turns, const TemplateShape& shape,
                             Json tools, std::string_view bos, std::string_view eos,
                             int64_t now_s) {
    TemplateInput input;
    Json messages = Json::array();
    for (const ChatTurn& turn : turns) messages.push(message_of(turn, shape));
    if (tools.empty()) tools = shape.empty_tools ? Json::array() : Json();
    input.request.set("messages", std::move(messages))
        .set(shape.tools_name, std::move(tools))
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
    const auto made = chat_template.render(input_of_turns(turns, shape, {}, "<s>", "</s>", 0));
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

// ---- what it takes of tools and thoughts -------------------------------------------------------

/// A user's question, calls of a tool, their results.
std::vector<ChatTurn> probe_of_calls(int calls) {
    std::vector<ChatTurn> turns = {{Role::user, "probe-of-user"}, {Role::assistant, {}}};
    for (int i = 0; i < calls; ++i) {
        const std::string id = "call_" + std::string(24, static_cast<char>('a' + i));
        const ChatCall call{id, kProbeTool, kProbeArguments, static_cast<size_t>(i)};
        turns[1].calls.push_back(call);
        turns.push_back({Role::tool, "probe-of-result", {}, {}, call});
    }
    return turns;
}

size_t count_of(std::string_view text, std::string_view word) {
    size_t count = 0;
    for (size_t at = text.find(word); at != text.npos; at = text.find(word, at + 1)) ++count;
    return count;
}

std::string rendered(const ChatTemplate& chat_template, const std::vector<ChatTurn>& turns,
                     const TemplateShape& shape, Json tools) {
    auto made = chat_template.render(
        input_of_turns(turns, shape, std::move(tools), "<s>", "</s>", 0));
    return made ? std::move(made->text) : std::string();
}

/// Whether so many calls stand in a text: by name and value, the arguments neither escaped, as JSON
/// in a string would be, nor as Python shows a dict.
bool holds_calls(std::string_view text, const TemplateShape& shape, size_t calls) {
    return count_of(text, "probe-of-value") == calls &&
           count_of(text, kProbeTool) >= calls + shape.tools &&
           text.find("\\\"probe_key") == text.npos && text.find("'probe_key'") == text.npos;
}

/// The way in which it takes calls; the first in which it takes their results too is preferred.
void find_calls(const ChatTemplate& chat_template, TemplateShape* shape) {
    const auto made = [&](const TemplateShape& way, int calls) {
        return rendered(chat_template, probe_of_calls(calls), way, probe_tools());
    };
    TemplateShape found = *shape;
    for (int way = 0; way < 12 && !found.results; ++way) {
        TemplateShape tried = *shape;
        tried.calls = true;
        tried.null_content = way & 1;
        tried.text_arguments = way & 2;
        tried.ids = static_cast<TemplateShape::Ids>(way / 4);
        const std::string text = made(tried, 1);
        tried.results = text.find("probe-of-result") != text.npos;
        if (holds_calls(text, tried, 1) && (tried.results || !found.calls)) found = tried;
    }
    *shape = found;
    shape->parallel = found.calls && holds_calls(made(found, 2), found, 2);
}

/// Thoughts go back at least within a turn: before calls whose results come next.
void find_thought(const ChatTemplate& chat_template, TemplateShape* shape) {
    for (const char* field : {"reasoning_content", "reasoning", "thinking", "thought"}) {
        if (chat_template.source().find(field) == std::string::npos) continue;
        TemplateShape tried = *shape;
        tried.thought = field;
        std::vector<ChatTurn> turns = {{Role::user, "probe-of-user"},
                                       {Role::assistant, "probe-of-answer", "probe-of-thought"}};
        if (shape->calls) {
            turns = probe_of_calls(1);
            turns[1].thought = "probe-of-thought";
        }
        const std::string text = rendered(chat_template, turns, tried, probe_tools());
        if (text.find("probe-of-thought") == text.npos) continue;
        shape->thought = field;
        turns[1].text = "probe-of-text";
        shape->thought_or_text = rendered(chat_template, turns, tried, probe_tools()).empty();
        return;
    }
}

/// The switches that templates have for thoughts.
void set_effort(Effort effort, const TemplateShape& shape, Json* own) {
    const bool on = effort != Effort::none;
    const char* word = shape.efforts[static_cast<size_t>(effort)];
    own->set("enable_thinking", on)
        .set("thinking", on)
        .set("thinking_mode", on ? "enabled" : "disabled")
        .set("thinking_budget", thought_budget(effort))
        .set("reasoning_effort", word)
        .set("thinking_effort", word);
}

/// Many know three words; what others name is one of their literals, or they refuse the rest.
void find_efforts(const ChatTemplate& chat_template, TemplateShape* shape) {
    static constexpr std::string_view words[6][6] = {
        {"none", "no_think", "minimal", "low", "medium", "high"},
        {"minimal", "low", "medium", "high"},
        {"low", "medium", "high"},
        {"medium", "low", "high"},
        {"high", "xhigh", "max", "medium", "low"},
        {"xhigh", "max", "high", "medium", "low"}};
    const std::string& source = chat_template.source();
    if (source.find("_effort") == source.npos) return;
    const auto known = [&](std::string_view word) {
        return word == "low" || word == "medium" || word == "high" || chat_template.has_word(word);
    };
    for (size_t i = 0; i < std::size(words); ++i)
        for (const std::string_view word : words[i]) {
            if (word.empty() || !known(word)) continue;
            shape->efforts[i] = word.data();
            TemplateInput input = input_of_turns({{Role::user, "probe-of-user"}}, *shape, {}, "<s>",
                                                 "</s>", 0);
            set_effort(static_cast<Effort>(i), *shape, &input.own);
            if (chat_template.render(input)) break;
        }
}

TemplateShape with_tools(const ChatTemplate& chat_template, TemplateShape shape) {
    const std::vector<ChatTurn> question = {{Role::user, "probe-of-user"}};
    if (rendered(chat_template, question, shape, {}).empty()) return shape;
    if (chat_template.source().find("tool") != std::string::npos) {
        const std::string text = rendered(chat_template, question, shape, probe_tools());
        shape.tools = text.find(kProbeTool) != text.npos;
        if (!shape.tools && chat_template.source().find("xml_tools") != std::string::npos) {
            shape.tools_name = "xml_tools";  // SmolLM3
            shape.tools =
                rendered(chat_template, question, shape, probe_tools()).find(kProbeTool) !=
                std::string::npos;
            if (!shape.tools) shape.tools_name = "tools";
        }
        find_calls(chat_template, &shape);
    }
    find_thought(chat_template, &shape);
    find_efforts(chat_template, &shape);
    return shape;
}

}  // namespace

Json probe_tools() {
    const Json text = Json::object().set("type", "string").set("description", "probe");
    const Json parameters = Json::object()
                                .set("type", "object")
                                .set("properties", Json::object().set("probe_key", text))
                                .set("required", Json::array().push("probe_key"));
    const Json function = Json::object()
                              .set("name", kProbeTool)
                              .set("description", "probe")
                              .set("parameters", parameters);
    return Json::array().push(Json::object().set("type", "function").set("function", function));
}

Result<ChatTemplate> ChatTemplate::open(std::string source) {
    auto made = parse(std::move(source));
    if (made) made->shape_ = with_tools(*made, shape_of(*made, made->shape_));
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

bool can_join(const ChatTurn& before, const ChatTurn& after, const TemplateShape& shape) {
    return before.role == after.role && before.role != Role::tool && before.calls.empty() &&
           (after.calls.empty() || !shape.null_content);
}

std::vector<ChatTurn> with_neighbours_joined(std::vector<ChatTurn> turns,
                                             const TemplateShape& shape) {
    std::vector<ChatTurn> made;
    for (ChatTurn& turn : turns) {
        if (made.empty() || !can_join(made.back(), turn, shape)) {
            made.push_back(std::move(turn));
            continue;
        }
        add_text(made.back().text, turn.text);
        add_text(made.back().thought, turn.thought);
        made.back().calls = std::move(turn.calls);
    }
    return made;
}

// ---- tools -------------------------------------------------------------------------------------

/// To a model every tool is a function; one that is called with a text has that as its argument.
Json parameters_of(const Tool& tool) {
    if (!tool.custom && tool.parameters.is_object()) return tool.parameters;
    Json parameters = Json::object().set("type", "object").set("properties", Json::object());
    if (!tool.custom) return parameters;
    Json text = Json::object().set("type", "string");
    if (!tool.format.regex.empty())
        text.set("description", "fits the regular expression " + tool.format.regex);
    if (!tool.format.gbnf.empty())
        text.set("description", "fits this grammar: " + tool.format.gbnf);
    return parameters.set("properties", Json::object().set(kCustomArgument, std::move(text)))
        .set("required", Json::array().push(kCustomArgument));
}

/// A request that forbids calls shows no tools.
Json tools_of(const Request& request) {
    Json tools = Json::array();
    if (request.tool_choice.mode == ToolChoice::Mode::none) return tools;
    for (const Tool& tool : request.tools)
        tools.push(Json::object()
                       .set("type", "function")
                       .set("function", Json::object()
                                            .set("name", tool.name)
                                            .set("description", tool.description)
                                            .set("parameters", parameters_of(tool))));
    return tools;
}

/// What a template does not know of stands in the text.
std::vector<ChatTurn> with_calls_as_text(std::vector<ChatTurn> turns, const TemplateShape& shape,
                                         const AnswerSyntax* syntax) {
    for (ChatTurn& turn : turns) {
        if (!shape.calls && !turn.calls.empty()) {
            const auto calls = std::exchange(turn.calls, {});
            std::vector<WrittenCall> written;
            for (const ChatCall& call : calls)
                written.push_back(
                    {call.name, call.id, arguments_of(call, TemplateShape()), call.number});
            if (!turn.text.empty()) turn.text += '\n';
            turn.text += written_calls(written, syntax);
        }
        if (turn.role != Role::tool || (shape.results && shape.calls)) continue;
        turn = {Role::user, join({kResultBegin, turn.text, kResultEnd})};
    }
    return turns;
}

std::vector<ChatTurn> with_thought_or_text(std::vector<ChatTurn> turns) {
    for (ChatTurn& turn : turns)
        if (!turn.calls.empty() && !turn.thought.empty())
            add_text(turn.thought, std::exchange(turn.text, {}));
    return turns;
}

/// Where calls are shown only without a text, that is a message before them.
std::vector<ChatTurn> with_calls_apart(std::vector<ChatTurn> turns) {
    std::vector<ChatTurn> made;
    for (ChatTurn& turn : turns) {
        if (!turn.calls.empty() && !turn.text.empty())
            made.push_back({Role::assistant, std::exchange(turn.text, {})});
        made.push_back(std::move(turn));
    }
    return made;
}

/// Where only one call may stand in a message, each is followed by its result.
std::vector<ChatTurn> with_single_calls(std::vector<ChatTurn> turns) {
    std::vector<ChatTurn> made;
    std::vector<ChatCall> left;  // of the last message that had several
    const auto give = [&](size_t index) {
        made.push_back({Role::assistant, {}, {}, {left[index]}});
        left.erase(left.begin() + static_cast<ptrdiff_t>(index));
    };
    for (ChatTurn& turn : turns) {
        if (turn.role == Role::tool) {
            const auto own = std::find_if(left.begin(), left.end(), [&](const ChatCall& call) {
                return call.id == turn.result_of.id;
            });
            if (own != left.end()) give(static_cast<size_t>(own - left.begin()));
        } else {
            while (!left.empty()) give(0);  // those without a result
        }
        if (turn.calls.size() > 1) {
            left.assign(turn.calls.begin() + 1, turn.calls.end());
            turn.calls.resize(1);
        }
        made.push_back(std::move(turn));
    }
    while (!left.empty()) give(0);
    return made;
}

std::string tools_text(const Json& tools, const AnswerSyntax* syntax) {
    std::string text = "# Tools\n\nYou may call one or more of these functions:\n<tools>\n";
    for (const Json& tool : tools.items())
        text += without_token_bytes(tool.write(json_python)) + "\n";
    const WrittenCall example{"function-name", "", Json::object().set("argument", "value"), 0};
    return text + "</tools>\n\nA call is written like this:\n" +
           written_calls(std::span(&example, 1), syntax);
}

std::string schema_text(const Format& format) {
    std::string text = "Answer with JSON that fits this schema";
    if (!format.description.empty()) text += " (" + format.description + ")";
    return text + ":\n" + format.schema.write(json_python);
}

void add_order(std::vector<ChatTurn>& turns, const std::string& text) {
    if (turns.empty() || turns.front().role != Role::system)
        turns.insert(turns.begin(), {Role::system, {}});
    add_text(turns.front().text, text);
}

// ---- items -------------------------------------------------------------------------------------

/// The turn that an item of the assistant belongs to: thought, message and calls are one message.
ChatTurn& turn_for(std::vector<ChatTurn>& turns, Item::Kind kind) {
    const bool call = kind == Item::Kind::function_call || kind == Item::Kind::custom_tool_call;
    const bool goes_on = !turns.empty() && turns.back().role == Role::assistant &&
                         (call || (kind == Item::Kind::message && turns.back().text.empty() &&
                                   turns.back().calls.empty() && !turns.back().thought.empty()));
    if (!goes_on) turns.push_back({Role::assistant, {}});
    return turns.back();
}

std::vector<ChatTurn> turns_of(const Request& request) {
    std::vector<ChatTurn> turns;
    std::unordered_map<std::string_view, ChatCall> called;  // by id
    if (!request.instructions.empty()) turns.push_back({Role::system, request.instructions});
    if (request.input.items.empty()) turns.push_back({Role::user, request.input.text});
    for (const Item& item : request.input.items) {
        if (item.is_call()) {
            ChatCall call{item.call_id, item.name, item.arguments, called.size()};
            if (item.kind == Item::Kind::custom_tool_call)
                call.arguments =
                    Json::object().set(kCustomArgument, item.arguments).write(json_python);
            called[item.call_id] = call;
            turn_for(turns, item.kind).calls.push_back(std::move(call));
        } else if (item.kind == Item::Kind::reasoning) {
            if (std::string thought = item.text(); !thought.empty())
                turn_for(turns, item.kind).thought = std::move(thought);
        } else if (item.kind != Item::Kind::message) {
            turns.push_back({Role::tool, item.text(), {}, {}, called[item.call_id]});
        } else if (item.role == Role::assistant) {
            turn_for(turns, item.kind).text = item.text();
        } else {
            turns.push_back({item.role, item.text()});
        }
    }
    return turns;
}

/// Those bytes are for us alone.
void drop_token_bytes(std::vector<ChatTurn>& turns) {
    const auto drop = [](std::string& text) {
        if (text.find_first_of("\xFF\xFE") != text.npos) text = without_token_bytes(text);
    };
    for (ChatTurn& turn : turns) {
        drop(turn.text);
        drop(turn.thought);
        for (ChatCall& call : turn.calls) {
            drop(call.name);
            drop(call.arguments);
        }
    }
}

/// A thought that nothing followed was cut: it says nothing to a template.
void drop_bare_thoughts(std::vector<ChatTurn>& turns) {
    turns.erase(std::remove_if(turns.begin(), turns.end(),
                               [](const ChatTurn& turn) {
                                   return turn.role == Role::assistant && turn.text.empty() &&
                                          turn.calls.empty() && !turn.thought.empty();
                               }),
                turns.end());
}

}  // namespace

TemplateInput chat_input(const Request& request, const ChatTemplate& chat_template,
                         std::string_view bos, std::string_view eos, int64_t now_s,
                         bool show_schema, const AnswerSyntax* syntax) {
    const TemplateShape& shape = chat_template.shape();
    std::vector<ChatTurn> turns = turns_of(request);
    drop_token_bytes(turns);
    drop_bare_thoughts(turns);
    Json tools = tools_of(request);
    if (!tools.empty() && !shape.tools)
        add_order(turns, tools_text(std::exchange(tools, {}), syntax));
    if (show_schema && !request.format.schema.is_null() && !request.format.schema.empty())
        add_order(turns, without_token_bytes(schema_text(request.format)));
    turns = with_calls_as_text(std::move(turns), shape, syntax);
    if (shape.thought_or_text) turns = with_thought_or_text(std::move(turns));
    if (shape.null_content) turns = with_calls_apart(std::move(turns));
    if (!shape.parallel) turns = with_single_calls(std::move(turns));
    turns = with_known_roles(std::move(turns), shape);
    if (shape.joins) turns = with_neighbours_joined(std::move(turns), shape);
    TemplateInput input = input_of_turns(turns, shape, std::move(tools), bos, eos, now_s);
    if (request.effort) set_effort(*request.effort, shape, &input.own);
    return input;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
