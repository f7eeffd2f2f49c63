#pragma once

#include "api/surface.hpp"
#include "api_internal.hpp"
#include "digest_internal.hpp"
#include "http/internal.hpp"
#include "server/batches.hpp"
#include "server/server.hpp"
#include "server/webhooks.hpp"
#include "server/words.hpp"
#include "unicode_internal.hpp"

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// A bucket that holds a minute's requests and fills evenly.
struct ServerBucket {
    double left = 0;         // requests that may come now
    uint64_t filled_ns = 0;  // when that was so
    /// One of them; else the seconds until there is one.
    uint32_t take(uint32_t per_minute, uint64_t now_ns);
};

struct ServerKey {
    Hash256 hash;  // of the secret
    std::string id, organisation;
    uint32_t per_minute = 0;
    ServerBucket bucket;
};

inline constexpr uint32_t server_guesses_a_minute = 20;

/// Requests without a known key, by the address that they come from; of IPv6 by its network (64
/// bits), of which one client may have all. As large as it ever gets: of the addresses that share a
/// row the one that was not seen for longest is forgotten.
class ServerGuesses {
public:
    uint32_t take(std::string_view client, uint64_t now_ns);

private:
    static constexpr size_t rows = 1024, places = 4;
    struct Entry {
        uint64_t address = 0;  // of its digest
        ServerBucket bucket;
    };
    std::vector<Entry> entries_;
};

inline constexpr size_t server_workers = 2;
inline constexpr uint32_t server_tick_ms = 100;          // how exact sync_timeout_ms is
inline constexpr uint64_t server_get_body_bytes = 4096;  // tolerated, and not read
inline constexpr uint64_t server_expire_every_ns = 60'000'000'000;
inline constexpr uint64_t server_look_ns = 1'000'000'000;
inline constexpr size_t server_min_secret = 16;
inline constexpr size_t server_max_client_id = 128;            // of a request, given by its client
inline constexpr size_t server_shown_bytes = 200;              // of a path in a log line or message
inline constexpr int server_client_left = 499;                 // in the log only, as nginx has it
inline constexpr uint32_t server_max_retry_s = 60;             // advised to a client
inline constexpr size_t server_max_key_length = 255;           // of an idempotency key
inline constexpr uint64_t server_trouble_ns = 60'000'000'000;  // between two lines on one trouble
inline constexpr size_t server_list_default = 20, server_list_most = 100;
inline constexpr size_t server_max_turns = 1000;     // of a chain of previous responses
inline constexpr size_t server_most_new_items = 20;  // of a conversation, in one request
inline constexpr uint32_t server_max_attempts = 2;   // to answer one request, after crashes
inline constexpr size_t server_recovering = 16;      // taken up again at a time
inline constexpr uint64_t server_max_key_file = 16 << 20;
inline constexpr uint64_t server_beat_ns = 10'000'000'000;  // between comments of a stream
inline constexpr size_t server_most_unsent = 256 << 10;     // of a stream; then it waits
inline constexpr size_t server_most_event_log = 4 << 20;    // to be read from its start again

/// A field of a query: checked and documented by its row.
struct ServerParameter {
    const char* name;
    const char* about;
    std::span<const std::string_view> words = {};  // one of these; none: an integer or a text
    int64_t least = 0, most = 0;                   // of the integer; 0: a text
    bool openai = false;                           // of that dialect alone
};
inline constexpr std::string_view server_orders[] = {"asc", "desc"};
inline constexpr std::string_view server_switch[] = {"true", "false"};
inline constexpr ServerParameter server_live = {"live", "Only whether the process answers.",
                                                server_switch};
inline constexpr ServerParameter server_limit = {
    "limit", "How many there may be; 20 by default.", {}, 1, server_list_most};
inline constexpr ServerParameter server_after = {"after", "The id behind which to go on."};
inline constexpr ServerParameter server_order = {"order", "By age; desc by default.",
                                                 server_orders};
inline constexpr ServerParameter server_stream = {
    "stream", "As server-sent events.", server_switch, 0, 0, true};
inline constexpr ServerParameter server_starting_after = {
    "starting_after",
    "The sequence_number behind which a stream is to go on.",
    {},
    0,
    INT64_MAX,
    true};
inline constexpr size_t server_batches_default = 25;
inline constexpr ServerParameter server_batches_limit = {
    "limit", "How many there may be; 25 by default.", {}, 1, 200};
inline constexpr ServerParameter server_after_id = {"after_id", "The id behind which to go on."};
inline constexpr ServerParameter server_before_id = {"before_id", "The id before which to end."};
inline constexpr ServerParameter server_key = {
    "idempotency_key", "Only the one that this key of the caller reserved."};

/// How many values were up to each bound of a fixed table, and to the one before it not; the last
/// count is of those above all bounds.
inline constexpr size_t server_most_bounds = 16;
struct ServerHistogram {
    std::span<const double> bounds;  // ascending
    uint64_t counts[server_most_bounds + 1] = {};
    double sum = 0;
    void add(double value, uint64_t times = 1);
};
inline constexpr double server_wait_bounds[] = {0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1,
                                                2.5,   5,     10,   30,   60,  120,  300, 600};
inline constexpr double server_token_bounds[] = {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025,
                                                 0.05,   0.1,   0.25,   0.5,   1};
static_assert(std::size(server_wait_bounds) <= server_most_bounds &&
              std::size(server_token_bounds) <= server_most_bounds);

/// What metrics tell of times.
struct ServerFigures {
    ServerHistogram request_seconds{server_wait_bounds};
    ServerHistogram queue_seconds{server_wait_bounds};
    ServerHistogram first_token_seconds{server_wait_bounds};
    ServerHistogram token_seconds{server_token_bounds};
    void add(const Outcome& outcome);
};

/// What was used, and by whom for what: in one hour, by all that ended in it.
struct ServerUsageCounters {
    uint64_t requests = 0, failed = 0, cancelled = 0;  // of the requests: failed, cancelled
    uint64_t input_tokens = 0, cached_tokens = 0, output_tokens = 0, reasoning_tokens = 0;
};
struct ServerUsageKey {
    std::string organisation, key, model, window;
    bool operator<(const ServerUsageKey& other) const {  // libc++ 14 has no <=> of strings
        return std::tie(organisation, key, model, window) <
               std::tie(other.organisation, other.key, other.model, other.window);
    }
};
struct ServerUsageHour {
    std::map<ServerUsageKey, ServerUsageCounters> rows = {};
    bool changed = false;  // since it was kept
    bool kept = false;     // has a record
};

/// What GET /v1/usage and those below it show.
enum class ServerUsageView : uint8_t { total, breakdown, activity, timeseries };
inline constexpr std::string_view server_usage_ranges[] = {"24h", "7d", "30d"};
inline constexpr std::string_view server_usage_names[] = {"model", "window", "key", "day"};
inline constexpr ServerParameter server_range = {
    "range", "The hours up to now, or the days; 24h by default.", server_usage_ranges};
inline constexpr ServerParameter server_by = {
    "by", "What is told apart; model and window by default.", server_usage_names};

/// A conversation as it is kept.
struct ServerConversation {
    Json created_at, metadata;
    std::vector<Json> items;  // in their long form, each with an id
};

struct ServerLoop : HttpHandler {
    struct Exchange;
    using Handle = void (ServerLoop::*)(Exchange&, HttpRequest&);

    /// What a method does, and what GET /openapi.json says of it.
    struct Operation {
        Handle handle = nullptr;
        const char* name = nullptr;
        const char* about = nullptr;
        const char* answer = nullptr;  // its schema; null: text
        std::span<const ServerParameter> query = {};
        bool waits = false;          // for a response to end, which may take too long
        const char* body = nullptr;  // its schema, where the surface does not tell it
    };

    struct Route {
        std::string_view path;         // ending in '/', unless it is that: an argument follows
        std::string_view suffix = {};  // behind the argument
        std::string_view middle = {};  // between the argument and an item's id
        Operation get = {}, post = {}, remove = {};
        bool slashes = false;  // in the argument
        bool open = false;     // needs no key
        bool openai = false;   // in that dialect alone
        bool batch = false;    // its body is many requests
        const Surface* surface = nullptr;
        std::string allowed() const;  // the header Allow
        bool takes_argument() const { return path.size() > 1 && path.back() == '/'; }
        std::string shown() const;  // the path, as a template
        const Operation* operation(std::string_view method) const;
    };
    static const Route routes[];
    static std::span<const Route> all_routes();

    /// Of an exchange, what few have and what only its end brings.
    struct ExchangeExtra {
        std::string item;                            // behind the argument of the path
        std::string client_request_id, cors_origin;  // the latter to be named in the reply
        std::string ignored;                         // fields of the body that nothing reads
        // for the log line
        std::string error_code, error_message;
        uint64_t ended_ns = 0;  // of one that is logged later
        Usage usage = {};
        Timings timings = {};
    };

    /// A request that is not answered yet. Thousands may wait for long.
    struct Exchange {
        uint64_t number = 0;  // in http
        std::string request_id, method, path, argument, query;
        std::string organisation = "default";
        std::string key_id = "-";  // none was checked
        ServerKey* key = nullptr;  // only in on_head: keys may be replaced
        const Route* route = nullptr;
        const Operation* operation = nullptr;
        uint64_t started_ns = 0;
        std::string response_id;  // that it asks for or waits for
        bool keyed = false;       // an idempotency key came with it
        bool replayed = false;
        bool removes = false;  // waits for the end, then for the record to go
        bool begun = false;    // has the head of a stream
        bool follows = false;  // and its events as they come; else all at the end
        AnswerForm form = {};
        std::string client = {};  // for the log line
        std::unique_ptr<ExchangeExtra> more = {};

        const ExchangeExtra& extra() const {
            static const ExchangeExtra none;
            return more ? *more : none;
        }
        ExchangeExtra& add_extra() {
            if (!more) more = std::make_unique<ExchangeExtra>();
            return *more;
        }
    };

    /// The events of a response that is streamed as it is made. Until something happens there is
    /// only what its writer is made from: thousands may wait for long.
    struct Stream {
        std::shared_ptr<const std::string> head;  // as the store has it
        std::string request;                      // that too, without its input
        uint32_t input_tokens = 0;
        bool include_usage = false;
        bool kept = false;                         // may be asked for again
        std::unique_ptr<EventWriter> events = {};  // once something happened
        std::string log = {};                      // then all that they were
    };

    /// A response that is not terminal.
    struct Live {
        enum class State : uint8_t {
            reserving,  // not kept yet
            waiting,    // kept, not submitted: after a restart
            working,    // a Responder has it
            finishing,  // the outcome is there and is being kept
            parked,     // left for the next start
        };
        State state = State::reserving;
        bool running = false;
        bool background = false;
        bool resumable = false;  // is taken up again after a crash
        bool webhook = false;    // its end is to be delivered
        bool item = false;       // of a batch
        bool begun = true;       // the last of its attempts is this process's
        uint32_t attempts = 1;   // as the store has it
        std::string organisation;
        uint64_t owner = 0;  // the exchange whose end cancels it; 0: none
        Responder* responder = nullptr;
        std::vector<uint64_t> waiters;                // exchanges that want the terminal object
        std::unique_ptr<StoredResponse> unkept = {};  // the record, when `store` is false
        std::unique_ptr<Stream> stream = {};          // when it was asked for as one
        const Surface* surface = nullptr;
        std::string echo = {};                // of that
        std::unique_ptr<Exchange> left = {};  // its owner, that is gone: logged with the outcome
    };

    struct Job;
    template <class Kind>
    using JobPtr = std::unique_ptr<Kind>;

    /// Work for a worker, or a change for the store, and what comes back. Each kind adds what it
    /// needs; send_job and on_kept know the kind, so that a step gets the one it was written for.
    struct Job {
        virtual ~Job() = default;
        ServerLoop* loop = nullptr;                                 // for what comes from the store
        void (*work)(ServerLoop& loop, Job& job) = nullptr;         // on a worker
        void (*next)(ServerLoop& loop, JobPtr<Job> job) = nullptr;  // then on the loop
        uint64_t exchange = 0;                                      // that asked for it; 0: none
        std::optional<Error> error = {};
    };

    struct AcceptJob : Job {
        std::string body = {};    // of the request
        std::string key = {};     // the idempotency key's header
        int keys = 0;             // and how many of them came
        std::string key_id = {};  // of the API key
        StoredResponse stored = {};
        bool store = true;                       // as the request has it
        std::optional<Reservation> replay = {};  // of the idempotency key
        Responder* responder = nullptr;
        std::unique_ptr<Prepared> prepared = {};
        std::string text = {};  // for a caller that does not wait for the end: the object, or what
                                // its stream begins with
        AnswerForm form = {};
        std::unique_ptr<Stream> stream = {};
        std::string conversation_last = {};
        std::string ignored = {};  // fields of the body
        Json raw = {};
        Result<std::string> hook = std::string();  // what is kept for its webhook; empty: none
    };

    struct FinishJob : Job {
        StoredResponse stored = {};
        bool store = true;
        std::shared_ptr<const Outcome> outcome = {};
        AnswerForm form = {};  // of the request
        Result<std::string> answer = std::string();
        std::string conversation = {};  // that has not got it yet
        std::vector<Json> said = {};    // items for that: of the request, of the answer
        ServerUsageKey used = {};       // to be counted under
    };

    struct RecoverJob : Job {
        std::string organisation = {}, id = {}, model = {};
        Responder* responder = nullptr;
        std::unique_ptr<Prepared> prepared = {};
    };

    /// A response of before a restart, whose model none here is.
    struct Orphan {
        std::string model;
        uint64_t until_ns = 0;  // then it fails
    };

    /// What ends with an answer to its exchange.
    struct AnswerJob : Job {
        int status = 200;
        std::string text = {};
    };

    struct ShowJob : AnswerJob {
        std::string organisation = {}, id = {};
        bool running = false;  // how far a live response is
        bool only_background = false;
        AnswerForm form = {};
    };

    struct ListJob : AnswerJob {
        std::string organisation = {};
        std::vector<std::pair<std::string, bool>> ids = {};  // each with `running`
        bool more = false;                                   // there are older ones
    };

    struct ItemsJob : AnswerJob {
        std::string organisation = {}, id = {}, query = {};
    };

    struct ConversationJob;
    using ConversationApply = Result<void> (*)(ConversationJob& job, ServerConversation& now);
    struct ConversationJob : AnswerJob {
        std::string organisation = {}, id = {}, item = {}, query = {}, body = {};
        ConversationApply apply = nullptr;
        bool changes = false;
        std::shared_ptr<const std::string> changed = {};  // what is to be kept
        JobPtr<FinishJob> finish = {};                    // of the response that it waits for
    };
    struct ConversationStep;

    struct RemoveJob : AnswerJob {
        std::string organisation = {}, id = {};
        std::shared_ptr<const std::string> undelivered = {};  // of its webhook, which outlives it
    };

    /// Many requests, accepted at once. Its items wait in the store, server_batch_part to a record, and
    /// become responses, a few at a time. `states`: a letter an item, of server_batch_states; what of
    /// it is not kept yet is told by the responses.
    struct Batch {
        std::string id, organisation, shown;  // as a list shows it
        size_t count = 0;
        std::string states;      // nothing once all have ended
        std::vector<bool> gone;  // records of items that are erased: all of them have ended
        size_t next = 0;         // none before it waits
        size_t live = 0;         // items in work
        size_t left = 0;         // that have not ended
        bool feeding = false;
        bool cancelled = false;
        bool changed = false;  // since it was kept
        int64_t ended_at_ms = 0;
    };

    struct BatchJob : AnswerJob {
        std::string organisation = {}, body = {}, key = {}, key_id = {};
        int keys = 0;
        bool begun = false, whole = false;
        BatchBody read = {};
        std::unordered_set<std::string> names = {};  // custom ids
        std::string listed = {};                     // the same, a line each
        std::string part = {};
        size_t checked = 0, parts = 0;
        Sha256 hash = {};
        int64_t created_at = 0;
        bool replay = false;  // of an idempotency key: only what the client sent is checked
        Batch batch = {};
        StoredResponse stored = {};     // what is to be kept before it goes on
        size_t refused_hooks = 0;       // webhooks that cannot be used
        std::optional<Error> why = {};  // of the first of those
    };

    struct BatchShowJob : AnswerJob {
        std::string organisation = {}, id = {}, states = {}, custom_id = {};
        Json shown = {};
        bool cancelled = false;
    };

    struct FeedJob : Job {
        std::string organisation = {}, id = {};  // of the batch
        size_t first = 0, most = 0;              // for an exchange the one that it ends
        struct Item {
            StoredResponse response;
            std::string hook;  // what is kept for its webhook; empty: none
        };
        std::vector<Item> items = {};
    };

    struct BatchSaveJob : Job {
        std::string id = {}, states = {};
        bool cancels = false;  // its exchange wants to see it
    };

    struct UsageJob : AnswerJob {
        std::string organisation = {}, query = {};
        ServerUsageView view = ServerUsageView::total;
    };

    struct UsageSaveJob : Job {
        int64_t hour = 0;
    };

    struct CountJob : AnswerJob {
        std::string organisation = {}, body = {};
        AnswerForm form = {};
    };

    Process process;
    ServerOptions options;  // without secrets
    std::atomic<bool> has_keys = false;
    std::mutex keys_mutex;  // guards next_keys
    std::vector<ServerKey> next_keys;
    std::atomic<bool> keys_changed = false;  // next_keys are to be taken
    std::vector<Responder*> responders;
    std::unique_ptr<Store> own_store;
    Store* store = nullptr;
    std::optional<HttpServer> http;

    // of the loop thread
    std::vector<ServerKey> keys;  // by their hash
    ServerGuesses guesses;
    uint64_t unknown_keys = 0, limited_guesses = 0;  // requests refused with 401 or 429; with 429
    std::unordered_map<uint64_t, Exchange> exchanges;
    std::unordered_map<std::string, Live> live;
    std::deque<std::pair<uint64_t, uint64_t>> timeouts;  // of waiting exchanges, soonest first
    std::deque<std::pair<uint64_t, uint64_t>> beats;     // of streams, as timeouts
    std::deque<std::string> recoverable;                 // waiting, oldest first
    std::unordered_map<std::string, std::deque<JobPtr<ConversationJob>>> conversations;  // changing
    std::vector<JobPtr<FinishJob>> unsaved;  // outcomes that the store had no room for
    std::map<std::string, Orphan> orphans;   // by id; queued, too
    mutable std::mutex batch_mutex;  // guards batches for workers; the loop thread changes them
    std::unordered_map<std::string, Batch> batches;
    std::vector<std::string> batch_order;  // oldest first
    std::vector<Batch*> active_batches;    // that have not ended
    size_t items_queued = 0;               // of queued: items of batches
    uint64_t items_ended = 0;              // since the start
    size_t recovering = 0;                 // of the recoverable, on their way
    size_t finishing = 0;
    size_t queued = 0;        // live and not running
    double finish_gap_s = 1;  // between two ends, on average
    uint64_t last_finish_ns = 0;
    uint64_t next_expiry_ns = 0;
    uint64_t next_look_ns = 0;     // for what takes a second
    uint64_t store_failed_ns = 0;  // since when; 0: it takes changes
    uint64_t next_store_line_ns = 0;
    bool drain_begun = false;
    bool end_told = false;
    std::vector<JobPtr<Job>> outgoing;  // for the workers, handed over once a turn
    uint8_t random[1024] = {};          // drawn from the system at once
    size_t random_used = sizeof random;
    bool listening = false;                                    // to the Responders
    std::map<std::pair<std::string, int>, uint64_t> answered;  // by route and status
    ServerFigures figures;
    double started_s = 0;  // unix time
    uint64_t replayed = 0;
    Webhooks webhooks = Webhooks(this);

    std::atomic<bool> stopping = false;
    std::atomic<uint32_t> storing = 0;        // changes under way
    std::atomic<uint32_t> store_retry_s = 0;  // to be advised while the store fails; grows

    std::mutex jobs_mutex;
    std::condition_variable jobs_waiting;
    std::deque<JobPtr<Job>> jobs;
    bool ending = false;
    Thread workers[server_workers];

    /// What went wrong on our side, and is not for clients to read.
    struct Trouble {
        uint64_t count = 0;
        uint64_t untold = 0;  // of them, since the last line
        uint64_t told_ns = 0;
    };
    std::mutex usage_mutex;  // guards used_hours: the loop thread changes them, workers read
    std::map<int64_t, ServerUsageHour> used_hours;

    mutable std::mutex trouble_mutex;
    std::map<std::pair<std::string, ErrorKind>, Trouble> troubles;  // by where it came from

    std::mutex inbox_mutex;
    std::vector<JobPtr<Job>> inbox_jobs;
    std::vector<std::string> inbox_ready;   // ids with events
    std::atomic<uint32_t> inbox_count = 0;  // ever put in

    ~ServerLoop() override;
    Result<void> start();
    bool step(int timeout_ms);

    // http's calls
    std::optional<HttpReply> on_head(HttpRequest& request) override;
    void on_request(HttpRequest&& request) override;
    void on_closed(uint64_t number) override;
    HttpReply on_error(const HttpRequest& request, int status, std::string_view code,
                       std::string_view message) override;
    HttpReply on_full(bool no_descriptor) override;
    void on_sent(uint64_t number) override;
    void on_tick() override;
    void on_drained() override;

    // checks of a head, in the order in which on_head runs them
    std::string make_request_id();
    void find_route(Exchange& exchange);
    Result<void> check_host(const HttpRequest& request, Exchange& exchange);
    Result<void> check_proxy(const HttpRequest& request, Exchange& exchange);
    Result<void> check_origin(const HttpRequest& request, Exchange& exchange);
    Result<void> check_key(const HttpRequest& request, Exchange& exchange);
    Result<void> find_key(const HttpRequest& request, Exchange& exchange);
    void set_keys(std::vector<ServerKey> next);
    void take_keys();
    Result<void> check_route(const HttpRequest& request, Exchange& exchange);
    Result<void> check_method(const HttpRequest& request, Exchange& exchange);
    Result<void> check_size(const HttpRequest& request, Exchange& exchange);
    Result<void> check_rate(const HttpRequest& request, Exchange& exchange);
    Result<void> check_type(const HttpRequest& request, Exchange& exchange);

    uint64_t body_limit(const HttpRequest& request, const Exchange& exchange) const {
        if (request.method != "POST") return server_get_body_bytes;
        return options.max_body_bytes *
               (exchange.route && exchange.route->batch ? server_batch_scale : 1);
    }

    // routes
    void get_page(Exchange& exchange, HttpRequest& request);
    void get_health(Exchange& exchange, HttpRequest& request);
    std::optional<Error> unhealthy() const;
    void get_openapi(Exchange& exchange, HttpRequest& request);
    void openapi_work(AnswerJob& job);
    void get_metrics(Exchange& exchange, HttpRequest& request);
    void get_models(Exchange& exchange, HttpRequest& request);
    void get_model(Exchange& exchange, HttpRequest& request);
    void post_response(Exchange& exchange, HttpRequest& request);
    void post_count(Exchange& exchange, HttpRequest& request);
    void get_responses(Exchange& exchange, HttpRequest& request);
    void get_response(Exchange& exchange, HttpRequest& request);
    void delete_response(Exchange& exchange, HttpRequest& request);
    void post_cancel(Exchange& exchange, HttpRequest& request);
    void get_input_items(Exchange& exchange, HttpRequest& request);
    void post_compact(Exchange& exchange, HttpRequest& request);
    void post_conversation(Exchange& exchange, HttpRequest& request);
    void get_conversation(Exchange& exchange, HttpRequest& request);
    void update_conversation(Exchange& exchange, HttpRequest& request);
    void delete_conversation(Exchange& exchange, HttpRequest& request);
    void get_items(Exchange& exchange, HttpRequest& request);
    void post_items(Exchange& exchange, HttpRequest& request);
    void get_item(Exchange& exchange, HttpRequest& request);
    void delete_item(Exchange& exchange, HttpRequest& request);
    template <ServerUsageView view>
    void get_usage(Exchange& exchange, HttpRequest&) {
        send_usage(exchange, view);
    }
    void post_batch(Exchange& exchange, HttpRequest& request);
    void get_batches(Exchange& exchange, HttpRequest& request);
    void get_batch(Exchange& exchange, HttpRequest& request);
    void get_batch_item(Exchange& exchange, HttpRequest& request);
    void post_batch_cancel(Exchange& exchange, HttpRequest& request);

    // replies
    HttpReply make_reply(const Exchange& exchange, int status, std::string body,
                         HttpHeaders headers = {});
    Json make_error_body(const Exchange& exchange, const Error& error) const;
    HttpReply make_error_reply(Exchange& exchange, const Error& error, HttpHeaders headers = {});
    HttpReply make_preflight_reply(const Exchange& exchange, const HttpRequest& request);
    void answer(Exchange& exchange, HttpReply reply);
    void answer(Exchange& exchange, int status, std::string body);
    void refuse(Exchange& exchange, const Error& error, HttpHeaders headers = {});
    void note_trouble(const char* from, const Error& error, const std::string& of = {});
    Error store_error(const Error& error);
    void note_error(Exchange& exchange, const Error& error) const;
    void log_exchange(const Exchange& exchange, int status);
    void log_left(Live& entry, const Outcome* outcome);
    void log_line(LogLevel level, Json line, const Usage& usage, const Timings& timings) const;
    void say(LogLevel level, const Json& line) const;
    uint32_t retry_after_s() const;
    std::string metrics_text() const;

    // jobs
    template <auto step, class Kind>
    static void take_step(ServerLoop& loop, JobPtr<Job> job) {
        (loop.*step)(JobPtr<Kind>(static_cast<Kind*>(job.release())));
    }
    /// `work` on a worker, then `next` on the loop.
    template <auto work, auto next, class Kind>
    void send_job(JobPtr<Kind> job) {
        job->work = [](ServerLoop& loop, Job& one) { (loop.*work)(static_cast<Kind&>(one)); };
        job->next = &take_step<next, Kind>;
        outgoing.push_back(std::move(job));
    }
    /// What a change of the store ends with: `next` on the loop, with the store's error if any.
    template <auto next, class Kind>
    StoreDone on_kept(JobPtr<Kind> job) {
        job->next = &take_step<next, Kind>;
        return when_kept(std::move(job));
    }
    StoreDone when_kept(JobPtr<Job> job);
    void hand_over();
    void run_jobs();
    static void on_ready(void* context, const std::string& id);
    template <class Add>
    void send_to_loop(Add add);
    void take_inbox();
    Exchange* find_exchange(uint64_t number);
    void answer_job(JobPtr<AnswerJob> job);

    // accepting
    std::optional<StoredResponse> find_record(const std::string& organisation,
                                              const std::string& id,
                                              bool conversation = false) const;
    Responder* find_responder(const std::string& model) const;
    Result<void> put_references(const std::string& organisation, const Surface* surface, Json* body,
                                Json* sent) const;
    Result<void> add_previous(const std::string& organisation, Request* request, Json body,
                              std::string* last) const;
    Result<void> read_key(AcceptJob& job, const Json& body, const Request& request) const;
    static Result<std::string> reservation_of(int keys, std::string_view given,
                                              const std::string& key_id);
    Result<Request> read_request(const Json& body, AnswerForm* form, SurfaceBody* read) const;
    Result<std::unique_ptr<Prepared>> prepare(const std::string& organisation, Json body,
                                              Request* request, Responder** responder,
                                              std::string* last) const;
    void count_work(CountJob& job);
    Result<void> accept(AcceptJob& job);
    Result<void> make_record(AcceptJob& job, const Request& request);
    void accept_work(AcceptJob& job);
    void accept_admit(JobPtr<AcceptJob> job);
    void accept_done(JobPtr<AcceptJob> job);
    void replay(Exchange& exchange, const Reservation& reservation);
    void take_back(const std::string& id, uint64_t exchange_number, Error error);
    void wait_for(Exchange& exchange, const std::string& id, Live& entry);
    void begin(JobPtr<AcceptJob> job);

    // conversations
    void send_conversation(Exchange& exchange, HttpRequest& request, ConversationApply apply,
                           bool changes);
    void send_conversation(JobPtr<ConversationJob> job);
    void conversation_work(ConversationJob& job);
    void conversation_keep(JobPtr<ConversationJob> job);
    void conversation_kept(JobPtr<ConversationJob> job);
    void conversation_done(JobPtr<ConversationJob> job);
    void extend_conversation(JobPtr<FinishJob> finish);
    void create_work(ConversationJob& job);
    void create_keep(JobPtr<ConversationJob> job);
    void create_done(JobPtr<ConversationJob> job);
    Result<void> add_conversation(const std::string& organisation, Json* body,
                                  std::string* last) const;

    // batches
    Result<void> batch_begin(BatchJob& job);
    Result<void> batch_check(BatchJob& job, size_t place);
    Result<void> batch_check_params(BatchJob& job, size_t place, Json params);
    void batch_keep_part(BatchJob& job);
    void batch_end(BatchJob& job);
    void batch_work(BatchJob& job);
    void batch_next(JobPtr<BatchJob> job);
    void batch_kept(JobPtr<BatchJob> job);
    void batch_refuse(JobPtr<BatchJob> job);
    void batch_free(BatchJob& job);
    void batch_replay(JobPtr<BatchJob> job);
    Batch* find_batch(const std::string& organisation, const std::string& id);
    Batch* batch_of_item(const std::string& id, size_t* place);
    bool item_waits(const std::string& id);  // is no response yet
    void show_batch(Exchange& exchange, const Batch& batch);
    void show_batch_work(BatchShowJob& job);
    void find_item_work(BatchShowJob& job);
    void find_item_done(JobPtr<BatchShowJob> job);
    std::optional<StoredResponse> find_waiting(const std::string& organisation,
                                               const std::string& id) const;
    void feed_batches();
    void feed_work(FeedJob& job);
    void feed_done(JobPtr<FeedJob> job);
    void item_added(JobPtr<RecoverJob> job);
    void item_ended(const std::string& id, Status status);
    bool end_waiting(Exchange& exchange);
    void set_state(Batch& batch, size_t place, char state);
    void save_batch(Batch& batch, uint64_t exchange = 0);
    void batch_saved(JobPtr<BatchSaveJob> job);
    void look_after_batches();
    void expire_batches();
    void recover_kept(std::vector<StoredResponse>* left);
    bool recover_batch(const StoredResponse& stored);

    // usage
    void send_usage(Exchange& exchange, ServerUsageView view);
    void usage_work(UsageJob& job);
    ServerUsageKey usage_key(const ResponseRecord& record) const;
    void count_usage(const FinishJob& job);
    void save_usage();
    void usage_saved(JobPtr<UsageSaveJob> job);
    void expire_usage();
    void recover_usage(const StoredResponse& kept);

    // working and finishing
    void take_events(const std::string& id);
    void cancel(const std::string& id, Live& entry);
    void park(const std::string& id, Live& entry);
    void finish(const std::string& id, Live& entry, std::shared_ptr<const Outcome> outcome);
    void finish_work(FinishJob& job);
    void finish_keep(JobPtr<FinishJob> job);
    void finish_done(JobPtr<FinishJob> job);
    void save_unsaved();
    void remove(Exchange& exchange, const std::string& id);
    void remove_work(RemoveJob& job);
    void remove_keep(JobPtr<RemoveJob> job);
    void remove_done(JobPtr<RemoveJob> job);

    // streams
    Result<void> read_stream(Exchange& exchange) const;
    HttpHeaders stream_headers(const Exchange& exchange) const;
    void end_stream(Exchange& exchange, std::string text);
    std::unique_ptr<EventWriter> begin_events(const AnswerForm& form,
                                              const ResponseRecord& record) const;
    std::unique_ptr<EventWriter> begin_events(const std::string& id, const Live& entry) const;
    EventWriter& events_of(const std::string& id, Live& entry);
    void join_stream(Exchange& exchange, const std::string& id, Live& entry,
                     const std::string* opening = nullptr);
    void send_events(Live& entry);
    bool is_behind(const Live& entry);
    void beat(uint64_t now_ns);

    // stopping
    Result<void> check_stopping(const HttpRequest& request, Exchange& exchange);
    void begin_drain();
    void break_off(const std::string& id, Live& entry);

    // after a restart
    void recover_all();
    void recover_some();
    void recover_work(RecoverJob& job);
    void recover_keep(JobPtr<RecoverJob> job);
    void recover_done(JobPtr<RecoverJob> job);
    void add_orphan(const std::string& id, const std::string& model);
    void look_after_orphans(uint64_t now_ns);
    void look_after_store(uint64_t now_ns);
    size_t waiting() const { return queued - orphans.size() - items_queued; }
    void leave_queue(Live& entry);

    // reading
    void show(Exchange& exchange, const std::string& id, int unfinished_status,
              bool only_background = false);
    void show_work(ShowJob& job);
    std::vector<std::string> keyed(const Exchange& exchange, std::string_view key) const;
    void list_work(ListJob& job);
    void items_work(ItemsJob& job);
    std::string render_live(const StoredResponse& stored, bool running) const;
};

bool server_answers_to(const ModelInfo& model, const std::string& id);
/// The address that a request comes from; "-": none is known. `trust_proxy`: the last one that a
/// proxy in front names, which is the one that it saw itself.
std::string server_client(const HttpRequest& request, bool trust_proxy);
/// A query for the log: values that are words or numbers, of the fields that the route has.
std::string server_shown_query(std::string_view query, std::span<const ServerParameter> known);

Result<Json> server_parameter(std::string_view query, const ServerParameter& row);
/// One page of items, newest first unless the query asks otherwise.
Result<std::string> server_page_of(std::vector<Json> items, std::string_view query);
Error server_no_response(std::string_view id);
Error server_field(const char* code, const char* param, std::string message);
ResponseRecord server_record(const StoredResponse& stored, Status status);
std::string server_head(const ResponseRecord& record);
Result<void> server_hide_token(std::string* body, const Request& request);
std::pair<int, std::string> server_key_headers(const HttpRequest& request);
Json server_batch(const std::string& id, size_t count, int64_t created_at, std::string_view label);
Json server_batch_request();
Json server_batch_request_status();
/// With one response, and with none: for their schema.
std::vector<Json> server_usage_samples(ServerUsageView view);
std::shared_ptr<const std::string> server_shared(std::string text);
Error server_not_background();
/// Of a response in a list.
inline constexpr std::string_view server_left_out[] = {"input", "instructions", "tools"};
Json server_list(std::vector<Json> data, bool more);
Json server_health();
Json server_model_list(Json data);
Json server_model_json(const ModelInfo& model, const std::string& id);
Json server_deleted(const std::string& id);
Json server_count(const Surface* surface, uint32_t tokens);
Json server_conversation(const std::string& id, const ServerConversation& conversation);
Json server_deleted_conversation(const std::string& id);
/// OpenAPI 3.1 of what a server with these options serves. `keyed`: it has API keys.
Json server_openapi(Dialect dialect, bool keyed);

Error server_option(const char* name, std::string message);
Hash256 server_secret_hash(std::string_view secret);
Result<std::vector<ServerKey>> server_keys(const std::vector<ApiKey>& given);
Result<void> server_check_options(const ServerOptions& options);
HttpOptions server_http_options(const ServerOptions& options);

}  // namespace detail
}  // namespace v1
}  // namespace valar
