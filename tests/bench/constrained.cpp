// What it costs to hold answers to a schema, on one thread, in CPU time: tokens of a held answer beside
// those of a free one, with and without forced stretches; and the step of 16 sequences, 8 of them held.
//
//     g++ -std=c++20 -O2 -pthread -I. tests/bench/constrained.cpp -o constrained
//     ./constrained MODEL.gguf [PAIRS]
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <numeric>
#include <string>
#include <vector>

#ifndef VALAR_LINKED
#define VALAR_IMPLEMENTATION
#endif
#include "valar.hpp"

static const char* const text_schema =
    R"({"type":"object","properties":{"story":{"type":"string","minLength":2000}},"required":["story"],
        "additionalProperties":false})";
static const char* const record_schema =
    R"({"type":"array","minItems":40,"items":{"type":"object","properties":{
        "customer_identification_number":{"type":"integer","minimum":0,"maximum":99999},
        "is_returning_customer":{"type":"boolean"},
        "preferred_delivery_method":{"enum":["pickup","courier","postal"]},
        "number_of_items_in_order":{"type":"integer","minimum":1,"maximum":9}},
        "required":["customer_identification_number","is_returning_customer",
        "preferred_delivery_method","number_of_items_in_order"],"additionalProperties":false}})";
static const char* const unions_schema =
    R"({"type":"array","minItems":60,"items":{"anyOf":[
        {"type":"object","properties":{"kind":{"const":"person"},"name":{"type":"string","maxLength":40},
         "mail":{"type":"string","format":"email"}},"required":["kind","name"]},
        {"type":"object","properties":{"kind":{"const":"place"},"code":{"type":"string",
         "pattern":"^[A-Z]{2,3}-[0-9]{4,6}$"},"tags":{"type":"object","additionalProperties":
         {"type":"number"}}},"required":["kind","code","tags"]}]}})";

static valar::Engine open(const char* path, bool speculation) {
    valar::EngineOptions options{.model_path = path};
    options.threads = 0;
    options.context_tokens = 1024;
    options.speculation = speculation;
    options.show_schema = false;  // the same prompt for all
    auto engine = valar::Engine::open(options);
    if (!engine) std::exit((std::fprintf(stderr, "%s\n", engine.error().message.c_str()), 1));
    return std::move(*engine);
}

static valar::Request ask(const char* schema, double temperature, int64_t seed) {
    valar::Request request{.input = std::string("Write a long story about a customer, as JSON."),
                           .max_output_tokens = 120};
    request.temperature = temperature;
    request.seed = seed;
    if (schema) request.format.schema = *valar::Json::parse(schema);
    return request;
}

static double cpu_us() { return 1e6 * double(std::clock()) / CLOCKS_PER_SEC; }

// CPU time of the batches behind the prompts, and the tokens that they made.
struct Run {
    std::vector<double> steps;
    double tokens = 0;

    void add(const Run& other) {
        steps.insert(steps.end(), other.steps.begin(), other.steps.end());
        tokens += other.tokens;
    }
};

static Run run(valar::Engine& engine, const std::vector<valar::Request>& requests) {
    std::vector<valar::Reply> replies;
    for (const valar::Request& request : requests) replies.push_back(engine.submit(request));
    Run out;
    const auto running = [&] {
        return std::count_if(replies.begin(), replies.end(),
                             [](const valar::Reply& r) { return !r.finished(); });
    };
    const auto stats = [&] { return engine.responder()->stats(); };
    valar::ResponderStats last = stats();
    for (double begin = cpu_us(); running();) {
        if (!engine.step(1)) std::exit(1);
        const valar::ResponderStats now = stats();
        if (now.batches == last.batches) continue;
        const double us = cpu_us() - begin;
        if (now.batch_rows - last.batch_rows < 40 && running() == int64_t(requests.size()))
            out.steps.push_back(us);
        last = now;
        begin = cpu_us();
    }
    for (const valar::Reply& reply : replies) {
        if (reply.outcome().error)
            std::exit((std::puts(reply.outcome().error->message.c_str()), 1));
        out.tokens += double(reply.outcome().usage.output_tokens);
    }
    return out;
}

static double share(std::vector<double> values, double part) {
    std::sort(values.begin(), values.end());
    return values[std::min(values.size() - 1, size_t(double(values.size()) * part))];
}

// Of a token, without the slowest twentieth of the steps: there others had the machine.
static double us_per_token(Run run) {
    std::sort(run.steps.begin(), run.steps.end());
    const auto kept = run.steps.begin() + std::ptrdiff_t(run.steps.size() * 19 / 20);
    const double mean = std::accumulate(run.steps.begin(), kept, 0.0) /
                        double(kept - run.steps.begin());
    return mean * double(run.steps.size()) / run.tokens;
}

int main(int argc, char** argv) {
    if (argc < 2) return std::fprintf(stderr, "usage: constrained MODEL.gguf [PAIRS]\n"), 2;
    std::setvbuf(stdout, nullptr, _IONBF, 0);
    const int pairs = argc > 2 ? std::max(std::atoi(argv[2]), 1) : 5;
    struct Row {
        const char* name;
        const char* schema;
        double temperature;
        bool speculation;
    };
    for (const Row& row : {Row{"text, greedy", text_schema, 0, false},
                           Row{"text, temperature 1", text_schema, 1, false},
                           Row{"unions and patterns, temperature 1", unions_schema, 1, false},
                           Row{"record with fixed keys, greedy", record_schema, 0, true}}) {
        valar::Engine engine = open(argv[1], row.speculation);
        Run runs[2];
        for (int pair = -1; pair < pairs; ++pair)  // the first warms up
            for (int i = 0; i < 2; ++i) {
                const int held = pair % 2 ? i : 1 - i;
                const Run made = run(engine,
                                     {ask(held ? row.schema : nullptr, row.temperature, pair)});
                if (pair >= 0) runs[held].add(made);
            }
        const double us[] = {us_per_token(runs[0]), us_per_token(runs[1])};
        std::printf("%-36s free %.0f us a token, held %.0f: %.3f times as fast\n", row.name, us[0],
                    us[1], us[0] / us[1]);
    }
    valar::Engine engine = open(argv[1], false);
    Run runs[2];
    for (int pair = -1; pair < pairs; ++pair)
        for (int i = 0; i < 2; ++i) {
            const int held = pair % 2 ? i : 1 - i;
            std::vector<valar::Request> requests;
            for (int r = 0; r < 16; ++r)
                requests.push_back(ask(held && r % 2 ? unions_schema : nullptr, 1, 100 * pair + r));
            const Run made = run(engine, requests);
            if (pair >= 0) runs[held].add(made);
        }
    const std::vector<double>&free_steps = runs[0].steps, &held_steps = runs[1].steps;
    std::printf(
        "step of 16 sequences, ms: free p50 %.2f p99 %.2f, 8 held p50 %.2f p99 %.2f (%.3f)\n",
        share(free_steps, 0.5) / 1000, share(free_steps, 0.99) / 1000,
        share(held_steps, 0.5) / 1000, share(held_steps, 0.99) / 1000,
        share(held_steps, 0.99) / share(free_steps, 0.99));
    return 0;
}
