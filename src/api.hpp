// >>api
// Owns: the request, item, response and event types of the HTTP surfaces, to and from JSON; the
//       validation that needs no model; the Responder interface, the only seam between the wire and
//       inference.
// Assumes: JSON that was parsed by >>json.
// Promises: a request that validates holds only what this version can do; what it cannot do was
//           refused with 400 and the dotted path of the field, never silently ignored.
#pragma once

#include "json.hpp"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {

/// Who speaks. In requests all six; answers are the assistant's.
enum class Role : uint8_t { system, developer, user, assistant, tool, function };

/// A piece of an item's content; all of them are text in this version.
struct ContentPart {
    enum class Kind : uint8_t { input_text, output_text, refusal };
    Kind kind = Kind::input_text;
    std::string text = {};
};

/// One item of a conversation: what was said, by whom.
struct VALAR_API Item {
    // clang-format off
    enum class Kind : uint8_t { message, reasoning, function_call, function_call_output,
                                custom_tool_call, custom_tool_call_output };
    Kind                     kind      = Kind::message;
    Role                     role      = Role::user;
    std::vector<ContentPart> content   = {};  ///< messages, reasoning, outputs of calls
    std::string              call_id   = {};  ///< calls and their outputs
    std::string              name      = {};  ///< calls
    std::string              arguments = {};  ///< calls: JSON in a string, or custom input
    // clang-format on

    static Item message(Role role, std::string text);
    /// What a call gave, as input of the next request.
    static Item output(const Item& call, std::string text);
    std::string text() const;  ///< all parts of content, joined
    bool is_call() const { return kind == Kind::function_call || kind == Kind::custom_tool_call; }
};

/// What a request asks: a text (one user message), or items.
struct Input {
    Input() = default;
    Input(const char* words) : text(words) {}
    Input(std::string words) : text(std::move(words)) {}
    Input(std::string_view words) : text(words) {}
    Input(std::vector<Item> turns) : items(std::move(turns)) {}

    std::string text = {};  ///< used when items is empty
    std::vector<Item> items = {};
    bool empty() const { return text.empty() && items.empty(); }
};

/// When an answer is wanted: ahead of everything; fair among themselves; when nothing else waits.
/// Waiting makes a request more urgent, so that nothing starves.
enum class Window : uint8_t { asap, standard, flex };

/// The form that an answer must have. One of `schema`, `regex`, `one_of` and `gbnf` says it; none:
/// free text. Decoding is held to it: what ends by itself has the form, whatever the model is.
struct Format {
    Json schema = {};                         ///< JSON Schema; {}: any JSON; null: none
    std::string regex = {};                   ///< of the whole text
    std::vector<std::string> one_of = {};     ///< one of these texts
    std::string gbnf = {};                    ///< a grammar as llama.cpp writes it, from its `root`
    bool strict = true;                       ///< a schema that cannot be promised is refused
    std::string name = {}, description = {};  ///< of the schema, for the model
    bool empty() const {
        return schema.is_null() && regex.empty() && one_of.empty() && gbnf.empty();
    }
};

/// Something that the model may call: the answer then holds an item with its name and arguments.
struct Tool {
    std::string name = {};  ///< 1 to 64 of a-z A-Z 0-9 _ -
    std::string description = {};
    Json parameters = {};  ///< JSON Schema of the arguments; null: any object
    bool strict = true;    ///< arguments fit the schema; else they are a JSON object
    bool custom = false;   ///< called with a text, not with arguments
    Format format = {};    ///< of that text: a regex or GBNF
};

/// Which tools must or may be called.
struct ToolChoice {
    enum class Mode : uint8_t { automatic, none, required };
    Mode mode = Mode::automatic;
    std::vector<std::string> names = {};  ///< these alone; none: all
};

/// What a model that can think may: none; 64, 256, 1024, 4096, 16384 tokens of it.
enum class Effort : uint8_t { none, minimal, low, medium, high, xhigh };

/// A prompt as it is, past the chat template. Its text, that of the input, may spell control tokens.
/// Errors: beside a format, tools or an effort; a token out of the vocabulary; a suffix where the
/// model has no marks for a gap.
struct RawPrompt {
    std::vector<int32_t> tokens = {};  ///< ids in place of the text; none: the text
    std::string suffix = {};           ///< what comes after the answer, which fills the gap
};

/// A request for one answer, in C++ or from the body of POST /v1/responses, whose fields have these
/// names. What is absent takes the model's own default. Designated initialisers follow this order.
struct Request {
    std::string model = {};         ///< empty: the responder's only or first model
    std::string instructions = {};  ///< becomes the first system message
    Input input = {};
    std::optional<uint32_t> max_output_tokens = {};  ///< none: until the context is full
    std::optional<double> temperature = {};          ///< 0..2; 0 is greedy
    std::optional<double> top_p = {};                ///< 0..1; 0 keeps only the most likely token
    std::optional<int64_t> seed = {};                ///< none: drawn at acceptance
    uint32_t top_logprobs = 0;                       ///< 0..20 alternatives of each token
    bool logprobs = false;                           ///< return log-probabilities
    std::string prompt_cache_key = {};               ///< prefixes of one key are kept together
    std::string user = {};
    std::vector<std::pair<std::string, std::string>> metadata = {};
    std::optional<uint32_t> top_k = {};  ///< 0: no limit
    std::optional<double> min_p = {};    ///< 0..1; 0: no limit
    std::string organisation = {};       ///< set by the server from the key
    Window window = Window::standard;
    std::vector<std::string> stop = {};  ///< ends the answer before the first of these
    /// Added to the logits of these tokens: -100..100.
    std::vector<std::pair<int32_t, double>> logit_bias = {};
    double presence_penalty = 0;    ///< -2..2: off the logit of every token the answer has
    double frequency_penalty = 0;   ///< -2..2: the same, times how often it has it
    double repetition_penalty = 1;  ///< 0.1..10: divides logits above 0, multiplies those below, of
                                    ///< every token of prompt and answer
    bool background = false;        ///< of the server: answered at once with 202
    bool store = true;              ///< of the server: kept once answered
    bool stream = false;            ///< of the server: answered in events
    std::string previous_response_id = {};  ///< of the server: its turns come first
    Format format = {};                     ///< of the answer's text
    std::vector<Tool> tools = {};
    ToolChoice tool_choice = {};
    bool parallel_tool_calls = true;              ///< false: at most one call
    std::optional<uint32_t> max_tool_calls = {};  ///< 1 or more
    std::optional<Effort> effort = {};            ///< none: as the model has it
    bool prompt_progress = false;                 ///< tell how far the prompt is read
    std::string conversation = {};      ///< of the server: its items come first, these are added
    std::optional<RawPrompt> raw = {};  ///< in place of what a chat template would make
};

/// How far a response is. It never moves back.
enum class Status : uint8_t { pending, running, completed, failed, cancelled };
constexpr bool is_terminal(Status status) { return status >= Status::completed; }

/// Tokens in and out.
struct Usage {
    uint32_t input_tokens = 0;
    uint32_t cached_tokens = 0;  ///< of the input, found in the prefix cache
    uint32_t output_tokens = 0;
    uint32_t reasoning_tokens = 0;  ///< of the output
};

/// One generated token with its natural log-probability under the model's own distribution.
struct TokenLogprob {
    struct Alternative {
        std::string bytes = {};
        float logprob = 0;
    };
    std::string bytes = {};  ///< of the token; may be part of a character
    float logprob = 0;
    std::vector<Alternative> top = {};  ///< most likely first
    uint32_t item = 0;                  ///< of Outcome::items: the one that it is part of
};

/// Where the time of one request went.
struct Timings {
    uint64_t queue_us = 0, prefill_us = 0, decode_us = 0;
};

/// The end of a response. All text is valid UTF-8.
struct Outcome {
    Status status = Status::completed;  ///< terminal
    std::string text = {};  ///< of all messages; a Responder without items sets it alone
    bool cut = false;       ///< ended by max_output_tokens or by a full context
    Usage usage = {};
    Timings timings = {};
    std::vector<TokenLogprob> logprobs = {};  ///< when asked for, a token each
    std::optional<Error> error = {};          ///< when failed or cancelled
    std::string stopped_by = {};              ///< the one of Request::stop that ended it
    /// Thoughts, messages and calls, in their order. A call that was cut is not among them.
    std::vector<Item> items = {};
};

/// How far a prompt is read, in tokens.
struct PromptProgress {
    uint32_t total = 0, processed = 0;
    uint32_t cached = 0;  ///< of the processed, found in the prefix cache
};

/// What happened to a response, in order: started once; prompt_progress where it was asked for; of
/// one item after the other item_begun, its deltas (text of a message, of a thought; arguments of a
/// call), item_ended; finished once.
struct Event {
    // clang-format off
    enum class Kind : uint8_t { started, text_delta, finished,
                                item_begun, reasoning_delta, arguments_delta, item_ended,
                                prompt_progress };
    // clang-format on
    Kind kind = Kind::started;
    std::string text = {};                        ///< of a delta: whole characters
    std::shared_ptr<const Outcome> outcome = {};  ///< of finished
    /// Of a delta, when asked for: the tokens since the one before; the text may be empty.
    std::vector<TokenLogprob> logprobs = {};
    uint32_t index = 0;            ///< of the item in Outcome::items
    Item item = {};                ///< of item_begun: without its text; of item_ended: all of it
    PromptProgress progress = {};  ///< of prompt_progress

    /// The text of a text_delta, else nothing. Borrowed from the event.
    std::optional<std::string_view> text_delta() const {
        if (kind != Kind::text_delta) return std::nullopt;
        return std::string_view(text);
    }
    /// The call that is complete with this event, else null. Borrowed from the event.
    const Item* call() const {
        return kind == Kind::item_ended && item.is_call() ? &item : nullptr;
    }
};

/// A model that a Responder serves.
struct ModelInfo {
    std::string id;
    std::vector<std::string> aliases = {};
    int64_t created = 0;  ///< unix seconds
    std::string owned_by = "valar";
    uint32_t context_tokens = 0;
    std::vector<Window> windows = {Window::asap, Window::standard, Window::flex};
    bool image = false, tools = false, thinking = false;  ///< its template knows of them
    bool ready = true;   ///< false while it loads: it is listed, and requests for it wait
    float progress = 1;  ///< of loading, 0..1
};

/// A request that a Responder accepts, with all that it resolved. It is as large as its prompt.
class VALAR_API Prepared {
public:
    virtual ~Prepared() = default;
    std::string model;  ///< the id of the model that will answer
    uint32_t input_tokens = 0;
    double temperature = 1;  ///< effective
    double top_p = 1;        ///< effective
    int64_t seed = 0;        ///< effective
    /// Where a Responder wants to know its own again: something that is its alone.
    virtual const void* owner() const { return nullptr; }
};

/// How busy a Responder is, and what it did so far.
struct ResponderStats {
    uint32_t queued = 0, running = 0;
    uint64_t completed = 0, failed = 0, cancelled = 0;
    uint64_t input_tokens = 0, output_tokens = 0;
    uint64_t cached_tokens = 0;                   ///< of the input, found in the prefix cache
    uint32_t pages = 0;                           ///< of keys and values, in all
    uint32_t pages_used = 0;                      ///< by running requests
    uint32_t pages_cached = 0, pages_shared = 0;  ///< used by none, kept for prefixes; by several
    uint64_t preempted = 0;                       ///< times a request gave way to be resumed later
    uint64_t batches = 0, batch_rows = 0;         ///< computed: forward passes, and tokens in them
    uint64_t drafted_tokens = 0, accepted_tokens = 0;  ///< of those: guessed, and guessed right
    uint64_t constrained_tokens = 0, masks = 0;        ///< written under a grammar; made for those
    uint64_t queue_us = 0, prefill_us = 0, decode_us = 0;  ///< sums over finished requests
};

/// Who is told that a response has events: one call, from any thread and without locks held.
struct ReadyListener {
    void (*call)(void* context, const std::string& id) = nullptr;
    void* context = nullptr;
};

/// Something that answers requests: the Engine, a scripted fake in tests, a proxy.
/// Threads: every member from any thread. It outlives the Server that uses it.
class VALAR_API Responder {
public:
    virtual ~Responder() = default;
    virtual std::vector<ModelInfo> models() const = 0;
    /// Every refusal that needs the model comes from here: unknown model (not_found, code
    /// "model_not_found", param "model"), context too small (invalid_request,
    /// "context_length_exceeded", param "input"), template errors.
    virtual Result<std::unique_ptr<Prepared>> prepare(const Request& request) = 0;
    /// Queues it under an unused id. Errors: `overloaded`; `closed`; another Responder prepared it.
    virtual Result<void> submit(std::unique_ptr<Prepared> prepared, std::string id) = 0;
    /// The next event of `id`, if it is known and has one now. Taking `finished` forgets the id.
    virtual std::optional<Event> poll(const std::string& id) = 0;
    /// Ends it at the next step with status cancelled; unknown and finished ids are ignored.
    virtual void cancel(const std::string& id) = 0;
    virtual ResponderStats stats() const = 0;
    /// One listener, which is called when `id` has events after poll said it had none. One without
    /// a function takes it away and waits for calls under way.
    virtual void on_ready(const ReadyListener& listener) = 0;
};

/// In which of two dialects a server speaks: its own, or the one that OpenAI's clients expect. They
/// differ in names of states and in what they take; README.md lists the differences.
enum class Dialect : uint8_t { valar, openai };

}  // namespace v1
}  // namespace valar
