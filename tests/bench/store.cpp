// How fast a FileStore acknowledges with many waiting at once, beside what the disk can sync.
//   c++ -std=c++20 -O2 -I. tests/bench/store.cpp -o bench_store -pthread
//   bench_store DIR [WAITERS [RECORDS]]
#define VALAR_IMPLEMENTATION
#include "valar.hpp"

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

using namespace valar;

namespace {

double seconds() { return static_cast<double>(detail::monotonic_ns()) / 1e9; }

/// Syncs of 1 KB appended, one after another.
double sync_rate(const std::string& path) {
    auto folder = detail::Folder::open(path);
    if (!folder) return 0;
    auto file = (*folder)->open_file("probe", true);
    if (!file) return 0;
    const std::string bytes(1024, 'x');
    const double begin = seconds();
    uint64_t count = 0;
    for (; seconds() - begin < 2; ++count)
        if (!(*file)->write_at(count * 1024, bytes) || !(*file)->sync()) return 0;
    const double rate = static_cast<double>(count) / (seconds() - begin);
    (void)(*folder)->remove("probe").ok();
    return rate;
}

/// Completions, handed from the store's thread to the one that asks, as a server's loop has them.
struct Inbox {
    std::mutex mutex;
    std::condition_variable filled;
    std::vector<int> told;
    int failed = 0;
};

struct Waiter {
    Inbox* inbox = nullptr;
    int index = 0;
    int record = 0;
    bool added = false;
    StoreDone done() {
        return {[](void* context, Result<void> result) {
                    auto& self = *static_cast<Waiter*>(context);
                    const std::lock_guard<std::mutex> lock(self.inbox->mutex);
                    self.inbox->told.push_back(self.index);
                    self.inbox->failed += !result;
                    self.inbox->filled.notify_one();
                },
                this};
    }
};

}  // namespace

int main(int argc, char** argv) {
    const std::string path = argc > 1 ? argv[1] : ".";
    const int waiters = argc > 2 ? std::atoi(argv[2]) : 64;
    const int records = argc > 3 ? std::atoi(argv[3]) : 10'000;
    const double syncs = sync_rate(path + "/probe");
    FileStoreOptions options;
    options.path = path + "/store";
    auto store = FileStore::open(options);
    if (!store) return std::fprintf(stderr, "%s\n", store.error().message.c_str()), 1;
    const auto head = std::make_shared<const std::string>(120, 'h');
    const auto request = std::make_shared<const std::string>(200, 'r');
    const auto object = std::make_shared<const std::string>(1100, 'o');

    Inbox inbox;
    std::vector<Waiter> all(static_cast<size_t>(waiters));
    int next = 0, pending = 0;
    const auto go_on = [&](Waiter& one) {
        const auto id = [](int record) { return detail::format("resp_%024d", record); };
        if (one.added) {
            one.added = false;
            return (*store)->finish(id(one.record), object, detail::unix_time_ms(), one.done());
        }
        if (next == records) return void(--pending);
        one.record = next++;
        one.added = true;
        StoredResponse made;
        made.id = id(one.record);
        made.organisation = "default";
        made.background = true;
        made.created_at_ms = detail::unix_time_ms();
        made.head = head;
        made.request = request;
        (*store)->add(std::move(made), one.done());
    };
    const double begin = seconds();
    for (int i = 0; i < waiters; ++i) {
        Waiter& one = all[static_cast<size_t>(i)];
        one.inbox = &inbox;
        one.index = i;
        ++pending;
        go_on(one);
    }
    while (pending > 0) {
        std::vector<int> told;
        {
            std::unique_lock<std::mutex> lock(inbox.mutex);
            inbox.filled.wait(lock, [&] { return !inbox.told.empty(); });
            told.swap(inbox.told);
        }
        for (const int index : told) go_on(all[static_cast<size_t>(index)]);
    }
    const double spent = seconds() - begin;
    const double payload = records * double(head->size() + request->size() + object->size());
    std::printf(
        "%d waiters: %.0f changes/s acknowledged (%.0f responses/s), %d refused; disk %.0f "
        "syncs/s; journal %.3f x payload\n",
        waiters, 2 * records / spent, records / spent, inbox.failed, syncs,
        static_cast<double>((*store)->disk_bytes()) / payload);
    const double reopen = seconds();
    store->reset();
    store = FileStore::open(options);
    if (!store) return std::fprintf(stderr, "%s\n", store.error().message.c_str()), 1;
    std::printf("opened %.1f MB again in %.0f ms\n",
                static_cast<double>((*store)->disk_bytes()) / 1e6, (seconds() - reopen) * 1e3);
    return inbox.failed != 0;
}
