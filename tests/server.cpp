// >>server, live over loopback, with a scripted Responder in the engine's place.
#include <doctest/doctest.h>

#include <array>
#include <condition_variable>
#include <cstring>
#include <set>
#include <thread>

#include "digest_internal.hpp"
#include "fake_responder.hpp"
#include "host.hpp"
#include "http/internal.hpp"
#include "http_peer.hpp"
#include "server/loop.hpp"
#include "server/server.hpp"
#include "server/words.hpp"
#include "store_disk.hpp"
#include "wall_clock.hpp"

using namespace valar;

namespace {

constexpr const char* key_a = "sk-organisation-a-0001";
constexpr const char* key_b = "sk-organisation-b-0001";

/// What the server logged.
struct Log {
    std::mutex mutex;
    std::string lines;
    LogSink sink() {
        return {[](void* self, LogLevel, std::string_view line) {
                    auto* log = static_cast<Log*>(self);
                    const std::lock_guard<std::mutex> lock(log->mutex);
                    log->lines.append(line).append("\n");
                },
                this};
    }
    std::string text() {
        const std::lock_guard<std::mutex> lock(mutex);
        return lines;
    }
};

ServerOptions local(ServerOptions options = {}) {
    options.port = 0;
    return options;
}

ServerOptions with_keys() {
    ServerOptions options = local();
    options.keys = {{"one", "a", key_a}, {"two", "b", key_b}};
    return options;
}

const Json& document(Dialect dialect) {
    static const Json all[] = {detail::server_openapi(Dialect::valar, true),
                               detail::server_openapi(Dialect::openai, true)};
    return all[dialect == Dialect::openai];
}

/// The operations of a path, from what GET /openapi.json shows; null: there are none.
const Json& operations(Dialect dialect, std::string_view path) {
    const Json& paths = document(dialect)["paths"];
    if (const Json* exact = paths.find(path)) return *exact;
    const Json* found = &paths["none"];
    for (const JsonMember& one : paths.members()) {
        const size_t open = one.key.find("{id}");
        if (open == one.key.npos || path.size() <= open) continue;
        const std::string_view tail = std::string_view(one.key).substr(open + 4);
        if (path.starts_with(one.key.substr(0, open)) && path.ends_with(tail)) found = &one.value;
    }
    return *found;
}

/// What the server answers stands in its document.
void check_documented(Dialect dialect, const std::string& method, const std::string& target,
                      int status) {
    const Json& known = operations(dialect, target.substr(0, target.find('?')));
    std::string name;
    for (const auto& [given, shown] : {std::pair("GET", "get"), std::pair("HEAD", "get"),
                                       std::pair("POST", "post"), std::pair("DELETE", "delete")})
        if (method == given) name = shown;
    if (!known.contains(name) || status == 0) return;  // no such path or method
    if (known[name]["responses"].contains(std::to_string(status))) return;
    FAIL_CHECK(method << " " << target << " answered " << status);
}

/// Of replies to raw bytes: 404 and 405 are of what does not stand there.
void check_known(int status) {
    if (status == 100 || status == 204 || status == 404 || status == 405) return;
    for (const JsonMember& path : document(Dialect::openai)["paths"].members())
        for (const JsonMember& one : path.value.members())
            if (one.value["responses"].contains(std::to_string(status))) return;
    FAIL_CHECK("no operation has the status " << status);
}

/// Where a test does not look at the log itself: each line must be one object, whatever happens.
LogSink checked_log() {
    return {[](void*, LogLevel, std::string_view line) {
                const auto object = Json::parse(line);
                if (!object || !object->is_object() || line.find('\n') != line.npos)
                    FAIL_CHECK("no line of JSON: " << std::string(line));
            },
            nullptr};
}

/// A server on a thread of its own, until the end of the scope.
struct Serving {
    explicit Serving(const ServerOptions& options = local(), bool hold = false)
        : dialect(options.dialect), server(open(options, hold)) {
        HttpPeer::seen = check_known;
        thread = std::thread([this] { (void)server.run().ok(); });
    }
    ~Serving() { stop(); }
    void stop() {
        server.stop();
        if (thread.joinable()) thread.join();
    }
    Server open(ServerOptions options, bool hold) {
        fake.hold = hold;
        if (!options.log.write) {
            options.log = checked_log();
            options.log_json = options.log_health = true;
        }
        auto opened = Server::open(&fake, options);
        REQUIRE_MESSAGE(opened.ok(), opened.error().message);
        return std::move(*opened);
    }

    HttpReply call(const std::string& method, const std::string& target,
                   const std::string& body = {}, HttpHeaders headers = {},
                   const char* key = nullptr) {
        HttpCall call;
        call.port = server.port();
        call.method = method;
        call.target = target;
        call.body = body;
        call.headers = std::move(headers);
        call.timeout_ms = 30'000;
        if (key) call.headers.emplace_back("Authorization", "Bearer " + std::string(key));
        auto reply = checked_call(call);
        if (!reply) return {0, {}, reply.error().message, true};
        check_documented(dialect, method, target, reply->status);
        return std::move(*reply);
    }
    HttpReply get(const std::string& target, const char* key = nullptr) {
        return call("GET", target, {}, {}, key);
    }
    HttpReply post(const std::string& body, const char* key = nullptr) {
        return call("POST", "/v1/responses", body, {{"Content-Type", "application/json"}}, key);
    }

    FakeResponder fake{"org/fake-1", {"fake", "other name"}};
    Dialect dialect;
    Server server;
    std::thread thread;
};

Json parse(const std::string& text) {
    auto json = Json::parse(text);
    REQUIRE_MESSAGE(json.ok(), text);
    return std::move(*json);
}

std::string field(const HttpReply& reply, std::string_view name) {
    const std::string* value = detail::find_header(reply.headers, name);
    return value ? *value : "(none)";
}

/// "404 not_found_error not_found model", and the envelope is whole.
std::string error_of(const HttpReply& reply) {
    const auto body = Json::parse(reply.body);
    if (!body || !body->is_object())
        return std::to_string(reply.status) + " (no envelope) " + reply.body;
    const Json& error = (*body)["error"];
    for (const char* key : {"message", "type", "param", "code"}) CHECK(error.contains(key));
    CHECK(error.size() == 4);
    CHECK_FALSE(error["message"].as_string().empty());
    CHECK(field(reply, "X-Request-ID").size() == 36);
    std::string out = std::to_string(reply.status);
    for (const char* key : {"type", "code", "param"})
        if (!error[key].is_null()) out += " " + std::string(error[key].as_string());
    return out;
}

template <class Condition>
bool eventually(Condition condition) {
    for (int i = 0; i < 2000 && !condition(); ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return condition();
}

constexpr const char* hello = R"({"model":"fake","input":"hello there"})";
constexpr const char* in_background = R"({"model":"fake","input":"hello there","background":true})";

std::string id_of(const HttpReply& reply) {
    return std::string(parse(reply.body)["id"].as_string());
}

std::string raw_post(const std::string& body, const std::string& fields = "Host: localhost\r\n") {
    return "POST /v1/responses HTTP/1.1\r\n" + fields +
           "Content-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) +
           "\r\n\r\n" + body;
}

}  // namespace

TEST_CASE("server: a response, and the same bytes again") {
    Serving serving;
    const HttpReply reply = serving.post(
        R"({"model":"fake","input":"hello there","instructions":"be brief","temperature":0,)"
        R"("metadata":{"k":"v"},"user":"u","prompt_cache_key":"c"})");
    REQUIRE(reply.status == 200);
    CHECK(field(reply, "Content-Type") == "application/json");
    const Json object = parse(reply.body);
    const std::string id(object["id"].as_string());
    CHECK(id.size() == 5 + 24);
    CHECK(id.substr(0, 5) == "resp_");
    CHECK(object["status"].as_string() == "completed");
    CHECK(object["model"].as_string() == "fake");  // as it was asked for
    CHECK(object["input"].as_string() == "hello there");
    CHECK(object["instructions"].as_string() == "be brief");
    CHECK(object["temperature"].as_double(-1) == 0);
    CHECK(object["top_p"].as_double() == 0.9);  // the model's own
    CHECK(object["output"].size() == 1);
    CHECK(object["output"][0]["content"][0]["text"].as_string() == "echo: hello there");
    CHECK(object["usage"]["output_tokens"].as_int() == 3);
    CHECK(object["created_at"].as_int() > 1'700'000'000);
    CHECK(object["completed_at"].as_int() >= object["created_at"].as_int());

    const HttpReply again = serving.get("/v1/responses/" + id);
    CHECK(again.status == 200);
    CHECK(again.body == reply.body);
    const HttpReply head = serving.call("HEAD", "/v1/responses/" + id);
    CHECK(head.status == 200);
    CHECK(head.body.empty());
    CHECK(field(head, "Content-Length") == std::to_string(reply.body.size()));
}

TEST_CASE("server: every reply has a request id of its own") {
    Serving serving;
    std::set<std::string> seen;
    HttpReply replies[] = {serving.get("/health"),
                           serving.get("/nothing"),
                           serving.post("{"),
                           serving.post(hello),
                           serving.call("DELETE", "/health"),
                           serving.call("GET", "/health", {}, {{"X-Request-ID", "mine"}}),
                           serving.call("GET", "/health", {}, {{"Bad Name", "x"}})};
    HttpPeer peer(serving.server.port());
    REQUIRE(peer.send("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"));
    replies[6] = peer.reply();
    CHECK(error_of(replies[6]) == "400 invalid_request_error bad_request");
    for (const HttpReply& reply : replies) {
        const std::string id = field(reply, "X-Request-ID");
        CAPTURE(id);
        REQUIRE(id.size() == 36);
        for (const size_t at : {8u, 13u, 18u, 23u}) CHECK(id[at] == '-');
        CHECK(id[14] == '4');
        CHECK(std::string("89ab").find(id[19]) != std::string::npos);
        CHECK(seen.insert(id).second);
    }
}

TEST_CASE("server: what a client calls its request comes back and is logged") {
    Log log;
    ServerOptions options;
    options.log = log.sink();
    options.log_health = true;
    Serving serving(options);
    const std::string longest(128, '~');
    const struct {
        HttpHeaders headers;
        std::string echoed;
    } cases[] = {
        {{{"X-Client-Request-Id", "mine/1"}}, "mine/1"},
        {{{"X-Request-ID", longest}}, longest},
        {{{"X-Request-ID", "other"}, {"X-Client-Request-Id", "mine"}}, "mine"},
        {{{"X-Client-Request-Id", longest + "~"}}, ""},
        {{{"X-Client-Request-Id", "two words"}}, ""},
        {{{"X-Client-Request-Id", "\xc3\xa9"}}, ""},
        {{{"X-Client-Request-Id", ""}, {"X-Request-ID", "then-this"}}, "then-this"},
        {{}, ""},
    };
    for (const auto& row : cases)
        for (const char* path : {"/health", "/nothing"}) {
            const HttpReply reply = serving.call("GET", path, {}, row.headers);
            CHECK(field(reply, "X-Client-Request-Id") ==
                  (row.echoed.empty() ? "(none)" : row.echoed));
            CHECK(field(reply, "X-Request-ID").size() == 36);
            const std::string lines = log.text();
            const std::string line = "id=" + field(reply, "X-Request-ID") + " " +
                                     (row.echoed.empty() ? ""
                                                         : "client_request_id=" + row.echoed + " ");
            CHECK(lines.find(line + "method=GET") != std::string::npos);
        }
}

TEST_CASE("server: what of a body nobody reads is said") {
    Log log;
    ServerOptions options;
    options.dialect = Dialect::openai;
    options.log = log.sink();
    Serving serving(options);
    for (const bool stream : {false, true}) {
        const std::string more = stream ? R"(,"stream":true)" : "";
        const HttpReply reply = serving.post(
            R"({"model":"fake","input":"x","later":1,"text":{"verbosity":"low"})" + more + "}");
        CHECK(reply.status == 200);
        CHECK(field(reply, "X-Ignored-Fields") == "later, text.verbosity");
    }
    CHECK(field(serving.post(R"({"model":"fake","input":"x"})"), "X-Ignored-Fields") == "(none)");
    CHECK(log.text().find(" ignored=later,text.verbosity ") != std::string::npos);
}

TEST_CASE("server: what the other dialect takes is refused with what to do") {
    Serving serving;
    const std::string id = id_of(serving.post(in_background));
    const std::string path = "/v1/responses/" + id;
    for (const char* query :
         {"?stream=true", "?stream=true&starting_after=3", "?starting_after=1"}) {
        const HttpReply reply = serving.get(path + query);
        CHECK(error_of(reply).substr(0, 43) == "400 invalid_request_error unsupported_value");
        CHECK(reply.body.find("start the server with --dialect openai") != std::string::npos);
    }
    for (const char* query : {"", "?stream=false", "?later=1"})
        CHECK(serving.get(path + query).status == 200);
    CHECK(error_of(serving.get(path + "?stream=yes")).substr(0, 3) == "400");
}

TEST_CASE("server: of several faults the one that is checked first is told") {
    ServerOptions options = with_keys();
    options.max_body_bytes = 400;
    options.memory_store.max_bytes = 2000;
    Serving serving(options);
    serving.fake.full = true;

    // Every fault at once; each step takes one away.
    std::string start = "PUT /v1/nothing HTTP/1.1\r\n";
    std::string host = "Host: localhost\r\nHost: localhost\r\n";
    std::string origin = "Origin: http://evil.example\r\n", key;
    std::string type = "Content-Type: text/plain\r\n";
    std::string idempotency = "Idempotency-Key: \r\n";
    std::string body(401, ' ');
    const std::string long_words(410, 'w');
    const auto ask = [&] {
        HttpPeer peer(serving.server.port());
        REQUIRE(peer.send(start + host + origin + key + type + idempotency +
                          "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body));
        return peer.reply();
    };
    CHECK(error_of(ask()) == "400 invalid_request_error bad_request");
    host = "Host: localhost\r\n";
    CHECK(error_of(ask()) == "403 permission_error origin_not_allowed");
    origin.clear();
    CHECK(error_of(ask()) == "401 authentication_error invalid_api_key");
    key = "Authorization: Bearer " + std::string(key_a) + "\r\n";
    CHECK(error_of(ask()) == "404 not_found_error not_found");
    start = "PUT /v1/responses HTTP/1.1\r\n";
    CHECK(error_of(ask()) == "405 invalid_request_error method_not_allowed");
    start = "POST /v1/responses HTTP/1.1\r\n";
    CHECK(error_of(ask()) == "413 invalid_request_error request_too_large");
    body = "\"\xff";
    CHECK(error_of(ask()) == "415 invalid_request_error unsupported_media_type");
    type.clear();
    CHECK(error_of(ask()) == "400 invalid_request_error invalid_json");
    body = R"({"temperature":9,"tool_choice":"required"})";
    CHECK(error_of(ask()) == "400 invalid_request_error missing_required_parameter model");
    body = R"({"model":"no","temperature":9,"tool_choice":"required"})";
    CHECK(error_of(ask()) == "400 invalid_request_error missing_required_parameter input");
    body = R"({"tool_choice":"required","model":"no","input":")" + long_words.substr(0, 200) +
           R"(","temperature":9})";
    CHECK(error_of(ask()) == "400 invalid_request_error decimal_above_max_value temperature");
    body = R"({"tool_choice":"required","model":"no","input":"x"})";
    CHECK(error_of(ask()) == "400 invalid_request_error invalid_value tool_choice");
    serving.fake.info.context_tokens = 20;
    body = R"({"model":"no","input":")" + long_words.substr(0, 200) + R"("})";
    CHECK(error_of(ask()) == "400 invalid_request_error string_below_min_length Idempotency-Key");
    idempotency.clear();
    CHECK(error_of(ask()) == "404 not_found_error model_not_found model");
    body.replace(body.find("no"), 2, "fake");
    CHECK(error_of(ask()) == "400 invalid_request_error context_length_exceeded input");
    serving.fake.info.context_tokens = 200;
    CHECK(error_of(ask()) == "503 api_error overloaded");
    serving.fake.full = false;
    CHECK(ask().status == 200);
}

TEST_CASE("server: without keys the Host is checked, and before the Origin") {
    ServerOptions options = local();
    options.allowed_hosts = {"Box.example", "port.example:81"};
    options.cors_origins = {"https://app.example"};
    Serving serving(options);
    struct Case {
        const char* host;
        const char* origin;
        const char* found;  // "" : 200
    };
    const std::string own = "http://localhost:" + std::to_string(serving.server.port());
    const std::string own_host = "localhost:" + std::to_string(serving.server.port());
    const Case cases[] = {
        {"localhost", nullptr, ""},
        {"LocalHost:1", nullptr, ""},
        {"127.0.0.1:99", nullptr, ""},
        {"[::1]", nullptr, ""},
        {"[::1]:80", nullptr, ""},
        {"box.example", nullptr, ""},
        {"BOX.example:7", nullptr, ""},
        {"port.example:81", nullptr, ""},
        {"port.example:82", nullptr, "403 permission_error host_not_allowed"},
        {"evil.example", nullptr, "403 permission_error host_not_allowed"},
        {"localhost.evil.example", nullptr, "403 permission_error host_not_allowed"},
        {"127.0.0.2", nullptr, "403 permission_error host_not_allowed"},
        {"evil.example", "http://evil.example", "403 permission_error host_not_allowed"},
        {"localhost", "http://evil.example", "403 permission_error origin_not_allowed"},
        {"localhost", "null", "403 permission_error origin_not_allowed"},
        {"localhost", "http://localhost:99", "403 permission_error origin_not_allowed"},
        {"localhost", "http://localhost", ""},
        {own_host.c_str(), own.c_str(), ""},
        {"localhost", "https://app.example", ""},
        {"localhost", "https://app.example:444", "403 permission_error origin_not_allowed"},
    };
    for (const Case& one : cases) {
        CAPTURE(one.host);
        HttpHeaders headers = {{"Host", one.host}};
        if (one.origin) headers.emplace_back("Origin", one.origin);
        const HttpReply reply = serving.call("GET", "/health", {}, headers);
        if (*one.found) CHECK(error_of(reply) == one.found);
        else CHECK(reply.status == 200);
        const bool cors = one.origin && std::string(one.origin) == "https://app.example";
        CHECK(field(reply, "Access-Control-Allow-Origin") == (cors ? one.origin : "(none)"));
        CHECK(field(reply, "Vary") == "Origin");
    }
    HttpPeer peer(serving.server.port());  // no Host at all is no allowed Host
    REQUIRE(peer.send("GET /health HTTP/1.0\r\n\r\n"));
    CHECK(peer.reply().status == 403);
    CHECK(serving
              .call("GET", "/health", {},
                    {{"Origin", "https://app.example"}, {"Origin", "https://app.example"}})
              .status == 403);
}

TEST_CASE("server: with keys any Host will do, an Origin will not") {
    Serving serving(with_keys());
    CHECK(serving.call("GET", "/v1/models", {}, {{"Host", "box.example"}}, key_a).status == 200);
    CHECK(error_of(serving.call("GET", "/v1/models", {}, {{"Origin", "http://e.example"}},
                                key_a)) == "403 permission_error origin_not_allowed");
    CHECK(error_of(serving.call("GET", "/health", {}, {{"Origin", "http://e.example"}})) ==
          "403 permission_error origin_not_allowed");
}

TEST_CASE("server: preflights, only for the origins that may call") {
    const HttpHeaders asked = {{"Origin", "https://app.example"},
                               {"Access-Control-Request-Method", "POST"},
                               {"Access-Control-Request-Headers", "authorization, x-stainless-os"}};
    {
        ServerOptions options = with_keys();
        options.cors_origins = {"https://app.example"};
        Serving serving(options);
        const HttpReply reply = serving.call("OPTIONS", "/v1/responses", {}, asked);
        CHECK(reply.status == 204);
        CHECK(field(reply, "Access-Control-Allow-Origin") == "https://app.example");
        CHECK(field(reply, "Access-Control-Allow-Headers") == "authorization, x-stainless-os");
        CHECK(field(reply, "Access-Control-Allow-Methods").find("POST") != std::string::npos);
        CHECK(field(reply, "X-Request-ID").size() == 36);
        // errors can be read by the page, too
        const HttpReply refused = serving.call("POST", "/v1/responses", "{}", {asked[0]});
        CHECK(error_of(refused) == "401 authentication_error invalid_api_key");
        CHECK(field(refused, "Access-Control-Allow-Origin") == "https://app.example");
        // an OPTIONS that is no preflight is a method like any other
        CHECK(error_of(serving.call("OPTIONS", "/v1/responses", {}, {}, key_a)) ==
              "405 invalid_request_error method_not_allowed");
    }
    Serving closed(with_keys());
    CHECK(error_of(closed.call("OPTIONS", "/v1/responses", {}, asked)) ==
          "403 permission_error origin_not_allowed");
}

TEST_CASE("server: keys") {
    Serving serving(with_keys());
    const auto with = [&](HttpHeaders headers) {
        return serving.call("GET", "/v1/models", {}, std::move(headers));
    };
    const std::string a = key_a, b = key_b;
    CHECK(with({{"Authorization", "Bearer " + a}}).status == 200);
    CHECK(with({{"Authorization", "bearer  " + b}}).status == 200);
    CHECK(with({{"Authorization", "Bearer " + a}, {"Authorization", "Bearer " + a}}).status == 200);
    CHECK(with({{"Authorization", "Bearer " + a}, {"x-api-key", a}}).status == 200);
    const HttpHeaders refused[] = {
        {},
        {{"Authorization", ""}},
        {{"Authorization", "Bearer"}},
        {{"Authorization", "Bearer "}},
        {{"Authorization", "Basic " + a}},
        {{"Authorization", a}},
        {{"Authorization", "Bearer " + a + "x"}},
        {{"Authorization", "Bearer " + a.substr(0, a.size() - 1)}},
        {{"Authorization", "Bearer " + a}, {"Authorization", "Bearer " + b}},
        {{"Authorization", "Bearer " + a}, {"x-api-key", b}},
        {{"x-api-key", b}, {"Authorization", "Bearer " + a}},
    };
    for (const HttpHeaders& headers : refused) {
        const HttpReply reply = with(headers);
        CHECK(error_of(reply) == "401 authentication_error invalid_api_key");
        CHECK(field(reply, "WWW-Authenticate") == "Bearer");
    }
    CHECK(serving.get("/health").status == 200);
    CHECK(error_of(serving.get("/nothing")) == "401 authentication_error invalid_api_key");

    // refused before the body is read
    HttpPeer peer(serving.server.port());
    REQUIRE(
        peer.send("POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n"
                  "Expect: 100-continue\r\n\r\n"));
    CHECK(error_of(peer.reply()) == "401 authentication_error invalid_api_key");
}

TEST_CASE("server: organisations see nothing of each other") {
    Serving serving(with_keys());
    const HttpReply reply = serving.post(hello, key_a);
    REQUIRE(reply.status == 200);
    const std::string id(parse(reply.body)["id"].as_string());
    CHECK(serving.get("/v1/responses/" + id, key_a).body == reply.body);
    const HttpReply foreign = serving.get("/v1/responses/" + id, key_b);
    CHECK(error_of(foreign) == "404 not_found_error not_found");
    std::string unknown = id;
    unknown.back() = unknown.back() == 'x' ? 'y' : 'x';
    std::string bytes = serving.get("/v1/responses/" + unknown, key_b).body;
    bytes.replace(bytes.find(unknown), unknown.size(), id);
    CHECK(foreign.body == bytes);
    serving.post(hello, key_b);
    CHECK(serving.fake.organisations() == std::vector<std::string>{"a", "b"});

    // nor of what runs
    serving.fake.hold = true;
    std::thread client([&] { CHECK(serving.post(hello, key_a).status == 200); });
    REQUIRE(eventually([&] { return serving.fake.waiting().size() == 1; }));
    const std::string running = serving.fake.waiting()[0];
    CHECK(serving.get("/v1/responses/" + running, key_b).status == 404);
    const HttpReply live = serving.get("/v1/responses/" + running, key_a);
    CHECK(live.status == 200);
    CHECK(parse(live.body)["input"].as_string() == "hello there");
    serving.fake.finish(running);
    client.join();
}

TEST_CASE("server: routes and methods") {
    Serving serving;
    struct Case {
        const char* method;
        const char* target;
        const char* found;
        const char* allow;
    };
    const Case cases[] = {
        {"GET", "//", "404 not_found_error not_found", "(none)"},
        {"POST", "/", "405 invalid_request_error method_not_allowed", "GET, HEAD"},
        {"GET", "/v1", "404 not_found_error not_found", "(none)"},
        {"GET", "/v1/models/", "404 not_found_error not_found", "(none)"},
        {"GET", "/v1/responses/", "404 not_found_error not_found", "(none)"},
        {"GET", "/v1/responses/a/b", "404 not_found_error not_found", "(none)"},
        {"GET", "/v1/responses/a%2Fb", "404 not_found_error not_found", "(none)"},
        {"GET", "/v1/responses/%zz", "404 not_found_error not_found", "(none)"},
        {"GET", "/v1/responses/a%0Ab", "404 not_found_error not_found", "(none)"},
        {"GET", "/health/", "404 not_found_error not_found", "(none)"},
        {"GET", "/v1/models/none", "404 not_found_error model_not_found model", "(none)"},
        {"GET", "/v1/models/%ff%00", "404 not_found_error model_not_found model", "(none)"},
        {"PUT", "/v1/responses", "405 invalid_request_error method_not_allowed", "GET, HEAD, POST"},
        {"PUT", "/v1/responses/x", "405 invalid_request_error method_not_allowed",
         "GET, HEAD, DELETE"},
        {"GET", "/v1/responses/x/cancel", "405 invalid_request_error method_not_allowed", "POST"},
        {"POST", "/v1/responses/x/input_items", "405 invalid_request_error method_not_allowed",
         "GET, HEAD"},
        {"POST", "/v1/responses//cancel", "404 not_found_error not_found", "(none)"},
        {"DELETE", "/v1/responses/x", "404 not_found_error not_found", "(none)"},
        {"POST", "/v1/responses/x/cancel", "404 not_found_error not_found", "(none)"},
        {"GET", "/v1/responses/x/input_items", "404 not_found_error not_found", "(none)"},
        {"POST", "/v1/models", "405 invalid_request_error method_not_allowed", "GET, HEAD"},
        {"POST", "/health", "405 invalid_request_error method_not_allowed", "GET, HEAD"},
        {"get", "/health", "405 invalid_request_error method_not_allowed", "GET, HEAD"},
        {"OPTIONS", "*", "404 not_found_error not_found", "(none)"},
    };
    for (const Case& one : cases) {
        CAPTURE(one.target);
        const HttpReply reply = serving.call(one.method, one.target);
        CHECK(error_of(reply) == one.found);
        CHECK(field(reply, "Allow") == one.allow);
    }
    CHECK(serving.get("/health?x=/v1").status == 200);
    CHECK(serving.call("GET", "/health", "a body that nobody reads").status == 200);
    CHECK(serving.call("GET", "/health", std::string(5000, 'x')).status == 413);
    CHECK(serving.call("HEAD", "/v1/responses/x/cancel").status == 405);
}

namespace {

std::string between(const std::string& text, const std::string& begin, const std::string& end) {
    const size_t from = text.find(begin);
    REQUIRE(from != text.npos);
    const size_t first = from + begin.size();
    return text.substr(first, text.find(end, first) - first);
}

}  // namespace

TEST_CASE("server: the page") {
    std::set<std::string> tags;
    for (const bool openai : {false, true}) {
        ServerOptions options = with_keys();  // it needs none itself
        if (openai) options.dialect = Dialect::openai;
        Serving serving(options);
        const HttpReply page = serving.get("/?any");
        CHECK(page.status == 200);
        CHECK(field(page, "Content-Type") == "text/html; charset=utf-8");
        CHECK(field(page, "Cache-Control") == "no-cache");
        CHECK(field(page, "X-Content-Type-Options") == "nosniff");
        CHECK(field(page, "Referrer-Policy") == "no-referrer");
        CHECK(field(page, "X-Request-ID").size() == 36);
        CHECK(page.body.size() < 60'000);
        CHECK(page.body.find("sk-organisation") == std::string::npos);

        // What src/ has, and its Content-Security-Policy lets run and look nothing else.
        auto source = detail::read_file(VALAR_SOURCE_DIR "/src/server/page.html", 1 << 20);
        REQUIRE(source.ok());
        const std::string mark = "{{dialect}}";
        source->replace(source->find(mark), mark.size(), openai ? "openai" : "valar");
        CHECK(page.body == *source);
        const std::string policy = field(page, "Content-Security-Policy");
        for (const char* tag : {"script", "style"}) {
            const std::string name = tag;
            const std::string text = between(page.body, "<" + name + ">", "</" + name + ">");
            const std::string hash = detail::base64_encode(detail::sha256(text).view());
            CHECK(policy.find(name + "-src 'sha256-" + hash + "';") != std::string::npos);
        }
        for (const char* rule : {"default-src 'none'", "connect-src 'self'", "base-uri 'none'",
                                 "form-action 'none'", "frame-ancestors 'none'"})
            CHECK(policy.find(rule) != std::string::npos);
        CHECK(policy.find("unsafe") == std::string::npos);

        // Once read it is not sent again, unless it changed.
        const std::string tag = field(page, "ETag");
        tags.insert(tag);
        for (const std::string& known : {tag, "W/" + tag, "\"x\", " + tag}) {
            const HttpReply same = serving.call("GET", "/", {}, {{"If-None-Match", known}});
            CHECK(same.status == 304);
            CHECK(same.body.empty());
            CHECK(field(same, "Content-Length") == "(none)");
            CHECK(field(same, "ETag") == tag);
        }
        CHECK(serving.call("GET", "/", {}, {{"If-None-Match", "\"x\""}}).body == page.body);
        const HttpReply head = serving.call("HEAD", "/");
        CHECK(head.body.empty());
        CHECK(field(head, "Content-Length") == std::to_string(page.body.size()));
    }
    CHECK(tags.size() == 2);
    Serving open;
    CHECK(open.get("/").status == 200);
    CHECK(open.call("GET", "/", {}, {{"Host", "evil.example"}}).status == 403);
}

TEST_CASE("server: models, by id and by alias, with a slash in either form") {
    Serving serving;
    const Json list = parse(serving.get("/v1/models").body);
    CHECK(list["models"].write() == list["data"].write());
    CHECK(list["object"].as_string() == "list");
    REQUIRE(list["data"].size() == 3);
    CHECK(list["data"][0].write() ==
          R"({"id":"org/fake-1","object":"model","created":1700000000,"owned_by":"valar"})");
    CHECK(list["data"][1]["id"].as_string() == "fake");
    for (const char* path :
         {"org/fake-1", "org%2Ffake-1", "org%2ffake-1", "fake", "other%20name"}) {
        CAPTURE(path);
        const HttpReply reply = serving.get("/v1/models/" + std::string(path));
        CHECK(reply.status == 200);
        const HttpReply head = serving.call("HEAD", "/v1/models/" + std::string(path));
        CHECK(head.status == 200);
        CHECK(head.body.empty());
        CHECK(field(head, "Content-Length") == std::to_string(reply.body.size()));
    }
    CHECK(parse(serving.get("/v1/models/other%20name").body)["id"].as_string() == "other name");
}

TEST_CASE("server: health follows the model") {
    Serving serving;
    CHECK(serving.get("/health").status == 200);
    serving.fake.ready = false;
    const HttpReply reply = serving.get("/health");
    CHECK(error_of(reply) == "503 api_error loading");
    CHECK(field(reply, "Retry-After") == "1");
    CHECK(serving.get("/health?live").status == 200);
    CHECK(serving.get("/health?live=true").status == 200);
    CHECK(serving.get("/health?live=maybe").status == 400);
    CHECK(serving.post(hello).status == 200);  // requests wait for it
    serving.fake.ready = true;
    CHECK(serving.call("HEAD", "/health").status == 200);
}

TEST_CASE("server: content types") {
    Serving serving;
    const auto with = [&](const HttpHeaders& headers) {
        return serving.call("POST", "/v1/responses", hello, headers);
    };
    CHECK(with({}).status == 200);
    CHECK(with({{"Content-Type", "application/json"}}).status == 200);
    CHECK(with({{"Content-Type", "Application/JSON ; charset=utf-8"}}).status == 200);
    CHECK(with({{"Content-Encoding", "identity"}}).status == 200);
    for (const char* type :
         {"text/plain", "application/jsonp", "application/x-www-form-urlencoded", ""})
        CHECK(error_of(with({{"Content-Type", type}})) ==
              "415 invalid_request_error unsupported_media_type");
    CHECK(with({{"Content-Encoding", "gzip"}}).status == 415);
}

TEST_CASE("server: bodies in chunks") {
    ServerOptions options = local();
    options.max_body_bytes = 100;
    Serving serving(options);
    const auto ask = [&](const std::string& type, const std::string& chunks) {
        HttpPeer peer(serving.server.port());
        REQUIRE(peer.send("POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Type: " +
                          type + "\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks));
        return peer.reply();
    };
    const std::string first = R"({"model":"fake",)", second = R"("input":"x"})";
    const auto chunk = [](const std::string& bytes) {
        return detail::format("%zx\r\n", bytes.size()) + bytes + "\r\n";
    };
    CHECK(ask("application/json", chunk(first) + chunk(second) + "0\r\n\r\n").status == 200);
    CHECK(error_of(ask("text/plain", chunk(first) + chunk(second) + "0\r\n\r\n")) ==
          "415 invalid_request_error unsupported_media_type");
    CHECK(error_of(ask("text/plain", chunk(std::string(101, ' ')))) ==
          "413 invalid_request_error request_too_large");
    CHECK(error_of(ask("application/json", "x\r\n")) == "400 invalid_request_error bad_request");
}

TEST_CASE("server: bodies that are not JSON objects") {
    Serving serving;
    CHECK(error_of(serving.post("")) == "400 invalid_request_error invalid_json");
    CHECK(error_of(serving.post("{\"model\":1,\"model\":2}")) ==
          "400 invalid_request_error invalid_json");
    CHECK(error_of(serving.post("{\"model\":\"\xc3\"}")) ==
          "400 invalid_request_error invalid_json");
    CHECK(error_of(serving.post("[]")) == "400 invalid_request_error invalid_type");
    CHECK(error_of(serving.post(std::string(100'000, '['))) ==
          "400 invalid_request_error invalid_json");
}

TEST_CASE("server: what the model refuses, and what fails while it works") {
    Log log;
    ServerOptions options = local();
    options.log = log.sink();
    Serving serving(options);
    serving.fake.failure = Error{ErrorKind::io, "cannot read /secret/path", "", ""};
    const HttpReply failed = serving.post(hello);
    CHECK(failed.status == 200);
    const Json object = parse(failed.body);
    CHECK(object["status"].as_string() == "failed");
    CHECK(object["error"].is_object());
    CHECK(object["output"].size() == 0);
    CHECK(failed.body.find("/secret") == std::string::npos);
    CHECK(log.text().find("/secret/path") != std::string::npos);
    const std::string id(object["id"].as_string());
    CHECK(serving.get("/v1/responses/" + id).body == failed.body);

    serving.fake.prepare_error = Error{ErrorKind::bad_data, "tensor x in /secret/file", "", ""};
    const HttpReply ours = serving.post(hello);
    CHECK(error_of(ours) == "500 api_error internal_error");
    CHECK(ours.body.find("/secret") == std::string::npos);
    CHECK(log.text().find("/secret/file") != std::string::npos);
}

TEST_CASE("server: no room in the queue, no room in the store") {
    ServerOptions options = local();
    options.memory_store.max_bytes = 2000;
    Serving serving(options);
    serving.fake.full = true;
    const HttpReply reply = serving.post(hello);
    CHECK(error_of(reply) == "503 api_error overloaded");
    CHECK(field(reply, "Retry-After") == "1");
    serving.fake.full = false;
    CHECK(serving.post(hello).status == 200);
    serving.fake.info.context_tokens = 10'000;
    CHECK(serving.post(R"({"model":"fake","input":")" + std::string(3000, 'x') + "\"}").status ==
          503);
    CHECK(serving.post(hello).status == 200);
}

TEST_CASE("server: a wait that is too long ends with 504, the work goes on") {
    ServerOptions options = local();
    options.sync_timeout_ms = 50;
    Serving serving(options);
    serving.fake.hold = true;
    const HttpReply reply = serving.post(hello);
    CHECK(error_of(reply) == "504 timeout_error timeout");
    CHECK(field(reply, "x-should-retry") == "false");
    const std::string id = field(reply, "X-Valar-Response-Id");
    REQUIRE(id.substr(0, 5) == "resp_");
    CHECK(serving.fake.cancels == 0);
    const Json running = parse(serving.get("/v1/responses/" + id).body);
    CHECK(running["status"].as_string() == "running");
    CHECK(running["completed_at"].is_null());
    CHECK(running["output"].size() == 0);
    CHECK(running["usage"]["total_tokens"].as_int(-1) == 0);
    serving.fake.finish(id);
    CHECK(eventually([&] {
        return parse(serving.get("/v1/responses/" + id).body)["status"].as_string() == "completed";
    }));
}

TEST_CASE("server: without a sync_timeout_ms a wait has no end of its own") {
    ServerOptions options = local();
    options.sync_timeout_ms = 0;
    Serving serving(options, true);
    std::thread client([&] { CHECK(serving.post(hello).status == 200); });
    CHECK(eventually([&] { return serving.fake.waiting().size() == 1; }));
    std::this_thread::sleep_for(std::chrono::milliseconds(3 * detail::server_tick_ms));
    serving.fake.finish(serving.fake.waiting().front());
    client.join();
}

TEST_CASE("server: a client that leaves cancels its request") {
    Log log;
    ServerOptions options = local();
    options.log = log.sink();
    Serving serving(options);
    serving.fake.hold = true;
    std::string id;
    for (const bool half : {false, true}) {
        HttpPeer peer(serving.server.port());
        REQUIRE(peer.send(raw_post(hello)));
        REQUIRE(eventually([&] { return serving.fake.waiting().size() == 1; }));
        id = serving.fake.waiting()[0];
        if (half) peer.end();  // end of stream counts
        else peer = HttpPeer(serving.server.port());
        CHECK(eventually([&] { return serving.fake.waiting().empty(); }));
    }
    CHECK(serving.fake.cancels == 2);
    CHECK(eventually([&] {
        return parse(serving.get("/v1/responses/" + id).body)["status"].as_string() == "cancelled";
    }));
    CHECK(parse(serving.get("/v1/responses/" + id).body)["output"].size() == 0);
    // what it had cost is known at its end, and so is its line
    const std::string lines = log.text(), left = "status=499 ";
    size_t told = 0;
    for (size_t at = 0; (at = lines.find(left, at)) != lines.npos; ++told, ++at) {
        const std::string line = lines.substr(at, lines.find('\n', at) - at);
        CAPTURE(line);
        CHECK(line.find(" response=resp_") != line.npos);
        CHECK(line.find(" input_tokens=3 ") != line.npos);
    }
    CHECK(told == 2);
    CHECK(lines.find("ended=cancelled") == lines.npos);  // told once
}

TEST_CASE("server: stop lets what runs finish") {
    Serving serving;
    serving.fake.hold = true;
    HttpReply reply;
    std::thread client([&] { reply = serving.post(hello); });
    REQUIRE(eventually([&] { return serving.fake.waiting().size() == 1; }));
    serving.server.stop();
    CHECK(eventually([&] { return serving.get("/health").status == 0; }));  // nobody new
    serving.fake.finish(serving.fake.waiting()[0]);
    client.join();
    CHECK(reply.status == 200);
    CHECK(parse(reply.body)["status"].as_string() == "completed");
    serving.stop();
}

TEST_CASE("server: stop does not wait for ever, and cancels what still runs") {
    ServerOptions options = local();
    options.drain_timeout_ms = 100;
    options.sync_timeout_ms = 200;
    Serving serving(options);
    serving.fake.hold = true;
    const HttpReply orphan = serving.post(hello);
    CHECK(orphan.status == 504);
    HttpPeer peer(serving.server.port());
    REQUIRE(peer.send(raw_post(hello)));
    REQUIRE(eventually([&] { return serving.fake.waiting().size() == 2; }));
    serving.stop();
    CHECK(serving.fake.cancels == 2);
    const HttpReply reply = peer.reply();
    CHECK(error_of(reply) == "503 api_error overloaded");
    CHECK(field(reply, "Connection") == "close");
    CHECK(field(reply, "Retry-After") == "1");
    CHECK(peer.ended());
}

TEST_CASE("server: stop answers on connections that were there, and a second one at once") {
    ServerOptions options = local();
    options.drain_timeout_ms = 60'000;
    Serving serving(options, true);
    HttpPeer busy(serving.server.port()), kept(serving.server.port()), fresh(serving.server.port()),
        live(serving.server.port()), idle(serving.server.port());
    REQUIRE(busy.send(raw_post(hello)));
    for (HttpPeer* peer : {&kept, &live}) {
        REQUIRE(peer->send("GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"));
        CHECK(peer->reply().status == 200);
    }
    REQUIRE(eventually([&] { return serving.fake.waiting().size() == 1; }));
    serving.server.stop();
    for (HttpPeer* peer : {&kept, &fresh}) {
        REQUIRE(peer->send(raw_post(hello)));
        const HttpReply reply = peer->reply();
        CHECK(error_of(reply) == "503 api_error overloaded");
        CHECK(field(reply, "Connection") == "close");
        CHECK(field(reply, "Retry-After") == "1");
        CHECK(peer->ended());
    }
    REQUIRE(live.send("GET /health?live HTTP/1.1\r\nHost: localhost\r\n\r\n"));
    CHECK(live.reply().status == 200);
    CHECK(idle.ended());
    CHECK(serving.fake.waiting().size() == 1);
    serving.server.stop(true);
    CHECK(busy.reply().status == 503);
    serving.stop();
}

#if !defined(_WIN32)
TEST_CASE("server: over a Unix socket") {
    const std::string path = "/tmp/valar_test_" + std::to_string(detail::monotonic_ns());
    ServerOptions options;
    options.host = "unix:" + path;
    HttpCall call;
    call.host = options.host;
    call.method = "POST";
    call.target = "/v1/responses";
    call.body = hello;
    {
        Serving serving(options);
        CHECK(serving.server.port() == 0);
        auto reply = checked_call(call);
        REQUIRE(reply.ok());
        CHECK(reply->status == 200);
        FakeResponder fake;
        auto second = Server::open(&fake, options);
        REQUIRE_FALSE(second.ok());
        CHECK(second.error().message.find(path) != std::string::npos);
        CHECK(checked_call(call)->status == 200);  // it was left alone
    }
    CHECK(detail::socket_file(path) == 0);
    auto stale = detail::Socket::listen_unix(path, 1);  // and nobody there to remove it
    REQUIRE(stale.ok());
    stale->close();
    CHECK(detail::socket_file(path) != 0);
    {
        Serving serving(options);
        CHECK(checked_call(call)->status == 200);
        std::remove(path.c_str());
        auto next = detail::Socket::listen_unix(path, 1);
        REQUIRE(next.ok());
        serving.stop();
        CHECK(detail::socket_file(path) != 0);  // another's by now
    }
    std::remove(path.c_str());
    REQUIRE(detail::write_file(path, {}));
    FakeResponder fake;
    CHECK_FALSE(Server::open(&fake, options).ok());  // a file of somebody's
    std::remove(path.c_str());
    options.host = "unix:" + std::string(200, 'x');
    CHECK_FALSE(Server::open(&fake, options).ok());
}
#endif

TEST_CASE("server: a request that comes after stop is told to come again") {
    Serving serving;
    serving.fake.hold = true;
    HttpPeer busy(serving.server.port()), late(serving.server.port());
    REQUIRE(busy.send(raw_post(hello)));
    const std::string bytes = raw_post(hello);
    REQUIRE(late.send(bytes.substr(0, bytes.size() - 3)));  // in work, not yet whole
    REQUIRE(eventually([&] { return serving.fake.waiting().size() == 1; }));
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    serving.server.stop();
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    REQUIRE(late.send(bytes.substr(bytes.size() - 3)));
    const HttpReply reply = late.reply();
    CHECK(error_of(reply) == "503 api_error overloaded");
    CHECK(field(reply, "Retry-After") == "1");
    serving.fake.finish(serving.fake.waiting()[0]);
    CHECK(busy.reply().status == 200);
    busy.end(), late.end();
    serving.stop();
}

TEST_CASE(
    "server: what was queued for an alias waits for it over a restart, and is not one of the "
    "queue") {
    MemoryStore store;
    Log log;
    ServerOptions options = local();
    options.store = &store;
    options.log = log.sink();
    options.max_queued = 2;
    std::string ids[2];
    {
        Serving serving(options, true);
        for (std::string& id : ids) id = id_of(serving.post(in_background));
        REQUIRE(eventually([&] { return serving.fake.waiting().size() == 2; }));
    }
    const auto status = [](uint16_t port, const std::string& id) {
        HttpCall call;
        call.port = port;
        call.target = "/v1/responses/" + id;
        auto reply = checked_call(call);
        REQUIRE(reply.ok());
        return std::string(parse(reply->body)["status"].as_string());
    };
    FakeResponder other("other");
    for (const uint32_t orphans_ms : {3'600'000u, 1000u}) {
        options.orphans_ms = orphans_ms;
        auto server = Server::open(&other, options);
        REQUIRE(server.ok());
        std::thread thread([&] { (void)server->run().ok(); });
        const uint16_t port = server->port();
        CHECK(eventually([&] {
            return log.text().find("wait for the model 'fake', which none here") !=
                   std::string::npos;
        }));
        for (const std::string& id : ids) CHECK(status(port, id) == "pending");
        HttpCall call;
        call.port = port;
        call.method = "POST";
        call.target = "/v1/responses";
        call.body = R"({"model":"other","input":"x"})";
        CHECK(checked_call(call)->status == 200);
        if (orphans_ms > 1000) {  // one more chance
            call.method = "DELETE";
            call.target = "/v1/responses/" + ids[1];
            call.body.clear();
            CHECK(checked_call(call)->status == 200);
            ids[1] = ids[0];
        } else {
            CHECK(eventually([&] { return status(port, ids[0]) == "failed"; }));
        }
        server->stop();
        thread.join();
        if (orphans_ms > 1000) {
            Serving back(options);  // with the alias
            CHECK(eventually([&] { return status(back.server.port(), ids[0]) == "completed"; }));
            back.stop();
            Serving held(options, true);
            ids[0] = ids[1] = id_of(held.post(in_background));
            REQUIRE(eventually([&] { return held.fake.waiting().size() == 1; }));
        }
    }
}

TEST_CASE("server: the openai dialect has its own words for a status") {
    for (const Dialect dialect : {Dialect::valar, Dialect::openai}) {
        ServerOptions options = local();
        options.dialect = dialect;
        Serving serving(options);
        const Json object = parse(
            serving.post(R"({"model":"fake","input":"one two three","max_output_tokens":2})").body);
        CHECK(object["status"].as_string() ==
              (dialect == Dialect::valar ? "completed" : "incomplete"));
        CHECK(object["incomplete_details"]["reason"].as_string() == "max_output_tokens");
        CHECK(object["output"][0]["content"][0]["text"].as_string() == "echo: one ");
    }
}

TEST_CASE("server: log lines name requests, never what they hold") {
    Log log;
    ServerOptions options = with_keys();
    options.log = log.sink();
    Serving serving(options);
    const HttpReply reply = serving.post(R"({"model":"fake","input":"my secret question"})", key_a);
    serving.get("/v1/models?key=private-query", key_b);
    serving.get("/a%0Ab\"c\\d" + std::string(500, 'z'), key_a);
    serving.get("/v1/models", "sk-a-wrong-key-0123456");
    const std::string lines = log.text();
    CHECK(lines.find("id=" + field(reply, "X-Request-ID") +
                     " method=POST path=/v1/responses status=200 ms=") != std::string::npos);
    CHECK(lines.find("input_tokens=5 output_tokens=4") != std::string::npos);
    CHECK(lines.find("path=/a%0Ab\\x22c\\x5cdzzz") != std::string::npos);
    CHECK(std::count(lines.begin(), lines.end(), '\n') == 5);
    CHECK(lines.starts_with("event=start version=" VALAR_VERSION " address=127.0.0.1:"));
    for (const char* word : {"secret", "echo", "private", key_a, key_b, "sk-a-wrong"})
        CHECK_MESSAGE(lines.find(word) == std::string::npos, word);
    for (size_t at = 0, end; (end = lines.find('\n', at)) != std::string::npos; at = end + 1)
        CHECK(end - at < 1000);
}

TEST_CASE("server: a log line says who asked, and why there was no answer") {
    Log log;
    ServerOptions options = with_keys();
    options.dialect = Dialect::openai;
    options.log = log.sink();
    Serving serving(options);
    const auto line_of = [&](const HttpReply& reply) {
        const std::string lines = log.text();
        const size_t at = lines.find("id=" + field(reply, "X-Request-ID") + " ");
        return at == lines.npos ? "" : lines.substr(at, lines.find('\n', at) - at);
    };
    const auto holds = [&](const HttpReply& reply, const char* part) {
        const std::string line = line_of(reply);
        CAPTURE(line);
        CHECK_MESSAGE(line.find(part) != line.npos, part);
    };
    holds(serving.get("/v1/models"), " code=invalid_api_key error=\"no API key; send ");
    holds(serving.get("/v1/models"), " client=127.0.0.1 key=- ");
    holds(serving.get("/v1/models", key_a), " client=127.0.0.1 key=one ");
    holds(serving.get("/openapi.json"), " key=- ");
    holds(serving.get("/v1/none", key_a), " status=404 ms=");
    holds(serving.get("/v1/none", key_a), " code=not_found error=\"unknown path '/v1/none'\" ");
    // of a body no text, though the reply shows what was wrong
    const HttpReply wrong = serving.post(R"({"model":"fake","input":"x","seed":"my \"pin\" 77"})",
                                         key_a);
    CHECK(wrong.body.find("77") != std::string::npos);
    holds(wrong, R"( code=invalid_type error="'seed' must be )");
    holds(wrong, R"(but \"...\" was received")");
    // of a query what is harmless
    const std::pair<const char*, const char*> queries[] = {
        {"?limit=7&after=resp_0&order=asc", "?limit=7&after=...&... "},
        {"?limit=7x", "?limit=... "},
        {"?idempotency_key=mine", "?idempotency_key=... "},
        {"?sk-secret&token=sk-secret&", "?...&... "},
        {"?", " "},
    };
    for (const auto& [query, shown] : queries)
        holds(serving.get(std::string("/v1/responses") + query, key_a),
              (std::string(" path=/v1/responses") + shown).c_str());
    CHECK(log.text().find("sk-secret") == std::string::npos);
    // a request that http refuses, and one that a stream tells of
    HttpPeer peer(serving.server.port());
    REQUIRE(peer.send("GET /broken?sk-secret HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"));
    holds(peer.reply(), " path=/broken status=400 ms=");
    CHECK(
        log.text().find(" code=bad_request error=\"more than one Host\" client=127.0.0.1 key=- ") !=
        std::string::npos);
}

TEST_CASE("server: probes have log lines where they are asked for, or refused") {
    for (const bool asked : {false, true}) {
        Log log;
        ServerOptions options = with_keys();
        options.log = log.sink();
        options.log_health = asked;
        Serving serving(options);
        CHECK(serving.get("/health").status == 200);
        CHECK(serving.call("HEAD", "/health").status == 200);
        CHECK(serving.get("/metrics", key_a).status == 200);
        CHECK(serving.get("/metrics").status == 401);
        CHECK(serving.call("DELETE", "/health").status == 405);
        const std::string lines = log.text();
        CHECK((lines.find("path=/health status=200") != lines.npos) == asked);
        CHECK((lines.find("path=/metrics status=200") != lines.npos) == asked);
        CHECK(lines.find("path=/metrics status=401") != lines.npos);
        CHECK(lines.find("path=/health status=405") != lines.npos);
        CHECK(serving.get("/metrics", key_a)
                  .body.find("valar_http_requests_total{route=\"/health\",status=\"200\"} 2\n") !=
              std::string::npos);
    }
}

TEST_CASE("server: a trusted proxy says who the client is, others do not") {
    using Headers = HttpHeaders;
    const struct {
        Headers headers;
        const char* client;
    } cases[] = {
        {{}, "10.0.0.9"},
        {{{"X-Forwarded-For", "192.0.2.1"}}, "192.0.2.1"},
        {{{"x-forwarded-for", "6.6.6.6, 192.0.2.1"}}, "192.0.2.1"},
        {{{"X-Forwarded-For", "6.6.6.6"}, {"X-Forwarded-For", "192.0.2.1:99"}}, "192.0.2.1"},
        {{{"X-Forwarded-For", "2001:db8::1"}}, "2001:db8::1"},
        {{{"X-Forwarded-For", "[2001:DB8::1]:99"}}, "2001:db8::1"},
        {{{"X-Forwarded-For", "192.0.2.1, unknown"}}, "10.0.0.9"},
        {{{"X-Forwarded-For", ""}}, "10.0.0.9"},
        {{{"X-Forwarded-For", "192.0.2.1,"}}, "10.0.0.9"},
        {{{"X-Forwarded-For", "[::1"}}, "10.0.0.9"},
        {{{"Forwarded", "for=6.6.6.6, proto=https;For=\"192.0.2.1:99\";by=_me"}}, "192.0.2.1"},
        {{{"Forwarded", "for=\"[2001:db8::1]:4711\""}}, "2001:db8::1"},
        {{{"Forwarded", "for=_hidden"}}, "10.0.0.9"},
        {{{"Forwarded", "for=\""}}, "10.0.0.9"},
        {{{"Forwarded", "by=1.2.3.4"}}, "10.0.0.9"},
        {{{"Forwarded", "for=6.6.6.6"}, {"X-Forwarded-For", "192.0.2.1"}}, "192.0.2.1"},
        {{{"X-Forwarded-For", "192.0.2.1\r\nx"}}, "10.0.0.9"},
    };
    for (const auto& row : cases) {
        detail::HttpRequest request;
        request.peer = *detail::NetAddress::parse("10.0.0.9", 1234);
        request.headers = row.headers;
        CHECK(detail::server_client(request, true) == row.client);
        CHECK(detail::server_client(request, false) == "10.0.0.9");
    }
    CHECK(detail::server_client({}, true) == "-");
    Log log;
    ServerOptions options = local();
    options.log = log.sink();
    options.trust_proxy = true;
    Serving serving(options);
    serving.call("GET", "/v1/models", {}, {{"X-Forwarded-For", "6.6.6.6, 192.0.2.1"}});
    CHECK(log.text().find(" client=192.0.2.1 key=open ") != std::string::npos);
}

TEST_CASE("server: the log tells of the start, the end, and of work that is taken up again") {
    MemoryStore store;
    Log log;
    ServerOptions options = local();
    options.store = &store;
    options.log = log.sink();
    options.drain_timeout_ms = 50;
    std::string id;
    {
        Serving serving(options, true);
        id = id_of(serving.post(in_background));
        REQUIRE(eventually([&] { return serving.fake.waiting().size() == 1; }));
        serving.stop();
    }
    CHECK(log.text().find("\nevent=drain unfinished=1\n") != std::string::npos);
    CHECK(log.text().find("\nevent=stop unfinished=1\n") != std::string::npos);
    Serving serving(options);
    CHECK(log.text().find("\nevent=unfinished resumed=1 failed=0\n") != std::string::npos);
    const std::string resumed = "\nevent=resumed response=" + id + " attempt=1\n";
    CHECK(eventually([&] { return log.text().find(resumed) != std::string::npos; }));
}

TEST_CASE("server: lines that the log lost are among the metrics") {
    struct Lossy {
        static void write(void*, LogLevel, std::string_view) {}
        static uint64_t lost(void* context) { return *static_cast<uint64_t*>(context); }
    };
    uint64_t lost = 12;
    ServerOptions options = local();
    options.log = {Lossy::write, &lost};
    options.log_lost = Lossy::lost;
    Serving serving(options);
    CHECK(serving.get("/metrics").body.find("\nvalar_log_lines_dropped_total 12\n") !=
          std::string::npos);
}

TEST_CASE("server: many clients at once") {
    Serving serving;
    std::atomic<int> good = 0;
    std::vector<std::thread> clients;
    for (int c = 0; c < 64; ++c)
        clients.emplace_back([&, c] {
            HttpPeer peer(serving.server.port());
            for (int i = 0; i < 10; ++i) {
                const std::string words = std::to_string(c) + "-" + std::to_string(i);
                if (!peer.send(raw_post(R"({"model":"fake","input":")" + words + "\"}"))) return;
                const HttpReply reply = peer.reply();
                if (reply.status == 200 &&
                    reply.body.find("echo: " + words + "\"") != std::string::npos)
                    ++good;
            }
        });
    for (std::thread& client : clients) client.join();
    CHECK(good == 640);
}

TEST_CASE("server: clients that come, go and stop in the middle") {
    for (int round = 0; round < 5; ++round) {
        ServerOptions options = local();
        options.drain_timeout_ms = 50;
        Serving serving(options);
        std::vector<std::thread> clients;
        for (int c = 0; c < 8; ++c)
            clients.emplace_back([&, c] {
                for (int i = 0; i < 10; ++i) {
                    HttpPeer peer(serving.server.port(), 200);
                    if (!peer.connected() || !peer.send(raw_post(hello))) return;
                    if ((c + i) % 3 == 0) peer.end();
                    else if ((c + i) % 3 == 1) peer.reply();
                    if (i == 5) serving.fake.hold = c % 2 == 0;
                    if (i == 7 && c == 7) serving.server.stop();
                }
            });
        for (std::thread& client : clients) client.join();
    }
}

TEST_CASE("server: a large body goes through the workers, others are served meanwhile") {
    Serving serving;
    const std::string words(4 << 20, 'w');
    HttpReply reply;
    std::thread client(
        [&] { reply = serving.post(R"({"model":"fake","input":")" + words + "\"}"); });
    for (int i = 0; i < 20; ++i) CHECK(serving.get("/health").status == 200);
    client.join();
    CHECK(reply.status == 200);
    CHECK(reply.body.size() > 2 * words.size());  // the echo of the input, and the answer
    const std::string id(parse(reply.body)["id"].as_string());
    CHECK(serving.get("/v1/responses/" + id).body == reply.body);
}

TEST_CASE("server: pumped by hand, moved, and two of them") {
    FakeResponder fake, second("second");
    Responder* both[] = {&fake, &second};
    auto opened = Server::open(both, local());
    REQUIRE(opened.ok());
    Server server = std::move(*opened);
    HttpPeer peer(server.port());
    REQUIRE(peer.send(raw_post(R"({"model":"second","input":"x"})")));
    std::atomic<bool> done = false;
    HttpReply reply;
    std::thread client([&] { reply = peer.reply(), done = true; });
    while (!done) CHECK(*server.step(10));
    client.join();
    CHECK(reply.status == 200);
    CHECK(parse(reply.body)["model"].as_string() == "second");
    CHECK(second.organisations().size() == 1);
    CHECK(fake.organisations().empty());
    server.stop();
    while (*server.step(10)) {}
    CHECK_FALSE(*server.step(0));
}

TEST_CASE("server: dropped with work in hand it cancels that") {
    FakeResponder fake;
    fake.hold = true;
    HttpPeer* peer = nullptr;
    {
        auto server = Server::open(&fake, local());
        REQUIRE(server.ok());
        peer = new HttpPeer(server->port());
        REQUIRE(peer->send(raw_post(hello)));
        REQUIRE(eventually([&] { return *server->step(5) && fake.waiting().size() == 1; }));
    }
    CHECK(fake.waiting().empty());
    CHECK(peer->reply().status == 0);
    delete peer;
}

TEST_CASE("server: a store of the host's own") {
    struct Counting : MemoryStore {
        std::atomic<int> added = 0, finished = 0;
        void add(StoredResponse record, StoreDone done) override {
            ++added;
            MemoryStore::add(std::move(record), done);
        }
        void finish(const std::string& id, std::shared_ptr<const std::string> object,
                    int64_t now_ms, StoreDone done) override {
            if (++finished == 2)
                return done.call(done.context, detail::make_error(ErrorKind::io, "disk /dev/full"));
            MemoryStore::finish(id, std::move(object), now_ms, done);
        }
    } store;
    ServerOptions options = local();
    options.store = &store;
    Serving serving(options);
    CHECK(serving.post(hello).status == 200);
    CHECK(error_of(serving.post(hello)) == "500 api_error internal_error");
    CHECK(store.added == 2);
    CHECK(store.finished == 2);
}

TEST_CASE("server: a full disk is seen, and DELETE works on it") {
    store_disk::Disk disk;
    disk.capacity = 1 << 20;
    FileStoreOptions journal;
    journal.segment_bytes = 64 << 10;
    auto store = FileStore::open(journal, std::make_unique<store_disk::DiskFolder>(&disk));
    REQUIRE(store.ok());
    Log log;
    ServerOptions options = local();
    options.store = store->get();
    options.log = log.sink();
    {
        Serving serving(options);
        const std::string id = id_of(serving.post(hello));
        CHECK(serving.get("/health").status == 200);
        CHECK(serving.get("/metrics").body.find("valar_store_free_bytes ") != std::string::npos);
        disk.capacity = 10;  // nobody writes now
        const HttpReply refused = serving.post(hello);
        CHECK(error_of(refused) == "503 api_error overloaded");
        CHECK(eventually([&] { return serving.get("/health").status == 503; }));
        CHECK(error_of(serving.get("/health")) == "503 api_error store");
        CHECK(serving.get("/health?live").status == 200);
        CHECK(serving.get("/v1/responses/" + id).status == 200);
        CHECK(log.text().find("store: the disk is full") != std::string::npos);
        CHECK(serving.get("/metrics").body.find("valar_store_errors_total{kind=\"overloaded\"} ") !=
              std::string::npos);
        CHECK(eventually(
            [&] { return std::atoi(field(serving.get("/health"), "Retry-After").c_str()) >= 2; }));
        CHECK(std::atoi(field(serving.post(hello), "Retry-After").c_str()) >= 2);
        CHECK(serving.call("DELETE", "/v1/responses/" + id).status == 200);
        CHECK(serving.get("/v1/responses/" + id).status == 404);
        disk.capacity = 1 << 20;
        disk.clock_ns += 2'000'000'000;
        CHECK(eventually([&] { return serving.get("/health").status == 200; }));
        CHECK(serving.post(hello).status == 200);
        CHECK(log.text().find("store: it takes new responses again") != std::string::npos);
    }
    store->reset();
}

// Every error that a Responder or a Store may come with, in the words of the operating system: a path
// in them, and no code. What a client reads is looked at by the test's client, here and everywhere.
TEST_CASE("server: no reply says what the operating system said") {
    struct Failing : MemoryStore {
        std::atomic<int> step = -1;  // that fails: 0 add, 1 finish, 2 erase, 3 list
        std::atomic<ErrorKind> kind = ErrorKind::io;
        Error error() const {
            return detail::make_error(kind, std::string("cannot write '/srv/") + not_for_clients +
                                                "/journal': no space left");
        }
        bool fails(int at, StoreDone done) {
            if (step != at) return false;
            done.call(done.context, error());
            return true;
        }
        void add(StoredResponse record, StoreDone done) override {
            if (!fails(0, done)) MemoryStore::add(std::move(record), done);
        }
        void finish(const std::string& id, std::shared_ptr<const std::string> object,
                    int64_t now_ms, StoreDone done) override {
            if (!fails(1, done)) MemoryStore::finish(id, std::move(object), now_ms, done);
        }
        void erase(const std::string& organisation, const std::string& id, bool tombstone,
                   int64_t now_ms, StoreDone done) override {
            if (!fails(2, done)) MemoryStore::erase(organisation, id, tombstone, now_ms, done);
        }
        Result<std::vector<std::string>> list(const std::string& organisation,
                                              const std::string& after, size_t limit) override {
            if (step == 3) return error();
            return MemoryStore::list(organisation, after, limit);
        }
    } store;
    Log log;
    ServerOptions options = local();
    options.store = &store;
    options.log = log.sink();
    Serving serving(options);
    const std::string kept = id_of(serving.post(hello));
    constexpr ErrorKind kinds[] = {
        ErrorKind::bad_data,  ErrorKind::unsupported, ErrorKind::io,           ErrorKind::timeout,
        ErrorKind::not_found, ErrorKind::too_large,   ErrorKind::overloaded,   ErrorKind::closed,
        ErrorKind::internal,  ErrorKind::cancelled,   ErrorKind::out_of_memory};
    for (const ErrorKind kind : kinds) {
        CAPTURE(static_cast<int>(kind));
        store.kind = kind;
        for (store.step = 0; store.step < 4; ++store.step) {
            const int status = serving.post(hello).status;
            CHECK((status == 200 || status >= 404));
            CHECK(serving.get("/v1/responses").status >= 200);
            CHECK(serving.call("DELETE", "/v1/responses/" + kept).status >= 200);
        }
        store.step = -1;
        serving.fake.prepare_error = store.error();
        CHECK(serving.post(hello).status >= 400);
        serving.fake.prepare_error.reset();
        serving.fake.failure = store.error();
        for (const std::string& body : {std::string(hello), std::string(in_background)}) {
            const std::string id = id_of(serving.post(body));
            CHECK(eventually([&] {
                return parse(serving.get("/v1/responses/" + id).body)["error"].is_object();
            }));
        }
        serving.fake.failure.reset();
        const std::string metrics = serving.get("/metrics").body;
        for (const char* from : {"request", "response"}) {
            const bool told = kind != ErrorKind::unsupported && kind != ErrorKind::not_found &&
                              kind != ErrorKind::too_large;  // those are 4xx
            if (!told && from == std::string("request")) continue;
            CAPTURE(from);
            CHECK(metrics.find(std::string("valar_") + from + "_errors_total{kind=\"" +
                               detail::server_error_kind(kind) + "\"} ") != std::string::npos);
        }
        if (kind == ErrorKind::not_found) continue;
        CHECK(metrics.find(std::string("valar_store_errors_total{kind=\"") +
                           detail::server_error_kind(kind) + "\"} ") != std::string::npos);
    }
    const std::string lines = log.text();  // the cause, once a minute for each kind and place
    size_t told = 0;
    for (size_t at = 0; (at = lines.find("store: cannot write", at)) != lines.npos; ++at) ++told;
    CAPTURE(lines);
    CHECK(told == std::size(kinds) - 1);
    store.step = 1;  // outcomes that nothing takes do not hold the end
    store.kind = ErrorKind::overloaded;
    CHECK(serving.post(hello).status == 503);
    serving.stop();
}

#if !defined(_WIN32)
TEST_CASE("server: signals and children of fork change nothing") {
    FakeResponder fake;
    auto server = std::make_unique<Server>(*Server::open(&fake, local()));
    std::thread thread([&] { (void)server->run().ok(); });
    const Interrupts interrupts;
    HttpPeer peer(server->port());
    for (int i = 0; i < 20; ++i) {
        CHECK(ends_in_a_child([&] { server.reset(); }));
        peer.send(raw_post(hello));
        CHECK(peer.reply().status == 200);
    }
    server->stop();
    thread.join();
}
#endif

TEST_CASE("server: options that cannot work are errors that name the option") {
    FakeResponder fake;
    const auto refused = [&](const ServerOptions& options) {
        auto server = Server::open(&fake, options);
        REQUIRE_FALSE(server.ok());
        CHECK(server.error().kind == ErrorKind::invalid_request);
        CHECK_FALSE(server.error().message.empty());
        return server.error().param;
    };
    ServerOptions options = local();
    options.host = "0.0.0.0";
    CHECK(refused(options) == "host");
    options.host = "::";
    CHECK(refused(options) == "host");
    options.allow_open = true;
    options.host = "0.0.0.0";
    CHECK(Server::open(&fake, options).ok());
    options.allow_open = false;
    options.keys = {{"one", "a", key_a}};
    CHECK(Server::open(&fake, options).ok());
    options.keys = {{"one", "a", "fifteen-letters"}};
    CHECK(refused(options) == "keys");
    options.keys = {{"one", "a", "a secret with spaces"}};
    CHECK(refused(options) == "keys");
    options.keys = {{"one", "a", key_a}, {"two", "b", key_a}};
    CHECK(refused(options) == "keys");
    for (const char* secret : {"", " ", "\n", "                "}) {
        options.keys = {{"one", "a", key_a}, {"two", "b", secret}};
        CHECK(refused(options) == "keys");
    }
    options.keys = {{"one", "", key_a}};
    CHECK(refused(options) == "keys");
    options.keys = {};
    options.require_keys = true;  // keys were asked for, and there are none
    CHECK(refused(options) == "keys");
    options = local();
    for (const char* origin : {"*", "app.example", "https://app.example/", "", " ", "https://",
                               "://app.example", "https://app example"}) {
        options.cors_origins = {origin};
        CHECK(refused(options) == "cors_origins");
    }
    options = local();
    for (const char* host : {"", " ", "http://app.example", "app example"}) {
        options.allowed_hosts = {host};
        CHECK(refused(options) == "allowed_hosts");
    }
    options = local();
    for (const char* host : {"no such host", "", " "}) {
        options.host = host;
        CHECK(refused(options) == "host");
    }
    options = local();
    options.max_body_bytes = 0;
    CHECK(refused(options) == "max_body_bytes");
    options = local();
    options.max_connections = 0;
    CHECK(refused(options) == "max_connections");
    CHECK_FALSE(Server::open(nullptr, local()).ok());
    CHECK_FALSE(Server::open(std::span<Responder* const>(), local()).ok());

    // a server that cannot listen leaves the Responder to the one that does
    Serving serving;
    options = local();
    options.port = serving.server.port();
    CHECK_FALSE(Server::open(&serving.fake, options).ok());
    CHECK(serving.post(hello).status == 200);
}

// ---- Background, reading and removing ----------------------------------------------------------

namespace {

std::string status_of(const HttpReply& reply) {
    return std::string(parse(reply.body)["status"].as_string());
}

HttpReply post_keyed(Serving& serving, const std::string& body, const std::string& idempotency,
                     const char* key = nullptr) {
    return serving.call("POST", "/v1/responses", body, {{"Idempotency-Key", idempotency}}, key);
}

}  // namespace

TEST_CASE("server: a background response is accepted at once and goes its way") {
    Serving serving;
    serving.fake.hold = true;
    const HttpReply accepted = serving.post(in_background);
    REQUIRE(accepted.status == 202);
    const Json object = parse(accepted.body);
    CHECK(object["status"].as_string() == "pending");
    CHECK(object["background"].as_bool());
    CHECK(object["completed_at"].is_null());
    CHECK(object["output"].size() == 0);
    const std::string path = "/v1/responses/" + id_of(accepted);
    REQUIRE(eventually([&] { return status_of(serving.get(path)) == "running"; }));
    serving.fake.finish(id_of(accepted));
    REQUIRE(eventually([&] { return status_of(serving.get(path)) == "completed"; }));
    const HttpReply done = serving.get(path);
    CHECK(done.status == 200);
    CHECK(parse(done.body)["output"][0]["content"][0]["text"].as_string() == "echo: hello there");
    CHECK(serving.get(path).body == done.body);
}

TEST_CASE("server: cancel is for background responses") {
    Serving serving;
    serving.fake.hold = true;
    const std::string id = id_of(serving.post(in_background));
    const HttpReply cancelled = serving.call("POST", "/v1/responses/" + id + "/cancel");
    CHECK(cancelled.status == 200);
    CHECK(status_of(cancelled) == "cancelled");
    CHECK(parse(cancelled.body)["error"].is_null());
    CHECK(serving.get("/v1/responses/" + id).body == cancelled.body);
    // once more changes nothing
    CHECK(serving.call("POST", "/v1/responses/" + id + "/cancel").body == cancelled.body);

    serving.fake.hold = false;
    const std::string finished = id_of(serving.post(hello));
    CHECK(error_of(serving.call("POST", "/v1/responses/" + finished + "/cancel")) ==
          "400 invalid_request_error invalid_value response_id");
    serving.fake.hold = true;
    HttpPeer peer(serving.server.port());
    REQUIRE(peer.send(raw_post(hello)));
    REQUIRE(eventually([&] { return serving.fake.waiting().size() == 1; }));
    const std::string running = serving.fake.waiting()[0];
    CHECK(error_of(serving.call("POST", "/v1/responses/" + running + "/cancel")) ==
          "400 invalid_request_error invalid_value response_id");
    serving.fake.finish(running);
    CHECK(peer.reply().status == 200);
}

TEST_CASE("server: what is deleted is gone, what runs is cancelled first") {
    Serving serving;
    const std::string id = id_of(serving.post(hello));
    const HttpReply gone = serving.call("DELETE", "/v1/responses/" + id);
    CHECK(gone.status == 200);
    CHECK(gone.body == R"({"id":")" + id + R"(","object":"response","deleted":true})");
    for (const char* suffix : {"", "/input_items"})
        CHECK(error_of(serving.get("/v1/responses/" + id + suffix)) ==
              "404 not_found_error not_found");
    CHECK(error_of(serving.call("DELETE", "/v1/responses/" + id)) ==
          "404 not_found_error not_found");
    CHECK(parse(serving.get("/v1/responses").body)["data"].size() == 0);

    serving.fake.hold = true;
    const std::string running = id_of(serving.post(in_background));
    CHECK(serving.call("DELETE", "/v1/responses/" + running).status == 200);
    CHECK(serving.fake.cancels == 1);
    CHECK(serving.get("/v1/responses/" + running).status == 404);
    CHECK(serving.fake.waiting().empty());
}

TEST_CASE("server: the list has the newest first, page by page") {
    Serving serving(with_keys());
    std::vector<std::string> ids;
    for (int i = 0; i < 5; ++i) ids.insert(ids.begin(), id_of(serving.post(hello, key_a)));
    serving.fake.hold = true;
    ids.insert(ids.begin(), id_of(serving.post(in_background, key_a)));
    std::string after;
    std::vector<std::string> seen;
    for (int page = 0; page < 3; ++page) {
        const Json list = parse(serving.get("/v1/responses?limit=2" + after, key_a).body);
        CHECK(list["object"].as_string() == "list");
        REQUIRE(list["data"].size() == 2);
        CHECK(list["first_id"] == list["data"][0]["id"]);
        CHECK(list["last_id"] == list["data"][1]["id"]);
        CHECK(list["has_more"].as_bool() == (page < 2));
        for (const Json& entry : list["data"].items()) {
            seen.emplace_back(entry["id"].as_string());
            for (const char* key : {"input", "instructions", "tools"})
                CHECK_FALSE(entry.contains(key));
            CHECK(entry.contains("usage"));
        }
        after = "&after=" + seen.back();
    }
    CHECK(seen == ids);
    CHECK(parse(serving.get("/v1/responses", key_b).body).write() ==
          R"({"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false})");
    const std::pair<const char*, const char*> refused[] = {
        {"limit=0", "400 invalid_request_error integer_below_min_value limit"},
        {"limit=101", "400 invalid_request_error integer_above_max_value limit"},
        {"limit=x", "400 invalid_request_error invalid_type limit"},
        {"limit=1&limit=2", "400 invalid_request_error invalid_value limit"},
        {"after=resp_none", "400 invalid_request_error invalid_value after"},
        {"after=%zz", "400 invalid_request_error invalid_value after"},
    };
    for (const auto& [query, found] : refused)
        CHECK(error_of(serving.get(std::string("/v1/responses?") + query, key_a)) == found);
    CHECK(error_of(serving.get("/v1/responses?after=" + ids[0], key_b)) ==
          "400 invalid_request_error invalid_value after");
}

TEST_CASE("server: input items in their long form") {
    Serving serving;
    const std::string id = id_of(
        serving.post(R"({"model":"fake","input":[{"role":"user","content":"one"},)"
                     R"({"role":"assistant","content":"two","id":"msg_mine"},)"
                     R"({"role":"user","content":[{"type":"input_text","text":"three"}]}]})"));
    const std::string path = "/v1/responses/" + id + "/input_items";
    const Json list = parse(serving.get(path + "?order=asc").body);
    REQUIRE(list["data"].size() == 3);
    CHECK(list["data"][1].write() ==
          R"({"id":"msg_mine","type":"message","status":"completed","role":"assistant","content":)"
          R"([{"type":"output_text","text":"two","annotations":[]}]})");
    CHECK(list["data"][0]["content"].write() == R"([{"type":"input_text","text":"one"}])");
    CHECK(list["data"][0]["id"].as_string().size() == 28);
    CHECK(list["has_more"].as_bool() == false);
    const Json newest = parse(serving.get(path + "?limit=2").body);
    CHECK(newest["data"][0] == list["data"][2]);
    CHECK(newest["has_more"].as_bool());
    const Json rest = parse(serving.get(path + "?after=msg_mine").body);
    REQUIRE(rest["data"].size() == 1);
    CHECK(rest["data"][0] == list["data"][0]);
    CHECK(error_of(serving.get(path + "?order=up")) ==
          "400 invalid_request_error invalid_value order");
    CHECK(error_of(serving.get(path + "?after=none")) ==
          "400 invalid_request_error invalid_value after");
    const std::string plain = id_of(serving.post(hello));
    CHECK(parse(serving.get("/v1/responses/" + plain + "/input_items").body)["data"].size() == 1);
}

// ---- Idempotency -------------------------------------------------------------------------------

TEST_CASE("server: a repeat under its key is answered from the record") {
    Serving serving(with_keys());
    const HttpReply first = post_keyed(serving, hello, "k1", key_a);
    REQUIRE(first.status == 200);
    CHECK(field(first, "Idempotent-Replayed") == "(none)");
    // formatting does not make another request
    const HttpReply again = post_keyed(
        serving, "{ \"input\" : \"hello there\",\n\"model\":\"fake\" }", " k1 ", key_a);
    CHECK(again.status == 200);
    CHECK(again.body == first.body);
    CHECK(field(again, "Idempotent-Replayed") == "true");
    CHECK(serving.fake.organisations().size() == 1);
    CHECK(error_of(post_keyed(serving, R"({"model":"fake","input":"other"})", "k1", key_a)) ==
          "400 idempotency_error idempotency_key_reused");
    const HttpReply other = post_keyed(serving, hello, "k1", key_b);  // another key's own
    CHECK(other.status == 200);
    CHECK(field(other, "Idempotent-Replayed") == "(none)");

    // a tombstone keeps the key taken
    CHECK(serving.call("DELETE", "/v1/responses/" + id_of(first), {}, {}, key_a).status == 200);
    CHECK(error_of(post_keyed(serving, hello, "k1", key_a)) == "404 not_found_error not_found");
    CHECK(error_of(post_keyed(serving, R"({"model":"fake","input":"other"})", "k1", key_a)) ==
          "400 idempotency_error idempotency_key_reused");
}

TEST_CASE("server: a calendar that is set moves no deadline and wipes nothing") {
    ServerOptions options = local();
    options.sync_timeout_ms = 200;
    Serving serving(options);
    const std::string id = id_of(post_keyed(serving, hello, "k1"));
    int runs = 1;
    constexpr int64_t year_s = 365 * 24 * 3600;
    for (const int64_t years : {30, -30, -80, 300, 9000}) {
        CAPTURE(years);
        wall_clock_shift_s = years * year_s;
        std::this_thread::sleep_for(std::chrono::milliseconds(250));  // two ticks
        const HttpReply again = post_keyed(serving, hello, "k1");
        CHECK(again.status == 200);
        CHECK(id_of(again) == id);
        const Json object = parse(serving.post(hello).body);
        CHECK(object["created_at"].as_int() >= 0);
        CHECK(object["completed_at"].as_int() >= object["created_at"].as_int());
        serving.fake.hold = true;
        CHECK(serving.post(hello).status == 504);
        serving.fake.hold = false;
        runs += 2;
    }
    wall_clock_shift_s = 0;
    CHECK(serving.fake.organisations().size() == size_t(runs));
}

TEST_CASE("server: refusals leave the key free") {
    Serving serving;
    CHECK(post_keyed(serving, "{", "k").status == 400);
    CHECK(post_keyed(serving, R"({"model":"none","input":"x"})", "k").status == 404);
    serving.fake.full = true;
    CHECK(error_of(post_keyed(serving, hello, "k")) == "503 api_error overloaded");
    serving.fake.full = false;
    const HttpReply reply = post_keyed(serving, hello, "k");
    CHECK(reply.status == 200);
    CHECK(field(reply, "Idempotent-Replayed") == "(none)");
    // a failed one is replayed as it failed
    serving.fake.failure = Error{ErrorKind::io, "broken", "", ""};
    const HttpReply failed = post_keyed(serving, hello, "f");
    serving.fake.failure.reset();
    CHECK(status_of(failed) == "failed");
    CHECK(post_keyed(serving, hello, "f").body == failed.body);
}

TEST_CASE("server: repeats while it runs wait for the same bytes") {
    Serving serving;
    serving.fake.hold = true;
    std::vector<HttpReply> replies(6);
    std::vector<std::thread> clients;
    for (HttpReply& reply : replies)
        clients.emplace_back([&] { reply = post_keyed(serving, hello, "same"); });
    REQUIRE(eventually([&] { return serving.fake.waiting().size() == 1; }));
    {  // a client that leaves does not cancel what others may ask for
        HttpPeer peer(serving.server.port());
        REQUIRE(peer.send(raw_post(hello, "Host: localhost\r\nIdempotency-Key: same\r\n")));
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    CHECK(serving.fake.cancels == 0);
    serving.fake.finish(serving.fake.waiting()[0]);
    for (std::thread& client : clients) client.join();
    int originals = 0;
    for (const HttpReply& reply : replies) {
        CHECK(reply.status == 200);
        CHECK(reply.body == replies[0].body);
        originals += field(reply, "Idempotent-Replayed") == "(none)";
    }
    CHECK(originals == 1);

    const HttpReply queued = post_keyed(serving, in_background, "bg");
    CHECK(queued.status == 202);
    const HttpReply live = post_keyed(serving, in_background, "bg");
    CHECK(live.status == 202);
    CHECK(field(live, "Idempotent-Replayed") == "true");
    CHECK(id_of(live) == id_of(queued));
    serving.fake.finish(id_of(queued));
    CHECK(eventually([&] { return post_keyed(serving, in_background, "bg").status == 200; }));
}

TEST_CASE("server: idempotency keys that cannot be one") {
    Serving serving;
    const auto with = [&](HttpHeaders headers) {
        return error_of(serving.call("POST", "/v1/responses", hello, std::move(headers)));
    };
    const std::string start = "400 invalid_request_error ";
    CHECK(with({{"Idempotency-Key", ""}}) == start + "string_below_min_length Idempotency-Key");
    CHECK(with({{"Idempotency-Key", std::string(256, 'k')}}) ==
          start + "string_above_max_length Idempotency-Key");
    CHECK(with({{"Idempotency-Key", "a"}, {"Idempotency-Key", "a"}}) ==
          start + "invalid_value Idempotency-Key");
    for (const char* other : {"a", "b"})
        CHECK(with({{"Idempotency-Key", "a"}, {"anthropic-idempotency-key", other}}) ==
              start + "invalid_value Idempotency-Key");
    CHECK(with({{"Idempotency-Key", "a\tb"}}) == start + "invalid_value Idempotency-Key");
    CHECK(post_keyed(serving, hello, std::string(255, 'k')).status == 200);
    CHECK(post_keyed(serving, hello, "\"quoted\"").status == 200);
    CHECK(field(post_keyed(serving, hello, "quoted"), "Idempotent-Replayed") == "(none)");
}

TEST_CASE("server: a timed out wait under a key may be taken up again") {
    ServerOptions options = local();
    options.sync_timeout_ms = 50;
    Serving serving(options);
    serving.fake.hold = true;
    const HttpReply late = post_keyed(serving, hello, "k");
    CHECK(error_of(late) == "504 timeout_error timeout");
    CHECK(field(late, "x-should-retry") == "(none)");
    const std::string id = field(late, "X-Valar-Response-Id");
    CHECK(post_keyed(serving, hello, "k").status == 504);
    serving.fake.finish(id);
    REQUIRE(
        eventually([&] { return status_of(serving.get("/v1/responses/" + id)) == "completed"; }));
    const HttpReply found = post_keyed(serving, hello, "k");
    CHECK(found.status == 200);
    CHECK(id_of(found) == id);
}

// ---- After a restart ---------------------------------------------------------------------------

TEST_CASE("server: the next one goes on with what was left") {
    MemoryStore store;
    ServerOptions options = local();
    options.store = &store;
    std::string background, keyed, plain;
    {
        Serving serving(options);
        serving.fake.hold = true;
        background = id_of(serving.post(in_background));
        HttpPeer first(serving.server.port()), second(serving.server.port());
        REQUIRE(first.send(raw_post(hello, "Host: localhost\r\nIdempotency-Key: k\r\n")));
        REQUIRE(eventually([&] { return serving.fake.waiting().size() == 2; }));
        for (const std::string& id : serving.fake.waiting())
            if (id != background) keyed = id;
        REQUIRE(second.send(raw_post(hello)));
        REQUIRE(eventually([&] { return serving.fake.waiting().size() == 3; }));
        for (const std::string& id : serving.fake.waiting())
            if (id != background && id != keyed) plain = id;
    }
    // as if the process had died: the plain one's client is gone, the others are as they were
    for (const char* round : {"left once", "left twice, orderly"}) {
        CAPTURE(std::string(round));
        Serving serving(options, true);
        REQUIRE(eventually([&] { return serving.fake.waiting().size() >= 2; }));
        CHECK(serving.fake.waiting().size() == 2);
        CHECK(status_of(serving.get("/v1/responses/" + background)) == "running");
    }
    Serving serving(options);
    REQUIRE(eventually(
        [&] { return status_of(serving.get("/v1/responses/" + background)) == "completed"; }));
    const HttpReply reply = post_keyed(serving, hello, "k");
    CHECK(field(reply, "Idempotent-Replayed") == "true");
    CHECK(id_of(reply) == keyed);
    CHECK(status_of(reply) == "completed");
}

TEST_CASE("server: after a crash work is begun once more, and once only") {
    MemoryStore store;
    const auto nothing = [](void*, Result<void>) {};
    const auto text = [](const char* words) { return std::make_shared<const std::string>(words); };
    const auto leave = [&](const char* id, bool background, uint32_t attempts) {
        StoredResponse record;
        record.id = id;
        record.organisation = "default";
        record.background = background;
        record.attempts = attempts;
        record.created_at_ms = 1000;
        record.head = text(R"({"message_id":"msg_1","created_at":1,"model":"fake","seed":77})");
        record.request = text(in_background);
        store.add(record, {nothing, nullptr});
    };
    leave("resp_again", true, 1);
    leave("resp_twice", true, 2);
    leave("resp_sync", false, 1);
    ServerOptions options = local();
    options.store = &store;
    Serving serving(options);
    const auto ended = [&](const char* id, const char* status) {
        const std::string path = std::string("/v1/responses/") + id;
        return eventually([&] { return status_of(serving.get(path)) == status; });
    };
    CHECK(ended("resp_again", "completed"));
    for (const char* id : {"resp_twice", "resp_sync"}) {
        CHECK(ended(id, "failed"));
        const Json object = parse(serving.get(std::string("/v1/responses/") + id).body);
        CHECK(object["error"]["code"].as_string() == "server_restarted");
    }
    CHECK(store.find("default", "resp_again")->attempts == 2);
}

// ---- Windows, limits, keys from a file ---------------------------------------------------------

TEST_CASE("server: completion windows") {
    Serving serving;
    const auto with = [&](const char* window, bool background) {
        return serving.post(R"({"model":"fake","input":"x","background":)" +
                            std::string(background ? "true" : "false") +
                            R"(,"metadata":{"completion_window":")" + window + "\"}}");
    };
    CHECK(with("asap", false).status == 200);
    CHECK(with("standard", true).status == 202);
    CHECK(with("flex", true).status == 202);
    const std::string refused =
        "400 invalid_request_error invalid_value metadata.completion_window";
    CHECK(error_of(with("flex", false)) == refused);
    CHECK(error_of(with("soon", true)) == refused);
    serving.fake.info.windows = {Window::standard};
    CHECK(error_of(with("asap", false)) == refused);
}

TEST_CASE("server: a key's requests a minute") {
    ServerOptions options = with_keys();
    options.keys[0].requests_per_minute = 3;
    Serving serving(options);
    for (int i = 0; i < 3; ++i) CHECK(serving.get("/v1/models", key_a).status == 200);
    const HttpReply refused = serving.get("/v1/models", key_a);
    CHECK(error_of(refused) == "429 rate_limit_error rate_limit_exceeded");
    const int seconds = std::atoi(field(refused, "Retry-After").c_str());
    CHECK(seconds >= 15);
    CHECK(seconds <= 20);
    CHECK(serving.get("/health").status == 200);
    for (int i = 0; i < 10; ++i) CHECK(serving.get("/v1/models", key_b).status == 200);
}

TEST_CASE("server: a full queue says when to come again") {
    ServerOptions options = local();
    options.max_queued = 0;
    Serving serving(options);
    const HttpReply reply = serving.post(hello);
    CHECK(error_of(reply) == "503 api_error overloaded");
    CHECK(std::atoi(field(reply, "Retry-After").c_str()) >= 1);
}

TEST_CASE("server: keys from a file") {
    const std::string path = "server_keys_" + std::to_string(detail::monotonic_ns()) + ".txt";
    const auto read = [&](const std::string& text) {
        REQUIRE(detail::write_file(path, std::as_bytes(std::span(text))));
        auto keys = read_key_file(path, true);
        std::remove(path.c_str());
        return keys;
    };
    const std::string hash = detail::sha256(key_a).hex();
    auto keys = read("# comment\n\none  a " + hash + "\r\n two b " + std::string(64, '0') + "\t60");
    REQUIRE(keys.ok());
    REQUIRE(keys->size() == 2);
    CHECK((*keys)[0].id == "one");
    CHECK((*keys)[1].requests_per_minute == 60);
    ServerOptions options = local();
    options.keys = *keys;
    Serving serving(options);
    CHECK(serving.get("/v1/models", key_a).status == 200);
    CHECK(serving.get("/v1/models", key_b).status == 401);
    for (const std::string& text :
         {std::string("one a"), "one a " + hash + " 0", "one a " + hash + " x",
          "one a " + hash + " 1 2", "one a " + hash.substr(1),
          "one a " + hash + "\none b " + hash}) {
        CAPTURE(text);
        auto refused = read(text);
        REQUIRE_FALSE(refused.ok());
        CHECK(refused.error().kind == ErrorKind::bad_data);
        CHECK(refused.error().message.find("line ") != std::string::npos);
    }
    for (const char* none :
         {"", "\n", " \t\r\n\r\n", "# one\n  # two\r\n", "\xEF\xBB\xBF", "\xEF\xBB\xBF# one"}) {
        CAPTURE(none);
        auto refused = read(none);
        REQUIRE_FALSE(refused.ok());
        CHECK(refused.error().message.find("holds no key") != std::string::npos);
    }
    CHECK(read("\xEF\xBB\xBFone a " + hash).ok());
    CHECK_FALSE(read_key_file("no/such/file").ok());
}

#if !defined(_WIN32)
TEST_CASE("server: a file of keys that others may write or read is refused") {
    const std::string path = "server_keys_" + std::to_string(detail::monotonic_ns()) + ".txt";
    const std::string text = "one a " + detail::sha256(key_a).hex();
    REQUIRE(detail::write_file(path, std::as_bytes(std::span(text))));
    for (const mode_t mode : {0600u, 0400u, 0640u, 0440u, 0700u}) {
        chmod(path.c_str(), mode);
        CHECK(read_key_file(path).ok());
    }
    for (const mode_t mode : {0644u, 0604u, 0602u, 0620u, 0660u, 0666u, 0777u}) {
        chmod(path.c_str(), mode);
        auto refused = read_key_file(path);
        REQUIRE_FALSE(refused.ok());
        CHECK(refused.error().kind == ErrorKind::permission);
        CHECK(refused.error().message.find("'" + path + "' has the mode 0") == 0);
        CHECK(read_key_file(path, true).ok());
    }
    std::remove(path.c_str());
}
#endif

TEST_CASE("server: a secret gives way to its hash") {
    ApiKey key{"one", "a", key_a};
    const char* const bytes = key.secret.data();
    REQUIRE(hash_secret(&key).ok());
    CHECK(key.secret.empty());
    CHECK(std::string_view(bytes, std::strlen(key_a)) == std::string(std::strlen(key_a), '\0'));
    CHECK(key.secret_sha256 == detail::sha256(key_a).hex());
    REQUIRE(hash_secret(&key).ok());  // once more: nothing changes
    CHECK(key.secret_sha256 == detail::sha256(key_a).hex());
    ApiKey weak{"two", "a", "too short"};
    CHECK(hash_secret(&weak).error().param == "keys");
    CHECK(weak.secret == "too short");
    ServerOptions options = local();
    options.keys = {key};
    Serving serving(options);
    CHECK(serving.get("/v1/models", key_a).status == 200);
}

TEST_CASE("server: without keys what a proxy passed on is refused, unless it is trusted") {
    const char* const fields[] = {"Forwarded", "X-Forwarded-For", "x-real-ip", "VIA"};
    {
        Serving serving;
        for (const char* name : fields) {
            const HttpReply reply = serving.call("GET", "/v1/models", {}, {{name, "192.0.2.1"}});
            CHECK(error_of(reply) == "403 permission_error proxy_not_allowed");
            CHECK(detail::ascii_lower(reply.body).find(detail::ascii_lower(name)) !=
                  std::string::npos);
        }
        // the Host comes first, the Origin behind it
        CHECK(error_of(serving.call("GET", "/v1/models", {},
                                    {{"Host", "evil.example"}, {"Via", "1.1 a"}})) ==
              "403 permission_error host_not_allowed");
        CHECK(error_of(serving.call("GET", "/v1/models", {},
                                    {{"Origin", "http://e.example"}, {"Via", "1.1 a"}})) ==
              "403 permission_error proxy_not_allowed");
        CHECK(serving.call("GET", "/v1/models", {}, {{"X-Forwarded-Proto", "http"}}).status == 200);
    }
    ServerOptions trusting = local();
    trusting.trust_proxy = true;
    for (const ServerOptions& options : {trusting, with_keys()}) {
        Serving serving(options);
        for (const char* name : fields)
            CHECK(serving.call("GET", "/v1/models", {}, {{name, "192.0.2.1"}}, key_a).status ==
                  200);
    }
}

TEST_CASE("server: requests without a known key are counted, and limited by address") {
    ServerOptions options = with_keys();
    options.trust_proxy = true;
    Serving serving(options);
    const auto guess = [&](const std::string& address) {
        return serving.call("GET", "/v1/models", {}, {{"X-Forwarded-For", address}},
                            "sk-no-such-key-00001");
    };
    for (int i = 0; i < 20; ++i) CHECK(guess("192.0.2.1").status == 401);
    HttpReply limited = guess("192.0.2.1");
    CHECK(error_of(limited) == "429 rate_limit_error rate_limit_exceeded");
    const int seconds = std::atoi(field(limited, "Retry-After").c_str());
    CHECK(seconds >= 1);
    CHECK(seconds <= 3);
    CHECK(field(limited, "WWW-Authenticate") == "(none)");
    CHECK(serving.call("GET", "/v1/models", {}, {{"X-Forwarded-For", "192.0.2.1"}}).status == 429);
    CHECK(guess("192.0.2.2").status == 401);
    for (int i = 0; i < 20; ++i)  // all of one network
        CHECK(guess("2001:db8:0:1::" + std::to_string(i)).status == 401);
    CHECK(guess("2001:db8:0:1:ffff::1").status == 429);
    CHECK(guess("2001:db8:0:2::1").status == 401);
    // who has a key is not held up by the others of his address
    CHECK(serving.call("GET", "/v1/models", {}, {{"X-Forwarded-For", "192.0.2.1"}}, key_a).status ==
          200);
    const std::string metrics = serving.get("/metrics", key_a).body;
    CHECK(metrics.find("\nvalar_auth_refused_total 45\n") != std::string::npos);
    CHECK(metrics.find("\nvalar_auth_limited_total 3\n") != std::string::npos);
}

TEST_CASE("server: addresses that guess are forgotten, never gathered") {
    detail::ServerGuesses guesses;
    uint64_t now_ns = 1'000'000'000;
    const auto wait_s = [&](const std::string& address) { return guesses.take(address, now_ns); };
    for (int i = 0; i < 20; ++i) REQUIRE(wait_s("192.0.2.1") == 0);
    CHECK(wait_s("192.0.2.1") == 3);
    CHECK(wait_s("::ffff:192.0.2.1") == 3);  // as a socket of both families has it
    CHECK(wait_s("-") == 0);
    for (int i = 0; i < 100'000; ++i) {
        now_ns += 1000;
        const std::string address = "10." + std::to_string(i >> 16) + "." +
                                    std::to_string(i >> 8 & 255) + "." + std::to_string(i & 255);
        if (wait_s(address) != 0) FAIL("refused " << address);
        if (i % 100 == 0) CHECK(wait_s("192.0.2.1") > 0);  // who goes on is not forgotten
    }
    now_ns += 60'000'000'000;
    for (int i = 0; i < 20; ++i) CHECK(wait_s("192.0.2.1") == 0);
    CHECK(wait_s("192.0.2.1") == 3);
}

TEST_CASE("server: keys are replaced while it serves") {
    Log log;
    ServerOptions options = with_keys();
    options.keys[0].requests_per_minute = 5;
    options.log = log.sink();
    Serving serving(options, true);
    const HttpReply begun = serving.post(in_background, key_b);
    REQUIRE(begun.status == 202);
    std::thread waits([&] { CHECK(serving.post(hello, key_b).status == 200); });
    REQUIRE(eventually([&] { return serving.fake.waiting().size() == 2; }));
    for (int i = 0; i < 3; ++i) CHECK(serving.get("/v1/models", key_a).status == 200);

    const char* const key_c = "sk-organisation-b-0002";
    const ApiKey one = options.keys[0];
    const ApiKey three{"three", "b", key_c};
    CHECK(serving.server.replace_keys({}).error().param == "keys");
    CHECK(serving.server.replace_keys({one, {"four", "b", "too short"}}).error().param == "keys");
    CHECK(serving.get("/v1/models", key_b).status == 200);
    REQUIRE(serving.server.replace_keys({three, one}).ok());
    CHECK(serving.get("/v1/models", key_b).status == 401);
    CHECK(serving.get("/v1/models", key_c).status == 200);
    // what the old key began goes on, and its organisation sees it
    for (const std::string& id : serving.fake.waiting()) serving.fake.finish(id);
    waits.join();
    CHECK(eventually([&] {
        return parse(serving.get("/v1/responses/" + id_of(begun), key_c).body)["status"]
                   .as_string() == "completed";
    }));
    // a key that stays keeps what it has left
    for (int i = 0; i < 2; ++i) CHECK(serving.get("/v1/models", key_a).status == 200);
    CHECK(serving.get("/v1/models", key_a).status == 429);
    CHECK(eventually([&] {
        return log.text().find("keys: 2, 1 of them new; 1 are gone") != std::string::npos;
    }));
}

TEST_CASE("server: a server without keys gets some") {
    Serving serving;
    CHECK(serving.get("/v1/models").status == 200);
    REQUIRE(serving.server.replace_keys({{"one", "a", key_a}}).ok());
    CHECK(serving.get("/v1/models").status == 401);
    CHECK(serving.get("/v1/models", key_a).status == 200);
    CHECK(parse(serving.get("/openapi.json").body)["components"].contains("securitySchemes"));
}

TEST_CASE("server: from the moment that keys are replaced no request knows the old ones") {
    Serving serving(with_keys());
    const auto secret = [](int i) { return "sk-changing-" + std::to_string(10'000'000 + i); };
    std::atomic<bool> over = false;
    std::vector<std::thread> clients;
    for (int i = 0; i < 3; ++i)
        clients.emplace_back([&] {
            while (!over)
                if (const int status = serving.get("/v1/models", key_a).status; status != 200)
                    FAIL_CHECK("status " << status);
        });
    HttpPeer peer(serving.server.port());
    const auto status = [&](const std::string& key) {
        peer.send("GET /v1/models HTTP/1.1\r\nHost: a\r\nX-Api-Key: " + key + "\r\n\r\n");
        return peer.reply().status;
    };
    for (int i = 0; i < 300; ++i) {
        std::thread other([&] {
            CHECK(serving.server.replace_keys({{"a", "a", key_a}, {"b", "b", secret(i)}}).ok());
        });
        other.join();
        CHECK(status(secret(i)) == 200);
        if (const int found = status(secret(i - 1)); found != 401) CHECK(found == 429);
    }
    over = true;
    for (std::thread& client : clients) client.join();
}

// ---- Tools --------------------------------------------------------------------------------------

namespace {

const char* const weather_tool =
    R"("tools":[{"type":"function","name":"weather","parameters":{"type":"object"}}])";

std::string with_input(const Json& input, const std::string& more) {
    return R"({"model":"fake","input":)" + input.write() + "," + more + "}";
}

}  // namespace

TEST_CASE("server: a call, and its result, with all that was said as input") {
    Serving serving(local());
    Json input = parse(R"([{"role":"user","content":"weather?"}])");
    const HttpReply first = serving.post(with_input(input, weather_tool));
    REQUIRE(first.status == 200);
    const Json object = parse(first.body);
    REQUIRE(object["output"].size() == 2);
    CHECK(object["output"][0]["type"].as_string() == "reasoning");
    const Json& call = object["output"][1];
    CHECK(call["type"].as_string() == "function_call");
    CHECK(call["name"].as_string() == "weather");
    CHECK(call["id"].as_string().starts_with("fc_"));
    CHECK(call["arguments"].as_string() == R"({"city": "Oslo"})");
    CHECK(object["tools"][0]["name"].as_string() == "weather");
    CHECK(serving.get("/v1/responses/" + id_of(first)).body == first.body);

    for (const Json& item : object["output"].items()) input.push(item);
    Json result = Json::object().set("type", "function_call_output").set("output", "rain");
    Json unknown = input;
    unknown.push(Json(result).set("call_id", "call_other"));
    const HttpReply refused = serving.post(with_input(unknown, weather_tool));
    CHECK(error_of(refused) == "400 invalid_request_error invalid_value input[3].call_id");
    CHECK(refused.body.find("call_other") != std::string::npos);
    input.push(result.set("call_id", call["call_id"]));
    const HttpReply second = serving.post(with_input(input, weather_tool));
    REQUIRE(second.status == 200);
    CHECK(parse(second.body)["output"][0]["type"].as_string() == "message");
    const Json items = parse(
        serving.get("/v1/responses/" + id_of(second) + "/input_items?order=asc").body)["data"];
    REQUIRE(items.size() == 4);
    for (size_t i = 0; i < items.size(); ++i)
        CHECK(items[i]["type"] == (i == 0 ? Json("message") : input[i]["type"]));
    CHECK(items[3]["output"].as_string() == "rain");
}

TEST_CASE("server: two calls of two kinds at once, and every item of an answer as input again") {
    Serving serving(local());
    const std::string both =
        R"("tools":[{"type":"function","name":"weather","strict":true,"parameters":{"type":"object"}},)"
        R"({"type":"custom","name":"note","format":{"type":"grammar","syntax":"gbnf",)"
        R"("definition":"root ::= [a-z]+"}}],"max_tool_calls":3,)"
        R"("include":["message.output_text.logprobs"],"top_logprobs":1)";
    const auto types = [](const Json& items) {
        std::string all;
        for (const Json& item : items.items()) all.append(" ").append(item["type"].as_string());
        return all;
    };
    Json input = parse(R"([{"role":"user","content":"weather?"}])");
    const Json first = parse(serving.post(with_input(input, both)).body);
    CHECK(types(first["output"]) == " reasoning function_call custom_tool_call");
    CHECK(first["max_tool_calls"].as_int() == 3);
    CHECK(first["tools"][1]["format"]["syntax"].as_string() == "gbnf");
    for (
        const char* choice :
        {R"({"type":"custom","name":"note"})",
         R"({"type":"allowed_tools","mode":"required","tools":[{"type":"custom","name":"note"}]})"}) {
        const Json named = parse(
            serving.post(with_input(input, both + R"(,"tool_choice":)" + choice)).body);
        CHECK(types(named["output"]) == " reasoning custom_tool_call");
        CHECK(named["tool_choice"].write() == choice);
    }
    CHECK(types(parse(
              serving.post(with_input(input, both + R"(,"tool_choice":"none")")).body)["output"]) ==
          " message");
    CHECK(types(parse(serving.post(with_input(input, both + R"(,"parallel_tool_calls":false)"))
                          .body)["output"]) == " reasoning function_call");

    for (const Json& item : first["output"].items()) input.push(item);
    for (const Json& item : first["output"].items()) {
        if (!item.contains("call_id")) continue;
        input.push(Json::object()
                       .set("type", std::string(item["type"].as_string()) + "_output")
                       .set("call_id", item["call_id"])
                       .set("output", parse(R"([{"type":"input_text","text":"fine"}])")));
    }
    Json unnamed = input;
    unnamed.items().back().erase("call_id");
    CHECK(error_of(serving.post(with_input(unnamed, both))) ==
          "400 invalid_request_error missing_required_parameter input[5].call_id");
    const HttpReply second = serving.post(with_input(input, both));
    REQUIRE(second.status == 200);
    const Json answer = parse(second.body)["output"];
    REQUIRE(types(answer) == " message");
    const Json& logprobs = answer[0]["content"][0]["logprobs"];
    CHECK(logprobs.size() > 0);
    CHECK(logprobs[0]["top_logprobs"].size() == 1);
    const Json items = parse(
        serving.get("/v1/responses/" + id_of(second) + "/input_items?order=asc").body)["data"];
    CHECK(types(items) ==
          " message reasoning function_call custom_tool_call function_call_output"
          " custom_tool_call_output");
    for (size_t i = 1; i < 4; ++i) CHECK(items[i]["id"] == first["output"][i - 1]["id"]);
    // and the answer with them
    input.push(answer[0]);
    input.push(parse(R"({"role":"user","content":"thanks"})"));
    CHECK(serving.post(with_input(input, both)).status == 200);
}

TEST_CASE("server: openai: the result of a call that an earlier response made") {
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    Serving serving(options);
    const HttpReply first = serving.post(
        R"({"model":"fake","input":"x","tools":[{"type":"custom","name":"say"}]})");
    REQUIRE(first.status == 200);
    const Json call = parse(first.body)["output"][1];
    CHECK(call["type"].as_string() == "custom_tool_call");
    CHECK(call["input"].as_string() == "text");
    const auto follow = [&](const std::string& call_id) {
        const Json result = Json::array().push(Json::object()
                                                   .set("type", "custom_tool_call_output")
                                                   .set("call_id", call_id)
                                                   .set("output", "done"));
        return serving.post(with_input(
            result, R"("tools":[{"type":"custom","name":"say"}],"previous_response_id":")" +
                        id_of(first) + "\""));
    };
    CHECK(error_of(follow("call_9")) == "400 invalid_request_error invalid_value input[3].call_id");
    const HttpReply second = follow(std::string(call["call_id"].as_string()));
    REQUIRE(second.status == 200);
    CHECK(parse(second.body)["output"][0]["type"].as_string() == "message");
}

TEST_CASE("server: openai: items of earlier answers may be referred to") {
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    Serving serving(options);
    const auto types = [](const Json& items) {
        std::string all;
        for (const Json& item : items.items()) all.append(" ").append(item["type"].as_string());
        return all;
    };
    const auto refer = [](const Json& id) {
        return Json::object().set("type", "item_reference").set("id", id);
    };
    Json input = parse(R"([{"role":"user","content":"weather?"}])");
    const Json first = parse(serving.post(with_input(input, weather_tool)).body);
    REQUIRE(types(first["output"]) == " reasoning function_call");
    for (const Json& item : first["output"].items()) input.push(refer(item["id"]));
    input.push(Json::object()
                   .set("type", "function_call_output")
                   .set("call_id", first["output"][1]["call_id"])
                   .set("output", "rain"));
    const HttpReply second = serving.post(with_input(input, weather_tool));
    REQUIRE(second.status == 200);
    const std::string path = "/v1/responses/" + id_of(second);
    const std::string expected = " message reasoning function_call function_call_output";
    const auto asked = [&] {
        return parse(serving.get(path + "/input_items?order=asc").body)["data"];
    };
    CHECK(types(asked()) == expected);
    CHECK(asked()[2]["id"] == first["output"][1]["id"]);

    // in a chain, and an answer's text
    const Json message = parse(second.body)["output"][0];
    const Json next =
        Json::array().push(refer(message["id"])).push(parse(R"({"role":"user","content":"!"})"));
    const HttpReply third = serving.post(with_input(next, R"("store":true)"));
    REQUIRE(third.status == 200);
    CHECK(parse(third.body)["output"][0]["content"][0]["text"].as_string() ==
          "echo: " + std::string(message["content"][0]["text"].as_string()) + "!");
    CHECK(serving.post(with_input(next, R"("previous_response_id":")" + id_of(second) + "\""))
              .status == 200);

    // what nobody finds
    const auto refused = [&](const Json& item, const std::string& rest = weather_tool) {
        return error_of(serving.post(with_input(Json::array().push(item), rest)));
    };
    for (const Json& id :
         {Json("msg_"), Json("x"), Json("msg_000000000000000000000000"), Json(), Json(1)})
        CHECK(refused(refer(id)) == "400 invalid_request_error invalid_value input[0].id");
    const std::string first_path = "/v1/responses/" + std::string(first["id"].as_string());
    CHECK(serving.call("DELETE", first_path).status == 200);
    CHECK(refused(refer(first["output"][1]["id"])) ==
          "400 invalid_request_error invalid_value input[0].id");
    CHECK(types(asked()) == expected);  // it was kept with them

    // another surface has no `input`
    const std::string chat =
        R"({"model":"fake","messages":[{"role":"user","content":"x"}],"input":[)" +
        refer("nobody's").write() + "]}";
    CHECK(serving.call("POST", "/v1/chat/completions", chat, {{"Content-Type", "application/json"}})
              .status == 200);
}

// ---- The openai dialect ------------------------------------------------------------------------

namespace {

/// A stream's events, without its comments.
std::vector<std::string_view> events_of(const std::string& stream) {
    std::vector<std::string_view> events;
    std::string_view rest = stream;
    while (!rest.empty()) {
        const size_t end = rest.find("\n\n");
        REQUIRE_MESSAGE(end != rest.npos, rest);
        if (rest.front() != ':') events.push_back(rest.substr(0, end));
        rest.remove_prefix(end + 2);
    }
    return events;
}

/// The events of a stream, checked against the order in which a client may see them.
struct EventReader {
    std::vector<Json> events;
    std::string text;         // of all messages
    std::vector<Json> items;  // as they were done
    Json last;                // the object of the terminal event

    explicit EventReader(const std::string& stream) {
        for (const std::string_view one : events_of(stream)) {
            const size_t line = one.find('\n');
            REQUIRE(one.substr(0, 7) == "event: ");
            REQUIRE(one.substr(line + 1, 6) == "data: ");
            events.push_back(parse(std::string(one.substr(line + 7))));
            CHECK(events.back()["type"].as_string() == one.substr(7, line - 7));
        }
    }
    void check_whole() {
        REQUIRE(events.size() >= 3);
        CHECK(type(0) == "response.created");
        CHECK(type(1) == "response.in_progress");
        check_order();
    }
    std::string type(size_t i) const { return std::string(events[i]["type"].as_string()); }

    void check_order() {
        int64_t number = 0;
        std::string open, partial;
        bool in_part = false;
        for (size_t i = 0; i < events.size(); ++i) {
            const Json& event = events[i];
            const std::string kind = type(i);
            CHECK(event["sequence_number"].as_int() == number++);
            const bool terminal = kind == "response.completed" || kind == "response.incomplete" ||
                                  kind == "response.failed" || kind == "error";
            CHECK(terminal == (i + 1 == events.size() ||
                               (kind == "response.failed" && i + 2 == events.size())));
            if (event.contains("response")) last = event["response"];
            if (kind == "response.output_item.added") {
                CHECK(open.empty());
                open = event["item"]["id"].as_string();
                partial.clear();
                CHECK(event["item"]["status"].as_string("in_progress") == "in_progress");
                CHECK(event["output_index"].as_int() == static_cast<int64_t>(items.size()));
            } else if (kind == "response.output_item.done") {
                CHECK(event["item"]["id"].as_string() == open);
                CHECK_FALSE(in_part);
                items.push_back(event["item"]);
                open.clear();
            } else if (event.contains("item_id")) {
                CHECK(event["item_id"].as_string() == open);
                CHECK(event["output_index"].as_int() == static_cast<int64_t>(items.size()));
                if (kind == "response.content_part.added") in_part = true;
                if (kind == "response.content_part.done") in_part = false;
                CHECK(event.contains("content_index") ==
                      (in_part || kind == "response.content_part.done"));
                if (event.contains("delta")) partial += event["delta"].as_string();
                for (const char* whole : {"text", "arguments", "input"})
                    if (event.contains(whole)) CHECK(event[whole].as_string() == partial);
                if (kind == "response.output_text.done") text += partial;
            }
        }
        CHECK(open.empty());
    }
    /// The items of the terminal object are those of the stream.
    void check_items() const {
        REQUIRE(last["output"].size() == items.size());
        for (size_t i = 0; i < items.size(); ++i)
            CHECK(last["output"].items()[i].write() == items[i].write());
    }
};

std::string streamed(const std::string& body) {
    Json json = parse(body);
    return json.set("stream", true).write();
}

}  // namespace

TEST_CASE("server: openai: a response as events") {
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    Serving serving(options);
    for (const bool told : {false, true}) {
        serving.fake.tells_items = told;
        for (const char* body :
             {hello, R"({"model":"fake","input":"hello there","max_output_tokens":2})",
              R"({"model":"fake","input":"a b","include":["message.output_text.logprobs"]})",
              R"({"model":"fake","input":"x","tools":[{"type":"function","name":"f"}]})",
              R"({"model":"fake","input":"x","tools":[{"type":"custom","name":"f"}]})"}) {
            CAPTURE(body);
            const HttpReply reply = serving.post(streamed(body));
            CHECK(reply.status == 200);
            CHECK(field(reply, "Content-Type") == "text/event-stream");
            CHECK(field(reply, "Cache-Control") == "no-cache");
            CHECK(field(reply, "X-Accel-Buffering") == "no");
            EventReader reader(reply.body);
            reader.check_whole();
            reader.check_items();
            // The terminal object is what GET shows, and what the same request gets at once.
            const std::string id = field(reply, "X-Valar-Response-Id");
            CHECK(serving.get("/v1/responses/" + id).body == reader.last.write());
            Json whole = parse(serving.post(body).body);
            CHECK(whole["usage"].write() == reader.last["usage"].write());
            CHECK(whole["status"].write() == reader.last["status"].write());
            REQUIRE(whole["output"].size() == reader.items.size());
            for (size_t i = 0; i < reader.items.size(); ++i) {
                Json one = whole["output"].items()[i], other = reader.items[i];
                CHECK(one.set("id", "").write() == other.set("id", "").write());
            }
        }
    }
}

TEST_CASE("server: openai: what Codex sends: unknown tools, includes, a probe without input") {
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    Serving serving(options);
    const std::string tools =
        R"("tools":[{"type":"namespace","name":"n","tools":[]},{"type":"web_search"},)"
        R"({"type":"function","name":"f"},{"type":"of_next_year"}])";
    const HttpReply reply = serving.post(with_input("x", tools));
    REQUIRE(reply.status == 200);
    const Json object = parse(reply.body);
    REQUIRE(object["tools"].size() == 1);
    CHECK(object["tools"][0]["name"].as_string() == "f");
    CHECK(object["output"][1]["name"].as_string() == "f");
    // What a server would have to run, and what is not even an object with a type.
    for (const char* refused : {R"({"type":"file_search"})", R"({"type":"mcp"})", "{}", "1"})
        CHECK(serving.post(with_input("x", R"("tools":[)" + std::string(refused) + "]")).status ==
              400);
    CHECK(serving.post(with_input("x", R"("include":["reasoning.encrypted_content"])")).status ==
          200);
    CHECK(serving.post(with_input("x", R"("include":["file_search_call.results"])")).status == 400);
    for (const Json& empty : {Json::array(), Json("")}) {
        CHECK(serving.post(with_input(empty, R"("max_output_tokens":1)")).status == 200);
        CHECK(serving.post(with_input(empty, R"("max_output_tokens":2)")).status == 400);
        CHECK(serving.post(with_input(empty, R"("store":true)")).status == 400);
    }
    Serving strict;
    CHECK(strict.post(with_input("x", tools)).status == 400);
    CHECK(strict.post(with_input(Json::array(), R"("max_output_tokens":1)")).status == 400);
}

TEST_CASE("server: a record is found by its idempotency key; compact is refused by name") {
    Serving serving(with_keys());
    const HttpHeaders keyed = {{"Content-Type", "application/json"}, {"Idempotency-Key", "a b"}};
    const HttpReply made = serving.call("POST", "/v1/responses", hello, keyed, key_a);
    serving.post(hello, key_a);
    const Json list = parse(serving.get("/v1/responses?idempotency_key=a%20b", key_a).body);
    REQUIRE(list["data"].size() == 1);
    CHECK(list["data"][0]["id"].as_string() == id_of(made));
    CHECK(list["has_more"].write() == "false");
    for (const auto& [name, key] : {std::pair("a%20b", key_b), std::pair("c", key_a)})
        CHECK(
            parse(
                serving.get("/v1/responses?idempotency_key=" + std::string(name), key).body)["data"]
                .empty());
    CHECK(serving.call("DELETE", "/v1/responses/" + id_of(made), {}, {}, key_a).status == 200);
    CHECK(parse(serving.get("/v1/responses?idempotency_key=a%20b", key_a).body)["data"].empty());
    const HttpReply compact = serving.call("POST", "/v1/responses/compact", hello,
                                           {{"Content-Type", "application/json"}}, key_a);
    CHECK(error_of(compact) == "400 invalid_request_error unsupported_value");
    CHECK(compact.body.find("compact is not supported") != std::string::npos);
}

namespace {

/// A conversation over HTTP.
struct Talk {
    Serving& serving;
    std::string path = {};  // of it
    HttpReply send(const std::string& method, const std::string& below,
                   const std::string& body = {}) {
        const HttpHeaders type = {{"Content-Type", "application/json"}};
        return serving.call(method, "/v1/conversations" + path + below, body,
                            body.empty() ? HttpHeaders() : type);
    }
    std::string start(const std::string& body) {
        const HttpReply made = send("POST", "", body);
        REQUIRE_MESSAGE(made.status == 200, made.body);
        path = "/" + id_of(made);
        return id_of(made);
    }
    std::string texts() {  // of its items, oldest first
        std::string all;
        const Json list = parse(send("GET", "/items?order=asc&limit=100").body);
        for (const Json& item : list["data"].items())
            all += std::string(item["content"][0]["text"].as_string()) + "|";
        return all;
    }
};

}  // namespace

TEST_CASE("server: openai: a conversation, its items and its responses") {
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    Serving serving(options);
    Talk talk{serving};
    const std::string id = talk.start(
        R"({"metadata":{"topic":"t"},"items":[{"role":"user","content":"one"}]})");
    CHECK(id.starts_with("conv_"));
    const Json made = parse(talk.send("GET", "").body);
    CHECK(made["object"].as_string() == "conversation");
    CHECK(made["created_at"].is_int());
    CHECK(made["metadata"].write() == R"({"topic":"t"})");
    CHECK(parse(talk.send("POST", "", R"({"metadata":{"a":"b"}})").body)["metadata"].write() ==
          R"({"a":"b"})");
    const Json added = parse(
        talk.send(
                "POST", "/items",
                R"({"items":[{"role":"assistant","content":"two"},{"role":"user","content":"3"}]})")
            .body);
    REQUIRE(added["data"].size() == 2);
    CHECK(talk.texts() == "one|two|3|");
    const std::string item = "/items/" + std::string(added["data"][1]["id"].as_string());
    CHECK(talk.send("GET", item).body == added["data"][1].write());
    CHECK(parse(talk.send("DELETE", item).body)["id"].as_string() == id);
    CHECK(error_of(talk.send("GET", item)) == "404 not_found_error not_found");
    CHECK(error_of(talk.send("DELETE", item)) == "404 not_found_error not_found");
    // Newest first, page by page.
    const Json page = parse(talk.send("GET", "/items?limit=1").body);
    CHECK(page["has_more"].as_bool());
    CHECK(page["data"][0]["content"][0]["text"].as_string() == "two");
    const std::string after = "/items?limit=1&after=" + std::string(page["last_id"].as_string());
    CHECK(parse(talk.send("GET", after).body)["data"][0]["content"][0]["text"].as_string() ==
          "one");

    // A response sees what is there, and adds what was said; by streams too.
    const auto ask = [&](const std::string& words, const std::string& more = {}) {
        return serving.post(R"({"model":"fake","conversation":")" + id + R"(","input":")" + words +
                            "\"" + more + "}");
    };
    const HttpReply first = ask("four");
    CHECK(parse(first.body)["conversation"]["id"].as_string() == id);
    CHECK(parse(first.body)["output"][0]["content"][0]["text"].as_string() == "echo: onetwofour");
    CHECK(talk.texts() == "one|two|four|echo: onetwofour|");
    EventReader second(ask("five", R"(,"stream":true,"store":false)").body);
    second.check_whole();
    CHECK(second.text == "echo: onetwofourecho: onetwofourfive");
    CHECK(talk.texts() == "one|two|four|echo: onetwofour|five|" + second.text + "|");
    // Without input of its own too; what fails adds nothing.
    CHECK(serving.post(R"({"model":"fake","conversation":{"id":")" + id + R"("}})").status == 200);
    const std::string before = talk.texts();
    serving.fake.failure = detail::make_error(ErrorKind::internal, "x", "internal_error");
    CHECK(parse(ask("six").body)["status"].as_string() == "failed");
    CHECK(talk.texts() == before);
    serving.fake.failure.reset();
    CHECK(error_of(ask("x", R"(,"previous_response_id":"resp_1")")) ==
          "400 invalid_request_error invalid_value conversation");

    // It is none of the responses, and they are none of it.
    CHECK(serving.get("/v1/responses/" + id).status == 404);
    CHECK(serving.get("/v1/responses/" + id + "/input_items").status == 404);
    CHECK(serving.call("DELETE", "/v1/responses/" + id).status == 404);
    CHECK(serving.get("/v1/conversations/" + id_of(first)).status == 404);
    CHECK(serving.call("DELETE", "/v1/conversations/" + id_of(first)).status == 404);
    CHECK(serving.get("/v1/responses?after=" + id).status == 400);
    const Json list = parse(serving.get("/v1/responses").body);
    for (const Json& one : list["data"].items())
        CHECK(one["id"].as_string().substr(0, 5) == "resp_");
    CHECK(parse(talk.send("DELETE", "").body)["object"].as_string() == "conversation.deleted");
    for (const char* below : {"", "/items"})
        CHECK(error_of(talk.send("GET", below)) == "404 not_found_error not_found");
    CHECK(error_of(ask("x")) == "404 not_found_error not_found");
}

TEST_CASE("server: openai: bodies that are no conversation") {
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    options.max_body_bytes = 4000;
    Serving serving(options);
    Talk talk{serving};
    CHECK(talk.send("POST", "").status == 200);  // an empty one
    for (const auto& [body, code] :
         {std::pair("[]", "400 invalid_request_error invalid_type"),
          std::pair("{", "400 invalid_request_error invalid_json"),
          std::pair(R"({"metadata":{"a":1}})", "400 invalid_request_error invalid_type metadata.a"),
          std::pair(R"({"items":1})", "400 invalid_request_error invalid_type items"),
          std::pair(R"({"items":[{"role":"x","content":"y"}]})",
                    "400 invalid_request_error invalid_value items[0].role")})
        CHECK(error_of(talk.send("POST", "", body)) == code);
    std::string many = R"({"items":[{"role":"user","content":"x"})";
    for (int i = 0; i < 20; ++i) many += R"(,{"role":"user","content":"x"})";
    CHECK(error_of(talk.send("POST", "", many + "]}")) ==
          "400 invalid_request_error array_above_max_length items");
    talk.start("{}");
    CHECK(error_of(talk.send("POST", "", "{}")) ==
          "400 invalid_request_error missing_required_parameter metadata");
    CHECK(error_of(talk.send("POST", "/items", "{}")) ==
          "400 invalid_request_error missing_required_parameter items");
    const std::string large = R"({"items":[{"role":"user","content":")" + std::string(2000, 'x') +
                              R"("}]})";
    CHECK(talk.send("POST", "/items", large).status == 200);
    CHECK(error_of(talk.send("POST", "/items", large)) ==
          "400 invalid_request_error invalid_value items");
    CHECK(talk.texts().size() == 2001);
    // Nothing of it in the other dialect.
    Serving other;
    CHECK(other.get("/v1/conversations/conv_1").status == 404);
    CHECK(other.post(with_input("x", R"("conversation":"conv_1")")).status == 400);
}

TEST_CASE("server: openai: many change one conversation at once, and nothing is lost") {
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    Serving serving(options);
    serving.fake.info.context_tokens = 4096;
    Talk talk{serving};
    const std::string id = talk.start("{}");
    std::vector<std::thread> clients;
    for (int i = 0; i < 4; ++i)
        clients.emplace_back([&] {
            for (int turn = 0; turn < 5; ++turn) {
                Talk own{serving, talk.path};
                own.send("POST", "/items", R"({"items":[{"role":"user","content":"w"}]})");
                serving.post(
                    R"({"model":"fake","input":"w","max_output_tokens":1,"conversation":")" + id +
                    "\"}");
            }
        });
    for (std::thread& client : clients) client.join();
    CHECK(parse(talk.send("GET", "/items?limit=100").body)["data"].size() == 4 * 5 * 3);
}

TEST_CASE("server: openai: a conversation that is left in a store goes on") {
    MemoryStore store;
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    options.drain_timeout_ms = 10;
    options.store = &store;
    std::string path, id, running;
    {
        Serving serving(options, true);
        Talk talk{serving};
        id = talk.start(R"({"items":[{"role":"user","content":"one"}]})");
        path = talk.path;
        running = id_of(serving.post(R"({"model":"fake","input":"two","background":true,)"
                                     R"("conversation":")" +
                                     id + "\"}"));
        REQUIRE(eventually([&] { return serving.fake.waiting().size() == 1; }));
        talk.send("POST", "/items", R"({"items":[{"role":"user","content":"later"}]})");
    }
    Serving serving(options);
    REQUIRE(eventually([&] {
        return parse(serving.get("/v1/responses/" + running).body)["status"].as_string() ==
               "completed";
    }));
    Talk talk{serving, path};  // it was answered from what stood there when it came
    CHECK(talk.texts() == "one|later|two|echo: onetwo|");
    // Like responses it expires, from its last change on.
    store.expire(store.now_ms() + 47 * 3'600'000);
    CHECK(talk.send("GET", "").status == 200);
    store.expire(store.now_ms() + 49 * 3'600'000);
    CHECK(talk.send("GET", "").status == 404);
}

TEST_CASE("server: openai: a stream that fails ends with its events") {
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    Serving serving(options);
    serving.fake.failure = detail::make_error(ErrorKind::internal, "secret", "internal_error");
    EventReader reader(serving.post(streamed(hello)).body);
    reader.check_whole();
    CHECK(reader.last["status"].as_string() == "failed");
    CHECK(reader.type(reader.events.size() - 1) == "error");
    CHECK(reader.events.back()["code"].as_string() == "server_error");
    // What is refused before it begins is an answer like any other.
    CHECK(error_of(serving.post(streamed(R"({"model":"none","input":"x"})"))) ==
          "404 not_found_error model_not_found model");
}

TEST_CASE("server: openai: a server that stops ends its streams with an event") {
    MemoryStore store;
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    options.drain_timeout_ms = 50;
    options.store = &store;
    std::string id;
    {
        Serving serving(options, true);
        HttpPeer alone(serving.server.port()), background(serving.server.port()),
            late(serving.server.port()), chats(serving.server.port());
        alone.send(raw_post(streamed(hello)));
        CHECK(alone.until("response.in_progress") != "");
        background.send(raw_post(streamed(in_background)));
        const std::string head = background.until("response.in_progress");
        id = head.substr(head.find("resp_"), 29);
        late.send("GET /v1/responses/" + id + "?stream=true HTTP/1.1\r\nHost: localhost\r\n\r\n");
        CHECK(late.until("response.in_progress") != "");
        std::string body = R"({"model":"fake","messages":[{"role":"user","content":"x"}],)"
                           R"("stream":true})";
        std::string asked = raw_post(body);
        chats.send(asked.replace(asked.find("/v1/responses"), 13, "/v1/chat/completions"));
        CHECK(chats.until("\"role\"") != "");
        serving.stop();
        // Who cannot ask for it again is told that it failed.
        const std::string end = alone.until("\r\n0\r\n\r\n");
        const size_t failed = end.find("event: response.failed"), error = end.find("event: error");
        CHECK(failed < error);
        CHECK(error < end.size());
        CHECK(end.find(R"("sequence_number":2)") < error);
        // What goes on did not fail.
        for (HttpPeer* peer : {&background, &late}) {
            const std::string rest = peer->until("\r\n0\r\n\r\n");
            CHECK(rest.find("event: error") != rest.npos);
            CHECK(rest.find("GET /v1/responses/" + id) != rest.npos);
            CHECK(rest.find(R"("sequence_number":2)") != rest.npos);
            CHECK(rest.find("response.failed") == rest.npos);
        }
        CHECK(chats.until("\r\n0\r\n\r\n").find("shutting down") != std::string::npos);
    }
    Serving again(options);
    CHECK(eventually([&] {
        return parse(again.get("/v1/responses/" + id).body)["status"].as_string() == "completed";
    }));
}

TEST_CASE("server: openai: streams that are followed, left and taken up again") {
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    Serving serving(options, true);
    serving.fake.tells_items = true;
    const auto ask = [&](const std::string& body, const std::string& fields = {}) {
        return raw_post(streamed(body),
                        "Host: localhost\r\nContent-Type: application/json\r\n" + fields);
    };
    SUBCASE("one that leaves cancels its response") {
        HttpPeer peer(serving.server.port());
        peer.send(ask(hello));
        CHECK(peer.until("response.in_progress").find("response.created") != std::string::npos);
        peer.end();
        CHECK(eventually([&] { return serving.fake.cancels == 1; }));
    }
    SUBCASE("in the background it goes on, and may be read from anywhere") {
        std::string id;
        {
            HttpPeer peer(serving.server.port());
            peer.send(ask(in_background));
            const std::string head = peer.until("response.in_progress");
            id = head.substr(head.find("resp_"), 29);
        }
        const std::string target = "/v1/responses/" + id + "?stream=true";
        HttpPeer peer(serving.server.port());
        peer.send("GET " + target + " HTTP/1.1\r\nHost: localhost\r\n\r\n");
        CHECK(peer.until("response.in_progress").find("response.created") != std::string::npos);
        serving.fake.finish(id);
        CHECK(peer.until("response.completed").find("output_text.delta") != std::string::npos);
        CHECK(serving.fake.cancels == 0);
        const std::string object = serving.get("/v1/responses/" + id).body;
        EventReader all(serving.get(target).body);
        all.check_whole();
        all.check_items();
        CHECK(all.last.write() == object);
        const auto last = static_cast<int64_t>(all.events.size()) - 1;
        for (int64_t after = 0; after < last + 3; ++after) {
            EventReader some(serving.get(target + "&starting_after=" + std::to_string(after)).body);
            REQUIRE_FALSE(some.events.empty());
            CHECK(some.events.front()["sequence_number"].as_int() == after + 1);
            CHECK(some.events.back()["response"].write() == object);
            CHECK(some.events.size() == static_cast<size_t>(std::max<int64_t>(last - after, 1)));
            for (size_t i = 0; after < last && i < some.events.size(); ++i)
                CHECK(some.events[i].write() ==
                      all.events[static_cast<size_t>(after) + 1 + i].write());
        }
        CHECK(error_of(serving.get(target + "&starting_after=x")) ==
              "400 invalid_request_error invalid_type starting_after");
    }
    SUBCASE("of one that waits all get the same opening, and then the same events") {
        serving.fake.silent = true;
        HttpPeer first(serving.server.port()), late(serving.server.port()),
            behind(serving.server.port());
        first.send(ask(Json::object()
                           .set("model", "fake")
                           .set("input", "hello")
                           .set("background", true)
                           .set("instructions", "Be brief.")
                           .set("metadata", Json::object().set("of", "all"))
                           .write()));
        const auto created = [](const std::string& text) {
            return text.substr(std::min(text.size(), text.find("event: response.created")));
        };
        const std::string opening = created(first.until("\n\n\r\n"));
        const std::string id = opening.substr(opening.find("resp_"), 29);
        const std::string line = "/v1/responses/" + id + "?stream=true";
        late.send("GET " + line + " HTTP/1.1\r\nHost: localhost\r\n\r\n");
        CHECK(created(late.until("\n\n\r\n")) == opening);
        behind.send("GET " + line + "&starting_after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n");
        CHECK(behind.until("\r\n\r\n").find("200 OK") != std::string::npos);
        serving.fake.finish(id);
        const std::string rest = first.until("\r\n0\r\n\r\n");
        CHECK(rest.find("event: response.in_progress") < rest.find("event: response.completed"));
        CHECK(late.until("\r\n0\r\n\r\n") == rest);
        CHECK(behind.until("\r\n0\r\n\r\n") == rest);
        const std::string whole = serving.get(line).body;
        CHECK(whole.substr(0, opening.size() - 2) == opening.substr(0, opening.size() - 2));
    }
    SUBCASE("one that does not read gets no more than fits, and all of it once it does") {
        serving.fake.hold = false;
        std::string words;
        for (int i = 0; i < 1200; ++i) words += std::string(9'999, 'w') + " ";
        HttpPeer slow(serving.server.port());
        slow.send(ask(Json::object().set("model", "fake").set("input", words).write()));
        REQUIRE(eventually([&] { return serving.fake.events_left() > 0; }));
        CHECK(serving.post(hello).status == 200);  // others do not wait
        CHECK(serving.fake.events_left() > 100);
        std::string body = slow.reply().body;
        EventReader reader(body);
        reader.check_whole();
        CHECK(reader.text == "echo: " + words);
    }
    SUBCASE("a repeat under its key follows what runs, and reads what ran") {
        const std::string keyed = "Idempotency-Key: one\r\n";
        HttpPeer first(serving.server.port()), second(serving.server.port());
        first.send(ask(hello, keyed));
        CHECK(first.until("response.in_progress") != "");
        second.send(ask(hello, keyed));
        CHECK(second.until("response.in_progress").find("response.created") != std::string::npos);
        REQUIRE(serving.fake.waiting().size() == 1);
        serving.fake.finish(serving.fake.waiting().front());
        const std::string end = first.until("\r\n0\r\n\r\n");
        CHECK(end.find("response.completed") != std::string::npos);
        CHECK(second.until("\r\n0\r\n\r\n").find("response.completed") != std::string::npos);
        EventReader replay(
            serving
                .call("POST", "/v1/responses", streamed(hello),
                      {{"Content-Type", "application/json"}, {"Idempotency-Key", "one"}})
                .body);
        replay.check_whole();
        CHECK(end.find(replay.last.write()) != std::string::npos);
    }
}

namespace {

/// The chunks of Chat Completions, put together as clients do.
struct ChatReader {
    std::vector<Json> chunks;
    std::string content, thoughts, finish;
    Json calls = Json::array(), usage, logprobs = Json::array(), progress = Json::array();
    bool done = false;

    explicit ChatReader(const std::string& stream) {
        for (const std::string_view one : events_of(stream)) {
            CHECK_FALSE(done);
            REQUIRE(one.substr(0, 6) == "data: ");
            if (one == "data: [DONE]") done = true;
            else add(parse(std::string(one.substr(6))));
        }
    }
    void add(Json chunk) {
        chunks.push_back(std::move(chunk));
        const Json& one = chunks.back();
        for (const char* same : {"id", "created", "model", "object"})
            CHECK(one[same].write() == chunks.front()[same].write());
        if (one.contains("prompt_progress")) {
            CHECK(one["choices"].size() + content.size() + finish.size() == 0);
            progress.push(one["prompt_progress"]);
            return;
        }
        if (one["choices"].empty()) {
            usage = one["usage"];
            return;
        }
        CHECK(finish.empty());
        const Json& delta = one["choices"][0]["delta"];
        if (chunks.size() == 1) CHECK(delta.write() == R"({"role":"assistant","content":""})");
        content += delta["content"].as_string();
        for (const Json& token : one["choices"][0]["logprobs"]["content"].items())
            logprobs.push(token);
        thoughts += delta["reasoning_content"].as_string();
        CHECK(delta["reasoning"].write() == delta["reasoning_content"].write());
        for (const Json& call : delta["tool_calls"].items()) {
            CHECK(call["index"].as_int() == static_cast<int64_t>(calls.size()));
            calls.push(call);
            calls.items().back().erase("index");
        }
        finish = one["choices"][0]["finish_reason"].as_string();
    }
};

std::string chat(const std::string& more) {
    return R"({"model":"fake","messages":[{"role":"user","content":"hello there"}])" + more + "}";
}

HttpReply post_chat(Serving& serving, const std::string& body, HttpHeaders headers = {}) {
    headers.emplace_back("Content-Type", "application/json");
    return serving.call("POST", "/v1/chat/completions", body, headers);
}

}  // namespace

TEST_CASE("server: chat completions, whole and in chunks") {
    for (const Dialect dialect : {Dialect::valar, Dialect::openai}) {
        ServerOptions options = local();
        options.dialect = dialect;
        Serving serving(options);
        for (const bool told : {false, true}) {
            serving.fake.tells_items = told;
            for (const std::string more :
                 {"", R"(,"max_completion_tokens":2)",
                  R"(,"response_format":{"type":"json_object"})",
                  R"(,"tools":[{"type":"function","function":{"name":"f","parameters":{}}}])",
                  R"(,"tools":[{"type":"custom","custom":{"name":"f"}}])"}) {
                CAPTURE(more);
                const HttpReply reply = post_chat(serving, chat(more));
                CHECK(reply.status == 200);
                const Json whole = parse(reply.body);
                const Json& choice = whole["choices"][0];
                const HttpReply stream = post_chat(
                    serving,
                    chat(more + R"(,"stream":true,"stream_options":{"include_usage":true})"));
                CHECK(field(stream, "Content-Type") == "text/event-stream");
                const ChatReader reader(stream.body);
                CHECK(reader.done);
                CHECK(reader.content == choice["message"]["content"].as_string());
                CHECK(reader.thoughts == choice["message"]["reasoning_content"].as_string());
                CHECK(reader.finish == choice["finish_reason"].as_string());
                CHECK(reader.usage.write() == whole["usage"].write());
                CHECK((reader.calls.empty() ? Json() : reader.calls).write() ==
                      choice["message"]["tool_calls"].write());
                const bool cut = more.find("max_c") != more.npos,
                           tool = more.find("tools") != more.npos;
                CHECK(reader.finish == (tool                                ? "tool_calls"
                                        : cut && dialect == Dialect::openai ? "length"
                                                                            : "stop"));
                CHECK(whole["object"].as_string() == "chat.completion");
                CHECK(reader.chunks[0]["object"].as_string() == "chat.completion.chunk");
                // Each leaves a response.
                for (const HttpReply* one : {&reply, &stream}) {
                    const Json kept = parse(
                        serving.get("/v1/responses/" + field(*one, "X-Valar-Response-Id")).body);
                    CHECK(kept["object"].as_string() == "response");
                    CHECK(kept["completed_at"].is_int());
                }
            }
        }
    }
}

TEST_CASE("server: streams tell how far the prompt is read, if they are asked to") {
    for (const bool told : {false, true}) {
        ServerOptions options = local();
        options.dialect = Dialect::openai;
        Serving serving(options);
        serving.fake.tells_items = told;
        const std::string all = R"([{"total":3,"cache":1,"processed":1},)"
                                R"({"total":3,"cache":1,"processed":3}])";
        const std::string asked = R"(,"stream":true,"stream_options":{"prompt_progress":true})";
        const ChatReader chunks(post_chat(serving, chat(asked)).body);
        CHECK(chunks.done);
        CHECK(chunks.progress.write() == all);
        CHECK(chunks.content == "echo: hello there");
        EventReader reader(
            serving.post(R"({"model":"fake","input":"hello there")" + asked + "}").body);
        reader.check_whole();
        reader.check_items();
        Json progress = Json::array();
        for (const Json& event : reader.events)
            if (event["type"].as_string() == "response.prompt_progress")
                progress.push(event["prompt_progress"]);
        CHECK(progress.write() == all);
        const std::string unasked = post_chat(serving, chat(R"(,"stream":true)")).body;
        CHECK(unasked.find("progress") == unasked.npos);
    }
    Serving serving;
    const std::string wrong = R"(,"stream":true,"stream_options":{"prompt_progress":1})";
    CHECK(error_of(post_chat(serving, chat(wrong))) ==
          "400 invalid_request_error invalid_type stream_options.prompt_progress");
}

TEST_CASE("server: chat: messages of every kind") {
    Serving serving;
    const HttpReply reply = post_chat(serving, R"({"model":"fake","messages":[
        {"role":"system","content":"S "},
        {"role":"user","content":[{"type":"text","text":"U "}],"name":"ann"},
        {"role":"assistant","content":null,"reasoning":"T ","tool_calls":[
            {"id":"c1","type":"function","function":{"name":"f","arguments":"{}"}},
            {"id":"c2","type":"custom","custom":{"name":"g","input":"x"}}]},
        {"role":"tool","tool_call_id":"c1","content":"R1 "},
        {"role":"tool","tool_call_id":"c2","content":[{"type":"text","text":"R2 "}]},
        {"role":"assistant","content":"A"}]})");
    CHECK(parse(reply.body)["choices"][0]["message"]["content"].as_string() ==
          "echo: S U T R1 R2 A");
    const Json kept = parse(
        serving.get("/v1/responses/" + field(reply, "X-Valar-Response-Id")).body);
    std::string kinds;
    for (const Json& item : kept["input"].items())
        kinds += std::string(item["type"].as_string("message")) + " ";
    CHECK(kinds ==
          "message message reasoning function_call custom_tool_call function_call_output "
          "custom_tool_call_output message ");
}

TEST_CASE("server: chat: refusals name the fields as its clients know them") {
    ServerOptions options = local();
    Serving valar_dialect(options);
    options.dialect = Dialect::openai;
    Serving openai(options);
    const std::pair<std::string, const char*> cases[] = {
        {R"({"messages":[]})", "missing_required_parameter model"},
        {R"({"model":"fake"})", "missing_required_parameter messages"},
        {R"({"model":"fake","messages":[]})", "array_below_min_length messages"},
        {R"({"model":"fake","messages":"x"})", "invalid_type messages"},
        {R"({"model":"fake","messages":[1]})", "invalid_type messages[0]"},
        {R"({"model":"fake","messages":[{"role":"user"}]})",
         "missing_required_parameter messages[0].content"},
        {R"({"model":"fake","messages":[{"role":"assistant","content":"a","reasoning":"t"},
            {"role":"nobody","content":"x"}]})",
         "invalid_value messages[1].role"},
        {R"({"model":"fake","messages":[{"role":"tool","tool_call_id":"c","content":"x"}]})",
         "invalid_value messages[0].tool_call_id"},
        {chat(R"(,"max_completion_tokens":0)"), "integer_below_min_value max_completion_tokens"},
        {chat(R"(,"n":2)"), "unsupported_value n"},
        {chat(R"(,"modalities":["audio"])"), "unsupported_value modalities"},
        {chat(R"(,"stream":1)"), "invalid_type stream"},
        {chat(R"(,"audio":{})"), "unsupported_parameter audio"},
        {chat(R"(,"response_format":{"type":"xml"})"), "invalid_value response_format.type"},
        {chat(R"(,"reasoning_effort":"huge")"), "invalid_value reasoning_effort"},
        {chat(R"(,"temperature":3)"), "decimal_above_max_value temperature"},
        {chat(R"(,"tools":[{"type":"function","function":{"name":"a b"}}])"),
         "invalid_value tools[0].function.name"},
        {chat(R"(,"tools":[{"type":"custom","custom":{"name":"f","format":{"type":"x"}}}])"),
         "invalid_value tools[0].custom.format.type"},
        {chat(R"(,"tools":[{"type":"mcp"}])"), "unsupported_value tools[0].type"},
        {chat(R"(,"response_format":{"type":"json_schema","json_schema":{"name":"a b"}})"),
         "invalid_value response_format.json_schema.name"},
        {R"({"model":"fake","messages":[{"role":"user","content":"x"},{"role":"assistant",
            "tool_calls":[{"id":"c","type":"function","function":{"arguments":"{}"}}]}]})",
         "missing_required_parameter messages[1].tool_calls[0].function.name"},
        {R"({"model":"fake","messages":[{"role":"user","content":"x"},{"role":"assistant",
            "tool_calls":[{"type":"function","function":{"name":"f","arguments":"{}"}}]}]})",
         "missing_required_parameter messages[1].tool_calls[0].id"},
    };
    for (const auto& [body, code] : cases) {
        const std::string& given = body;
        CAPTURE(given);
        for (Serving* serving : {&valar_dialect, &openai})
            CHECK(error_of(post_chat(*serving, body)) ==
                  "400 invalid_request_error " + std::string(code));
    }
    for (const char* more : {R"(,"stop":"x")", R"(,"max_tokens":5)", R"(,"logprobs":true)",
                             R"(,"presence_penalty":1)", R"(,"logit_bias":{"1":2})"}) {
        CAPTURE(more);
        CHECK(post_chat(valar_dialect, chat(more)).status == 400);
        CHECK(post_chat(openai, chat(more)).status == 200);
    }
    for (const bool told : {false, true}) {
        openai.fake.tells_items = told;
        const std::string more = R"(,"logprobs":true,"top_logprobs":2)";
        const Json whole = parse(post_chat(openai, chat(more)).body);
        const ChatReader reader(post_chat(openai, chat(more + R"(,"stream":true)")).body);
        CHECK(reader.logprobs.size() == 3);
        CHECK(reader.logprobs.write() == whole["choices"][0]["logprobs"]["content"].write());
    }
}

TEST_CASE("server: chat: what was asked stands in the response that is kept") {
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    Serving serving(options);
    const HttpReply reply = post_chat(serving, chat(R"(,"max_tokens":7,"seed":5,"top_p":0.5,
        "reasoning_effort":"low","parallel_tool_calls":false,"frequency_penalty":0.5,
        "metadata":{"a":"b"},"tool_choice":{"type":"function","function":{"name":"f"}},
        "response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{"type":"object"},
        "strict":true}},"tools":[{"type":"function","function":{"name":"f","parameters":{}}}])"));
    REQUIRE(reply.status == 200);
    const Json kept = parse(
        serving.get("/v1/responses/" + field(reply, "X-Valar-Response-Id")).body);
    CHECK(kept["max_output_tokens"].as_int() == 7);
    CHECK(kept["top_p"].as_double() == 0.5);
    CHECK(kept["reasoning"]["effort"].as_string() == "low");
    CHECK_FALSE(kept["parallel_tool_calls"].as_bool(true));
    CHECK(kept["frequency_penalty"].as_double() == 0.5);
    CHECK(kept["metadata"]["a"].as_string() == "b");
    CHECK(kept["tool_choice"].write() == R"({"type":"function","name":"f"})");
    CHECK(kept["text"]["format"]["schema"].write() == R"({"type":"object"})");
    CHECK(kept["text"]["format"]["strict"].as_bool());
    CHECK_FALSE(kept["tools"][0]["strict"].as_bool(true));
}

namespace {

HttpReply complete(Serving& serving, const std::string& more, HttpHeaders headers = {}) {
    headers.emplace_back("Content-Type", "application/json");
    return serving.call("POST", "/v1/completions", R"({"model":"fake",)" + more + "}", headers);
}

/// The chunks of a legacy completion, put together; `logprobs` of all of them.
struct CompletionReader {
    std::string text, finish;
    Json usage, tokens = Json::array(), offsets = Json::array();
    bool done = false;

    explicit CompletionReader(const std::string& stream) {
        for (const std::string_view one : events_of(stream)) {
            CHECK_FALSE(done);
            REQUIRE(one.substr(0, 6) == "data: ");
            if (one == "data: [DONE]") done = true;
            else add(parse(std::string(one.substr(6))));
        }
    }
    void add(const Json& chunk) {
        CHECK(chunk["object"].as_string() == "text_completion");
        if (chunk["choices"].empty()) {
            usage = chunk["usage"];
            return;
        }
        CHECK(finish.empty());
        const Json& choice = chunk["choices"][0];
        text += choice["text"].as_string();
        finish = choice["finish_reason"].as_string();
        for (const Json& token : choice["logprobs"]["tokens"].items()) tokens.push(token);
        for (const Json& at : choice["logprobs"]["text_offset"].items()) offsets.push(at);
    }
};

}  // namespace

TEST_CASE("server: openai: legacy completions, whole and in chunks") {
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    Serving serving(options);
    for (const bool told : {false, true}) {
        serving.fake.tells_items = told;
        for (const std::string more :
             {R"("prompt":"ab cd")", R"("prompt":["ab cd"],"max_tokens":2)",
              R"("prompt":"ab cd","echo":true)", R"("prompt":[1,2,3])", R"("prompt":[[1,2]])",
              R"("prompt":"ab cd","logprobs":2)", R"("prompt":"","suffix":"x","n":1)"}) {
            CAPTURE(more);
            const HttpReply reply = complete(serving, more);
            REQUIRE_MESSAGE(reply.status == 200, reply.body);
            const Json whole = parse(reply.body);
            CHECK(whole["object"].as_string() == "text_completion");
            CHECK(whole["id"].as_string().substr(0, 5) == "cmpl_");
            const Json& choice = whole["choices"][0];
            const HttpReply stream = complete(
                serving, more + R"(,"stream":true,"stream_options":{"include_usage":true})");
            const CompletionReader reader(stream.body);
            CHECK(reader.done);
            CHECK(reader.text == choice["text"].as_string());
            CHECK(reader.finish == choice["finish_reason"].as_string());
            CHECK(reader.usage.write() == whole["usage"].write());
            if (!choice["logprobs"].is_null()) {
                CHECK(reader.tokens.write() == choice["logprobs"]["tokens"].write());
                CHECK(reader.offsets.write() == "[0,6,9]");
                CHECK(reader.offsets.write() == choice["logprobs"]["text_offset"].write());
                CHECK(choice["logprobs"]["top_logprobs"][0].size() == 1);  // of one text alone
            }
            CHECK(choice["logprobs"].is_null() == (more.find("logprobs") == more.npos));
            CHECK(serving.get("/v1/responses/" + field(stream, "X-Valar-Response-Id")).status ==
                  200);
        }
    }
    const auto text_of = [&](const std::string& more) {
        return std::string(parse(complete(serving, more).body)["choices"][0]["text"].as_string());
    };
    CHECK(text_of(R"("prompt":"ab cd")") == "echo: ab cd");
    CHECK(text_of(R"("prompt":"ab cd","echo":true)") == "ab cdecho: ab cd");
    CHECK(text_of(R"("prompt":"ab cd","max_tokens":1)") == "echo: ");
    CHECK(text_of(R"("prompt":[7,8],"suffix":"s")") == "echo: [7,8]raw 7 8 s");
    std::string long_prompt = R"("prompt":")";
    for (int i = 0; i < 40; ++i) long_prompt += "w ";
    CHECK(
        parse(complete(serving, long_prompt + "\"").body)["usage"]["completion_tokens"].as_int() ==
        16);
    // A repeat is the same bytes, with its echo.
    const HttpHeaders keyed = {{"Idempotency-Key", "legacy"}};
    const HttpReply first = complete(serving, R"("prompt":"k","echo":true)", keyed);
    const HttpReply second = complete(serving, R"("prompt":"k","echo":true)", keyed);
    CHECK(first.body == second.body);
    CHECK(field(second, "Idempotent-Replayed") == "true");

    for (const auto& [more, error] :
         {std::pair(R"("prompt":["a","b"])", "unsupported_value prompt"),
          std::pair(R"("prompt":{})", "invalid_type prompt"),
          std::pair(R"("prompt":[1,"a"])", "invalid_type prompt[1]"),
          std::pair(R"("prompt":[-1])", "invalid_type prompt[0]"),
          std::pair(R"("suffix":"x")", "missing_required_parameter prompt"),
          std::pair(R"("prompt":"x","suffix":1)", "invalid_type suffix"),
          std::pair(R"("prompt":"x","n":2)", "unsupported_value n"),
          std::pair(R"("prompt":"x","max_tokens":0)", "integer_below_min_value max_tokens"),
          std::pair(R"("prompt":"x","logprobs":21)", "integer_above_max_value logprobs"),
          std::pair(R"("prompt":"x","echo":true,"logprobs":1)", "unsupported_value echo")})
        CHECK(error_of(complete(serving, more)) ==
              "400 invalid_request_error " + std::string(error));
    Serving other;
    CHECK(complete(other, R"("prompt":"x")").status == 404);
}

TEST_CASE("server: openai: a completion that a restart cut is the same prompt again") {
    MemoryStore store;
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    options.drain_timeout_ms = 10;
    options.store = &store;
    std::string id;
    {
        Serving serving(options, true);
        HttpPeer peer(serving.server.port());
        const std::string body = R"({"model":"fake","prompt":[7],"stream":true})";
        std::string asked = raw_post(body, "Host: localhost\r\nIdempotency-Key: k\r\n");
        peer.send(asked.replace(asked.find("/v1/responses"), 13, "/v1/completions"));
        REQUIRE(eventually([&] { return serving.fake.waiting().size() == 1; }));
        id = serving.fake.waiting()[0];
        serving.stop();
        CHECK(peer.until("\r\n0\r\n\r\n").find("shutting down") != std::string::npos);
    }
    Serving serving(options);
    Json object;
    REQUIRE(eventually([&] {
        object = parse(serving.get("/v1/responses/" + id).body);
        return object["status"].as_string() == "completed";
    }));
    CHECK(object["output"][0]["content"][0]["text"].as_string() == "echo: [7]raw 7 ");
}

TEST_CASE("server: openai: GET of a chat that runs shows the events of its response") {
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    Serving serving(options, true);
    HttpPeer asks(serving.server.port());
    const std::string body = chat(R"(,"stream":true)");
    asks.send(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: k\r\n"
        "Content-Type: application/json\r\nContent-Length: " +
        std::to_string(body.size()) + "\r\n\r\n" + body);
    const std::string head = asks.until("\"assistant\"");
    const std::string id = head.substr(head.find("resp_"), 29);
    HttpPeer looks(serving.server.port());
    looks.send("GET /v1/responses/" + id + "?stream=true HTTP/1.1\r\nHost: localhost\r\n\r\n");
    CHECK(looks.until("\r\n\r\n").find("text/event-stream") != std::string::npos);
    serving.fake.finish(id);
    CHECK(asks.until("[DONE]").find("echo") != std::string::npos);
    const std::string shown = looks.until("\r\n0\r\n\r\n");
    CHECK(shown.find("event: response.created") != std::string::npos);
    CHECK(shown.find("event: response.completed") != std::string::npos);
    CHECK(shown.find("chat.completion.chunk") == std::string::npos);
}

TEST_CASE("server: chat: what fails, what takes too long, what is asked again") {
    ServerOptions options = local();
    options.sync_timeout_ms = 200;
    Serving serving(options, true);
    const HttpReply late = post_chat(serving, chat(""));
    CHECK(error_of(late) == "408 timeout_error timeout");
    CHECK(field(late, "x-should-retry") == "false");
    serving.fake.hold = false;
    const HttpHeaders key = {{"Idempotency-Key", "k"}};
    const HttpReply first = post_chat(serving, chat(""), key);
    const HttpReply again = post_chat(serving, chat(""), key);
    CHECK(field(again, "Idempotent-Replayed") == "true");
    CHECK(first.body == again.body);
    const HttpHeaders stream_key = {{"Idempotency-Key", "s"}};
    const std::string streamed_chat = chat(R"(,"stream":true)");
    const ChatReader one(post_chat(serving, streamed_chat, stream_key).body);
    const ChatReader two(post_chat(serving, streamed_chat, stream_key).body);
    CHECK(one.content == two.content);
    CHECK(two.done);
    CHECK(one.chunks[0].write() == two.chunks[0].write());
    serving.fake.failure = detail::make_error(ErrorKind::internal, "secret");
    CHECK(error_of(post_chat(serving, chat(""))) == "500 api_error internal_error");
    const std::string failed = post_chat(serving, streamed_chat).body;
    CHECK(failed.find("data: {\"error\":") != failed.npos);
    CHECK(failed.find("[DONE]") == failed.npos);
    CHECK(failed.find("secret") == failed.npos);
}

namespace {

/// The events of Messages, put together as Anthropic's clients do, and checked against the order in
/// which a client may see them.
struct MessagesReader {
    Json message;       // as it grows
    Json error;         // of the event that ended it
    std::string ended;  // by which event
    size_t blocks = 0;

    explicit MessagesReader(const std::string& stream) {
        for (const std::string_view one : events_of(stream)) {
            const size_t line = one.find('\n');
            REQUIRE(one.substr(0, 7) == "event: ");
            REQUIRE(one.substr(line + 1, 6) == "data: ");
            const Json event = parse(std::string(one.substr(line + 7)));
            CHECK(event["type"].as_string() == one.substr(7, line - 7));
            add(event);
        }
        CHECK_FALSE(ended.empty());
    }

private:
    Json block_;
    std::string partial_;
    bool open_ = false, over_ = false;

    void add(const Json& event) {
        const std::string type(event["type"].as_string());
        CAPTURE(type);
        CHECK(ended.empty());
        if (type == "ping") return;
        if (type == "error") {
            ended = type;
            error = event["error"];
        } else if (type == "message_start") {
            CHECK(message.is_null());
            message = event["message"];
            CHECK(message["content"].write() == "[]");
            CHECK((message["stop_reason"].is_null() && message["stop_sequence"].is_null()));
            CHECK(message["usage"]["input_tokens"].as_int() > 0);
        } else if (type.starts_with("content_block_")) {
            add_block(type, event);
        } else if (type == "message_delta") {
            CHECK_FALSE((open_ || std::exchange(over_, true)));
            for (const JsonMember& member : event["delta"].members())
                message.set(member.key, member.value);
            message.set("usage", event["usage"]);
        } else {
            CHECK(type == "message_stop");
            CHECK(over_);
            ended = type;
        }
    }
    void add_block(const std::string& type, const Json& event) {
        REQUIRE(message.is_object());
        CHECK_FALSE(over_);
        CHECK(event["index"].as_int() == static_cast<int64_t>(blocks));
        const bool start = type == "content_block_start";
        CHECK(open_ == !start);
        open_ = type != "content_block_stop";
        if (start) {
            block_ = event["content_block"];
            partial_.clear();
        } else if (open_) {
            add_delta(event["delta"]);
        } else {
            end_block();
        }
    }
    void add_delta(const Json& delta) {
        static const std::vector<std::array<std::string, 3>> kinds = {
            {"text", "text_delta", "text"},
            {"thinking", "thinking_delta", "thinking"},
            {"thinking", "signature_delta", "signature"},
            {"tool_use", "input_json_delta", "partial_json"}};
        bool known = false;
        for (const auto& [block, kind, key] : kinds) {
            if (block != block_["type"].as_string() || kind != delta["type"].as_string()) continue;
            known = true;
            CHECK_FALSE(delta[key].as_string().empty());
            CHECK(block_["signature"].as_string().empty());  // it comes last
            if (key == "partial_json") partial_ += delta[key].as_string();
            else block_.set(key, join_text(block_[key], delta[key]));
        }
        CHECK(known);
    }
    static std::string join_text(const Json& one, const Json& other) {
        return std::string(one.as_string()) + std::string(other.as_string());
    }
    void end_block() {
        ++blocks;
        if (block_["type"].as_string() == "thinking")
            CHECK_FALSE(block_["signature"].as_string().empty());
        if (block_["type"].as_string() == "tool_use") {
            CHECK(block_["input"].write() == "{}");
            block_.set("input", parse(partial_));
        }
        message.find("content")->push(block_);
    }
};

std::string message_body(const std::string& more, const char* content = R"("hello there")") {
    const bool limited = more.find("max_tokens") != more.npos;
    return R"({"model":"fake","messages":[{"role":"user","content":)" + std::string(content) +
           "}]" + (limited ? "" : R"(,"max_tokens":50)") + more + "}";
}

HttpReply post_message(Serving& serving, const std::string& body, HttpHeaders headers = {},
                       const char* below = "") {
    headers.emplace_back("Content-Type", "application/json");
    headers.emplace_back("anthropic-version", "2023-06-01");
    return serving.call("POST", "/v1/messages" + std::string(below), body, headers);
}

/// Without what differs from one answer to the next.
std::string without_id(Json message) { return message.set("id", "").write(); }

}  // namespace

TEST_CASE("server: messages, whole and in events") {
    ServerOptions options = local();
    Serving plain(options);
    options.dialect = Dialect::openai;
    Serving serving(options);
    const std::string tools =
        R"(,"tools":[{"name":"f","input_schema":{"type":"object"},"cache_control":{"type":"ephemeral"}},
            {"type":"custom","name":"g","description":"d","input_schema":{}}])";
    for (const bool told : {false, true}) {
        serving.fake.tells_items = plain.fake.tells_items = told;
        for (const auto& [more, reason, types] :
             {std::array<std::string, 3>{"", "end_turn", "text "},
              {R"(,"max_tokens":2)", "max_tokens", "text "},
              {R"(,"stop_sequences":["nope"," th"])", "stop_sequence", "text "},
              {R"(,"stop_sequences":["echo"])", "stop_sequence", ""},
              {tools, "tool_use", "thinking tool_use tool_use "},
              {tools + R"(,"tool_choice":{"type":"any","disable_parallel_tool_use":true})",
               "tool_use", "thinking tool_use "}}) {
            const std::string& fields = more;
            CAPTURE(fields);
            const std::string body = message_body(more);
            const HttpReply reply = post_message(serving, body);
            REQUIRE(reply.status == 200);
            const Json whole = parse(reply.body);
            CHECK(whole["type"].as_string() == "message");
            CHECK(whole["role"].as_string() == "assistant");
            CHECK(whole["model"].as_string() == "fake");
            CHECK(whole["id"].as_string().substr(0, 4) == "msg_");
            CHECK(whole["stop_reason"].as_string() == reason);
            CHECK(whole["stop_sequence"].is_null() == (reason != "stop_sequence"));
            CHECK(whole["usage"]["cache_read_input_tokens"].is_int());
            std::string seen;
            for (const Json& block : whole["content"].items())
                seen += std::string(block["type"].as_string()) + " ";
            CHECK(seen == types);
            CHECK(without_id(parse(post_message(plain, body).body)) == without_id(whole));

            const HttpReply stream = post_message(serving, message_body(more + R"(,"stream":true)"),
                                                  {}, "?beta=true");
            CHECK(field(stream, "Content-Type") == "text/event-stream");
            CHECK(stream.body.substr(0, 20) == "event: message_start");
            const MessagesReader reader(stream.body);
            CHECK(reader.ended == "message_stop");
            CHECK(without_id(reader.message) == without_id(whole));
            for (const HttpReply* one : {&reply, &stream}) {
                CHECK(field(*one, "request-id") == field(*one, "X-Request-ID"));
                const std::string id = field(*one, "X-Valar-Response-Id");
                const Json kept = parse(serving.get("/v1/responses/" + id).body);
                CHECK(kept["object"].as_string() == "response");
                CHECK(kept["stopped_by"].write() == whole["stop_sequence"].write());
            }
        }
    }
    CHECK(error_of(post_message(plain, message_body(R"(,"stream":true)"))) ==
          "400 invalid_request_error unsupported_value stream");
    CHECK(post_message(plain, message_body(R"(,"stream":false)")).status == 200);
}

TEST_CASE("server: messages: blocks of every kind") {
    Serving serving;
    const HttpReply reply = post_message(serving, R"({"model":"fake","max_tokens":50,
        "system":[{"type":"text","text":"x-anthropic-billing-header: cc_version=2; cch=1a2b3;"},
            {"type":"text","text":"S cch=12345;","cache_control":{"type":"ephemeral"}}],
        "messages":[
        {"role":"user","content":[{"type":"text","text":"A "},{"type":"text","text":"B "}]},
        {"role":"assistant","content":[{"type":"thinking","thinking":"T ","signature":"s"},
            {"type":"redacted_thinking","data":"x"},{"type":"text","text":"C "},
            {"type":"tool_use","id":"c1","name":"f","input":{"a":1}},
            {"type":"tool_use","id":"c2","name":"g","input":{}}]},
        {"role":"user","content":[
            {"type":"tool_result","tool_use_id":"c1","content":"R1 "},
            {"type":"tool_result","tool_use_id":"c2","is_error":true,
             "content":[{"type":"text","text":"R2 "}]},
            {"type":"text","text":"D"}]},
        {"role":"system","content":" E"}]})");
    REQUIRE(reply.status == 200);
    CHECK(parse(reply.body)["content"][0]["text"].as_string() == "echo: A B T C R1 Error: R2 D E");
    const Json kept = parse(
        serving.get("/v1/responses/" + field(reply, "X-Valar-Response-Id")).body);
    CHECK(kept["instructions"].as_string() ==
          "x-anthropic-billing-header: cc_version=2; cch=00000;\nS cch=12345;");
    std::string kinds;
    for (const Json& item : kept["input"].items())
        kinds += std::string(item["type"].as_string("message")) + " ";
    CHECK(kinds ==
          "message reasoning message function_call function_call function_call_output "
          "function_call_output message message ");
    CHECK(kept["input"][3]["arguments"].as_string() == R"({"a":1})");
}

TEST_CASE("server: messages: refusals name the fields as its clients know them") {
    ServerOptions options = local();
    Serving valar_dialect(options);
    options.dialect = Dialect::openai;
    Serving openai(options);
    const auto turn = [](const std::string& block) {
        return message_body("", ("[" + block + "]").c_str());
    };
    const std::pair<std::string, const char*> cases[] = {
        {R"({"max_tokens":1,"messages":[]})", "missing_required_parameter model"},
        {R"({"model":"fake","messages":[]})", "missing_required_parameter max_tokens"},
        {R"({"model":"fake","max_tokens":1})", "missing_required_parameter messages"},
        {R"({"model":"fake","max_tokens":1,"messages":[]})", "array_below_min_length messages"},
        {R"({"model":"fake","max_tokens":1,"messages":7})", "invalid_type messages"},
        {R"({"model":"fake","max_tokens":0,"messages":[{"role":"user","content":"x"}]})",
         "integer_below_min_value max_tokens"},
        {R"({"model":"fake","max_tokens":1,"messages":[{"role":"tool","content":"x"}]})",
         "invalid_value messages[0].role"},
        {R"({"model":"fake","max_tokens":1,"messages":[{"role":"user"}]})",
         "missing_required_parameter messages[0].content"},
        {R"({"model":"fake","max_tokens":1,"messages":[{"role":"user","content":"x"},
            {"role":"assistant","content":"{"}]})",
         "unsupported_value messages[1].role"},
        {R"({"model":"fake","max_tokens":1,"messages":[{"role":"user","content":"x"},
            {"role":"assistant","content":[{"type":"tool_use","name":"f","input":{}}]},
            {"role":"user","content":"y"}]})",
         "missing_required_parameter messages[1].content[0].id"},
        {R"({"model":"fake","max_tokens":1,"messages":[{"role":"user","content":"x"},
            {"role":"assistant","content":[{"type":"text","text":"a"},
                {"type":"tool_use","id":"c","name":"f","input":"no"}]},
            {"role":"user","content":"y"}]})",
         "invalid_type messages[1].content[1].input"},
        {turn("1"), "invalid_type messages[0].content[0]"},
        {turn(R"({"text":"x"})"), "missing_required_parameter messages[0].content[0].type"},
        {turn(R"({"type":"text"})"), "missing_required_parameter messages[0].content[0].text"},
        {turn(R"({"type":"text","text":"a"},{"type":"image","source":{}})"),
         "unsupported_value messages[0].content[1].type"},
        {turn(R"({"type":"tool_use","id":"c","name":"f","input":{}})"),
         "invalid_value messages[0].content[0].type"},
        {turn(R"({"type":"text","text":"a"},{"type":"tool_result","tool_use_id":"c"})"),
         "invalid_value messages[0].content[1].tool_use_id"},
        {turn(R"({"type":"tool_result","tool_use_id":"c","content":[{"type":"image"}]})"),
         "unsupported_value messages[0].content[0].content[0].type"},
        {message_body(R"(,"system":[{"type":"image"}])"), "unsupported_value system[0].type"},
        {message_body(R"(,"system":7)"), "invalid_type system"},
        {message_body(R"(,"stream":1)"), "invalid_type stream"},
        {message_body(R"(,"temperature":3)"), "decimal_above_max_value temperature"},
        {message_body(R"(,"stop_sequences":[1])"), "invalid_type stop_sequences[0]"},
        {message_body(R"(,"tools":[{"type":"web_search_20250305","name":"web_search"}])"),
         "unsupported_value tools[0].type"},
        {message_body(R"(,"tools":[{"name":"a b","input_schema":{}}])"),
         "invalid_value tools[0].name"},
        {message_body(R"(,"tools":[{"name":"f","input_schema":3}])"),
         "invalid_type tools[0].input_schema"},
        {message_body(R"(,"tool_choice":"auto")"), "invalid_type tool_choice"},
        {message_body(R"(,"tool_choice":{"type":"required"})"), "invalid_value tool_choice.type"},
        {message_body(R"(,"tool_choice":{"type":"any"})"), "invalid_value tool_choice"},
        {message_body(R"(,"tool_choice":{"type":"tool","name":"f"})"),
         "invalid_value tool_choice.name"},
        {message_body(R"(,"tool_choice":{"type":"auto","disable_parallel_tool_use":1})"),
         "invalid_type tool_choice.disable_parallel_tool_use"},
        {message_body(R"(,"thinking":{"type":"on"})"), "invalid_value thinking.type"},
        {message_body(R"(,"thinking":{"type":"enabled"})"),
         "missing_required_parameter thinking.budget_tokens"},
        {message_body(R"(,"thinking":{"type":"enabled","budget_tokens":1023})"),
         "integer_below_min_value thinking.budget_tokens"},
        {message_body(R"(,"output_config":{"effort":"huge"})"),
         "invalid_value output_config.effort"},
        {message_body(R"(,"output_config":{"format":{"type":"xml"}})"),
         "invalid_value output_config.format.type"},
        {message_body(R"(,"output_config":{"format":{"type":"json_schema","schema":1}})"),
         "invalid_type output_config.format.schema"},
        {message_body(R"(,"metadata":{"user_id":7})"), "invalid_type metadata.user_id"},
        {message_body(R"(,"service_tier":"flex")"), "invalid_value service_tier"},
        {message_body(R"(,"mcp_servers":[])"), "unsupported_parameter mcp_servers"},
    };
    for (const auto& [body, code] : cases) {
        const std::string& given = body;
        CAPTURE(given);
        for (Serving* serving : {&valar_dialect, &openai}) {
            const HttpReply reply = post_message(*serving, body);
            CHECK(error_of(reply) == "400 invalid_request_error " + std::string(code));
            const Json envelope = parse(reply.body);
            CHECK(envelope["error"]["message"].as_string().size() > 10);
            const bool anthropic = serving == &openai;
            CHECK(envelope["type"].write() == (anthropic ? "\"error\"" : "null"));
            CHECK(envelope.contains("request_id") == anthropic);
        }
    }
    CHECK(error_of(post_message(openai, R"({"model":"none","max_tokens":1,"messages":[
        {"role":"user","content":"x"}]})")) == "404 not_found_error model_not_found model");
    CHECK(error_of(openai.call("GET", "/v1/messages")).substr(0, 4) == "405 ");
    // What the loops of tools in Anthropic's clients want to read before they do without.
    for (Serving* serving : {&valar_dialect, &openai}) {
        const HttpReply thread = post_message(*serving,
                                              message_body(R"(,"thread":{"type":"create"})"));
        CHECK(thread.status == 400);
        CHECK(parse(thread.body)["error"]["details"].write() ==
              R"({"error_code":"thread_unsupported_request","unsupported":["thread"]})");
    }
    openai.fake.full = true;
    const HttpReply full = post_message(openai, message_body(""));
    CHECK(full.status == 503);
    CHECK(parse(full.body)["error"]["type"].as_string() == "overloaded_error");
}

TEST_CASE("server: messages: what was asked stands in the response that is kept") {
    Serving serving;
    const auto kept = [&](const std::string& more) {
        const HttpReply reply = post_message(serving, message_body(more));
        REQUIRE_MESSAGE(reply.status == 200, reply.body);
        return parse(serving.get("/v1/responses/" + field(reply, "X-Valar-Response-Id")).body);
    };
    const Json one = kept(R"(,"top_p":0.5,"top_k":3,"seed":5,"system":"be brief",
        "metadata":{"user_id":"ann","a":"b"},"service_tier":"standard_only","unheard_of":{},
        "tools":[{"name":"f","description":"d","input_schema":{"type":"object"},"strict":true},
            {"name":"g","input_schema":{"type":"object"}}],
        "tool_choice":{"type":"tool","name":"f"},"output_config":{"effort":"max","format":
            {"type":"json_schema","schema":{"type":"object"}}})");
    CHECK(one["max_output_tokens"].as_int() == 50);
    CHECK(one["top_p"].as_double() == 0.5);
    CHECK(one["instructions"].as_string() == "be brief");
    CHECK(one["user"].as_string() == "ann");
    CHECK(one["metadata"].write() == R"({"a":"b"})");
    CHECK(one["tool_choice"].write() == R"({"type":"function","name":"f"})");
    CHECK(one["tools"][0]["parameters"].write() == R"({"type":"object"})");
    CHECK(one["tools"][0]["strict"].as_bool());
    CHECK_FALSE(one["tools"][1]["strict"].as_bool(true));
    CHECK(one["text"]["format"]["strict"].as_bool());
    CHECK(one["reasoning"]["effort"].as_string() == "xhigh");
    const std::pair<const char*, const char*> efforts[] = {
        {R"(,"thinking":{"type":"enabled","budget_tokens":1024})", "medium"},
        {R"(,"thinking":{"type":"enabled","budget_tokens":16383})", "high"},
        {R"(,"thinking":{"type":"enabled","budget_tokens":16384})", "xhigh"},
        {R"(,"thinking":{"type":"disabled"},"output_config":{"effort":"low"})", "none"},
        {R"(,"output_config":{"effort":"low"},"thinking":{"type":"disabled"})", "none"},
        {R"(,"thinking":{"type":"adaptive"},"output_config":{"effort":"low"})", "low"},
    };
    for (const auto& [more, effort] : efforts) {
        const std::string fields = more;
        CAPTURE(fields);
        CHECK(kept(fields)["reasoning"]["effort"].as_string() == effort);
    }
    CHECK(kept(R"(,"thinking":{"type":"adaptive"})")["reasoning"]["effort"].is_null());
}

TEST_CASE("server: messages: keys, counts, what fails, what takes too long, what is asked again") {
    ServerOptions options = with_keys();
    options.sync_timeout_ms = 200;
    options.dialect = Dialect::openai;
    Serving serving(options, true);
    const HttpHeaders key = {{"X-Api-Key", key_a}};
    CHECK(error_of(post_message(serving, message_body(""))) ==
          "401 authentication_error invalid_api_key");
    CHECK(error_of(post_message(serving, message_body(""),
                                {{"x-api-key", "sk-not-one-of-ours-at-all"}})) ==
          "401 authentication_error invalid_api_key");
    const HttpReply late = post_message(serving, message_body(""), key);
    CHECK(error_of(late) == "408 timeout_error timeout");
    CHECK(field(late, "x-should-retry") == "false");
    serving.fake.hold = false;

    const auto count = [&](const std::string& body) {
        return post_message(serving, body, key, "/count_tokens");
    };
    const HttpReply counted = count(R"({"model":"fake","messages":[{"role":"user",
        "content":"hello there"}]})");
    CHECK(
        counted.body ==
        Json::object()
            .set("input_tokens",
                 parse(post_message(serving, message_body(""), key).body)["usage"]["input_tokens"])
            .write());
    CHECK(field(counted, "request-id") != "");
    CHECK(error_of(count(R"({"model":"fake"})")) ==
          "400 invalid_request_error missing_required_parameter messages");
    CHECK(error_of(count(R"({"model":"none","messages":[{"role":"user","content":"x"}]})")) ==
          "404 not_found_error model_not_found model");
    CHECK(error_of(count("{")).substr(0, 4) == "400 ");
    const HttpReply input = serving.call(
        "POST", "/v1/responses/input_tokens", R"({"model":"fake","input":"hello there"})",
        {{"Authorization", "Bearer " + std::string(key_a)}, {"Content-Type", "application/json"}});
    CHECK(input.body == R"({"object":"response.input_tokens",)" + counted.body.substr(1));

    HttpHeaders once = key;
    once.emplace_back("Anthropic-Idempotency-Key", "k");
    const HttpReply first = post_message(serving, message_body(R"(,"stop_sequences":["e "])"),
                                         once);
    const HttpReply again = post_message(serving, message_body(R"(,"stop_sequences":["e "])"),
                                         once);
    CHECK(field(again, "Idempotent-Replayed") == "true");
    CHECK(first.body == again.body);
    HttpHeaders twice = key;
    twice.emplace_back("Idempotency-Key", "s");
    const std::string streamed_ask = message_body(R"(,"stream":true,"stop_sequences":["e "])");
    const MessagesReader one(post_message(serving, streamed_ask, twice).body);
    const MessagesReader two(post_message(serving, streamed_ask, twice).body);
    CHECK(one.message.write() == two.message.write());
    CHECK(without_id(one.message) == without_id(parse(first.body)));

    serving.fake.failure = detail::make_error(ErrorKind::internal, "secret");
    CHECK(error_of(post_message(serving, message_body(""), key)) == "500 api_error internal_error");
    const MessagesReader failed(post_message(serving, message_body(R"(,"stream":true)"), key).body);
    CHECK(failed.ended == "error");
    CHECK(failed.error["type"].as_string() == "api_error");
    CHECK(failed.error["message"].as_string().find("secret") == std::string_view::npos);
}

TEST_CASE("server: openai: store:false leaves nothing, previous_response_id goes on") {
    ServerOptions options = local();
    options.dialect = Dialect::openai;
    Serving serving(options);
    const HttpReply unkept = serving.post(R"({"model":"fake","input":"x","store":false})");
    CHECK(unkept.status == 200);
    CHECK(parse(unkept.body)["store"].as_bool(true) == false);
    CHECK(serving.get("/v1/responses/" + id_of(unkept)).status == 404);
    CHECK(
        error_of(serving.post(R"({"model":"fake","input":"x","store":false,"background":true})")) ==
        "400 invalid_request_error unsupported_value store");
    CHECK(error_of(post_keyed(serving, R"({"model":"fake","input":"x","store":false})", "k")) ==
          "400 invalid_request_error unsupported_value store");

    CHECK(
        error_of(serving.post(
            R"({"model":"fake","input":"x","store":false,"metadata":{"completion_webhook":"u"}})")) ==
        "400 invalid_request_error unsupported_value store");

    const HttpReply first = serving.post(R"({"model":"fake","input":"one","instructions":"i"})");
    const auto follow = [&](const std::string& id, const char* words) {
        return serving.post(R"({"model":"fake","input":")" + std::string(words) +
                            R"(","previous_response_id":")" + id + "\"}");
    };
    const auto said = [](const HttpReply& reply) {
        return std::string(parse(reply.body)["output"][0]["content"][0]["text"].as_string());
    };
    const HttpReply second = follow(id_of(first), "two");
    REQUIRE(second.status == 200);
    CHECK(said(second) == "echo: oneecho: onetwo");
    CHECK(parse(second.body)["previous_response_id"].as_string() == id_of(first));
    CHECK(said(follow(id_of(second), "3")) == "echo: oneecho: onetwoecho: oneecho: onetwo3");
    const std::string refused =
        "400 invalid_request_error previous_response_not_found previous_response_id";
    CHECK(error_of(follow("resp_none", "x")) == refused);
    serving.fake.hold = true;
    CHECK(error_of(follow(id_of(serving.post(in_background)), "x")) == refused);
}

namespace {

/// A surface that streams, as a client asks for it.
struct Streaming {
    Dialect dialect;
    const char* target;
    const char* body;
};
constexpr Streaming streamings[] = {
    {Dialect::openai, "/v1/responses", R"({"model":"fake","stream":true,"input":"one two three"})"},
    {Dialect::openai, "/v1/chat/completions",
     R"({"model":"fake","stream":true,"messages":[{"role":"user","content":"one two three"}]})"},
    {Dialect::valar, "/v1/chat/completions",
     R"({"model":"fake","stream":true,"messages":[{"role":"user","content":"one two three"}],)"
     R"("tools":[{"type":"function","function":{"name":"f"}}]})"},
};

/// One stream whose events the test makes, and which the client may leave.
struct Streamed {
    Streamed(Serving& serving, const Streaming& how, const std::string& fields = {})
        : peer(serving.server.port()) {
        const std::string body = how.body;
        peer.send(detail::join({"POST ", how.target, " HTTP/1.1\r\nHost: localhost\r\n", fields,
                                "Content-Type: application/json\r\nContent-Length: ",
                                std::to_string(body.size()), "\r\n\r\n", body}));
        head = peer.until("\r\n\r\n");
        const size_t at = head.find("resp_");
        if (at != head.npos) id = head.substr(at, 29);
    }
    HttpPeer peer;
    std::string head, id;
};

/// `condition` of the record of a response, soon.
bool comes_to(Serving& serving, const std::string& id, std::string_view status) {
    return eventually([&] {
        return parse(serving.get("/v1/responses/" + id).body)["status"].as_string() == status;
    });
}

/// All that was begun is over, and nothing of it is left anywhere.
void check_nothing_left(Serving& serving) {
    CHECK(serving.fake.waiting().empty());
    CHECK(serving.fake.events_left() == 0);
    for (const char* none : {"valar_responses_live 0\n", "valar_responses_queued 0\n",
                             "valar_http_body_bytes 0\n", "valar_http_connections 1\n"}) {
        CAPTURE(std::string(none));
        CHECK(eventually(
            [&] { return serving.get("/metrics").body.find(none) != std::string::npos; }));
    }
}

}  // namespace

TEST_CASE("server: a stream that its client leaves at any event, or within one") {
    for (const Streaming& how : streamings)
        for (const bool keyed : {false, true}) {
            CAPTURE(how.target);
            CAPTURE(keyed);
            ServerOptions options = local();
            options.dialect = how.dialect;
            Serving serving(options, true);
            serving.fake.tells_items = true;
            int left = 0;
            // Leaves once `told` events were made, and `bytes` of what they are on the wire are read.
            const auto leave = [&](size_t told, size_t bytes) {
                const std::string key = "Idempotency-Key: k" + std::to_string(++left) + "\r\n";
                std::string id;
                bool more = true;
                {
                    Streamed one(serving, how, keyed ? key : "");
                    id = one.id;
                    REQUIRE(eventually([&] { return serving.fake.waiting().size() == 1; }));
                    for (size_t i = 0; more && i < told; ++i) more = serving.fake.tell(id);
                    REQUIRE(eventually([&] { return serving.fake.events_left() == 0; }));
                    CHECK(one.peer.take(bytes).size() == bytes);
                }
                if (keyed) {  // it goes on
                    CHECK(serving.get("/v1/responses/" + id).status == 200);
                    serving.fake.finish(id);
                    CHECK(comes_to(serving, id, "completed"));
                    CHECK(serving.fake.cancels == 0);
                } else {
                    CHECK(comes_to(serving, id, "cancelled"));
                    CHECK(serving.fake.cancels == left);
                }
                return more;
            };
            for (size_t told = 0; leave(told, 0); ++told) {}
            for (size_t bytes = 1; bytes < 120; ++bytes) leave(1, bytes);
            check_nothing_left(serving);
        }
}

TEST_CASE("server: of 64 streams at once none sees an event of another") {
    for (const Streaming& how : streamings) {
        if (std::string(how.body).find("tools") != std::string::npos) continue;  // all say the same
        ServerOptions options = local();
        options.dialect = how.dialect;
        Serving serving(options, true);
        serving.fake.tells_items = true;
        constexpr int count = 64;
        std::vector<std::unique_ptr<Streamed>> streams;
        std::vector<std::string> words;
        for (int i = 0; i < count; ++i) {
            words.push_back(detail::format("only%d of%d these%d", i, i, i));
            std::string body = how.body;
            body.replace(body.find("one two three"), strlen("one two three"), words.back());
            streams.push_back(std::make_unique<Streamed>(
                serving, Streaming{how.dialect, how.target, body.c_str()}));
        }
        for (bool more = true; more;) {
            more = false;
            for (const auto& one : streams) more |= serving.fake.tell(one->id);
        }
        for (const auto& one : streams) serving.fake.finish(one->id);
        std::set<std::string> ids;
        for (int i = 0; i < count; ++i) {
            Streamed& one = *streams[static_cast<size_t>(i)];
            CHECK(ids.insert(one.id).second);
            const std::string text = one.peer.until("\r\n0\r\n\r\n");
            std::string said;
            for (size_t at = 0; (at = text.find("data: {", at)) != text.npos; ++at) {
                const Json event = parse(text.substr(at + 6, text.find('\n', at) - at - 6));
                said += event["choices"][0]["delta"]["content"].as_string();
                if (event["type"].as_string() == "response.output_text.delta")
                    said += event["delta"].as_string();
                const std::string_view of = event["response"]["id"].as_string();
                CHECK((of.empty() || of == one.id));
            }
            CHECK(said == "echo: " + words[static_cast<size_t>(i)]);
        }
        streams.clear();
        check_nothing_left(serving);
    }
}

TEST_CASE("server: every count of the Responders is a metric") {
    Serving serving;
    ResponderStats& counts = serving.fake.counts;
    counts.queued = 1, counts.running = 2, counts.completed = 3, counts.failed = 4;
    counts.cancelled = 5, counts.input_tokens = 6, counts.output_tokens = 7;
    counts.cached_tokens = 8, counts.pages = 9, counts.pages_used = 10, counts.pages_cached = 11;
    counts.pages_shared = 12, counts.preempted = 13, counts.batches = 14, counts.batch_rows = 15;
    counts.drafted_tokens = 16, counts.accepted_tokens = 17;
    counts.constrained_tokens = 21, counts.masks = 22;
    counts.queue_us = 1'800'000, counts.prefill_us = 19'000'000, counts.decode_us = 2'000'000;
    const std::string body = serving.get("/metrics").body;
    for (const char* line : {"requests_queued 1",
                             "requests_running 2",
                             "requests_completed_total 3",
                             "requests_failed_total 4",
                             "requests_cancelled_total 5",
                             "input_tokens_total 6",
                             "output_tokens_total 7",
                             "cached_tokens_total 8",
                             "pages 9",
                             "pages_used 10",
                             "pages_cached 11",
                             "pages_shared 12",
                             "preempted_total 13",
                             "batches_total 14",
                             "batch_tokens_total 15",
                             "drafted_tokens_total 16",
                             "accepted_tokens_total 17",
                             "constrained_tokens_total 21",
                             "masks_total 22",
                             "queue_seconds_total 1.8",
                             "prefill_seconds_total 19",
                             "decode_seconds_total 2"}) {
        CAPTURE(line);
        CHECK(body.find("\nvalar_model_" + std::string(line) + "\n") != std::string::npos);
    }
    CHECK(body.find("# HELP valar_model_pages Pages of keys and values, in all.\n"
                    "# TYPE valar_model_pages gauge\n") != std::string::npos);
}

TEST_CASE("server: times of responses are histograms") {
    Serving serving;
    serving.fake.timings = {2'000, 30'000,
                            80'000};  // us, of 3 tokens: 40 ms for each behind the first
    for (int i = 0; i < 2; ++i) serving.post(R"({"model":"fake","input":"a b"})");
    serving.fake.timings = {700'000'000, 0, 0};
    serving.post(R"({"model":"fake","input":"a b","max_output_tokens":1})");
    const std::string body = serving.get("/metrics").body;
    for (const char* line :
         {"queue_seconds_bucket{le=\"0.001\"} 0", "queue_seconds_bucket{le=\"0.005\"} 2",
          "queue_seconds_bucket{le=\"600\"} 2", "queue_seconds_bucket{le=\"+Inf\"} 3",
          "queue_seconds_sum 700.004", "queue_seconds_count 3",
          "first_token_seconds_bucket{le=\"0.01\"} 0", "first_token_seconds_bucket{le=\"0.05\"} 2",
          "first_token_seconds_count 3", "token_seconds_bucket{le=\"0.025\"} 0",
          "token_seconds_bucket{le=\"0.05\"} 4", "token_seconds_count 4"}) {
        CAPTURE(line);
        CHECK(body.find("\nvalar_response_" + std::string(line) + "\n") != std::string::npos);
    }
    CHECK(body.find("\nvalar_http_request_seconds_count 3\n") != std::string::npos);
    CHECK(body.find("\n# TYPE valar_http_request_seconds histogram\n") != std::string::npos);
}

TEST_CASE("server: metrics and JSON log lines") {
    Log log;
    ServerOptions options = with_keys();
    options.log = log.sink();
    options.log_json = true;
    Serving serving(options);
    serving.post(hello, key_a);
    const HttpReply metrics = serving.get("/metrics", key_a);
    CHECK(metrics.status == 200);
    CHECK(field(metrics, "Content-Type").substr(0, 10) == "text/plain");
    CHECK(metrics.body.find(
              "valar_http_requests_total{route=\"/v1/responses\",status=\"200\"} 1\n") !=
          std::string::npos);
    CHECK(metrics.body.find("\nvalar_responses_live 0\n") != std::string::npos);
    CHECK(serving.get("/metrics").status == 401);
    HttpPeer peer(serving.server.port());
    REQUIRE(peer.send("GET /broken HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"));
    CHECK(peer.reply().status == 400);
    const std::string all = log.text(), lines = all.substr(all.find('\n') + 1);
    CHECK(parse(all.substr(0, all.find('\n')))["event"].as_string() == "start");
    const Json line = parse(lines.substr(0, lines.find('\n')));
    CHECK(line["method"].as_string() == "POST");
    CHECK(line["status"].as_int() == 200);
    CHECK(line["key"].as_string() == "one");
    CHECK(line["output_tokens"].as_int() == 3);
    CHECK(line["response"].as_string().substr(0, 5) == "resp_");
    CHECK(lines.find(R"("method":"GET","path":"/broken","status":400)") != std::string::npos);
    // nobody waits for a background response: its end has a line of its own
    const std::string id = id_of(serving.post(in_background, key_a));
    const std::string end = R"({"response":")" + id + R"(","ended":"completed","input_tokens":)";
    CHECK(eventually([&] { return log.text().find(end) != std::string::npos; }));
}

namespace {

void check_refs(const Json& document, const Json& part) {
    const std::string ref(part["$ref"].as_string());
    if (!ref.empty()) {
        const Json* at = &document;
        for (size_t start = 2; at && start <= ref.size();) {
            const size_t end = std::min(ref.find('/', start), ref.size());
            at = at->find(ref.substr(start, end - start));
            start = end + 1;
        }
        CHECK_MESSAGE(at, ref);
    }
    for (const Json& item : part.items()) check_refs(document, item);
    for (const JsonMember& member : part.members()) check_refs(document, member.value);
}

}  // namespace

TEST_CASE("server: the document shows every route, and refers to nothing that is not there") {
    for (const Dialect dialect : {Dialect::valar, Dialect::openai}) {
        const Json& shown = document(dialect);
        CHECK(shown["openapi"].as_string() == "3.1.0");
        check_refs(shown, shown);
        std::set<std::string> names;
        for (const auto& route : detail::ServerLoop::all_routes()) {
            if (route.openai && dialect != Dialect::openai) continue;
            const bool named = route.takes_argument();
            const std::string path = route.shown();
            const Json& known = shown["paths"][path];
            for (const auto& [method, one] :
                 {std::pair("get", route.get), std::pair("post", route.post),
                  std::pair("delete", route.remove)}) {
                CAPTURE(path);
                CHECK(known.contains(method) == (one.handle != nullptr));
                if (!one.handle) continue;
                CHECK(names.insert(std::string(known[method]["operationId"].as_string())).second);
                CHECK(known[method]["security"].is_array() == route.open);
                CHECK(known[method]["parameters"].empty() ==
                      (!named && one.query.empty() &&
                       one.handle != &detail::ServerLoop::post_response && !one.body));
            }
        }
        CHECK(shown["components"]["schemas"].contains("ChatCompletionEvent"));
        for (const char* streamed : {"ResponseEvent", "MessageEvent"})
            CHECK(shown["components"]["schemas"].contains(streamed) ==
                  (dialect == Dialect::openai));
    }
}

TEST_CASE("server: the document is of this server, and needs no key") {
    ServerOptions options = with_keys();
    Serving serving(options);
    const HttpReply reply = serving.get("/openapi.json");
    CHECK(reply.status == 200);
    CHECK(field(reply, "Content-Type") == "application/json");
    CHECK(reply.body == document(Dialect::valar).write());
    options = local();
    options.dialect = Dialect::openai;
    Serving open(options);
    const Json shown = parse(open.get("/openapi.json").body);
    CHECK(shown["security"].empty());
    CHECK_FALSE(shown["components"].contains("securitySchemes"));
    CHECK_FALSE(shown["paths"]["/v1/models"]["get"]["responses"].contains("401"));
}

// ---- Batches -----------------------------------------------------------------------------------

namespace {

std::string batch_of_items(size_t count, const std::string& more = {}) {
    std::string body = R"({"endpoint":"/v1/responses","requests":[)";
    for (size_t i = 0; i < count; ++i)
        body += (i == 0 ? "" : ",") + std::string(R"({"custom_id":"n)") + std::to_string(i) +
                R"(","params":{"model":"fake","input":"question )" + std::to_string(i) + "\"" +
                more + "}}";
    return body + "]}";
}

HttpReply send_batch(Serving& serving, const std::string& body, const char* key = nullptr) {
    return serving.call("POST", "/v1/batches", body, {}, key);
}

size_t batch_records(Store& store) {
    size_t count = 0;
    for (const StoredResponse& one : store.unfinished()) count += one.id.starts_with("batch_");
    return count;
}

/// How many of a batch's requests have each status: "COMPLETED 3 PENDING 1".
std::string batch_counts(Serving& serving, const std::string& id) {
    const Json shown = parse(serving.get("/v1/batches/" + id).body);
    std::map<std::string, int> counts;
    for (const JsonMember& one : shown["request_status"].members())
        ++counts[std::string(one.value["status"].as_string())];
    std::string text;
    for (const auto& [status, count] : counts)
        text += (text.empty() ? "" : " ") + status + " " + std::to_string(count);
    return text;
}

}  // namespace

TEST_CASE("server: a batch that is left in a store goes on, each request once") {
    struct Later : MemoryStore {
        int64_t now_ms() const override { return MemoryStore::now_ms() + later_ms; }
        std::atomic<int64_t> later_ms = 0;
    } store;
    ServerOptions options = local();
    options.drain_timeout_ms = 10;
    options.store = &store;
    std::string id, running;
    {
        Serving serving(options, true);
        id = id_of(send_batch(serving, batch_of_items(300)));
        REQUIRE(eventually([&] { return serving.fake.waiting().size() >= 64; }));
        CHECK(batch_counts(serving, id).find("RUNNING") != std::string::npos);
        const Json waits = parse(serving.get("/v1/batches/" + id + "/n299").body);
        CHECK(waits["status"].as_string() == "pending");
        CHECK(waits["input"].as_string() == "question 299");
        running = serving.fake.waiting().front();
        serving.fake.finish(running);
        REQUIRE(eventually(
            [&] { return batch_counts(serving, id).find("COMPLETED 1") != std::string::npos; }));
    }
    {
        Serving serving(options);
        REQUIRE(eventually([&] { return batch_counts(serving, id) == "COMPLETED 300"; }));
        const Json last = parse(serving.get("/v1/batches/" + id + "/n299").body);
        CHECK(last["output"][0]["content"][0]["text"].as_string() == "echo: question 299");
        const auto listed = store.list("default", "", 1000);
        REQUIRE(listed.ok());
        CHECK(std::set<std::string>(listed->begin(), listed->end()).size() == 300);
        CHECK(listed->size() == 300);
        CHECK(serving.fake.organisations().size() == 299);  // one had ended before
        // what it consisted of is gone, the batch itself is not
        REQUIRE(eventually([&] { return batch_records(store) == 1; }));
        CHECK(error_of(serving.call("DELETE", "/v1/responses/" + id)) ==
              "404 not_found_error not_found");
        CHECK(serving.get("/metrics").body.find("valar_batches_live 0") != std::string::npos);
    }
    Serving serving(options);
    CHECK(batch_counts(serving, id) == "COMPLETED 300");
    serving.stop();
    store.later_ms = 49 * 3'600'000;
    Serving later(options);
    REQUIRE(eventually([&] { return later.get("/v1/batches").body == "[]"; }));
    CHECK(later.get("/v1/batches/" + id).status == 404);
    REQUIRE(eventually([&] { return batch_records(store) == 0; }));
}

TEST_CASE("server: a batch that cannot be kept leaves nothing, and is of one organisation") {
    MemoryStore store({.max_bytes = 100'000});
    ServerOptions options = with_keys();
    options.store = &store;
    Serving serving(options);
    CHECK(error_of(send_batch(serving, batch_of_items(1000), key_a)) == "503 api_error overloaded");
    REQUIRE(eventually([&] { return store.bytes() == 0; }));
    CHECK(error_of(send_batch(serving, batch_of_items(100, R"(,"seed":"x")"), key_a)) ==
          "400 invalid_request_error invalid_type requests[0].params.seed");
    const std::string id = id_of(send_batch(serving, batch_of_items(2), key_a));
    REQUIRE(eventually([&] {
        return parse(serving.get("/v1/batches/" + id + "/n1", key_a).body)["status"].as_string() ==
               "completed";
    }));
    for (const std::string& path : {"/v1/batches/" + id, "/v1/batches/" + id + "/n1"})
        CHECK(error_of(serving.get(path, key_b)) == "404 not_found_error not_found");
    CHECK(serving.call("POST", "/v1/batches/" + id + "/cancel", {}, {}, key_b).status == 404);
    CHECK(serving.get("/v1/batches", key_b).body == "[]");
    CHECK(parse(serving.get("/v1/batches", key_a).body).size() == 1);
    CHECK(error_of(serving.call("DELETE", "/v1/batches/" + id + "/n1", {}, {}, key_a)) ==
          "405 invalid_request_error method_not_allowed");
}

TEST_CASE("server: requests of a batch that cannot be answered now wait, or fail") {
    ServerOptions options = local();
    options.max_queued = 1;
    Serving serving(options);
    serving.fake.full = true;
    const std::string id = id_of(send_batch(serving, batch_of_items(300)));
    CHECK(batch_counts(serving, id) == "PENDING 300");
    std::string ids[2];
    for (size_t i = 0; i < 2; ++i)
        ids[i] = id_of(serving.get("/v1/batches/" + id + "/n" + std::to_string(298 + i)));
    CHECK(serving.call("DELETE", "/v1/responses/" + ids[0]).status == 200);
    CHECK(serving.get("/v1/responses/" + ids[0]).status == 404);
    const HttpReply ended = serving.call("POST", "/v1/responses/" + ids[1] + "/cancel");
    CHECK(parse(ended.body)["status"].as_string() == "cancelled");
    CHECK(serving.get("/v1/batches/" + id + "/n299").body == ended.body);
    CHECK(batch_counts(serving, id) == "CANCELLED 2 PENDING 298");
    serving.fake.full = false;
    REQUIRE(eventually([&] { return batch_counts(serving, id) == "CANCELLED 2 COMPLETED 298"; }));
    serving.fake.failure = detail::make_error(ErrorKind::internal, "broken");
    const std::string other = id_of(send_batch(serving, batch_of_items(3)));
    REQUIRE(eventually([&] { return batch_counts(serving, other) == "FAILED 3"; }));
    CHECK(parse(serving.get("/v1/batches/" + other + "/n0").body)["status"].as_string() ==
          "failed");
}

TEST_CASE("server: what is used is counted by key, model, window and day") {
    struct Later : MemoryStore {
        int64_t now_ms() const override { return MemoryStore::now_ms() + later_ms; }
        std::atomic<int64_t> later_ms = 0;
    } store;
    ServerOptions options = with_keys();
    options.keys.push_back({"three", "a", "sk-organisation-a-0003"});
    options.store = &store;
    const auto read = [](Serving& serving, const std::string& path, const char* key = key_a) {
        const HttpReply reply = serving.get("/v1/usage" + path, key);
        REQUIRE(reply.status == 200);
        return parse(reply.body);
    };
    {
        Serving serving(options);
        CHECK(read(serving, "")["requests"].as_int(-1) == 0);
        for (const char* body :
             {hello, R"({"model":"other name","input":"one two three"})",
              R"({"model":"fake","input":"x","metadata":{"completion_window":"asap"}})"})
            REQUIRE(serving.post(body, key_a).status == 200);
        REQUIRE(serving.post(hello, "sk-organisation-a-0003").status == 200);
        serving.fake.failure = detail::make_error(ErrorKind::internal, "broken");
        REQUIRE(serving.post(hello, key_a).status == 200);
        CHECK(serving.post(R"({"model":"none","input":"x"})", key_a).status == 404);

        const Json all = read(serving, "");
        CHECK(all["requests"].as_int() == 5);
        CHECK(all["failed"].as_int() == 1);
        CHECK(all["cancelled"].as_int() == 0);
        CHECK(all["output_tokens"].as_int() == 3 + 4 + 2 + 3);
        CHECK(all["total_tokens"].as_int() ==
              all["input_tokens"].as_int() + all["output_tokens"].as_int());
        CHECK(read(serving, "", key_b)["requests"].as_int(-1) == 0);
        for (const char* range : {"24h", "7d", "30d"}) {
            const std::string query = std::string("?range=") + range;
            CHECK(read(serving, query)["requests"].as_int() == 5);
            const Json series = read(serving, "/activity/timeseries" + query);
            const auto& buckets = series["data"].items();
            CHECK(buckets.size() == size_t(std::atoi(range)));
            CHECK(buckets.back()["requests"].as_int() == 5);  // unless an hour ended just now
            CHECK(buckets.front()["start"].as_int() == series["from"].as_int());
            for (size_t i = 1; i < buckets.size(); ++i)
                CHECK(buckets[i]["start"].as_int() == buckets[i - 1]["end"].as_int());
        }
        const Json rows = read(serving, "/breakdown");
        REQUIRE(rows["data"].size() == 2);
        CHECK(rows["data"][0]["model"].as_string() == "org/fake-1");  // whatever its alias
        CHECK(rows["data"][0]["window"].as_string() == "asap");
        CHECK(rows["data"][0]["requests"].as_int() == 1);
        CHECK(rows["data"][1]["window"].as_string() == "standard");
        CHECK(rows["data"][1]["requests"].as_int() == 4);
        const Json keys = read(serving, "/breakdown?by=key");
        REQUIRE(keys["data"].size() == 2);
        CHECK(keys["data"][0]["key"].as_string() == "one");
        CHECK(keys["data"][0]["requests"].as_int() == 4);
        CHECK(read(serving, "/breakdown?by=day")["data"][0]["day"].as_string().size() == 10);
        const Json activity = read(serving, "/activity");
        REQUIRE(activity["data"].size() == 2);
        CHECK(activity["data"][1]["key"].as_string() == "three");
        CHECK(activity["data"][1]["last_hour"].as_int() % 3600 == 0);
        CHECK(error_of(serving.get("/v1/usage?range=1y", key_a)) ==
              "400 invalid_request_error invalid_value range");
        CHECK(error_of(serving.get("/v1/usage/breakdown?by=colour", key_a)) ==
              "400 invalid_request_error invalid_value by");
    }
    store.later_ms = 49 * 3'600'000;  // the responses are gone, what they used is not
    store.expire(store.now_ms());
    Serving serving(options);
    CHECK(parse(serving.get("/v1/responses", key_a).body)["data"].empty());
    CHECK(read(serving, "")["requests"].as_int() == 5);
    CHECK(read(serving, "/breakdown?by=key")["data"][1]["key"].as_string() == "three");
    REQUIRE(serving.post(hello, key_a).status == 200);
    CHECK(read(serving, "")["requests"].as_int() == 6);
}

TEST_CASE("server: a delivery is signed for two kinds of receivers") {
    // id, time, body and token of the example in the documents of Standard Webhooks
    const std::string id = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const std::string token = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const auto signed_by = [&](std::string_view by) {
        return detail::webhook_headers(id, by, R"({"test": 2432232314})", 1614265330);
    };
    const auto field_of = [](const HttpHeaders& fields, const char* name) {
        const std::string* found = detail::find_header(fields, name);
        return found ? *found : std::string("none");
    };
    const HttpHeaders fields = signed_by(token);
    CHECK(field_of(fields, "Authorization") == "Bearer " + token);
    CHECK(field_of(fields, "X-Valar-Response-Id") == id);
    CHECK(field_of(fields, "X-Valar-Signature") ==
          "t=1614265330,v1=ef98df15f559c07b37fb4843d95b8c6f0efe57ad76cdd7c81272648a7a434fbd");
    CHECK(field_of(fields, "webhook-id") == id);
    CHECK(field_of(fields, "webhook-timestamp") == "1614265330");
    CHECK(field_of(fields, "webhook-signature") ==
          "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    for (const char* other : {"secret", "whsec_", "whsec_not base64"})
        CHECK(field_of(signed_by(other), "X-Valar-Signature") != "none");
    CHECK(field_of(signed_by("secret"), "webhook-id") == "none");
    CHECK(field_of(signed_by("whsec_!"), "webhook-id") == "none");
    CHECK(field_of(signed_by(""), "Authorization") == "none");
    CHECK(field_of(signed_by(""), "X-Valar-Signature") == "none");
}

TEST_CASE("server: a webhook's token is in no record of a response") {
    MemoryStore store;
    ServerOptions options = local();
    options.store = &store;
    Serving serving(options);
    const HttpReply reply = serving.post(
        R"({"model":"fake","input":"x","metadata":{"webhook_token":"s-e-c-r-e-t"}})");
    CHECK(reply.status == 200);
    CHECK(reply.body.find("s-e-c-r-e-t") == std::string::npos);
    const auto stored = store.find("default", std::string(parse(reply.body)["id"].as_string()));
    REQUIRE(stored);
    for (const auto& text : {stored->head, stored->request, stored->object})
        CHECK(text->find("s-e-c-r-e-t") == std::string::npos);
    CHECK(stored->request->find("***") != std::string::npos);
}
