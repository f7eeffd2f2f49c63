// What guessing from the text so far gains (EngineOptions::speculation): answers of one model, with
// and without, in turns; the texts must be the same. Agent-like work repeats what it was given;
// a story does not, and there it is the wasted rows that count.
//
//     g++ -std=c++20 -O2 -pthread -I. tests/bench/speculation.cpp -o speculation
//     ./speculation MODEL.gguf [THREADS [PAIRS]]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#define VALAR_IMPLEMENTATION
#include "valar.hpp"

struct Task {
    const char* name;
    const char* text;
    bool repeats;
};

static const Task tasks[] = {
    {"code edit",
     "Here is a Python function:\n\n```python\n"
     "def average_of_scores(scores, weights):\n"
     "    total = 0\n"
     "    weight_total = 0\n"
     "    for index, score in enumerate(scores):\n"
     "        if score is None:\n"
     "            continue\n"
     "        total = total + score * weights[index]\n"
     "        weight_total = weight_total + weights[index]\n"
     "    if weight_total == 0:\n"
     "        return None\n"
     "    return total / weight_total\n"
     "```\n\nRepeat the same function with the name `mean_score` instead of "
     "`average_of_scores`.\n",
     true},
    {"JSON repair",
     "Repair broken JSON. Print all of it again.\n\n"
     "{\"id\": 7, \"name\": \"Albatross\", \"length\": 21 \"crew\": 12, \"in_port\": true\n"
     "Answer:\n"
     "{\"id\": 7, \"name\": \"Albatross\", \"length\": 21, \"crew\": 12, \"in_port\": true}\n\n"
     "{\"boats\": [{\"id\": 1, \"name\": \"Pequod\", \"length\": 32, \"crew\": 30, \"in_port\": "
     "true},\n"
     "{\"id\": 2, \"name\": \"Rachel\", \"length\": 28, \"crew\": 26, \"in_port\": false}\n"
     "{\"id\": 3, \"name\": \"Bachelor\", \"length\": 30, \"crew\": 28, \"in_port\": true},\n"
     "{\"id\": 4, \"name\": \"Samuel Enderby\", \"length\": 34, \"crew\": 31, \"in_port\": false}\n"
     "Answer:\n",
     true},
    {"summary with quotes",
     "Summarize the letter, and quote the sentences that matter word for word.\n\n"
     "Dear neighbours, the bridge over the mill stream will be closed from the third of May until "
     "the "
     "end of August. The planks have rotted and the council has decided to replace all of them. "
     "Carts "
     "and wagons must go by the upper road. People on foot may use the ferry, which is free of "
     "charge "
     "on market days. Whoever wants to help with the work is welcome and will be paid two "
     "shillings a "
     "day. The council asks everybody to keep children away from the building site.",
     true},
    {"story", "Write a story about a lighthouse keeper who finds a bottle.", false},
    {"essay", "Explain how rain forms and why it matters to farmers.", false},
};

struct Run {
    double decode_us, tokens;
    std::string text;
    valar::ResponderStats before, after;
};

static Run run(valar::Engine& engine, const Task& task, int64_t seed) {
    Run out{0, 0, {}, engine.responder()->stats(), {}};
    valar::Request request{.input = std::string(task.text), .max_output_tokens = 200};
    request.temperature = task.repeats ? 0 : 1;
    request.seed = seed;
    valar::Reply reply = engine.submit(request);
    while (!reply.finished())
        if (auto more = engine.step(10'000'000); !more) std::exit(1);
    const valar::Outcome& outcome = reply.outcome();
    out.text = outcome.text;
    out.tokens = static_cast<double>(outcome.usage.output_tokens);
    out.decode_us = static_cast<double>(outcome.timings.decode_us);
    out.after = engine.responder()->stats();
    return out;
}

int main(int argc, char** argv) {
    if (argc < 2)
        return std::fprintf(stderr, "usage: speculation MODEL.gguf [THREADS [PAIRS]]\n"), 2;
    const int threads = argc > 2 ? std::atoi(argv[2]) : 2;
    const int pairs = argc > 3 ? std::atoi(argv[3]) : 7;
    std::vector<valar::Engine> engines;
    for (bool speculation : {false, true}) {
        valar::EngineOptions options{.model_path = argv[1]};
        options.threads = threads - 1;
        options.speculation = speculation;
        auto engine = valar::Engine::open(options);
        if (!engine) return std::fprintf(stderr, "%s\n", engine.error().message.c_str()), 1;
        engines.push_back(std::move(*engine));
    }
    std::printf("%-20s %6s %8s %8s %8s %9s %9s %8s\n", "answer", "tokens", "tok/s", "with", "ratio",
                "guessed", "right", "wasted");
    for (const Task& task : tasks) {
        std::vector<double> ratios, plain, guessed;
        uint64_t drafted = 0, accepted = 0, rows = 0;
        double tokens = 0;
        for (int pair = -1; pair < pairs; ++pair) {  // the first warms up
            Run runs[2];
            for (int i = 0; i < 2; ++i) {
                const int which = pair % 2 ? i : 1 - i;
                runs[which] = run(engines[static_cast<size_t>(which)], task, pair);
            }
            if (runs[0].text != runs[1].text)
                return std::printf("%s: the texts differ\n", task.name), 1;
            if (pair < 0) continue;
            tokens += runs[0].tokens;
            plain.push_back((runs[0].tokens - 1) / runs[0].decode_us * 1e6);
            guessed.push_back((runs[0].tokens - 1) / runs[1].decode_us * 1e6);
            ratios.push_back(guessed.back() / plain.back());
            drafted += runs[1].after.drafted_tokens - runs[1].before.drafted_tokens;
            accepted += runs[1].after.accepted_tokens - runs[1].before.accepted_tokens;
            rows += runs[1].after.batch_rows - runs[1].before.batch_rows;
        }
        const auto median = [](std::vector<double> values) {
            std::sort(values.begin(), values.end());
            return values[values.size() / 2];
        };
        std::printf("%-20s %6.0f %8.1f %8.1f %7.2fx %9llu %9llu %7.1f%%\n", task.name,
                    tokens / pairs, median(plain), median(guessed), median(ratios),
                    static_cast<unsigned long long>(drafted),
                    static_cast<unsigned long long>(accepted),
                    100.0 * static_cast<double>(drafted - accepted) / static_cast<double>(rows));
    }
    return 0;
}
