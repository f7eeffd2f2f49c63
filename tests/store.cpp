// >>store: the rules that both stores keep, and what a FileStore has left after crashes, on full and
// failing disks, and where its files were damaged. VALAR_CRASH_POINTS=10000 runs all of them.
#include <doctest/doctest.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <optional>
#include <thread>

#if !defined(_WIN32)
#include <sys/stat.h>
#include <unistd.h>
#endif

#include "digest_internal.hpp"
#include "host.hpp"
#include "sample.hpp"
#include "store/journal.hpp"
#include "store/store.hpp"
#include "store_disk.hpp"
#include "wall_clock.hpp"

using namespace valar;
using namespace store_disk;

namespace {

constexpr int64_t hour_ms = 3'600'000;

std::shared_ptr<const std::string> text(std::string words) {
    return std::make_shared<const std::string>(std::move(words));
}

StoredResponse record(const std::string& id, size_t bytes, const std::string& organisation = "a",
                      const std::string& reservation = "") {
    StoredResponse made;
    made.id = id;
    made.organisation = organisation;
    made.reservation = reservation;
    made.fingerprint = reservation.empty() ? "" : "print of " + id;
    made.created_at_ms = 1000;
    made.head = text("head of " + id);
    made.request = text(std::string(bytes, 'x'));
    return made;
}

/// What a StoreDone said: "" is success, "?" not called yet.
struct Answer {
    std::string said = "?";
    int calls = 0;
    ErrorKind kind = ErrorKind::internal;
    StoreDone done() {
        return {[](void* context, Result<void> result) {
                    Answer& self = *static_cast<Answer*>(context);
                    self.said = result ? "" : result.error().message;
                    if (!result) self.kind = result.error().kind;
                    ++self.calls;
                },
                this};
    }
    bool ok() const { return said.empty() && calls == 1; }
    bool is(ErrorKind wanted) const { return !said.empty() && calls == 1 && kind == wanted; }
};

/// A store whose changes are done when the call returns.
struct Direct {
    Store* store;
    FileStore* file = nullptr;
    template <class Call>
    Answer call(Call make) {
        Answer answer;
        make(answer.done());
        if (file)
            while (file->step()) {}
        return answer;
    }
    Answer add(StoredResponse made) {
        return call([&](StoreDone done) { store->add(std::move(made), done); });
    }
    Answer begin(const std::string& id, uint32_t attempts) {
        return call([&](StoreDone done) { store->begin(id, attempts, done); });
    }
    Answer finish(const std::string& id, const std::string& object, int64_t now_ms) {
        return call([&](StoreDone done) { store->finish(id, text(object), now_ms, done); });
    }
    Answer erase(const std::string& id, bool tombstone, int64_t now_ms = 5,
                 const std::string& organisation = "a") {
        return call(
            [&](StoreDone done) { store->erase(organisation, id, tombstone, now_ms, done); });
    }
    void expire(int64_t now_ms) {
        store->expire(now_ms);
        if (file)
            while (file->step()) {}
    }
    std::string ids(const std::string& organisation, const std::string& after = "",
                    size_t limit = 100) {
        auto list = store->list(organisation, after, limit);
        if (!list) return "error";
        std::string all;
        for (const std::string& id : *list) all += (all.empty() ? "" : " ") + id;
        return all;
    }
};

FileStoreOptions by_hand() {
    FileStoreOptions options;
    options.own_thread = false;
    return options;
}

Result<std::unique_ptr<FileStore>> open_on(Disk* disk,
                                           const FileStoreOptions& options = by_hand()) {
    return FileStore::open(options, std::make_unique<DiskFolder>(disk));
}

/// Runs a test on a MemoryStore, on a FileStore, and on a FileStore that is opened again at each
/// call of `reopen`.
template <class Test>
void on_each_store(uint64_t max_bytes, int64_t retention_s, Test test) {
    SUBCASE("memory") {
        MemoryStore store({max_bytes, retention_s});
        test([&]() -> Direct { return {&store}; });
    }
    SUBCASE("file") {
        Disk disk;
        FileStoreOptions options = by_hand();
        options.max_bytes = max_bytes;
        options.retention_s = retention_s;
        std::unique_ptr<FileStore> store;
        test([&]() -> Direct {
            store.reset();
            auto opened = open_on(&disk, options);
            REQUIRE_MESSAGE(opened.ok(), opened.error().message);
            store = std::move(*opened);
            return {store.get(), store.get()};
        });
    }
}

}  // namespace

TEST_CASE("store: a record from acceptance to its end") {
    on_each_store(1 << 20, 100, [](auto reopen) {
        Direct store = reopen();
        StoredResponse given = record("r1", 10);
        given.background = true;
        REQUIRE(store.add(given).ok());
        REQUIRE(store.begin("r1", 2).ok());
        for (int i = 0; i < 2; ++i) {
            const auto found = store.store->find("a", "r1");
            REQUIRE(found);
            CHECK_FALSE(found->terminal);
            CHECK(found->background);
            CHECK(found->attempts == 2);
            CHECK(found->created_at_ms == 1000);
            CHECK(*found->head == "head of r1");
            CHECK(*found->request == std::string(10, 'x'));
            const auto open = store.store->unfinished();
            REQUIRE(open.size() == 1);
            CHECK(open[0].id == "r1");
            CHECK(open[0].background);
            store = reopen();
        }
        REQUIRE(store.finish("r1", "done", 2000).ok());
        CHECK(store.finish("r1", "other", 3000).is(ErrorKind::not_found));  // terminal once
        CHECK(store.begin("r1", 3).is(ErrorKind::not_found));
        CHECK(store.finish("r2", "x", 1).is(ErrorKind::not_found));
        for (int i = 0; i < 2; ++i) {
            const auto found = store.store->find("a", "r1");
            REQUIRE(found);
            CHECK(found->terminal);
            CHECK(found->ended_at_ms == 2000);
            CHECK(*found->object == "done");
            CHECK(*found->request == std::string(10, 'x'));
            CHECK(store.store->unfinished().empty());
            store = reopen();
        }
        REQUIRE(store.erase("r1", true).ok());
        for (int i = 0; i < 2; ++i) {
            CHECK_FALSE(store.store->find("a", "r1"));
            CHECK(store.store->bytes() == 0);
            CHECK(store.erase("r1", true).is(ErrorKind::not_found));
            store = reopen();
        }
    });
}

TEST_CASE("store: a conversation's object is replaced, and is in no list") {
    on_each_store(4000, 100, [](auto reopen) {
        Direct store = reopen();
        StoredResponse given;
        given.id = "c1";
        given.organisation = "a";
        given.created_at_ms = 1000;
        given.conversation = true;
        REQUIRE(store.add(given).ok());
        REQUIRE(store.add(record("r1", 10)).ok());
        for (int64_t turn = 0; turn < 100; ++turn) {  // of 100 objects only one counts
            const std::string object(500, static_cast<char>('a' + turn % 26));
            REQUIRE(store.finish("c1", object, 2000 + turn).ok());
            if (turn % 25 == 0) store = reopen();
            const auto found = store.store->find("a", "c1");
            REQUIRE(found);
            CHECK(found->conversation);
            CHECK(found->ended_at_ms == 2000 + turn);
            CHECK(*found->object == object);
            CHECK(store.store->bytes() < 2500);
        }
        CHECK(store.ids("a") == "r1");
        CHECK(store.ids("a", "c1") == "error");
        CHECK(store.begin("c1", 2).is(ErrorKind::not_found));
        CHECK(store.finish("r1", "done", 3000).ok());
        CHECK(store.finish("r1", "again", 3000).is(ErrorKind::not_found));
        store.expire(2098 + 100'000);  // it counts from the last change
        CHECK(store.store->find("a", "c1"));
        store.expire(2099 + 100'000);
        CHECK_FALSE(store.store->find("a", "c1"));
        store = reopen();
        store.expire(2099 + 100'000);
        CHECK_FALSE(store.store->find("a", "c1"));
        CHECK(store.ids("a") == "r1");
    });
}

TEST_CASE("store: what is kept has an object that is replaced, and stays until it is erased") {
    on_each_store(4000, 100, [](auto reopen) {
        Direct store = reopen();
        StoredResponse given;
        given.id = "k1";
        given.organisation = "a";
        given.reservation = "key";
        given.created_at_ms = 1000;
        given.kept = true;
        given.request = std::make_shared<const std::string>("asked");
        REQUIRE(store.add(given).ok());
        REQUIRE(store.add(record("r1", 10)).ok());
        for (int64_t turn = 0; turn < 100; ++turn) {
            const std::string object(500, static_cast<char>('a' + turn % 26));
            REQUIRE(store.finish("k1", object, 2000 + turn).ok());
            if (turn % 25 == 0) store = reopen();
            const auto found = store.store->find("a", "k1");
            REQUIRE(found);
            CHECK((found->kept && !found->terminal));
            CHECK(*found->object == object);
            CHECK(*found->request == "asked");
            CHECK(store.store->bytes() < 2500);
        }
        CHECK(store.ids("a") == "r1");
        CHECK(store.ids("a", "k1") == "error");
        CHECK(store.store->unfinished().size() == 2);
        store.expire(1'000'000'000);
        store = reopen();
        CHECK(store.store->find("a", "k1"));
        CHECK(store.store->reserved("a", "key"));
        CHECK(store.store->retention_ms() == 100'000);
        REQUIRE(store.erase("k1", false, 1000).ok());
        store = reopen();
        CHECK_FALSE(store.store->find("a", "k1"));
        CHECK_FALSE(store.store->reserved("a", "key"));
    });
}

TEST_CASE("store: other organisations see nothing") {
    on_each_store(1 << 20, 100, [](auto reopen) {
        Direct store = reopen();
        REQUIRE(store.add(record("r1", 10, "a", "key")).ok());
        CHECK(store.store->find("a", "r1"));
        CHECK_FALSE(store.store->find("b", "r1"));
        CHECK_FALSE(store.store->find("", "r1"));
        CHECK_FALSE(store.store->find("a", "r2"));
        CHECK(store.erase("r1", true, 5, "b").is(ErrorKind::not_found));
        CHECK_FALSE(store.store->reserved("b", "key"));
        CHECK(store.ids("b") == "");
        CHECK(store.ids("b", "r1") == "error");
        CHECK(store.store->find("a", "r1"));
    });
}

TEST_CASE("store: an id is used once") {
    on_each_store(1 << 20, 100, [](auto reopen) {
        Direct store = reopen();
        REQUIRE(store.add(record("r1", 10)).ok());
        const uint64_t bytes = store.store->bytes();
        CHECK(store.add(record("r1", 10, "b")).is(ErrorKind::internal));
        CHECK(store.store->bytes() == bytes);
        CHECK(store.store->find("a", "r1"));
    });
}

TEST_CASE("store: a reservation is held until its record expires") {
    on_each_store(1 << 20, 10, [](auto reopen) {
        Direct store = reopen();
        REQUIRE(store.add(record("r1", 10, "a", "key")).ok());
        CHECK(store.add(record("r2", 10, "a", "key")).is(ErrorKind::conflict));
        REQUIRE(store.add(record("r2", 10, "b", "key")).ok());
        store = reopen();
        CHECK(store.add(record("r3", 10, "a", "key")).is(ErrorKind::conflict));
        auto held = store.store->reserved("a", "key");
        REQUIRE(held);
        CHECK(held->id == "r1");
        CHECK(held->fingerprint == "print of r1");
        CHECK_FALSE(held->deleted);

        REQUIRE(store.erase("r1", true, 5000).ok());  // leaves a tombstone
        for (int i = 0; i < 2; ++i) {
            held = store.store->reserved("a", "key");
            REQUIRE(held);
            CHECK(held->deleted);
            CHECK(held->fingerprint == "print of r1");
            CHECK(store.add(record("r4", 10, "a", "key")).is(ErrorKind::conflict));
            CHECK(store.ids("a") == "");
            CHECK(store.store->unfinished().size() == 1);  // r2
            store = reopen();
        }
        store.expire(14'999);
        CHECK(store.store->reserved("a", "key"));
        store.expire(15'000);
        CHECK_FALSE(store.store->reserved("a", "key"));
        REQUIRE(store.add(record("r5", 10, "a", "key")).ok());

        REQUIRE(store.erase("r5", false).ok());  // a refusal leaves the key free
        store = reopen();
        CHECK_FALSE(store.store->reserved("a", "key"));
        REQUIRE(store.add(record("r6", 10, "a", "key")).ok());
        store = reopen();
        CHECK(store.store->reserved("a", "key")->id == "r6");
    });
}

TEST_CASE("store: lists are newest first, page by page") {
    on_each_store(1 << 20, 100, [](auto reopen) {
        Direct store = reopen();
        for (const char* id : {"r1", "r2", "r3", "r4", "r5"})
            REQUIRE(store.add(record(id, 1)).ok());
        REQUIRE(store.add(record("other", 1, "b")).ok());
        REQUIRE(store.erase("r4", true).ok());
        for (int i = 0; i < 2; ++i) {
            CHECK(store.ids("a") == "r5 r3 r2 r1");
            CHECK(store.ids("a", "", 2) == "r5 r3");
            CHECK(store.ids("a", "r3", 2) == "r2 r1");
            CHECK(store.ids("a", "r1") == "");
            CHECK(store.ids("a", "r4") == "error");
            CHECK(store.ids("b") == "other");
            store = reopen();
        }
    });
}

TEST_CASE("store: past its limit the oldest terminal records go, unfinished ones never") {
    on_each_store(10'000, 100, [](auto reopen) {
        Direct store = reopen();
        REQUIRE(store.add(record("live", 2000)).ok());
        REQUIRE(store.add(record("old", 1000)).ok());
        REQUIRE(store.add(record("new", 1000)).ok());
        REQUIRE(store.finish("old", std::string(1000, 'o'), 1).ok());
        REQUIRE(store.finish("new", std::string(1000, 'n'), 2).ok());
        REQUIRE(store.add(record("next", 2500)).ok());  // "old" makes room
        for (int i = 0; i < 2; ++i) {
            CHECK_FALSE(store.store->find("a", "old"));
            CHECK(store.store->find("a", "new"));
            CHECK(store.store->find("a", "live"));
            CHECK(store.store->bytes() <= 10'000);
            store = reopen();
        }
        CHECK(store.add(record("huge", 9000)).is(ErrorKind::overloaded));
        CHECK_FALSE(store.store->find("a", "huge"));
        CHECK(store.store->find("a", "live"));
        CHECK(store.store->find("a", "next"));

        // an answer that was worked for is kept, whatever its size
        REQUIRE(store.finish("live", std::string(20'000, 'l'), 3).ok());
        CHECK(store.store->find("a", "live"));
        REQUIRE(store.finish("next", "n", 4).ok());
        store = reopen();
        CHECK_FALSE(store.store->find("a", "live"));
        CHECK(store.store->find("a", "next"));
    });
}

TEST_CASE("store: retention counts from the end") {
    on_each_store(1 << 20, 10, [](auto reopen) {
        Direct store = reopen();
        for (const char* id : {"live", "old", "new"}) REQUIRE(store.add(record(id, 1)).ok());
        REQUIRE(store.finish("old", "o", 50'000).ok());
        REQUIRE(store.finish("new", "n", 55'000).ok());
        store.expire(59'999);
        CHECK(store.store->find("a", "old"));
        store.expire(60'000);
        CHECK_FALSE(store.store->find("a", "old"));
        CHECK(store.store->find("a", "new"));
        store = reopen();
        store.expire(INT64_MAX);
        CHECK_FALSE(store.store->find("a", "new"));
        CHECK(store.store->find("a", "live"));
    });
}

TEST_CASE("store: changes that are asked for together see each other") {
    Disk disk;
    auto store = *open_on(&disk);
    Answer first, second, begun, finished, erased, third;
    store->add(record("r1", 10, "a", "key"), first.done());
    store->add(record("r2", 10, "a", "key"), second.done());
    store->begin("r1", 1, begun.done());
    store->finish("r1", text("end"), 7, finished.done());
    store->erase("a", "r1", false, 8, erased.done());
    store->add(record("r3", 10, "a", "key"), third.done());
    CHECK(first.calls == 0);
    CHECK_FALSE(store->find("a", "r1"));
    while (store->step()) {}
    CHECK(first.ok());
    CHECK(second.is(ErrorKind::conflict));
    CHECK(begun.ok());
    CHECK(finished.ok());
    CHECK(erased.ok());
    CHECK(third.ok());
    for (int i = 0; i < 2; ++i) {
        CHECK_FALSE(store->find("a", "r1"));
        CHECK(store->find("a", "r3"));
        CHECK(store->reserved("a", "key")->id == "r3");
        store.reset();
        store = *open_on(&disk);
    }
}

TEST_CASE("store: what ends in one commit stays within the limit") {
    Disk disk;
    FileStoreOptions options = by_hand();
    options.max_bytes = 20'000;
    auto store = *open_on(&disk, options);
    Answer added[10], finished[10];
    for (int i = 0; i < 10; ++i) store->add(record("r" + std::to_string(i), 100), added[i].done());
    while (store->step()) {}
    for (int i = 0; i < 10; ++i)
        store->finish("r" + std::to_string(i), text(std::string(5000, 'y')), i, finished[i].done());
    while (store->step()) {}
    for (const Answer& answer : finished) CHECK(answer.ok());
    CHECK(store->bytes() <= options.max_bytes);
    CHECK(store->find("a", "r9"));
    CHECK_FALSE(store->find("a", "r0"));
    store.reset();
    store = *open_on(&disk, options);
    CHECK(store->find("a", "r9"));
    CHECK_FALSE(store->find("a", "r0"));
}

TEST_CASE("store: from several threads") {
    Disk disk;
    FileStoreOptions options;
    options.max_bytes = 200'000;
    options.segment_bytes = 20'000;
    std::unique_ptr<FileStore> file = *open_on(&disk, options);
    MemoryStore memory({200'000, 100});
    for (Store* store : {static_cast<Store*>(&memory), static_cast<Store*>(file.get())}) {
        std::atomic<int> called = 0;
        const StoreDone count{
            [](void* context, Result<void>) { ++*static_cast<std::atomic<int>*>(context); },
            &called};
        std::vector<std::thread> threads;
        for (int t = 0; t < 4; ++t)
            threads.emplace_back([&, t] {
                for (int i = 0; i < 300; ++i) {
                    const std::string id = std::to_string(t) + "-" + std::to_string(i);
                    store->add(record(id, 100), count);
                    (void)store->find("a", id);
                    (void)store->list("a", "", 3);
                    if (i % 3 == 0) store->erase("a", id, true, i, count);
                    else store->finish(id, text("done"), i, count);
                    if (i % 50 == 0) store->expire(i);
                }
            });
        for (std::thread& thread : threads) thread.join();
        while (called < 4 * 600) std::this_thread::yield();
        CHECK(store->bytes() <= 200'000);
        store->expire(INT64_MAX);
    }
    CHECK(memory.bytes() == 0);
    file.reset();
    CHECK(open_on(&disk, options).ok());
}

// ---- Damage ------------------------------------------------------------------------------------

namespace {

/// Ten records, each with commits of its own, closed in order.
Disk small_journal() {
    Disk disk;
    auto store = *open_on(&disk);
    Direct direct{store.get(), store.get()};
    for (int i = 0; i < 10; ++i) {
        const std::string id = "r" + std::to_string(i);
        REQUIRE(direct.add(record(id, 20, "a", i % 2 ? "key" + id : "")).ok());
        if (i > 3) REQUIRE(direct.finish(id, "object of " + id, 100 + i).ok());
    }
    return disk;
}

const std::string segment_name = "00000001.journal";

/// The disk as it is, all of it synced, one file's bytes replaced.
Disk with_bytes(const Disk& disk, const std::string& name, std::string bytes) {
    Disk copy;
    for (const auto& [known, file] : disk.names) {
        copy.names[known] = std::make_shared<Disk::File>();
        copy.names[known]->now = copy.names[known]->synced = known == name ? bytes : file->now;
    }
    return copy;
}

}  // namespace

TEST_CASE("store: every prefix of a journal opens, with the records that it holds") {
    const Disk disk = small_journal();
    const std::string bytes = disk.names.at(segment_name)->now;
    size_t held = 0;
    for (size_t size = 0; size <= bytes.size(); ++size) {
        Disk prefix = with_bytes(disk, segment_name, bytes.substr(0, size));
        auto store = open_on(&prefix);
        if (size < 32) {  // its head was on the disk before the manifest named it
            REQUIRE_FALSE(store.ok());
            CHECK(store.error().message.find(segment_name) != std::string::npos);
            CHECK(prefix.operations == 0);
            continue;
        }
        REQUIRE_MESSAGE(store.ok(), size << ": " << store.error().message);
        const size_t count = (*store)->list("a", "", 100)->size();
        CHECK(count >= held);
        held = count;
        Direct direct{store->get(), store->get()};
        REQUIRE(direct.add(record("new", 5)).ok());
        store->reset();
        auto again = open_on(&prefix);
        REQUIRE(again.ok());
        CHECK((*again)->find("a", "new"));
        CHECK((*again)->list("a", "", 100)->size() == count + 1);
    }
    CHECK(held == 10);
}

TEST_CASE("store: every flipped bit is reported and changes nothing, or costs nothing") {
    const Disk disk = small_journal();
    for (const auto& [key, file] : disk.names) {
        const std::string name = key, bytes = file->now;  // Clang 14 captures no binding
        // a bad close record is a torn tail: nothing is lost with it
        const size_t closing = name == segment_name ? bytes.size() - 32 : bytes.size();
        for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
            std::string flipped = bytes;
            flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ 1 << bit % 8);
            Disk bad = with_bytes(disk, name, flipped);
            auto store = open_on(&bad);
            if (bit / 8 >= closing) {
                REQUIRE(store.ok());
                CHECK((*store)->list("a", "", 100)->size() == 10);
                continue;
            }
            REQUIRE_FALSE_MESSAGE(store.ok(), name << " bit " << bit);
            CHECK((store.error().kind == ErrorKind::bad_data ||
                   store.error().kind == ErrorKind::unsupported));
            CHECK(store.error().message.find(name) != std::string::npos);
            CHECK(bad.names[name]->now == flipped);
        }
    }
}

TEST_CASE("store: recover keeps what is whole and leaves the damaged file beside") {
    const Disk disk = small_journal();
    FileStoreOptions recover = by_hand();
    recover.recover = true;
    const std::string bytes = disk.names.at(segment_name)->now;
    for (size_t at = 0; at < bytes.size() - 32; at += 7) {
        std::string changed = bytes;
        changed[at] = static_cast<char>(changed[at] ^ 0x55);
        Disk bad = with_bytes(disk, segment_name, changed);
        {
            auto store = open_on(&bad, recover);
            if (!store.ok()) {  // a version, changed: not ours to touch
                CHECK(store.error().kind == ErrorKind::unsupported);
                continue;
            }
            CHECK((*store)->list("a", "", 100)->size() >= 9);
        }
        CHECK(bad.names.count(segment_name + ".damaged") == 1);
        auto again = open_on(&bad);
        REQUIRE_MESSAGE(again.ok(), again.error().message);
        CHECK((*again)->list("a", "", 100)->size() >= 9);
    }
    for (const std::string& manifest : {std::string("nonsense"), std::string()}) {
        Disk bad = with_bytes(disk, "manifest", manifest);
        if (manifest.empty()) bad.names.erase("manifest");
        auto refused = open_on(&bad);
        REQUIRE_FALSE(refused.ok());
        CHECK(refused.error().kind == ErrorKind::bad_data);
        auto store = open_on(&bad, recover);
        REQUIRE_MESSAGE(store.ok(), store.error().message);
        CHECK((*store)->list("a", "", 100)->size() == 10);
    }
}

TEST_CASE("store: segment numbers end before their names grow") {
    Disk disk = small_journal();
    disk.names["99999999.journal"] = disk.names.at(segment_name);
    disk.names.erase("manifest");
    FileStoreOptions recover = by_hand();
    recover.recover = true;
    auto store = open_on(&disk, recover);
    REQUIRE_FALSE(store.ok());
    CHECK(store.error().message == "the journal's segment numbers are used up");
}

TEST_CASE("store: a newer format is refused, and left as it is") {
    for (const auto& [name, file] : small_journal().names) {
        std::string bytes = file->now;
        if (bytes.empty()) continue;  // the reserve
        ++bytes[8];
        for (const bool recover : {false, true}) {
            Disk disk = with_bytes(small_journal(), name, bytes);
            FileStoreOptions options = by_hand();
            options.recover = recover;
            auto store = open_on(&disk, options);
            REQUIRE_FALSE(store.ok());
            CHECK(store.error().kind == ErrorKind::unsupported);
            CHECK(disk.operations == 0);
        }
    }
}

TEST_CASE("store: a full disk refuses changes, reads go on, and room heals it") {
    Disk disk;
    auto store = *open_on(&disk);
    Direct direct{store.get(), store.get()};
    REQUIRE(direct.add(record("r1", 500)).ok());
    disk.capacity = 300;
    const std::string before = disk.names[segment_name]->now;
    CHECK(direct.add(record("r2", 500)).is(ErrorKind::overloaded));
    CHECK(disk.names[segment_name]->now == before);
    disk.capacity = 0;
    CHECK(direct.erase("r1", true).is(ErrorKind::overloaded));
    CHECK(store->find("a", "r1"));
    CHECK(*store->find("a", "r1")->request == std::string(500, 'x'));
    CHECK_FALSE(store->find("a", "r2"));
    CHECK(store->failure());
    disk.capacity = 64 << 20;
    CHECK(direct.add(record("r2", 500)).is(ErrorKind::overloaded));  // nobody has looked yet
    disk.clock_ns += 1'000'000'000;
    REQUIRE(direct.add(record("r2", 500)).ok());
    CHECK_FALSE(store->failure());
    store.reset();
    store = *open_on(&disk);
    CHECK(store->list("a", "", 9)->size() == 2);
}

TEST_CASE("store: on a full disk a reserve is given up for outcomes and deletions") {
    Disk disk;
    disk.capacity = 10'000;
    FileStoreOptions options = by_hand();
    options.segment_bytes = 4000;
    auto store = *open_on(&disk, options);
    Direct direct{store.get(), store.get()};
    CHECK(disk.names.count("reserve") == 1);
    CHECK(disk.capacity <= 6000);
    REQUIRE(direct.add(record("r1", 500)).ok());
    REQUIRE(direct.add(record("r2", 500)).ok());
    disk.clock_ns += 1'000'000'000;
    CHECK(direct.erase("r2", true).ok());
    CHECK(store->free_bytes() <= 6000);
    disk.capacity = 100;
    CHECK(direct.add(record("r3", 2000)).is(ErrorKind::overloaded));
    CHECK(disk.names.count("reserve") == 0);
    CHECK(direct.add(record("r3", 1)).is(ErrorKind::overloaded));  // the reserve is not for it
    REQUIRE(store->failure());
    CHECK(store->failure()->kind == ErrorKind::overloaded);
    CHECK(direct.finish("r1", std::string(1000, 'o'), 5).ok());
    CHECK(direct.erase("r1", true).ok());
    CHECK_FALSE(store->find("a", "r1"));
    store.reset();
    disk.capacity = 50;
    store = *open_on(&disk, options);  // it still knows
    direct = Direct{store.get(), store.get()};
    CHECK(store->failure());
    CHECK(direct.add(record("r3", 1)).is(ErrorKind::overloaded));
    disk.capacity = 9000;
    disk.clock_ns += 2'000'000'000;
    CHECK(direct.add(record("r3", 1)).ok());
    CHECK_FALSE(store->failure());
    CHECK(disk.names.count("reserve") == 1);
}

TEST_CASE("store: after a failed sync nothing more is acknowledged, reads go on") {
    Disk disk;
    auto store = *open_on(&disk);
    Direct direct{store.get(), store.get()};
    REQUIRE(direct.add(record("r1", 500)).ok());
    disk.syncs_until_failure = 0;
    CHECK(direct.add(record("r2", 500)).is(ErrorKind::io));
    disk.syncs_until_failure = -1;  // the next sync would tell a lie
    CHECK(direct.add(record("r3", 500)).is(ErrorKind::io));
    CHECK(direct.finish("r1", "done", 5).is(ErrorKind::io));
    CHECK_FALSE(store->find("a", "r2"));
    CHECK_FALSE(store->find("a", "r1")->terminal);
    CHECK(*store->find("a", "r1")->request == std::string(500, 'x'));
    store.reset();
    store = *open_on(&disk);
    CHECK(store->find("a", "r1"));
    CHECK_FALSE(store->find("a", "r3"));
}

#if !defined(_WIN32)
namespace {

std::string fresh_directory() {
    const char* place = std::getenv("TMPDIR");
    std::string root = std::string(place ? place : "/tmp") + "/valar-store-XXXXXX";
    REQUIRE(mkdtemp(root.data()));
    return root;
}

}  // namespace

TEST_CASE("store: signals, no descriptors and children of fork lose nothing") {
    FileStoreOptions options;
    options.path = fresh_directory();
    options.segment_bytes = 4096;  // so that it wants another file now and then
    std::vector<Answer> added(300), finished(added.size());
    const auto id = [](size_t i) { return "r" + std::to_string(i); };
    {
        auto store = FileStore::open(options);
        REQUIRE(store);
        const Interrupts interrupts;
        for (size_t i = 0; i < added.size(); ++i) {
            std::optional<NoDescriptors> none;
            if (i / 50 % 2 == 1) none.emplace();
            (*store)->add(record(id(i), 200), added[i].done());
            (*store)->finish(id(i), text("done"), 5, finished[i].done());
            if (i % 60 == 30) CHECK(ends_in_a_child([&] { store->reset(); }));
            if (i % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
    }
    for (size_t i = 0; i < added.size(); ++i) {
        CHECK(added[i].said == "");
        CHECK(finished[i].said == "");
    }
    auto store = FileStore::open(options);
    REQUIRE(store);
    for (size_t i = 0; i < added.size(); ++i) {
        const auto found = (*store)->find("a", id(i));
        REQUIRE(found);
        CHECK((found->terminal && *found->object == "done"));
    }
    store->reset();
    std::filesystem::remove_all(options.path);
}

TEST_CASE("store: a directory that cannot be used says why") {
    const std::string root = fresh_directory();
    const auto refusal = [&](const std::string& path) {
        FileStoreOptions options = by_hand();
        options.path = path;
        auto store = FileStore::open(options);
        return store ? std::string() : store.error().message;
    };
    const auto says = [&](const std::string& path, const char* words) {
        const std::string message = refusal(path);
        INFO(message);
        CHECK(message.find(words) != message.npos);
        CHECK(message.find("'" + path + "'") != message.npos);
    };
    for (const char* empty : {"", " ", "\t", " \n"})
        CHECK(refusal(empty) == "the store's path is empty");
    std::FILE* file = std::fopen((root + "/file").c_str(), "w");
    REQUIRE(file);
    std::fclose(file);
    says(root + "/file", "is not a directory");
    says(root + "/file/store", "a part of its path is not a directory");
    says(root + "/none/store", "the directory that is to hold it is missing");
    const std::string path = root + "/store";
    {
        FileStoreOptions options = by_hand();
        options.path = path;
        auto held = FileStore::open(options);
        REQUIRE_MESSAGE(held.ok(), held.error().message);
        says(path, "is in use by another process");
    }
    if (geteuid() == 0) {  // who may write everywhere
        REQUIRE(chmod(root.c_str(), 0755) == 0);
        REQUIRE(chmod(path.c_str(), 0755) == 0);
        REQUIRE(seteuid(65534) == 0);
        says(path, "belongs to another user, or a file in it does");
        says(root + "/other", "may not be written by this user");
        REQUIRE(seteuid(0) == 0);
        REQUIRE(chmod(path.c_str(), 0777) == 0);  // the file of the lock is still root's
        REQUIRE(seteuid(65534) == 0);
        says(path, "belongs to another user, or a file in it does");
        REQUIRE(seteuid(0) == 0);
    } else {
        REQUIRE(chmod((path + "/lock").c_str(), 0400) == 0);
        says(path, "may not be written by this user");
        REQUIRE(chmod((path + "/lock").c_str(), 0600) == 0);
        REQUIRE(chmod(root.c_str(), 0500) == 0);
        says(root + "/other", "may not be written by this user");
        REQUIRE(chmod(root.c_str(), 0700) == 0);
    }
    std::FILE* manifest = std::fopen((path + "/manifest").c_str(), "w");
    REQUIRE(manifest);
    std::fputs("a manifest of another program", manifest);
    std::fclose(manifest);
    CHECK(refusal(path).find("'manifest' at offset 0: it does not begin as a manifest of ours") !=
          std::string::npos);
    for (const char* name :
         {"/store/manifest", "/store/00000001.journal", "/store/lock", "/store/reserve", "/file"})
        CHECK(std::remove((root + name).c_str()) == 0);
    CHECK(rmdir(path.c_str()) == 0);
    CHECK(rmdir(root.c_str()) == 0);
}
#endif

// ---- Compaction ----------------------------------------------------------------------------------

namespace {

bool on_disk(const Disk& disk, const std::string& words) {
    for (const auto& [name, file] : disk.names)
        if (file->now.find(words) != std::string::npos) return true;
    return false;
}

}  // namespace

TEST_CASE("store: what was deleted or expired is off the disk within a day") {
    Disk disk;
    FileStoreOptions options = by_hand();
    options.segment_bytes = 2000;
    auto store = *open_on(&disk, options);
    Direct direct{store.get(), store.get()};
    int64_t now = 1000 * hour_ms;
    const auto add = [&](const std::string& id, const std::string& reservation = "") {
        StoredResponse made = record(id, 10, "a", reservation);
        made.request = text("secret " + id + "." + std::string(300, '-'));
        made.created_at_ms = now;
        REQUIRE(direct.add(std::move(made)).ok());
    };
    for (const char* id : {"k1", "k2", "k3", "k4"}) add(id);
    add("deleted", "key");
    add("withdrawn");
    add("expired");
    for (const char* id : {"k5", "k6", "k7", "k8"}) add(id);
    REQUIRE(direct.finish("k2", "answer k2", now).ok());
    REQUIRE(direct.finish("expired", "answer expired", now - 40 * hour_ms).ok());  // dies in 8 h
    REQUIRE(direct.erase("deleted", true, now).ok());
    REQUIRE(direct.erase("withdrawn", false, now).ok());
    CHECK(on_disk(disk, "secret deleted."));
    for (int hour = 0; hour < 24; ++hour) {
        now += hour_ms;
        direct.expire(now);
        if (hour == 14) {  // whatever a restart forgets
            store.reset();
            store = *open_on(&disk, options);
            direct = {store.get(), store.get()};
        }
    }
    for (const char* gone :
         {"secret deleted.", "secret withdrawn.", "secret expired.", "answer expired"})
        CHECK_FALSE(on_disk(disk, gone));
    for (int i = 0; i < 2; ++i) {
        CHECK(direct.ids("a") == "k8 k7 k6 k5 k4 k3 k2 k1");
        CHECK(*store->find("a", "k2")->object == "answer k2");
        CHECK(store->find("a", "k8")->request->substr(0, 10) == "secret k8.");
        CHECK(store->reserved("a", "key")->deleted);
        store.reset();
        store = *open_on(&disk, options);
        direct = {store.get(), store.get()};
    }
}

TEST_CASE("store: the directory stays within bounds while records come and go") {
    Disk disk;
    FileStoreOptions options = by_hand();
    options.segment_bytes = 10'000;
    options.max_bytes = 40'000;
    auto store = *open_on(&disk, options);
    Direct direct{store.get(), store.get()};
    uint64_t most = 0;
    for (int i = 0; i < 600; ++i) {
        const std::string id = "r" + std::to_string(i);
        REQUIRE(direct.add(record(id, 500)).ok());
        REQUIRE(direct.finish(id, std::string(500, 'o'), 1000 + i).ok());
        if (i % 10 == 0) direct.expire(1000 + i);
        most = std::max(most, store->disk_bytes());
    }
    CHECK(most <= 2 * options.max_bytes + 2 * options.segment_bytes);
    CHECK(store->find("a", "r599"));
    const std::string kept = direct.ids("a");
    store.reset();
    store = *open_on(&disk, options);
    direct = {store.get(), store.get()};
    CHECK(direct.ids("a") == kept);
}

// ---- Backups -------------------------------------------------------------------------------------

namespace {

/// Before each file that is opened in it, the store at work does something more.
class BusyFolder : public DiskFolder {
public:
    BusyFolder(Disk* disk, std::function<void()> work) : DiskFolder(disk), work_(std::move(work)) {}
    Result<std::unique_ptr<detail::FolderFile>> open_file(const std::string& name,
                                                          bool create) override {
        work_();
        return DiskFolder::open_file(name, create);
    }

private:
    std::function<void()> work_;
};

}  // namespace

TEST_CASE("store: a copy made beside a store at work has what was there before") {
    int passes = 0;  // of copies, in which a manifest was read again
    for (uint64_t seed = 1; seed <= 200; ++seed) {
        Random random{seed};
        Disk disk, copy;
        FileStoreOptions options = by_hand();
        options.segment_bytes = 2000;
        auto store = *open_on(&disk, options);
        Direct direct{store.get(), store.get()};
        int added = 0, erased = 0;
        const auto id = [](int i) { return "r" + std::to_string(i); };
        const auto work = [&] {
            REQUIRE(direct.add(record(id(added), size_t(random.below(300)))).ok());
            REQUIRE(direct.finish(id(added), std::string(300, 'o'), 1000).ok());
            ++added;
            if (added - erased > 8) REQUIRE(direct.erase(id(erased++), false, 1000).ok());
            if (random.below(4) == 0) direct.expire(1000);  // may compact
        };
        for (int i = 0; i < 40; ++i) work();
        const int before = added;
        int opened = 0;
        BusyFolder from(&disk, [&] {
            ++opened;
            for (uint64_t i = random.below(4); i > 0 && added < before + 60; --i) work();
        });
        DiskFolder to(&copy);
        auto copied = detail::journal_copy(from, to);
        REQUIRE_MESSAGE(copied.ok(), copied.error().message);
        passes += opened > int(copy.names.size()) + 1;
        auto second = open_on(&copy, options);
        REQUIRE_MESSAGE(second.ok(), second.error().message);
        for (int i = erased; i < before; ++i) {
            const auto found = (*second)->find("a", id(i));
            REQUIRE_MESSAGE(found, "seed " << seed << ": r" << i);
            CHECK((found->terminal && *found->object == std::string(300, 'o')));
        }
    }
    CHECK(passes > 20);
}

TEST_CASE("store: a copy that does not fit leaves nothing that looks like one") {
    Disk disk, copy;
    {
        auto store = *open_on(&disk);
        Direct direct{store.get(), store.get()};
        for (int i = 0; i < 10; ++i) REQUIRE(direct.add(record("r" + std::to_string(i), 500)).ok());
    }
    copy.capacity = 3000;
    DiskFolder from(&disk), to(&copy);
    auto copied = detail::journal_copy(from, to);
    REQUIRE_FALSE(copied);
    CHECK(copied.error().kind == ErrorKind::overloaded);
    CHECK(copy.names.empty());
    disk.names["00000001.journal"]->now.resize(10);
    copy.capacity = UINT64_MAX;
    copied = detail::journal_copy(from, to);
    REQUIRE_FALSE(copied);
    CHECK(copied.error().kind == ErrorKind::bad_data);
    CHECK(copied.error().message.find("'00000001.journal'") != std::string::npos);
}

// ---- Files of different moments ------------------------------------------------------------------

namespace {

using Files = std::map<std::string, std::shared_ptr<const std::string>>;  // null: no such file

Files files_of(const Disk& disk) {
    Files files;
    for (const auto& [name, file] : disk.names)
        files[name] = std::make_shared<const std::string>(file->now);
    return files;
}

Disk disk_of(const Files& files) {
    Disk disk;
    for (const auto& [name, bytes] : files) {
        if (!bytes) continue;
        disk.names[name] = std::make_shared<Disk::File>();
        disk.names[name]->now = disk.names[name]->synced = *bytes;
    }
    return disk;
}

/// The life of a store: segments, deletions, records that expire, compactions, restarts; what its
/// files were at ten moments of it, and what it holds in the end.
struct Past {
    FileStoreOptions options = by_hand();
    Disk disk;
    std::vector<Files> moments;
    Files now;
    std::string newest;                          // the name of a file
    std::map<std::string, std::string> objects;  // of responses that are kept; "": none yet
    std::string lines;                           // that were logged

    explicit Past(uint64_t seed) {
        options.segment_bytes = 900;
        options.retention_s = 48 * 3600;
        live(seed);
        for (const auto& [name, bytes] : now)
            if (name.find(".journal") != name.npos) newest = name;
        options.log = {[](void* to, LogLevel, std::string_view line) {
                           *static_cast<std::string*>(to) += std::string(line) + "\n";
                       },
                       &lines};
    }
    void live(uint64_t seed) {
        Random random{seed};
        int64_t time_ms = 1000 * hour_ms;
        std::map<std::string, int64_t> ended_ms;
        auto store = *open_on(&disk, options);
        const int turns = 36 + int(random.below(12));
        for (int i = 0; i < turns; ++i) {
            Direct direct{store.get(), store.get()};
            const std::string id = "r" + std::to_string(i);
            StoredResponse made = record(id, 50 + size_t(random.below(150)), "a",
                                         i % 3 ? "" : "key " + id);
            made.created_at_ms = time_ms;
            REQUIRE(direct.add(made).ok());
            objects[id] = "";
            if (random.below(3)) {
                objects[id] = "object of " + id;
                ended_ms[id] = time_ms;
                REQUIRE(direct.finish(id, objects[id], time_ms).ok());
            }
            if (!random.below(4)) {
                const auto gone = std::next(objects.begin(),
                                            std::ptrdiff_t(random.below(objects.size())));
                REQUIRE(direct.erase(gone->first, random.below(2), time_ms).ok());
                ended_ms.erase(gone->first);
                objects.erase(gone);
            }
            time_ms += int64_t(random.below(uint64_t(4 * hour_ms)));
            store->expire(time_ms);  // a compaction may be half done when the moment is taken
            for (const auto& [known, end_ms] : ended_ms)
                if (end_ms + 48 * hour_ms <= time_ms) objects.erase(known);
            for (uint64_t steps = random.below(4); steps > 0; --steps) store->step();
            if (!random.below(8)) store.reset(), store = *open_on(&disk, options);
            if (i % (turns / 10) == 0 && moments.size() < 10) moments.push_back(files_of(disk));
        }
        if (random.below(2)) store.reset();  // else it was cut off
        now = files_of(disk);
    }
    /// What a response lacks, or "".
    std::string lost(FileStore& store) const {
        for (const auto& [id, object] : objects) {
            const auto found = store.find("a", id);
            if (!found || !found->request || *found->head != "head of " + id) return id;
            if (!object.empty() && !(found->object && *found->object == object)) return id;
            if (found->reservation.empty()) continue;
            const auto held = store.reserved("a", found->reservation);
            if (!held || held->id != id) return id;
        }
        return "";
    }
    /// The versions of each file that are not the one of now.
    std::vector<std::pair<std::string, std::shared_ptr<const std::string>>> changes() const {
        std::vector<std::pair<std::string, std::shared_ptr<const std::string>>> changes;
        std::map<std::string, std::vector<std::string>> seen;  // "" is none
        for (const auto& [name, bytes] : now) seen[name].push_back(*bytes);
        for (const Files& moment : moments)
            for (const auto& [name, bytes] : moment) seen.try_emplace(name, 1, std::string());
        for (const Files& moment : moments)
            for (auto& [name, versions] : seen) {
                const auto found = moment.find(name);
                const auto bytes = found == moment.end() ? nullptr : found->second;
                const std::string text = bytes ? *bytes : "";
                if (std::find(versions.begin(), versions.end(), text) != versions.end()) continue;
                versions.push_back(text);
                changes.emplace_back(name, bytes);
            }
        return changes;
    }
};

/// Opens it with some files changed. The fault, or "".
std::string open_mixed(const Past& past, const Files& files) {
    std::vector<std::string> changed;
    for (const auto& [name, bytes] : files) {
        const auto was = past.now.find(name);
        const auto old = was == past.now.end() ? nullptr : was->second;
        if (old == bytes || (old && bytes && *old == *bytes)) continue;
        changed.push_back(name);
    }
    Disk disk = disk_of(files);
    std::string what;
    for (const std::string& name : changed)
        what += name + (files.at(name) ? "@" + std::to_string(files.at(name)->size()) : "@-") + " ";
    auto store = open_on(&disk, past.options);
    if (!store.ok()) {
        if (disk.operations) return what + "was changed: " + store.error().message;
        for (const std::string& name : changed)
            if (store.error().message.find(name) != std::string::npos) return "";
        return what + "names no such file: " + store.error().message;
    }
    const std::string lost = past.lost(**store);
    // a file that a compaction had removed is no part of the store
    const bool alone = std::all_of(changed.begin(), changed.end(), [&](const std::string& name) {
        return name == past.newest || !past.now.count(name);
    });
    return lost.empty() || alone ? "" : what + "loses " + lost;
}

}  // namespace

TEST_CASE("store: files of different moments lose no record without an error that names one") {
    for (uint64_t seed = 0; seed < 2; ++seed) {
        const Past past(seed);
        REQUIRE(open_mixed(past, past.now) == "");
        const auto changes = past.changes();
        REQUIRE(changes.size() >= 20);
        size_t faults = 0;
        for (size_t one = 0; one < changes.size(); ++one)
            for (size_t two = one; two < changes.size(); ++two) {
                if (!in_sample()) continue;
                Files files = past.now;
                files[changes[one].first] = changes[one].second;
                files[changes[two].first] = changes[two].second;
                const auto newest = files[past.newest];
                for (size_t cut = 0; cut <= 65; ++cut) {  // 65: all of it
                    if (cut < 65 && newest) files[past.newest] = text(newest->substr(0, cut));
                    else files[past.newest] = newest;
                    const std::string fault = open_mixed(past, files);
                    if (!fault.empty() && ++faults < 10)
                        FAIL_CHECK("seed " << seed << ": " << fault);
                }
            }
        CHECK(faults == 0);
    }
}

TEST_CASE("store: recover says what it kept and lost, and loses no file") {
    for (uint64_t seed = 0; seed < 2; ++seed) {
        const Past past(seed);
        FileStoreOptions options = past.options;
        std::string lines;
        options.log.context = &lines;
        auto changes = past.changes();
        for (const size_t cut : {0u, 1u, 31u, 32u, 33u, 40u, 64u})
            changes.emplace_back(past.newest, text(past.now.at(past.newest)->substr(0, cut)));
        for (const auto& change : changes) {
            const auto& name = change.first;  // no binding: Clang 14 lets no lambda look at one
            const auto& bytes = change.second;
            Files files = past.now;
            files[name] = bytes;
            Disk strict = disk_of(files), disk = disk_of(files);
            if (open_on(&strict, past.options).ok()) continue;
            INFO("seed " << seed << ", " << name << "@" << (bytes ? int(bytes->size()) : -1));
            options.recover = true;
            lines.clear();
            auto store = open_on(&disk, options);
            REQUIRE_MESSAGE(store.ok(), store.error().message);
            const std::string lost = past.lost(**store);
            const size_t kept = (*store)->list("a", "", 1000)->size();
            INFO(lines);
            CHECK(lines.find("recovery: " + std::to_string(kept) + " responses are kept") !=
                  lines.npos);
            if (!lost.empty()) CHECK(lines.find("no record is lost") == lines.npos);
            if (lost.empty() && bytes && name == "manifest")
                CHECK(*disk.names.at("manifest.damaged")->now.data() == 'v');
            // what was changed lies beside under another name, byte for byte
            if (bytes && past.now.count(name)) {
                REQUIRE(disk.names.count(name + ".damaged") == 1);
                CHECK(disk.names.at(name + ".damaged")->now == *bytes);
                CHECK(lines.find("it lies beside as '" + name + ".damaged'") != lines.npos);
            }
            store->reset();
            options.recover = false;
            auto again = open_on(&disk, options);
            REQUIRE_MESSAGE(again.ok(), again.error().message);
            CHECK((*again)->list("a", "", 1000)->size() == kept);
        }
    }
}

TEST_CASE("store: recover counts what a damaged segment lost") {
    Disk disk;
    FileStoreOptions options = by_hand();
    options.segment_bytes = 1000;
    std::string lines;
    options.log = {[](void* to, LogLevel, std::string_view line) {
                       *static_cast<std::string*>(to) += std::string(line) + "\n";
                   },
                   &lines};
    {
        auto store = *open_on(&disk, options);
        Direct direct{store.get(), store.get()};
        for (int i = 0; i < 12; ++i) REQUIRE(direct.add(record("r" + std::to_string(i), 200)).ok());
    }
    REQUIRE(disk.names.count("00000003.journal"));
    options.recover = true;
    SUBCASE("one record of it") {
        disk.names["00000001.journal"]->now[400] ^= 1;
        auto store = open_on(&disk, options);
        REQUIRE(store.ok());
        CHECK((*store)->list("a", "", 100)->size() == 11);
        CHECK(lines.find("11 responses are kept, 11 of them unfinished; up to 1 records of the "
                         "journal are lost, sequence numbers 2 to 2") != lines.npos);
    }
    SUBCASE("all of it") {
        disk.names.erase("00000002.journal");
        auto store = open_on(&disk, options);
        REQUIRE(store.ok());
        CHECK(lines.find("'00000002.journal': it is missing") != lines.npos);
        CHECK((*store)->list("a", "", 100)->size() == 8);
        CHECK(lines.find("8 responses are kept") != lines.npos);
        CHECK(lines.find("up to 5 records") != lines.npos);  // one says that another follows
        CHECK(lines.find("sequence numbers 6 to 10") != lines.npos);
    }
    SUBCASE("twice, and each damaged file stays") {
        const std::string first = disk.names["00000001.journal"]->now.replace(40, 4, "????");
        REQUIRE(open_on(&disk, options).ok());
        CHECK(disk.names.at("00000001.journal.damaged")->now == first);
        disk.names["00000001.journal"] = disk.names.at("00000001.journal.damaged");
        REQUIRE(open_on(&disk, options).ok());  // a leftover of a recovery that was cut short
        CHECK(disk.names.count("00000001.journal.damaged.2") == 1);
    }
}

TEST_CASE("store: a manifest of version 1 is read and replaced") {
    const auto put = [](std::string* bytes, auto value) {
        bytes->append(reinterpret_cast<const char*>(&value), sizeof value);
    };
    const Disk made = small_journal();
    const std::string segment = made.names.at(segment_name)->now;
    std::string manifest = "valarman";
    put(&manifest, uint32_t{1});
    manifest += segment.substr(12, 4);  // the salt
    put(&manifest, uint32_t{1});
    put(&manifest, uint32_t{1});
    manifest += segment.substr(20, 8);  // the first sequence
    put(&manifest, uint64_t{0});
    put(&manifest, detail::crc32c(manifest.data(), manifest.size()));
    Disk disk = with_bytes(made, "manifest", manifest);
    disk.names["00000002.journal"] = std::make_shared<Disk::File>();  // begun, and cut off
    disk.names["00000002.journal"]->now = "valarjnl";
    for (int i = 0; i < 2; ++i) {
        auto store = open_on(&disk);
        REQUIRE_MESSAGE(store.ok(), store.error().message);
        CHECK((*store)->list("a", "", 100)->size() == 10);
        CHECK(disk.names.at("manifest")->now[8] == 2);
        CHECK_FALSE(disk.names.count("00000002.journal"));
    }
    disk = with_bytes(made, "manifest", manifest);
    disk.names[segment_name]->now.resize(31);
    auto store = open_on(&disk);
    REQUIRE_FALSE(store.ok());
    CHECK(store.error().message.find(segment_name) != std::string::npos);
}

// ---- Power loss ----------------------------------------------------------------------------------

namespace {

/// A record as its callers know it: what they were told, and what they asked for.
struct Known {
    std::string id, reservation, request, object;
    Answer added, finished, erased;
    bool finish_asked = false, erase_asked = false, tombstone = false;
    int64_t ended_ms = 0;  // or erased
};

/// Life on a disk that loses its power again and again.
class PowerLoss {
public:
    explicit PowerLoss(uint64_t seed) : random_{seed} {
        options_ = by_hand();
        options_.segment_bytes = 4000;
        options_.retention_s = 48 * 3600;
    }
    /// Works until the power goes, and looks at what is left. The fault, or "".
    std::string live_and_crash() {
        disk_.until_crash = int64_t(random_.below(120));
        if (auto store = open_on(&disk_, options_); store.ok()) {
            for (int i = 0; i < 60 && disk_.until_crash > 0; ++i) turn(**store);
            if (random_.below(4)) disk_.until_crash = 0;  // else the close is whole
        }
        disk_ = disk_.after_crash(random_);
        auto store = open_on(&disk_, options_);
        if (!store.ok()) return "does not open: " + store.error().message;
        Direct{store->get(), store->get()}.expire(now_ms_);
        for (auto at = known_.begin(); at != known_.end();) {
            const std::string fault = check(**at, **store);
            if (!fault.empty()) return (*at)->id + " " + fault;
            const bool gone = !(*at)->added.ok() || (*at)->erased.ok();
            if (gone && !random_.below(3)) at = known_.erase(at);
            else ++at;
        }
        return "";
    }

private:
    void turn(FileStore& store) {
        now_ms_ += int64_t(random_.below(uint64_t(3 * hour_ms)));
        for (uint64_t i = random_.below(6); i-- > 0;) change(store);
        if (!random_.below(4)) store.expire(now_ms_);
        for (uint64_t i = 1 + random_.below(3); i-- > 0;) store.step();
    }
    void change(FileStore& store) {
        if (known_.empty() || !random_.below(3)) return add(store);
        Known& one = *known_[size_t(random_.below(known_.size()))];
        if (!one.added.ok() || one.erase_asked) return;
        if (one.finish_asked ? random_.below(4) == 0 : random_.below(8) == 0) {
            one.erase_asked = true;
            one.tombstone = random_.below(2);
            if (!one.finish_asked) one.ended_ms = now_ms_;
            return store.erase("a", one.id, one.tombstone, now_ms_, one.erased.done());
        }
        if (one.finish_asked) return;
        if (!random_.below(3))
            return store.begin(one.id, 1, StoreDone{[](void*, Result<void>) {}, nullptr});
        one.finish_asked = true;
        one.ended_ms = now_ms_;
        one.object = words("object of ", one.id);
        store.finish(one.id, text(one.object), now_ms_, one.finished.done());
    }
    void add(FileStore& store) {
        auto one = std::make_unique<Known>();
        one->id = "r" + std::to_string(++count_);
        if (random_.below(2)) one->reservation = "key " + one->id;
        one->request = words("request of ", one->id);
        StoredResponse made = record(one->id, 0, "a", one->reservation);
        made.created_at_ms = now_ms_;
        made.request = text(one->request);
        store.add(std::move(made), one->added.done());
        known_.push_back(std::move(one));
    }
    std::string words(const char* begin, const std::string& id) {
        return begin + id + std::string(size_t(random_.below(random_.below(4) ? 200 : 2500)), '.');
    }
    /// What nobody was told is settled by what is there.
    std::string check(Known& one, FileStore& store) {
        const auto found = store.find("a", one.id);
        const bool expired = one.ended_ms != 0 && one.ended_ms + 48 * hour_ms <= now_ms_;
        const auto settle = [](Answer& answer, bool done) {
            answer = {};
            if (done) answer.said = "", answer.calls = 1;
        };
        if (!one.added.ok()) {
            if (!found && store.reserved("a", one.reservation)) return "left a reservation";
            settle(one.added, found.has_value());
            if (!found) return "";
        }
        if (!found) {
            if (!one.erased.ok() && !one.erase_asked && !(expired && one.finish_asked))
                return "is lost";
            one.erase_asked = true;
            settle(one.erased, true);
            if (one.reservation.empty()) return "";
            const auto held = store.reserved("a", one.reservation);
            if (one.tombstone && !expired && !(held && held->deleted)) return "has no tombstone";
            if (expired && held) return "keeps its reservation";
            return "";
        }
        if (one.erased.ok()) return "came back";
        if (expired && one.finished.ok()) return "did not expire";
        one.erase_asked = false;
        settle(one.erased, false);
        if (*found->request != one.request) return "has another request";
        if (*found->head != "head of " + one.id) return "has another head";
        const auto held = store.reserved("a", one.reservation);
        if (!one.reservation.empty() && !(held && held->id == one.id))
            return "lost its reservation";
        if (found->terminal && (!one.finish_asked || *found->object != one.object))
            return "has another object";
        if (found->terminal && found->ended_at_ms != one.ended_ms) return "ended at another time";
        if (!found->terminal && one.finished.ok()) return "lost its object";
        one.finish_asked = found->terminal;
        if (!found->terminal) one.ended_ms = 0;
        settle(one.finished, found->terminal);
        return "";
    }

    Random random_;
    Disk disk_;
    FileStoreOptions options_;
    int64_t now_ms_ = 1000 * hour_ms;
    int count_ = 0;
    std::vector<std::unique_ptr<Known>> known_;
};

}  // namespace

TEST_CASE("store: whatever the power leaves of unsynced writes, what was acknowledged is there") {
    const char* asked = std::getenv("VALAR_CRASH_POINTS");
    const int points = asked ? std::atoi(asked) : 500, lives = 5;
    for (int seed = 0; seed < points / lives; ++seed) {
        PowerLoss world{uint64_t(seed)};
        for (int life = 0; life < lives; ++life) {
            const std::string fault = world.live_and_crash();
            REQUIRE_MESSAGE(fault == "", "seed " << seed << ", life " << life << ": " << fault);
        }
    }
}

// ---- Clocks --------------------------------------------------------------------------------------

namespace {

constexpr int64_t year_s = 365 * 24 * 3600;

/// A machine whose calendar is set, and which is killed, closed in order and started again.
class ClockWalk {
public:
    explicit ClockWalk(uint64_t seed) : random_{seed} {
        wall_clock_shift_s = step_s();
        options_ = by_hand();
        options_.retention_s = 48 * 3600;
        options_.segment_bytes = 3000;
        open();
    }
    ~ClockWalk() { wall_clock_shift_s = 0; }

    /// The fault, or "".
    std::string take_step() {
        switch (random_.below(6)) {
            case 0:
            case 1: work(); break;
            case 2: wall_clock_shift_s = wall_clock_shift_s + step_s(); break;
            case 3: restart(); break;
            default: pass(int64_t(random_.below(8))); break;
        }
        return check();
    }
    /// Everything ends and ages: nothing may be left.
    std::string wait_for_all() {
        for (Known& one : known_)
            if (one.ended_ms < 0) finish(one);
        pass(48 + 3 * int64_t(restarts_));
        return known_.empty() || store_->bytes() == 0 ? "" : "something never expires";
    }

private:
    struct Known {
        std::string id;
        int64_t ended_ms = -1, up_ms = 0;  // in truth, and while the machine ran
        int restarts = 0;
    };
    int64_t step_s() { return int64_t(random_.below(60 * uint64_t(year_s))) - 30 * year_s; }
    void open() {
        auto opened = open_on(&disk_, options_);
        REQUIRE_MESSAGE(opened.ok(), opened.error().message);
        store_ = std::move(*opened);
    }
    Direct direct() { return {store_.get(), store_.get()}; }
    void work() {
        const std::string id = "r" + std::to_string(++count_);
        StoredResponse made = record(id, 100, "a", "key " + id);
        made.created_at_ms = store_->now_ms();
        REQUIRE(direct().add(std::move(made)).ok());
        known_.push_back({id});
        Known& one = known_[size_t(random_.below(known_.size()))];
        if (one.ended_ms < 0) finish(one);
    }
    void finish(Known& one) {
        REQUIRE(direct().finish(one.id, "done", store_->now_ms()).ok());
        one.ended_ms = true_ms_;
        one.up_ms = up_ms_;
        one.restarts = restarts_;
    }
    void restart() {
        if (random_.below(2)) store_.reset();
        else disk_.until_crash = 0;
        store_.reset();
        disk_.until_crash = -1;
        disk_ = disk_.after_crash(random_);
        wall_clock_shift_s = wall_clock_shift_s + (random_.below(2) ? step_s() : 0);
        const int64_t off_ms = int64_t(random_.below(uint64_t(10 * hour_ms)));
        true_ms_ += off_ms;
        if (random_.below(2)) {  // the machine ran meanwhile
            disk_.clock_ns += uint64_t(off_ms) * 1'000'000;
            up_ms_ += off_ms;
        } else {
            disk_.boot = "boot " + std::to_string(++restarts_);
            disk_.clock_ns = random_.below(2) ? 1'000'000'000 : UINT64_MAX / 4;
        }
        open();
    }
    void pass(int64_t hours) {
        for (; hours >= 0; --hours) {
            direct().expire(store_->now_ms());
            if (hours == 0) return;
            true_ms_ += hour_ms;
            up_ms_ += hour_ms;
            disk_.clock_ns += uint64_t(hour_ms) * 1'000'000;
        }
    }
    std::string check() {
        direct().expire(store_->now_ms());
        for (size_t i = known_.size(); i-- > 0;) {
            const Known& one = known_[i];
            const bool ended = one.ended_ms >= 0;
            const auto found = store_->find("a", one.id);
            if (!found && (!ended || true_ms_ - one.ended_ms < 48 * hour_ms))
                return one.id + " is lost";
            const auto again = direct().add(record("again", 1, "a", "key " + one.id));
            if (found && !again.is(ErrorKind::conflict)) return one.id + " would run twice";
            if (again.ok()) REQUIRE(direct().erase("again", false, store_->now_ms()).ok());
            const int64_t most_ms = 48 * hour_ms + (restarts_ - one.restarts) * 2 * hour_ms;
            if (found && ended && up_ms_ - one.up_ms > most_ms) return one.id + " does not expire";
            if (!found) known_.erase(known_.begin() + std::ptrdiff_t(i));
        }
        return "";
    }

    Random random_;
    Disk disk_;
    FileStoreOptions options_;
    std::unique_ptr<FileStore> store_;
    std::vector<Known> known_;
    int64_t true_ms_ = 0, up_ms_ = 0;
    int count_ = 0, restarts_ = 0;
};

}  // namespace

TEST_CASE("store: whoever sets the calendar, ages are what they are") {
    for (int seed = 0; seed < 1000; ++seed) {
        if (!in_sample()) continue;
        ClockWalk walk{uint64_t(seed)};
        for (int step = 0; step < 25; ++step) {
            const std::string fault = walk.take_step();
            REQUIRE_MESSAGE(fault == "", "seed " << seed << ", step " << step << ": " << fault);
        }
        REQUIRE_MESSAGE(walk.wait_for_all() == "", "seed " << seed);
    }
}

TEST_CASE("store: its time goes on with the machine's clock, and stands still without power") {
    Disk disk;
    wall_clock_shift_s = 30 * year_s;
    auto store = *open_on(&disk);
    const int64_t begin = store->now_ms();
    Direct direct{store.get(), store.get()};
    REQUIRE(direct.add(record("r1", 10)).ok());
    REQUIRE(direct.finish("r1", "done", begin).ok());
    const auto reopen_after = [&](uint64_t clock_ns, const char* boot) {
        store.reset();
        disk.clock_ns = clock_ns;
        disk.boot = boot;
        store = *open_on(&disk);
        return store->now_ms() - begin;
    };
    constexpr uint64_t second = 1'000'000'000;
    disk.clock_ns += 5 * second;
    wall_clock_shift_s = -60 * year_s;
    CHECK(store->now_ms() - begin == 5000);
    CHECK(reopen_after(6 * second, "first") == 5000);
    CHECK(reopen_after(13 * second, "first") == 12'000);
    CHECK(reopen_after(900'000 * second, "second") == 12'000);  // or on another machine
    CHECK(reopen_after(900'007 * second, "") == 12'000);        // unknown to the system
    disk.clock_ns += 7 * second;
    wall_clock_shift_s = 0;
    CHECK(store->now_ms() - begin == 19'000);
    CHECK(reopen_after(900'020 * second, "") == 19'000);
}

TEST_CASE("store: retention that is too long to count, or negative") {
    for (const int64_t retention_s : {INT64_MAX, INT64_MAX / 1000 + 1, int64_t{-1}, INT64_MIN}) {
        MemoryStore store({1 << 20, retention_s});
        Direct direct{&store};
        REQUIRE(direct.add(record("r1", 10)).ok());
        REQUIRE(direct.finish("r1", "done", 1000).ok());
        direct.expire(2000);
        CHECK(store.find("a", "r1").has_value() == (retention_s > 0));
    }
}
