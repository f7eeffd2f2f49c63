// >>server, live over loopback, with a scripted Responder in the engine's place.
#include <doctest/doctest.h>

#include <condition_variable>
#include <set>
#include <thread>

#include "fake_responder.hpp"
#include "http_peer.hpp"
#include "valar.hpp"

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

/// A server on a thread of its own, until the end of the scope.
struct Serving {
    explicit Serving(const ServerOptions& options = local()) : server(open(options)) {
        thread = std::thread([this] { (void)server.run().ok(); });
    }
    ~Serving() { stop(); }
    void stop() {
        server.stop();
        if (thread.joinable()) thread.join();
    }
    Server open(const ServerOptions& options) {
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
        auto reply = http_call(call);
        if (!reply) return {0, {}, reply.error().message, true};
        return std::move(*reply);
    }
    HttpReply get(const std::string& target, const char* key = nullptr) {
        return call("GET", target, {}, {}, key);
    }
    HttpReply post(const std::string& body, const char* key = nullptr) {
        return call("POST", "/v1/responses", body, {{"Content-Type", "application/json"}}, key);
    }

    FakeResponder fake{"org/fake-1", {"fake", "other name"}};
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
    HttpReply replies[] = {serving.get("/health"), serving.get("/nothing"), serving.post("{"),
                           serving.post(hello), serving.call("DELETE", "/health"),
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

TEST_CASE("server: of several faults the one that the contract checks first is told") {
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
    std::string idempotency = "Idempotency-Key: k\r\n";
    std::string body(401, ' ');
    const std::string long_words(410, 'w');
    const auto ask = [&] {
        HttpPeer peer(serving.server.port());
        REQUIRE(peer.send(start + host + origin + key + type + idempotency + "Content-Length: " +
                          std::to_string(body.size()) + "\r\n\r\n" + body));
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
    CHECK(error_of(ask()) == "400 invalid_request_error unsupported_parameter Idempotency-Key");
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
    REQUIRE(peer.send("POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n"
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
        {"GET", "/", "404 not_found_error not_found", "(none)"},
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
        {"GET", "/v1/responses", "405 invalid_request_error method_not_allowed", "POST"},
        {"DELETE", "/v1/responses/x", "405 invalid_request_error method_not_allowed", "GET, HEAD"},
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
    CHECK(serving.call("HEAD", "/v1/responses").status == 405);
}

TEST_CASE("server: models, by id and by alias, with a slash in either form") {
    Serving serving;
    const Json list = parse(serving.get("/v1/models").body);
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
    CHECK(error_of(reply) == "503 api_error overloaded");
    CHECK(field(reply, "Retry-After") == "1");
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
    CHECK(log.text().find("status=499") != std::string::npos);
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
    CHECK(peer.reply().status == 0);
}

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
    CHECK(std::count(lines.begin(), lines.end(), '\n') == 4);
    for (const char* word : {"secret", "echo", "private", key_a, key_b, "sk-a-wrong"})
        CHECK_MESSAGE(lines.find(word) == std::string::npos, word);
    for (size_t at = 0, end; (end = lines.find('\n', at)) != std::string::npos; at = end + 1)
        CHECK(end - at < 500);
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
    while (*server.step(10)) {
    }
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
        Result<void> add(StoredResponse record) override {
            ++added;
            return MemoryStore::add(std::move(record));
        }
        Result<void> finish(const std::string& id, std::shared_ptr<const std::string> object,
                            int64_t now_ms) override {
            if (++finished == 2) return detail::make_error(ErrorKind::io, "disk /dev/full");
            return MemoryStore::finish(id, std::move(object), now_ms);
        }
    } store;
    ServerOptions options = local();
    options.store = &store;
    Serving serving(options);
    CHECK(serving.post(hello).status == 200);
    CHECK(error_of(serving.post(hello)) == "500 api_error internal_error");
    CHECK(store.added == 2);
    CHECK(store.finished == 2);
    CHECK(store.bytes() < 4000);  // of the one that could not be kept nothing is left
}

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
    options = local();
    for (const char* origin : {"*", "app.example", "https://app.example/"}) {
        options.cors_origins = {origin};
        CHECK(refused(options) == "cors_origins");
    }
    options = local();
    options.host = "no such host";
    CHECK_FALSE(Server::open(&fake, options).ok());
    CHECK_FALSE(Server::open(nullptr, local()).ok());
    CHECK_FALSE(Server::open(std::span<Responder* const>(), local()).ok());

    // a server that cannot listen leaves the Responder to the one that does
    Serving serving;
    options = local();
    options.port = serving.server.port();
    CHECK_FALSE(Server::open(&serving.fake, options).ok());
    CHECK(serving.post(hello).status == 200);
}
