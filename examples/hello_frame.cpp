// hello_frame: a model inside a game loop. Every frame gives it at most 2 ms; the game never waits.
//
//     c++ -std=c++20 -O2 -pthread -I. examples/hello_frame.cpp -o hello_frame && ./hello_frame
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#endif
#include "valar.hpp"

#include "common.hpp"

#include <chrono>
#include <thread>

// Stands for a game: 60 frames a second, at most `limit` of them, and a text on the screen.
struct Game {
    using Clock = std::chrono::steady_clock;
    int limit = 60 * 60;
    int frames = 0;
    Clock::time_point next = Clock::now();

    bool frame() {
        next += std::chrono::microseconds(16'667);
        std::this_thread::sleep_until(next);
        return ++frames <= limit;
    }
};

int main(int argc, char** argv) {
    valar::EngineOptions options;
    int budget_us = 2000;
    example::Flags flags("hello_frame",
                         "Asks a question from inside a loop of 60 frames a second.");
    example::add_budget_flag(flags, &budget_us);
    example::add_model_flags(flags, options);
    if (auto exit_code = flags.parse(argc, argv)) return *exit_code;

    auto engine = example::open_engine(options);
    if (!engine) return flags.fail(engine.error());

    valar::Reply reply = engine->submit(
        {.instructions = "You are a gruff blacksmith. Answer briefly.",
         .input = "Can you mend this sword before dawn?",
         .max_output_tokens = 60,
         .temperature = 0.6,
         .seed = 4});
    Game game;
    double longest_ms = 0;
    while (game.frame()) {
        const auto start = Game::Clock::now();
        if (auto more = engine->step(budget_us); !more) return example::fail(more.error().message);
        const std::chrono::duration<double, std::milli> took = Game::Clock::now() - start;
        longest_ms = std::max(longest_ms, took.count());
        while (auto event = reply.poll())
            if (auto text = event->text_delta()) example::print(*text);
        if (reply.finished()) break;
    }
    std::printf("\n%d frames; the longest step took %.1f ms\n", game.frames, longest_ms);
    const valar::Outcome& outcome = reply.outcome();
    return outcome.error ? example::fail(outcome.error->message) : 0;
}
