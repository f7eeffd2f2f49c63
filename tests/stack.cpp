// How much stack the public calls take: all work on a thread with 64 KiB.
#include <doctest/doctest.h>

#if defined(__linux__) && defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#include "engine/engine.hpp"
#include "grammar/grammar.hpp"
#include "http_peer.hpp"
#include "server/server.hpp"
#include "tiny_model.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <utility>

#include <alloca.h>
#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

using namespace valar;

namespace {

constexpr size_t promised = 64 << 10;

/// A stack below which a page ends the process, painted so that what was used can be told.
class PaintedStack {
public:
    explicit PaintedStack(size_t bytes) : bytes_(bytes) {
        memory_ = static_cast<unsigned char*>(mmap(nullptr, page + bytes, PROT_READ | PROT_WRITE,
                                                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        REQUIRE(memory_ != MAP_FAILED);
        REQUIRE(mprotect(memory_, page, PROT_NONE) == 0);
        std::memset(memory_ + page, paint, bytes);
    }
    PaintedStack(const PaintedStack&) = delete;
    ~PaintedStack() { munmap(memory_, page + bytes_); }
    void* bottom() const { return memory_ + page; }
    size_t used() const {
        size_t clean = 0;
        while (clean < bytes_ && memory_[page + clean] == paint) ++clean;
        return bytes_ - clean;
    }

private:
    static constexpr size_t page = 65536;  // that of any system, or some
    static constexpr unsigned char paint = 0xa5;
    size_t bytes_;
    unsigned char* memory_;
};

/// What a thread has, and of that what must not be used: some systems want more for a thread.
size_t thread_bytes() {
    return std::max(promised, size_t(std::max(sysconf(_SC_THREAD_STACK_MIN), 0L)));
}

void* run_work(void* work) {
    const size_t spare = thread_bytes() - promised;
    volatile char* const taken = static_cast<volatile char*>(alloca(spare + 16));
    taken[0] = 0;
    (*static_cast<const std::function<void()>*>(work))();
    return nullptr;
}

/// Runs `work` on a thread that has 64 KiB, of which a thread by itself takes up to 4.
void check(const char* what, const std::function<void()>& work) {
    std::fflush(stdout);
    CAPTURE(what);
    const PaintedStack stack(thread_bytes());
    pthread_attr_t attributes;
    REQUIRE(pthread_attr_init(&attributes) == 0);
    REQUIRE(pthread_attr_setstack(&attributes, stack.bottom(), thread_bytes()) == 0);
    pthread_t thread;
    void* const given = const_cast<std::function<void()>*>(&work);
    REQUIRE(pthread_create(&thread, &attributes, run_work, given) == 0);
    pthread_join(thread, nullptr);
    pthread_attr_destroy(&attributes);
    const size_t used = stack.used() - (thread_bytes() - promised);
    MESSAGE(std::string(what), ": ", used, " bytes of stack");
}

std::string times(std::string_view text, int count) {
    std::string all;
    for (int i = 0; i < count; ++i) all += text;
    return all;
}

EngineOptions tiny_options() {
    static const auto bytes = tiny::model(
        {.types = {TensorType::q4_0, TensorType::q8_0}, .n_context = 2048});
    EngineOptions options;
    options.model_bytes = bytes;
    options.threads = 0;
    return options;
}

Request ask(std::string text) {
    Request request;
    request.input = std::move(text);
    request.max_output_tokens = 20;
    return request;
}

}  // namespace

TEST_CASE("64 KiB of stack: JSON, also what is nested as no one does") {
    const std::string deep = times("[", 100'000), mixed = times(R"({"a":[)", 60) + times("]}", 60);
    check("Json", [&] {
        CHECK_FALSE(Json::parse(deep));
        auto json = Json::parse(mixed);
        REQUIRE(json);
        CHECK(Json(*json) == *json);
        CHECK(json->write(json_pretty).size() > mixed.size());
        CHECK(json->canonical() == mixed);
    });
}

TEST_CASE("64 KiB of stack: an engine") {
    std::optional<Engine> engine;
    check("Engine::open", [&] {
        auto opened = Engine::open(tiny_options());
        REQUIRE(opened);
        engine.emplace(std::move(*opened));
    });
    check("Engine::begin_open, step", [] {
        auto slow = Engine::begin_open(tiny_options());
        REQUIRE(slow);
        while (!slow->is_loaded()) REQUIRE(slow->step(0));
    });
    check("submit, step", [&] {
        Reply reply = engine->submit(ask("hello"));
        REQUIRE(engine->step());
        CHECK(reply.outcome().status == Status::completed);
    });
    const auto answer = [&](const Request& request) {
        Reply reply = engine->submit(request);
        REQUIRE(engine->step());
        return reply.outcome().error ? reply.outcome().error->message : std::string();
    };
    check("a schema", [&] {
        Request request = ask("hello");
        request.format.schema = *Json::parse(
            R"({"type":"object","properties":{"a":{"type":"array","items":{"anyOf":[{"type":"integer"},)"
            R"({"type":"string","pattern":"^(a|b){3,5}$","format":"date-time"}]}},"b":{"$ref":"#"}}})");
        answer(request);
    });
    check("a nested schema", [&] {
        Request request = ask("hello");
        request.format.schema = *Json::parse(times(R"({"type":"array","items":)", 60) +
                                             R"({"type":"integer"})" + times("}", 60));
        answer(request);
    });
    check("nested objects", [&] {
        Request request = ask("hello");
        const auto nested = [&](int depth) {
            request.format.schema = *Json::parse(
                times(R"({"type":"object","required":["a"],"properties":{"a":)", depth) +
                R"({"type":"integer"})" + times("}}", depth));
            return answer(request);
        };
        CHECK(nested(7) == "");
        CHECK(nested(10) == "");
        const std::string said = nested(30);
        CHECK((said.empty() || said.find("stack") != std::string::npos));
    });
    check("a schema with nested values", [&] {
        Request request = ask("hello");
        const std::string value = times("[", 90) + "1" + times("]", 90);
        for (const int depth : {0, 10, 60}) {
            request.format.schema = *Json::parse(times(R"({"type":"array","items":)", depth) +
                                                 R"({"enum":[)" + value + R"(],"const":)" + value +
                                                 "}" + times("}", depth));
            answer(request);
        }
    });
    check("a reference that goes round", [&] {
        Request request = ask("hello");
        request.format.schema = *Json::parse(
            R"({"$defs":{"a":{"anyOf":[{"$ref":"#/$defs/b"},{"type":"array","items":)"
            R"({"$ref":"#/$defs/b"}}]},"b":{"not":{"items":{"$ref":"#/$defs/a"}}}},)"
            R"("properties":{"x":{"$ref":"#/$defs/a"},"y":{"oneOf":[{"$ref":"#/$defs/a"},)"
            R"({"$ref":"#/$defs/b"}]}}})");
        answer(request);
    });
    check("nested arguments and metadata", [&] {
        Request request = ask("hello");
        Tool tool;
        tool.name = "look";
        tool.parameters = *Json::parse(times(R"({"type":"object","properties":{"a":)", 40) + "{}" +
                                       times("}}", 40));
        request.tools.push_back(tool);
        answer(request);
    });
    check("a nested pattern", [&] {
        Request request = ask("hello");
        request.format.regex = times("(", 90) + "a" + times(")*", 90);
        answer(request);
        request.format.regex = times("(", 5000) + "a" + times(")", 5000);
        CHECK_FALSE(answer(request).empty());
    });
    check("a nested GBNF", [&] {
        Request request = ask("hello");
        request.format.gbnf = "root ::= " + times("(", 90) + "\"a\"" + times(")*", 90);
        answer(request);
        request.format.gbnf = "root ::= " + times("(", 5000) + "\"a\"" + times(")", 5000);
        CHECK_FALSE(answer(request).empty());
    });
    check("a tool", [&] {
        Request request = ask("hello");
        Tool tool;
        tool.name = "look";
        tool.parameters = *Json::parse(
            R"({"type":"object","properties":{"where":{"type":"string"}}})");
        request.tools.push_back(tool);
        answer(request);
    });
    check("Conversation", [&] {
        Conversation conversation(*engine, ask(""));
        Reply reply = conversation.say("hello");
        REQUIRE(engine->step());
        auto fork = conversation.fork();
        auto saved = conversation.save();
        REQUIRE(fork);
        REQUIRE(saved);
        REQUIRE(Conversation::restore(*engine, *saved));
    });
}

TEST_CASE("64 KiB of stack: templates, also hostile ones") {
    const auto open = [](const std::string& text) {
        EngineOptions options = tiny_options();
        options.chat_template = text;
        auto engine = Engine::open(options);
        if (!engine) return engine.error().message;
        Reply reply = engine->submit(ask("hello"));
        REQUIRE(engine->step());
        return reply.outcome().error ? reply.outcome().error->message : std::string();
    };
    const auto parentheses = [&](int count) {
        return open("{{ " + times("(", count) + "messages[0]['content']" + times(")", count) +
                    " }}");
    };
    check("30 parentheses", [&] { CHECK(parentheses(30) == ""); });
    check("60 parentheses", [&] {  // some compilers' frames are larger
        const std::string said = parentheses(60);
        CHECK((said.empty() || said.find("stack") != std::string::npos));
    });
    check("60 blocks", [&] {
        CHECK(open(times("{% if true %}", 60) + "{{ messages[0]['content'] }}" +
                   times("{% endif %}", 60)) == "");
    });
    for (const auto& [name, head, middle, tail] :
         {std::tuple("parentheses without end", "(", "1", ")"),
          std::tuple("lists without end", "[", "1", "]"),
          std::tuple("not without end", "not ", "1", ""),
          std::tuple("minus without end", "-", "1", ""),
          std::tuple("calls without end", "range(", "1", ")"),
          std::tuple("subscripts without end", "a[", "1", "]"),
          std::tuple("choices without end", "1 if 1 else ", "1", ""),
          std::tuple("powers without end", "1**", "1", "")}) {
        const std::string text = "{{ " + times(head, 20'000) + middle + times(tail, 20'000) + " }}";
        check(name, [&] { open(text); });
    }
    check("filters without end", [&] { open("{{ 'a'" + times("|upper", 20'000) + " }}"); });
    check("members without end", [&] { open("{{ a" + times(".b", 20'000) + " }}"); });
    check("a macro that calls itself",
          [&] { CHECK(open("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}") != ""); });
    check("a list in a list", [&] {
        const std::string lists =
            "{% set s = namespace(a = [1]) %}{% for i in range(N) %}"
            "{% set s.a = [s.a, i] %}{% endfor %}";
        const auto many = [&](const char* count, const char* then) {
            std::string text = lists + then;
            return open(text.replace(text.find('N'), 1, count));
        };
        CHECK(many("20", "{{ s.a }}{{ s.a|tojson }}{{ s.a == s.a }}") == "");
        CHECK(many("250", "a") == "");
        CHECK(many("250", "{{ s.a }}") != "");
        CHECK(many("250", "{{ s.a|tojson }}") != "");
        many("250", "{{ s.a == [s.a[0], 249] }}{{ [s.a, s.a]|sort }}");
    });
    check("a loop in a loop's list", [&] {
        open(
            "{% set s = namespace(a = 1) %}{% for i in range(5000) %}{% for x in [s.a] %}"
            "{% set s.a = loop %}{% endfor %}{% endfor %}");
    });
    check("a macro in arguments of itself", [&] {
        CHECK(open("{% macro f(x) %}{% if x %}{{ f([f([f(x)])]) | upper ~ (1 if (x and f(x)) else "
                   "2) }}"
                   "{% endif %}{% endmacro %}{{ f(1) }}") != "");
    });
}

TEST_CASE("64 KiB of stack: a coroutine's, which is no thread's") {
    const PaintedStack stack(promised);
    static ucontext_t inside, outside;
    static bool refused = false;
    REQUIRE(getcontext(&inside) == 0);
    inside.uc_stack.ss_sp = stack.bottom();
    inside.uc_stack.ss_size = promised;
    inside.uc_link = &outside;
    const auto run = [] {
        EngineOptions options = tiny_options();
        options.chat_template = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}";
        auto engine = Engine::open(options);
        refused = !engine || engine->submit(ask("hello")).finished();
    };
    makecontext(&inside, static_cast<void (*)()>(run), 0);
    REQUIRE(swapcontext(&outside, &inside) == 0);
    CHECK(refused);
}

TEST_CASE("64 KiB of stack: a store and a server") {
    auto engine = Engine::open(tiny_options());
    REQUIRE(engine);
    ServerOptions options;
    options.port = 0;
    options.dialect = Dialect::openai;
    std::string folder = (std::filesystem::temp_directory_path() / "valar-XXXXXX").string();
    REQUIRE(mkdtemp(folder.data()));
    std::unique_ptr<FileStore> store;
    check("FileStore::open", [&] {
        FileStoreOptions file;
        file.path = folder;
        auto opened = FileStore::open(file);
        REQUIRE(opened);
        store = std::move(*opened);
    });
    options.store = store.get();
    std::optional<Server> server;
    check("Server::open", [&] {
        auto opened = Server::open(engine->responder(), options);
        REQUIRE(opened);
        server.emplace(std::move(*opened));
    });
    const std::string model = engine->responder()->models().front().id;
    std::string statuses;
    check("step", [&] {
        std::thread client([&] {
            check("http_call", [&] {
                for (
                    const std::string& body :
                    {R"({"model":")" + model + R"(","input":"hi","max_output_tokens":9})",
                     times("[", 100'000),
                     R"({"model":")" + model +
                         R"(","max_output_tokens":9,"input":"hi","text":{"format":)" +
                         R"({"type":"json_schema","name":"a","schema":{"type":"array","items":{"type":)" +
                         R"("integer"},"maxItems":2}}}})"}) {
                    HttpCall call;
                    call.port = server->port();
                    call.method = "POST";
                    call.target = "/v1/responses";
                    call.headers = {{"Content-Type", "application/json"}};
                    call.body = body;
                    auto reply = checked_call(call);
                    statuses += " " + std::to_string(reply ? reply->status : 0);
                }
                HttpCall call;
                call.port = server->port();
                for (const char* target : {"/openapi.json", "/metrics", "/v1/responses", "/"}) {
                    call.target = target;
                    auto reply = checked_call(call);
                    statuses += " " + std::to_string(reply ? reply->status : 0);
                }
            });
            server->stop();
        });
        while (true) {
            auto more = server->step(1);
            if (!more || !*more) break;
            REQUIRE(engine->step(1000));
        }
        client.join();
    });
    CHECK(statuses == " 200 400 200 200 200 200 200");
    check("closing", [&] {
        server.reset();
        store.reset();
        engine = Error{};
    });
    std::filesystem::remove_all(folder);
}

#else
TEST_CASE("64 KiB of stack" * doctest::skip()) {}
#endif
