#pragma once

#include "api/surface.hpp"
#include "api_internal.hpp"
#include "digest_internal.hpp"
#include "http/internal.hpp"
#include "server/server.hpp"
#include "server/words.hpp"
#include "unicode_internal.hpp"

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

struct ServerKey {
    Hash256 hash;  // of the secret
    std::string id, organisation;
    uint32_t per_minute = 0;
    double tokens = 0;       // requests that it may make now
    uint64_t filled_ns = 0;  // when that was so
};

inline constexpr size_t server_workers = 2;
inline constexpr uint32_t server_tick_ms = 100;          // how exact sync_timeout_ms is
inline constexpr uint64_t server_get_body_bytes = 4096;  // tolerated, and not read
inline constexpr uint64_t server_expire_every_ns = 60'000'000'000;
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
inline constexpr ServerParameter server_key = {
    "idempotency_key", "Only the one that this key of the caller reserved."};

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
        bool waits = false;  // for a response to end, which may take too long
    };

    struct Route {
        std::string_view path;         // ending in '/', unless it is that: an argument follows
        std::string_view suffix = {};  // behind the argument
        std::string_view middle = {};  // between the argument and an item's id
        Operation get = {}, post = {}, remove = {};
        bool slashes = false;  // in the argument
        bool open = false;     // needs no key
        bool openai = false;   // in that dialect alone
        const Surface* surface = nullptr;
        std::string allowed() const;  // the header Allow
        bool takes_argument() const { return path.size() > 1 && path.back() == '/'; }
        std::string shown() const;  // the path, as a template
    };
    static const Route routes[];
    static std::span<const Route> all_routes();

    /// A request that is not answered yet.
    struct Exchange {
        uint64_t number = 0;  // in http
        std::string request_id, client_request_id, method, path, argument, item, query;
        std::string organisation = "default";
        std::string key_id = "open";
        std::string cors_origin;  // to be named in the reply
        ServerKey* key = nullptr;
        const Route* route = nullptr;
        Handle handle = nullptr;
        uint64_t started_ns = 0;
        std::string response_id;  // that it asks for or waits for
        bool keyed = false;       // an idempotency key came with it
        bool replayed = false;
        bool removes = false;  // waits for the end, then for the record to go
        AnswerForm form = {};
        bool begun = false;        // has the head of a stream
        bool follows = false;      // and its events as they come; else all at the end
        std::string ignored = {};  // fields of the body that nothing reads
        Usage usage = {};          // for the log line
        Timings timings = {};
    };

    /// The events of a response that is streamed as it is made.
    struct Stream {
        std::unique_ptr<EventWriter> events;
        bool kept = false;  // may be asked for again
        bool told = false;  // some of them
        std::string log = {};
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
        std::string organisation;
        bool running = false;
        bool background = false;
        bool resumable = false;  // is taken up again after a crash
        uint32_t attempts = 1;   // as the store has it
        bool begun = true;       // the last of them is this process's
        uint64_t owner = 0;      // the exchange whose end cancels it; 0: none
        Responder* responder = nullptr;
        std::vector<uint64_t> waiters;              // exchanges that want the terminal object
        std::optional<StoredResponse> unkept = {};  // the record, when `store` is false
        std::unique_ptr<Stream> stream = {};        // when it was asked for as one
        const Surface* surface = nullptr;
        std::string echo = {};  // of that
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
        std::string text = {};  // the object, for a caller that does not wait for the end
        AnswerForm form = {};
        std::unique_ptr<EventWriter> events = {};  // of a stream
        std::string conversation_last = {};
        std::string ignored = {};  // fields of the body
        Json raw = {};
    };

    struct FinishJob : Job {
        StoredResponse stored = {};
        bool store = true;
        std::shared_ptr<const Outcome> outcome = {};
        AnswerForm form = {};  // of the request
        Result<std::string> answer = std::string();
        std::string conversation = {};  // that has not got it yet
        std::vector<Json> said = {};    // items for that: of the request, of the answer
    };

    struct RecoverJob : Job {
        std::string organisation = {}, id = {};
        Responder* responder = nullptr;
        std::unique_ptr<Prepared> prepared = {};
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
        std::string id = {};
    };

    struct CountJob : AnswerJob {
        std::string organisation = {}, body = {};
        AnswerForm form = {};
    };

    Process process;
    ServerOptions options;  // without secrets
    std::vector<ServerKey> keys;
    std::vector<Responder*> responders;
    std::unique_ptr<Store> own_store;
    Store* store = nullptr;
    std::optional<HttpServer> http;

    // of the loop thread
    std::unordered_map<uint64_t, Exchange> exchanges;
    std::unordered_map<std::string, Live> live;
    std::deque<std::pair<uint64_t, uint64_t>> timeouts;  // of waiting exchanges, soonest first
    std::deque<std::pair<uint64_t, uint64_t>> beats;     // of streams, as timeouts
    std::deque<std::string> recoverable;                 // waiting, oldest first
    std::unordered_map<std::string, std::deque<JobPtr<ConversationJob>>> conversations;  // changing
    std::vector<JobPtr<FinishJob>> unsaved;  // outcomes that the store had no room for
    size_t recovering = 0;                   // of them, on their way
    size_t finishing = 0;
    size_t queued = 0;        // live and not running
    double finish_gap_s = 1;  // between two ends, on average
    uint64_t last_finish_ns = 0;
    uint64_t next_expiry_ns = 0;
    bool drain_begun = false;
    std::vector<JobPtr<Job>> outgoing;  // for the workers, handed over once a turn
    uint8_t random[1024] = {};          // drawn from the system at once
    size_t random_used = sizeof random;
    bool listening = false;                                    // to the Responders
    std::map<std::pair<std::string, int>, uint64_t> answered;  // by route and status
    double answer_seconds = 0;
    uint64_t replayed = 0;

    std::atomic<bool> stopping = false;
    std::atomic<uint32_t> storing = 0;  // changes under way

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
    void on_sent(uint64_t number) override;
    void on_tick() override;
    void on_drained() override;

    // checks of a head, in the order in which on_head runs them
    std::string make_request_id();
    void find_route(Exchange& exchange);
    Result<void> check_host(const HttpRequest& request, Exchange& exchange);
    Result<void> check_origin(const HttpRequest& request, Exchange& exchange);
    Result<void> check_key(const HttpRequest& request, Exchange& exchange);
    Result<void> check_route(const HttpRequest& request, Exchange& exchange);
    Result<void> check_method(const HttpRequest& request, Exchange& exchange);
    Result<void> check_size(const HttpRequest& request, Exchange& exchange);
    Result<void> check_rate(const HttpRequest& request, Exchange& exchange);
    Result<void> check_type(const HttpRequest& request, Exchange& exchange);

    uint64_t body_limit(const HttpRequest& request) const {
        return request.method == "POST" ? options.max_body_bytes : server_get_body_bytes;
    }

    // routes
    void get_page(Exchange& exchange, HttpRequest& request);
    void get_health(Exchange& exchange, HttpRequest& request);
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

    // replies
    HttpReply make_reply(const Exchange& exchange, int status, std::string body,
                         HttpHeaders headers = {});
    Json make_error_body(const Exchange& exchange, const Error& error) const;
    HttpReply make_error_reply(const Exchange& exchange, const Error& error,
                               HttpHeaders headers = {});
    HttpReply make_preflight_reply(const Exchange& exchange, const HttpRequest& request);
    void answer(Exchange& exchange, HttpReply reply);
    void answer(Exchange& exchange, int status, std::string body);
    void refuse(Exchange& exchange, const Error& error, HttpHeaders headers = {});
    void note_trouble(const char* from, const Error& error, const std::string& of = {});
    Error store_error(const Error& error);
    void log_exchange(const Exchange& exchange, int status);
    void log_line(Json line, const Usage& usage, const Timings& timings);
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
    Result<void> add_previous(const std::string& organisation, Request* request, Json body,
                              std::string* last) const;
    Result<void> read_key(AcceptJob& job, const Json& body, const Request& request) const;
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
    void remove_done(JobPtr<RemoveJob> job);

    // streams
    Result<void> read_stream(Exchange& exchange) const;
    HttpHeaders stream_headers(const Exchange& exchange) const;
    void end_stream(Exchange& exchange, std::string text);
    void join_stream(Exchange& exchange, const std::string& id, Live& entry);
    std::string send_events(Live& entry);
    bool is_behind(const Live& entry);
    void break_streams(const std::string& id, Live& entry);
    void beat(uint64_t now_ns);

    // after a restart
    void recover_all();
    void recover_some();
    void recover_work(RecoverJob& job);
    void recover_keep(JobPtr<RecoverJob> job);
    void recover_done(JobPtr<RecoverJob> job);

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

Result<Json> server_parameter(std::string_view query, const ServerParameter& row);
/// One page of items, newest first unless the query asks otherwise.
Result<std::string> server_page_of(std::vector<Json> items, std::string_view query);
Error server_no_response(std::string_view id);
Error server_field(const char* code, const char* param, std::string message);
ResponseRecord server_record(const StoredResponse& stored, Status status);
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
Result<std::vector<ServerKey>> server_keys(const std::vector<ApiKey>& given);
Result<void> server_check_options(const ServerOptions& options);
HttpOptions server_http_options(const ServerOptions& options);

}  // namespace detail
}  // namespace v1
}  // namespace valar
