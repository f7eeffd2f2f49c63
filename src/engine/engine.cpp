#include "prologue.hpp"

#include "base/text.hpp"
#include "engine/plan.hpp"
#include "engine/state.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {

// ---- The parts of an engine ------------------------------------------------------------------

Result<std::unique_ptr<Engine::State>> Engine::State::open(
    const EngineOptions& options, std::shared_ptr<detail::Doorbell> outer) {
    auto model = detail::LoadedModel::open(options);
    if (!model) return model.error();
    const detail::ModelFile& file = (*model)->file();
    auto sizes = detail::choose_backend_options(options, file);
    if (!sizes) return sizes.error();
    auto table = detail::choose_kernels();
    if (!table) return table.error();
    auto backend = detail::open_cpu_backend(file.gguf, file.spec, file.tensors, *sizes, *table);
    if (!backend) return backend.error();
    if (const std::string why = detail::why_slow(**table); !why.empty())
        options.log(LogLevel::warning, why);
    options.log(LogLevel::info, detail::explain_context(options, file.spec, sizes->max_positions));
    return std::make_unique<State>(options, std::move(*model), std::move(*backend), *sizes,
                                   (*table)->name, std::move(outer));
}

Engine::State::State(const EngineOptions& from, std::shared_ptr<const detail::LoadedModel> opened,
                     std::unique_ptr<Backend> device, const BackendOptions& chosen,
                     const char* table, std::shared_ptr<detail::Doorbell> outer)
    : options(from),
      kernels(table),
      model(std::move(opened)),
      sizes(chosen),
      backend(std::move(device)),
      prompts(*model, options, sizes.max_positions),
      desk(options, std::move(outer)),
      cache(options, sizes, model->spec(), backend),
      scheduler(options, sizes, *model, backend, cache, desk) {}

Engine::State::~State() {
    stop();
    desk.close();
    scheduler.fail_all(detail::engine_closed_error());
}

void Engine::State::stop() {
    stop_asked.store(true, std::memory_order_release);
    desk.doorbell().ring();
    thread.join();
}

std::vector<ModelInfo> Engine::State::models() const {
    ModelInfo info = model->info();
    info.ready = loaded || !awaited;
    if (!info.ready) info.progress = progress.load(std::memory_order_relaxed);
    return {std::move(info)};
}

Result<std::unique_ptr<Prepared>> Engine::State::prepare(const Request& request) {
    auto prompt = prompts.prepare(request);
    if (!prompt) return prompt.error();
    return std::unique_ptr<Prepared>(std::move(*prompt));
}

Result<void> Engine::State::submit(std::unique_ptr<Prepared> prepared, std::string id) {
    auto prompt = prompts.take_back(std::move(prepared));
    if (!prompt) return prompt.error();
    return enqueue(std::move(*prompt), desk.make_mailbox(std::move(id)), true);
}

Result<void> Engine::State::enqueue(detail::PromptPtr prompt, const detail::MailboxPtr& reply,
                                    bool known) {
    auto sequence = std::make_unique<detail::Sequence>(reply, std::move(prompt),
                                                       model->tokenizer());
    return desk.enqueue(std::move(sequence), known);
}

Reply Engine::State::reply_to(Result<detail::PromptPtr> prompt) {
    auto id = detail::draw_id("resp_");
    auto reply = desk.make_mailbox(id ? std::move(*id) : std::string());
    Result<void> queued;
    if (!id) queued = id.error();
    else queued = prompt ? enqueue(std::move(*prompt), reply, false) : prompt.error();
    if (!queued) {
        Outcome refused;
        refused.status = Status::failed;
        refused.error = std::move(queued.error());
        (void)reply->put_outcome(std::move(refused));
    }
    return Reply(std::move(reply));
}

namespace {

std::string shown_threads(const BackendOptions& sizes) {
    if (sizes.parallel_for.run) return "the host's threads";
    const int helpers = sizes.threads < 0 ? physical_cores() - 1 : sizes.threads;
    return helpers == 0 ? "1 thread" : std::to_string(helpers + 1) + " threads";
}

std::string shown_memory(const detail::ModelFile& file, const BackendOptions& sizes) {
    const auto plan = plan_cpu_backend(file.gguf, file.spec, file.tensors, sizes);
    if (!plan) return {};
    const auto mib = [](uint64_t bytes) { return std::to_string(bytes >> 20); };
    return detail::join({", ", mib(plan->total()), " MiB (weights ", mib(plan->weights),
                         ", keys and values ", mib(plan->kv), ", scratch ", mib(plan->scratch),
                         "; mapped ", mib(plan->mapped), ")"});
}

}  // namespace

// ---- The step (one thread at a time) ---------------------------------------------------------

Result<detail::Exclusive> Engine::State::take_turn(const char* who) {
    const char* why = thread.joinable() ? "the engine has a thread of its own since start()"
                      : stepping.exchange(true, std::memory_order_acquire)
                          ? "called while another step() is at work"
                          : nullptr;
    if (why) return detail::make_error(ErrorKind::invalid_request, std::string(who) + ": " + why);
    return detail::Exclusive(&stepping);
}

Result<bool> Engine::State::work(uint64_t deadline_ns, uint64_t budget_ns) {
    if (failure) return *failure;
    while (!loaded.load(std::memory_order_relaxed)) {
        auto done = load(std::min(deadline_ns, detail::monotonic_ns() + detail::kLookNs));
        if (!done) {
            options.log(LogLevel::error, done.error().message);
            if (reloads) {  // the next request may find room again
                backend.reset();
            } else {
                failure = done.error();
                desk.close();
            }
            scheduler.fail_all(done.error());
            return done.error();
        }
        if (!*done && time_is_up(deadline_ns)) return true;
    }
    while (scheduler.work(deadline_ns, budget_ns))
        if (time_is_up(deadline_ns)) return true;
    return false;
}

Result<bool> Engine::State::load(uint64_t deadline_ns) {
    const uint64_t now = detail::monotonic_ns();
    float part = 0;
    if (!backend) {
        const detail::ModelFile& file = model->file();
        auto table = detail::choose_kernels();
        if (!table) return table.error();
        auto opened = detail::open_cpu_backend(file.gguf, file.spec, file.tensors, sizes, *table);
        if (!opened) return opened.error();
        backend = std::move(*opened);
    }
    auto done = backend->load(deadline_ns > now ? (deadline_ns - now) / 1000 : 0, &part);
    if (!done) return done;
    progress.store(part, std::memory_order_relaxed);
    if (*done) {
        options.log(LogLevel::info,
                    detail::join({"loaded ", model->file().gguf.name(), ", ", shown_threads(sizes),
                                  shown_memory(model->file(), sizes), ", kernels ", kernels}));
        loaded.store(true, std::memory_order_release);
        awaited = false;
    }
    return done;
}

void Engine::State::unload() {
    if (!backend || failure) return;
    scheduler.pause();
    cache.forget();
    desk.count([&](ResponderStats& counts) { cache.report(&counts); });
    backend.reset();
    reloads = true;
    if (loaded.exchange(false, std::memory_order_acq_rel))
        options.log(LogLevel::info, detail::join({"let go ", model->file().gguf.name()}));
    progress.store(0, std::memory_order_relaxed);
}

bool Engine::State::has_requests() const {
    const ResponderStats stats = desk.stats();
    return stats.queued + stats.running > 0;
}

void Engine::State::run_thread(void* self) {
    State& state = *static_cast<State*>(self);
    while (!state.stop_asked.load(std::memory_order_acquire)) {
        const uint32_t rings = state.desk.doorbell().rings.load(std::memory_order_acquire);
        auto more = state.work(detail::kNoLimit, detail::kNoLimit);
        if (more && *more) continue;
        detail::wait_on(&state.desk.doorbell().rings, rings, detail::kIdleNs);
    }
}

// ---- The handles -----------------------------------------------------------------------------

Reply::Reply(std::shared_ptr<detail::Mailbox> mailbox) : mailbox_(std::move(mailbox)) {}
Reply::Reply(Reply&& other) noexcept = default;

Reply& Reply::operator=(Reply&& other) noexcept {
    std::swap(mailbox_, other.mailbox_);
    return *this;
}

Reply::~Reply() {
    if (mailbox_ && !mailbox_->detached) mailbox_->cancel();
}

std::optional<Event> Reply::poll() { return mailbox_ ? mailbox_->take() : std::nullopt; }
bool Reply::wait(int64_t timeout_ms) { return !mailbox_ || mailbox_->wait(timeout_ms); }
bool Reply::finished() const {
    return !mailbox_ || mailbox_->finished.load(std::memory_order_acquire);
}

const Outcome& Reply::outcome() const {
    static const Outcome none;
    return mailbox_ && mailbox_->outcome ? *mailbox_->outcome : none;
}

void Reply::cancel() {
    if (mailbox_) mailbox_->cancel();
}

void Reply::detach() {
    if (mailbox_) mailbox_->detached = true;
}

const std::string& Reply::id() const {
    static const std::string none;
    return mailbox_ ? mailbox_->id : none;
}

Engine::Engine(std::unique_ptr<State> state) : state_(std::move(state)) {}
Engine::Engine(Engine&& other) noexcept = default;
Engine& Engine::operator=(Engine&& other) noexcept = default;
Engine::~Engine() { detail::leave_to_parent(state_); }

Result<Engine> Engine::begin_open(const EngineOptions& options) {
    auto state = State::open(options);
    if (!state) return state.error();
    return Engine(std::move(*state));
}

Result<Engine> Engine::open(const EngineOptions& options) {
    auto engine = begin_open(options);
    while (engine && !engine->is_loaded()) {
        auto more = engine->step();
        if (!more) return more.error();
    }
    return engine;
}

Result<MemoryPlan> Engine::memory_plan(const EngineOptions& options) {
    detail::ModelFile file;
    if (auto opened = file.open(options); !opened) return opened.error();
    auto chosen = detail::choose_backend_options(options, file);
    if (!chosen) return chosen.error();
    return detail::plan_cpu_backend(file.gguf, file.spec, file.tensors, *chosen);
}

Reply Engine::submit(const Request& request) {
    return state_->reply_to(state_->prompts.prepare(request));
}

Result<uint32_t> Engine::count_tokens(const Request& request) const {
    auto tokens = state_->prompts.tokenize(request);
    if (!tokens) return tokens.error();
    return static_cast<uint32_t>(tokens->size());
}

Result<bool> Engine::step(int64_t budget_us) {
    auto turn = state_->take_turn("step()");
    if (!turn) return turn.error();
    state_->scheduler.take_cancels();
    if (!state_->backend && !state_->has_requests()) return false;
    const uint64_t budget_ns = static_cast<uint64_t>(std::max<int64_t>(budget_us, 0)) * 1000;
    return budget_us < 0 ? state_->work(detail::kNoLimit, detail::kNoLimit)
                         : state_->work(detail::monotonic_ns() + budget_ns, budget_ns);
}

Result<void> Engine::unload() {
    auto turn = state_->take_turn("unload()");
    if (!turn) return turn.error();
    state_->unload();
    return {};
}

Result<void> Engine::start() {
    if (state_->thread.joinable()) return {};
    state_->stop_asked.store(false, std::memory_order_release);
    auto thread = detail::Thread::start(State::run_thread, state_.get(), "valar-engine");
    if (!thread) return thread.error();
    state_->thread = std::move(*thread);
    return {};
}

void Engine::stop() {
    state_->stop();
    state_->stop_asked.store(false, std::memory_order_release);
}

bool Engine::is_loaded() const { return state_->loaded.load(std::memory_order_acquire); }
float Engine::load_progress() const { return state_->progress.load(std::memory_order_relaxed); }
const char* Engine::kernels() const { return state_->kernels; }
const ModelSpec& Engine::spec() const { return state_->model->spec(); }
const Tokenizer& Engine::tokenizer() const { return state_->model->tokenizer(); }
Responder* Engine::responder() { return state_.get(); }

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
