#include "prologue.hpp"

#include "server/loop.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Reading -----------------------------------------------------------------------------------

std::string ServerLoop::render_live(const StoredResponse& stored, bool running) const {
    const ResponseRecord record = server_record(stored,
                                                running ? Status::running : Status::pending);
    return render_response(record, options.dialect).write();
}

void ServerLoop::get_response(Exchange& exchange, HttpRequest&) {
    if (auto read = read_stream(exchange); !read) return refuse(exchange, read.error());
    const auto found = live.find(exchange.argument);
    if (exchange.form.stream && found != live.end() &&
        found->second.organisation == exchange.organisation && !found->second.unkept)
        return join_stream(exchange, found->first, found->second);
    show(exchange, exchange.argument, 200);
}

void ServerLoop::show(Exchange& exchange, const std::string& id, int unfinished_status,
                      bool only_background) {
    auto job = std::make_unique<ShowJob>();
    const auto found = live.find(id);
    job->exchange = exchange.number;
    job->organisation = exchange.organisation;
    job->running = found != live.end() && found->second.running;
    job->status = unfinished_status;
    job->only_background = only_background;
    job->form = exchange.form;
    job->id = id;
    exchange.response_id = id;
    send_job<&ServerLoop::show_work, &ServerLoop::answer_job>(std::move(job));
}

void ServerLoop::show_work(ShowJob& job) {
    const auto stored = find_record(job.organisation, job.id);
    if (!stored) {
        job.error = server_no_response(job.id);
        return;
    }
    if (job.only_background && !stored->background) job.error = server_not_background();
    if (stored->terminal) job.status = 200;
    job.text = stored->terminal ? *stored->object : render_live(*stored, job.running);
    if (!stored->terminal) {
        if (job.form.stream)
            job.error = server_overloaded("the response is not being worked on now; try again");
        return;
    }
    auto answer = render_answer(job.form, job.text, options.dialect);
    if (answer) job.text = std::move(*answer);
    else job.error = std::move(answer.error());
}

// ---- Queries -----------------------------------------------------------------------------------

namespace {

/// The value of a field of a query, unescaped. Errors: not text, or given twice.
Result<std::optional<std::string>> server_query(std::string_view query, std::string_view name) {
    std::optional<std::string> found;
    while (!query.empty()) {
        const std::string_view one = query.substr(0, query.find('&'));
        query.remove_prefix(std::min(one.size() + 1, query.size()));
        const size_t equals = std::min(one.find('='), one.size());
        if (one.substr(0, equals) != name) continue;
        auto value = server_unescape(one.substr(std::min(equals + 1, one.size())));
        if (!value || found)
            return make_error(
                ErrorKind::invalid_request,
                "'" + std::string(name) + "' in the query is malformed or given twice",
                "invalid_value", std::string(name));
        found = std::move(*value);
    }
    return found;
}

}  // namespace

/// Null where it is not there.
Result<Json> server_parameter(std::string_view query, const ServerParameter& row) {
    const auto text = server_query(query, row.name);
    if (!text) return text.error();
    if (!*text) return Json();
    Json value(**text);
    Fault fault;
    if (!row.words.empty()) {
        fault = check_choice(value, row.name, row.words);
    } else if (row.most > 0) {
        if (auto number = Json::parse(**text); number && number->is_integer())
            value = std::move(*number);
        fault = check_integer(value, row.name, row.least, row.most);
    }
    if (fault) return std::move(*fault);
    return value;
}

namespace {

struct ServerPage {
    size_t limit = server_list_default;
    std::string after;
    bool ascending = false;
};

Result<ServerPage> server_page(std::string_view query) {
    auto limit = server_parameter(query, server_limit),
         after = server_parameter(query, server_after),
         order = server_parameter(query, server_order);
    for (const auto* field : {&limit, &after, &order})
        if (!*field) return field->error();
    return ServerPage{static_cast<size_t>(limit->as_int(server_list_default)),
                      std::string(after->as_string()), order->as_string() == "asc"};
}

}  // namespace

Json server_list(std::vector<Json> data, bool more) {
    const Json first = data.empty() ? Json() : data.front()["id"];
    const Json last = data.empty() ? Json() : data.back()["id"];
    return Json::object()
        .set("object", "list")
        .set("data", Json(std::move(data)))
        .set("first_id", first)
        .set("last_id", last)
        .set("has_more", more);
}

namespace {

Error server_bad_after(std::string_view after) {
    return server_field("invalid_value", "after",
                        "'after' is \"" + printable(after) + "\", which is none of the list");
}

}  // namespace

void ServerLoop::get_responses(Exchange& exchange, HttpRequest&) {
    auto page = server_page(exchange.query);
    auto key = server_parameter(exchange.query, server_key);
    if (!page || !key) return refuse(exchange, page ? key.error() : page.error());
    auto ids = key->is_string() ? Result(keyed(exchange, key->as_string()))
                                : store->list(exchange.organisation, page->after, page->limit + 1);
    if (!ids)
        return refuse(exchange, ids.error().kind == ErrorKind::not_found
                                    ? server_bad_after(page->after)
                                    : store_error(ids.error()));
    auto job = std::make_unique<ListJob>();
    job->exchange = exchange.number;
    job->organisation = exchange.organisation;
    job->more = ids->size() > page->limit;
    if (job->more) ids->pop_back();
    for (std::string& id : *ids) {
        const auto found = live.find(id);
        const bool running = found != live.end() && found->second.running;
        job->ids.emplace_back(std::move(id), running);
    }
    send_job<&ServerLoop::list_work, &ServerLoop::answer_job>(std::move(job));
}

/// The one that this caller's key reserved, or none.
std::vector<std::string> ServerLoop::keyed(const Exchange& exchange, std::string_view key) const {
    const std::string name = exchange.key_id + "\n" + std::string(trim(key));
    const auto held = store->reserved(exchange.organisation, name);
    if (!held || held->deleted) return {};
    return {held->id};
}

void ServerLoop::list_work(ListJob& job) {
    std::vector<Json> data;
    for (const auto& [id, running] : job.ids) {
        const auto stored = store->find(job.organisation, id);
        if (!stored) continue;  // gone meanwhile
        auto object = Json::parse(stored->terminal ? *stored->object
                                                   : render_live(*stored, running));
        if (!object) continue;
        for (const std::string_view key : server_left_out) object->erase(key);
        data.push_back(std::move(*object));
    }
    job.text = server_list(std::move(data), job.more).write();
}

void ServerLoop::get_input_items(Exchange& exchange, HttpRequest&) {
    auto job = std::make_unique<ItemsJob>();
    job->exchange = exchange.number;
    job->organisation = exchange.organisation;
    job->id = exchange.argument;
    job->query = exchange.query;
    send_job<&ServerLoop::items_work, &ServerLoop::answer_job>(std::move(job));
}

void ServerLoop::items_work(ItemsJob& job) {
    const auto list = [&]() -> Result<std::string> {
        const auto stored = find_record(job.organisation, job.id);
        if (!stored) return server_no_response(job.id);
        auto request = Json::parse(*stored->request);
        if (!request) return request.error();
        return server_page_of(render_input_items(*request, stored->id), job.query);
    };
    auto page = list();
    if (page) job.text = std::move(*page);
    else job.error = std::move(page.error());
}

/// Newest first unless asked otherwise, as OpenAI has it.
Result<std::string> server_page_of(std::vector<Json> items, std::string_view query) {
    auto page = server_page(query);
    if (!page) return page.error();
    if (!page->ascending) std::reverse(items.begin(), items.end());
    auto first = items.begin();
    if (!page->after.empty()) {
        first = std::find_if(items.begin(), items.end(), [&](const Json& item) {
            return item["id"].as_string() == page->after;
        });
        if (first == items.end()) return server_bad_after(page->after);
        ++first;
    }
    const size_t left = static_cast<size_t>(items.end() - first);
    const size_t count = std::min(left, page->limit);
    std::vector<Json> shown(std::make_move_iterator(first),
                            std::make_move_iterator(first + static_cast<ptrdiff_t>(count)));
    return server_list(std::move(shown), left > count).write();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER
