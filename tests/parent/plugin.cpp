// What a host's plugin may do with valar: open a model, have it answer on a thread of the engine's own,
// close it. Its size in bytes is the result, -1 after an error.
#ifdef PARENT_IMPLEMENTS
#define VALAR_IMPLEMENTATION
#endif
#include <valar.hpp>

#include "plugin.hpp"

int answer(const char* model) {
    auto engine = valar::Engine::open({.model_path = model});
    if (!engine) return -1;
    auto reply = engine->submit({.input = "hello", .max_output_tokens = 8, .temperature = 0});
    if (!engine->start()) return -1;
    int bytes = -1;
    reply.wait();
    while (auto event = reply.poll())
        if (event->outcome && !event->outcome->error)
            bytes = static_cast<int>(event->outcome->text.size());
    return bytes;
}
