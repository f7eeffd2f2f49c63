#pragma once

#include "backend/internal.hpp"
#include "digest_internal.hpp"
#include "engine/limits.hpp"
#include "engine/mailbox.hpp"
#include "engine/pages.hpp"
#include "sampler_internal.hpp"
#include "template/template.hpp"
#include "unicode_internal.hpp"

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

// ---- Who steps, and what a save begins with ----------------------------------------------------

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

struct SaveHeader {
    char magic[8] = {'v', 'a', 'l', 'a', 'r', 's', 'a', 'v'};
    uint32_t version = 2, numerics = kNumerics;
    Hash256 model;
    uint32_t precision = 0, kv_type = 0, page_tokens = 0;
    uint32_t first_page = 0, pages = 0, unused = 0;
    uint64_t page_bytes = 0, json_bytes = 0;
};
static_assert(sizeof(SaveHeader) == 88 && std::is_trivially_copyable_v<SaveHeader>);

// ---- A request being answered ----------------------------------------------------------------

// What prepare() found out; becomes a Sequence.
struct PreparedPrompt final : Prepared {
    std::vector<Token> tokens;
    std::vector<Hash256> page_keys;  // of the prompt's full pages
    Hash256 root;                    // the key that stands before the first page's
    uint64_t group = 0;              // of prompt_cache_key; 0: none
    std::string organisation;
    Window window = Window::standard;
    SamplerOptions sampling;
    uint32_t max_output = 0;
    bool logprobs = false;
    uint32_t top_logprobs = 0;
    std::vector<std::string> stop;
};

// Organisations take turns: the one served longest ago is next.
struct Turn {
    uint64_t served = 0;
    uint32_t members = 0;  // requests that wait or run
};

inline constexpr const char* kWindowNames[] = {"asap", "standard", "flex"};

struct Sequence {
    std::shared_ptr<Mailbox> reply;
    std::unique_ptr<PreparedPrompt> prompt;
    std::vector<Token> tokens;  // the prompt and what was drawn
    uint32_t computed = 0;      // positions whose keys and values are there
    uint32_t reached = 0;       // the most that it ever was: what is beyond counts as
                                // cached when the cache has it
    uint32_t rows = 0;          // in the batch under way
    int32_t logits = -1;        // the first of the batch's that are for it, if any
    Token draft[kMaxDraft];     // the last of its rows: guesses of what comes next
    uint32_t drafted = 0;
    uint32_t draft_most = kFirstDraft;  // follows what is accepted
    uint32_t credit = 0;                // for wasted rows, in 1 / kDraftCredit
    std::vector<uint32_t> pages;
    uint32_t passed = 0;             // of them, given back: no window reaches there any more
    std::vector<Hash256> page_keys;  // of the pages that its tokens fill, when needed
    uint32_t kept = 0;               // pages that the cache knows
    bool over = false;               // its reply has the end; its pages are still taken
    std::unordered_map<std::string, Turn>::value_type* turn = nullptr;
    uint64_t ticket = 0;  // order of arrival
    uint32_t rank = 0;    // 0 first; see rank_of
    Sampler sampler;
    Detokenizer detokenizer;
    std::string held;  // text that may begin a stop string
    Outcome outcome;
    uint64_t queued_ns = monotonic_ns(), started_ns = 0, first_token_ns = 0;
    uint64_t waiting_ns = queued_ns, waited_ns = 0;  // since when it waits; how long before

    Sequence(std::shared_ptr<Mailbox> to, std::unique_ptr<PreparedPrompt> from,
             const Tokenizer& tokenizer)
        : reply(std::move(to)),
          prompt(std::move(from)),
          tokens(std::move(prompt->tokens)),
          page_keys(std::move(prompt->page_keys)),
          sampler(prompt->sampling),
          detokenizer(tokenizer) {
        outcome.usage.input_tokens = credit = length();
    }
    uint32_t length() const { return static_cast<uint32_t>(tokens.size()); }
    uint32_t left() const { return length() - computed; }
};

Result<Gguf> open_model_file(const EngineOptions& options);
uint32_t count_window_pages(const ModelSpec& spec, uint32_t page_tokens);
uint32_t count_held_pages(uint32_t positions, uint32_t window_pages, uint32_t batch_rows,
                          uint32_t page_tokens);
Result<BackendOptions> choose_backend_options(const EngineOptions& options, const Gguf& gguf,
                                              const ModelSpec& spec, const ModelTensors& tensors);
Result<Hash256> fingerprint(const Gguf& gguf);

Error engine_closed_error();
Error refuse_field(const char* param, std::string message, const char* code = "invalid_value");
Hash256 root_key(const EngineOptions& options, const std::string& organisation,
                 std::string_view salt);
uint64_t group_of(const Hash256& root, const std::string& prompt_cache_key);
void extend_page_keys(std::vector<Hash256>& keys, const Hash256& root,
                      std::span<const Token> tokens, uint32_t page_tokens, size_t count);

uint32_t find_draft(std::span<const Token> tokens, uint32_t most, Token* out);
uint32_t rank_of(const Sequence& sequence, const EngineOptions& options, uint64_t now);

}  // namespace detail
}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {

struct Engine::State final : Responder {
    using MailboxPtr = std::shared_ptr<detail::Mailbox>;
    using SequencePtr = std::unique_ptr<detail::Sequence>;

    // Set by open(), then constant.
    EngineOptions options;
    Gguf gguf;
    ModelSpec spec;
    detail::ModelTensors tensors;
    ModelInfo info;
    uint32_t context = 0, step_tokens = 0, max_logit_rows = 0;
    uint32_t window_pages = 0;        // full pages that a row may see; UINT32_MAX: all
    detail::SamplerOptions sampling;  // where a request says nothing
    std::optional<Tokenizer> tokenizer;
    std::optional<ChatTemplate> chat_template;
    std::shared_ptr<detail::Doorbell> doorbell = std::make_shared<detail::Doorbell>();

    // Of whoever steps.
    std::unique_ptr<Backend> backend;
    std::vector<SequencePtr> waiting, running;
    std::vector<BatchRow> batch;  // under way unless empty
    size_t untaken = 0;           // last of running, with logits of a done batch
    detail::PagePool pool;
    std::unordered_map<std::string, detail::Turn> turns;  // of those that wait or run
    uint64_t serve_clock = 0, ticket_clock = 0;
    uint64_t batch_ns = 0, row_ns = 0;  // spent on the batch; a row takes, about
    std::pair<Token, float> top[detail::kMaxLogprobs];
    std::atomic<bool> loaded{false}, stepping{false};
    std::atomic<float> progress{0};
    std::optional<Error> failure;                      // nothing works any more
    std::optional<detail::Hash256> model_fingerprint;  // once asked for
    detail::Thread thread;
    std::atomic<bool> stop_asked{false};

    mutable std::mutex mutex;  // guards what follows
    std::vector<SequencePtr> arrivals;
    uint32_t waiting_count = 0;  // waiting.size()
    bool closed = false;
    ResponderStats counts;                              // all but queued
    std::unordered_map<std::string, MailboxPtr> by_id;  // those submitted through Responder

    std::mutex listener_mutex;
    std::condition_variable listener_idle;
    void (*listener)(void* context, const std::string& id) = nullptr;
    void* listener_context = nullptr;
    uint32_t listener_calls = 0;

    ~State() override;
    Result<void> open(const EngineOptions& from);

    std::vector<ModelInfo> models() const override { return {info}; }
    Result<std::unique_ptr<Prepared>> prepare(const Request& request) override;
    Result<void> submit(std::unique_ptr<Prepared> prepared, std::string id) override;
    std::optional<Event> poll(const std::string& id) override;
    void cancel(const std::string& id) override;
    ResponderStats stats() const override;
    void on_ready(void (*ready)(void* context, const std::string& id), void* context) override;

    Result<std::unique_ptr<detail::PreparedPrompt>> prepare_prompt(const Request& request,
                                                                   std::string_view salt = {});
    Result<std::vector<Token>> make_prompt(const Request& request) const;
    std::string refused_window() const;
    Result<void> enqueue(std::unique_ptr<detail::PreparedPrompt> prompt, const MailboxPtr& reply,
                         bool known);
    MailboxPtr find(const std::string& id) const;
    void announce(const detail::Mailbox& reply);
    uint32_t retry_after_s() const;

    bool time_is_up(uint64_t deadline_ns) const {
        return detail::monotonic_ns() >= deadline_ns || stop_asked.load(std::memory_order_relaxed);
    }
    Result<bool> work(uint64_t deadline_ns, uint64_t budget_ns);
    Result<bool> load(uint64_t deadline_ns);
    bool work_on_batch(uint64_t deadline_ns, uint64_t budget_ns);
    void compute(uint64_t deadline_ns);
    void drop_cancelled();
    void take_arrivals();
    void admit();
    SequencePtr* next_waiting();
    bool make_place(const detail::Sequence& next);
    bool fits(const detail::Sequence& next) const;
    uint32_t pages_for(uint32_t positions) const;
    uint32_t held_for(uint32_t positions) const;
    void start_sequence(SequencePtr sequence);
    void preempt_last();
    void release_pages(detail::Sequence& sequence);
    void leave(detail::Sequence& sequence);
    void sweep();
    void join_cached(detail::Sequence& sequence);
    void keep_pages(detail::Sequence& sequence);
    size_t count_cached(std::span<const detail::Hash256> keys, size_t computed, size_t held) const;
    void drop_passed(detail::Sequence& sequence);
    void extend_keys(detail::Sequence& sequence, size_t count) const;
    uint32_t prompt_rows(bool answers, uint64_t budget_ns) const;
    void share_prompt_rows(uint32_t budget);
    detail::Sequence* next_prompt() const;
    bool computes_the_same(const detail::Sequence& prompt) const;
    void reserve_pages(size_t index);
    void build_batch(uint64_t budget_ns);
    void draft(detail::Sequence& sequence, uint32_t* spare);
    void add_rows(detail::Sequence& sequence, uint32_t* wanted);
    void take_results(detail::Sequence& sequence);
    Token take_token(detail::Sequence& sequence, uint32_t logits_row);
    void count_drafts(detail::Sequence& sequence, uint32_t drafted, uint32_t accepted);
    bool pass_text(detail::Sequence& sequence, std::string_view text);
    void emit_text(detail::Sequence& sequence, std::string_view text);
    void add_logprob(detail::Sequence& sequence, std::span<const float> logits, Token token);
    void finish(detail::Sequence& sequence, Status status, std::optional<Error> error = {});
    void fail_all(const Error& error);
    static void run_thread(void* self);

    Result<detail::Exclusive> take_turn(const char* who);
    Reply reply_to(Result<std::unique_ptr<detail::PreparedPrompt>> prompt);
    Result<detail::SaveHeader> save_header();
    void import_pages(std::span<const detail::Hash256> keys, std::span<const std::byte> bytes);
};

}  // namespace v1
}  // namespace valar
