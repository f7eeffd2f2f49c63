#include "prologue.hpp"

#include "engine/desk.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

Error engine_closed_error() {
    return make_error(ErrorKind::closed, "the engine was closed", "engine_closed");
}

MailboxPtr Desk::make_mailbox(std::string id) const {
    auto reply = std::make_shared<Mailbox>();
    reply->id = std::move(id);
    reply->doorbell = doorbell_;
    return reply;
}

Result<void> Desk::enqueue(SequencePtr sequence, bool known) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (closed_) return engine_closed_error();
        if (queued() >= options_.max_queued) {
            Error error = make_error(ErrorKind::overloaded,
                                     format("%zu requests are waiting already", queued()),
                                     "overloaded");
            error.retry_after_s = retry_after_s();
            return error;
        }
        const MailboxPtr& reply = sequence->reply;
        if (known && !by_id_.emplace(reply->id, reply).second)
            return make_error(ErrorKind::internal, "the id " + reply->id + " is in use");
        arrivals_.push_back(std::move(sequence));
    }
    doorbell_->ring();
    return {};
}

// When half of the queue will have gone, as fast as requests were answered so far.
uint32_t Desk::retry_after_s() const {
    const uint64_t done = std::max<uint64_t>(counts_.completed, 1);
    const uint64_t request_us = (counts_.prefill_us + counts_.decode_us) / done;
    const uint64_t seconds = request_us * queued() / 2 / options_.max_running / 1'000'000;
    return static_cast<uint32_t>(std::clamp<uint64_t>(seconds, 1, 60));
}

MailboxPtr Desk::find(const std::string& id) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = by_id_.find(id);
    return found == by_id_.end() ? nullptr : found->second;
}

std::optional<Event> Desk::poll(const std::string& id) {
    const MailboxPtr reply = find(id);
    if (!reply) return std::nullopt;
    auto event = reply->take();
    if (event && event->kind == Event::Kind::finished) {
        const std::lock_guard<std::mutex> lock(mutex_);
        by_id_.erase(id);
    }
    return event;
}

void Desk::cancel(const std::string& id) {
    if (const MailboxPtr reply = find(id)) reply->cancel();
}

ResponderStats Desk::stats() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    ResponderStats out = counts_;
    out.queued = static_cast<uint32_t>(queued());
    return out;
}

void Desk::take_arrivals(std::vector<SequencePtr>* waiting) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SequencePtr& sequence : arrivals_) waiting->push_back(std::move(sequence));
    arrivals_.clear();
    counts_.queued = static_cast<uint32_t>(waiting->size());
}

void Desk::close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
