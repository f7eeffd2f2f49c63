// >>engine
// Owns: a loaded model and the requests on it: queue and scheduling, batches, pages and the prefix
//       cache, step(), streaming, cancel.
// Assumes: one thread at a time calls step(); everything else comes from any thread.
// Promises: submit never fails (a refused request is a Reply that is finished with its error); an
//           answer is a function of file, request and options, whatever else runs beside it;
//           nothing blocks but wait() and stop(); after opening no memory grows with the load but
//           that of the requests themselves.
#pragma once

#include "api.hpp"
#include "backend/backend.hpp"
#include "tokenizer/tokenizer.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace valar {
inline namespace v1 {

/// What an engine is made of; what a caller types first stands first. Designated initialisers keep
/// the order of declaration, as C++ wants it: {.model_path = "m.gguf", .threads = 2} compiles, the
/// other way round it is an error. Where the order is in the way, assign the fields one by one.
struct EngineOptions {
    std::string model_path = {};            ///< a GGUF file (the first of a split one)
    std::vector<std::string> aliases = {};  ///< further ids that this model answers to
    std::string model_id = {};    ///< default: the file's general.name, else the file's name
    uint32_t context_tokens = 0;  ///< that a request may use; 0: the model's own, as memory allows
    int threads = -1;             ///< helpers beside the caller; -1: physical_cores() - 1; 0: none.
                                  ///< Single tokens use as many as are fastest, found by trying
    Precision precision = Precision::fast;
    KvType kv_type = KvType::f16;
    uint32_t max_queued = 1000;  ///< waiting requests; past it `overloaded`
    uint32_t step_tokens = 512;  ///< prompt tokens a batch at most, of all requests
    std::span<const std::byte> model_bytes = {};  ///< instead of a path; borrowed for its life
    GgufReader model_reader = {};                 ///< instead of a path
    std::string chat_template = {};               ///< Jinja or a known name (README)
    ParallelFor parallel_for = {};                ///< the host's job system instead of own threads
    LogSink log = {};
    uint32_t max_running = 16;    ///< requests computed side by side
    uint64_t memory_limit = 0;    ///< bytes of all that memory_plan() counts; what weights
                                  ///< and scratch leave is for keys and values. 0: those of two
                                  ///< full contexts, in half of what they leave of the system's
    uint32_t page_tokens = 16;    ///< positions a page of keys and values, a multiple of 16
    bool prefix_cache = true;     ///< keep what was computed for requests that begin alike
    bool share_prefixes = false;  ///< among organisations too: for a single tenant
    uint32_t standard_target_ms = 60'000;  ///< after this wait standard counts as asap
    uint32_t flex_target_ms = 300'000;     ///< after this wait flex counts as standard
    uint32_t max_wait_step_ms = 250;  ///< of a batch, about: so long does who comes meanwhile wait;
                                      ///< 0: only step_tokens limits it
    std::vector<Window> windows = {Window::asap, Window::standard, Window::flex};  ///< served here
    bool speculation = true;  ///< verify guesses from the text before: faster, the same answer
    Weights weights = Weights::packed;
    Allocator allocator = {};  ///< of all memory that memory_plan() counts; default: the system's
    bool show_schema = true;   ///< what Request::format wants also stands in the prompt
    std::string tool_format = {};  ///< how calls are written, by name (README); empty: found
};

namespace detail {
struct Mailbox;
}

/// The handle of one request. Movable; may outlive the Engine (then finished with `engine_closed`).
/// Dropping it cancels the request unless detach()ed. One made by hand is finished, with nothing.
/// Threads: one at a time.
class VALAR_API Reply {
public:
    Reply() = default;
    Reply(Reply&& other) noexcept;
    Reply& operator=(Reply&& other) noexcept;
    ~Reply();

    /// The next event, or nothing when there is none now. Never waits. Text that came since the
    /// last call comes as one delta of each item.
    std::optional<Event> poll();
    /// Waits for the end while somebody else steps (start(), another thread); false after
    /// timeout_ms (-1: no limit). Events stay to be polled.
    bool wait(int64_t timeout_ms = -1);
    bool finished() const;  ///< the outcome is there; events may be left to poll
    /// The outcome; only once finished(). Valid while the Reply lives.
    const Outcome& outcome() const;
    void cancel();  ///< at the next step; what came so far stays
    void detach();  ///< dropping this handle no longer cancels
    const std::string& id() const;

private:
    friend class Engine;
    friend class Conversation;
    explicit Reply(std::shared_ptr<detail::Mailbox> mailbox);
    std::shared_ptr<detail::Mailbox> mailbox_;
};

/// A loaded model that answers requests. Movable handle over an object with a stable address.
/// Threads: submit, count_tokens, responder, is_loaded, load_progress from any thread; step, start,
/// stop and the destructor from one at a time. step() after start() is an error, not a race.
/// Stack: 64 KiB do for every call of this library, a coroutine's too. begin_open, open and step take
/// 33, submit 30, and more as templates, schemas and patterns nest, until an error says so.
/// fork(): an engine, like a server and a store, stays with the process that opened it; a child may
/// exit, destroy its copies or start another program, and opens its own to work.
class VALAR_API Engine {
public:
    /// Loads the whole model. Errors name the file, key, tensor or option.
    static Result<Engine> open(const EngineOptions& options);
    /// Checks file and options, allocates; step() then loads in slices, requests may wait already.
    static Result<Engine> begin_open(const EngineOptions& options);
    /// What open() would take, without loading.
    static Result<MemoryPlan> memory_plan(const EngineOptions& options);

    Engine(Engine&& other) noexcept;
    Engine& operator=(Engine&& other) noexcept;
    ~Engine();  ///< unfinished replies end with `engine_closed`

    [[nodiscard]] Reply submit(const Request& request);
    /// Tokens of the prompt that this request makes. Errors: as of submit().
    Result<uint32_t> count_tokens(const Request& request) const;
    /// Works for about `budget_us` (stops at the first boundary past it; -1: until nothing is left
    /// to do): loads, computes, samples, emits. True while work is left. Errors: weights that
    /// cannot be read (every request ends with it); called after start(), or from two threads at
    /// once.
    Result<bool> step(int64_t budget_us = -1);
    /// Gives back the memory of weights, keys and values. What runs gives way and goes on with the
    /// same answer; a step() with a request loads again. Errors: after start(), beside a step().
    Result<void> unload();
    /// Own thread that steps whenever there is work, until stop().
    Result<void> start();
    void stop();  ///< returns when the thread has ended; unfinished requests stay

    bool is_loaded() const;
    float load_progress() const;  ///< 0..1
    const char* kernels() const;  ///< the table that computes, one of kernel_names()
    const ModelSpec& spec() const;
    const Tokenizer& tokenizer() const;
    /// The seam to a Server; lives as long as the engine.
    Responder* responder();

private:
    friend class Conversation;
    friend class EnginePool;
    struct State;
    explicit Engine(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

/// What a Conversation does when its context has no room for the next turn: refuse it
/// ("context_length_exceeded"), or forget the older half of its turns, again until there is room
/// (what is left has to be computed anew).
enum class WhenFull : uint8_t { refuse, drop_oldest_turns };

/// What a host and a model said, turn after turn. A turn is a request with all that was said before
/// it, so its answer is that of the same request by itself. Its keys and values stay in the prefix
/// cache until others need the room, so only what is new is computed, and a fork() shares them.
/// The engine must outlive it. Threads: one at a time; save() and restore() take their turn with
/// step(): they are an Error while it, or the thread of start(), is at work.
class VALAR_API Conversation {
public:
    /// `settings` is the request that every turn is made of: instructions, limits, sampling; its
    /// input, if there is any, is what was said before the first turn and is never forgotten.
    Conversation(Engine& engine, Request settings, WhenFull when_full = WhenFull::refuse);
    Conversation(Conversation&& other) noexcept;
    Conversation& operator=(Conversation&& other) noexcept;
    ~Conversation();

    /// The next turn. While the last one is not finished it is refused: "conversation_busy". An
    /// answer that was cut or cancelled counts as far as it came; a turn that failed, or was
    /// cancelled before its first word, was never said.
    [[nodiscard]] Reply say(std::string_view words);
    /// The same with items: results of the calls that the last answer made belong to its turn.
    [[nodiscard]] Reply say(std::vector<Item> items);
    /// What was said and is not forgotten, oldest first, without a turn that is not finished.
    std::span<const Item> items();
    uint32_t forgotten_turns() const;
    /// Another conversation that goes on from here. Error: "conversation_busy".
    Result<Conversation> fork();

    /// All of it as bytes, for a save game: settings and what was said and, with `pages`, the keys
    /// and values that the cache has of it (KvType and layers decide: 12 KiB a token and more), so
    /// that nothing needs to be computed again. Errors: "conversation_busy"; no memory; a model
    /// file that cannot be read.
    Result<std::vector<std::byte>> save(bool pages = true);
    /// What save() wrote. Errors (bad_data): a byte that is not as it was written; (unsupported):
    /// another version or model, or pages of an engine with other options.
    /// The checksum is against accidents: pages are believed, but only this conversation, its forks
    /// and others restored from the same bytes ever find them.
    static Result<Conversation> restore(Engine& engine, std::span<const std::byte> saved);

private:
    struct State;
    explicit Conversation(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

}  // namespace v1
}  // namespace valar
