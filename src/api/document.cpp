#include "prologue.hpp"

#include "api/document.hpp"
#include "base/text.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- Schemas of values ---------------------------------------------------------------------------

Json doc_type(std::string_view type) { return Json::object().set("type", type); }

Json doc_text(size_t least, size_t most) {
    Json text = doc_type("string");
    if (least > 0) text.set("minLength", least);
    if (most != SIZE_MAX) text.set("maxLength", most);
    return text;
}

Json doc_word(std::string_view word) { return doc_type("string").set("const", word); }

Json doc_words(std::span<const std::string_view> words) {
    Json all = Json::array();
    for (const std::string_view word : words) all.push(word);
    return doc_type("string").set("enum", std::move(all));
}

Json doc_array(Json items, size_t least, size_t most) {
    Json array = doc_type("array").set("items", std::move(items));
    if (least > 0) array.set("minItems", least);
    if (most != SIZE_MAX) array.set("maxItems", most);
    return array;
}

Json doc_any(std::initializer_list<Json> choices) {
    Json all = Json::array();
    for (const Json& choice : choices)
        if (choice.contains("anyOf"))
            for (const Json& one : choice["anyOf"].items()) all.push(one);
        else all.push(choice);
    return Json::object().set("anyOf", std::move(all));
}

Json doc_or_null(Json schema) {
    if (Json* choices = schema.find("anyOf")) {
        choices->push(doc_type("null"));
        return schema;
    }
    if (const Json* ref = schema.find("$ref")) {
        Json out = doc_any({Json::object().set("$ref", *ref), doc_type("null")});
        for (const JsonMember& member : schema.members())
            if (member.key != "$ref") out.set(member.key, member.value);
        return out;
    }
    if (const Json* word = schema.find("const")) {
        schema.set("enum", Json::array().push(*word));
        schema.erase("const");
    }
    if (Json* words = schema.find("enum")) words->push(nullptr);
    Json* type = schema.find("type");
    if (type && type->as_string() != "null") *type = Json::array().push(*type).push("null");
    return schema;
}

Json doc_ref(std::string_view name) {
    return Json::object().set("$ref", "#/components/schemas/" + std::string(name));
}

Json doc_object(size_t required, DocFields fields) {
    Json names = Json::array(), properties = Json::object();
    for (const auto& [name, schema] : fields) {
        const bool must = names.size() < required;
        properties.set(name, must ? schema : doc_or_null(schema));
        if (must) names.push(name);
    }
    return doc_type("object")
        .set("required", std::move(names))
        .set("properties", std::move(properties));
}

Json doc_body(Json fields, std::span<const std::string_view> required) {
    Json names = Json::array(), properties = Json::object();
    for (const std::string_view name : required) names.push(name);
    for (const JsonMember& field : fields.members()) {
        const bool must = std::find(required.begin(), required.end(), field.key) != required.end();
        properties.set(field.key, must ? field.value : doc_or_null(field.value));
    }
    return doc_type("object")
        .set("required", std::move(names))
        .set("properties", std::move(properties));
}

Json doc_nested(const Json& flat) {
    Json nested = flat;
    if (Json* choices = nested.find("anyOf"))
        for (Json& choice : choices->items()) choice = doc_nested(choice);
    if (Json* items = nested.find("items")) *items = doc_nested(*items);
    const std::string type(flat["properties"]["type"]["const"].as_string());
    if (type.empty() || flat["properties"].size() == 1) return nested;
    Json required = Json::array(), properties = Json::object();
    for (const Json& name : flat["required"].items())
        if (name.as_string() != "type") required.push(name);
    for (const JsonMember& member : flat["properties"].members())
        if (member.key != "type") properties.set(member.key, doc_nested(member.value));
    return doc_object(2, {{"type", doc_word(type)},
                          {type, doc_type("object")
                                     .set("required", std::move(required))
                                     .set("properties", std::move(properties))}});
}

// ---- Learning from samples -----------------------------------------------------------------------

namespace {

const char* doc_type_of(const Json& value) {
    switch (value.kind()) {
        case Json::Kind::null: return "null";
        case Json::Kind::boolean: return "boolean";
        case Json::Kind::string: return "string";
        case Json::Kind::array: return "array";
        case Json::Kind::object: return "object";
        case Json::Kind::real: return "number";
        default: return "integer";
    }
}

/// A type more, in the place of `key`: one alone is not in an array.
void doc_add_type(Json* schema, const char* type) {
    const Json known = schema->find("type") ? (*schema)["type"] : Json();
    if (known.is_null()) {
        schema->set("type", type);
        return;
    }
    Json all = known.is_array() ? known : Json::array().push(known);
    for (const Json& one : all.items())
        if (one.as_string() == type) return;
    schema->set("type", all.push(type));
}

/// Fields whose words the samples bring out, all of them.
bool doc_is_word(std::string_view key) {
    static constexpr std::string_view keys[] = {"object", "status", "role", "finish_reason"};
    return std::find(std::begin(keys), std::end(keys), key) != std::end(keys);
}

void doc_add_word(Json* schema, const Json& word) {
    if (!schema->contains("enum")) schema->set("enum", Json::array());
    Json& words = *schema->find("enum");
    const auto known = words.items();
    if (std::find(known.begin(), known.end(), word) == known.end()) words.push(word);
}

/// Fields that hold what has a schema of its own.
Json doc_known(std::string_view key, const Json& value) {
    if (key == "response" && value.is_object()) return doc_ref("Response");
    if (key == "item" && value.is_object()) return doc_ref("OutputItem");
    if (key == "output" && value.is_array()) return doc_array(doc_ref("OutputItem"));
    const bool by_token = value[0].is_object() && !value[0].contains("token");
    if (key == "top_logprobs" && by_token)  // of legacy completions
        return doc_array(doc_type("object").set("additionalProperties", doc_type("number")));
    return {};
}

void doc_learn_member(Json* properties, const JsonMember& member) {
    if (!properties->contains(member.key)) properties->set(member.key, Json::object());
    Json& schema = *properties->find(member.key);
    if (Json known = doc_known(member.key, member.value); !known.is_null()) {
        schema = std::move(known);
        return;
    }
    doc_learn(&schema, member.value);
    if (doc_is_word(member.key)) doc_add_word(&schema, member.value);
}

void doc_learn_plain(Json* schema, const Json& value) {
    doc_add_type(schema, doc_type_of(value));
    if (value.is_array()) {
        if (!schema->contains("items")) schema->set("items", Json::object());
        for (const Json& item : value.items()) doc_learn(schema->find("items"), item);
    }
    if (!value.is_object()) return;
    const bool first = !schema->contains("properties");
    if (first) schema->set("required", Json::array()).set("properties", Json::object());
    Json required = Json::array();
    for (const Json& name : (*schema)["required"].items())
        if (value.contains(name.as_string())) required.push(name);
    for (const JsonMember& member : value.members()) {
        if (first) required.push(member.key);
        doc_learn_member(schema->find("properties"), member);
    }
    schema->set("required", std::move(required));
}

}  // namespace

void doc_learn(Json* schema, const Json& value) {
    const Json& type = value["type"];
    if (!type.is_string()) return doc_learn_plain(schema, value);
    if (!schema->contains("anyOf")) *schema = doc_any({});
    Json& branches = *schema->find("anyOf");
    Json* found = nullptr;
    for (Json& branch : branches.items())
        if (branch["properties"]["type"]["const"] == type) found = &branch;
    if (!found) found = &branches.push(Json::object()).items().back();
    doc_learn_plain(found, value);
    found->find("properties")->set("type", doc_word(type.as_string()));
}

// ---- The surfaces --------------------------------------------------------------------------------

namespace {

/// One token, said with an alternative.
TokenLogprob doc_token() { return {"a", -0.5f, {{"a", -0.5f}}}; }

std::vector<Item> doc_items() {
    Item message = Item::message(Role::assistant, "a"), thought = message, call = message;
    thought.kind = Item::Kind::reasoning;
    call.kind = Item::Kind::function_call;
    call.call_id = call.name = call.arguments = "a";
    Item custom = call;
    custom.kind = Item::Kind::custom_tool_call;
    return {thought, message, call, custom};
}

/// Every end that a response can have.
std::vector<Outcome> doc_outcomes() {
    Outcome plain, rich, call, cut, stopped, failed, cancelled;
    plain.text = cut.text = stopped.text = stopped.stopped_by = "a";
    rich.items = doc_items();
    call.items = {rich.items.back()};
    plain.logprobs = rich.logprobs = {doc_token()};
    rich.logprobs[0].item = 1;
    cut.cut = true;
    failed.status = Status::failed;
    failed.error = make_error(ErrorKind::internal, "");
    cancelled.status = Status::cancelled;
    cancelled.text = "a";
    return {plain, rich, call, cut, stopped, failed, cancelled};
}

ResponseRecord doc_record(Status status) {
    ResponseRecord record;
    record.id = "resp_", record.message_id = "msg_", record.model = "m";
    record.status = status;
    record.request = Json::object().set("model", "m").set("input", "a");
    return record;
}

struct DocLearnt {
    Json answer = Json::object(), event = Json::object(), output_item = Json::object();
    std::string mark;  // what is sent that is no JSON: [DONE]
};

/// What the stream of a surface may hold.
void doc_learn_events(DocLearnt* out, EventWriter& events) {
    const std::string text = events.take();
    for (size_t at = text.find("data: "); at != text.npos; at = text.find("data: ", at)) {
        at += 6;
        const auto event = Json::parse(text.substr(at, text.find('\n', at) - at));
        if (!event) out->mark = text.substr(at, text.find('\n', at) - at);
        if (!event) continue;
        if (event->contains("error") && !event->contains("type")) continue;  // an error's body
        doc_learn(&out->event, *event);
        if (const Json* item = event->find("item")) doc_learn(&out->output_item, *item);
    }
}

void doc_learn_outcome(DocLearnt* out, const Surface* surface, const Outcome& outcome,
                       Dialect dialect) {
    const ResponseRecord pending = doc_record(Status::pending);
    ResponseRecord record = doc_record(outcome.status);
    record.outcome = std::make_shared<Outcome>(outcome);
    const Json response = render_response(record, dialect);
    for (const Json& item : response["output"].items()) doc_learn(&out->output_item, item);
    const std::string object = response.write();
    const auto shown = render_answer({surface}, object, dialect);
    if (auto answer = Json::parse(shown ? *shown : ""); answer) doc_learn(&out->answer, *answer);
    for (const bool usage : {false, true}) {
        const auto events = event_writer({surface, true, usage}, record, dialect);
        events->begin(render_response(pending, dialect));
        events->add(Event{Event::Kind::prompt_progress});
        events->end(outcome, object);
        doc_learn_events(out, *events);
        events->fail(make_error(ErrorKind::internal, ""));
        doc_learn_events(out, *events);
    }
}

}  // namespace

std::string doc_name_of(const Surface* surface) {
    return surface ? std::string(surface->name) : "Response";
}

void doc_add_surface(Json* schemas, const Surface* surface, Dialect dialect) {
    Json request = surface ? doc_request(*surface, dialect) : doc_request(dialect);
    DocLearnt learnt;
    for (const Outcome& outcome : doc_outcomes())
        doc_learn_outcome(&learnt, surface, outcome, dialect);
    if (!surface) {
        for (const Status status : {Status::pending, Status::running})
            doc_learn(&learnt.answer, render_response(doc_record(status), dialect));
        Json& fields = *learnt.answer.find("properties");  // those of the request are its echo
        for (const JsonMember& field : request["properties"].members())
            if (fields.contains(field.key)) fields.set(field.key, field.value);
        schemas->set("OutputItem", std::move(learnt.output_item));
    }
    const Json& stream = request["properties"]["stream"];
    const bool streams = stream["type"].is_array() && !stream.contains("enum");
    const std::string name = doc_name_of(surface);
    schemas->set(name + "Request", std::move(request));
    schemas->set(name, std::move(learnt.answer));
    if (!streams) return;
    schemas->set(name + "Event", doc_any({learnt.event, doc_ref("Error")}));
    Json data = doc_type("string")
                    .set("contentMediaType", "application/json")
                    .set("contentSchema", doc_ref(name + "Event"));
    if (!learnt.mark.empty()) data = doc_any({data, doc_word(learnt.mark)});
    Json sent = doc_object(1, {{"data", data}, {"event", doc_type("string")}});
    schemas->set(name + "SentEvent", std::move(sent));
}

void doc_add_shared(Json* schemas) {
    schemas->set("Error", doc_error())
        .set("InputItem", doc_item())
        .set("Tool", doc_tool())
        .set("ToolChoice", doc_tool_choice())
        .set("TextFormat", doc_format(false));
}

// ---- What a request has beyond it ----------------------------------------------------------------

namespace {

/// The schema of a surface's requests, and those that it refers to.
struct DocRequest {
    Json body, shared = Json::object();
};

const DocRequest& doc_known_request(const Surface* surface, Dialect dialect) {
    static std::mutex mutex;
    static std::map<std::pair<const Surface*, Dialect>, DocRequest> known;
    const std::lock_guard<std::mutex> lock(mutex);
    DocRequest& request = known[{surface, dialect}];
    if (request.body.is_null()) {
        request.body = surface ? doc_request(*surface, dialect) : doc_request(dialect);
        doc_add_shared(&request.shared);
    }
    return request;
}

struct IgnoredFields {
    const DocRequest& known;
    std::vector<std::string> names = {};
    size_t bytes = 0;
    static constexpr size_t most_bytes = 512, most_name = 64;

    /// The schemas that a value may be of, without references and choices.
    void resolve(const Json& schema, std::vector<const Json*>* out) const {
        if (const Json* name = schema.find("$ref")) {
            const std::string_view path = name->as_string();
            return resolve(known.shared[path.substr(path.rfind('/') + 1)], out);
        }
        if (const Json* choices = schema.find("anyOf"))
            for (const Json& one : choices->items()) resolve(one, out);
        else out->push_back(&schema);
    }
    void note(std::string name) {
        if (std::find(names.begin(), names.end(), name) != names.end()) return;
        if (bytes + name.size() + 2 > most_bytes) return;
        bytes += name.size() + 2;
        names.push_back(std::move(name));
    }
    void walk(const Json& value, std::span<const Json* const> schemas, const std::string& path);
    void walk_object(const Json& value, std::span<const Json* const> schemas,
                     const std::string& path);
};

void IgnoredFields::walk(const Json& value, std::span<const Json* const> schemas,
                         const std::string& path) {
    if (value.is_object()) return walk_object(value, schemas, path);
    std::vector<const Json*> items;
    for (const Json* schema : schemas)
        if (const Json* one = schema->find("items")) resolve(*one, &items);
    for (const Json& item : value.items())
        if (!items.empty()) walk(item, items, path);
}

/// Where the value's `type` tells which schema it is of, by that; else by all of them.
void IgnoredFields::walk_object(const Json& value, std::span<const Json* const> schemas,
                                const std::string& path) {
    std::vector<const Json*> fields, typed;
    for (const Json* schema : schemas) {
        const Json* properties = schema->find("properties");
        const bool any = !properties || schema->contains("additionalProperties");
        if (any && (*schema)["type"].write().find("\"object\"") != std::string::npos) return;
        if (!properties) continue;
        fields.push_back(properties);
        const Json& type = (*properties)["type"]["const"];
        if (!type.is_null() && type == value["type"]) typed.push_back(properties);
    }
    if (!typed.empty()) fields = std::move(typed);
    if (fields.empty()) return;
    for (const JsonMember& member : value.members()) {
        if (member.value.is_null()) continue;
        std::vector<const Json*> below;
        for (const Json* properties : fields)
            if (const Json* schema = properties->find(member.key)) resolve(*schema, &below);
        const std::string name = path + (path.empty() ? "" : ".") +
                                 printable(member.key, most_name);
        if (below.empty()) note(name);
        else walk(member.value, below, name);
    }
}

}  // namespace

std::string ignored_fields(const Json& body, const Surface* surface, Dialect dialect) {
    IgnoredFields ignored{doc_known_request(surface, dialect)};
    const Json* schema = &ignored.known.body;
    ignored.walk(body, {&schema, 1}, "");
    std::string all;
    for (const std::string& name : ignored.names) all += (all.empty() ? "" : ", ") + name;
    return all;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
