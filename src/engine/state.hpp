#pragma once

#include "engine/desk.hpp"
#include "engine/loaded_model.hpp"
#include "engine/prefix_cache.hpp"
#include "engine/prompt.hpp"
#include "engine/scheduler.hpp"

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- Taking turns with step() ----------------------------------------------------------------

class Exclusive {
public:
    explicit Exclusive(std::atomic<bool>* taken) : taken_(taken) {}
    Exclusive(Exclusive&& other) noexcept : taken_(std::exchange(other.taken_, nullptr)) {}
    ~Exclusive() {
        if (taken_) taken_->store(false, std::memory_order_release);
    }

private:
    std::atomic<bool>* taken_;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {

// What an engine is made of, and the thread that steps it. Its address is stable: the parts borrow
// options and one another.
struct Engine::State final : Responder {
    const detail::Process process;
    const EngineOptions options;
    const char* const kernels;  // the name of the table that computes
    const std::shared_ptr<const detail::LoadedModel> model;
    const BackendOptions sizes;
    std::unique_ptr<Backend> backend;  // borrows the model; null: its memory was given back
    const detail::PromptMaker prompts;
    detail::Desk desk;
    detail::PrefixCache cache;
    detail::Scheduler scheduler;

    std::atomic<bool> loaded{false}, stepping{false};
    std::atomic<bool> awaited{true};  // it is being loaded for the first time
    std::atomic<float> progress{0};
    bool reloads = false;          // it was loaded before
    std::optional<Error> failure;  // nothing works any more
    detail::Thread thread;
    std::atomic<bool> stop_asked{false};

    static Result<std::unique_ptr<State>> open(const EngineOptions& options,
                                               std::shared_ptr<detail::Doorbell> outer = {});
    State(const EngineOptions& from, std::shared_ptr<const detail::LoadedModel> opened,
          std::unique_ptr<Backend> device, const BackendOptions& sizes, const char* table,
          std::shared_ptr<detail::Doorbell> outer);
    ~State() override;

    std::vector<ModelInfo> models() const override;
    Result<std::unique_ptr<Prepared>> prepare(const Request& request) override;
    Result<void> submit(std::unique_ptr<Prepared> prepared, std::string id) override;
    std::optional<Event> poll(const std::string& id) override { return desk.poll(id); }
    void cancel(const std::string& id) override { desk.cancel(id); }
    ResponderStats stats() const override { return desk.stats(); }
    void on_ready(const ReadyListener& listener) override { desk.on_ready(listener); }

    /// For step(), save() and restore(), one at a time.
    Result<detail::Exclusive> take_turn(const char* who);
    /// Queues the prompt; a reply that was refused is finished.
    Reply reply_to(Result<detail::PromptPtr> prompt);
    /// Works until the deadline or until nothing is left; true while something is. `budget_ns` is
    /// what a step may take: batches are made so that they do not take many steps.
    Result<bool> work(uint64_t deadline_ns, uint64_t budget_ns);
    /// Gives back what backend and prefix cache hold. Whoever runs waits until work() loads again.
    void unload();
    bool has_requests() const;
    void stop();

    Result<void> enqueue(detail::PromptPtr prompt, const detail::MailboxPtr& reply, bool known);
    Result<bool> load(uint64_t deadline_ns);
    bool time_is_up(uint64_t deadline_ns) const {
        return detail::monotonic_ns() >= deadline_ns || stop_asked.load(std::memory_order_relaxed);
    }
    static void run_thread(void* self);
};

}  // namespace v1
}  // namespace valar
