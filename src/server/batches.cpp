// Batches. What is sent is checked item by item on a worker, in short jobs, so that others are served
// meanwhile; checked items go to the store, server_batch_part to a record, and the batch's own record
// ends acceptance: parts without it are dropped at the next start. An item becomes a response in the
// background when there is room for it (feed_batches), by the way of those that a restart left
// (recover_some). Which have ended is kept about once a second; then parts of ended items go. What
// ended after that is told, after a crash, by the responses.
#include "prologue.hpp"

#include "api/document.hpp"
#include "server/loop.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

constexpr uint64_t batch_slice_ns = 10'000'000;  // of checking, then others have their turn
constexpr char batch_digits[] = "0123456789abcdefghijklmnopqrstuvwxyz";

/// States of items, with their words.
struct BatchState {
    char letter;
    const char* word;
};
constexpr BatchState batch_states[] = {{server_batch_waits, "PENDING"},
                                       {server_batch_begun, "RUNNING"},
                                       {'C', "COMPLETED"},
                                       {'F', "FAILED"},
                                       {'X', "CANCELLED"}};

constexpr bool batch_item_ended(char state) {
    return state != server_batch_waits && state != server_batch_begun;
}

char batch_letter(Status status) {
    if (status == Status::completed) return 'C';
    return status == Status::cancelled ? 'X' : 'F';
}

Error server_no_batch(std::string_view id) {
    return server_not_found("no batch '" + printable(id) + "'");
}

/// Walks over JSON that may be none: it only tells texts and brackets apart.
struct BatchScan {
    std::string_view text;
    size_t at = 0;

    bool done() const { return at >= text.size(); }
    void skip_space() {
        while (!done() && std::string_view(" \t\r\n").find(text[at]) != std::string_view::npos)
            ++at;
    }
    void skip_string() {
        for (++at; !done() && text[at] != '"'; ++at) at += text[at] == '\\';
        at = std::min(at + 1, text.size());
    }
    /// To the comma or bracket that ends the value which begins here.
    void skip_value() {
        for (size_t depth = 0; !done();) {
            const char c = text[at];
            if (c == '"') {
                skip_string();
                continue;
            }
            const bool closes = c == ']' || c == '}';
            if (depth == 0 && (closes || c == ',')) return;
            depth += c == '[' || c == '{';
            depth -= closes;
            ++at;
        }
    }
    std::string_view take_value() {
        skip_space();
        const size_t from = at;
        skip_value();
        return trim(text.substr(from, at - from));
    }
    /// To the value of a member of the object that the text is. False: there is none.
    bool find_member(std::string_view name) {
        skip_space();
        for (bool first = true; !done() && text[at] == (first ? '{' : ','); first = false) {
            ++at;
            skip_space();
            const size_t from = at;
            if (done() || text[at] != '"') return false;
            skip_string();
            const auto key = Json::parse(text.substr(from, at - from));
            skip_space();
            if (!key || done() || text[at] != ':') return false;
            ++at;
            skip_space();
            if (key->as_string() == name) return true;
            skip_value();
        }
        return false;
    }
};

}  // namespace

Result<BatchBody> batch_split(std::string_view body) {
    BatchScan scan{body};
    const bool listed = scan.find_member("requests") && !scan.done() && body[scan.at] == '[';
    BatchBody split;
    size_t begin = body.size(), end = body.size();
    if (listed) {
        begin = scan.at;
        while (!scan.done() && (body[scan.at] == ',' || scan.at == begin)) {
            ++scan.at;
            split.requests.push_back(scan.take_value());
            if (split.requests.size() > server_most_requests)
                return server_field(
                    "array_above_max_length", "requests",
                    format("'requests' has more than %zu items", server_most_requests));
        }
        end = scan.at;
        if (split.requests.size() == 1 && split.requests[0].empty()) split.requests.clear();
    }
    auto rest = Json::parse(join({body.substr(0, begin), listed ? "[" : "", body.substr(end)}));
    if (!rest) return rest.error();
    split.rest = std::move(*rest);
    return split;
}

std::string batch_response_id(const std::string& batch, size_t place) {
    std::string id = "resp_" + batch.substr(batch.find('_') + 1);
    for (size_t unit = 36 * 36 * 36; unit > 0; unit /= 36) id += batch_digits[place / unit % 36];
    return id;
}

std::optional<std::pair<std::string, size_t>> batch_of(const std::string& response_id) {
    constexpr std::string_view prefix = "resp_";
    const size_t size = prefix.size() + drawn_characters;
    if (response_id.size() != size || !response_id.starts_with(prefix)) return std::nullopt;
    size_t place = 0;
    for (const char c : response_id.substr(prefix.size() + server_batch_drawn)) {
        const size_t digit = std::string_view(batch_digits).find(c);
        if (digit == std::string_view::npos) return std::nullopt;
        place = place * 36 + digit;
    }
    return std::pair("batch_" + response_id.substr(prefix.size(), server_batch_drawn), place);
}

std::string batch_part_id(const std::string& batch, size_t part) {
    return batch + "." + std::to_string(part);
}

std::optional<BatchItem> batch_item(std::string_view part, size_t place) {
    BatchItem item;
    for (size_t i = 0; i <= place; ++i)
        for (std::string_view* line : {&item.hook, &item.head, &item.request}) {
            const size_t end = part.find('\n');
            if (end == part.npos) return std::nullopt;
            *line = part.substr(0, end);
            part.remove_prefix(end + 1);
        }
    return item;
}

/// An item that waits, as the response that it becomes.
StoredResponse batch_response(const std::string& organisation, std::string id,
                              const BatchItem& item) {
    StoredResponse response;
    response.id = std::move(id);
    response.organisation = organisation;
    response.background = true;
    response.attempts = 1;
    response.head = server_shared(std::string(item.head));
    response.request = server_shared(std::string(item.request));
    return response;
}

Json server_batch(const std::string& id, size_t count, int64_t created_at, std::string_view label) {
    Json shown =
        Json::object().set("id", id).set("request_counts", count).set("created_at", created_at);
    if (!label.empty()) shown.set("label", label);
    return shown;
}

/// The schema of the body.
Json server_batch_request() {
    const Json custom_id = doc_type("string").set("pattern", "^[a-z0-9][a-z0-9_-]{0,63}$");
    const Json item = doc_object(
        2, {{"custom_id", custom_id}, {"params", doc_ref(doc_name_of(nullptr) + "Request")}});
    return doc_object(2, {{"endpoint", doc_word("/v1/responses")},
                          {"requests", doc_array(item, 1, server_most_requests)},
                          {"label", doc_text(0, server_most_label)}});
}

/// The schema of an item's entry in request_status.
Json server_batch_request_status() {
    std::vector<std::string_view> words;
    for (const BatchState& state : batch_states) words.push_back(state.word);
    return doc_object(1, {{"status", doc_words(words)}});
}

// ---- Accepting one -----------------------------------------------------------------------------

namespace {

Fault batch_unknown(const Json& object, std::initializer_list<std::string_view> known,
                    const std::string& path) {
    for (const JsonMember& member : object.members())
        if (std::find(known.begin(), known.end(), member.key) == known.end()) {
            const std::string name = path + printable(member.key, server_shown_bytes);
            return api_error("unknown_parameter", name, "unknown field '" + name + "'");
        }
    return {};
}

Fault batch_check_rest(const Json& rest, size_t requests) {
    if (!rest.is_object()) return api_wrong_type("body", "a JSON object", rest);
    for (const char* name : {"endpoint", "requests"})
        if (rest[name].is_null()) return api_missing(name);
    constexpr std::string_view endpoints[] = {"/v1/responses"};
    if (Fault fault = check_choice(rest["endpoint"], "endpoint", endpoints, "unsupported_value"))
        return fault;
    if (!rest["requests"].is_array())
        return api_wrong_type("requests", "an array", rest["requests"]);
    if (requests == 0)
        return api_error("array_below_min_length", "requests", "'requests' must not be empty");
    if (Fault fault = rest["label"].is_null()
                          ? Fault()
                          : check_text(rest["label"], "label", 0, server_most_label))
        return fault;
    return batch_unknown(rest, {"endpoint", "requests", "label"}, "");
}

bool batch_is_custom_id(std::string_view id) {
    const auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); };
    return !id.empty() && id.size() <= 64 && letter(id[0]) &&
           std::all_of(id.begin(), id.end(),
                       [&](char c) { return letter(c) || c == '_' || c == '-'; });
}

/// Of a field of an item's params, as the client finds it. All of them are the client's fault, what
/// is not found, too.
Error batch_error(Error error, const std::string& params) {
    if (error.code.empty() || http_status(error) >= 500) return error;
    error.message = params + ": " + error.message;
    error.param = params + (error.param.empty() ? "" : "." + error.param);
    error.kind = ErrorKind::invalid_request;
    return error;
}

/// Items are in the background, are kept and are not streamed.
Fault batch_check_switches(const Json& params) {
    for (const auto& [name, allowed] :
         {std::pair("stream", false), std::pair("background", true), std::pair("store", true)}) {
        const Json& given = params[name];
        const bool fine = given.is_null() || !given.is_bool() ||
                          (given.as_bool() == allowed && allowed);
        if (!fine)
            return api_error(
                "unsupported_value", name,
                join({"'", name, "' of a batch's request may not be ", given.write()}));
    }
    return {};
}

}  // namespace

void ServerLoop::post_batch(Exchange& exchange, HttpRequest& request) {
    auto job = std::make_unique<BatchJob>();
    job->exchange = exchange.number;
    job->organisation = exchange.organisation;
    job->key_id = exchange.key_id;
    job->body = std::move(request.body);
    std::tie(job->keys, job->key) = server_key_headers(request);
    exchange.keyed = job->keys > 0;
    send_job<&ServerLoop::batch_work, &ServerLoop::batch_next>(std::move(job));
}

/// What is around the items.
Result<void> ServerLoop::batch_begin(BatchJob& job) {
    auto read = batch_split(job.body);
    if (!read) return read.error();
    job.read = std::move(*read);
    if (Fault fault = batch_check_rest(job.read.rest, job.read.requests.size()))
        return std::move(*fault);
    if (job.keys > 0) {
        auto reservation = reservation_of(job.keys, job.key, job.key_id);
        if (!reservation) return reservation.error();
        job.key = std::move(*reservation);
        job.replay = store->reserved(job.organisation, job.key).has_value();
    }
    job.hash.update(join({"/v1/batches\n", job.read.rest.canonical()}));
    auto id = draw_id("batch_");
    if (!id) return id.error();
    id->resize(std::string_view("batch_").size() + server_batch_drawn);
    job.created_at = unix_time_ms() / 1000;
    job.batch.id = *id;
    job.batch.organisation = job.organisation;
    job.batch.count = job.batch.left = job.read.requests.size();
    return {};
}

Result<void> ServerLoop::batch_check(BatchJob& job, size_t place) {
    const std::string path = api_index("requests", place);
    auto item = Json::parse(job.read.requests[place], {.depth = json_depth_limit - 2});
    if (!item) {
        item.error().message = path + ": " + item.error().message;
        item.error().param = path;
        return item.error();
    }
    if (!item->is_object()) return api_wrong_type(path, "an object", *item);
    for (const char* name : {"custom_id", "params"})
        if ((*item)[name].is_null()) return api_missing(path + "." + name);
    const Json& custom_id = (*item)["custom_id"];
    if (!custom_id.is_string()) return api_wrong_type(path + ".custom_id", "a string", custom_id);
    std::string name(custom_id.as_string());
    if (!batch_is_custom_id(name))
        return api_error("invalid_value", path + ".custom_id",
                         "'" + path + ".custom_id' must match ^[a-z0-9][a-z0-9_-]{0,63}$");
    if (job.names.contains(name))
        return api_error("invalid_value", path + ".custom_id",
                         "'" + path + ".custom_id' is '" + name + "', as that of another request");
    if (!(*item)["params"].is_object())
        return api_wrong_type(path + ".params", "an object", (*item)["params"]);
    if (Fault fault = batch_unknown(*item, {"custom_id", "params"}, path + "."))
        return std::move(*fault);
    job.hash.update(join({"\n", item->canonical()}));
    job.listed += name + "\n";
    job.names.insert(std::move(name));
    auto checked = batch_check_params(job, place, std::move(*item->find("params")));
    return checked ? checked : batch_error(std::move(checked.error()), path + ".params");
}

/// All that is checked of a request, and what acceptance resolves, go to the part.
Result<void> ServerLoop::batch_check_params(BatchJob& job, size_t place, Json params) {
    if (Fault fault = batch_check_switches(params)) return std::move(*fault);
    params.set("background", true);
    Json sent;
    auto put = put_references(job.organisation, nullptr, &params, &sent);
    auto request = parse_response_request(params, options.dialect);
    if (!request) return request.error();
    if (const std::string ignored = ignored_fields(params, nullptr, options.dialect);
        !ignored.empty()) {
        const std::string name = ignored.substr(0, ignored.find(", "));
        return api_error("unknown_parameter", name, "unknown field '" + name + "'");
    }
    if (request->window == Window::asap)
        return api_error(
            "invalid_value", kWindowField,
            format("'%s' is \"asap\"; a batch's may be \"standard\" or \"flex\"", kWindowField));
    if (job.replay || !put) return put;
    ResponseRecord record;
    std::string text = params.write();
    Responder* responder = nullptr;
    auto prepared = prepare(job.organisation, std::move(params), &*request, &responder,
                            &record.conversation_last);
    if (!prepared) return prepared.error();
    record.message_id = first_message_id(batch_response_id(job.batch.id, place));
    record.created_at = job.created_at;
    record.model = request->model;
    record.temperature = (*prepared)->temperature;
    record.top_p = (*prepared)->top_p;
    record.seed = (*prepared)->seed;
    record.key = job.key_id;
    const auto hook = webhooks.read(*request);
    if (!hook && job.refused_hooks++ == 0) job.why = hook.error();
    if (auto hidden = server_hide_token(&text, *request); !hidden) return hidden;
    job.part += join({hook ? *hook : "", "\n", server_head(record), "\n", text, "\n"});
    return {};
}

void ServerLoop::batch_keep_part(BatchJob& job) {
    if (job.part.empty()) return;
    job.stored.id = batch_part_id(job.batch.id, job.parts++);
    job.stored.organisation = job.organisation;
    job.stored.kept = true;
    job.stored.created_at_ms = store->now_ms();
    job.stored.request = server_shared(std::exchange(job.part, {}));
}

void ServerLoop::batch_end(BatchJob& job) {
    job.whole = true;
    StoredResponse& stored = job.stored;
    stored.id = job.batch.id;
    stored.organisation = job.organisation;
    stored.kept = true;
    stored.created_at_ms = store->now_ms();
    if (job.keys > 0) {
        stored.reservation = job.key;
        stored.fingerprint = job.hash.finish().view();
    }
    job.text = server_batch(job.batch.id, job.batch.count, job.created_at,
                            job.read.rest["label"].as_string())
                   .write();
    stored.head = server_shared(job.text);
    stored.request = server_shared(std::move(job.listed));
    job.batch.shown = job.text;
    job.batch.states.assign(job.batch.count, server_batch_waits);
    job.batch.gone.assign((job.batch.count - 1) / server_batch_part + 1, false);
    batch_free(job);
}

/// Some items, until there is a part to be kept.
void ServerLoop::batch_work(BatchJob& job) {
    const uint64_t until_ns = monotonic_ns() + batch_slice_ns;
    auto checked = std::exchange(job.begun, true) ? Result<void>() : batch_begin(job);
    while (checked && job.checked < job.read.requests.size()) {
        checked = batch_check(job, job.checked);
        if (checked && ++job.checked % server_batch_part == 0) break;
        if (monotonic_ns() >= until_ns) break;
    }
    if (!checked) {
        job.error = std::move(checked.error());
        return;
    }
    const bool last = job.checked == job.read.requests.size();
    if (last && job.part.empty()) batch_end(job);
    else if (last || job.checked % server_batch_part == 0) batch_keep_part(job);
}

/// What is large goes here, on a worker: giving it back to the system takes its time.
void ServerLoop::batch_free(BatchJob& job) {
    std::exchange(job.body, {});
    std::exchange(job.part, {});
    std::exchange(job.listed, {});
    job.read = {};
    job.names = {};
}

void ServerLoop::batch_next(JobPtr<BatchJob> job) {
    if (stopping && !job->error) job->error = server_overloaded("the server is shutting down");
    if (!find_exchange(job->exchange) && !job->error)
        job->error = make_error(ErrorKind::cancelled, "client left");
    if (job->error)
        return send_job<&ServerLoop::batch_free, &ServerLoop::batch_refuse>(std::move(job));
    if (job->whole && job->replay) return batch_replay(std::move(job));
    if (job->stored.id.empty())
        return send_job<&ServerLoop::batch_work, &ServerLoop::batch_next>(std::move(job));
    StoredResponse record = std::exchange(job->stored, {});
    if (job->whole) job->stored.fingerprint = record.fingerprint;
    store->add(std::move(record), on_kept<&ServerLoop::batch_kept>(std::move(job)));
}

void ServerLoop::batch_kept(JobPtr<BatchJob> job) {
    if (job->error && job->error->kind == ErrorKind::conflict) {  // a twin was faster
        return batch_replay(std::move(job));
    }
    if (job->error || !job->whole) return batch_next(std::move(job));
    const std::string id = job->batch.id;
    std::unique_lock<std::mutex> lock(batch_mutex);
    Batch& batch = batches[id];
    batch = std::move(job->batch);
    lock.unlock();
    batch_order.push_back(id);
    active_batches.push_back(&batch);
    say(LogLevel::info,
        Json::object().set("event", "batch").set("batch", id).set("requests", batch.count));
    if (job->why) webhooks.refuse("batch", id, *job->why, job->refused_hooks);
    answer_job(std::move(job));
    feed_batches();
}

/// A repeat is answered from the batch that the first one made.
void ServerLoop::batch_replay(JobPtr<BatchJob> job) {
    const auto holder = store->reserved(job->organisation, job->key);
    const Batch* batch = holder ? find_batch(job->organisation, holder->id) : nullptr;
    if (!batch || holder->fingerprint != job->stored.fingerprint) {
        job->error = make_error(ErrorKind::conflict,
                                "this idempotency key was used for another request",
                                "idempotency_key_reused");
        return batch_refuse(std::move(job));
    }
    job->error.reset();
    for (size_t part = 0; part < job->parts; ++part)
        store->erase(job->organisation, batch_part_id(job->batch.id, part), false, store->now_ms(),
                     when_kept(std::make_unique<Job>()));
    if (Exchange* exchange = find_exchange(job->exchange)) exchange->replayed = true;
    ++replayed;
    job->text = batch->shown;
    answer_job(std::move(job));
}

void ServerLoop::batch_refuse(JobPtr<BatchJob> job) {
    for (size_t part = 0; part < job->parts; ++part)
        store->erase(job->organisation, batch_part_id(job->batch.id, part), false, store->now_ms(),
                     when_kept(std::make_unique<Job>()));
    answer_job(std::move(job));
}

// ---- Showing ------------------------------------------------------------------------------------

/// The one that an organisation may see.
ServerLoop::Batch* ServerLoop::find_batch(const std::string& organisation, const std::string& id) {
    const auto found = batches.find(id);
    if (found == batches.end() || found->second.organisation != organisation) return nullptr;
    return &found->second;
}

void ServerLoop::get_batches(Exchange& exchange, HttpRequest&) {
    auto limit = server_parameter(exchange.query, server_batches_limit),
         after = server_parameter(exchange.query, server_after_id),
         before = server_parameter(exchange.query, server_before_id);
    for (const auto* field : {&limit, &after, &before})
        if (!*field) return refuse(exchange, field->error());
    if (after->is_string() && before->is_string())
        return refuse(exchange, server_field("invalid_value", "before_id",
                                             "'after_id' and 'before_id' cannot both be given"));
    std::vector<const Batch*> known;  // newest first
    for (auto id = batch_order.rbegin(); id != batch_order.rend(); ++id)
        if (const Batch* batch = find_batch(exchange.organisation, *id)) known.push_back(batch);
    size_t first = 0, end = known.size();
    for (const auto* cursor : {&*after, &*before}) {
        if (!cursor->is_string()) continue;
        const char* name = cursor == &*after ? "after_id" : "before_id";
        const auto found = std::find_if(known.begin(), known.end(), [&](const Batch* batch) {
            return batch->id == cursor->as_string();
        });
        if (found == known.end())
            return refuse(exchange, server_field("invalid_value", name,
                                                 join({"'", name, "' is none of the list"})));
        const auto place = static_cast<size_t>(found - known.begin());
        if (cursor == &*after) first = place + 1;
        else end = place;
    }
    const auto most = static_cast<size_t>(limit->as_int(server_batches_default));
    if (before->is_string()) first = end - std::min(end, most);
    std::string text = "[";
    for (size_t i = first; i < std::min(end, first + most); ++i)
        text.append(i == first ? "" : ",").append(known[i]->shown);
    answer(exchange, 200, text + "]");
}

void ServerLoop::get_batch(Exchange& exchange, HttpRequest&) {
    const Batch* batch = find_batch(exchange.organisation, exchange.argument);
    if (!batch) return refuse(exchange, server_no_batch(exchange.argument));
    show_batch(exchange, *batch);
}

void ServerLoop::show_batch(Exchange& exchange, const Batch& batch) {
    auto job = std::make_unique<BatchShowJob>();
    job->exchange = exchange.number;
    job->organisation = batch.organisation;
    job->id = batch.id;
    job->states = batch.states;
    job->cancelled = batch.cancelled;
    for (size_t i = 0, left = batch.live; left > 0 && i < job->states.size(); ++i) {
        if (job->states[i] != server_batch_begun) continue;
        const auto found = live.find(batch_response_id(batch.id, i));
        if (found == live.end() || !found->second.running) job->states[i] = server_batch_waits;
        --left;
    }
    send_job<&ServerLoop::show_batch_work, &ServerLoop::answer_job>(std::move(job));
}

void ServerLoop::show_batch_work(BatchShowJob& job) {
    const auto stored = store->find(job.organisation, job.id);
    if (!stored || !stored->request || !stored->head) {
        job.error = server_no_batch(job.id);
        return;
    }
    if (job.states.empty() && stored->object)
        if (const auto kept = Json::parse(*stored->object))
            job.states = (*kept)["states"].as_string();
    job.text = stored->head->substr(0, stored->head->size() - 1) + ",\"request_status\":{";
    std::string_view names = *stored->request;
    for (size_t i = 0; i < job.states.size(); ++i) {
        const std::string_view name = names.substr(0, names.find('\n'));
        names.remove_prefix(std::min(name.size() + 1, names.size()));
        const bool given_up = job.cancelled && job.states[i] == server_batch_waits;
        const char letter = given_up ? batch_letter(Status::cancelled) : job.states[i];
        for (const BatchState& state : batch_states)
            if (state.letter == letter)
                job.text += join(
                    {i == 0 ? "\"" : ",\"", name, "\":{\"status\":\"", state.word, "\"}"});
    }
    job.text += "}}";
}

void ServerLoop::get_batch_item(Exchange& exchange, HttpRequest&) {
    if (!find_batch(exchange.organisation, exchange.argument))
        return refuse(exchange, server_no_batch(exchange.argument));
    auto job = std::make_unique<BatchShowJob>();
    job->exchange = exchange.number;
    job->organisation = exchange.organisation;
    job->id = exchange.argument;
    job->custom_id = exchange.extra().item;
    send_job<&ServerLoop::find_item_work, &ServerLoop::find_item_done>(std::move(job));
}

void ServerLoop::find_item_work(BatchShowJob& job) {
    const auto stored = store->find(job.organisation, job.id);
    std::string_view names = stored && stored->request ? *stored->request : std::string_view();
    for (size_t place = 0; !names.empty(); ++place) {
        const std::string_view name = names.substr(0, names.find('\n'));
        names.remove_prefix(std::min(name.size() + 1, names.size()));
        if (name != job.custom_id) continue;
        job.text = batch_response_id(job.id, place);
        return;
    }
    job.error = server_not_found("no request '" + printable(job.custom_id) + "' in this batch");
}

void ServerLoop::find_item_done(JobPtr<BatchShowJob> job) {
    Exchange* exchange = find_exchange(job->exchange);
    if (!exchange) return;
    if (job->error) return refuse(*exchange, *job->error);
    show(*exchange, job->text, 200);
}

void ServerLoop::set_state(Batch& batch, size_t place, char state) {
    const std::lock_guard<std::mutex> lock(batch_mutex);
    batch.states[place] = state;
}

/// An item that is no response yet, as if it were one.
std::optional<StoredResponse> ServerLoop::find_waiting(const std::string& organisation,
                                                       const std::string& id) const {
    const auto of = batch_of(id);
    if (!of) return std::nullopt;
    const auto& [batch, place] = *of;
    bool ended = false;
    {
        const std::lock_guard<std::mutex> lock(batch_mutex);
        const auto known = batches.find(batch);
        if (known == batches.end() || known->second.organisation != organisation ||
            place >= known->second.states.size())
            return std::nullopt;
        ended = batch_item_ended(known->second.states[place]);
    }
    if (ended) return store->find(organisation, id);
    const auto part = store->find(organisation, batch_part_id(batch, place / server_batch_part));
    const auto item = part && part->request ? batch_item(*part->request, place % server_batch_part)
                                            : std::nullopt;
    if (!item) return std::nullopt;
    return batch_response(organisation, id, *item);
}

/// Its answer shows what is kept: items that wait have ended with it.
void ServerLoop::post_batch_cancel(Exchange& exchange, HttpRequest&) {
    Batch* batch = find_batch(exchange.organisation, exchange.argument);
    if (!batch) return refuse(exchange, server_no_batch(exchange.argument));
    if (batch->left == 0 || std::exchange(batch->cancelled, true))
        return show_batch(exchange, *batch);
    for (size_t i = 0; i < batch->states.size(); ++i) {
        if (batch->states[i] != server_batch_begun) continue;
        const auto found = live.find(batch_response_id(batch->id, i));
        if (found != live.end()) cancel(found->first, found->second);
    }
    save_batch(*batch, exchange.number);
}

// ---- Items become responses -----------------------------------------------------------------

ServerLoop::Batch* ServerLoop::batch_of_item(const std::string& id, size_t* place) {
    const auto of = batch_of(id);
    const auto found = of ? batches.find(of->first) : batches.end();
    if (found == batches.end() || of->second >= found->second.states.size()) return nullptr;
    *place = of->second;
    return &found->second;
}

bool ServerLoop::item_waits(const std::string& id) {
    size_t place = 0;
    const Batch* batch = batch_of_item(id, &place);
    return batch && batch->states[place] == server_batch_waits;
}

/// All batches have the same number of items in work; which of these are answered first their
/// windows decide.
void ServerLoop::feed_batches() {
    if (stopping || store_failed_ns != 0 || active_batches.empty()) return;
    const size_t share = std::max<size_t>(server_batch_live / active_batches.size(), 1);
    for (Batch* batch : active_batches) {
        if (batch->feeding || batch->live > share / 2) continue;
        batch->next = std::min(batch->states.find(server_batch_waits, batch->next), batch->count);
        if (batch->next == batch->count) continue;
        auto job = std::make_unique<FeedJob>();
        job->organisation = batch->organisation;
        job->id = batch->id;
        job->first = batch->next;
        job->most = share - std::min(share - 1, batch->live);
        batch->feeding = true;
        send_job<&ServerLoop::feed_work, &ServerLoop::feed_done>(std::move(job));
    }
}

/// An item that waits begins only to end, for an exchange that cancels or deletes it.
bool ServerLoop::end_waiting(Exchange& exchange) {
    size_t place = 0;
    const Batch* batch = batch_of_item(exchange.argument, &place);
    if (!batch || batch->organisation != exchange.organisation ||
        batch->states[place] != server_batch_waits)
        return false;
    auto job = std::make_unique<FeedJob>();
    job->exchange = exchange.number;
    job->organisation = batch->organisation;
    job->id = batch->id;
    job->first = place;
    job->most = 1;
    send_job<&ServerLoop::feed_work, &ServerLoop::feed_done>(std::move(job));
    return true;
}

/// Items from the first that waits, as far as their part goes.
void ServerLoop::feed_work(FeedJob& job) {
    const size_t part = job.first / server_batch_part;
    const auto stored = store->find(job.organisation, batch_part_id(job.id, part));
    if (!stored || !stored->request) {
        job.error = make_error(ErrorKind::io, "items of a batch cannot be read");
        return;
    }
    std::string_view text = *stored->request;
    for (size_t place = part * server_batch_part; job.items.size() < job.most; ++place) {
        const auto item = batch_item(text, 0);
        if (!item) return;
        text.remove_prefix(item->size());
        if (place < job.first) continue;
        job.items.push_back(
            {batch_response(job.organisation, batch_response_id(job.id, place), *item),
             std::string(item->hook)});
    }
}

void ServerLoop::feed_done(JobPtr<FeedJob> job) {
    const auto found = batches.find(job->id);
    if (found == batches.end()) return;
    Batch& batch = found->second;
    if (job->exchange == 0) batch.feeding = false;
    if (stopping) return;
    Exchange* exchange = find_exchange(job->exchange);
    const bool waits = job->first < batch.states.size() &&
                       batch.states[job->first] == server_batch_waits;
    if (exchange && !waits) {  // it began meanwhile
        HttpRequest none;
        return (this->*exchange->operation->handle)(*exchange, none);
    }
    if (job->error && waits) {
        if (exchange) refuse(*exchange, *job->error);
        note_trouble("batch", *job->error, batch.id);
        const size_t end = std::min(batch.count,
                                    (job->first / server_batch_part + 1) * server_batch_part);
        for (size_t place = job->first; place < end; ++place)
            if (batch.states[place] == server_batch_waits) {
                ++batch.live;
                item_ended(batch_response_id(batch.id, place), Status::failed);
            }
        return;
    }
    for (auto& [item, hook] : job->items) {
        size_t place = 0;
        if (!batch_of_item(item.id, &place) || batch.states[place] != server_batch_waits) continue;
        set_state(batch, place, server_batch_begun);
        ++batch.live;
        Live& entry = live[item.id];
        entry.organisation = item.organisation;
        entry.background = entry.resumable = entry.item = true;
        entry.webhook = !hook.empty();
        if (entry.webhook) webhooks.keep(item.id, item.organisation, std::move(hook));
        ++queued;
        ++items_queued;
        item.created_at_ms = store->now_ms();
        auto added = std::make_unique<RecoverJob>();
        added->id = item.id;
        added->exchange = job->exchange;
        store->add(std::move(item), on_kept<&ServerLoop::item_added>(std::move(added)));
    }
}

/// It goes the way of those that a restart left.
void ServerLoop::item_added(JobPtr<RecoverJob> job) {
    const auto found = live.find(job->id);
    size_t place = 0;
    Batch* batch = batch_of_item(job->id, &place);
    if (found == live.end() || !batch || found->second.state == Live::State::parked) return;
    if (job->error) {  // no room: it waits again
        found->second.waiters.push_back(job->exchange);
        for (const uint64_t number : std::exchange(found->second.waiters, {}))
            if (Exchange* exchange = find_exchange(number)) refuse(*exchange, *job->error);
        set_state(*batch, place, server_batch_waits);
        batch->next = std::min(batch->next, place);
        if (found->second.webhook) webhooks.forget(job->id, batch->organisation);
        --batch->live;
        --queued;
        --items_queued;
        live.erase(found);
        return;
    }
    found->second.state = Live::State::waiting;
    if (Exchange* exchange = find_exchange(job->exchange)) {
        exchange->removes = exchange->method == "DELETE";
        wait_for(*exchange, found->first, found->second);
        return cancel(found->first, found->second);
    }
    if (batch->cancelled) return cancel(found->first, found->second);
    recoverable.push_back(job->id);
    recover_some();
}

void ServerLoop::item_ended(const std::string& id, Status status) {
    size_t place = 0;
    Batch* batch = batch_of_item(id, &place);
    if (!batch || batch_item_ended(batch->states[place])) return;
    set_state(*batch, place, batch_letter(status));
    batch->changed = true;
    --batch->live;
    ++items_ended;
    if (--batch->left == 0) {
        batch->ended_at_ms = store->now_ms();
        std::erase(active_batches, batch);
        say(LogLevel::info,
            Json::object().set("event", "batch").set("batch", batch->id).set("ended", true));
        save_batch(*batch);
    }
    feed_batches();
}

// ---- What is kept of them ----------------------------------------------------------------------

/// Keeps how far it is; an exchange is shown it then.
void ServerLoop::save_batch(Batch& batch, uint64_t exchange) {
    auto job = std::make_unique<BatchSaveJob>();
    job->exchange = exchange;
    job->id = batch.id;
    job->states = batch.states;
    std::replace(job->states.begin(), job->states.end(), server_batch_begun, server_batch_waits);
    batch.changed = false;
    auto object = server_shared(Json::object()
                                    .set("states", job->states)
                                    .set("cancelled", batch.cancelled)
                                    .set("ended_at_ms", batch.ended_at_ms)
                                    .write());
    store->finish(batch.id, std::move(object), store->now_ms(),
                  on_kept<&ServerLoop::batch_saved>(std::move(job)));
}

/// Parts whose items have all ended are not needed any more.
void ServerLoop::batch_saved(JobPtr<BatchSaveJob> job) {
    const auto found = batches.find(job->id);
    Exchange* exchange = find_exchange(job->exchange);
    if (found == batches.end()) return;
    Batch& batch = found->second;
    if (job->error) {
        batch.changed = true;
        return exchange ? refuse(*exchange, *job->error) : void();
    }
    for (size_t part = 0; part < batch.gone.size(); ++part) {
        const std::string_view states =
            std::string_view(job->states).substr(part * server_batch_part, server_batch_part);
        if (batch.gone[part] || !std::all_of(states.begin(), states.end(), batch_item_ended))
            continue;
        batch.gone[part] = true;
        store->erase(batch.organisation, batch_part_id(batch.id, part), false, store->now_ms(),
                     when_kept(std::make_unique<Job>()));
    }
    if (std::all_of(job->states.begin(), job->states.end(), batch_item_ended)) {
        const std::lock_guard<std::mutex> lock(batch_mutex);
        batch.states = {};
        batch.gone = {};
    }
    if (exchange) show_batch(*exchange, batch);
}

void ServerLoop::look_after_batches() {
    for (auto& [id, batch] : batches)
        if (batch.changed) save_batch(batch);
}

/// As long after its end as the store keeps responses.
void ServerLoop::expire_batches() {
    const int64_t now_ms = store->now_ms();
    std::erase_if(batch_order, [&](const std::string& id) {
        const Batch& batch = batches.at(id);
        if (batch.left > 0 || now_ms - batch.ended_at_ms < store->retention_ms()) return false;
        store->erase(batch.organisation, id, false, now_ms, when_kept(std::make_unique<Job>()));
        const std::lock_guard<std::mutex> lock(batch_mutex);
        batches.erase(id);
        return true;
    });
}

/// Takes what belongs to batches and webhooks, and what was used, out of what the last process left.
void ServerLoop::recover_kept(std::vector<StoredResponse>* left) {
    std::vector<StoredResponse> parts;
    std::erase_if(*left, [&](StoredResponse& stored) {
        if (!stored.kept) return false;
        if (stored.id.starts_with("usage_")) recover_usage(stored);
        else if (stored.id.starts_with(webhook_prefix)) webhooks.recover(std::move(stored));
        else if (stored.id.find('.') != std::string::npos) parts.push_back(std::move(stored));
        else if (stored.id.starts_with("batch_") && !recover_batch(stored))
            note_trouble("batch", make_error(ErrorKind::bad_data, "it cannot be read"), stored.id);
        return true;
    });
    for (const StoredResponse& part : parts) {
        const size_t dot = part.id.find('.');
        const auto found = batches.find(part.id.substr(0, dot));
        const auto number = Json::parse(part.id.substr(dot + 1));
        const auto place = number ? number->as_uint() : 0;
        if (found != batches.end() && place < found->second.gone.size())
            found->second.gone[size_t(place)] = false;
        else
            store->erase(part.organisation, part.id, false, store->now_ms(),
                         when_kept(std::make_unique<Job>()));
    }
}

bool ServerLoop::recover_batch(const StoredResponse& kept) {
    const auto stored = store->find(kept.organisation, kept.id);
    const auto shown = Json::parse(stored && stored->head ? *stored->head : "");
    const auto known = Json::parse(
        stored && stored->object && !stored->object->empty() ? *stored->object : "{}");
    if (!shown || !known) return false;
    const auto count = static_cast<size_t>((*shown)["request_counts"].as_uint());
    if (count == 0 || count > server_most_requests) return false;
    Batch& batch = batches[kept.id];
    batch_order.push_back(kept.id);
    batch.id = kept.id;
    batch.organisation = kept.organisation;
    batch.shown = *stored->head;
    batch.count = count;
    batch.cancelled = (*known)["cancelled"].as_bool();
    batch.ended_at_ms = (*known)["ended_at_ms"].as_int();
    if (batch.ended_at_ms != 0) return true;
    batch.states = (*known)["states"].as_string();
    batch.states.resize(count, server_batch_waits);
    batch.gone.assign((count - 1) / server_batch_part + 1, true);
    for (size_t i = 0; i < count; ++i) {  // what ended since that was kept
        if (batch_item_ended(batch.states[i])) continue;
        const auto item = store->find(kept.organisation, batch_response_id(kept.id, i));
        if (item && item->terminal) {
            const auto object = Json::parse(*item->object);
            const std::string_view status = object ? (*object)["status"].as_string() : "";
            batch.states[i] = status == "failed"      ? batch_letter(Status::failed)
                              : status == "cancelled" ? batch_letter(Status::cancelled)
                                                      : batch_letter(Status::completed);
            batch.changed = true;
        } else {
            ++batch.left;
        }
    }
    if (batch.left == 0) batch.ended_at_ms = store->now_ms(), batch.changed = true;
    else active_batches.push_back(&batch);
    return true;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER
