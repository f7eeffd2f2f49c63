// chat: a conversation in the terminal. Ctrl-C cancels the reply; at the prompt, or twice, it
// quits. What a model thinks before it answers stands dimmed above the answer.
//
//     c++ -std=c++20 -O2 -pthread -I. examples/chat.cpp -o chat && ./chat
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#endif
#include "valar.hpp"

#include "common.hpp"

#include <csignal>

namespace {

volatile std::sig_atomic_t answering = 0;
volatile std::sig_atomic_t interrupts = 0;

void on_interrupt(int) {
    if (!answering || interrupts) std::_Exit(130);
    interrupts = 1;
    std::signal(SIGINT, on_interrupt);  // some systems take the handler away
}

// One line without its end; nothing at the end of the input.
std::optional<std::string> read_line() {
    std::string line;
    for (int c; (c = std::getchar()) != EOF;) {
        if (c == '\n') return line;
        line += static_cast<char>(c);
    }
    if (line.empty()) return std::nullopt;
    return line;
}

// Text of an answer as it is, thoughts dimmed where a terminal shows it: each piece by itself, so
// that nothing stays dimmed when a second Ctrl-C ends the program.
void show(const valar::Event& event) {
    static const bool dims = example::shows_colours();
    const bool thought = event.item.kind == valar::Item::Kind::reasoning;
    using enum valar::Event::Kind;
    switch (event.kind) {
        case text_delta: example::print(event.text); break;
        case reasoning_delta:
            example::print(dims ? "\x1b[2m" + event.text + "\x1b[0m" : event.text);
            break;
        case item_ended:
            if (thought) example::print("\n\n");
            break;
        default: break;
    }
}

// Prints the reply as it comes and returns it, or what came of it before Ctrl-C.
valar::Outcome answer(valar::Engine& engine, const valar::Request& request) {
    valar::Reply reply = engine.submit(request);
    interrupts = 0;
    answering = 1;
    while (!reply.finished()) {
        if (interrupts) reply.cancel();
        if (!engine.step(50'000)) break;
        while (auto event = reply.poll()) show(*event);
    }
    answering = 0;
    example::print("\n");
    return reply.outcome();
}

}  // namespace

int main(int argc, char** argv) {
    valar::EngineOptions options;
    valar::Request request;
    request.temperature = 0.5;
    request.max_output_tokens = 500;
    example::Flags flags("chat",
                         "A conversation in the terminal. Ctrl-C cancels a reply, Ctrl-D ends.");
    flags.add("instructions", "TEXT", &request.instructions, "what the model is to be");
    flags
        .add("temperature", "0..2", &request.temperature,
             "0: always the likeliest word (default: 0.5)")
        .within(0, 2);
    flags
        .add("max-output-tokens", "N", &request.max_output_tokens,
             "the longest reply (default: 500)")
        .within(1, UINT32_MAX);
    flags.add("seed", "N", &request.seed, "the same seed, the same answers");
    example::add_model_flags(flags, options);
    if (auto exit_code = flags.parse(argc, argv)) return *exit_code;

    options.log.write = example::print_log;  // among it: which context, and why
    auto engine = example::open_engine(options);
    if (!engine) return flags.fail(engine.error());
    std::signal(SIGINT, on_interrupt);

    std::vector<valar::Item>& turns = request.input.items;
    for (;;) {
        example::print("> ");
        const auto line = read_line();
        if (!line) break;
        if (line->empty()) continue;
        turns.push_back(valar::Item::message(valar::Role::user, *line));
        valar::Outcome outcome = answer(*engine, request);
        while (outcome.error && outcome.error->code == "context_length_exceeded" &&
               turns.size() > 2) {
            turns.erase(turns.begin(),
                        turns.begin() + 2);  // forgets the oldest question and answer
            outcome = answer(*engine, request);
        }
        const bool cancelled = outcome.status == valar::Status::cancelled;
        if (outcome.error && !cancelled) {
            example::fail(outcome.error->message);
            turns.pop_back();
            continue;
        }
        turns.push_back(valar::Item::message(valar::Role::assistant, outcome.text));
    }
    example::print("\n");
    return 0;
}
