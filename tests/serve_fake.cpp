// Serves a FakeResponder, for checks by other programs:
// serve_fake [PORT [KEY [DIALECT [STORE [DELAY_MS [PACE_MS [DRAIN_MS]]]]]]]. Port 0, the default, takes a free one; the
// first line printed is the port. KEY may be empty: none. STORE is a directory of FileStore, empty: in
// memory. With DELAY_MS answers take about so long, with PACE_MS they come word by word, one
// after the other. SIGTERM stops it as a server should, a second one at once: exit code 0.
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>

#include "fake_responder.hpp"
#include "server/server.hpp"

namespace {
volatile std::sig_atomic_t interrupted = 0;
}

int main(int argc, char** argv) {
    const auto argument = [&](int i) { return std::string(argc > i ? argv[i] : ""); };
    FakeResponder responder("org/fake-1", {"fake"});
    responder.info.context_tokens = 4096;
    valar::ServerOptions options;
    options.port = static_cast<uint16_t>(std::atoi(argument(1).c_str()));
    if (!argument(2).empty()) options.keys.push_back({"key", "default", argument(2)});
    if (argument(3) == "openai") options.dialect = valar::Dialect::openai;
    options.log.write = [](void*, valar::LogLevel, std::string_view line) {
        std::fprintf(stderr, "%.*s\n", static_cast<int>(line.size()), line.data());
    };
    std::unique_ptr<valar::FileStore> store;
    if (!argument(4).empty()) {
        auto opened = valar::FileStore::open({.path = argument(4)});
        if (!opened) return std::fprintf(stderr, "%s\n", opened.error().message.c_str()), 1;
        store = std::move(*opened);
        options.store = store.get();
    }
    const int delay_ms = std::atoi(argument(5).c_str());
    const int pace_ms = std::atoi(argument(6).c_str());
    if (!argument(7).empty()) options.drain_timeout_ms = uint32_t(std::atoi(argument(7).c_str()));
    responder.hold = delay_ms > 0;
    responder.drips = responder.tells_items = pace_ms > 0;
    auto server = valar::Server::open(&responder, options);
    if (!server) return std::fprintf(stderr, "%s\n", server.error().message.c_str()), 1;
    std::printf("%u\n", static_cast<unsigned>(server->port()));
    std::fflush(stdout);

    std::atomic<bool> over = false;
    std::thread answers([&] {
        while (delay_ms > 0 && !over) {
            const auto ids = responder.waiting();
            std::this_thread::sleep_for(std::chrono::milliseconds(delay_ms));
            for (const std::string& id : ids) responder.finish(id);
        }
    });
    std::thread words([&] {
        while (pace_ms > 0 && !over) {
            std::this_thread::sleep_for(std::chrono::milliseconds(pace_ms));
            responder.drip();
        }
    });
    std::signal(SIGTERM, [](int) { interrupted = interrupted + 1; });
    bool ran = true;
    for (int stops = 0; ran;) {
        auto more = server->step(50);
        ran = more.ok();
        if (!more || !*more) break;
        if (interrupted == stops) continue;
        stops = interrupted;
        server->stop(stops > 1);
    }
    over = true;
    answers.join();
    words.join();
    return ran ? 0 : 1;
}
