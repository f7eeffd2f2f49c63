// npc_choice: a guard of a game picks one of the actions that the game allows now, inside a loop of
// 60 frames a second that never waits. The answer can be nothing else, so no text has to be read:
// most choices are made by their first token, the rest of the words costs next to nothing.
//
//     c++ -std=c++20 -O2 -pthread -I. examples/npc_choice.cpp -o npc_choice && ./npc_choice
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#endif
#include "valar.hpp"

#include "common.hpp"

#include <algorithm>
#include <chrono>
#include <thread>

namespace {

using Clock = std::chrono::steady_clock;

struct World {
    bool night = false, wolf = false, sword = true, fire = false;
    int bread = 1;

    std::string text() const {
        std::string out = night ? "It is night." : "It is day.";
        out += wolf ? " A wolf stands before you." : " All is quiet.";
        out += sword ? " You have a sword." : " Your sword is broken.";
        if (fire) out += " The fire burns.";
        return out;
    }
};

// A row an action: when the rules of the game allow it, and what it does.
struct Action {
    const char* name;
    bool (*allowed)(const World&);
    void (*act)(World&);
};
constexpr Action actions[] = {
    {"keep watch", [](const World& w) { return !w.wolf; }, [](World&) {}},
    {"eat some bread", [](const World& w) { return !w.wolf && w.bread > 0; },
     [](World& w) { --w.bread; }},
    {"light the fire", [](const World& w) { return w.night && !w.fire; },
     [](World& w) { w.fire = true; }},
    {"attack the wolf", [](const World& w) { return w.wolf && w.sword; },
     [](World& w) { w.wolf = w.sword = false; }},
    {"run into the house", [](const World& w) { return w.wolf; }, [](World& w) { w.wolf = false; }},
    {"mend the sword", [](const World& w) { return !w.wolf && !w.sword; },
     [](World& w) { w.sword = true; }},
};

// What happens in the world, one after the other.
constexpr void (*happenings[])(World&) = {
    [](World&) {},
    [](World& w) { w.wolf = true; },
    [](World& w) { w.night = true; },
    [](World& w) { w.wolf = true; },
    [](World& w) { w.night = w.fire = false; },
};

valar::Request question(const World& world) {
    valar::Request request;
    request.instructions = "You are a brave guard at a lonely house. Say what you do next.";
    request.input = world.text();
    request.temperature = 0.7;
    for (const Action& action : actions)
        if (action.allowed(world)) request.format.one_of.push_back(action.name);
    return request;
}

void act(World& world, const std::string& choice) {
    for (const Action& action : actions)
        if (choice == action.name) action.act(world);
}

}  // namespace

int main(int argc, char** argv) {
    valar::EngineOptions options;
    int budget_us = 2000, rounds = 2;
    options.context_tokens = 512;  // a game says how much memory it gives
    options.max_running = 1;
    options.step_tokens = 32;
    example::Flags flags("npc_choice", "A guard decides inside a loop of 60 frames a second.");
    example::add_budget_flag(flags, &budget_us);
    flags.add("rounds", "N", &rounds, "how often everything happens (default: 2)")
        .within(1, INT32_MAX);
    example::add_model_flags(flags, options);
    if (auto exit_code = flags.parse(argc, argv)) return *exit_code;

    auto engine = example::open_engine(options);
    if (!engine) return flags.fail(engine.error());

    World world;
    valar::Reply reply;
    const size_t decisions = static_cast<size_t>(rounds) * std::size(happenings);
    size_t asked = 0;
    int frames = 0, asked_at = 0;
    double longest_ms = 0;
    for (auto next = Clock::now();; ++frames) {
        std::this_thread::sleep_until(next += std::chrono::microseconds(16'667));
        const auto start = Clock::now();  // the frame's work: acting, asking, computing
        if (reply.finished()) {           // as it is before the first question, too
            if (asked > 0) {
                const valar::Outcome& outcome = reply.outcome();
                if (outcome.error) return example::fail(outcome.error->message);
                act(world, outcome.text);
                std::printf("-> %s  (%d frames; %u tokens read, %u written)\n",
                            outcome.text.c_str(), frames - asked_at,
                            outcome.usage.input_tokens - outcome.usage.cached_tokens,
                            outcome.usage.output_tokens);
            }
            if (asked == decisions) break;
            happenings[asked++ % std::size(happenings)](world);
            std::printf("%s ", world.text().c_str());
            reply = engine->submit(question(world));
            asked_at = frames;
        }
        if (auto more = engine->step(budget_us); !more) return example::fail(more.error().message);
        const std::chrono::duration<double, std::milli> took = Clock::now() - start;
        longest_ms = std::max(longest_ms, took.count());
    }
    std::printf("%d frames; the work of the longest took %.1f ms\n", frames, longest_ms);
    return 0;
}
