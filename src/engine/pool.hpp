#pragma once

#include "engine/engine.hpp"

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace valar {
inline namespace v1 {

struct EnginePoolOptions {
    /// Bytes of all models loaded at a time, as memory_plan() counts. 0: what the system has for this
    /// process, but for an eighth. Where models without limits of their own do not fit as they would
    /// be alone, they share what weights and scratch leave, or, if that cut a context, take turns.
    uint64_t memory_limit = 0;
    uint32_t keep_loaded_ms = 0;  ///< without a request; then it is let go. 0: until room is wanted
    uint32_t turn_ms = 10'000;    ///< that a model works while another waits for its room
    bool preload = true;  ///< as many as fit, in their order; else each at its first request
    LogSink log = {};     ///< of what the pool decides; models have their own
};

/// Several models under one limit of memory, stepped in turn by one thread. A request for one that
/// is not loaded waits: others that have nothing to do are let go, the one used longest ago first,
/// or give way for a while. No answer depends on it.
/// Threads: open, start, stop and the destructor from one at a time; memory_used() from any.
class VALAR_API EnginePool {
public:
    /// Reads all files but for their weights. Errors: as of Engine::begin_open(), and of a model
    /// that is too large by itself (out_of_memory).
    static Result<EnginePool> open(std::span<const EngineOptions> models,
                                   const EnginePoolOptions& options = {});
    EnginePool(EnginePool&& other) noexcept;
    EnginePool& operator=(EnginePool&& other) noexcept;
    ~EnginePool();

    Result<void> start();  ///< its thread; until then requests wait
    void stop();           ///< returns when the thread has ended; unfinished requests stay
    /// Of each model, in their order; they live as long as the pool.
    std::vector<Responder*> responders() const;
    uint64_t memory_used() const;  ///< bytes of the models that are loaded, or being loaded

private:
    struct State;
    explicit EnginePool(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

}  // namespace v1
}  // namespace valar
