// game_npc: three characters of a game share one model and 2 ms of every frame. They talk at the
// same time; in the middle the game is saved and loaded. At the end: what the frames took.
//
//     c++ -std=c++20 -O2 -pthread -I. examples/game_npc.cpp -o game_npc && ./game_npc
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#endif
#include "valar.hpp"

#include "common.hpp"

#include <array>
#include <chrono>
#include <thread>

namespace {

using Clock = std::chrono::steady_clock;

double wall_us() {
    return std::chrono::duration<double, std::micro>(Clock::now().time_since_epoch()).count();
}

// Of this thread: what a busy machine does with the rest of the time is not the engine's doing.
double cpu_us() {
#if defined(_WIN32)
    FILETIME created, ended, kernel, user;
    GetThreadTimes(GetCurrentThread(), &created, &ended, &kernel, &user);
    const auto ticks = [](const FILETIME& t) {
        return static_cast<double>(t.dwHighDateTime) * 4294967296.0 + t.dwLowDateTime;
    };
    return (ticks(kernel) + ticks(user)) / 10;
#else
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) / 1e3;
#endif
}

struct Character {
    const char* name;
    valar::Conversation conversation;
    valar::Reply reply = {};
    std::string line = {};  // what stands above its head
    bool saved = false;

    Character(const char* called, valar::Engine& engine, const char* who)
        : name(called),
          conversation(engine,
                       {.instructions = std::string(who) + " Answer in one or two sentences.",
                        .max_output_tokens = 40,
                        .temperature = 0.7,
                        .seed = 11},
                       valar::WhenFull::drop_oldest_turns) {}
};

// Times of the calls to step(), in buckets of 250 us.
struct Histogram {
    std::vector<double> times;

    double at(double part) {
        std::sort(times.begin(), times.end());
        return times[static_cast<size_t>(static_cast<double>(times.size() - 1) * part)];
    }
    void print(const char* what) {
        std::array<size_t, 16> counts{};
        for (const double us : times)
            ++counts[std::min<size_t>(static_cast<size_t>(us / 250), counts.size() - 1)];
        std::printf("\n%s of step(): median %.2f ms, 99.9 %% %.2f ms, longest %.2f ms\n", what,
                    at(0.5) / 1000, at(0.999) / 1000, at(1) / 1000);
        for (size_t i = 0; i < counts.size(); ++i) {
            if (counts[i] == 0) continue;
            const size_t width = (counts[i] * 60 + times.size() - 1) / times.size();
            std::printf("%s%5.2f ms %6zu %s\n", i + 1 == counts.size() ? ">" : " ",
                        static_cast<double>(i) * 0.25, counts[i], std::string(width, '#').c_str());
        }
    }
};

// Through a file in a real game. Gives the size of the save.
valar::Result<size_t> save_and_load(valar::Engine& engine, valar::Conversation& conversation) {
    auto saved = conversation.save();
    if (!saved) return saved.error();
    auto loaded = valar::Conversation::restore(engine, *saved);
    if (!loaded) return loaded.error();
    conversation = std::move(*loaded);
    return saved->size();
}

constexpr const char* kQuestions[] = {
    "Good morning! How is business?", "Have you heard the noise from the old mine?",
    "What would you do in my place?", "Who else could help me?",
    "Thank you. Until tomorrow!",
};

}  // namespace

int main(int argc, char** argv) {
    valar::EngineOptions options;
    int budget_us = 2000, seconds = 30, hertz = 60;
    example::Flags flags("game_npc", "Three characters talk inside a loop of 60 frames a second.");
    example::add_budget_flag(flags, &budget_us);
    flags.add("seconds", "N", &seconds, "how long the game lasts (default: 30)")
        .within(1, INT32_MAX);
    flags.add("hertz", "N", &hertz, "frames a second; 0: as fast as it goes (default: 60)")
        .within(0, INT32_MAX);
    options.context_tokens = 1024;  // a game says how much memory it gives
    options.max_running = 3;
    options.step_tokens = 64;
    example::add_model_flags(flags, options);
    if (auto exit_code = flags.parse(argc, argv)) return *exit_code;

    auto engine = example::open_engine(options);
    if (!engine) return flags.fail(engine.error());

    Character characters[] = {
        {"Brom", *engine, "You are Brom, a gruff blacksmith in a small mountain town."},
        {"Elsa", *engine, "You are Elsa, a cheerful innkeeper who knows every rumour."},
        {"Wren", *engine, "You are Wren, a nervous guard at the town's gate."},
    };
    Histogram cpu, wall;
    const int frames = seconds * std::max(hertz, 60);
    auto next = Clock::now();
    size_t asked = 0;
    for (int frame = 0; frame < frames; ++frame) {
        if (hertz > 0)
            std::this_thread::sleep_until(next += std::chrono::microseconds(1'000'000 / hertz));
        for (Character& who : characters) {
            if (!who.reply.finished()) continue;
            if (frame > frames / 2 && !std::exchange(who.saved, true)) {
                auto bytes = save_and_load(*engine, who.conversation);
                if (!bytes) return example::fail(bytes.error().message);
                std::printf("-- %s was saved and loaded: %zu bytes\n", who.name, *bytes);
            }
            who.reply = who.conversation.say(kQuestions[asked++ / 3 % std::size(kQuestions)]);
        }
        const double cpu_start = cpu_us(), wall_start = wall_us();
        auto more = engine->step(budget_us);
        cpu.times.push_back(cpu_us() - cpu_start);
        wall.times.push_back(wall_us() - wall_start);
        if (!more) return example::fail(more.error().message);
        for (Character& who : characters)
            while (auto event = who.reply.poll()) {
                if (auto text = event->text_delta()) who.line += *text;
                if (event->kind != valar::Event::Kind::finished) continue;
                if (event->outcome->error) return example::fail(event->outcome->error->message);
                std::printf("%s: %s\n", who.name, who.line.c_str());
                who.line.clear();
            }
    }
    cpu.print("processor time");
    wall.print("wall clock");
    const auto over = std::count_if(cpu.times.begin(), cpu.times.end(),
                                    [&](double us) { return us > budget_us + 500; });
    std::printf("\n%d frames; %td steps took more than the budget and 0.5 ms of processor time\n",
                frames, over);
    return 0;
}
