// Who is told that a response has events, for those who implement Responder::on_ready.
#pragma once

#include "api.hpp"

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>

namespace valar {
inline namespace v1 {
namespace detail {

/// Threads: any.
class Announcer {
public:
    /// In the place of the one before, whose calls have ended then.
    void set(const ReadyListener& listener) {
        std::unique_lock<std::mutex> lock(mutex_);
        listener_ = listener;
        idle_.wait(lock, [&] { return calls_ == 0; });
    }
    /// Without locks held.
    void call(const std::string& id) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!listener_.call) return;
        const ReadyListener listener = listener_;
        ++calls_;
        lock.unlock();
        listener.call(listener.context, id);
        lock.lock();
        VALAR_ASSERT(calls_ > 0);
        if (--calls_ == 0) idle_.notify_all();
    }

private:
    std::mutex mutex_;  // guards what follows
    std::condition_variable idle_;
    ReadyListener listener_;
    uint32_t calls_ = 0;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar
