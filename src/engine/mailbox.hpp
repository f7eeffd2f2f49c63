#pragma once

#include "base/internal.hpp"
#include "engine/engine.hpp"
#include "engine/limits.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

struct Doorbell {
    std::atomic<uint32_t> rings{0};
    std::atomic<bool> cancels{false};      // some reply was cancelled since the engine last looked
    std::shared_ptr<Doorbell> outer = {};  // rings with it: of a thread that serves several engines
    void ring() {
        rings.fetch_add(1, std::memory_order_release);
        wake(&rings);
        if (outer) outer->ring();
    }
};

// ---- Reply: what the engine puts in and the holder takes out ---------------------------------

struct Mailbox {
    std::string id;
    std::shared_ptr<Doorbell> doorbell;
    bool detached = false;  // the handle's
    std::atomic<bool> cancelled{false};
    std::atomic<uint32_t> finished{0};  // wait() sleeps on it

    std::mutex mutex;    // guards what follows
    bool hungry = true;  // poll found nothing: the next event is announced
    bool start_pending = false, finish_taken = false;
    std::vector<Event> notes;        // not polled yet; a delta's text stands in `text`
    std::vector<size_t> note_bytes;  // of each note, so many of `text`
    std::string text;                // of the notes, one behind the other
    size_t next_note = 0, next_byte = 0;
    std::vector<TokenLogprob> logprobs;      // not polled yet
    std::optional<PromptProgress> progress;  // likewise, the last
    std::shared_ptr<const Outcome> outcome;

    // Each returns whether to announce that there are events.
    bool put_start(size_t most_text) {
        return put([&] {
            start_pending = true;
            text.reserve(most_text);
        });
    }
    /// Text of the item that was begun last; what is not polled yet is joined.
    bool put_text(Event::Kind kind, uint32_t index, std::string_view more) {
        return put([&] {
            if (notes.empty() || notes.back().kind != kind) add_note(kind, index, {});
            note_bytes.back() += more.size();
            text += more;
        });
    }
    bool put_item(Event::Kind kind, uint32_t index, Item item) {
        return put([&] { add_note(kind, index, std::move(item)); });
    }
    bool put_logprob(const TokenLogprob& more) {
        return put([&] { logprobs.push_back(more); });
    }
    bool put_progress(const PromptProgress& now) {
        return put([&] { progress = now; });
    }
    bool put_outcome(Outcome end) {
        auto shared = std::make_shared<const Outcome>(std::move(end));
        const bool announce = put([&] { outcome = std::move(shared); });
        finished.store(1, std::memory_order_release);
        wake(&finished);
        return announce;
    }
    template <class Change>
    bool put(Change change) {
        const std::lock_guard<std::mutex> lock(mutex);
        change();
        return std::exchange(hungry, false);
    }
    void add_note(Event::Kind kind, uint32_t index, Item item) {
        Event note{kind};
        note.index = index;
        note.item = std::move(item);
        notes.push_back(std::move(note));
        note_bytes.push_back(0);
    }

    std::optional<Event> take() {
        const std::lock_guard<std::mutex> lock(mutex);
        if (std::exchange(start_pending, false)) return Event{Event::Kind::started};
        if (progress) {
            Event event{Event::Kind::prompt_progress};
            event.progress = *std::exchange(progress, std::nullopt);
            return event;
        }
        if (next_note < notes.size()) return take_note();
        if (!logprobs.empty()) {
            Event event{Event::Kind::text_delta, {}, {}, std::exchange(logprobs, {})};
            event.index = event.logprobs.front().item;
            return event;
        }
        if (outcome && !std::exchange(finish_taken, true))
            return Event{Event::Kind::finished, {}, outcome};
        hungry = true;
        return std::nullopt;
    }
    Event take_note() {
        Event event = std::move(notes[next_note]);
        const size_t bytes = note_bytes[next_note++];
        if (event.kind != Event::Kind::item_begun && event.kind != Event::Kind::item_ended) {
            event.text.assign(text, next_byte, bytes);
            event.logprobs = std::exchange(logprobs, {});
            next_byte += bytes;
        }
        if (next_note < notes.size()) return event;
        notes.clear();  // all keep their room: the engine must not need memory for every token
        note_bytes.clear();
        text.clear();
        next_note = next_byte = 0;
        return event;
    }
    void cancel() {
        if (finished.load(std::memory_order_acquire)) return;
        cancelled.store(true, std::memory_order_release);
        doorbell->cancels.store(true, std::memory_order_release);
        doorbell->ring();
    }
    bool wait(int64_t timeout_ms) {
        const uint64_t start = monotonic_ns();
        uint64_t limit = UINT64_MAX;
        if (timeout_ms >= 0 && mul_overflows(static_cast<uint64_t>(timeout_ms), 1'000'000, &limit))
            limit = UINT64_MAX;
        while (!finished.load(std::memory_order_acquire)) {
            const uint64_t waited = monotonic_ns() - start;
            if (waited >= limit) return false;
            wait_on(&finished, 0, std::min(limit - waited, kIdleNs));
        }
        return true;
    }
};
using MailboxPtr = std::shared_ptr<Mailbox>;

}  // namespace detail
}  // namespace v1
}  // namespace valar
