// >>store: MemoryStore's bounds, tenancy and life of a record.
#include <doctest/doctest.h>

#include <thread>

#include "valar.hpp"

using namespace valar;

namespace {

std::shared_ptr<const std::string> text(std::string words) {
    return std::make_shared<const std::string>(std::move(words));
}

StoredResponse record(const std::string& id, size_t bytes, const std::string& organisation = "a") {
    return {id, organisation, false, 1000, text(std::string(bytes, 'x'))};
}

}  // namespace

TEST_CASE("store: a record from acceptance to its end") {
    MemoryStore store;
    REQUIRE(store.add(record("r1", 10)));
    auto found = store.find("a", "r1");
    REQUIRE(found);
    CHECK_FALSE(found->terminal);
    CHECK(found->changed_at_ms == 1000);
    CHECK(*found->body == std::string(10, 'x'));

    REQUIRE(store.finish("r1", text("done"), 2000));
    found = store.find("a", "r1");
    REQUIRE(found);
    CHECK(found->terminal);
    CHECK(found->changed_at_ms == 2000);
    CHECK(*found->body == "done");

    // terminal once: what was answered never changes
    auto again = store.finish("r1", text("other"), 3000);
    REQUIRE_FALSE(again);
    CHECK(again.error().kind == ErrorKind::not_found);
    CHECK(*store.find("a", "r1")->body == "done");

    store.erase("r1");
    CHECK_FALSE(store.find("a", "r1"));
    CHECK(store.bytes() == 0);
    store.erase("r1");
    CHECK(store.bytes() == 0);
}

TEST_CASE("store: other organisations see nothing") {
    MemoryStore store;
    REQUIRE(store.add(record("r1", 10, "a")));
    CHECK(store.find("a", "r1"));
    CHECK_FALSE(store.find("b", "r1"));
    CHECK_FALSE(store.find("", "r1"));
    CHECK_FALSE(store.find("a", "r2"));
}

TEST_CASE("store: an id is used once, and unknown ones cannot end") {
    MemoryStore store;
    REQUIRE(store.add(record("r1", 10)));
    const uint64_t bytes = store.bytes();
    auto twice = store.add(record("r1", 10, "b"));
    REQUIRE_FALSE(twice);
    CHECK(twice.error().kind == ErrorKind::internal);
    CHECK(store.bytes() == bytes);
    CHECK(store.find("a", "r1"));
    CHECK_FALSE(store.finish("r2", text("x"), 1));
}

TEST_CASE("store: past its limit the oldest terminal records go, unfinished ones never") {
    MemoryStoreOptions options;
    options.max_bytes = 10'000;
    MemoryStore store(options);
    REQUIRE(store.add(record("live", 2000)));
    REQUIRE(store.add(record("old", 2000)));
    REQUIRE(store.add(record("new", 2000)));
    REQUIRE(store.finish("old", text(std::string(2000, 'o')), 1));
    REQUIRE(store.finish("new", text(std::string(2000, 'n')), 2));
    REQUIRE(store.add(record("next", 2500)));  // "old" makes room
    CHECK_FALSE(store.find("a", "old"));
    CHECK(store.find("a", "new"));
    CHECK(store.find("a", "live"));
    CHECK(store.bytes() <= options.max_bytes);

    auto full = store.add(record("huge", 9000));  // even "new" going is not enough
    REQUIRE_FALSE(full);
    CHECK(full.error().kind == ErrorKind::overloaded);
    CHECK_FALSE(store.find("a", "huge"));
    CHECK(store.find("a", "live"));
    CHECK(store.find("a", "next"));

    // an answer that was worked for is kept, whatever its size
    REQUIRE(store.finish("live", text(std::string(20'000, 'l')), 3));
    CHECK(store.find("a", "live"));
    CHECK(store.find("a", "next"));
    REQUIRE(store.finish("next", text("n"), 4));
    CHECK_FALSE(store.find("a", "live"));
    CHECK(store.find("a", "next"));
}

TEST_CASE("store: retention counts from the end") {
    MemoryStoreOptions options;
    options.retention_s = 10;
    MemoryStore store(options);
    REQUIRE(store.add(record("live", 1)));
    REQUIRE(store.add(record("old", 1)));
    REQUIRE(store.add(record("new", 1)));
    REQUIRE(store.finish("old", text("o"), 50'000));
    REQUIRE(store.finish("new", text("n"), 55'000));
    store.expire(59'999);
    CHECK(store.find("a", "old"));
    store.expire(60'000);
    CHECK_FALSE(store.find("a", "old"));
    CHECK(store.find("a", "new"));
    store.expire(1'000'000);
    CHECK_FALSE(store.find("a", "new"));
    CHECK(store.find("a", "live"));
}

TEST_CASE("store: from several threads") {
    MemoryStoreOptions options;
    options.max_bytes = 100'000;
    MemoryStore store(options);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([&store, t] {
            for (int i = 0; i < 300; ++i) {
                const std::string id = std::to_string(t) + "-" + std::to_string(i);
                if (!store.add(record(id, 100))) continue;
                (void)store.find("a", id);
                if (i % 3 == 0) store.erase(id);
                else (void)store.finish(id, text("done"), i).ok();
                if (i % 50 == 0) store.expire(i);
            }
        });
    for (std::thread& thread : threads) thread.join();
    CHECK(store.bytes() <= options.max_bytes);
    store.expire(INT64_MAX);
    CHECK(store.bytes() == 0);
}
