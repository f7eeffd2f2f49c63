// What completion windows are worth under load: 32 threads of asap, standard and flex requests on one
// engine, all at once. The asap ones should wait less than a step, every flex one should end, and memory
// should stay where it is.
//   c++ -std=c++20 -O2 -I. tests/bench/windows.cpp -o bench_windows -pthread
//   bench_windows MODEL [MINUTES [MAX_RUNNING]]
#define VALAR_NO_SERVER
#define VALAR_NO_STORE
#define VALAR_IMPLEMENTATION
#include "valar.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace valar;

namespace {

using Clock = std::chrono::steady_clock;

struct Load {
    const char* name;
    Window window;
    int threads;
    int pause_ms;  // at most, between two requests of a thread
};
constexpr Load loads[] = {{"asap", Window::asap, 8, 4000},
                          {"standard", Window::standard, 12, 500},
                          {"flex", Window::flex, 12, 0}};

struct Figures {
    std::mutex mutex;
    std::vector<uint64_t> queue_us, total_us;
    int asked = 0, completed = 0;
};

/// Bytes of anonymous memory of this process.
uint64_t private_bytes() {
    std::FILE* file = std::fopen("/proc/self/status", "r");
    char line[128];
    unsigned long long kib = 0;
    while (file && std::fgets(line, sizeof line, file))
        if (std::sscanf(line, "RssAnon: %llu", &kib) == 1) break;
    if (file) std::fclose(file);
    return kib * 1024;
}

double share(std::vector<uint64_t>& values, double part) {  // of microseconds, in ms
    if (values.empty()) return 0;
    std::sort(values.begin(), values.end());
    return static_cast<double>(values[static_cast<size_t>(double(values.size() - 1) * part)]) / 1e3;
}

Request make_request(Window window, std::mt19937& random) {
    static constexpr const char* words[] = {"river",  "stone",  "amber",   "lantern", "orchard",
                                            "winter", "copper", "harbour", "violet",  "thunder"};
    std::string text = "Tell me about";
    for (auto i = 5 + random() % 200; i > 0; --i) text.append(" ").append(words[random() % 10]);
    Request request;
    request.input = std::move(text);
    request.window = window;
    request.max_output_tokens = 8 + random() % 56;
    request.temperature = 1;
    request.organisation = random() % 2 ? "one" : "other";
    return request;
}

void ask_on(Engine& engine, const Load& load, unsigned seed, const std::atomic<bool>& over,
            Figures& figures) {
    std::mt19937 random(seed);
    while (!over) {
        if (load.pause_ms)
            std::this_thread::sleep_for(
                std::chrono::milliseconds(random() % static_cast<unsigned>(load.pause_ms)));
        Reply reply = engine.submit(make_request(load.window, random));
        reply.wait();
        while (reply.poll()) {}
        const Outcome& outcome = reply.outcome();
        const Timings& spent = outcome.timings;
        const std::lock_guard<std::mutex> lock(figures.mutex);
        ++figures.asked;
        if (outcome.status != Status::completed) {
            std::fprintf(stderr, "%s: %s\n", load.name,
                         outcome.error ? outcome.error->message.c_str() : "not completed");
            continue;
        }
        ++figures.completed;
        figures.queue_us.push_back(spent.queue_us);
        figures.total_us.push_back(spent.queue_us + spent.prefill_us + spent.decode_us);
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) return std::fprintf(stderr, "bench_windows MODEL [MINUTES [MAX_RUNNING]]\n"), 2;
    const double minutes = argc > 2 ? std::atof(argv[2]) : 10;
    EngineOptions options;
    options.model_path = argv[1];
    options.context_tokens = 1024;
    if (argc > 3) options.max_running = static_cast<uint32_t>(std::atoi(argv[3]));
    auto engine = Engine::open(options);
    if (!engine) return std::fprintf(stderr, "%s\n", engine.error().message.c_str()), 1;
    if (!engine->start()) return 1;

    std::atomic<bool> over = false;
    Figures figures[3];
    std::vector<std::thread> threads;
    for (int kind = 0; kind < 3; ++kind)
        for (int i = 0; i < loads[kind].threads; ++i)
            threads.emplace_back([&, kind, i] {
                ask_on(*engine, loads[kind], static_cast<unsigned>(100 * kind + i), over,
                       figures[kind]);
            });

    // The length of every step, and memory once each second.
    std::vector<uint64_t> steps_us, memory;
    const auto begin = Clock::now(), end = begin + std::chrono::seconds(int64_t(minutes * 60));
    auto last = begin;
    for (uint64_t batches = 0, second = 0; Clock::now() < end;) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        const auto now = Clock::now();
        if (const uint64_t seen = engine->responder()->stats().batches; seen != batches) {
            const auto us = std::chrono::duration_cast<std::chrono::microseconds>(now - last);
            steps_us.push_back(static_cast<uint64_t>(us.count()) / (seen - batches));
            batches = seen;
            last = now;
        }
        if (now - begin < std::chrono::seconds(second)) continue;
        ++second;
        memory.push_back(private_bytes());
    }
    over = true;
    for (std::thread& thread : threads) thread.join();

    for (int kind = 0; kind < 3; ++kind) {
        Figures& f = figures[kind];
        std::printf(
            "%-9s %d threads, %d of %d completed; queue p50 %.1f, p95 %.1f, longest %.1f ms; "
            "whole p50 %.0f, longest %.0f ms\n",
            loads[kind].name, loads[kind].threads, f.completed, f.asked, share(f.queue_us, 0.5),
            share(f.queue_us, 0.95), share(f.queue_us, 1), share(f.total_us, 0.5),
            share(f.total_us, 1));
    }
    std::printf("a step: p50 %.1f, p95 %.1f, longest %.1f ms\n", share(steps_us, 0.5),
                share(steps_us, 0.95), share(steps_us, 1));
    const ResponderStats stats = engine->responder()->stats();
    const size_t tenth = memory.size() / 10;  // until all have begun
    const auto [least, most] = std::minmax_element(memory.begin() + std::ptrdiff_t(tenth),
                                                   memory.end());
    std::printf("%llu preempted; private memory %.1f to %.1f MiB (%.2f %%) after the first tenth\n",
                static_cast<unsigned long long>(stats.preempted), double(*least) / 1048576,
                double(*most) / 1048576, 100 * double(*most - *least) / double(*least));
    return 0;
}
