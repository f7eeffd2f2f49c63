// >>upstream, live over loopback: servers with a scripted Responder behind it, and servers that send
// whatever a test likes.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "fake_responder.hpp"
#include "http/internal.hpp"
#include "http_peer.hpp"
#include "http_receiver.hpp"
#include "server/server.hpp"
#include "upstream/answer.hpp"
#include "upstream/upstream.hpp"

using namespace valar;

namespace {

void nap() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

/// A server on a thread of its own, until kill() or the end of the scope.
struct Running {
    explicit Running(Responder* responder, uint16_t wanted = 0, Dialect dialect = Dialect::openai)
        : server(open(responder, wanted, dialect)), port(server->port()) {
        thread = std::thread([this] { (void)server->run().ok(); });
    }
    ~Running() { kill(); }
    void kill() {
        if (server) server->stop(true);
        if (thread.joinable()) thread.join();
        server.reset();
    }
    static std::optional<Server> open(Responder* responder, uint16_t wanted, Dialect dialect) {
        ServerOptions options;
        options.port = wanted;
        options.dialect = dialect;
        auto opened = Server::open(responder, options);
        REQUIRE_MESSAGE(opened.ok(), opened.error().message);
        return std::move(*opened);
    }
    HttpReply post(const char* target, const std::string& body) {
        HttpCall call;
        call.port = port;
        call.method = "POST";
        call.target = target;
        call.body = body;
        call.headers = {{"Content-Type", "application/json"}};
        auto reply = checked_call(call);
        REQUIRE_MESSAGE(reply.ok(), reply.error().message);
        return *reply;
    }
    std::optional<Server> server;
    uint16_t port;
    std::thread thread;
};

std::string url_of(uint16_t port) { return "http://127.0.0.1:" + std::to_string(port); }

UpstreamOptions asking(std::vector<std::string> urls) {
    UpstreamOptions options;
    options.urls = std::move(urls);
    options.retry_ms = 5;
    options.refresh_ms = 20;
    return options;
}

Upstream open(const UpstreamOptions& options) {
    auto upstream = Upstream::open(options);
    REQUIRE_MESSAGE(upstream.ok(), upstream.error().message);
    return std::move(*upstream);
}

/// All that happens to an answer.
struct Answer {
    std::vector<Event> events = {};
    std::string text = {};  // of the deltas
    std::shared_ptr<const Outcome> outcome = {};
    std::string code() const { return outcome->error ? outcome->error->code : ""; }
};

void begin(Responder* responder, const std::string& id, const Request& request) {
    auto prepared = responder->prepare(request);
    REQUIRE_MESSAGE(prepared.ok(), prepared.error().message);
    REQUIRE(responder->submit(std::move(*prepared), id));
}

Answer finish(Responder* responder, const std::string& id) {
    Answer answer;
    while (!answer.outcome) {
        auto event = responder->poll(id);
        if (!event) nap();
        if (!event) continue;
        answer.outcome = event->outcome;
        if (auto delta = event->text_delta()) answer.text += *delta;
        answer.events.push_back(std::move(*event));
    }
    CHECK_FALSE(responder->poll(id));
    return answer;
}

Answer ask(Responder* responder, const Request& request) {
    begin(responder, "r", request);
    return finish(responder, "r");
}

template <class Condition>
bool soon(const Condition& condition) {
    for (int i = 0; i < 10'000; ++i, nap())
        if (condition()) return true;
    return false;
}

/// Lists one model, or what it is given, and answers each POST with the bytes; then it closes, or falls
/// silent.
struct Hostile : Receiver {
    explicit Hostile(std::string answer, bool ends = true,
                     const std::string& list = R"({"data":[{"id":"m","owned_by":"vllm"}]})")
        : Receiver(std::move(answer), ends,
                   "HTTP/1.1 200 OK\r\nContent-Length: " + std::to_string(list.size()) +
                       "\r\n\r\n" + list) {}
};

std::string streamed(const std::string& events) {
    return "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + events;
}

std::string body_of(const Request& request, const char* owner) {
    const auto call = detail::upstream_call(request, owner);
    REQUIRE_MESSAGE(call.ok(), call.error().message);
    auto body = Json::parse(call->body);
    REQUIRE(body);
    for (const char* same : {"stream", "stream_options", "model", "messages"}) body->erase(same);
    return body->write();
}

}  // namespace

TEST_CASE("upstream: an answer comes as it is made, with all that belongs to it") {
    FakeResponder fake("org/model", {"alias"});
    fake.tells_items = true;
    Running server(&fake);
    Upstream upstream = open(asking({url_of(server.port) + "/v1/"}));
    Responder* responder = upstream.responder();
    const auto models = responder->models();
    REQUIRE(models.size() == 2);
    CHECK(models[0].id == "org/model");
    CHECK(models[0].owned_by == "valar");
    CHECK(models[0].ready);
    CHECK(models[1].id == "alias");

    const Answer answer = ask(responder, {.model = "alias", .input = "one two three"});
    CHECK(answer.text == "echo: one two three");
    CHECK(answer.outcome->status == Status::completed);
    CHECK(answer.outcome->text == answer.text);
    CHECK(answer.outcome->usage.output_tokens == 4);
    CHECK(answer.outcome->usage.input_tokens == 4);
    CHECK(answer.outcome->items.size() == 1);
    CHECK(answer.events.front().kind == Event::Kind::started);
    CHECK(answer.events[1].kind == Event::Kind::item_begun);
    CHECK(answer.events[answer.events.size() - 2].kind == Event::Kind::item_ended);

    const Answer cut = ask(responder, {.input = "one two three", .max_output_tokens = 2});
    CHECK(cut.text == "echo: one ");
    CHECK(cut.outcome->cut);
    Request request{.input = "one two"};
    request.logprobs = true;
    request.top_logprobs = 2;
    const Answer tokens = ask(responder, request);
    REQUIRE(tokens.outcome->logprobs.size() == 3);
    CHECK(tokens.outcome->logprobs[1].bytes == "one ");
    CHECK(tokens.outcome->logprobs[1].logprob == -0.5f);
    CHECK(tokens.outcome->logprobs[1].top.size() == 2);
    request = {.input = "past the template"};
    request.raw = RawPrompt{};
    CHECK(ask(responder, request).text == "echo: past the template");

    const ResponderStats stats = responder->stats();
    CHECK(stats.completed == 4);
    CHECK(stats.running + stats.queued == 0);
    CHECK(stats.output_tokens == 4 + 2 + 3 + 4);
}

TEST_CASE("upstream: thoughts and calls are items") {
    FakeResponder fake("m");
    Running server(&fake);
    Upstream upstream = open(asking({url_of(server.port)}));
    Request request{.input = "weather?"};
    request.tools = {{.name = "get_weather", .parameters = Json::object()},
                     {.name = "other", .custom = true}};
    Answer answer = ask(upstream.responder(), request);
    REQUIRE(answer.outcome->items.size() == 3);
    CHECK(answer.outcome->items[0].kind == Item::Kind::reasoning);
    CHECK(answer.outcome->items[0].text() == "hm");
    CHECK(answer.outcome->items[1].kind == Item::Kind::function_call);
    CHECK(answer.outcome->items[1].name == "get_weather");
    CHECK(answer.outcome->items[1].call_id == "call_fake0");
    CHECK(answer.outcome->items[1].arguments == R"({"city": "Oslo"})");
    CHECK(answer.outcome->items[2].kind == Item::Kind::custom_tool_call);
    CHECK(answer.outcome->items[2].arguments == "text");
    CHECK(answer.outcome->text.empty());
    // what was called, thought and given comes back in their places
    request.input = std::vector<Item>{Item::message(Role::user, "weather?")};
    for (const Item& item : answer.outcome->items) request.input.items.push_back(item);
    request.input.items.push_back(Item::output(answer.outcome->items[1], "sun"));
    request.input.items.push_back(Item::output(answer.outcome->items[2], "moon"));
    CHECK(ask(upstream.responder(), request).text == "echo: weather?hmsunmoon");
    request.input = "again";
    request.max_tool_calls = 1;
    CHECK(ask(upstream.responder(), request).outcome->items.size() == 2);
    request.tool_choice = {ToolChoice::Mode::required, {"other"}};
    CHECK(ask(upstream.responder(), request).outcome->items[1].name == "other");
}

TEST_CASE("upstream: each kind of server is asked in its own words") {
    Request request{.model = "m", .instructions = "be kind", .input = "hi"};
    CHECK(detail::upstream_call(request, "vllm")->target == "/chat/completions");
    CHECK(
        detail::upstream_call(request, "vllm")->body ==
        R"({"model":"m","messages":[{"role":"system","content":"be kind"},)"
        R"({"role":"user","content":"hi"}],"stream":true,"stream_options":{"include_usage":true}})");
    request.temperature = 0.5;
    request.top_k = 3;
    request.stop = {"x"};
    request.seed = 7;
    request.max_output_tokens = 9;
    CHECK(body_of(request, "vllm") ==
          R"({"temperature":0.5,"top_k":3,"seed":7,"stop":["x"],"max_tokens":9,)"
          R"("max_completion_tokens":9})");
    static constexpr struct {
        const char *owner, *regex, *one_of, *gbnf;  // null: refused
    } rows[] = {
        {"vllm", R"({"structured_outputs":{"regex":"a+"}})",
         R"({"structured_outputs":{"choice":["a","b"]}})",
         R"({"structured_outputs":{"grammar":"root ::= \"a\""}})"},
        {"sglang", R"({"regex":"a+"})", nullptr, R"({"ebnf":"root ::= \"a\""})"},
        {"llamacpp", nullptr, nullptr, R"({"grammar":"root ::= \"a\""})"},
        {"somebody", nullptr, nullptr, nullptr},
        {"valar",
         R"({"response_format":{"type":"grammar","syntax":"regex","definition":"a+"},"store":false})",
         R"({"response_format":{"type":"choice","choices":["a","b"]},"store":false})",
         R"({"response_format":{"type":"grammar","syntax":"gbnf","definition":"root ::= \"a\""},)"
         R"("store":false})"},
    };
    for (const auto& row : rows) {
        INFO(row.owner);
        const auto check = [&](const Format& format, const char* expected) {
            Request one{.model = "m", .input = "hi"};
            one.format = format;
            const auto call = detail::upstream_call(one, row.owner);
            REQUIRE(call.ok() == (expected != nullptr));
            if (expected) CHECK(body_of(one, row.owner) == expected);
            else CHECK(call.error().code == "unsupported_value");
        };
        check({.regex = "a+"}, row.regex);
        check({.one_of = {"a", "b"}}, row.one_of);
        check({.gbnf = "root ::= \"a\""}, row.gbnf);
        Request one{.model = "m", .input = "hi"};
        one.format.schema = Json::object().set("type", "integer");
        CHECK(
            body_of(one, row.owner)
                .starts_with(
                    R"({"response_format":{"type":"json_schema","json_schema":{"name":"answer",)"));
    }
    const auto effort = [&](Effort level, const char* owner) {
        Request one{.model = "m", .input = "hi"};
        one.effort = level;
        return body_of(one, owner);
    };
    CHECK(effort(Effort::xhigh, "valar") == R"({"reasoning_effort":"xhigh","store":false})");
    CHECK(effort(Effort::xhigh, "vllm") == R"({"reasoning_effort":"high"})");
    CHECK(effort(Effort::minimal, "vllm") == R"({"reasoning_effort":"low"})");
    CHECK(effort(Effort::none, "vllm") ==
          R"({"chat_template_kwargs":{"enable_thinking":false,"thinking":false}})");
    Request custom{.model = "m", .input = "hi"};
    custom.tools = {{.name = "c", .custom = true}};
    CHECK(detail::upstream_call(custom, "vllm").error().code == "unsupported_value");
}

TEST_CASE("upstream: whatever comes in the place of an answer is a failure that says so") {
    const std::string text = R"(data: {"choices":[{"delta":{"content":"hi"}}]})"
                             "\n\n";
    const std::string call = R"(data: {"choices":[{"delta":{"tool_calls":[{"index":0,"id":"a",)"
                             R"("function":{"name":"f","arguments":"{"}}]}}]})"
                             "\n\n";
    const std::string answers[] = {
        "",
        "nonsense\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhi",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\n\r\n{}",
        "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno",
        "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 307 Temporary Redirect\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
        streamed(""),
        streamed("data: [DONE]\n\n"),
        streamed("data: {\n\n"),
        streamed("data: null\n\ndata: 7\n\ndata: []\n\ndata: \"x\"\n\n"),
        streamed(R"(data: {"choices":7,"usage":"x"})"
                 "\n\n"),
        streamed(R"(data: {"choices":[{"delta":[]},{"delta":{"content":7}}]})"
                 "\n\n"),
        streamed(R"(data: {"error":{"message":"out of luck"}})"
                 "\n\n"),
        streamed(R"(data: {"error":"out of luck"})"
                 "\n\n"),
        streamed(R"(data: {"choices":[{"delta":{},"finish_reason":"error"}]})"
                 "\n\n"),
        streamed(R"(data: {"choices":[{"delta":{"tool_calls":[{"index":-5}]}}]})"
                 "\n\n"),
        streamed(R"(data: {"choices":[{"delta":{"tool_calls":[{"function":7},null]}}]})"
                 "\n\n"),
        streamed("data: " + std::string(3000, 'x') + "\n\n"),
        streamed(text),
        streamed(text + text + "data: {\n\n"),
        streamed(call),
        streamed(call + R"(data: {"choices":[{"delta":{"tool_calls":[{"index":-1}]}}]})"
                        "\n\n"),
    };
    for (const std::string& answer : answers) {
        INFO(answer);
        Hostile server(answer);
        Upstream upstream = open(asking({url_of(server.port)}));
        const Answer got = ask(upstream.responder(), {.input = "hi"});
        CHECK(got.outcome->status == Status::failed);
        CHECK(got.code() == "upstream_error");
        CHECK(detail::http_status(*got.outcome->error) == 502);
        CHECK(got.outcome->error->message.find("127.0.0.1") == std::string::npos);
        CHECK(server.posts == 1);
    }
    // what it says of the request itself comes through
    const std::string said = R"({"error":{"message":"the context length is 5","code":400}})";
    Hostile server("HTTP/1.1 400 Bad Request\r\nContent-Length: " + std::to_string(said.size()) +
                   "\r\n\r\n" + said);
    Upstream upstream = open(asking({url_of(server.port)}));
    const Answer refused = ask(upstream.responder(), {.input = "hi"});
    CHECK(refused.code() == "context_length_exceeded");
    CHECK(refused.outcome->error->message == "the context length is 5");
}

TEST_CASE("upstream: lists of models may be anything") {
    static const char* const lists[] = {
        "nonsense",
        "{}",
        R"({"data":7})",
        R"({"data":[]})",
        R"({"data":[7,null,{},{"id":7},{"id":""}]})",
    };
    for (const char* list : lists) {
        INFO(list);
        Hostile server("", true, list);
        Upstream upstream = open(asking({url_of(server.port)}));
        CHECK(upstream.responder()->models().empty());
        CHECK(upstream.responder()->prepare({.model = "m", .input = "hi"}).error().code ==
              "model_not_found");
    }
    Hostile server("", true,
                   R"({"data":[{"id":"m","created":"x","owned_by":7,"max_model_len":-1}]})");
    Upstream upstream = open(asking({url_of(server.port)}));
    REQUIRE(upstream.responder()->models().size() == 1);
    CHECK(upstream.responder()->models()[0].owned_by == "upstream");
}

TEST_CASE("upstream: an answer ends with what its server said last, not with its connection") {
    const std::string events =
        R"(data: {"choices":[{"delta":{"role":"assistant","content":""}}]})"
        "\n\n: beat\r\n\r\n"
        R"(data: {"choices":[{"delta":{"reasoning":"a"}}]})"
        "\r\n\r\n"
        R"(data: {"choices":[{"delta":{"content":"b"},"finish_reason":null}]})"
        "\n\n"
        R"(data: {"choices":[{"delta":{},"finish_reason":"stop",)"
        R"("stop_reason":"x"}]})"
        "\n\n"
        R"(data: {"choices":[],"usage":{"prompt_tokens":3,)"
        R"("completion_tokens":2,"prompt_tokens_details":null}})"
        "\n\n";
    for (const bool done : {false, true}) {
        Hostile server(streamed(events + (done ? "data: [DONE]\n\n" : "")));
        Upstream upstream = open(asking({url_of(server.port)}));
        Request request{.input = "hi"};
        request.stop = {"x"};
        const Answer answer = ask(upstream.responder(), request);
        CHECK(answer.outcome->status == Status::completed);
        CHECK(answer.outcome->items.size() == 2);
        CHECK(answer.text == "b");
        CHECK(answer.outcome->stopped_by == "x");
        CHECK(answer.outcome->usage.input_tokens == 3);
        CHECK(answer.outcome->usage.output_tokens == 2);
    }
}

TEST_CASE("upstream: one that falls silent has failed") {
    Hostile server(streamed(R"(data: {"choices":[{"delta":{"content":"hi"}}]})"
                            "\n\n"),
                   false);
    UpstreamOptions options = asking({url_of(server.port)});
    options.silence_timeout_ms = 50;
    Upstream upstream = open(options);
    const Answer answer = ask(upstream.responder(), {.input = "hi"});
    CHECK(answer.code() == "upstream_error");
    CHECK(answer.outcome->text == "hi");
    CHECK(answer.outcome->error->message == "the model's server failed: it did not answer in time");
}

TEST_CASE("upstream: the least busy one is asked, and another as long as nothing was answered") {
    FakeResponder first("m"), second("m");
    first.hold = second.hold = true;
    first.tells_items = second.tells_items = true;
    auto one = std::make_unique<Running>(&first);
    Running two(&second);
    Upstream upstream = open(asking({url_of(one->port), url_of(two.port)}));
    Responder* responder = upstream.responder();
    CHECK(responder->models().size() == 1);
    for (const char* id : {"a", "b", "c", "d"}) begin(responder, id, {.input = "one two"});
    CHECK(soon([&] { return first.waiting().size() == 2 && second.waiting().size() == 2; }));
    // a told something, the other one of the first server did not
    const std::string told = first.waiting().front();
    CHECK(first.tell(told, 2));
    std::optional<std::string> begun;
    CHECK(soon([&] {
        for (const char* id : {"a", "b", "c", "d"})
            while (auto event = responder->poll(id))
                if (event->kind == Event::Kind::text_delta) begun = id;
        return begun.has_value();
    }));
    one.reset();  // it dies
    CHECK(soon([&] { return second.waiting().size() == 3; }));
    for (const std::string& id : second.waiting()) second.finish(id);
    for (const char* id : {"a", "b", "c", "d"}) {
        const Answer answer = finish(responder, id);
        CHECK((answer.outcome->status == Status::failed) == (id == *begun));
        CHECK(answer.code() == (id == *begun ? "upstream_error" : ""));
    }
    // the next goes to the one that is left
    second.hold = false;
    CHECK(ask(responder, {.input = "hi"}).text == "echo: hi");
    two.kill();
    CHECK(soon([&] { return !responder->models()[0].ready; }));
    const auto refused = responder->prepare({.input = "hi"});
    REQUIRE_FALSE(refused);
    CHECK(detail::http_status(refused.error()) == 502);
    // and comes back with it
    Request patient{.input = "later"};
    patient.background = true;
    begin(responder, "patient", patient);
    Running again(&second, two.port);
    CHECK(finish(responder, "patient").text == "echo: later");
    CHECK(soon([&] { return responder->models()[0].ready; }));
    CHECK(ask(responder, {.input = "hi"}).text == "echo: hi");
}

TEST_CASE("upstream: what is cancelled is cancelled there, what is too much waits") {
    FakeResponder fake("m");
    fake.hold = true;
    Running server(&fake);
    UpstreamOptions options = asking({url_of(server.port)});
    options.max_running = 1;
    options.max_queued = 2;
    Upstream upstream = open(options);
    Responder* responder = upstream.responder();
    begin(responder, "a", {.input = "first"});
    CHECK(soon([&] { return fake.waiting().size() == 1; }));
    Request urgent{.input = "urgent"};
    urgent.window = Window::asap;
    begin(responder, "b", {.input = "second"});
    begin(responder, "c", urgent);
    auto prepared = responder->prepare({.input = "too much"});
    REQUIRE(prepared);
    CHECK(responder->submit(std::move(*prepared), "d").error().kind == ErrorKind::overloaded);
    CHECK(responder->stats().queued == 2);
    CHECK(responder->stats().running == 1);
    responder->cancel("a");
    CHECK(finish(responder, "a").outcome->status == Status::cancelled);
    CHECK(soon([&] { return fake.cancels == 1; }));  // its connection was closed
    CHECK(soon([&] { return responder->poll("c").has_value(); }));
    CHECK_FALSE(responder->poll("b"));
    responder->cancel("b");  // which waits
    CHECK(finish(responder, "b").outcome->status == Status::cancelled);
    CHECK(soon([&] { return fake.waiting().size() == 1; }));
    fake.finish(fake.waiting().front());
    CHECK(finish(responder, "c").outcome->text == "echo: urgent");
    responder->cancel("c");
    responder->cancel("unknown");
    // what goes on when it ends is dropped
    begin(responder, "e", {.input = "left"});
}

TEST_CASE("upstream: a server in front of it answers as any") {
    FakeResponder fake("m");
    fake.tells_items = true;
    auto behind = std::make_unique<Running>(&fake);
    for (const Dialect dialect : {Dialect::valar, Dialect::openai}) {
        if (!behind) behind = std::make_unique<Running>(&fake);
        Upstream upstream = open(asking({url_of(behind->port)}));
        Running gateway(upstream.responder(), 0, dialect);
        const auto object = Json::parse(
            gateway.post("/v1/responses", R"({"model":"m","input":"one two"})").body);
        REQUIRE(object);
        CHECK((*object)["status"].as_string() == "completed");
        CHECK((*object)["output"][0]["content"][0]["text"].as_string() == "echo: one two");
        const char* chat = R"({"model":"m","messages":[{"role":"user","content":"one two"}]})";
        CHECK(
            gateway.post("/v1/chat/completions", chat).body.find(R"("content":"echo: one two")") !=
            std::string::npos);
        // in the middle of an answer
        fake.hold = true;
        std::thread killer([&] {
            CHECK(soon([&] { return fake.waiting().size() == 1; }));
            CHECK(fake.tell(fake.waiting().front(), 2));
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            behind.reset();
        });
        const HttpReply failed = gateway.post("/v1/chat/completions", chat);
        killer.join();
        fake.hold = false;
        CHECK(failed.status == 502);
        CHECK(failed.body.find(R"("code":"upstream_error")") != std::string::npos);
        CHECK(soon([&] { return !upstream.responder()->models()[0].ready; }));
        CHECK(gateway.post("/v1/responses", R"({"model":"m","input":"one"})").status == 502);
    }
}

TEST_CASE("upstream: options that cannot be") {
    const auto param = [](const UpstreamOptions& options) {
        const auto upstream = Upstream::open(options);
        return upstream ? std::string("opened") : upstream.error().param;
    };
    CHECK(param({}) == "urls");
    CHECK(param({.urls = {"127.0.0.1:8000"}}) == "urls");
    CHECK(param({.urls = {"https://example.org"}}) == "urls");
    CHECK(param({.urls = {"http://localhost/?x"}}) == "urls");
    CHECK(param({.urls = {"http://localhost:1"}, .key = "a\r\nb"}) == "key");
    CHECK(param({.urls = {"http://localhost:1"}, .max_running = 0}) == "max_running");
    CHECK(param({.urls = {"http://localhost:1"}, .refresh_ms = 0}) == "refresh_ms");
    CHECK(param({.urls = {"http://localhost:1"}, .retry_ms = 0}) == "retry_ms");
}
