#include "prologue.hpp"

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

// ---- For the handles -------------------------------------------------------------------------

// The one who steps, saves or restores.
Result<detail::Exclusive> Engine::State::take_turn(const char* who) {
    const char* why = thread.joinable() ? "the engine has a thread of its own since start()"
                      : stepping.exchange(true, std::memory_order_acquire)
                          ? "called while another step() is at work"
                          : nullptr;
    if (why) return detail::make_error(ErrorKind::invalid_request, std::string(who) + ": " + why);
    return detail::Exclusive(&stepping);
}

// Queues the prompt; a reply that was refused is finished.
Reply Engine::State::reply_to(Result<std::unique_ptr<detail::PreparedPrompt>> prompt) {
    auto reply = std::make_shared<detail::Mailbox>();
    reply->doorbell = doorbell;
    Result<void> good;
    auto id = detail::draw_id("resp_");
    if (!id) good = id.error();
    else reply->id = std::move(*id);
    if (good) good = prompt ? enqueue(std::move(*prompt), reply, false) : prompt.error();
    if (!good) {
        Outcome refused;
        refused.status = Status::failed;
        refused.error = std::move(good.error());
        (void)reply->put_outcome(std::move(refused));
    }
    return Reply(std::move(reply));
}

// What a save must share with this engine.
Result<detail::SaveHeader> Engine::State::save_header() {
    if (!model_fingerprint) {
        auto hash = detail::fingerprint(gguf);
        if (!hash) return hash.error();
        model_fingerprint = *hash;
    }
    detail::SaveHeader out;
    out.model = *model_fingerprint;
    out.precision = static_cast<uint32_t>(options.precision);
    out.kv_type = static_cast<uint32_t>(options.kv_type);
    out.page_tokens = options.page_tokens;
    out.page_bytes = backend->page_bytes();
    return out;
}

// Makes the cache know these pages, as many as there is room for.
void Engine::State::import_pages(std::span<const detail::Hash256> keys,
                                 std::span<const std::byte> bytes) {
    const size_t size = backend->page_bytes(), count = std::min(keys.size(), bytes.size() / size);
    std::vector<uint32_t> pages;
    for (size_t i = 0; i < count; ++i) {
        uint32_t page = pool.find(keys[i]);
        if (page != detail::PagePool::none) {
            pool.share(page);
        } else {
            if (pool.unused() == 0) break;
            page = pool.take();
            backend->import_page(page, bytes.data() + i * size);
            pool.set_key(page, keys[i], 0);
        }
        pages.push_back(page);
    }
    for (; !pages.empty(); pages.pop_back()) pool.drop(pages.back());
}

void Engine::State::run_thread(void* self) {
    State& state = *static_cast<State*>(self);
    while (!state.stop_asked.load(std::memory_order_acquire)) {
        const uint32_t rings = state.doorbell->rings.load(std::memory_order_acquire);
        auto more = state.work(detail::kNoLimit, detail::kNoLimit);
        if (more && *more) continue;
        detail::wait_on(&state.doorbell->rings, rings, detail::kIdleNs);
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
Engine::~Engine() = default;

Result<Engine> Engine::begin_open(const EngineOptions& options) {
    auto state = std::make_unique<State>();
    auto opened = state->open(options);
    if (!opened) return opened.error();
    return Engine(std::move(state));
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
    auto file = detail::open_model_file(options);
    if (!file) return file.error();
    auto spec = read_model_spec(*file);
    if (!spec) return spec.error();
    auto tensors = detail::bind_model_tensors(*file, *spec);
    if (!tensors) return tensors.error();
    auto chosen = detail::choose_backend_options(options, *file, *spec, *tensors);
    if (!chosen) return chosen.error();
    return detail::plan_cpu(*file, *spec, *tensors, *chosen);
}

Reply Engine::submit(const Request& request) {
    return state_->reply_to(state_->prepare_prompt(request));
}

Result<uint32_t> Engine::count_tokens(const Request& request) const {
    auto tokens = state_->make_prompt(request);
    if (!tokens) return tokens.error();
    return static_cast<uint32_t>(tokens->size());
}

Result<bool> Engine::step(int64_t budget_us) {
    auto turn = state_->take_turn("step()");
    if (!turn) return turn.error();
    const uint64_t budget_ns = static_cast<uint64_t>(std::max<int64_t>(budget_us, 0)) * 1000;
    return budget_us < 0 ? state_->work(detail::kNoLimit, detail::kNoLimit)
                         : state_->work(detail::monotonic_ns() + budget_ns, budget_ns);
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
    state_->stop_asked.store(true, std::memory_order_release);
    state_->doorbell->ring();
    state_->thread.join();
    state_->stop_asked.store(false, std::memory_order_release);
}

bool Engine::is_loaded() const { return state_->loaded.load(std::memory_order_acquire); }
float Engine::load_progress() const { return state_->progress.load(std::memory_order_relaxed); }
const ModelSpec& Engine::spec() const { return state_->spec; }
const Tokenizer& Engine::tokenizer() const { return *state_->tokenizer; }
Responder* Engine::responder() { return state_.get(); }

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
