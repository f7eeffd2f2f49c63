#include "prologue.hpp"

#include "api/document.hpp"
#include "server/loop.hpp"

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- GET /openapi.json -----------------------------------------------------------------------

namespace {

using Operation = ServerLoop::Operation;
using Route = ServerLoop::Route;

/// For which operations a status is.
enum class DocScope : uint8_t {
    all,    // of framing, and of limits that are the server's
    keyed,  // where an API key is asked for
    named,  // that name a response or a model
    body,
    waits,
};

struct DocStatus {
    int status;
    DocScope scope;
    const char* about;
};
constexpr DocStatus doc_statuses[] = {
    // clang-format off
    {400, DocScope::all, "The request is malformed, or a field of it is; `param` names the field."},
    {401, DocScope::keyed, "No API key, or an unknown one."},
    {403, DocScope::all, "The Host, the Origin or a proxy is not allowed."},
    {404, DocScope::named, "There is no such response, batch or model."},
    {408, DocScope::all, "The request, or a chat's answer, was not there in time."},
    {413, DocScope::all, "The body is too large."},
    {414, DocScope::all, "The request line is too long."},
    {415, DocScope::body, "The Content-Type or Content-Encoding is not supported."},
    {417, DocScope::all, "An expectation other than 100-continue."},
    {429, DocScope::keyed, "Too many requests a minute, of this key or without a known one."},
    {431, DocScope::all, "The header fields are too long, or too many."},
    {500, DocScope::all, "Our own fault."},
    {501, DocScope::all, "A transfer coding other than chunked."},
    {502, DocScope::body, "The server failed that the model is asked of."},
    {503, DocScope::all, "There is no room for it now, or no model is ready."},
    {504, DocScope::waits, "The response was not finished in time; it goes on."},
    {505, DocScope::all, "Only HTTP/1.1 and HTTP/1.0 are spoken."},
    // clang-format on
};

struct DocHeader {
    const char* name;
    const char* about;
    int status = 0;         // 0: of every one
    bool response = false;  // of what shows a response
};
constexpr DocHeader doc_headers[] = {
    {"X-Request-ID", "A UUID, which stands in the server's log too."},
    {"X-Client-Request-Id",
     "The one that the client gave, as X-Client-Request-Id or X-Request-ID."},
    {"X-Ignored-Fields", "Those of the request that nothing here reads: a, b.c."},
    {"Retry-After", "Seconds.", 429},
    {"Retry-After", "Seconds.", 503},
    {"WWW-Authenticate", "Bearer.", 401},
    {"X-Valar-Response-Id", "GET /v1/responses/{id} shows it.", 200, true},
    {"X-Valar-Response-Id", "GET /v1/responses/{id} shows it.", 408},
    {"X-Valar-Response-Id", "GET /v1/responses/{id} shows it.", 504},
    {"x-should-retry", "false: without an idempotency key it would run again.", 408},
    {"x-should-retry", "false: without an idempotency key it would run again.", 504},
    {"Idempotent-Replayed", "true: answered from the record of the first request.", 200, true},
    {"Idempotent-Replayed", "true: answered from the record of the first request.", 202, true},
};

Json doc_answer_headers(int status, bool response) {
    Json all = Json::object();
    for (const DocHeader& row : doc_headers)
        if ((row.status == 0 || row.status == status) && (!row.response || response))
            all.set(row.name,
                    Json::object().set("description", row.about).set("schema", doc_type("string")));
    return all;
}

Json doc_content_of(std::string_view type, Json schema) {
    return Json::object().set(type, Json::object().set("schema", std::move(schema)));
}

Json doc_shared_answer(int status) {
    return Json::object().set("$ref", "#/components/responses/Error" + std::to_string(status));
}

Json doc_shared_answers() {
    Json all = Json::object();
    for (const DocStatus& row : doc_statuses)
        all.set("Error" + std::to_string(row.status),
                Json::object()
                    .set("description", row.about)
                    .set("headers", doc_answer_headers(row.status, false))
                    .set("content", doc_content_of("application/json", doc_ref("Error"))));
    return all;
}

/// What may be done with a response once its id is known.
Json doc_links(const Surface* surface) {
    const char* id = surface ? "$response.header.X-Valar-Response-Id" : "$response.body#/id";
    Json all = Json::object();
    for (const Route& route : ServerLoop::all_routes())
        for (const Operation& one : {route.get, route.post, route.remove})
            if (one.handle && route.path == "/v1/responses/")
                all.set(one.name, Json::object()
                                      .set("operationId", one.name)
                                      .set("parameters", Json::object().set("id", id)));
    return all;
}

/// Schemas of what is no response: learnt from what the routes answer.
void doc_add_answers(Json* schemas) {
    const auto learn = [&](const char* name, const Json& sample) -> Json& {
        Json schema = Json::object();
        doc_learn(&schema, sample);
        schemas->set(name, std::move(schema));
        return *schemas->find(name)->find("properties");
    };
    const auto list = [&](const char* name, Json items) {
        Json schema = Json::object();
        for (const bool empty : {false, true})
            doc_learn(&schema, server_list(empty ? std::vector<Json>()
                                                 : std::vector{Json::object().set("id", "")},
                                           false));
        schema.find("properties")->set("data", doc_array(std::move(items)));
        schemas->set(name, std::move(schema));
    };
    learn("Health", server_health());
    learn("Model", server_model_json({}, ""));
    learn("ModelList", server_model_list(Json::array()))
        .set("data", doc_array(doc_ref("Model")))
        .set("models", doc_array(doc_ref("Model")));
    learn("DeletedResponse", server_deleted(""));
    learn("Conversation", server_conversation("", {0, Json::object(), {}}));
    learn("DeletedConversation", server_deleted_conversation(""));
    for (const char* label : {"", "x"}) {
        Json* known = schemas->find("Batch");
        Json batch = known ? *known : Json::object();
        doc_learn(&batch, server_batch("", 1, 1, label));
        schemas->set("Batch", std::move(batch));
    }
    schemas->set("BatchRequest", server_batch_request());
    schemas->set("BatchList", doc_array(doc_ref("Batch")));
    Json status = (*schemas)["Batch"];
    status.find("properties")
        ->set("request_status",
              doc_type("object").set("additionalProperties", server_batch_request_status()));
    status.find("required")->push("request_status");
    schemas->set("BatchStatus", std::move(status));
    for (const auto& [name, view] : {std::pair("Usage", ServerUsageView::total),
                                     std::pair("UsageBreakdown", ServerUsageView::breakdown),
                                     std::pair("UsageActivity", ServerUsageView::activity),
                                     std::pair("UsageTimeseries", ServerUsageView::timeseries)}) {
        Json usage = Json::object();
        for (const Json& sample : server_usage_samples(view)) doc_learn(&usage, sample);
        schemas->set(name, std::move(usage));
    }
    schemas->set("Document", doc_type("object"));
    Json count = Json::object();
    for (const Surface* surface : {&messages_count_surface, static_cast<const Surface*>(nullptr)})
        doc_learn(&count, server_count(surface, 1));
    schemas->set("InputTokens", std::move(count));
    list("ItemList", doc_ref("InputItem"));
    Json summary = (*schemas)["Response"], required = Json::array();
    for (const std::string_view key : server_left_out) summary.find("properties")->erase(key);
    for (const Json& name : summary["required"].items())
        if (summary["properties"].contains(name.as_string())) required.push(name);
    summary.set("required", std::move(required));
    schemas->set("ResponseSummary", std::move(summary));
    list("ResponseList", doc_ref("ResponseSummary"));
}

struct DocWriter {
    Dialect dialect;
    bool keyed;  // there are API keys
    Json schemas = Json::object();

    bool serves(const ServerParameter& row) const {
        return !row.openai || dialect == Dialect::openai;
    }
    bool applies(DocScope scope, const Route& route, const Operation& operation) const;
    Json answers(const Route& route, const Operation& operation) const;
    Json operation(const Route& route, const Operation& operation) const;
    Json parameters(const Route& route, const Operation& operation) const;
    Json paths();
};

bool DocWriter::applies(DocScope scope, const Route& route, const Operation& one) const {
    const bool asks = one.handle == &ServerLoop::post_response ||
                      one.handle == &ServerLoop::post_count;
    switch (scope) {
        case DocScope::all: return true;
        case DocScope::keyed: return keyed && !route.open;
        case DocScope::named: return asks || route.takes_argument();
        case DocScope::body: return one.handle == route.post.handle;
        default: return one.waits && !route.surface;
    }
}

Json DocWriter::answers(const Route& route, const Operation& one) const {
    const bool response = one.handle == &ServerLoop::post_response;
    const std::string name = one.answer ? one.answer : "";
    bool streams = response;
    for (const ServerParameter& row : one.query)
        streams |= serves(row) && std::string_view(row.name) == server_stream.name;
    const bool page = one.handle == &ServerLoop::get_page;
    Json content = name.empty()
                       ? doc_content_of(page ? "text/html" : "text/plain", doc_type("string"))
                       : doc_content_of("application/json", doc_ref(name));
    if (streams && schemas.contains(name + "Event"))
        content.set("text/event-stream", Json::object().set("schema", doc_ref(name + "SentEvent")));
    const auto answer = [&](int status, const char* about) {
        Json shown = Json::object()
                         .set("description", about)
                         .set("headers", doc_answer_headers(status, response))
                         .set("content", content);
        if (response) shown.set("links", doc_links(route.surface));
        return shown;
    };
    Json all = Json::object().set("200", answer(200, one.about));
    if (page) all.set("304", Json::object().set("description", "It is as its ETag says."));
    if (response && !route.surface)
        all.set("202", answer(202, "It is worked on in the background."));
    for (const DocStatus& row : doc_statuses)
        if (applies(row.scope, route, one))
            all.set(std::to_string(row.status), doc_shared_answer(row.status));
    return all;
}

Json DocWriter::parameters(const Route& route, const Operation& one) const {
    Json all = Json::array();
    const auto add = [&](const char* in, const char* name, const char* about, Json schema) {
        all.push(Json::object()
                     .set("name", name)
                     .set("in", in)
                     .set("required", std::string_view(in) == "path")
                     .set("description", about)
                     .set("schema", std::move(schema)));
    };
    if (route.takes_argument())
        add("path", "id", "Of the response, conversation, batch or model.", doc_text(1));
    if (!route.middle.empty()) add("path", "item", "Of the item.", doc_text(1));
    for (const ServerParameter& row : one.query) {
        if (!serves(row)) continue;
        Json schema = row.words.empty() ? doc_type("string") : doc_words(row.words);
        if (row.most > 0)
            schema = doc_type("integer").set("minimum", row.least).set("maximum", row.most);
        add("query", row.name, row.about, std::move(schema));
    }
    if (one.handle == &ServerLoop::post_response || one.body)
        add("header", "Idempotency-Key", "A repeat under it is answered from the first's record.",
            doc_text(1, server_max_key_length));
    return all;
}

/// What a request with a webhook is followed by.
Json doc_callbacks() {
    const Json answer = Json::object().set("description", "It is taken; all else is tried again.");
    const Json post = Json::object()
                          .set("summary", "The response has ended.")
                          .set("requestBody",
                               Json::object()
                                   .set("required", true)
                                   .set("content",
                                        doc_content_of("application/json", doc_ref("Response"))))
                          .set("responses", Json::object().set("2XX", answer));
    return Json::object().set("completion",
                              Json::object().set("{$request.body#/metadata/completion_webhook}",
                                                 Json::object().set("post", post)));
}

Json DocWriter::operation(const Route& route, const Operation& one) const {
    Json out = Json::object()
                   .set("operationId", one.name)
                   .set("summary", one.about)
                   .set("parameters", parameters(route, one));
    const bool asks = one.handle == &ServerLoop::post_response ||
                      one.handle == &ServerLoop::post_count;
    const std::string body = asks       ? doc_name_of(route.surface) + "Request"
                             : one.body ? one.body
                                        : "";
    if (!body.empty())
        out.set("requestBody",
                Json::object()
                    .set("required", true)
                    .set("content", doc_content_of("application/json", doc_ref(body))));
    out.set("responses", answers(route, one));
    if (one.handle == &ServerLoop::post_response) out.set("callbacks", doc_callbacks());
    if (route.open) out.set("security", Json::array());
    return out;
}

Json DocWriter::paths() {
    Json all = Json::object();
    for (const Route& route : ServerLoop::all_routes()) {
        if (route.openai && dialect != Dialect::openai) continue;
        const std::string path = route.shown();
        if (!all.contains(path)) all.set(path, Json::object());
        if (route.post.handle == &ServerLoop::post_response)
            doc_add_surface(&schemas, route.surface, dialect);
        if (route.post.handle == &ServerLoop::post_count && route.surface)
            schemas.set(doc_name_of(route.surface) + "Request",
                        doc_request(*route.surface, dialect));
        for (const auto& [method, one] :
             {std::pair("get", route.get), std::pair("post", route.post),
              std::pair("delete", route.remove)})
            if (one.handle) all.find(path)->set(method, operation(route, one));
    }
    return all;
}

}  // namespace

Json server_openapi(Dialect dialect, bool keyed) {
    DocWriter writer{dialect, keyed};
    doc_add_shared(&writer.schemas);
    if (dialect == Dialect::openai)  // see put_references
        writer.schemas.find("InputItem")
            ->find("anyOf")
            ->push(doc_object(2, {{"type", doc_word("item_reference")}, {"id", doc_text(1)}}));
    Json paths = writer.paths();
    doc_add_answers(&writer.schemas);
    Json components = Json::object()
                          .set("schemas", std::move(writer.schemas))
                          .set("responses", doc_shared_answers());
    Json security = Json::array();
    if (keyed) {
        components.set("securitySchemes",
                       Json::object().set("key", doc_type("http").set("scheme", "bearer")));
        security.push(Json::object().set("key", Json::array()));
    }
    return Json::object()
        .set("openapi", "3.1.0")
        .set("info", Json::object()
                         .set("title", "valar")
                         .set("version", VALAR_VERSION)
                         .set("description",
                              "What is answered to GET is answered to HEAD too, "
                              "without a body. Fields that are not listed are "
                              "ignored."))
        .set("paths", std::move(paths))
        .set("components", std::move(components))
        .set("security", std::move(security));
}

void ServerLoop::get_openapi(Exchange& exchange, HttpRequest&) {
    auto job = std::make_unique<AnswerJob>();
    job->exchange = exchange.number;
    send_job<&ServerLoop::openapi_work, &ServerLoop::answer_job>(std::move(job));
}

void ServerLoop::openapi_work(AnswerJob& job) {
    job.text = server_openapi(options.dialect, has_keys).write();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER
