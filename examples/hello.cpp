// hello: loads a model, asks one question, prints the answer as it comes.
//
//     c++ -std=c++20 -O2 -pthread -I. examples/hello.cpp -o hello && ./hello "Tell me a joke."
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#define VALAR_NO_SERVER  // what a program does not use it need not compile
#define VALAR_NO_STORE
#endif
#include "valar.hpp"

#include "common.hpp"

int main(int argc, char** argv) {
    valar::EngineOptions options;
    std::string question = "What is the capital of France?";
    uint32_t max_tokens = 200;
    example::Flags flags("hello", "Loads a model and asks it one question.");
    flags.add_word("[QUESTION]", &question);
    flags.add("max-output-tokens", "N", &max_tokens, "the longest answer (default: 200)")
        .within(1, UINT32_MAX);
    example::add_model_flags(flags, options);
    if (auto exit_code = flags.parse(argc, argv)) return *exit_code;

    auto engine = example::open_engine(options);
    if (!engine) return flags.fail(engine.error());

    valar::Reply reply = engine->submit(
        {.input = question, .max_output_tokens = max_tokens, .temperature = 0});
    while (!reply.finished()) {
        auto more = engine->step(100'000);  // 0.1 s, then show what there is
        if (!more) return example::fail(more.error().message);
        while (auto event = reply.poll())
            if (auto text = event->text_delta()) example::print(*text);
    }
    example::print("\n");
    const valar::Outcome& outcome = reply.outcome();
    return outcome.error ? example::fail(outcome.error->message) : 0;
}
