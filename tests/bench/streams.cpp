// What streams cost that nobody reads: streams [SLOW [IDLE]]
//
// SLOW clients (1,000) ask for an endless stream and never read: each may cost at most 300 KiB, and
// others, asked for meanwhile, wait no longer. Then IDLE ones (5,000) wait in the background for a
// response that is not begun: at most 2 KiB each. Bytes are those of the heap in use, by the responder
// here too; the kernel's buffers are not counted. Exit code 1 where one is over its limit.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <arpa/inet.h>
#include <malloc.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../http_peer.hpp"
#include "server/server.hpp"

namespace {

using namespace valar;

/// Answers "slow" without end, "idle" never, and the rest at once.
class Endless : public Responder {
public:
    std::vector<ModelInfo> models() const override {
        ModelInfo info;
        info.id = "endless";
        info.context_tokens = 1 << 20;
        return {info};
    }
    Result<std::unique_ptr<Prepared>> prepare(const Request& request) override {
        auto task = std::make_unique<Task>();
        task->model = "endless";
        task->text = request.input.text;
        return std::unique_ptr<Prepared>(std::move(task));
    }
    Result<void> submit(std::unique_ptr<Prepared> prepared, std::string id) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        kinds_[id] = static_cast<Task&>(*prepared).text[0];
        return {};
    }
    std::optional<Event> poll(const std::string& id) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = kinds_.find(id);
        if (found == kinds_.end() || found->second == 'i') return std::nullopt;
        // A letter at a time: the text of an answer is kept too, and is not what is measured.
        if (found->second == 's') return Event{Event::Kind::text_delta, "w", nullptr};
        auto outcome = std::make_shared<Outcome>();
        outcome->text = "at once";
        kinds_.erase(found);
        return Event{Event::Kind::finished, {}, std::move(outcome)};
    }
    void cancel(const std::string& id) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (const auto found = kinds_.find(id); found != kinds_.end()) found->second = 'q';
    }
    ResponderStats stats() const override { return {}; }
    void on_ready(const ReadyListener&) override {}

private:
    struct Task : Prepared {
        std::string text;
    };
    std::mutex mutex_;
    std::map<std::string, char> kinds_;
};

size_t bytes_in_use() {
    const struct mallinfo2 heap = mallinfo2();
    return heap.uordblks + heap.hblkhd;
}

std::string request(const char* text, bool stream, bool background) {
    const std::string body = Json::object()
                                 .set("model", "endless")
                                 .set("input", text)
                                 .set("stream", stream)
                                 .set("background", background)
                                 .write();
    return "POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: " +
           std::to_string(body.size()) + "\r\n\r\n" + body;
}

/// Connects and never reads; the kernel takes little for it, so that the server has to.
struct DeafPeer {
    explicit DeafPeer(uint16_t port) : socket(::socket(AF_INET, SOCK_STREAM, 0)) {
        const int bytes = 4096;
        setsockopt(socket, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
        sockaddr_in to = {};
        to.sin_family = AF_INET;
        to.sin_port = htons(port);
        to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        if (connect(socket, reinterpret_cast<sockaddr*>(&to), sizeof to) != 0) std::exit(3);
    }
    ~DeafPeer() { close(socket); }
    void send(const std::string& bytes) {
        if (write(socket, bytes.data(), bytes.size()) < 0) std::exit(3);
    }
    int socket;
};

/// Responses that are not over.
int live(uint16_t port) {
    HttpPeer peer(port);
    peer.send("GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
    const std::string body = peer.reply().body;
    const std::string name = "\nvalar_responses_live ";
    return std::atoi(body.c_str() + std::min(body.size(), body.find(name) + name.size()));
}

/// Milliseconds of `count` requests that are answered at once: the median and the slowest.
std::pair<double, double> ask_others(uint16_t port, int count) {
    std::vector<double> all;
    for (int i = 0; i < count; ++i) {
        const auto start = std::chrono::steady_clock::now();
        HttpPeer peer(port);
        peer.send(request("quick", false, false));
        if (const int status = peer.reply().status; status != 200) {
            std::fprintf(stderr, "status %d\n", status);
            std::exit(2);
        }
        all.push_back(
            std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
                .count());
    }
    std::sort(all.begin(), all.end());
    return {all[all.size() / 2], all.back()};
}

}  // namespace

int main(int argc, char** argv) {
    const auto count = [&](int i, int usual) { return argc > i ? std::atoi(argv[i]) : usual; };
    const int slow = count(1, 1000), idle = count(2, 5000);
    rlimit files = {};
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);

    Endless endless;
    ServerOptions options;
    options.port = 0;
    options.dialect = Dialect::openai;
    options.max_connections = 20'000;
    options.max_queued = 20'000;
    auto server = Server::open(&endless, options);
    if (!server) return std::fprintf(stderr, "%s\n", server.error().message.c_str()), 1;
    std::thread serving([&] { (void)server->run().ok(); });
    const uint16_t port = server->port();
    bool over = false;
    const auto measure = [&](const char* what, int clients, const char* text, bool background,
                             double limit_kib) {
        ask_others(port, 200);
        const auto before = ask_others(port, 200);
        const int others = live(port);
        std::vector<std::unique_ptr<DeafPeer>> peers(static_cast<size_t>(clients));
        for (auto& peer : peers) peer = std::make_unique<DeafPeer>(port);
        const size_t connected = bytes_in_use();
        for (auto& peer : peers) peer->send(request(text, true, background));
        for (std::clock_t last = 0, now = std::clock(); now - last > CLOCKS_PER_SEC / 50;) {
            last = now;  // until this process does nothing more
            std::this_thread::sleep_for(std::chrono::milliseconds(500));
            now = std::clock();
        }
        const int left = live(port) - others;  // those 30 s behind were closed
        const double kib = static_cast<double>(bytes_in_use() - connected) / 1024 /
                           std::max(1, left);
        const auto during = ask_others(port, 200);
        std::printf(
            "%d %s: %.2f KiB each (limit %.0f); others %.2f ms (slowest %.2f), before %.2f "
            "ms (%.2f)\n",
            left, what, kib, limit_kib, during.first, during.second, before.first, before.second);
        std::fflush(stdout);
        over |= kib > limit_kib;
    };
    measure("clients that do not read", slow, "slow", false, 300);
    std::this_thread::sleep_for(std::chrono::seconds(2));  // they left
    measure("idle streams", idle, "idle", true, 2);
    server->stop();
    serving.join();
    return over;
}
