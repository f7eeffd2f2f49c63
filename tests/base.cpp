#include <doctest/doctest.h>
#include <cstring>

#include "base/internal.hpp"
#include "base/sockets.hpp"

#include <cstdio>
#include <string>

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
