// >>store: MemoryStore's bounds, tenancy and life of a record.
#include <doctest/doctest.h>

#include <algorithm>
#include <thread>

#include "valar.hpp"

using namespace valar;

namespace {

std::shared_ptr<const std::string> text(std::string words) {
    return std::make_shared<const std::string>(std::move(words));
}

StoredResponse record(const std::string& id, size_t bytes, const std::string& organisation = "a",
                      const std::string& reservation = {}) {
    StoredResponse made;
    made.id = id;
    made.organisation = organisation;
    made.reservation = reservation;
    made.fingerprint = id;
    made.created_at_ms = 1000;
    made.request = text(std::string(bytes, 'x'));
    return made;
}

/// A change of MemoryStore is done when the call returns.
struct Kept {
    Result<void> result;
    StoreDone done() {
        return {[](void* self, Result<void> got) { static_cast<Kept*>(self)->result = std::move(got); },
                this};
    }
};
Result<void> add(Store& store, StoredResponse made) {
    Kept kept;
    store.add(std::move(made), kept.done());
    return kept.result;
}
Result<void> finish(Store& store, const std::string& id, std::shared_ptr<const std::string> object,
                    int64_t now_ms) {
    Kept kept;
    store.finish(id, std::move(object), now_ms, kept.done());
    return kept.result;
}
Result<void> erase(Store& store, const std::string& id, bool tombstone = false) {
    Kept kept;
    store.erase("a", id, tombstone, 5000, kept.done());
    return kept.result;
}

}  // namespace

TEST_CASE("store: a record from acceptance to its end") {
    MemoryStore store;
    REQUIRE(add(store, record("r1", 10)));
    auto found = store.find("a", "r1");
    REQUIRE(found);
    CHECK_FALSE(found->terminal);
    CHECK(found->created_at_ms == 1000);
    CHECK(*found->request == std::string(10, 'x'));

    REQUIRE(finish(store, "r1", text("done"), 2000));
    found = store.find("a", "r1");
    REQUIRE(found);
    CHECK(found->terminal);
    CHECK(found->ended_at_ms == 2000);
    CHECK(*found->object == "done");

    // terminal once: what was answered never changes
    auto again = finish(store, "r1", text("other"), 3000);
    REQUIRE_FALSE(again);
    CHECK(again.error().kind == ErrorKind::not_found);
    CHECK(*store.find("a", "r1")->object == "done");

    (void)erase(store, "r1").ok();
    CHECK_FALSE(store.find("a", "r1"));
    CHECK(store.bytes() == 0);
    (void)erase(store, "r1").ok();
    CHECK(store.bytes() == 0);
}

TEST_CASE("store: other organisations see nothing") {
    MemoryStore store;
    REQUIRE(add(store, record("r1", 10, "a")));
    CHECK(store.find("a", "r1"));
    CHECK_FALSE(store.find("b", "r1"));
    CHECK_FALSE(store.find("", "r1"));
    CHECK_FALSE(store.find("a", "r2"));
}

TEST_CASE("store: an id is used once, and unknown ones cannot end") {
    MemoryStore store;
    REQUIRE(add(store, record("r1", 10)));
    const uint64_t bytes = store.bytes();
    auto twice = add(store, record("r1", 10, "b"));
    REQUIRE_FALSE(twice);
    CHECK(twice.error().kind == ErrorKind::internal);
    CHECK(store.bytes() == bytes);
    CHECK(store.find("a", "r1"));
    CHECK_FALSE(finish(store, "r2", text("x"), 1));
}

TEST_CASE("store: past its limit the oldest terminal records go, unfinished ones never") {
    MemoryStoreOptions options;
    options.max_bytes = 12'100;
    MemoryStore store(options);
    REQUIRE(add(store, record("live", 2000)));
    REQUIRE(add(store, record("old", 2000)));
    REQUIRE(add(store, record("new", 2000)));
    REQUIRE(finish(store, "old", text(std::string(2000, 'o')), 1));
    REQUIRE(finish(store, "new", text(std::string(2000, 'n')), 2));
    REQUIRE(add(store, record("next", 2500)));  // "old" makes room
    CHECK_FALSE(store.find("a", "old"));
    CHECK(store.find("a", "new"));
    CHECK(store.find("a", "live"));
    CHECK(store.bytes() <= options.max_bytes);

    auto full = add(store, record("huge", 9000));  // even "new" going is not enough
    REQUIRE_FALSE(full);
    CHECK(full.error().kind == ErrorKind::overloaded);
    CHECK_FALSE(store.find("a", "huge"));
    CHECK(store.find("a", "live"));
    CHECK(store.find("a", "next"));

    // an answer that was worked for is kept, whatever its size
    REQUIRE(finish(store, "live", text(std::string(20'000, 'l')), 3));
    CHECK(store.find("a", "live"));
    CHECK(store.find("a", "next"));
    REQUIRE(finish(store, "next", text("n"), 4));
    CHECK_FALSE(store.find("a", "live"));
    CHECK(store.find("a", "next"));
}

TEST_CASE("store: retention counts from the end") {
    MemoryStoreOptions options;
    options.retention_s = 10;
    MemoryStore store(options);
    REQUIRE(add(store, record("live", 1)));
    REQUIRE(add(store, record("old", 1)));
    REQUIRE(add(store, record("new", 1)));
    REQUIRE(finish(store, "old", text("o"), 50'000));
    REQUIRE(finish(store, "new", text("n"), 55'000));
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
                if (!add(store, record(id, 100))) continue;
                (void)store.find("a", id);
                if (i % 3 == 0) (void)erase(store, id).ok();
                else (void)finish(store, id, text("done"), i).ok();
                if (i % 50 == 0) store.expire(i);
            }
        });
    for (std::thread& thread : threads) thread.join();
    CHECK(store.bytes() <= options.max_bytes);
    store.expire(INT64_MAX);
    CHECK(store.bytes() == 0);
}

TEST_CASE("store: a reservation is taken once, and as long as its record or tombstone") {
    MemoryStoreOptions options;
    options.retention_s = 10;
    MemoryStore store(options);
    REQUIRE(add(store, record("r1", 10, "a", "k")));
    auto taken = add(store, record("r2", 10, "a", "k"));
    REQUIRE_FALSE(taken);
    CHECK(taken.error().kind == ErrorKind::idempotency);
    CHECK_FALSE(store.find("a", "r2"));
    CHECK(add(store, record("r3", 10, "b", "k")));
    CHECK_FALSE(store.reserved("a", "other"));
    auto holder = store.reserved("a", "k");
    REQUIRE(holder);
    CHECK(holder->id == "r1");
    CHECK(holder->fingerprint == "r1");
    CHECK_FALSE(holder->deleted);
    REQUIRE(finish(store, "r1", text("done"), 4000));
    REQUIRE(erase(store, "r1", true));
    CHECK_FALSE(store.find("a", "r1"));
    CHECK(erase(store, "r1", true).error().kind == ErrorKind::not_found);
    CHECK(store.reserved("a", "k")->deleted);
    CHECK_FALSE(add(store, record("r2", 10, "a", "k")));
    store.expire(14'000);
    CHECK_FALSE(store.reserved("a", "k"));
    CHECK(add(store, record("r2", 10, "a", "k")));
    REQUIRE(erase(store, "r2"));  // without a tombstone it is free at once
    CHECK_FALSE(store.reserved("a", "k"));
    CHECK(erase(store, "r3").error().kind == ErrorKind::not_found);  // another organisation's
}

TEST_CASE("store: lists, and what is unfinished") {
    MemoryStore store;
    for (const char* id : {"r1", "r2", "r3", "r4"}) REQUIRE(add(store, record(id, 1)));
    REQUIRE(add(store, record("b1", 1, "b")));
    CHECK(*store.list("a", "", 2) == std::vector<std::string>{"r4", "r3"});
    CHECK(*store.list("a", "r3", 9) == std::vector<std::string>{"r2", "r1"});
    CHECK(store.list("b", "", 9)->size() == 1);
    CHECK(store.list("c", "", 9)->empty());
    CHECK_FALSE(store.list("a", "b1", 9).ok());
    REQUIRE(finish(store, "r1", text("done"), 1));
    REQUIRE(finish(store, "r3", text("done"), 1));
    REQUIRE(erase(store, "r2"));
    CHECK(*store.list("a", "", 9) == std::vector<std::string>{"r4", "r3", "r1"});
    Kept kept;
    store.begin("r4", 2, kept.done());
    REQUIRE(kept.result);
    store.begin("r1", 2, kept.done());
    CHECK_FALSE(kept.result);
    std::vector<std::string> ids;
    for (const StoredResponse& left : store.unfinished()) ids.push_back(left.id);
    std::sort(ids.begin(), ids.end());
    CHECK(ids == std::vector<std::string>{"b1", "r4"});
    CHECK(store.find("a", "r4")->attempts == 2);
}
