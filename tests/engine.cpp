// The engine on a tiny model: requests, replies, steps, threads, limits.
#include <doctest/doctest.h>

#include "digest_internal.hpp"
#include "engine/engine.hpp"
#include "engine/plan.hpp"
#include "engine/pool.hpp"
#include "engine/prompt.hpp"
#include "host.hpp"
#include "json_internal.hpp"
#include "run_model.hpp"
#include "sample.hpp"
#include "sampler_internal.hpp"
#include "template/internal.hpp"
#include "tiny_model.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <string>
#include <thread>
#include <tuple>

using namespace valar;

// Allocations of this thread, while they are counted.
static thread_local bool counts_allocations = false;
static thread_local int allocations = 0;

[[gnu::noinline]] void* operator new(size_t size) {
    allocations += counts_allocations;
    if (void* memory = std::malloc(size)) return memory;
    std::abort();
}
[[gnu::noinline]] void* operator new(size_t size, const std::nothrow_t&) noexcept {
    allocations += counts_allocations;
    return std::malloc(size);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

// Cases with several threads. The thread sanitizer runs these alone: to the others it says nothing.
const doctest::test_suite with_threads("threads");

const std::vector<std::byte>& model_bytes() {
    static const auto bytes = tiny::model({.types = {TensorType::q4_0, TensorType::q8_0}});
    return bytes;
}

// All layers see 40 positions; keys and values of a long text do not grow.
const std::vector<std::byte>& windowed_bytes() {
    static const auto bytes = tiny::model(
        {.types = {TensorType::q4_0, TensorType::q8_0}, .n_context = 2048, .window = 40});
    return bytes;
}

// Of five layers the third sees all.
const std::vector<std::byte>& partly_windowed_bytes() {
    static const auto bytes = tiny::model({.types = {TensorType::q4_0, TensorType::q8_0},
                                           .n_layers = 5,
                                           .n_embd = 128,
                                           .n_heads = 2,
                                           .n_kv_heads = 1,
                                           .n_ff = 128,
                                           .n_context = 2048,
                                           .window = 40,
                                           .full_every = 3});
    return bytes;
}

// Texts of more than 100 tokens are turned by other rope factors.
const std::vector<std::byte>& long_rope_bytes() {
    static const auto bytes = tiny::model(
        {.types = {TensorType::q4_0, TensorType::q8_0}, .n_context = 2048, .short_rope = 100});
    return bytes;
}

EngineOptions tiny_options() {
    EngineOptions options;
    options.model_bytes = model_bytes();
    options.threads = 0;
    options.show_schema = false;  // the tiny contexts have no room for it
    return options;
}

Engine open_tiny(const EngineOptions& options = tiny_options()) {
    auto engine = Engine::open(options);
    INFO((engine ? "" : engine.error().message));
    REQUIRE(engine);
    return std::move(*engine);
}

Request ask(std::string text, uint32_t max_output_tokens = 10) {
    Request request;
    request.input = std::move(text);
    request.max_output_tokens = max_output_tokens;
    request.seed = 1;
    return request;
}

std::string answer(Engine& engine, const Request& request) {
    Reply reply = engine.submit(request);
    REQUIRE(engine.step());
    REQUIRE(reply.finished());
    CHECK(reply.outcome().status == Status::completed);
    return reply.outcome().text;
}

std::string answer(Engine&& engine, const Request& request) { return answer(engine, request); }

std::string code_of(const Reply& reply) {
    return reply.finished() && reply.outcome().error ? reply.outcome().error->code : "";
}

}  // namespace

TEST_CASE("a request: events in order, the outcome") {
    Engine engine = open_tiny();
    CHECK(engine.is_loaded());
    CHECK(engine.load_progress() == 1.0f);
    Reply reply = engine.submit(ask("hello world"));
    CHECK(reply.id().starts_with("resp_"));
    CHECK(reply.id().size() == 29);
    CHECK_FALSE(reply.poll());
    CHECK_FALSE(reply.finished());
    std::string text;
    int started = 0, finished = 0;
    for (bool more = true; more;) {
        auto stepped = engine.step(0);
        REQUIRE(stepped);
        more = *stepped;
        while (auto event = reply.poll()) {
            CHECK(finished == 0);
            if (event->kind == Event::Kind::started) CHECK(started++ == 0);
            if (auto delta = event->text_delta()) {
                CHECK(started == 1);
                CHECK_FALSE(delta->empty());
                CHECK(detail::utf8_valid(*delta));
                text += *delta;
            }
            if (event->kind == Event::Kind::finished) {
                ++finished;
                CHECK(event->outcome->text == text);
            }
        }
    }
    CHECK(finished == 1);
    CHECK_FALSE(reply.poll());
    const Outcome& outcome = reply.outcome();
    CHECK(outcome.status == Status::completed);
    CHECK_FALSE(outcome.error);
    CHECK(outcome.text == text);
    CHECK(outcome.cut);
    CHECK(outcome.usage.output_tokens == 10);
    CHECK(outcome.usage.input_tokens > 10);
    CHECK(outcome.usage.cached_tokens == 0);
    CHECK(outcome.logprobs.empty());
    const ResponderStats stats = engine.responder()->stats();
    CHECK(stats.completed == 1);
    CHECK(stats.output_tokens == 10);
    CHECK(stats.running == 0);
    CHECK(stats.queued == 0);
}

TEST_CASE("tokens are counted while they are made") {
    Engine engine = open_tiny();
    Request request = ask("some words that are read first", 8);
    request.format.one_of = {"yes", "no"};
    Reply other = engine.submit(ask("another one", 6)), held = engine.submit(request);
    std::vector<uint64_t> in, out;
    while (!other.finished() || !held.finished()) {
        REQUIRE(engine.step(0).ok());
        const ResponderStats stats = engine.responder()->stats();
        if (in.empty() || in.back() != stats.input_tokens) in.push_back(stats.input_tokens);
        if (out.empty() || out.back() != stats.output_tokens) out.push_back(stats.output_tokens);
    }
    CHECK(out.size() > 4);
    CHECK(std::is_sorted(out.begin(), out.end()));
    CHECK(std::is_sorted(in.begin(), in.end()));
    const Usage &a = other.outcome().usage, &b = held.outcome().usage;
    const ResponderStats stats = engine.responder()->stats();
    CHECK(stats.input_tokens == a.input_tokens + b.input_tokens);
    CHECK(stats.output_tokens == a.output_tokens + b.output_tokens);
    CHECK(stats.cached_tokens == a.cached_tokens + b.cached_tokens);
    CHECK(stats.constrained_tokens > 0);
    CHECK(stats.constrained_tokens <= b.output_tokens);
    CHECK(stats.masks <= stats.constrained_tokens);
}

TEST_CASE("an answer depends on file, request and options alone" * with_threads) {
    Engine engine = open_tiny();
    Request request = ask("the same words", 30);
    request.temperature = 1.2;
    const std::string expected = answer(engine, request);
    CHECK(answer(engine, request) == expected);
    for (const int threads : {0, 1, 2})
        for (const uint32_t step_tokens : {1u, 7u, 512u}) {
            EngineOptions options = tiny_options();
            options.threads = threads;
            options.step_tokens = step_tokens;
            options.context_tokens = 200;
            Engine other = open_tiny(options);
            Reply reply = other.submit(request);
            for (bool more = true; more;) {
                auto stepped = other.step(1);
                REQUIRE(stepped);
                more = *stepped;
            }
            CHECK(reply.outcome().text == expected);
        }
    request.seed = 2;
    CHECK(answer(engine, request) != expected);
    request.temperature = 0;
    const std::string greedy = answer(engine, request);
    request.seed = 3;
    CHECK(answer(engine, request) == greedy);
    request.seed.reset();
    request.temperature = 2;
    CHECK(answer(engine, request) != answer(engine, request));
}

TEST_CASE("items are a conversation") {
    Engine engine = open_tiny();
    Request text = ask("hello"), items = ask("");
    items.input = std::vector<Item>{Item::message(Role::user, "hello")};
    CHECK(answer(engine, text) == answer(engine, items));
    text.instructions = "be brief";
    CHECK(answer(engine, text) != answer(engine, items));
    items.input.items.insert(items.input.items.begin(), Item::message(Role::system, "be brief"));
    CHECK(answer(engine, text) == answer(engine, items));
}

// Makes items of what a model says, so many pushes each: a thought, a message, a call, and again.
class ThirdsParser final : public detail::OutputParser {
public:
    explicit ThirdsParser(int pushes) : pushes_(pushes) {}
    void text(std::string_view more, detail::OutputSink& out) override {
        static constexpr Item::Kind kinds[] = {Item::Kind::reasoning, Item::Kind::message,
                                               Item::Kind::function_call};
        if (more.empty()) return;
        if (count_ % pushes_ == 0) {
            if (count_ > 0) out.end_item();
            const Item::Kind kind = kinds[count_ / pushes_ % 3];
            out.begin_item(kind, kind == Item::Kind::function_call ? "forge" : "");
        }
        ++count_;
        out.extend_item(more);
    }
    bool mark(const detail::OutputMark& mark, detail::OutputSink& out) override {
        if (mark.is_text && !mark.ends) text(mark.spelling, out);
        return mark.ends;
    }
    void finish(bool whole, detail::OutputSink& out) override {
        if (whole || count_ % pushes_ == 0) out.end_item();
    }
    bool thinking() const override { return count_ / pushes_ % 3 == 0; }

private:
    int pushes_, count_ = 0;
};

// All that a reply told while it was answered, put together again.
struct Told {
    std::vector<Item> items;
    std::string order;  // a letter an event
    std::shared_ptr<const Outcome> outcome;
    void take(const Event& event) {
        order += "stfbrae"[static_cast<size_t>(event.kind)];
        if (event.kind == Event::Kind::item_begun) {
            CHECK(event.index == items.size());
            CHECK(event.item.arguments.empty());
            items.push_back(event.item);
            if (!event.item.is_call())
                items.back().content = {{ContentPart::Kind::output_text, {}}};
        } else if (event.kind == Event::Kind::item_ended) {
            CHECK(event.index + 1 == items.size());
            CHECK(event.item.text() == items.back().text());
            CHECK(event.item.arguments == items.back().arguments);
            CHECK((event.call() != nullptr) == items.back().is_call());
        } else if (!event.text.empty()) {
            CHECK(event.index + 1 == items.size());
            (event.kind == Event::Kind::arguments_delta
                 ? items.back().arguments
                 : items.back().content[0].text) += event.text;
        }
        if (event.outcome) outcome = event.outcome;
    }
};

Told tell(Engine& engine, const Request& request, int pushes, bool poll_late = false) {
    Told told;
    Responder& responder = *engine.responder();
    auto prepared = responder.prepare(request);
    REQUIRE(prepared);
    static_cast<detail::PreparedPrompt&>(**prepared).parser = std::make_unique<ThirdsParser>(
        pushes);
    REQUIRE(responder.submit(std::move(*prepared), "resp_thirds"));
    for (bool more = true; more;) {
        auto stepped = engine.step(poll_late ? -1 : 0);
        REQUIRE(stepped);
        more = *stepped;
        while (auto event = responder.poll("resp_thirds")) told.take(*event);
    }
    REQUIRE(told.outcome);
    return told;
}

TEST_CASE("an answer is items: events tell of each, and what was cut is no call") {
    Engine engine = open_tiny();
    Request request = ask("hello", 40);
    request.logprobs = true;
    const Told told = tell(engine, request, 4), late = tell(engine, request, 4, true);
    const Outcome& outcome = *told.outcome;
    REQUIRE(outcome.items.size() > 4);
    CHECK(told.order.starts_with("sb"));
    CHECK(told.order.ends_with("f"));
    CHECK(late.order.starts_with("sbrebtebaebr"));
    CHECK(late.outcome->text == outcome.text);
    CHECK(late.items.size() == told.items.size());
    std::string text, all;
    for (size_t i = 0; i < outcome.items.size(); ++i) {
        const Item& item = outcome.items[i];
        const Item::Kind kinds[] = {Item::Kind::reasoning, Item::Kind::message,
                                    Item::Kind::function_call};
        CHECK(item.kind == kinds[i % 3]);
        CHECK(item.role == Role::assistant);
        CHECK(item.text() == told.items[i].text());
        CHECK(item.arguments == told.items[i].arguments);
        CHECK(item.is_call() == item.call_id.starts_with("call_"));
        CHECK((item.name == "forge") == item.is_call());
        if (item.kind == Item::Kind::message) text += item.text();
        all += item.is_call() ? item.arguments : item.text();
    }
    CHECK(outcome.items[2].call_id != outcome.items[5].call_id);
    CHECK(outcome.text == text);
    Request plain = ask("hello", 40);
    CHECK(answer(engine, plain).starts_with(all));  // the same words, if not a call that was cut
    uint32_t thoughts = 0;
    for (const TokenLogprob& token : outcome.logprobs) thoughts += token.item % 3 == 0;
    CHECK(outcome.usage.reasoning_tokens > 0);
    CHECK(outcome.usage.reasoning_tokens + 8 > thoughts);
    CHECK(thoughts + 8 > outcome.usage.reasoning_tokens);

    for (uint32_t most = 9; most < 14; ++most) {  // within the call
        const Told cut = tell(engine, ask("hello", most), 4);
        CHECK(cut.outcome->cut);
        for (const Item& item : cut.outcome->items)
            CHECK((!item.is_call() || item.arguments == outcome.items[2].arguments));
        const bool begun = cut.items.back().is_call();
        CHECK((!begun || cut.outcome->items.size() == cut.items.size() - 1 ||
               cut.order.ends_with("ef")));
    }
}

TEST_CASE("stop strings end messages, not thoughts or calls") {
    Engine engine = open_tiny();
    const Told free = tell(engine, ask("hello", 40), 4);
    const std::string thought = free.outcome->items[0].text();
    const std::string said = free.outcome->items[1].text();
    REQUIRE(said.size() > 1);
    Request request = ask("hello", 40);
    size_t last = said.size() - 1;
    while ((said[last] & 0xC0) == 0x80) --last;
    const std::string stop = said.substr(last);
    request.stop = {stop};
    const Told told = tell(engine, request, 4);
    REQUIRE(told.outcome->items.size() == 2);
    CHECK(told.outcome->items[0].text() == thought);
    CHECK(told.outcome->items[1].text() == said.substr(0, said.find(stop)));
    CHECK(told.outcome->stopped_by == stop);
    CHECK_FALSE(told.outcome->cut);
    CHECK(told.order.ends_with("ef"));
}

TEST_CASE("several requests wait and are answered one after another") {
    Engine engine = open_tiny();
    std::vector<Reply> replies;
    std::vector<std::string> expected;
    for (const char* text : {"one", "two", "three", "four"}) {
        expected.push_back(answer(engine, ask(text)));
        replies.push_back(engine.submit(ask(text)));
        REQUIRE(engine.step(0));
    }
    REQUIRE(engine.step());
    replies.clear();
    for (const char* text : {"one", "two", "three", "four"})
        replies.push_back(engine.submit(ask(text)));
    CHECK(engine.responder()->stats().queued == 4);
    auto more = engine.step();
    REQUIRE(more);
    CHECK_FALSE(*more);
    for (size_t i = 0; i < 4; ++i) CHECK(replies[i].outcome().text == expected[i]);
}

TEST_CASE("cancel: running and waiting ones") {
    EngineOptions options = tiny_options();
    options.max_running = 1;
    Engine engine = open_tiny(options);
    Reply first = engine.submit(ask("first", 400)), second = engine.submit(ask("second")),
          third = engine.submit(ask("third"));
    while (!first.poll() || first.poll()) REQUIRE(engine.step(0));  // until there is text
    first.cancel();
    second.cancel();
    REQUIRE(engine.step(0));
    CHECK(first.finished());
    CHECK(first.outcome().status == Status::cancelled);
    CHECK(first.outcome().error->kind == ErrorKind::cancelled);
    CHECK(second.outcome().status == Status::cancelled);
    REQUIRE(engine.step());
    CHECK(third.outcome().status == Status::completed);
    CHECK(third.outcome().text == answer(engine, ask("third")));
    third.cancel();  // too late: nothing
    CHECK(third.outcome().status == Status::completed);
    CHECK(engine.responder()->stats().cancelled == 2);
}

TEST_CASE("cancel in the middle of a batch") {
    EngineOptions options = tiny_options();
    Engine engine = open_tiny(options);
    const std::string expected = answer(engine, ask("after"));
    for (int steps = 1; steps < 12; ++steps) {
        Reply reply = engine.submit(ask(std::string(300, 'x'), 50));
        for (int i = 0; i < steps; ++i) REQUIRE(engine.step(0));
        reply.cancel();
        CHECK(answer(engine, ask("after")) == expected);
        CHECK(reply.finished());
    }
}

TEST_CASE("dropping a reply cancels it, unless detached") {
    Engine engine = open_tiny();
    { Reply dropped = engine.submit(ask("dropped", 400)); }
    REQUIRE(engine.step());
    CHECK(engine.responder()->stats().cancelled == 1);
    {
        Reply kept = engine.submit(ask("kept"));
        kept.detach();
    }
    REQUIRE(engine.step());
    CHECK(engine.responder()->stats().completed == 1);
    Reply moved;
    CHECK(moved.finished());
    CHECK_FALSE(moved.poll());
    CHECK(moved.wait(0));
    CHECK(moved.id().empty());
    CHECK(moved.outcome().text.empty());
    moved = engine.submit(ask("moved"));
    Reply last = std::move(moved);
    REQUIRE(engine.step());
    CHECK(last.outcome().status == Status::completed);
}

TEST_CASE("a reply outlives its engine") {
    Reply waiting, running, done;
    std::string begun;
    {
        Engine engine = open_tiny();
        done = engine.submit(ask("done"));
        REQUIRE(engine.step());
        running = engine.submit(ask("running", 400));
        while (begun.empty()) {
            REQUIRE(engine.step(0));
            while (auto event = running.poll())
                if (auto text = event->text_delta()) begun += *text;
        }
        waiting = engine.submit(ask("waiting"));
    }
    CHECK(done.outcome().status == Status::completed);
    for (Reply* reply : {&waiting, &running}) {
        CHECK(reply->wait(0));
        CHECK(reply->outcome().status == Status::failed);
        CHECK(reply->outcome().error->kind == ErrorKind::closed);
        CHECK(code_of(*reply) == "engine_closed");
        reply->cancel();
    }
    CHECK(running.outcome().text.starts_with(begun));
}

TEST_CASE("start: a thread of its own" * with_threads) {
    Engine engine = open_tiny();
    const std::string expected = answer(engine, ask("hello"));
    Reply before = engine.submit(ask("hello"));
    CHECK_FALSE(before.wait(1));
    REQUIRE(engine.start());
    REQUIRE(engine.start());
    CHECK(before.wait());
    CHECK(before.outcome().text == expected);
    auto stepped = engine.step();
    REQUIRE_FALSE(stepped);
    CHECK(stepped.error().kind == ErrorKind::invalid_request);
    for (int i = 0; i < 3; ++i) {
        Reply reply = engine.submit(ask("hello"));
        CHECK(reply.wait(60'000));
        CHECK(reply.outcome().text == expected);
    }
    Reply cancelled = engine.submit(ask("long", 400));
    cancelled.cancel();
    CHECK(cancelled.wait(60'000));
    engine.stop();
    engine.stop();
    CHECK(answer(engine, ask("hello")) == expected);
    REQUIRE(engine.start());
    Engine moved = std::move(engine);
    Reply after = moved.submit(ask("hello"));
    CHECK(after.wait(60'000));
    CHECK(after.outcome().text == expected);
}

TEST_CASE("many threads submit, poll and cancel" * with_threads) {
    EngineOptions options = tiny_options();
    options.threads = 1;
    Engine engine = open_tiny(options);
    const std::string expected = answer(engine, ask("hello", 5));
    REQUIRE(engine.start());
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([&, t] {
            for (int i = 0; i < 5; ++i) {
                Reply reply = engine.submit(ask("hello", 5));
                if ((i + t) % 3 == 0) reply.cancel();
                if ((i + t) % 3 == 1) continue;  // dropped
                std::string text;
                while (!reply.wait(1))
                    while (auto event = reply.poll())
                        if (auto delta = event->text_delta()) text += *delta;
                while (auto event = reply.poll())
                    if (auto delta = event->text_delta()) text += *delta;
                if (text != reply.outcome().text) ++wrong;
                if (reply.outcome().status == Status::completed && text != expected) ++wrong;
                (void)engine.responder()->stats();
            }
        });
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
}

TEST_CASE("begin_open: loading in steps, requests may wait") {
    auto engine = Engine::begin_open(tiny_options());
    REQUIRE(engine);
    CHECK_FALSE(engine->is_loaded());
    CHECK(engine->load_progress() == 0.0f);
    CHECK_FALSE(engine->responder()->models()[0].ready);
    CHECK(engine->responder()->models()[0].progress == 0.0f);
    Reply early = engine->submit(ask("early"));
    int steps = 0;
    for (float last = -1; !engine->is_loaded(); ++steps) {
        REQUIRE(engine->step(0));
        CHECK(engine->load_progress() > last);
        last = engine->load_progress();
    }
    CHECK(steps > 3);
    CHECK(engine->responder()->models()[0].ready);
    REQUIRE(engine->step());
    CHECK(early.outcome().status == Status::completed);
}

TEST_CASE("begin_open: weights that cannot be read end every request") {
    struct Source {
        std::atomic<bool> broken{false};
    } source;
    EngineOptions options;
    options.threads = 0;
    options.model_reader.size = model_bytes().size();
    options.model_reader.context = &source;
    options.model_reader.read = [](void* context, uint64_t offset, void* dst, size_t size) {
        std::memcpy(dst, model_bytes().data() + offset, size);
        return !static_cast<Source*>(context)->broken.load();
    };
    auto engine = Engine::begin_open(options);
    REQUIRE(engine);
    source.broken = true;
    Reply reply = engine->submit(ask("hello"));
    CHECK_FALSE(engine->step());
    CHECK_FALSE(engine->step());
    CHECK(reply.outcome().status == Status::failed);
    CHECK(code_of(engine->submit(ask("again"))) == "engine_closed");
}

TEST_CASE("refused requests are replies that are finished") {
    EngineOptions options = tiny_options();
    options.aliases = {"zai-org/GLM-5.1-FP8", "other"};
    options.max_queued = 2;
    Engine engine = open_tiny(options);
    const auto refused = [&](const Request& request) {
        Reply reply = engine.submit(request);
        REQUIRE(reply.finished());
        CHECK(reply.outcome().status == Status::failed);
        auto event = reply.poll();
        REQUIRE(event);
        CHECK(event->kind == Event::Kind::finished);
        CHECK_FALSE(reply.poll());
        return *reply.outcome().error;
    };
    const auto with = [](auto change) {
        Request request = ask("hello");
        change(request);
        return request;
    };
    const Error unknown = refused(with([](Request& r) { r.model = "nothing"; }));
    CHECK(unknown.kind == ErrorKind::not_found);
    CHECK(unknown.code == "model_not_found");
    CHECK(unknown.param == "model");
    CHECK(refused(with([](Request& r) { r.input = ""; })).param == "input");
    CHECK(refused(with([](Request& r) { r.max_output_tokens = 0; })).param == "max_output_tokens");
    CHECK(refused(with([](Request& r) { r.temperature = 2.1; })).param == "temperature");
    CHECK(refused(with([](Request& r) { r.temperature = std::nan(""); })).param == "temperature");
    CHECK(refused(with([](Request& r) { r.top_p = -0.1; })).param == "top_p");
    CHECK(refused(with([](Request& r) { r.min_p = 1.5; })).param == "min_p");
    CHECK(refused(with([](Request& r) { r.top_logprobs = 21; })).param == "top_logprobs");
    const Error bracket = refused(with([](Request& r) { r.format.regex = "a["; }));
    CHECK(bracket.code == "invalid_value");
    CHECK(bracket.param == "text.format");
    const Error schema = refused(with([](Request& r) {
        r.format.schema = *Json::parse(R"({"properties": {"a": {"format": "colour"}}})");
    }));
    CHECK(schema.code == "invalid_json_schema");
    CHECK(schema.message.find("'/properties/a/format'") != std::string::npos);
    CHECK(schema.param == "text.format.schema");
    const Error tool = refused(with([](Request& r) {
        r.tools = {{.name = "f", .parameters = *Json::parse(R"({"type": "objekt"})")}};
    }));
    CHECK(tool.code == "invalid_json_schema");
    CHECK(tool.param == "tools[0].parameters");
    const Error full = refused(with([](Request& r) { r.input = std::string(600, 'x'); }));
    CHECK(full.code == "context_length_exceeded");
    CHECK(full.param == "input");
    const Error huge = refused(with([](Request& r) { r.input = std::string(17 << 20, 'x'); }));
    CHECK(huge.code == "context_length_exceeded");  // which the template finds first
    CHECK(huge.param == "input");
    for (const char* name : {"", "Tiny", "other", "zai-org/GLM-5.1-FP8"}) {
        Request request = ask("hello");
        request.model = name;
        CHECK(answer(engine, request).size() > 0);
    }
    Reply one = engine.submit(ask("1")), two = engine.submit(ask("2"));
    CHECK(refused(ask("3")).kind == ErrorKind::overloaded);
    REQUIRE(engine.step());
    CHECK(two.outcome().status == Status::completed);
}

TEST_CASE("limits: max_output_tokens and the context") {
    EngineOptions options = tiny_options();
    options.context_tokens = 100;
    Engine engine = open_tiny(options);
    Request request = ask("hello");
    request.max_output_tokens.reset();
    Reply reply = engine.submit(request);
    REQUIRE(engine.step());
    const Outcome& outcome = reply.outcome();
    CHECK((!outcome.cut || outcome.usage.input_tokens + outcome.usage.output_tokens == 100));
    request.max_output_tokens = 1;
    Reply one = engine.submit(request);
    REQUIRE(engine.step());
    CHECK(one.outcome().usage.output_tokens == 1);
    const uint32_t overhead = outcome.usage.input_tokens - 1;  // "hello" is one token
    request.input = std::string(100 - overhead, 'x');
    CHECK(code_of(engine.submit(request)) == "context_length_exceeded");
    request.input = std::string(99 - overhead, 'x');
    request.max_output_tokens.reset();
    Reply last = engine.submit(request);
    REQUIRE(engine.step());
    CHECK(last.outcome().status == Status::completed);
    CHECK(last.outcome().usage.input_tokens == 99);
    CHECK(last.outcome().usage.output_tokens == 1);
}

TEST_CASE("log-probabilities when asked for") {
    Engine engine = open_tiny();
    Request request = ask("hello", 6);
    request.logprobs = true;
    request.top_logprobs = 3;
    request.temperature = 0;
    Reply reply = engine.submit(request);
    REQUIRE(engine.step());
    const Outcome& outcome = reply.outcome();
    CHECK(outcome.logprobs.size() == outcome.usage.output_tokens);
    std::string bytes;
    for (const TokenLogprob& one : outcome.logprobs) {
        bytes += one.bytes;
        REQUIRE(one.top.size() == 3);
        CHECK(one.logprob <= 0);
        CHECK(one.top[0].logprob == one.logprob);  // greedy
        CHECK(one.top[0].bytes == one.bytes);
        CHECK(one.top[0].logprob >= one.top[1].logprob);
        CHECK(one.top[1].logprob >= one.top[2].logprob);
    }
    CHECK(detail::utf8_repair(bytes) == outcome.text);
}

TEST_CASE("step: one at a time, also from a callback") {
    struct Inside {
        Engine* engine;
        bool refused = false;
    };
    Engine engine = open_tiny();
    Inside inside{&engine};
    engine.responder()->on_ready({[](void* context, const std::string&) {
                                      Inside& self = *static_cast<Inside*>(context);
                                      self.refused = !self.engine->step(0);
                                  },
                                  &inside});
    auto prepared = engine.responder()->prepare(ask("hello"));
    REQUIRE(prepared);
    REQUIRE(engine.responder()->submit(std::move(*prepared), "x"));
    REQUIRE(engine.step());
    CHECK(inside.refused);
    engine.responder()->on_ready({});
}

TEST_CASE("the Responder: ids, events, announcements") {
    Engine engine = open_tiny();
    Responder& responder = *engine.responder();
    const auto models = responder.models();
    REQUIRE(models.size() == 1);
    CHECK(models[0].id == "Tiny");
    CHECK(models[0].context_tokens == 512);
    CHECK(models[0].created > 1'600'000'000);
    struct Heard {
        std::mutex mutex;
        std::vector<std::string> ids;
    } heard;
    responder.on_ready({[](void* context, const std::string& id) {
                            Heard& to = *static_cast<Heard*>(context);
                            const std::lock_guard<std::mutex> lock(to.mutex);
                            to.ids.push_back(id);
                        },
                        &heard});
    auto prepared = responder.prepare(ask("hello"));
    REQUIRE(prepared);
    CHECK((*prepared)->model == "Tiny");
    CHECK((*prepared)->input_tokens > 10);
    CHECK((*prepared)->temperature == 1.0);
    CHECK((*prepared)->top_p == 1.0);
    CHECK((*prepared)->seed == 1);
    REQUIRE(responder.submit(std::move(*prepared), "resp_a"));
    CHECK_FALSE(responder.poll("resp_a"));
    CHECK_FALSE(responder.poll("resp_b"));
    responder.cancel("resp_b");
    REQUIRE(engine.step());
    CHECK(heard.ids == std::vector<std::string>{"resp_a"});  // nobody polled in between
    std::vector<Event::Kind> kinds;
    while (auto event = responder.poll("resp_a")) kinds.push_back(event->kind);
    CHECK(kinds == std::vector<Event::Kind>{Event::Kind::started, Event::Kind::item_begun,
                                            Event::Kind::text_delta, Event::Kind::item_ended,
                                            Event::Kind::finished});
    CHECK_FALSE(responder.poll("resp_a"));

    prepared = responder.prepare(ask("again", 50));
    REQUIRE(responder.submit(std::move(*prepared), "resp_a"));  // free again
    prepared = responder.prepare(ask("again", 50));
    CHECK_FALSE(responder.submit(std::move(*prepared), "resp_a"));  // in use
    responder.cancel("resp_a");
    responder.on_ready({});
    heard.ids.clear();
    REQUIRE(engine.step());
    CHECK(heard.ids.empty());
    auto event = responder.poll("resp_a");
    REQUIRE(event);
    CHECK(event->kind == Event::Kind::finished);
    CHECK(event->outcome->status == Status::cancelled);
    CHECK(responder.stats().cancelled == 1);
}

TEST_CASE("the Responder: what another one prepared is refused") {
    struct Copied : Prepared {
        explicit Copied(const Prepared& from) : Prepared(from) {}
    };
    Engine engine = open_tiny(), other = open_tiny();
    Responder& responder = *engine.responder();
    auto own = responder.prepare(ask("hello"));
    auto foreign = other.responder()->prepare(ask("hello"));
    REQUIRE(own);
    REQUIRE(foreign);
    auto copied = std::make_unique<Copied>(**own);
    for (Prepared* prepared : {static_cast<Prepared*>(copied.release()), foreign->release()}) {
        auto submitted = responder.submit(std::unique_ptr<Prepared>(prepared), "resp_a");
        REQUIRE_FALSE(submitted);
        CHECK(submitted.error().kind == ErrorKind::invalid_request);
    }
    CHECK_FALSE(responder.submit(nullptr, "resp_a"));
    CHECK(responder.submit(std::move(*own), "resp_a"));
}

TEST_CASE("prepared with nothing said: the file's own sampling, else 1; a drawn seed") {
    const auto plain = open_tiny().responder()->prepare(Request{.input = "hi"});
    REQUIRE(plain);
    CHECK((*plain)->temperature == 1.0);
    CHECK((*plain)->seed >= 0);
    CHECK((*plain)->seed < (int64_t{1} << 53));
    const auto open_with = [](const char* key, float value) {
        auto from = Gguf::from_bytes(model_bytes());
        GgufWriter writer;
        for (const GgufKey& entry : from->keys()) writer.set(entry);
        writer.set(key, value);
        for (const TensorInfo& tensor : from->tensors())
            writer.add_tensor(tensor.name, tensor.type, std::span(tensor.dims).first(tensor.n_dims),
                              *from->tensor_bytes(tensor));
        auto bytes = writer.to_bytes();
        REQUIRE(bytes);
        EngineOptions options = tiny_options();
        options.model_bytes = *bytes;
        auto engine = Engine::open(options);
        if (!engine) return -1.0;
        return (*engine->responder()->prepare(Request{.input = "hi"}))->temperature;
    };
    CHECK(open_with("general.sampling.temp", 0.25f) == 0.25);
    CHECK(open_with("general.sampling.temp", 25.0f) == -1.0);
    CHECK(open_with("general.other", 25.0f) == 1.0);
}

TEST_CASE("options and files that are refused, and the memory plan") {
    const auto refused = [](auto change) {
        EngineOptions options = tiny_options();
        change(options);
        auto engine = Engine::open(options);
        return engine ? Error{} : engine.error();
    };
    CHECK(refused([](EngineOptions& o) { o.context_tokens = 513; }).param == "context_tokens");
    CHECK(refused([](EngineOptions& o) { o.step_tokens = 0; }).param == "step_tokens");
    CHECK(refused([](EngineOptions& o) { o.threads = -2; }).param == "threads");
    CHECK(refused([](EngineOptions& o) { o.model_bytes = {}; }).param == "model_path");
    CHECK(refused([](EngineOptions& o) {
              o.model_bytes = {};
              o.model_path = "/no/such/file.gguf";
          }).kind == ErrorKind::not_found);
    CHECK(refused([](EngineOptions& o) { o.chat_template = "{% for %}"; }).kind ==
          ErrorKind::bad_data);
    CHECK(refused([](EngineOptions& o) { o.chat_template = "nope"; }).param == "chat_template");
    const Error format = refused([](EngineOptions& o) { o.tool_format = "no-such"; });
    CHECK(format.param == "tool_format");
    CHECK(format.message.find(" qwen3-coder ") != std::string::npos);
    EngineOptions named = tiny_options();
    named.chat_template = "llama3";
    CHECK(Engine::open(named));
    EngineOptions options = tiny_options();
    auto plan = Engine::memory_plan(options);
    REQUIRE(plan);
    CHECK(plan->weights > 0);
    CHECK(plan->total() == plan->weights + plan->kv + plan->scratch);
    options.context_tokens = 256;
    CHECK(Engine::memory_plan(options)->kv * 2 == plan->kv);
    options.model_id = "mine";
    CHECK(open_tiny(options).responder()->models()[0].id == "mine");
    options.model_id = "m\xff\xc3";  // of a file name in an old encoding, say
    CHECK(open_tiny(options).responder()->models()[0].id == "m\xef\xbf\xbd\xef\xbf\xbd");
}

TEST_CASE("all memory that the plan counts comes from the allocator") {
    struct Counter {
        uint64_t bytes = 0, most = 0;
        uint64_t limit = UINT64_MAX;
    } counter;
    EngineOptions options = tiny_options();
    options.allocator.allocate = [](void* context, uint64_t bytes, uint64_t alignment) -> void* {
        Counter& counts = *static_cast<Counter*>(context);
        if (bytes > counts.limit - counts.bytes) return nullptr;
        counts.bytes += bytes;
        counts.most = std::max(counts.most, counts.bytes);
        void* memory = ::operator new(bytes, std::align_val_t(alignment));
        std::memset(memory, 0xa5, bytes);
        return memory;
    };
    options.allocator.release = [](void* context, void* memory, uint64_t bytes) {
        static_cast<Counter*>(context)->bytes -= bytes;
        ::operator delete(memory, std::align_val_t(64));
    };
    options.allocator.context = &counter;
    const auto plan = Engine::memory_plan(options);
    REQUIRE(plan);
    CHECK(counter.most == 0);
    {
        Engine engine = open_tiny(options);
        CHECK(counter.bytes == plan->total());
        CHECK(answer(engine, ask("hello world")) == answer(open_tiny(), ask("hello world")));
    }
    CHECK(counter.most == plan->total());
    CHECK(counter.bytes == 0);
    counter.limit = plan->total() - 1;
    const auto refused = Engine::open(options);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().kind == ErrorKind::out_of_memory);
    CHECK(counter.bytes == 0);
}

// ---- Many at once ----------------------------------------------------------------------------

namespace {

Json sword_schema() {
    return *Json::parse(R"({"type": "object", "additionalProperties": false, "properties": {
        "name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["sword", "long sword"]},
        "weight": {"type": "integer", "minimum": 1, "maximum": 40}},
        "required": ["name", "kind", "weight"]})");
}

// Sixteen requests of mixed lengths and options; some begin alike.
const std::vector<Request>& mixed_requests() {
    static const std::vector<Request> requests = [] {
        std::vector<Request> out;
        tiny::Random random(7, "requests");
        for (uint32_t i = 0; i < 16; ++i) {
            std::string text;
            if (i % 3 == 0) text = "the same beginning of a text that is longer than some pages";
            for (uint32_t left = 1 + random.next() % (i % 4 ? 30 : 90); left > 0; --left)
                text += static_cast<char>('a' + random.next() % 26);
            Request request = ask(text, 1 + random.next() % 40);
            request.seed = random.next();
            request.temperature = (i % 3) * 0.6;
            if (i % 5 == 1) request.top_p = 0.8;
            if (i % 5 == 2) request.instructions = "be brief";
            request.window = static_cast<Window>(random.next() % 3);
            request.organisation = i % 2 ? "one" : "two";
            if (i == 3 || i == 12) request.format.schema = sword_schema();
            if (i == 5) request.format.one_of = {"attack", "attend", "run away"};
            if (i == 8) request.format.regex = "[a-c]{3,20}( end)?";
            out.push_back(request);
        }
        return out;
    }();
    return requests;
}

// The template that makes the tiny model think before it answers.
std::string thinking_template() { return std::string(tiny::chat_template) + "{{ '<think>\n' }}"; }

// Those for a template of its own think: some longer than they may.
std::vector<Request> requests_for(const EngineOptions& options) {
    std::vector<Request> requests = mixed_requests();
    for (size_t i = 0; i < requests.size() && !options.chat_template.empty(); ++i) {
        if (i % 4 == 3) continue;
        requests[i].effort = i % 4 == 2 ? Effort::none : Effort::minimal;
        requests[i].max_output_tokens = static_cast<uint32_t>(60 + i * 3);
    }
    return requests;
}

std::string all_items(const Outcome& outcome) {
    std::string all;
    for (const Item& item : outcome.items)
        all += (item.kind == Item::Kind::reasoning ? "thought:" : "said:") + item.text();
    return all;
}

// What each gives when nothing else runs and nothing is remembered.
const std::vector<std::string>& answers_alone(const EngineOptions& of) {
    static std::map<std::tuple<const std::byte*, KvType, std::string>, std::vector<std::string>>
        known;
    std::vector<std::string>& answers =
        known[{of.model_bytes.data(), of.kv_type, of.chat_template}];
    if (answers.empty())
        for (const Request& request : requests_for(of)) {
            EngineOptions options = tiny_options();
            options.model_bytes = of.model_bytes;
            options.kv_type = of.kv_type;
            options.chat_template = of.chat_template;
            options.max_running = 1;
            options.prefix_cache = options.speculation = false;
            Engine engine = open_tiny(options);
            Reply reply = engine.submit(request);
            REQUIRE(engine.step());
            answers.push_back(all_items(reply.outcome()));
        }
    return answers;
}

// Submits `count` requests at random times, cancels some, steps with random budgets.
ResponderStats run_mixed(const EngineOptions& options, uint32_t count, uint64_t seed) {
    CAPTURE(count);
    CAPTURE(seed);
    Engine engine = open_tiny(options);
    tiny::Random random(seed, "mix");
    const auto requests = requests_for(options);
    struct Running {
        size_t index;
        Reply reply;
        bool cancelled = false;
    };
    std::vector<Running> all;
    for (bool more = true; more || all.size() < count;) {
        for (uint32_t burst = random.next() % 6; burst > 0 && all.size() < count; --burst) {
            const size_t index = random.next() % requests.size();
            all.push_back({index, engine.submit(requests[index])});
        }
        if (random.next() % 8 == 0 && !all.empty()) {
            Running& one = all[random.next() % all.size()];
            one.cancelled = true;
            one.reply.cancel();
        }
        if (random.next() % 32 == 0) REQUIRE(engine.unload());
        const int64_t budgets[] = {0, 0, 50, 300, 2000};
        auto stepped = engine.step(budgets[random.next() % 5]);
        REQUIRE(stepped);
        more = *stepped;
    }
    for (const Running& one : all) {
        const Outcome& outcome = one.reply.outcome();
        const std::string& expected = answers_alone(options)[one.index];
        if (outcome.status == Status::cancelled) {
            CHECK(one.cancelled);
            const std::string said = all_items(outcome);
            std::string_view text = said;
            if (text.ends_with("\ufffd")) text.remove_suffix(3);  // of a character cut short
            CAPTURE(said);
            CAPTURE(expected);
            CHECK(expected.starts_with(text));
        } else {
            CAPTURE((outcome.error ? outcome.error->message : std::string()));
            CHECK(outcome.status == Status::completed);
            CHECK(all_items(outcome) == expected);
        }
    }
    const ResponderStats stats = engine.responder()->stats();
    CHECK(stats.running == 0);
    CHECK(stats.queued == 0);
    CHECK(stats.pages_used == 0);
    CHECK(stats.pages_shared == 0);
    return stats;
}

}  // namespace

TEST_CASE("many at once: each answer is the one computed alone") {
    uint64_t seed = 1;
    for (const uint32_t count : {1u, 4u, 16u, 64u})
        for (const bool cache : {false, true}) {
            EngineOptions options = tiny_options();
            options.prefix_cache = cache;
            options.speculation = count != 16;
            const ResponderStats stats = run_mixed(options, count, ++seed);
            if (!cache) CHECK(stats.cached_tokens == 0);
            if (cache && count > 4) CHECK(stats.cached_tokens > 0);
        }
}

TEST_CASE("an answer is held to its format, whatever the model would say") {
    Engine engine = open_tiny(tiny_options());
    uint32_t whole = 0;
    for (int64_t seed = 0; seed < 40; ++seed) {
        CAPTURE(seed);
        Request request = ask("a sword", 120);
        request.seed = seed;
        request.temperature = static_cast<double>(seed % 3) * 0.7;
        request.format.schema = sword_schema();
        Reply reply = engine.submit(request);
        REQUIRE(engine.step());
        const Outcome& outcome = reply.outcome();
        REQUIRE(outcome.status == Status::completed);
        if (outcome.cut) continue;
        ++whole;
        auto value = Json::parse(outcome.text);
        REQUIRE(value);
        CHECK(value->size() == 3);
        CHECK((*value)["name"].is_string());
        CHECK((*value)["kind"].as_string().ends_with("sword"));
        CHECK(((*value)["weight"].as_uint() >= 1 && (*value)["weight"].as_uint() <= 40));
    }
    CHECK(whole > 20);

    Request request = ask("fight?");
    request.format.one_of = {"attack", "attend", "run away"};
    std::set<std::string> said;
    for (request.seed = 0; *request.seed < 30; ++*request.seed)
        said.insert(answer(engine, request));
    CHECK(said == std::set<std::string>{"attack", "attend", "run away"});
}

TEST_CASE("tools: called when they must be, with arguments that fit, and never when not") {
    EngineOptions options = tiny_options();
    options.model_bytes = windowed_bytes();  // with room for tools
    Engine engine = open_tiny(options);
    Request request = ask("a sword", 200);
    request.tools = {
        {.name = "forge", .description = "makes one", .parameters = sword_schema()},
        {.name = "sell", .parameters = *Json::parse(R"({"type": "object"})"), .strict = false}};
    uint32_t calls = 0;
    for (int64_t seed = 0; seed < 30; ++seed) {
        CAPTURE(seed);
        request.seed = seed;
        request.tool_choice.mode = ToolChoice::Mode::required;
        request.tool_choice.names = seed % 2 ? std::vector<std::string>{"forge"}
                                             : std::vector<std::string>{};
        request.parallel_tool_calls = seed % 3 == 0;
        Reply reply = engine.submit(request);
        REQUIRE(engine.step());
        const Outcome& outcome = reply.outcome();
        CAPTURE((outcome.error ? outcome.error->message : std::string()));
        REQUIRE(outcome.status == Status::completed);
        if (!outcome.cut) CHECK_FALSE(outcome.items.empty());
        if (!request.parallel_tool_calls) CHECK(outcome.items.size() <= 1);
        for (const Item& item : outcome.items) {
            CHECK(item.kind == Item::Kind::function_call);
            CHECK((item.name == "forge" || (item.name == "sell" && seed % 2 == 0)));
            auto arguments = Json::parse(item.arguments);
            REQUIRE(arguments);
            CHECK(arguments->is_object());
            if (item.name == "forge") CHECK((*arguments)["kind"].as_string().ends_with("sword"));
            ++calls;
        }
    }
    CHECK(calls > 10);
    request.tool_choice = {ToolChoice::Mode::none, {}};
    request.max_output_tokens = 20;
    for (request.seed = 0; *request.seed < 5; ++*request.seed) {
        Reply reply = engine.submit(request);
        REQUIRE(engine.step());
        for (const Item& item : reply.outcome().items) CHECK(item.kind == Item::Kind::message);
    }
}

TEST_CASE("many at once: chunks, threads, page sizes, a host's job system" * with_threads) {
    uint64_t seed = 100;
    for (const uint32_t step_tokens : {1u, 5u, 16u, 100u, 512u})
        for (const uint32_t page_tokens : {16u, 64u})
            for (const int threads : {0, 1}) {
                CAPTURE(step_tokens);
                CAPTURE(page_tokens);
                CAPTURE(threads);
                EngineOptions options = tiny_options();
                options.step_tokens = step_tokens;
                options.page_tokens = page_tokens;
                options.threads = threads;
                options.max_running = step_tokens % 2 ? 3 : 64;
                run_mixed(options, 20, ++seed);
            }
    EngineOptions options = tiny_options();
    options.threads = 2;
    options.parallel_for.run = [](void*, uint32_t n, void (*job)(void*, uint32_t), void* argument) {
        std::vector<std::thread> threads;
        for (uint32_t i = 0; i < n; ++i) threads.emplace_back(job, argument, i);
        for (std::thread& thread : threads) thread.join();
    };
    run_mixed(options, 6, ++seed);
}

TEST_CASE("many at once: a small pool makes some give way, and they go on with the same answer") {
    uint64_t seed = 200, preempted = 0;
    for (const bool cache : {false, true})
        for (const uint32_t page_tokens : {16u, 64u})
            for (const uint32_t context : {176u, 256u}) {
                EngineOptions options = tiny_options();
                options.context_tokens = context;
                options.prefix_cache = cache;
                options.page_tokens = page_tokens;
                options.max_running = 1;
                const auto plan = Engine::memory_plan(options);
                REQUIRE(plan);
                options.max_running = 16;
                const auto wide = Engine::memory_plan(options);
                options.memory_limit = wide->total() - wide->kv + plan->kv * 5 / 4;
                CHECK(Engine::memory_plan(options)->total() <= options.memory_limit);
                preempted += run_mixed(options, 32, ++seed).preempted;
            }
    CHECK(preempted > 0);
}

namespace {

/// Sixteen at once, with little more memory for keys and values than one needs.
void leave_few_pages(EngineOptions* options) {
    options->max_running = 1;
    const auto one = Engine::memory_plan(*options);
    options->max_running = 16;
    const auto all = Engine::memory_plan(*options);
    options->memory_limit = all->total() - all->kv + one->kv * 5 / 4;
}

}  // namespace

TEST_CASE("many at once: thoughts are closed alike, whatever runs beside them") {
    EngineOptions options = tiny_options();
    options.chat_template = thinking_template();
    size_t closed = 0, preempted = 0;
    for (const std::string& alone : answers_alone(options))
        closed += alone.starts_with("thought:") && alone.find("said:") != alone.npos;
    CHECK(closed >= 4);
    uint64_t seed = 400;
    for (const bool speculation : {false, true})
        for (const uint32_t step_tokens : {1u, 16u, 512u})
            for (const uint32_t running : {3u, 64u}) {
                options.speculation = speculation;
                options.step_tokens = step_tokens;
                options.prefix_cache = step_tokens != 16;
                options.max_running = running;
                options.memory_limit = 0;
                if (running == 64) leave_few_pages(&options);
                preempted += run_mixed(options, 20, ++seed).preempted;
            }
    CHECK(preempted > 0);
}

TEST_CASE("many at once: keys and values in q8_0; layers with windows; long rope") {
    uint64_t seed = 300, preempted = 0;
    for (const auto* bytes :
         {&model_bytes(), &windowed_bytes(), &partly_windowed_bytes(), &long_rope_bytes()})
        for (const KvType kv_type : {KvType::q8_0, KvType::f16})
            for (const bool cache : {false, true})
                for (const uint32_t page_tokens : {16u, 64u}) {
                    if (bytes == &model_bytes() && kv_type == KvType::f16) continue;  // above
                    if (!in_sample()) continue;
                    EngineOptions options = tiny_options();
                    options.model_bytes = *bytes;
                    options.kv_type = kv_type;
                    options.prefix_cache = cache;
                    options.page_tokens = page_tokens;
                    options.step_tokens = cache ? 24 : 100;
                    options.context_tokens = 256;
                    run_mixed(options, 24, ++seed);
                    leave_few_pages(&options);
                    preempted += run_mixed(options, 24, ++seed).preempted;
                }
    CHECK(preempted > 0);
}

TEST_CASE("who comes while a long prompt is read waits for a part of it") {
    EngineOptions options = tiny_options();
    options.prefix_cache = false;
    const auto batches = [&](uint32_t max_wait_step_ms) {
        options.max_wait_step_ms = max_wait_step_ms;
        Engine engine = open_tiny(options);
        const std::string text = answer(engine, ask(std::string(150, 'x'), 1));
        return std::pair(engine.responder()->stats().batches, text);
    };
    const auto whole = batches(0), parts = batches(1);
    CHECK(whole.first == 1);
    CHECK(parts.first > 1);  // the first one finds out how long a row takes
    CHECK(parts.second == whole.second);
}

TEST_CASE("a row costs more the more keys it sees, and shares of a batch go by what rows cost") {
    ModelSpec spec = open_tiny(tiny_options()).spec();
    const detail::RowCost cost(spec);
    uint64_t key = 0, products = 0;
    for (const LayerSpec& layer : spec.layers) {
        const uint64_t q = layer.n_heads * layer.head_dim, kv = layer.n_kv_heads * layer.head_dim;
        products += spec.n_embd * (q + kv + kv + q + 3ull * layer.n_ff);
        key += 2 * q;
    }
    CHECK(cost(0) == products);
    CHECK(cost(1000) > products + 1000 * key / 2);
    CHECK(cost(3000) - cost(2000) == cost(1000) - cost(0));

    for (LayerSpec& layer : spec.layers) layer.window = 40;
    CHECK(detail::RowCost(spec)(40) == cost(40));
    CHECK(detail::RowCost(spec)(1000) == cost(40));
    spec.layers[0].window = 0;
    CHECK(detail::RowCost(spec)(1000) > cost(40));
    CHECK(detail::RowCost(spec)(1000) < cost(1000));

    uint64_t far = 0;
    for (uint32_t i = 0; i < 8; ++i) far += cost(5000 + i);
    uint64_t budget = far;
    CHECK(cost.take(5000, 0, 100, &budget) == 8);
    CHECK(budget == 0);
    CHECK(cost.take(5000, 3, 100, &budget) == 3);  // without a budget
    CHECK(cost.take(5000, 3, 2, &budget) == 2);
    budget = far;
    CHECK(cost.take(0, 0, 1000, &budget) > 16);  // at the start of a text it is enough for more
    budget = UINT64_MAX;
    CHECK(cost.take(5000, 0, 77, &budget) == 77);
}

TEST_CASE("layers with windows give back the pages that they no longer see") {
    EngineOptions options = tiny_options();
    options.model_bytes = windowed_bytes();
    options.context_tokens = 2048;
    options.step_tokens = 2048;
    options.max_running = 1;
    options.prefix_cache = options.speculation = false;
    const Request request = [] {
        Request out = ask(std::string(1000, 'x'), 600);
        out.temperature = 1.5;
        out.logit_bias = {{0, -100}, {2, -100}};
        return out;
    }();
    const std::string expected = answer(open_tiny(options), request);
    options.step_tokens = 32;
    const uint32_t pages = 3 + 2 + 2;            // of the window, of a batch, at its ends
    for (const bool together : {false, true}) {  // the cache and guesses
        options.prefix_cache = options.speculation = together;
        Engine engine = open_tiny(options);
        CHECK(engine.responder()->stats().pages == pages);
        CHECK(answer(engine, request) == expected);
        CHECK(engine.responder()->stats().pages_used == 0);
    }
    const auto plan = Engine::memory_plan(options);
    options.model_bytes = model_bytes();
    options.context_tokens = 512;
    CHECK(Engine::memory_plan(options)->kv / 32 * pages == plan->kv);
}

TEST_CASE("rope factors follow the length of a text, which begins again where it gets too long") {
    EngineOptions options = tiny_options();
    options.model_bytes = long_rope_bytes();
    Engine engine = open_tiny(options);
    Request request = ask("a text and what follows it, in so many words", 60);
    request.temperature = 0;
    const Tokenizer& tokenizer = engine.tokenizer();
    for (uint32_t id = 0; id < engine.spec().n_vocab; ++id) {  // letters alone
        const std::string_view piece = tokenizer.piece(Token(id));
        if (piece.size() != 1 || piece[0] < 'a' || piece[0] > 'z')
            request.logit_bias.push_back({Token(id), -100});
    }
    // Each token from all before it, computed anew.
    auto prepared = engine.responder()->prepare(request);
    REQUIRE(prepared);
    std::vector<Token> tokens = static_cast<detail::PreparedPrompt&>(**prepared).tokens;
    REQUIRE(tokens.size() < 100);
    REQUIRE(tokens.size() + 60 > 110);
    const auto next = [&](run_model::Model& model, bool long_rope) {
        const auto pages = run_model::page_list(0, 16);
        auto rows = run_model::make_rows(tokens, 0, pages, false);
        for (BatchRow& row : rows) row.long_rope = long_rope;
        rows.back().logits = true;
        REQUIRE(model.run(rows));
        const auto logits = model.logits(0);
        Token best = 0;
        for (uint32_t id = 0; id < logits.size(); ++id) {
            const std::string_view piece = tokenizer.piece(Token(id));
            const bool letter = piece.size() == 1 && piece[0] >= 'a' && piece[0] <= 'z';
            if (letter && (best == 0 || logits[id] > logits[size_t(best)])) best = Token(id);
        }
        return best;
    };
    BackendOptions backend;
    backend.kv_pages = 16;
    backend.threads = 0;
    auto model = run_model::Model::open(Gguf::from_bytes(long_rope_bytes()), backend);
    REQUIRE(model);
    std::string expected;
    uint32_t differ = 0;
    for (int i = 0; i < 60; ++i) {
        const Token token = next(*model, tokens.size() > 100);
        differ += next(*model, tokens.size() <= 100) != token;
        expected += tokenizer.piece(token);
        tokens.push_back(token);
    }
    CHECK(differ > 0);  // the factors matter
    for (const bool speculation : {false, true})
        for (const uint32_t step_tokens : {512u, 16u}) {
            options.speculation = speculation;
            options.step_tokens = step_tokens;
            CHECK(answer(open_tiny(options), request) == expected);
        }
    // A text is found in the cache among those that were turned alike.
    request.input = std::string(150, 'x');
    request.max_output_tokens = 1;
    for (const bool again : {false, true}) {
        Reply reply = engine.submit(request);
        REQUIRE(engine.step());
        CHECK((reply.outcome().usage.cached_tokens > 100) == again);
    }
    request.input = std::string(40, 'x');
    Reply reply = engine.submit(request);
    REQUIRE(engine.step());
    CHECK(reply.outcome().usage.input_tokens <= 100);
    CHECK(reply.outcome().usage.cached_tokens == 0);
}

TEST_CASE("layers with windows beside others: only they give back pages") {
    EngineOptions options = tiny_options();
    options.model_bytes = partly_windowed_bytes();
    options.context_tokens = 2048;
    options.step_tokens = 2048;
    options.max_running = 1;
    options.prefix_cache = options.speculation = false;
    Request request = ask(std::string(900, 'x'), 600);
    request.temperature = 1.5;
    request.logit_bias = {{0, -100}, {2, -100}};
    const std::string expected = answer(open_tiny(options), request);
    options.step_tokens = 32;
    const uint32_t full = 2048 / 16, windowed = 3 + 2 + 2;
    for (const bool together : {false, true}) {  // the cache and guesses
        options.prefix_cache = options.speculation = together;
        Engine engine = open_tiny(options);
        CHECK(engine.responder()->stats().pages == full + windowed);
        CHECK(answer(engine, request) == expected);
        CHECK(engine.responder()->stats().pages_used == 0);
    }
    const uint64_t page = 2 * 16 * 64 * 2;  // keys and values, positions, a head, f16
    CHECK(Engine::memory_plan(options)->kv == (full + 4 * windowed) * page);
    options.max_running = 4;  // a window for each, whatever else there is room for
    CHECK(Engine::memory_plan(options)->kv == (2 * full + 4 * (windowed + 3 * (3 + 2))) * page);
    const auto two = Engine::memory_plan(options);
    options.memory_limit = two->total() + 10 * page;
    CHECK(Engine::memory_plan(options)->kv == two->kv + 10 * page);
    options.memory_limit = two->total() - (full + 4) * page;  // first windows, then contexts
    CHECK(Engine::memory_plan(options)->kv == two->kv - (full + 4) * page);
    options.memory_limit = two->total() - (full + 4 * 3 * (3 + 2)) * page;
    CHECK(Engine::memory_plan(options)->kv == (full + 4 * windowed) * page);
    options.memory_limit -= 1;
    CHECK(Engine::memory_plan(options).error().param == "memory_limit");
    options.max_running = 1000;  // no more than a context has
    options.memory_limit = 0;
    CHECK(Engine::memory_plan(options)->kv == (2 * full + 4 * full) * page);
}

TEST_CASE("layers with windows beside others: a prompt is found as far as both kinds are there") {
    EngineOptions options = tiny_options();
    options.model_bytes = partly_windowed_bytes();
    options.context_tokens = 1024;
    options.step_tokens = 64;
    options.max_running = 1;
    const auto alone = [&](const Request& request) {
        EngineOptions without = options;
        without.prefix_cache = false;
        return answer(open_tiny(without), request);
    };
    Engine engine = open_tiny(options);  // 64 pages and 9, three of a window
    const auto ask_again = [&](const Request& request) {
        Reply reply = engine.submit(request);
        REQUIRE(engine.step());
        CHECK(reply.outcome().text == alone(request));
        return reply.outcome().usage.cached_tokens;
    };
    const Request request = ask(std::string(500, 'x')), longer = ask(std::string(600, 'x'));
    const uint32_t count = *engine.count_tokens(request);
    CHECK(ask_again(request) == 0);
    CHECK(ask_again(request) == (count - 1) / 16 * 16);
    // What follows the text differs; its last full page is still in sight.
    const uint32_t found = ask_again(longer);
    CHECK(found >= 480);
    CHECK(found < count);
    // It goes on where the windows' pages are gone: the others alone are no use.
    CHECK(ask_again(ask(std::string(200, 'x') + std::string(200, 'y'))) == 0);
    CHECK(engine.responder()->stats().pages_used == 0);
}

TEST_CASE("layers with windows: the cache needs only the pages that they still see") {
    EngineOptions options = tiny_options();
    options.model_bytes = windowed_bytes();
    options.context_tokens = 1024;
    options.step_tokens = 64;
    Engine engine = open_tiny(options);  // room for 18 pages; the text fills over 30
    const uint32_t pages = engine.responder()->stats().pages;
    Request request = ask(std::string(500, 'x'));
    const uint32_t count = *engine.count_tokens(request);
    CHECK(pages < count / 16);
    for (const bool again : {false, true}) {
        Reply reply = engine.submit(request);
        REQUIRE(engine.step());
        CHECK(reply.outcome().usage.cached_tokens == (again ? (count - 1) / 16 * 16 : 0));
        EngineOptions alone = options;
        alone.prefix_cache = false;
        CHECK(reply.outcome().text == answer(open_tiny(alone), request));
    }
}

TEST_CASE("one whose numbers are not finite fails, those beside it do not") {
    auto bytes = tiny::model({.tied = false});
    EngineOptions options = tiny_options();
    options.model_bytes = bytes;
    std::vector<std::string> expected;
    for (const char* text : {"one", "two"})
        expected.push_back(answer(open_tiny(options), ask(text)));
    const uint64_t offset = Gguf::from_bytes(bytes)->find_tensor("token_embd.weight")->offset;
    const float infinity = std::numeric_limits<float>::infinity();
    const size_t row = 3 + '~';  // the token of this byte
    std::memcpy(bytes.data() + offset + row * 256 * sizeof(float), &infinity, sizeof infinity);
    Engine engine = open_tiny(options);
    Reply one = engine.submit(ask("one")), bad = engine.submit(ask("~")),
          two = engine.submit(ask("two"));
    REQUIRE(engine.step());
    CHECK(one.outcome().text == expected[0]);
    CHECK(two.outcome().text == expected[1]);
    CHECK(bad.outcome().status == Status::failed);
    REQUIRE(bad.outcome().error);
    CHECK(bad.outcome().error->message.find("the token embedding") != std::string::npos);
    CHECK(engine.responder()->stats().pages_used == 0);
}

TEST_CASE("two that do not fit together: the later one gives way and is resumed") {
    EngineOptions options = tiny_options();
    options.context_tokens = 128;
    options.prefix_cache = false;
    options.max_running = 1;
    const auto plan = Engine::memory_plan(options);
    options.max_running = 2;
    const auto two = Engine::memory_plan(options);
    options.memory_limit = two->total() - two->kv + plan->kv;
    Engine engine = open_tiny(options);
    CHECK(engine.responder()->stats().pages == 8);
    std::vector<std::string> expected;
    std::vector<Reply> replies;
    for (const char* text : {"first", "second"})
        for (const bool together : {false, true}) {
            Request request = ask(text + std::string(25, 'x'), 60);
            request.temperature = 1.5;
            request.logprobs = true;
            if (together) replies.push_back(engine.submit(request));
            else expected.push_back(answer(open_tiny(), request));
        }
    REQUIRE(engine.step());
    CHECK(engine.responder()->stats().preempted > 0);
    for (size_t i = 0; i < 2; ++i) {
        const Outcome& outcome = replies[i].outcome();
        CHECK(outcome.text == expected[i]);
        CHECK(outcome.logprobs.size() + !outcome.cut == outcome.usage.output_tokens);
        CHECK(outcome.usage.cached_tokens <= outcome.usage.input_tokens);
    }
    options.memory_limit -= 1;
    CHECK(Engine::open(options).error().param == "memory_limit");
}

// ---- The prefix cache ------------------------------------------------------------------------

namespace {

const std::string long_text =
    "a text that begins every one of these requests, long enough for several pages of keys and "
    "values so that it is worth being remembered";

uint32_t cached(Engine& engine, const Request& request) {
    Reply reply = engine.submit(request);
    REQUIRE(engine.step());
    CHECK(reply.outcome().text == answer(open_tiny(), request));
    return reply.outcome().usage.cached_tokens;
}

Request ask_for(std::string organisation, std::string text) {
    Request request = ask(std::move(text));
    request.organisation = std::move(organisation);
    return request;
}

}  // namespace

TEST_CASE("the prefix cache: what begins alike is computed once, within an organisation") {
    Engine engine = open_tiny();
    CHECK(cached(engine, ask_for("one", long_text + " first")) == 0);
    const uint32_t again = cached(engine, ask_for("one", long_text + " second"));
    CHECK(again > long_text.size() / 2);
    CHECK(again % 16 == 0);
    CHECK(cached(engine, ask_for("two", long_text + " second")) == 0);
    CHECK(cached(engine, ask_for("", long_text + " second")) == 0);
    CHECK(cached(engine, ask_for("two", long_text + " third")) == again);
    CHECK(engine.responder()->stats().cached_tokens == 2 * again);
    CHECK(engine.responder()->stats().pages_cached > 0);

    EngineOptions options = tiny_options();
    options.share_prefixes = true;
    Engine shared = open_tiny(options);
    CHECK(cached(shared, ask_for("one", long_text + " first")) == 0);
    CHECK(cached(shared, ask_for("two", long_text + " second")) == again);
    options.prefix_cache = false;
    Engine without = open_tiny(options);
    for (int i = 0; i < 2; ++i) CHECK(cached(without, ask(long_text)) == 0);
    CHECK(without.responder()->stats().pages_cached == 0);
}

TEST_CASE("a raw prompt goes past the template; around a gap the model's marks are text") {
    const auto bytes = tiny::model(
        {.types = {TensorType::q4_0, TensorType::q8_0},
         .control = {"<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"}});
    EngineOptions options = tiny_options();
    options.model_bytes = bytes;
    Engine engine = open_tiny(options);
    const Tokenizer& tokenizer = engine.tokenizer();
    const auto raw = [](std::string text, RawPrompt prompt = {}) {
        Request request = ask(std::move(text));
        request.raw = std::move(prompt);
        return request;
    };
    const auto count = [&](const Request& request) {
        const auto tokens = engine.count_tokens(request);
        REQUIRE(tokens);
        return *tokens;
    };
    CHECK(count(raw("<|im_start|>")) == 1);
    CHECK(count(raw("<|im_start|>x")) == 2);
    CHECK(count(raw("x")) < count(ask("x")));
    const auto tokens = tokenizer.encode("some words");
    REQUIRE(tokens);
    CHECK(count(raw("", {*tokens, ""})) == tokens->size());
    CHECK(answer(engine, raw("", {*tokens, ""})) == answer(engine, raw("some words")));
    CHECK(answer(engine, raw("some words")) != answer(engine, ask("some words")));

    std::vector<Token> gap;
    for (const auto& [mark, text] :
         {std::pair("<|fim_prefix|>", "<|im_end|>a"),
          std::pair("<|fim_suffix|>", "b<|fim_middle|>"), std::pair("<|fim_middle|>", "")}) {
        gap.push_back(*tokenizer.find(mark));
        const auto plain = tokenizer.encode(text);
        REQUIRE(plain);
        gap.insert(gap.end(), plain->begin(), plain->end());
    }
    const Request asked = raw("<|im_end|>a", {{}, "b<|fim_middle|>"});
    CHECK(count(asked) == gap.size());
    CHECK(answer(engine, asked) == answer(engine, raw("", {gap, ""})));

    const auto refused = [](Engine& by, const Request& request) {
        const auto prepared = by.responder()->prepare(request);
        return prepared ? "" : prepared.error().code + " " + prepared.error().param;
    };
    CHECK(refused(engine, raw("x", {{1, 1 << 20}, ""})) == "invalid_value prompt");
    CHECK(refused(engine, raw("x", {{1}, "y"})) == "invalid_value suffix");
    Engine plain = open_tiny();
    CHECK(refused(plain, raw("x", {{}, "y"})) == "unsupported_value suffix");
    using Change = void (*)(Request&);
    for (const Change change : {Change([](Request& r) { r.format.regex = "y"; }),
                                Change([](Request& r) { r.tools = {{.name = "f"}}; }),
                                Change([](Request& r) { r.effort = Effort::low; })}) {
        Request request = raw("x");
        change(request);
        CHECK(refused(engine, request) == "invalid_value raw");
    }
}

TEST_CASE("a prompt is read piece by piece, and the reply told of each if it asked") {
    EngineOptions options = tiny_options();
    options.step_tokens = 32;
    Engine engine = open_tiny(options);
    Request request = ask(long_text);
    request.prompt_progress = true;
    for (const bool again : {false, true}) {
        Reply reply = engine.submit(request);
        std::vector<PromptProgress> told;
        bool begun = false;
        while (!reply.finished()) {
            REQUIRE(engine.step(0));
            while (auto event = reply.poll()) {
                begun |= event->kind == Event::Kind::item_begun;
                if (event->kind != Event::Kind::prompt_progress) continue;
                CHECK_FALSE(begun);
                told.push_back(event->progress);
            }
        }
        const Usage& usage = reply.outcome().usage;
        CHECK((usage.cached_tokens > 0) == again);
        CHECK(told.size() > (again ? 0 : 3));
        uint32_t read = usage.cached_tokens;
        for (const PromptProgress& one : told) {
            CHECK(one.total == usage.input_tokens);
            CHECK(one.cached == usage.cached_tokens);
            CHECK(one.processed > read);
            read = one.processed;
        }
        CHECK(read == usage.input_tokens);
    }
}

TEST_CASE("the prefix cache: a prompt of whole pages is copied before it is written") {
    Engine engine = open_tiny();
    Request request = ask(long_text);
    const auto count = engine.count_tokens(request);
    REQUIRE(count);
    request.input = long_text + std::string(16 - *count % 16, 'x');
    CHECK(*engine.count_tokens(request) % 16 == 0);
    CHECK(cached(engine, request) == 0);
    for (int i = 0; i < 3; ++i) CHECK(cached(engine, request) == *engine.count_tokens(request) - 1);
    std::vector<Reply> replies;
    for (int i = 0; i < 5; ++i) replies.push_back(engine.submit(request));
    REQUIRE(engine.step());
    for (const Reply& reply : replies) CHECK(reply.outcome().text == answer(open_tiny(), request));
}

TEST_CASE("the prefix cache: requests that come together read their prefix once") {
    Engine engine = open_tiny();
    std::vector<Reply> replies;
    for (int i = 0; i < 8; ++i)
        replies.push_back(engine.submit(ask(long_text + std::to_string(i), 1)));
    const uint32_t prompt = *engine.count_tokens(ask(long_text + "1", 1));
    REQUIRE(engine.step());
    CHECK(engine.responder()->stats().batch_rows < 2 * prompt);
    for (size_t i = 1; i < 8; ++i)
        CHECK(replies[i].outcome().usage.cached_tokens == prompt / 16 * 16);
}

TEST_CASE("the prefix cache: an answer is part of the next prompt") {
    Engine engine = open_tiny();
    Request request = ask(long_text, 60);
    request.temperature = 0;
    const std::string said = answer(engine, request);
    request.input = std::vector<Item>{Item::message(Role::user, long_text),
                                      Item::message(Role::assistant, said),
                                      Item::message(Role::user, "go on")};
    const uint32_t before = *engine.count_tokens(ask(long_text));
    CHECK(cached(engine, request) >= before / 16 * 16);
}

TEST_CASE("the prefix cache: the least recently used goes first, a group is kept together") {
    for (const bool grouped : {false, true}) {
        EngineOptions options = tiny_options();
        options.context_tokens = 256;
        Engine engine = open_tiny(options);  // room for 512 tokens
        const auto with_key = [&](std::string text) {
            Request request = ask_for("one", std::move(text));
            if (grouped) request.prompt_cache_key = "key";
            return request;
        };
        CHECK(cached(engine, with_key(long_text)) == 0);
        for (char c = 'a'; c < 'i'; ++c) {
            cached(engine, ask_for("two", std::string(120, c)));
            cached(engine, with_key("hi"));
        }
        CHECK((cached(engine, with_key(long_text)) > 100) == grouped);
    }
}

// ---- Scheduling ------------------------------------------------------------------------------

namespace {

// The order in which these end, by their places.
std::string order_of_ends(Engine& engine, const std::vector<Request>& requests) {
    std::vector<Reply> replies;
    for (const Request& request : requests) replies.push_back(engine.submit(request));
    std::string order;
    std::vector<bool> ended(requests.size());
    for (bool more = true; more;) {
        auto stepped = engine.step(0);
        REQUIRE(stepped);
        more = *stepped;
        for (size_t i = 0; i < replies.size(); ++i)
            if (!ended[i] && replies[i].finished()) {
                ended[i] = true;
                order += static_cast<char>('0' + i);
                CHECK(replies[i].outcome().status == Status::completed);
                CHECK(replies[i].outcome().text == answer(open_tiny(), requests[i]));
            }
    }
    return order;
}

EngineOptions one_at_a_time() {
    EngineOptions options = tiny_options();
    options.max_running = 1;
    return options;
}

Request ask_in(Window window, std::string organisation = {}) {
    Request request = ask_for(std::move(organisation), "hello");
    request.window = window;
    return request;
}

}  // namespace

TEST_CASE("windows: asap before standard before flex; waiting makes urgent") {
    const std::vector<Request> requests = {ask_in(Window::flex),     ask_in(Window::standard),
                                           ask_in(Window::asap),     ask_in(Window::flex),
                                           ask_in(Window::standard), ask_in(Window::asap)};
    EngineOptions options = one_at_a_time();
    Engine engine = open_tiny(options);
    CHECK(order_of_ends(engine, requests) == "251403");
    options.flex_target_ms = 0;
    Engine flex_soon = open_tiny(options);
    CHECK(order_of_ends(flex_soon, requests) == "250134");
    options.standard_target_ms = 0;
    Engine all_soon = open_tiny(options);
    CHECK(order_of_ends(all_soon, requests) == "012345");
}

TEST_CASE("windows: a lower one that runs gives way at once and goes on later") {
    Engine engine = open_tiny(one_at_a_time());
    Request low = ask("a longer answer", 60), urgent = ask_in(Window::asap);
    low.window = Window::flex;
    const std::string expected = answer(open_tiny(), low);
    Reply first = engine.submit(low);
    std::string text;
    while (text.size() < 5) {
        REQUIRE(engine.step(0));
        while (auto event = first.poll())
            if (auto delta = event->text_delta()) text += *delta;
    }
    Reply second = engine.submit(urgent);
    while (!second.finished()) REQUIRE(engine.step(0));
    CHECK_FALSE(first.finished());
    CHECK(engine.responder()->stats().preempted == 1);
    CHECK(engine.responder()->stats().queued == 1);
    REQUIRE(engine.step());
    CHECK(first.outcome().text == expected);
    CHECK(first.outcome().usage.cached_tokens == 0);  // its own pages do not count
    while (auto event = first.poll())
        if (auto delta = event->text_delta()) text += *delta;
    CHECK(text == expected);
}

TEST_CASE("windows: a model may serve fewer") {
    EngineOptions options = tiny_options();
    options.windows = {Window::asap, Window::standard};
    Engine engine = open_tiny(options);
    CHECK(engine.responder()->models()[0].windows == std::vector{Window::asap, Window::standard});
    Reply reply = engine.submit(ask_in(Window::flex));
    REQUIRE(reply.finished());
    CHECK(reply.outcome().error->param == "metadata.completion_window");
    CHECK(reply.outcome().error->message.find("asap standard") != std::string::npos);
}

TEST_CASE("organisations take turns") {
    Engine engine = open_tiny(one_at_a_time());
    const Request a = ask_in(Window::standard, "a"), b = ask_in(Window::standard, "b"),
                  c = ask_in(Window::standard, "c");
    CHECK(order_of_ends(engine, {a, a, a, a, b, c, b}) == "0451623");
}

TEST_CASE("a long prompt does not hold up the short ones") {
    EngineOptions options = tiny_options();
    options.step_tokens = 32;
    Engine engine = open_tiny(options);
    Request lengthy = ask(std::string(400, 'x'), 1);
    CHECK(order_of_ends(engine, {lengthy, ask("one", 5), ask("two", 5)}).back() == '0');
    // nor do short ones that keep coming hold up the long one
    Reply first = engine.submit(lengthy);
    int others = 0;
    for (; !first.finished(); ++others) {
        Reply other = engine.submit(ask(std::string(40, 'a'), 1));
        while (!other.finished() && !first.finished()) REQUIRE(engine.step(0));
    }
    CHECK(others < 100);
}

TEST_CASE("a full queue says when to come again") {
    EngineOptions options = one_at_a_time();
    options.max_queued = 1;
    Engine engine = open_tiny(options);
    Reply one = engine.submit(ask("1")), two = engine.submit(ask("2"));
    REQUIRE(two.finished());
    CHECK(two.outcome().error->kind == ErrorKind::overloaded);
    CHECK(two.outcome().error->retry_after_s >= 1);
    CHECK(two.outcome().error->retry_after_s <= 60);
}

// ---- Options of a request --------------------------------------------------------------------

TEST_CASE("stop strings end the answer before them, wherever tokens end") {
    Request request = ask("hello", 60);
    request.temperature = 0.8;
    const std::string whole = answer(open_tiny(), request);
    REQUIRE(whole.size() > 30);
    for (size_t at = 1; at < 20; at += 3)
        for (size_t length : {1u, 2u, 5u}) {
            const std::string stop = whole.substr(at, length);
            if (!detail::utf8_valid(stop)) continue;
            request.stop = {"never to be seen", stop};
            Engine engine = open_tiny();
            Reply reply = engine.submit(request);
            std::string text;
            for (bool more = true; more;) {
                auto stepped = engine.step(0);
                REQUIRE(stepped);
                more = *stepped;
                while (auto event = reply.poll())
                    if (auto delta = event->text_delta()) text += *delta;
            }
            CHECK(text == whole.substr(0, whole.find(stop)));
            CHECK(reply.outcome().text == text);
            CHECK(reply.outcome().stopped_by == stop);
            CHECK_FALSE(reply.outcome().cut);
        }
    request.stop = {whole + "x"};  // held back to the end, then let go
    Engine engine = open_tiny();
    Reply reply = engine.submit(request);
    REQUIRE(engine.step());
    CHECK(reply.outcome().text == whole);
    CHECK(reply.outcome().stopped_by.empty());
}

TEST_CASE("penalties and bias") {
    Request request = ask("hello", 40);
    request.temperature = 0;
    Engine engine = open_tiny();
    const std::string plain = answer(engine, request);
    const auto with = [&](auto change) {
        Request changed = request;
        change(changed);
        const std::string text = answer(engine, changed);
        EngineOptions options = tiny_options();
        options.speculation = false;
        CHECK(answer(open_tiny(options), changed) == text);
        return text;
    };
    CHECK(with([](Request& r) { r.frequency_penalty = 2; }) != plain);
    CHECK(with([](Request& r) { r.repetition_penalty = 10; }) != plain);
    CHECK(with([](Request& r) { r.presence_penalty = 2; }) != plain);
    const int32_t world = *engine.tokenizer().find(" world");
    const std::string only = with([&](Request& r) { r.logit_bias = {{world, 100}}; });
    CHECK(only.find(" world world world") == 0);
}

TEST_CASE("options of a request that are refused") {
    Engine engine = open_tiny();
    const auto param = [&](auto change) {
        Request request = ask("hello");
        change(request);
        Reply reply = engine.submit(request);
        REQUIRE(reply.finished());
        return reply.outcome().error ? reply.outcome().error->param : "";
    };
    CHECK(param([](Request& r) { r.stop = {""}; }) == "stop");
    CHECK(param([](Request& r) { r.stop = {"\xff"}; }) == "stop");
    CHECK(param([](Request& r) { r.stop = {std::string(257, 'x')}; }) == "stop");
    CHECK(param([](Request& r) { r.stop.assign(17, "x"); }) == "stop");
    CHECK(param([](Request& r) { r.logit_bias = {{-1, 0}}; }) == "logit_bias");
    CHECK(param([](Request& r) { r.logit_bias = {{1 << 20, 0}}; }) == "logit_bias");
    CHECK(param([](Request& r) { r.logit_bias = {{1, 101}}; }) == "logit_bias");
    CHECK(param([](Request& r) { r.presence_penalty = -3; }) == "presence_penalty");
    CHECK(param([](Request& r) { r.frequency_penalty = std::nan(""); }) == "frequency_penalty");
    CHECK(param([](Request& r) { r.repetition_penalty = 0; }) == "repetition_penalty");
}

TEST_CASE("events carry the log-probabilities of their tokens") {
    Engine engine = open_tiny();
    Request request = ask("hello", 20);
    request.logprobs = true;
    Reply reply = engine.submit(request);
    std::string bytes;
    size_t events = 0;
    for (bool more = true; more;) {
        auto stepped = engine.step(0);
        REQUIRE(stepped);
        more = *stepped;
        while (auto event = reply.poll()) {
            events += event->kind == Event::Kind::text_delta;
            for (const TokenLogprob& one : event->logprobs) bytes += one.bytes;
        }
    }
    std::string expected;
    for (const TokenLogprob& one : reply.outcome().logprobs) expected += one.bytes;
    CHECK(bytes == expected);
    CHECK(events > 10);
}

// ---- Speculation -----------------------------------------------------------------------------

TEST_CASE("speculation: fewer batches where text repeats, never another answer") {
    std::string text = "one two three four ";
    for (int i = 0; i < 3; ++i) text += text;
    for (const double temperature : {0.0, 0.3, 1.0}) {
        Request request = ask(text, 120);
        request.temperature = temperature;
        ResponderStats stats[2];
        std::string answers[2];
        for (const bool speculation : {false, true}) {
            EngineOptions options = tiny_options();
            options.speculation = speculation;
            Engine engine = open_tiny(options);
            answers[speculation] = answer(engine, request);
            stats[speculation] = engine.responder()->stats();
        }
        CHECK(answers[0] == answers[1]);
        CHECK(stats[0].drafted_tokens == 0);
        const ResponderStats& with = stats[1];
        CHECK(with.accepted_tokens <= with.drafted_tokens);
        CHECK(with.batches == stats[0].batches - with.accepted_tokens);
        const uint64_t wasted = with.drafted_tokens - with.accepted_tokens;
        CHECK(wasted <= with.batch_rows / 50 + with.accepted_tokens);
        if (temperature == 0) CHECK(with.accepted_tokens > 20);
    }
}

// ---- Memory ----------------------------------------------------------------------------------

TEST_CASE("no allocations while answers are being computed" * with_threads) {
    EngineOptions options = tiny_options();
    options.threads = 1;
    Engine engine = open_tiny(options);
    std::vector<Reply> replies;
    for (int i = 0; i < 4; ++i) {
        Request request = ask("request " + std::to_string(i), 400);
        request.logit_bias = {{0, -100}, {2, -100}};  // the tokens that end
        request.temperature = i * 0.3;
        request.stop = {"never to be seen"};
        if (i == 1) request.format.regex = "[a-z ]*";
        if (i == 2) request.top_p = 0.9;
        if (i == 3) request.frequency_penalty = 0.5;
        replies.push_back(engine.submit(request));
    }
    const auto poll_all = [&] {
        bool any_ended = false;
        for (Reply& reply : replies)
            while (auto event = reply.poll()) any_ended |= event->kind == Event::Kind::finished;
        return !any_ended;
    };
    const auto batches = [&] { return engine.responder()->stats().batches; };
    while (batches() < 20) {
        REQUIRE(engine.step(0));
        poll_all();
    }
    const uint64_t start = batches();
    do {
        counts_allocations = true;
        const bool good = engine.step(0).ok();
        counts_allocations = false;
        REQUIRE(good);
        if (!poll_all()) allocations = 0;  // an end may need memory
        CHECK(allocations == 0);
    } while (batches() < start + 60);
    CHECK(engine.responder()->stats().drafted_tokens > 0);
}

namespace {

// Says `words`, steps to the end of the answer.
std::string say(Engine& engine, Conversation& conversation, std::string_view words,
                uint32_t* cached = nullptr) {
    Reply reply = conversation.say(words);
    REQUIRE(engine.step());
    REQUIRE(reply.finished());
    INFO((reply.outcome().error ? reply.outcome().error->message : ""));
    CHECK(reply.outcome().status == Status::completed);
    if (cached) *cached = reply.outcome().usage.cached_tokens;
    return reply.outcome().text;
}

Request settings(uint32_t max_output_tokens = 20) {
    Request out;
    out.instructions = "You are a gruff blacksmith.";
    out.max_output_tokens = max_output_tokens;
    out.seed = 7;
    return out;
}

}  // namespace

TEST_CASE("conversation: a turn is the request with all that was said before") {
    Engine engine = open_tiny();
    Conversation conversation(engine, settings());
    const std::string first = say(engine, conversation, "Can you mend this sword?");
    uint32_t cached = 0;
    const std::string second = say(engine, conversation, "Before dawn?", &cached);
    CHECK(cached > 0);
    REQUIRE(conversation.items().size() == 4);
    CHECK(conversation.items()[1].role == Role::assistant);
    CHECK(conversation.items()[1].text() == first);

    Request whole = settings();
    whole.input.items = {Item::message(Role::user, "Can you mend this sword?"),
                         Item::message(Role::assistant, first),
                         Item::message(Role::user, "Before dawn?")};
    CHECK(answer(open_tiny(), whole) == second);
}

TEST_CASE("conversation: one turn at a time; what failed was never said") {
    Engine engine = open_tiny();
    Conversation conversation(engine, settings());
    Reply first = conversation.say("one");
    CHECK(code_of(conversation.say("two")) == "conversation_busy");
    CHECK(conversation.items().empty());
    CHECK_FALSE(conversation.fork());
    CHECK_FALSE(conversation.save());
    first.cancel();
    REQUIRE(engine.step());
    CHECK(first.outcome().status == Status::cancelled);
    CHECK(conversation.items().empty());
    say(engine, conversation, "three");
    CHECK(conversation.items().size() == 2);
    CHECK(conversation.items()[0].text() == "three");

    // Cancelled after some words: they count.
    Reply cut = conversation.say("four");
    while (true) {
        REQUIRE(engine.step(0));
        auto event = cut.poll();
        if (event && event->text_delta()) break;
    }
    cut.cancel();
    REQUIRE(engine.step());
    REQUIRE(conversation.items().size() == 4);
    CHECK(conversation.items()[3].text() == cut.outcome().text);
}

TEST_CASE("conversation: a full context refuses or forgets the older turns") {
    EngineOptions options = tiny_options();
    options.context_tokens = 160;
    Engine engine = open_tiny(options);
    const auto talk = [&](WhenFull when_full) {
        Conversation conversation(engine, settings(), when_full);
        for (int turn = 0; turn < 12; ++turn) {
            Reply reply = conversation.say("say something");
            REQUIRE(engine.step());
            REQUIRE(reply.finished());
            if (reply.outcome().error) {
                CHECK(code_of(reply) == "context_length_exceeded");
                CHECK(conversation.items().size() == static_cast<size_t>(2 * turn));
                return conversation;
            }
            CHECK(reply.outcome().usage.input_tokens + 20 <= 160);
        }
        return conversation;
    };
    Conversation refused = talk(WhenFull::refuse);
    CHECK(refused.forgotten_turns() == 0);
    CHECK(refused.items().size() < 24);
    Conversation forgot = talk(WhenFull::drop_oldest_turns);
    CHECK(forgot.forgotten_turns() > 0);
    CHECK(forgot.forgotten_turns() + forgot.items().size() / 2 == 12);
}

TEST_CASE("conversation: items are said too") {
    Engine engine = open_tiny();
    Conversation words(engine, settings()), items(engine, settings());
    const std::string expected = say(engine, words, "hello");
    Reply reply = items.say(
        {Item::message(Role::developer, "be brief"), Item::message(Role::user, "hello")});
    CHECK(items.items().empty());
    CHECK(code_of(items.say(std::vector<Item>{})) == "conversation_busy");
    REQUIRE(engine.step());
    CHECK(items.items().size() == 3);
    reply = items.say({Item::message(Role::user, "x"), Item::message(Role::user, "y")});
    reply.cancel();
    REQUIRE(engine.step());
    CHECK(items.items().size() == 3);  // both were never said
}

TEST_CASE("conversation: a fork goes its own way from the same place") {
    Engine engine = open_tiny();
    Conversation one(engine, settings());
    say(engine, one, "Good morning.");
    auto two = one.fork();
    REQUIRE(two);
    uint32_t cached = 0;
    const std::string here = say(engine, one, "Is the sword ready?");
    CHECK(say(engine, *two, "Is the sword ready?", &cached) == here);
    CHECK(cached > 0);
    say(engine, *two, "Good night.");
    CHECK(one.items().size() == 4);
    CHECK(two->items().size() == 6);
}

namespace {

// A save as version 2 wrote it: without pages, settings and items in forms of their own.
std::vector<std::byte> save_of_version_2(const std::vector<std::byte>& saved) {
    const std::string json =
        R"({"settings":{"temperature":0.5,"max_output_tokens":20,"presence_penalty":0,)"
        R"("frequency_penalty":0,"repetition_penalty":1.1,"model":"",)"
        R"("instructions":"You are a gruff blacksmith.",)"
        R"("organisation":"","prompt_cache_key":"","stop":["never said"],)"
        R"("logit_bias":[[40,-2.5]],"seed":7,"logprobs":false,"top_logprobs":0,"window":1},)"
        R"("when_full":1,"fixed":0,"forgotten":0,"items":[)"
        R"([0,2,"","","",[[0,"Good morning."]]],[0,3,"","","",[[1,"Morning."]]]]})";
    std::vector<std::byte> out(saved.begin(), saved.begin() + 88);
    const uint32_t version = 2;
    const uint64_t size = json.size();
    std::memcpy(&out[8], &version, sizeof version);
    std::memcpy(&out[80], &size, sizeof size);
    for (const char c : json) out.push_back(static_cast<std::byte>(c));
    const uint32_t sum = detail::crc32c(out.data(), out.size());
    const auto* bytes = reinterpret_cast<const std::byte*>(&sum);
    out.insert(out.end(), bytes, bytes + sizeof sum);
    return out;
}

}  // namespace

TEST_CASE("conversation: what older versions saved is read") {
    Engine engine = open_tiny();
    Request from = settings();
    from.temperature = 0.5;
    from.seed = 7;
    from.stop = {"never said"};
    from.logit_bias = {{40, -2.5}};
    from.repetition_penalty = 1.1;
    from.input = std::vector<Item>{Item::message(Role::user, "Good morning."),
                                   Item::message(Role::assistant, "Morning.")};
    Conversation now(engine, from);
    auto saved = now.save(false);
    REQUIRE(saved);
    auto before = Conversation::restore(engine, save_of_version_2(*saved));
    REQUIRE_MESSAGE(before.ok(), before.error().message);
    REQUIRE(before->items().size() == 2);
    CHECK(before->items()[1].role == Role::assistant);
    CHECK(say(engine, *before, "Is it done?") == say(engine, now, "Is it done?"));
}

TEST_CASE("conversation: a save holds every kind of item") {
    Engine engine = open_tiny();
    Item call, thought;
    call.kind = Item::Kind::custom_tool_call;
    call.call_id = "c1";
    call.name = "forge";
    call.arguments = "hot";
    thought.kind = Item::Kind::reasoning;
    thought.content = {{ContentPart::Kind::output_text, "hm"}};
    Request from = settings();
    from.input = std::vector<Item>{Item::message(Role::user, "x"), thought, call,
                                   Item::output(call, "done")};
    from.effort = Effort::low;
    from.max_tool_calls = 2;
    Conversation conversation(engine, from);
    auto saved = conversation.save(false);
    REQUIRE(saved);
    auto restored = Conversation::restore(engine, *saved);
    REQUIRE_MESSAGE(restored.ok(), restored.error().message);
    const auto items = restored->items();
    REQUIRE(items.size() == 4);
    for (size_t i = 0; i < 4; ++i) {
        CHECK(items[i].kind == conversation.items()[i].kind);
        CHECK(items[i].text() == conversation.items()[i].text());
        CHECK(items[i].arguments == conversation.items()[i].arguments);
        CHECK(items[i].call_id == conversation.items()[i].call_id);
    }
    CHECK(*restored->save(false) == *saved);
}

TEST_CASE("conversation: save and restore") {
    Engine engine = open_tiny();
    Request from = settings();
    from.temperature = 0.5;
    from.stop = {"never said"};
    from.logit_bias = {{40, -2.5}};
    from.repetition_penalty = 1.1;
    Conversation conversation(engine, from, WhenFull::drop_oldest_turns);
    say(engine, conversation, "Good morning.");
    auto saved = conversation.save();
    auto small = conversation.save(false);
    REQUIRE(saved);
    REQUIRE(small);
    CHECK(small->size() < saved->size());
    const std::string expected = say(engine, conversation, "Is the sword ready?");
    for (const auto& [bytes, has_pages] : {std::pair(&*saved, true), std::pair(&*small, false)}) {
        Engine other = open_tiny();
        auto restored = Conversation::restore(other, *bytes);
        REQUIRE(restored);
        CHECK(restored->items().size() == 2);
        uint32_t cached = 0;
        CHECK(say(other, *restored, "Is the sword ready?", &cached) == expected);
        CHECK((cached > 0) == has_pages);
        auto again = restored->save(false);
        CHECK(again);
    }
    {
        Engine other = open_tiny();
        auto restored = Conversation::restore(other, *saved);
        REQUIRE(restored);
        auto again = restored->save();
        REQUIRE(again);
        CHECK(*again == *saved);
    }
    SUBCASE("any wrong byte, any cut") {
        Engine other = open_tiny();
        for (size_t i = 0; i < small->size(); ++i) {
            std::vector<std::byte> wrong = *small;
            wrong[i] ^= std::byte{1};
            CHECK_FALSE(Conversation::restore(other, wrong));
            CHECK_FALSE(Conversation::restore(other, std::span(*small).first(i)));
        }
        for (size_t i = 0; i < saved->size(); i += 97) {
            std::vector<std::byte> wrong = *saved;
            wrong[i] ^= std::byte{128};
            CHECK_FALSE(Conversation::restore(other, wrong));
        }
        CHECK(other.responder()->stats().pages_cached == 0);
    }
    SUBCASE("another model; other options") {
        const auto bytes = tiny::model({.types = {TensorType::q8_0}});
        EngineOptions options = tiny_options();
        options.model_bytes = bytes;
        Engine other = open_tiny(options);
        auto restored = Conversation::restore(other, *small);
        REQUIRE_FALSE(restored);
        CHECK(restored.error().kind == ErrorKind::unsupported);
        options = tiny_options();
        options.page_tokens = 64;
        Engine larger = open_tiny(options);
        CHECK_FALSE(Conversation::restore(larger, *saved));
        auto history = Conversation::restore(larger, *small);
        REQUIRE(history);
        CHECK(say(larger, *history, "Is the sword ready?") == expected);
    }
    SUBCASE("the same model, packed in its file") {
        const auto bytes = tiny::packed_copy(model_bytes());
        EngineOptions options = tiny_options();
        options.model_bytes = bytes;
        Engine other = open_tiny(options);
        auto restored = Conversation::restore(other, *saved);
        REQUIRE(restored);
        CHECK(say(other, *restored, "Is the sword ready?") == expected);
    }
    SUBCASE("its pages are found by nobody else") {
        Engine other = open_tiny();
        auto one = Conversation::restore(other, *saved), two = Conversation::restore(other, *saved);
        REQUIRE(one);
        REQUIRE(two);
        Conversation fresh(other, from);
        for (int turn = 0; turn < 2; ++turn) {
            uint32_t cached = 0;
            say(other, fresh, turn ? "Is the sword ready?" : "Good morning.", &cached);
            if (turn == 0) CHECK(cached == 0);
        }
        for (Conversation* restored : {&*one, &*two}) {
            uint32_t cached = 0;
            CHECK(say(other, *restored, "Is the sword ready?", &cached) == expected);
            CHECK(cached > 0);
        }
    }
    SUBCASE("not while the engine has a thread") {
        REQUIRE(engine.start());
        CHECK_FALSE(conversation.save());
        CHECK_FALSE(Conversation::restore(engine, *saved));
        engine.stop();
        CHECK(conversation.save());
    }
}

TEST_CASE("conversation: save and restore with q8_0 pages, and with windows") {
    for (const auto* model :
         {&model_bytes(), &windowed_bytes(), &partly_windowed_bytes(), &long_rope_bytes()}) {
        const bool windowed = model == &windowed_bytes(), partly = model != &model_bytes();
        EngineOptions options = tiny_options();
        options.model_bytes = *model;
        options.kv_type = KvType::q8_0;
        options.context_tokens = 512;
        options.step_tokens = 64;
        Engine engine = open_tiny(options);
        Conversation conversation(engine, settings());
        for (const char* words : {"Can you mend this sword before dawn?", "What does it cost?"})
            say(engine, conversation, words);
        auto saved = conversation.save(), bare = conversation.save(false);
        REQUIRE(saved);
        REQUIRE(bare);
        // Heads of 64: keys and values, each value a byte and a half of 32 a scale; 2 layers with 2
        // heads, or the third of 5 layers, and 3 pages of the others.
        const size_t head = 2 * 16 * (64 + 2 * 2), size = saved->size() - bare->size();
        const bool both = model == &partly_windowed_bytes();
        const size_t page = both ? head : 4 * head, pages = (size - both * 3 * 4 * head) / page;
        CHECK(size == both * 3 * 4 * head + pages * page);
        if (windowed) CHECK(pages == 3);
        else CHECK(pages > 6);
        uint32_t cached_here = 0, cached_there = 0;
        const std::string expected = say(engine, conversation, "Too much!", &cached_here);
        Engine other = open_tiny(options);
        auto restored = Conversation::restore(other, *saved);
        REQUIRE(restored);
        CHECK(say(other, *restored, "Too much!", &cached_there) == expected);
        if (partly) CHECK(cached_here > 16 * 3);
        CHECK(cached_there == cached_here);
        options.kv_type = KvType::f16;
        Engine different = open_tiny(options);
        CHECK_FALSE(Conversation::restore(different, *saved));
    }
}

TEST_CASE("engine: what the process has memory for bounds context, keys and values") {
    const auto bytes = tiny::model({.types = {TensorType::q8_0}, .n_context = 16384});
    EngineOptions options;
    options.model_bytes = bytes;
    detail::ModelFile file;
    REQUIRE(file.open(options).ok());
    struct Chosen {
        MemoryPlan plan;
        uint32_t context;
        std::string why;
    };
    const auto choose = [&](uint64_t memory) {
        auto chosen = detail::choose_backend_options(options, file, memory);
        REQUIRE(chosen.ok());
        auto plan = detail::plan_cpu_backend(file.gguf, file.spec, file.tensors, *chosen);
        REQUIRE(plan.ok());
        const uint32_t context = chosen->max_positions;
        CHECK(context == detail::choose_context(options, file, memory));
        return Chosen{*plan, context, detail::explain_context(options, file.spec, context, memory)};
    };
    // What there must be for so many bytes of keys and values: an eighth is kept back, and half.
    const auto memory_for = [](const MemoryPlan& plan, uint64_t kv) {
        return (plan.weights + plan.scratch + 2 * kv) * 8 / 7 + 8;
    };
    const Chosen two = choose(UINT64_MAX);
    CHECK(two.context == 16384);
    CHECK(two.why == "context 16,384, the model's own");
    CHECK(choose(memory_for(two.plan, two.plan.kv)).plan.kv == two.plan.kv);
    const Chosen one = choose(memory_for(two.plan, two.plan.kv / 2));
    CHECK(one.plan.kv == two.plan.kv / 2);
    CHECK(one.context == 16384);
    const Chosen capped = choose(memory_for(two.plan, two.plan.kv / 2) - 64);
    CHECK(capped.context == 16384 - 512);
    CHECK(capped.why.starts_with("context 15,872 of the model's 16,384: that is what "));
    CHECK(capped.why.ends_with(" MiB have room for"));
    CHECK(detail::explain_context(options, file.spec, 8192, uint64_t{76} << 30 >> 3) ==
          "context 8,192 of the model's 16,384: that is what 9.5 GiB have room for");
    const Chosen third = choose(memory_for(two.plan, two.plan.kv / 6));
    CHECK(third.context % 512 == 0);
    CHECK(third.context >= 16384 / 3 - 512);
    CHECK(third.plan.kv <= two.plan.kv / 6 + (two.plan.scratch - third.plan.scratch) / 2);
    const Chosen least = choose(1);  // never nothing
    CHECK(least.plan.kv > 0);
    CHECK(least.context == 512);

    options.memory_limit = two.plan.total();  // what the caller says is not second-guessed
    CHECK(choose(1).context == 16384);
    CHECK(choose(1).plan.kv == two.plan.kv);
    options.memory_limit = two.plan.total() - two.plan.kv * 3 / 4;
    const Chosen half = choose(UINT64_MAX);
    CHECK(half.context >= 8192);
    CHECK(half.context < 8192 + 1024);
    CHECK(half.plan.total() <= options.memory_limit);
    options.memory_limit = 1;
    CHECK(detail::choose_backend_options(options, file).error().param == "memory_limit");

    options.memory_limit = 0;
    options.context_tokens = 4096;
    CHECK(choose(1).context == 4096);
    CHECK(choose(1).plan.kv == two.plan.kv / 8);
    CHECK(choose(1).why == "context 4,096 of the model's 16,384, as asked for");
}

#if !defined(_WIN32)
TEST_CASE("engine: signals that interrupt system calls change nothing" * with_threads) {
    EngineOptions options = tiny_options();
    options.threads = 2;
    const std::string undisturbed = answer(open_tiny(options), ask("hello world", 40));
    const Interrupts interrupts;
    CHECK(answer(open_tiny(options), ask("hello world", 40)) == undisturbed);
    Engine engine = open_tiny(options);
    REQUIRE(engine.start());
    for (int i = 0; i < 10; ++i) {
        Reply reply = engine.submit(ask("hello world", 40));
        REQUIRE(reply.wait(30'000));
        CHECK(reply.outcome().text == undisturbed);
    }
    engine.stop();
}
#endif

#if !defined(_WIN32)
TEST_CASE("engine: a child of fork ends, and the parent's goes on" * with_threads) {
    EngineOptions options = tiny_options();
    options.threads = 2;
    auto engine = std::make_unique<Engine>(open_tiny(options));
    auto conversation = std::make_unique<Conversation>(*engine, Request());
    REQUIRE(engine->start());
    for (int i = 0; i < 20; ++i) {  // in the middle of whatever
        Reply reply = engine->submit(ask("hello world", 40));
        CHECK(ends_in_a_child([&] {
            const Reply dropped = std::move(reply);
            conversation.reset();
            engine.reset();
        }));
        REQUIRE(reply.wait(30'000));
        CHECK(reply.outcome().status == Status::completed);
    }
}
#endif

TEST_CASE("a slow path is said once, at opening, with its reason") {
    struct Lines {
        std::vector<std::string> warnings, others;
        static void write(void* self, LogLevel level, std::string_view line) {
            auto& lines = *static_cast<Lines*>(self);
            (level == LogLevel::warning ? lines.warnings : lines.others).emplace_back(line);
        }
    };
    const auto open = [](Lines& lines) {
        EngineOptions options = tiny_options();
        options.log = {Lines::write, &lines};
        Engine engine = open_tiny(options);
        CHECK(engine.kernels() == std::string_view(*kernels_in_use()));
        REQUIRE(lines.others.size() == 2);
        CHECK(lines.others[0] == "context 512, the model's own");
        CHECK(lines.others[1].ends_with(std::string(", kernels ") + engine.kernels()));
    };
    const std::string_view best = kernel_names().back();
    const std::string kept = detail::environment("VALAR_ISA");
    if (kept.empty()) {
        Lines lines;
        open(lines);
        CHECK(lines.warnings.size() == (best == "scalar" ? 1 : 0));
    }
#if !defined(_WIN32)
    for (const std::string name : kernel_names()) {
        setenv("VALAR_ISA", name.c_str(), 1);
        Lines lines;
        open(lines);
        if (name == best && best != "scalar") {
            CHECK(lines.warnings.empty());
            continue;
        }
        REQUIRE(lines.warnings.size() == 1);
        CHECK(lines.warnings[0].find(name) != std::string::npos);
        CHECK((lines.warnings[0].find("VALAR_ISA") == std::string::npos) == (name == best));
    }
    unsetenv("VALAR_ISA");
    if (!kept.empty()) setenv("VALAR_ISA", kept.c_str(), 1);
#endif
}

// ---- Several models --------------------------------------------------------------------------

namespace {

// What an allocator gave and got back, from any thread.
struct Ceiling {
    std::atomic<int64_t> bytes{0}, most{0};

    Allocator allocator() {
        Allocator out;
        out.context = this;
        out.allocate = [](void* self, uint64_t size, uint64_t alignment) -> void* {
            auto& of = *static_cast<Ceiling*>(self);
            const int64_t now = of.bytes += static_cast<int64_t>(size);
            int64_t before = of.most;
            while (now > before && !of.most.compare_exchange_weak(before, now)) {}
            return ::operator new(size, std::align_val_t(alignment));
        };
        out.release = [](void* self, void* memory, uint64_t size) {
            static_cast<Ceiling*>(self)->bytes -= static_cast<int64_t>(size);
            ::operator delete(memory, std::align_val_t(64));
        };
        return out;
    }
};

// Three models that differ in their ids and windows.
std::vector<EngineOptions> three_models(Ceiling* ceiling) {
    std::vector<EngineOptions> models(3, tiny_options());
    models[1].model_bytes = windowed_bytes();
    models[2].model_bytes = long_rope_bytes();
    for (size_t i = 0; i < models.size(); ++i) {
        models[i].model_id = std::string(1, static_cast<char>('a' + i));
        models[i].context_tokens = 256;
        models[i].max_running = 4;
        if (ceiling) models[i].allocator = ceiling->allocator();
    }
    return models;
}

// Submits to one of a pool; wait() for the outcome.
struct Asked {
    Responder* responder;
    std::string id;
    std::string text = {};
    std::shared_ptr<const Outcome> outcome = {};

    Asked(Responder* to, const Request& request, std::string as) : responder(to), id(as) {
        auto prepared = to->prepare(request);
        REQUIRE(prepared);
        REQUIRE(to->submit(std::move(*prepared), id));
    }
    bool look() {
        while (auto event = responder->poll(id))
            if (event->kind == Event::Kind::finished) outcome = event->outcome;
        return outcome != nullptr;
    }
    const Outcome& wait() {
        while (!look()) std::this_thread::sleep_for(std::chrono::microseconds(200));
        return *outcome;
    }
};

uint64_t bytes_of(const EngineOptions& model) { return Engine::memory_plan(model)->total(); }

}  // namespace

TEST_CASE("unload: memory comes back, a request loads again, what is saved is said anew" *
          with_threads) {
    Ceiling ceiling;
    EngineOptions options = tiny_options();
    options.allocator = ceiling.allocator();
    Engine engine = open_tiny(options);
    const int64_t loaded = ceiling.bytes;
    const std::string expected = answer(engine, ask("hello world"));
    Conversation conversation(engine, ask(""));
    Reply said = conversation.say("hello");
    REQUIRE(engine.step());
    auto saved = conversation.save();
    REQUIRE(saved);
    REQUIRE(engine.unload());
    CHECK(ceiling.bytes == 0);
    CHECK_FALSE(engine.is_loaded());
    CHECK(engine.responder()->stats().pages_cached == 0);
    CHECK_FALSE(*engine.step());  // nothing wants it
    CHECK_FALSE(engine.is_loaded());
    auto restored = Conversation::restore(engine, *saved);
    REQUIRE(restored);
    auto empty = restored->save();  // without keys and values
    REQUIRE(empty);
    CHECK(empty->size() < saved->size());
    REQUIRE(engine.unload());
    Reply waiting = engine.submit(ask("hello world"));
    waiting.cancel();
    CHECK_FALSE(*engine.step());
    CHECK(waiting.outcome().status == Status::cancelled);
    CHECK(ceiling.bytes == 0);
    CHECK(answer(engine, ask("hello world")) == expected);
    CHECK(engine.is_loaded());
    CHECK(ceiling.bytes == loaded);
    CHECK(ceiling.most == loaded);
    REQUIRE(engine.start());
    CHECK(engine.unload().error().kind == ErrorKind::invalid_request);
    engine.stop();
}

TEST_CASE("several models: under one limit they alternate, each answer is the one given alone") {
    Ceiling ceiling;
    const auto models = three_models(&ceiling);
    std::vector<std::string> expected;
    uint64_t most = 0, all = 0;
    for (const EngineOptions& model : three_models(nullptr)) {
        expected.push_back(answer(open_tiny(model), ask("hello world", 30)));
        most = std::max(most, bytes_of(model));
        all += bytes_of(model);
    }
    for (const uint64_t limit : {most, most + most / 2, all}) {
        CAPTURE(limit);
        ceiling.most = ceiling.bytes.load();
        auto pool = EnginePool::open(models, {.memory_limit = limit, .turn_ms = 1});
        REQUIRE(pool);
        const auto responders = pool->responders();
        REQUIRE(responders.size() == 3);
        REQUIRE(pool->start());
        for (int round = 0; round < 4; ++round) {
            std::vector<Asked> asked;
            for (int i = 0; i < 9; ++i)
                asked.emplace_back(responders[size_t(i * (round + 1)) % 3], ask("hello world", 30),
                                   std::to_string(round * 9 + i));
            for (int i = 0; i < 9; ++i) {
                const Outcome& outcome = asked[size_t(i)].wait();
                CAPTURE((outcome.error ? outcome.error->message : std::string()));
                CHECK(outcome.text == expected[size_t(i * (round + 1)) % 3]);
            }
        }
        CHECK(pool->memory_used() <= limit);
        CHECK(uint64_t(ceiling.most) <= limit);
        if (limit == all) CHECK(pool->memory_used() == all);
        for (size_t i = 0; i < 3; ++i) CHECK(responders[i]->models()[0].id == models[i].model_id);
    }
    CHECK(ceiling.bytes == 0);
}

TEST_CASE("several models: a busy one gives way after its turn, an idle one after its time") {
    auto models = three_models(nullptr);
    models.resize(2);
    models[1].context_tokens = models[0].context_tokens = 512;
    const uint64_t limit = std::max(bytes_of(models[0]), bytes_of(models[1]));
    const std::string expected = answer(open_tiny(models[1]), ask("long", 400));
    auto pool = EnginePool::open(
        models, {.memory_limit = limit, .keep_loaded_ms = 1, .turn_ms = 5, .preload = false});
    REQUIRE(pool);
    CHECK(pool->memory_used() == 0);
    const auto responders = pool->responders();
    Asked unwanted(responders[0], ask("hello world"), "unwanted");
    responders[0]->cancel("unwanted");
    REQUIRE(pool->start());
    CHECK(unwanted.wait().status == Status::cancelled);
    CHECK(responders[0]->stats().batches == 0);
    CHECK(pool->memory_used() == 0);  // nothing was loaded for it
    std::vector<Asked> busy;
    for (int i = 0; i < 4; ++i)
        busy.emplace_back(responders[1], ask("long", 400), "busy" + std::to_string(i));
    Asked other(responders[0], ask("hello world"), "other");
    Asked cancelled(responders[0], ask("hello world", 200), "cancelled");
    responders[0]->cancel("cancelled");
    CHECK(other.wait().status == Status::completed);
    CHECK(cancelled.wait().status == Status::cancelled);
    for (Asked& one : busy) CHECK(one.wait().text == expected);
    while (pool->memory_used() > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    Asked again(responders[1], ask("long", 400), "again");
    CHECK(again.wait().text == expected);
    pool->stop();
}

TEST_CASE("several models: they share memory where that costs no context, else take turns") {
    const auto use_all = [](uint64_t limit) {
        auto models = three_models(nullptr);
        for (EngineOptions& model : models) model.max_running = 16;
        auto pool = EnginePool::open(models, {.memory_limit = limit});
        REQUIRE(pool);
        REQUIRE(pool->start());
        std::vector<uint32_t> pages;
        for (Responder* responder : pool->responders()) {
            Asked(responder, ask("hello world"), "one").wait();
            pages.push_back(responder->stats().pages);
        }
        CHECK(pool->memory_used() <= limit);
        return std::pair(pool->memory_used(), pages);
    };
    uint64_t alone = 0, tight = 0, roomy = 0;
    for (EngineOptions model : three_models(nullptr)) {
        model.max_running = 16;
        const MemoryPlan plan = *Engine::memory_plan(model);
        alone = std::max(alone, plan.total());
        roomy += plan.total();
        tight += plan.total() - plan.kv / 4;  // of two contexts
    }
    const auto all = use_all(roomy), less = use_all(tight), turns = use_all(alone);
    CHECK(all.first == roomy);
    CHECK(less.first > alone);
    CHECK(less.second[0] < all.second[0]);
    CHECK(turns.first <= alone);
}

TEST_CASE("several models: what cannot be is said") {
    auto models = three_models(nullptr);
    auto refused = EnginePool::open(models, {.memory_limit = 1000});
    REQUIRE_FALSE(refused);
    CHECK(refused.error().kind == ErrorKind::out_of_memory);
    CHECK(refused.error().param == "memory_limit");
    models[1].model_bytes = {};
    models[1].model_path = "no such file";
    CHECK(EnginePool::open(models).error().kind == ErrorKind::not_found);
}
