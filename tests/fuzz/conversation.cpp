// A saved conversation: any bytes as they are; then as history and pages of a save that is
// otherwise right, which, where it is taken, goes on for some tokens and can be saved again.
#include "digest_internal.hpp"
#include "engine/engine.hpp"

#include "../tiny_model.hpp"

#include <cstdlib>

using namespace valar;

namespace {

Engine& engine() {
    static const std::vector<std::byte> model = tiny::model(
        {.types = {TensorType::q4_0}, .window = 40, .full_every = 2});  // one layer of two
    static Engine one = [] {
        EngineOptions options;
        options.model_bytes = model;
        options.threads = 0;
        return *Engine::open(options);
    }();
    return one;
}

void go_on(std::span<const std::byte> saved) {
    auto conversation = Conversation::restore(engine(), saved);
    if (!conversation) {
        if (conversation.error().message.empty()) std::abort();
        return;
    }
    Reply reply = conversation->say("and?");
    for (int i = 0; i < 4; ++i) (void)engine().step(0);
    reply.cancel();
    if (!engine().step()) std::abort();
    if (!reply.finished() || !conversation->save()) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
    go_on(bytes);
    // The header of an empty conversation; its last fields are pages, two unused, bytes of a position's
    // pages, bytes of JSON.
    static const auto empty = *Conversation(engine(), {}).save();
    std::vector<std::byte> save(empty.begin(), empty.begin() + 88);
    uint64_t page_bytes;
    std::memcpy(&page_bytes, &save[72], sizeof page_bytes);
    const uint64_t json_bytes = size > 0 ? std::min<uint64_t>(data[0] * 8u, size - 1) : 0;
    const uint32_t pages = size > 0 && data[size - 1] < 8 ? data[size - 1] : 1;
    const uint64_t windowed = std::min(pages, 3u);  // of 40 positions
    std::memcpy(&save[60], &pages, sizeof pages);
    std::memcpy(&save[80], &json_bytes, sizeof json_bytes);
    save.insert(save.end(), bytes.begin() + (size > 0), bytes.end());
    save.resize(static_cast<size_t>(88 + json_bytes + (pages + windowed) * page_bytes / 2));
    const uint32_t sum = detail::crc32c(save.data(), save.size());
    const auto* at = reinterpret_cast<const std::byte*>(&sum);
    save.insert(save.end(), at, at + sizeof sum);
    go_on(save);
    return 0;
}
