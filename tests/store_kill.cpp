// A process that is made to be killed (store_kill.py): it checks that a journal holds what earlier
// ones were told is kept, then works on it and writes down what it is told until the kill comes.
//
//     store_kill DIR LOG ROUND    checks, prints "ready", works for ever; an hour passes a round
//     store_kill DIR LOG ROUND check
//     store_kill DIR fill         fills a small disk: changes fail, reads go on, room heals it
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <thread>

#include "base/internal.hpp"
#include "store/store.hpp"

using namespace valar;

namespace {

constexpr int64_t hour_ms = 3'600'000, keep_hours = 48;

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "store_kill: %s\n", message.c_str());
    std::exit(1);
}

struct Known {
    bool added = false, finished = false, erase_asked = false, erased = false;
    int64_t finish_round = -1;  // in which it was asked for
};

StoredResponse make(const std::string& id) {
    StoredResponse record;
    record.id = id;
    record.organisation = "a";
    record.reservation = "key " + id;
    record.fingerprint = "print";
    record.head = std::make_shared<const std::string>("head " + id);
    record.request = std::make_shared<const std::string>("request " + id + std::string(300, '.'));
    return record;
}

/// Lines "A ID ROUND": it was asked to add ID; "a ID ROUND": it was told that this is kept. So, too,
/// for finish and erase.
std::map<std::string, Known> read_log(const char* path) {
    std::map<std::string, Known> known;
    std::ifstream log(path);
    for (std::string line; std::getline(log, line) && !log.eof();) {  // the last may be cut
        const size_t space = line.find(' ', 2);
        if (space == line.npos) continue;
        Known& one = known[line.substr(2, space - 2)];
        const int64_t round = std::atoll(line.c_str() + space);
        if (line[0] == 'F') one.finish_round = round;
        if (line[0] == 'f') one.finished = true;
        if (line[0] == 'a') one.added = true;
        if (line[0] == 'E') one.erase_asked = true;
        if (line[0] == 'e') one.erased = true;
    }
    return known;
}

void check(FileStore& store, const std::map<std::string, Known>& known, int64_t round) {
    for (const auto& [id, one] : known) {
        const auto found = store.find("a", id);
        const bool old = one.finish_round >= 0 && one.finish_round + keep_hours <= round;
        const bool expired = one.finished && old;
        if (one.erased || expired) {
            if (found) fail(id + " came back");
            if (expired && store.reserved("a", "key " + id)) fail(id + " keeps its reservation");
            continue;
        }
        if (!found && (!one.added || old || one.erase_asked)) continue;
        if (!found) fail(id + " is lost");
        if (*found->request != *make(id).request) fail(id + " has another request");
        if (one.finished && (!found->object || *found->object != "object " + id))
            fail(id + " has another object");
    }
}

void wait_for(const std::atomic<bool>& flag) {
    while (!flag) std::this_thread::sleep_for(std::chrono::microseconds(50));
}

struct Worker {
    FileStore* store;
    std::FILE* log;
    std::string id;
    char step = 'a';
    bool erase = false;
    int64_t round = 0;
    std::atomic<bool> over = false;

    void next() {
        const StoreDone done{[](void* self, Result<void> result) {
                                 static_cast<Worker*>(self)->told(std::move(result));
                             },
                             this};
        write_down(static_cast<char>(step + 'A' - 'a'));
        if (step == 'a') return store->add(make(id), done);
        if (step == 'f')
            return store->finish(id, std::make_shared<const std::string>("object " + id),
                                 round * hour_ms, done);
        store->erase("a", id, true, round * hour_ms, done);
    }
    void write_down(char what) {
        std::fprintf(log, "%c %s %lld\n", what, id.c_str(), static_cast<long long>(round));
        std::fflush(log);
    }
    void told(Result<void> result) {
        if (!result) fail(result.error().message);
        write_down(step);
        const char* steps = erase ? "afe" : "af";
        const char* now = std::strchr(steps, step);
        step = now[1];
        if (step) next();
        else over = true;
    }
};

int work(const char* folder, const char* log_path, int64_t round, bool only_check) {
    FileStoreOptions options;
    options.path = folder;
    options.segment_bytes = 64 << 10;
    options.retention_s = keep_hours * 3600;
    options.log = {[](void*, LogLevel level, std::string_view line) {
                       if (level == LogLevel::error) fail(std::string(line));
                   },
                   nullptr};
    auto store = FileStore::open(options);
    if (!store) fail(store.error().message);
    store.value()->expire(round * hour_ms);
    const auto known = read_log(log_path);
    std::atomic<bool> expired = false;  // a change behind it is done after it
    const auto set = [](void* flag, Result<void>) {
        *static_cast<std::atomic<bool>*>(flag) = true;
    };
    store.value()->begin("none", 0, {set, &expired});
    wait_for(expired);
    check(**store, known, round);
    if (only_check) return 0;
    std::FILE* log = std::fopen(log_path, "ab");
    if (!log) fail("cannot write the log");
    std::puts("ready");
    std::fflush(stdout);
    constexpr int together = 16, batches = 40;
    for (int batch = 0; batch < batches; ++batch) {
        Worker workers[together];
        for (int i = 0; i < together; ++i) {
            Worker& one = workers[i];
            one.store = store.value().get();
            one.log = log;
            one.round = round;
            one.erase = i % 4 == 0;
            one.id = std::to_string(round) + "." + std::to_string(batch) + "." + std::to_string(i);
            one.next();
        }
        for (Worker& one : workers) wait_for(one.over);
    }
    for (;;) std::this_thread::sleep_for(std::chrono::seconds(1));
}

/// Changes one after another until one is refused; how many were kept.
int fill_up(FileStore& store, int* next) {
    for (int kept = 0;; ++kept) {
        struct Told {
            std::atomic<bool> done = false;
            Result<void> result;
        } told;
        StoredResponse record = make(std::to_string(*next));
        store.add(std::move(record), {[](void* context, Result<void> result) {
                                          Told& self = *static_cast<Told*>(context);
                                          self.result = std::move(result);
                                          self.done = true;
                                      },
                                      &told});
        wait_for(told.done);
        if (!told.result) {
            if (told.result.error().kind != ErrorKind::overloaded)
                fail(told.result.error().message);
            return kept;
        }
        ++*next;
        if (kept > 100'000) fail("the disk has no end");
    }
}

int fill(const char* folder) {
    const std::string ballast = std::string(folder) + "/ballast";
    {
        std::ofstream file(ballast, std::ios::binary);
        file << std::string(200'000, 'b');
    }
    FileStoreOptions options;
    options.path = std::string(folder) + "/store";
    auto store = FileStore::open(options);
    if (!store) fail(store.error().message);
    int next = 0;
    const int first = fill_up(**store, &next);
    if (!store.value()->failure()) fail("a full disk is no failure");
    std::remove(ballast.c_str());
    for (int i = 0; store.value()->failure(); ++i) {
        if (i > 200) fail("room is not seen");
        store.value()->expire(store.value()->now_ms());
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    const int second = fill_up(**store, &next);
    if (first < 100 || second < 100) fail("room was not used");
    store.value().reset();
    store = FileStore::open(options);
    if (!store) fail(store.error().message);
    for (int i = 0; i < next; ++i)
        if (!store.value()->find("a", std::to_string(i))) fail(std::to_string(i) + " is lost");
    if (store.value()->find("a", std::to_string(next))) fail("a refused record is there");
    std::printf("%d records, then %d more once there was room\n", first, second);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 3 && !std::strcmp(argv[2], "fill")) return fill(argv[1]);
    if (argc < 4) fail("arguments: DIR LOG ROUND [check], or DIR fill");
    return work(argv[1], argv[2], std::atoll(argv[3]), argc > 4);
}
