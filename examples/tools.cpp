// tools: the model calls C++ functions until it has an answer. It can only call what is declared
// here, with arguments that fit. It wants a model that knows tools: fetch_model.py coder.
//
//     c++ -std=c++20 -O2 -pthread -I. examples/tools.cpp -o tools && ./tools --model FILE
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#endif
#include "valar.hpp"

#include "common.hpp"

namespace {

using valar::Json;

// ---- What the model may call ----

std::string get_weather(const Json& arguments) {
    const std::string city(arguments["city"].as_string());
    const int degrees = static_cast<int>(city.size() * 7 % 30);  // stands for a real look outside
    return "It is " + std::to_string(degrees) + " degrees and sunny in " + city + ".";
}

std::string add(const Json& arguments) {  // cannot overflow: the schema has bounds
    return std::to_string(arguments["a"].as_int() + arguments["b"].as_int());
}

struct Function {
    const char *name, *description, *parameters;
    std::string (*call)(const Json& arguments);
};
constexpr Function functions[] = {
    {"get_weather", "Current weather of a city",
     R"({"type": "object", "properties": {"city": {"type": "string", "maxLength": 40}},
         "required": ["city"], "additionalProperties": false})",
     get_weather},
    {"add", "The sum of two integers",
     R"({"type": "object", "required": ["a", "b"], "additionalProperties": false, "properties": {
         "a": {"type": "integer", "minimum": -1000000000, "maximum": 1000000000},
         "b": {"type": "integer", "minimum": -1000000000, "maximum": 1000000000}}})",
     add},
};

valar::Result<std::vector<valar::Tool>> declared_tools() {
    std::vector<valar::Tool> tools;
    for (const Function& function : functions) {
        auto parameters = Json::parse(function.parameters);
        if (!parameters) return parameters.error();
        tools.push_back({.name = function.name,
                         .description = function.description,
                         .parameters = std::move(*parameters)});
    }
    return tools;
}

// What a call gives, as an item of the next request.
valar::Item run(const valar::Item& call) {
    std::string result = "no such function";
    const auto arguments = Json::parse(call.arguments);  // of a strict tool: always what fits
    for (const Function& function : functions)
        if (arguments && call.name == function.name) result = function.call(*arguments);
    std::printf("-- %s(%s): %s\n", call.name.c_str(), call.arguments.c_str(), result.c_str());
    return valar::Item::output(call, result);
}

// ---- The loop ----

// One answer: text is printed as it comes, a call is run when it is whole. What was said and what the
// calls gave goes to the request's items; false when nothing was called.
valar::Result<bool> answer(valar::Engine& engine, valar::Request& request) {
    std::vector<valar::Item> results;
    valar::Reply reply = engine.submit(request);
    while (!reply.finished()) {
        if (auto more = engine.step(50'000); !more) return more.error();
        while (auto event = reply.poll()) {
            if (auto text = event->text_delta()) example::print(*text);
            if (event->kind == valar::Event::Kind::item_ended && !event->call())
                example::print("\n");
            if (const valar::Item* call = event->call()) results.push_back(run(*call));
        }
    }
    const valar::Outcome& outcome = reply.outcome();
    if (outcome.error) return *outcome.error;
    std::vector<valar::Item>& turns = request.input.items;
    turns.insert(turns.end(), outcome.items.begin(), outcome.items.end());
    turns.insert(turns.end(), results.begin(), results.end());
    return !results.empty();
}

}  // namespace

int main(int argc, char** argv) {
    valar::EngineOptions options;
    std::string question = "What is the weather in Lisbon?";
    example::Flags flags("tools", "Asks a model that calls C++ functions until it has an answer.");
    flags.add_word("[QUESTION]", &question);
    example::add_model_flags(flags, options);
    if (auto exit_code = flags.parse(argc, argv)) return *exit_code;

    auto tools = declared_tools();
    if (!tools) return example::fail(tools.error().message);
    auto engine = example::open_engine(options);
    if (!engine) return flags.fail(engine.error());

    valar::Request request;
    request.input.items = {valar::Item::message(valar::Role::user, question)};
    request.tools = *tools;
    request.max_output_tokens = 300;
    request.temperature = 0;
    constexpr int most_rounds = 5;
    for (int round = 1; round <= most_rounds; ++round) {
        if (round == most_rounds)  // it had its calls; now it has to answer
            request.tool_choice.mode = valar::ToolChoice::Mode::none;
        const auto called = answer(*engine, request);
        if (!called) return example::fail(called.error().message);
        if (!*called) break;
    }
    return 0;
}
