#pragma once

#include "api/announcer.hpp"
#include "engine/sequence.hpp"

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

Error engine_closed_error();

// ---- The desk --------------------------------------------------------------------------------

// Where requests arrive and replies are fetched: mailboxes by id, arrivals that the scheduler has
// not seen yet, the listener, statistics. Locks are held briefly and never while something is
// called. Options are borrowed.
class Desk {
public:
    Desk(const EngineOptions& options, std::shared_ptr<Doorbell> outer) : options_(options) {
        doorbell_->outer = std::move(outer);
    }

    // From any thread.
    MailboxPtr make_mailbox(std::string id) const;
    /// Errors: `overloaded`, `closed`; with `known`, the id is in use. Known ids can be polled.
    Result<void> enqueue(SequencePtr sequence, bool known);
    std::optional<Event> poll(const std::string& id);
    void cancel(const std::string& id);
    ResponderStats stats() const;
    void on_ready(const ReadyListener& listener) { announcer_.set(listener); }
    Doorbell& doorbell() const { return *doorbell_; }

    // From the thread that steps.
    /// Whether a reply was cancelled since the last call.
    bool take_cancels() { return doorbell_->cancels.exchange(false, std::memory_order_acquire); }
    /// Moves arrivals to the end of `waiting`.
    void take_arrivals(std::vector<SequencePtr>* waiting);
    void announce(const Mailbox& reply) { announcer_.call(reply.id); }
    /// Changes the statistics; their `queued` is the number of those waiting.
    template <class Change>
    void count(Change change) {
        const std::lock_guard<std::mutex> lock(mutex_);
        change(counts_);
    }
    void close();  // nothing is taken from now on

private:
    MailboxPtr find(const std::string& id) const;
    uint32_t retry_after_s() const;
    size_t queued() const { return arrivals_.size() + counts_.queued; }

    const EngineOptions& options_;
    const std::shared_ptr<Doorbell> doorbell_ = std::make_shared<Doorbell>();

    mutable std::mutex mutex_;  // guards what follows
    std::vector<SequencePtr> arrivals_;
    bool closed_ = false;
    ResponderStats counts_;
    std::unordered_map<std::string, MailboxPtr> by_id_;  // those submitted through Responder

    Announcer announcer_;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar
