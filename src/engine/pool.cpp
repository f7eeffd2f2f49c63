#include "prologue.hpp"

#include "base/internal.hpp"
#include "base/text.hpp"
#include "engine/plan.hpp"
#include "engine/pool.hpp"
#include "engine/state.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

constexpr uint64_t kPoolSliceNs = 50'000'000;  // of one model, then the others are looked at

/// What a model takes with such a limit.
struct Share {
    uint64_t fixed = 0, total = 0;  // weights and scratch; with keys and values
    uint32_t context = 0;
};

Result<Share> plan_share(const EngineOptions& options, const ModelFile& file) {
    auto sizes = choose_backend_options(options, file);
    if (!sizes) return sizes.error();
    auto plan = plan_cpu_backend(file.gguf, file.spec, file.tensors, *sizes);
    if (!plan) return plan.error();
    return Share{plan->weights + plan->scratch, plan->total(), sizes->max_positions};
}

/// Gives each model without a limit one, so that they fit side by side, or at least alone.
Result<void> share_memory(std::span<EngineOptions> models, uint64_t limit) {
    std::vector<ModelFile> files(models.size());
    std::vector<Share> alone(models.size());
    uint64_t total = 0, fixed = 0, sharing = 0;
    const auto plan = [&](size_t i, uint64_t most) {
        EngineOptions options = models[i];
        if (!options.memory_limit) options.memory_limit = most;
        return plan_share(options, files[i]);
    };
    for (size_t i = 0; i < models.size(); ++i) {
        if (auto opened = files[i].open(models[i]); !opened) return opened.error();
        auto own = plan_share(models[i], files[i]);
        auto most = plan(i, limit);
        if (!own || !most) return own ? most.error() : own.error();
        alone[i] = *most;
        total += own->total;
        fixed += models[i].memory_limit ? own->total : own->fixed;
        sharing += !models[i].memory_limit;
    }
    if (total <= limit) return {};
    const uint64_t share = fixed < limit && sharing ? (limit - fixed) / sharing : 0;
    bool fit = share > 0;
    for (size_t i = 0; fit && i < models.size(); ++i) {
        auto with = plan(i, alone[i].fixed + share);
        fit = with && with->context == alone[i].context;
    }
    for (size_t i = 0; i < models.size(); ++i)
        if (!models[i].memory_limit) models[i].memory_limit = fit ? alone[i].fixed + share : limit;
    return {};
}

}  // namespace

}  // namespace detail

struct EnginePool::State {
    // A model, and what is known of its use.
    struct Member {
        std::unique_ptr<Engine::State> engine;
        uint64_t bytes = 0;      // while it is loaded
        bool wanted = false;     // to be loaded without a request
        uint64_t used_ns = 0;    // when it last had a request
        uint64_t loaded_ns = 0;  // since when it has its memory

        bool resident() const { return engine->backend != nullptr; }
        bool has_work() const { return engine->has_requests() || wanted; }
    };

    explicit State(const EnginePoolOptions& from) : options(from) {}
    ~State() { stop(); }

    Result<void> add(const EngineOptions& model);
    void stop();
    static void run_thread(void* self);
    bool work();
    bool step(Member& member, uint64_t now);
    bool make_room(const Member& member, uint64_t now);
    Member* next_to_go(const Member& member, uint64_t now);
    void unload(Member& member);
    void count_memory();

    const detail::Process process;
    EnginePoolOptions options;
    const std::shared_ptr<detail::Doorbell> doorbell = std::make_shared<detail::Doorbell>();
    std::vector<Member> members;
    std::atomic<uint64_t> used{0};
    detail::Thread thread;
    std::atomic<bool> stop_asked{false};
};

Result<void> EnginePool::State::add(const EngineOptions& model) {
    auto engine = Engine::State::open(model, doorbell);
    if (!engine) return engine.error();
    Member member;
    const detail::ModelFile& file = (*engine)->model->file();
    auto plan = detail::plan_cpu_backend(file.gguf, file.spec, file.tensors, (*engine)->sizes);
    if (!plan) return plan.error();
    member.bytes = plan->total();
    if (member.bytes > options.memory_limit)
        return detail::make_error(
            ErrorKind::out_of_memory,
            detail::format("memory_limit: %llu bytes; '%s' takes %llu",
                           static_cast<unsigned long long>(options.memory_limit),
                           (*engine)->model->info().id.c_str(),
                           static_cast<unsigned long long>(member.bytes)),
            {}, "memory_limit");
    member.engine = std::move(*engine);
    member.engine->unload();  // so that opening takes no more than one at a time
    uint64_t wanted = member.bytes;
    for (const Member& other : members) wanted += other.wanted ? other.bytes : 0;
    member.wanted = options.preload && wanted <= options.memory_limit;
    member.engine->awaited = member.wanted;
    members.push_back(std::move(member));
    return {};
}

// ---- The thread --------------------------------------------------------------------------------

void EnginePool::State::stop() {
    stop_asked.store(true, std::memory_order_release);
    doorbell->ring();
    thread.join();
}

void EnginePool::State::run_thread(void* self) {
    State& state = *static_cast<State*>(self);
    while (!state.stop_asked.load(std::memory_order_acquire)) {
        const uint32_t rings = state.doorbell->rings.load(std::memory_order_acquire);
        if (!state.work()) detail::wait_on(&state.doorbell->rings, rings, detail::kIdleNs);
    }
}

// A slice for each that has something to do; whether there was one.
bool EnginePool::State::work() {
    bool any = false;
    for (Member& member : members) {
        if (stop_asked.load(std::memory_order_acquire)) return false;
        any |= step(member, detail::monotonic_ns());
    }
    return any;
}

bool EnginePool::State::step(Member& member, uint64_t now) {
    if (!member.has_work()) {
        const uint64_t keep_ns = uint64_t{options.keep_loaded_ms} * 1'000'000;
        if (keep_ns && member.resident() && now - member.used_ns >= keep_ns) unload(member);
        return false;
    }
    member.used_ns = now;
    member.engine->scheduler.take_cancels();
    if (!member.has_work()) return true;  // nobody wants it any more
    if (!member.resident()) {
        if (!make_room(member, now)) return false;
        used.fetch_add(member.bytes, std::memory_order_relaxed);
        member.loaded_ns = now;
    }
    const auto done = member.engine->work(now + detail::kPoolSliceNs, detail::kNoLimit);
    if (!done || member.engine->loaded) member.wanted = member.engine->awaited = false;
    if (!member.resident()) count_memory();  // it could not be loaded
    return true;
}

bool EnginePool::State::make_room(const Member& member, uint64_t now) {
    while (used + member.bytes > options.memory_limit) {
        Member* next = next_to_go(member, now);
        if (!next) return false;
        unload(*next);
    }
    return true;
}

// One that has nothing to do, the one used longest ago; else one whose turn is over; else null.
EnginePool::State::Member* EnginePool::State::next_to_go(const Member& member, uint64_t now) {
    Member* best = nullptr;
    const auto order = [](const Member& one) {
        return std::pair(one.has_work(), one.has_work() ? one.loaded_ns : one.used_ns);
    };
    for (Member& one : members) {
        if (&one == &member || !one.resident()) continue;
        if (one.has_work() && now - one.loaded_ns < uint64_t{options.turn_ms} * 1'000'000) continue;
        if (!best || order(one) < order(*best)) best = &one;
    }
    return best;
}

void EnginePool::State::unload(Member& member) {
    member.engine->unload();
    member.wanted = member.engine->awaited = false;
    count_memory();
}

void EnginePool::State::count_memory() {
    uint64_t bytes = 0;
    for (const Member& member : members) bytes += member.resident() ? member.bytes : 0;
    used.store(bytes, std::memory_order_relaxed);
}

// ---- The handle --------------------------------------------------------------------------------

EnginePool::EnginePool(std::unique_ptr<State> state) : state_(std::move(state)) {}
EnginePool::EnginePool(EnginePool&& other) noexcept = default;
EnginePool& EnginePool::operator=(EnginePool&& other) noexcept = default;
EnginePool::~EnginePool() { detail::leave_to_parent(state_); }

Result<EnginePool> EnginePool::open(std::span<const EngineOptions> models,
                                    const EnginePoolOptions& options) {
    auto state = std::make_unique<State>(options);
    uint64_t& limit = state->options.memory_limit;
    if (!limit) limit = detail::usable_memory() / 8 * 7;
    std::vector<EngineOptions> own(models.begin(), models.end());
    if (auto shared = detail::share_memory(own, limit); !shared) return shared.error();
    for (const EngineOptions& model : own)
        if (auto added = state->add(model); !added) return added.error();
    return EnginePool(std::move(state));
}

Result<void> EnginePool::start() {
    if (state_->thread.joinable()) return {};
    state_->stop_asked.store(false, std::memory_order_release);
    auto thread = detail::Thread::start(State::run_thread, state_.get(), "valar-engines");
    if (!thread) return thread.error();
    state_->thread = std::move(*thread);
    return {};
}

void EnginePool::stop() { state_->stop(); }

std::vector<Responder*> EnginePool::responders() const {
    std::vector<Responder*> out;
    for (const auto& member : state_->members) out.push_back(member.engine.get());
    return out;
}

uint64_t EnginePool::memory_used() const { return state_->used.load(std::memory_order_relaxed); }

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
