#include <doctest/doctest.h>
#include <cstring>

#include "base/internal.hpp"
#include "base/sockets.hpp"
#include "host.hpp"

#include <cstdio>
#include <filesystem>
#if defined(__linux__)
#include <pthread.h>
#endif
#include <string>
#include <utility>
#include <vector>

#if !defined(_WIN32)
#include "base/system.hpp"
#endif

using namespace valar;
using namespace valar::detail;

namespace {
// A name in the build folder that no other test uses at the same time.
std::string fresh_path(const char* name) {
    return format("%s.%llx", name, static_cast<unsigned long long>(monotonic_ns()));
}

std::span<const std::byte> bytes_of(std::string_view text) {
    return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}
}  // namespace

TEST_CASE("base: Result holds a value or an error through copies and moves") {
    Result<std::string> good = std::string(100, 'x');
    REQUIRE(good);
    Result<std::string> copy = good;
    Result<std::string> moved = std::move(good);
    CHECK(*copy == *moved);
    copy = make_error(ErrorKind::timeout, "late", "code", "a.b");
    REQUIRE(!copy.ok());
    CHECK(copy.error().kind == ErrorKind::timeout);
    CHECK(copy.error().param == "a.b");
    Result<std::string> bad = copy;
    CHECK(bad.error().message == "late");
    bad = std::move(moved);
    CHECK(bad->size() == 100);
    Result<void> nothing;
    CHECK(nothing.ok());
    nothing = make_error(ErrorKind::io, "no");
    CHECK(nothing.error().code.empty());
}

TEST_CASE("base: format of short and long texts") {
    CHECK(format("%d-%s", 7, "x") == "7-x");
    const std::string long_text(5000, 'y');
    CHECK(format("%s!", long_text.c_str()) == long_text + "!");
    CHECK(format("%s", std::string(255, 'z').c_str()).size() == 255);
    CHECK(format("%s", std::string(256, 'z').c_str()).size() == 256);
}

TEST_CASE("base: products and sums that wrap are refused") {
    uint64_t out = 0;
    CHECK(!mul_overflows(UINT64_MAX, 1, &out));
    CHECK(out == UINT64_MAX);
    CHECK(!mul_overflows(0, UINT64_MAX, &out));
    CHECK(mul_overflows(uint64_t(1) << 32, uint64_t(1) << 32, &out));
    CHECK(!add_overflows(UINT64_MAX - 1, 1, &out));
    CHECK(add_overflows(UINT64_MAX, 1, &out));
}

TEST_CASE("base: clocks") {
    const uint64_t before = monotonic_ns();
    const uint64_t cpu = thread_cpu_ns();
    volatile unsigned sum = 0;
    while (thread_cpu_ns() - cpu < 1'000'000 && monotonic_ns() - before < 5'000'000'000u)
        for (unsigned i = 0; i < 10000; ++i) sum = sum + i;
    CHECK(thread_cpu_ns() > cpu);
    CHECK(monotonic_ns() > before);
    CHECK(unix_time_ms() > 1'700'000'000'000);
}

TEST_CASE("base: buffers are aligned, zeroed and refused when impossible") {
    for (const uint64_t size : {uint64_t(1), uint64_t(1000), uint64_t(3) << 20}) {
        auto buffer = Buffer::allocate(size, "a test");
        REQUIRE(buffer);
        CHECK(buffer->size() == size);
        CHECK(reinterpret_cast<uintptr_t>(buffer->data()) % 64 == 0);
        size_t not_zero = 0;
        for (size_t i = 0; i < size; ++i) not_zero += buffer->as<uint8_t>()[i] != 0;
        CHECK(not_zero == 0);
        Buffer other = std::move(*buffer);
        CHECK(other.size() == size);
        CHECK(buffer->data() == nullptr);
        Buffer third;
        third = std::move(other);
        CHECK(third.size() == size);
    }
    CHECK(Buffer::allocate(0, "nothing")->data() == nullptr);
    const auto refused = Buffer::allocate(UINT64_MAX, "the moon");
    REQUIRE(!refused);
    CHECK(refused.error().kind == ErrorKind::out_of_memory);
    CHECK(refused.error().message.find("the moon") != std::string::npos);
}

TEST_CASE("base: files are written whole, read with a limit and mapped") {
    const std::string path = fresh_path("base_test_\xc3\xa9");
    REQUIRE(write_file(path, bytes_of("first")));
    const std::string text(200'000, 'q');
    REQUIRE(write_file(path, bytes_of(text)));
    CHECK(*read_file(path, 200'000) == text);
    const auto limited = read_file(path, 199'999);
    REQUIRE(!limited);
    CHECK(limited.error().kind == ErrorKind::too_large);
    {
        auto mapped = MappedFile::open(path);
        REQUIRE(mapped);
        MappedFile file = std::move(*mapped);
        CHECK(mapped->bytes().empty());
        REQUIRE(file.bytes().size() == text.size());
        CHECK(file.bytes()[text.size() - 1] == std::byte('q'));
        file.release(0, file.bytes().size());
        file.release(5000, 100'000);
        file.release(SIZE_MAX, 2);  // out of range: nothing happens
        CHECK(std::memcmp(file.bytes().data(), text.data(), text.size()) == 0);
    }
    REQUIRE(write_file(path, {}));
    CHECK(MappedFile::open(path)->bytes().empty());
    CHECK(read_file(path, 0)->empty());
#if !defined(_WIN32)  // whose C library does not take UTF-8
    CHECK(std::remove(path.c_str()) == 0);
#endif
}

TEST_CASE("base: file errors name the file and the cause") {
    const auto missing = MappedFile::open("no_such_folder/file.gguf");
    REQUIRE(!missing);
    CHECK(missing.error().kind == ErrorKind::not_found);
    CHECK(missing.error().message.find("no_such_folder/file.gguf") != std::string::npos);
    CHECK(read_file("no_such_folder/file.gguf", 9).error().kind == ErrorKind::not_found);
    CHECK(write_file("no_such_folder/file.gguf", {}).error().kind == ErrorKind::not_found);
    CHECK(MappedFile::open("").error().kind == ErrorKind::invalid_request);
    CHECK(read_file(std::string("a\0b", 3), 9).error().kind == ErrorKind::invalid_request);
    CHECK(!MappedFile::open("."));
    CHECK(!read_file(".", 9));
}

namespace {
struct Meeting {
    std::atomic<uint32_t> word{0};
    std::atomic<uint32_t> woken{0};
};

void sleep_on_word(void* context) {
    auto& meeting = *static_cast<Meeting*>(context);
    while (meeting.word.load() == 0) wait_on(&meeting.word, 0, 10'000'000'000u);
    meeting.woken.fetch_add(1);
}
}  // namespace

TEST_CASE("base: threads start, sleep on a word, wake and join") {
    Meeting meeting;
    {
        Thread threads[3];
        for (Thread& thread : threads) {
            auto started = Thread::start(sleep_on_word, &meeting, "a name that is much too long");
            REQUIRE(started);
            thread = std::move(*started);
            CHECK(thread.joinable());
        }
        CHECK(meeting.woken.load() == 0);
        meeting.word.store(1);
        wake(&meeting.word);
        threads[0].join();
        CHECK(!threads[0].joinable());
    }
    CHECK(meeting.woken.load() == 3);
}

TEST_CASE("base: a wait ends at once for another value, and by its time") {
    std::atomic<uint32_t> word{5};
    const uint64_t start = monotonic_ns();
    wait_on(&word, 4, 60'000'000'000u);
    wait_on(&word, 5, 1'000'000);
    CHECK(monotonic_ns() - start < 30'000'000'000u);
    valar::detail::pause();
}

TEST_CASE("base: sort_items keeps the order of equals and what lies outside its range") {
    struct Named {
        std::string name;
        std::unique_ptr<int> place;  // an item that only moves
    };
    std::vector<Named> items;
    const std::string names = "zcabcabA";
    for (size_t i = 0; i < names.size(); ++i)
        items.push_back({std::string(30, names[i]), std::make_unique<int>(int(i))});
    const auto less = [](const Named& a, const Named& b) { return a.name < b.name; };
    const auto places = [&] {
        std::string text;
        for (const Named& item : items) text += std::to_string(*item.place);
        return text;
    };
    sort_items(items, less, 1, 7);
    CHECK(places() == "02536147");
    CHECK(items[1].name == std::string(30, 'a'));
    sort_items(items, less, 8, 8);
    CHECK(places() == "02536147");
    sort_items(items, less);
    CHECK(places() == "72536140");
    std::vector<Named> none;
    sort_items(none, less);
    CHECK(none.empty());
}

#if !defined(_WIN32)
TEST_CASE("base: signals that interrupt system calls") {
    const Interrupts interrupts;
    const std::string path = fresh_path("interrupted"), folder = fresh_path("interrupted.folder");
    const std::string text(3 << 20, 'x');
    for (int round = 0; round < 5; ++round) {
        REQUIRE(write_file(path, bytes_of(text)).ok());
        auto read = read_file(path, text.size());
        REQUIRE(read.ok());
        CHECK(*read == text);
        auto opened = Folder::open(folder);
        REQUIRE(opened.ok());
        auto file = (*opened)->open_file("a", true);
        REQUIRE(file.ok());
        CHECK((*file)->write_at(0, text).ok());
        CHECK((*file)->sync().ok());
        CHECK((*file)->truncate(5).ok());
        CHECK((*opened)->rename("a", "b").ok());
        CHECK((*opened)->sync().ok());
        auto left = (*opened)->list();
        REQUIRE(left.ok());
        CHECK((*opened)->remove("b").ok());
    }
    std::filesystem::remove(path);
    std::filesystem::remove_all(folder);
}
#endif

#if defined(__linux__)
namespace {

size_t stack_bytes() {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    size_t bytes = 0;
    pthread_attr_getstacksize(&attributes, &bytes);
    pthread_attr_destroy(&attributes);
    return bytes;
}

}  // namespace

TEST_CASE("base: threads have the same stack wherever they run") {
    size_t bytes = 0;
    auto thread = Thread::start(
        [](void* context) { *static_cast<size_t*>(context) = stack_bytes(); }, &bytes, "stack");
    REQUIRE(thread);
    thread->join();
    CHECK(bytes == 1 << 20);
}

namespace {

// A tree with the files of /proc and /sys that limits are read from.
struct LimitTree {
    std::string root = fresh_path("limits");
    explicit LimitTree(const std::vector<std::pair<std::string, std::string>>& files) {
        for (const auto& [name, text] : files) {
            for (size_t at = name.find('/', 1); at != std::string::npos;
                 at = name.find('/', at + 1))
                make(root + name.substr(0, at));
            REQUIRE(write_file(root + name, bytes_of(text)).ok());
        }
    }
    ~LimitTree() { std::filesystem::remove_all(root); }
    static void make(const std::string& path) { std::filesystem::create_directories(path); }
};

}  // namespace

TEST_CASE("base: limits of control groups, in the layouts of containers") {
    const std::string v1 =
        "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
        "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:5 - cgroup cgroup "
        "rw,cpuacct,cpu\n"
        "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n";
    const std::string v2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";
    const std::string cpu = "/sys/fs/cgroup/cpu,cpuacct", memory = "/sys/fs/cgroup/memory",
                      unified = "/sys/fs/cgroup", none = "9223372036854771712\n";
    const struct {
        const char* name;
        std::string groups, mounts;
        std::vector<std::pair<std::string, std::string>> files;
        int cores;  // of 8
        uint64_t memory;
    } layouts[] = {
        {"no control groups", "", "", {}, 8, UINT64_MAX},
        {"v1: no limits",
         "4:memory:/\n3:cpu,cpuacct:/\n",
         v1,
         {{cpu + "/cpu.cfs_quota_us", "-1\n"},
          {cpu + "/cpu.cfs_period_us", "100000\n"},
          {memory + "/memory.limit_in_bytes", none}},
         8,
         9223372036854771712u},
        {"v1: 150 % of a CPU, 512 MiB",
         "4:memory:/docker/1f\n3:cpu,cpuacct:/docker/1f\n",
         v1,
         {{cpu + "/docker/1f/cpu.cfs_quota_us", "150000\n"},
          {cpu + "/docker/1f/cpu.cfs_period_us", "100000\n"},
          {memory + "/docker/1f/memory.limit_in_bytes", "536870912\n"}},
         1,
         536870912},
        {"v1: bind mounts of the container's own group",
         "4:memory:/docker/1f\n3:cpuacct,cpu:/docker/1f\n",
         "32 31 0:29 /docker/1f /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
         "35 31 0:32 /docker/1f /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
         {{cpu + "/cpu.cfs_quota_us", "350000\n"},
          {cpu + "/cpu.cfs_period_us", "100000\n"},
          {memory + "/memory.limit_in_bytes", "1073741824"}},
         3,
         1073741824},
        {"v1: the path is not below what is mounted",
         "3:cpu,cpuacct:/docker/1f/inner\n",
         "32 31 0:29 /other /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n",
         {{cpu + "/cpu.cfs_quota_us", "200000\n"}, {cpu + "/cpu.cfs_period_us", "100000\n"}},
         2,
         UINT64_MAX},
        {"v2 with a namespace of its own",
         "0::/\n",
         v2,
         {{unified + "/cpu.max", "250000 100000\n"},
          {unified + "/memory.max", "max\n"},
          {unified + "/memory.high", "268435456\n"}},
         2,
         268435456},
        {"v2: a pod in a slice; an ancestor's limit is the least",
         "0::/kubepods.slice/pod7.slice/cri-1f.scope\n",
         v2,
         {{unified + "/kubepods.slice/cpu.max", "700000 100000\n"},
          {unified + "/kubepods.slice/memory.max", "8589934592\n"},
          {unified + "/kubepods.slice/pod7.slice/cpu.max", "200000 50000\n"},
          {unified + "/kubepods.slice/pod7.slice/memory.max", "1073741824\n"},
          {unified + "/kubepods.slice/pod7.slice/cri-1f.scope/cpu.max", "max 100000\n"},
          {unified + "/kubepods.slice/pod7.slice/cri-1f.scope/memory.max", "2147483648\n"}},
         4,
         1073741824},
        {"v2: a group outside the namespace",
         "0::/../../other\n",
         v2,
         {{unified + "/cpu.max", "100000 100000\n"}, {"/other/cpu.max", "1 100000\n"}},
         1,
         UINT64_MAX},
        {"hybrid: v1's cpu, v2's memory, spaces in a path",
         "3:cpu:/a b\n0::/user.slice\n1:name=systemd:/\nnonsense\n\n",
         "32 31 0:29 / /sys/fs/cgroup/c\\040p rw - cgroup cgroup rw,cpu\n"
         "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\nshort\n - \n",
         {{"/sys/fs/cgroup/c p/a b/cpu.cfs_quota_us", "99999"},
          {"/sys/fs/cgroup/c p/a b/cpu.cfs_period_us", "100000"},
          {"/sys/fs/cgroup/unified/user.slice/memory.max", "1000000\n"}},
         1,
         1000000},
        {"v2: numbers that are none",
         "0::/a/b/c/d\n",
         v2,
         {{unified + "/cpu.max", "100000 0\n"},
          {unified + "/memory.max", "99999999999999999999999\n"},
          {unified + "/a/cpu.max", ""},
          {unified + "/a/memory.max", "-1"},
          {unified + "/a/b/cpu.max", "12a 100000"},
          {unified + "/a/b/memory.max", "\n\n5"},
          {unified + "/a/b/c/cpu.max", "100000"},
          {unified + "/a/b/c/memory.high", "0\n"}},
         8,
         UINT64_MAX},
    };
    for (const auto& layout : layouts) {
        CAPTURE(layout.name);
        auto files = layout.files;
        files.emplace_back("/proc/self/cgroup", layout.groups);
        files.emplace_back("/proc/self/mountinfo", layout.mounts);
        const LimitTree tree(files);
        const ProcessLimits limits = read_cgroup_limits(tree.root);
        CHECK(limits.cores(8) == layout.cores);
        CHECK(limits.memory == layout.memory);
    }
    CHECK(read_cgroup_limits(fresh_path("no-such-tree")).cores(8) == 8);
    CHECK(ProcessLimits{.cpus = 0.01}.cores(8) == 1);
    CHECK(ProcessLimits{.cpus = 64}.cores(8) == 8);
    CHECK(usable_memory() > 1 << 20);
    CHECK(usable_memory() <= SIZE_MAX / 2);
}
#endif

TEST_CASE("base: cores and environment") {
    CHECK(physical_cores() >= 1);
    CHECK(physical_cores() <= 4096);
    CHECK(environment("VALAR_SURELY_NOT_SET").empty());
    CHECK(!environment("PATH").empty());
}

#if !defined(_WIN32)

TEST_CASE("base: what is no regular file is refused, and nobody waits for it") {
    const std::string fifo = fresh_path("fifo");
    REQUIRE(mkfifo(fifo.c_str(), 0600) == 0);
    for (const std::string& path : {fifo, std::string("/dev/zero"), std::string(".")}) {
        CAPTURE(path);
        const auto text = read_file(path, 1000);
        REQUIRE_FALSE(text);
        CHECK(text.error().message == "cannot read '" + path + "': not a regular file");
        CHECK_FALSE(MappedFile::open(path));
    }
    unlink(fifo.c_str());
}

TEST_CASE("base: no file or socket of ours is a standard stream, or goes to a child") {
    int kept[3];
    bool taken[3], known[100], inherited = false;
    std::fflush(stdout);
    for (int i = 0; i < 100; ++i) known[i] = fcntl(i, F_GETFD) != -1;  // the test's own
    for (int i = 0; i < 3; ++i) kept[i] = fcntl(i, F_DUPFD_CLOEXEC, 100);
    for (int i = 0; i < 3; ++i) close(i);
    const std::string path = fresh_path("streams");
    bool made = true;
    {
        auto folder = Folder::open(path);
        auto file = folder ? (*folder)->open_file("a", true) : folder.error();
        auto fresh = NewFile::create(path + "/b");
        auto names = folder ? (*folder)->list() : folder.error();
        const bool synced = folder && (*folder)->sync();
        auto mapped = MappedFile::open(path + "/a");
        auto text = read_file(path + "/a", 10);
        made = file && fresh && names && synced && mapped && text;
        auto listener = Socket::listen(*NetAddress::parse("127.0.0.1", 0), 8);
        auto client = listener ? Socket::connect(*listener->local()) : listener.error();
        auto poller = Poller::open();
        Socket accepted;
        NetAddress peer;
        std::vector<PollEvent> events;
        made = made && client && poller && poller->set(*listener, 1, poll_read) &&
               poller->wait(10'000, &events) &&
               listener->accept(&accepted, &peer) == IoStatus::done;
        for (int i = 0; i < 3; ++i) taken[i] = fcntl(i, F_GETFD) != -1;
        for (int i = 3; i < 100; ++i) {
            const int flags = fcntl(i, F_GETFD);
            if (flags != -1 && !known[i]) inherited = inherited || !(flags & FD_CLOEXEC);
        }
        if (folder)
            for (const char* name : {"a", "lock"}) (void)(*folder)->remove(name).ok();
    }
    rmdir(path.c_str());
    for (int i = 0; i < 3; ++i) dup2(kept[i], i), close(kept[i]);
    CHECK(made);
    for (const bool one : taken) CHECK_FALSE(one);
    CHECK_FALSE(inherited);
}

#endif
