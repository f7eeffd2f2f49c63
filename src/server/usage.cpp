// What was used: counters of an hour each, by organisation, API key, model and window, in records of
// their own that no response's age takes away. They grow when a response has ended and is kept, and
// are kept about once a second: a crash may lose what the last one counted.
#include "prologue.hpp"

#include "server/loop.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

using Counters = ServerUsageCounters;
constexpr int64_t usage_hour_s = 3600, usage_day_hours = 24;
constexpr int64_t usage_kept_hours = 31 * usage_day_hours;

struct UsageField {
    const char* name;
    uint64_t Counters::*field;
};
constexpr UsageField usage_fields[] = {
    {"requests", &Counters::requests},
    {"failed", &Counters::failed},
    {"cancelled", &Counters::cancelled},
    {"input_tokens", &Counters::input_tokens},
    {"cached_tokens", &Counters::cached_tokens},
    {"output_tokens", &Counters::output_tokens},
    {"reasoning_tokens", &Counters::reasoning_tokens},
};
static_assert(std::size(usage_fields) * sizeof(uint64_t) == sizeof(Counters),
              "every one has its row");

void usage_add(Counters* to, const Counters& more) {
    for (const UsageField& row : usage_fields) to->*row.field += more.*row.field;
}

std::string usage_id(int64_t hour) { return "usage_" + std::to_string(hour); }

int64_t usage_now() { return unix_time_ms() / 1000 / usage_hour_s; }

/// An hour as it is kept, and back: what cannot be read counts nothing.
std::string usage_written(const ServerUsageHour& hour) {
    Json rows = Json::array();
    for (const auto& [of, counters] : hour.rows) {
        Json row = Json::array();
        for (const std::string* name : {&of.organisation, &of.key, &of.model, &of.window})
            row.push(*name);
        for (const UsageField& field : usage_fields) row.push(counters.*field.field);
        rows.push(std::move(row));
    }
    return rows.write();
}

ServerUsageHour usage_read(const std::string& text) {
    ServerUsageHour hour;
    const auto rows = Json::parse(text);
    if (!rows) return hour;
    for (const Json& row : rows->items()) {
        ServerUsageKey of;
        size_t at = 0;
        for (std::string* name : {&of.organisation, &of.key, &of.model, &of.window})
            *name = row[at++].as_string();
        for (const UsageField& field : usage_fields)
            hour.rows[of].*field.field += row[at++].as_uint();
    }
    return hour;
}

/// The hours of a range, the last of which is now's; 7d and 30d are of whole days (UTC).
struct UsageRange {
    std::string_view name;
    int64_t days, bucket_hours;
    int64_t first(int64_t now) const {
        if (days == 1) return now - usage_day_hours + 1;
        return (now / usage_day_hours - days + 1) * usage_day_hours;
    }
};
constexpr UsageRange usage_ranges[] = {{server_usage_ranges[0], 1, 1},
                                       {server_usage_ranges[1], 7, usage_day_hours},
                                       {server_usage_ranges[2], 30, usage_day_hours}};

std::string usage_day(int64_t hour) {
    const CivilTime day = civil_time(hour * usage_hour_s);
    return format("%04d-%02d-%02d", static_cast<int>(day.year), day.month, day.day);
}

/// By what rows are told apart.
std::string usage_name(std::string_view by, int64_t hour, const ServerUsageKey& of) {
    if (by == "model") return of.model;
    if (by == "window") return of.window;
    return by == "key" ? of.key : usage_day(hour);
}

/// Counters gathered for a view.
struct UsageTally {
    ServerUsageView view;
    UsageRange range;
    int64_t now;
    std::vector<std::string_view> by;
    struct Row {
        Counters counters;
        int64_t last = 0;  // hour
    };
    std::map<std::vector<std::string>, Row> rows;
    std::vector<Counters> buckets;  // of a timeseries

    UsageTally(ServerUsageView shown, const UsageRange& over, std::string_view only, int64_t at)
        : view(shown), range(over), now(at) {
        if (!only.empty()) by = {only};
        else if (view == ServerUsageView::breakdown) by = {"model", "window"};
        else if (view == ServerUsageView::activity) by = {"key", "model"};
        const int64_t hours = now - range.first(now) + 1;
        buckets.resize(static_cast<size_t>((hours - 1) / range.bucket_hours + 1));
    }

    void take(int64_t hour, const ServerUsageKey& of, const Counters& counters) {
        std::vector<std::string> names;
        for (const std::string_view one : by) names.push_back(usage_name(one, hour, of));
        Row& row = rows[std::move(names)];
        usage_add(&row.counters, counters);
        row.last = hour;
        usage_add(&buckets[static_cast<size_t>((hour - range.first(now)) / range.bucket_hours)],
                  counters);
    }

    static void show(Json* row, const Counters& counters) {
        for (const UsageField& field : usage_fields) row->set(field.name, counters.*field.field);
        row->set("total_tokens", counters.input_tokens + counters.output_tokens);
    }

    Json show_buckets() const {
        Json data = Json::array();
        for (size_t i = 0; i < buckets.size(); ++i) {
            const int64_t hour = range.first(now) + static_cast<int64_t>(i) * range.bucket_hours;
            Json row = Json::object().set("start", hour * usage_hour_s);
            row.set("end", (hour + range.bucket_hours) * usage_hour_s);
            show(&row, buckets[i]);
            data.push(std::move(row));
        }
        return data;
    }

    Json show_rows() const {
        Json data = Json::array();
        for (const auto& [names, sums] : rows) {
            Json row = Json::object();
            for (size_t i = 0; i < by.size(); ++i) row.set(by[i], names[i]);
            if (view == ServerUsageView::activity) row.set("last_hour", sums.last * usage_hour_s);
            show(&row, sums.counters);
            data.push(std::move(row));
        }
        return data;
    }

    Json show_all() const {
        const bool total = view == ServerUsageView::total;
        Json all = Json::object().set("object", total ? "usage" : "list").set("range", range.name);
        all.set("from", range.first(now) * usage_hour_s).set("to", (now + 1) * usage_hour_s);
        if (!total)
            return all.set("data",
                           view == ServerUsageView::timeseries ? show_buckets() : show_rows());
        Counters sum;
        for (const auto& [names, row] : rows) usage_add(&sum, row.counters);
        show(&all, sum);
        return all;
    }
};

}  // namespace

std::vector<Json> server_usage_samples(ServerUsageView view) {
    std::vector<Json> samples;
    const auto add = [&](std::string_view by, bool used) {
        UsageTally tally(view, usage_ranges[0], by, usage_kept_hours);
        if (used) tally.take(usage_kept_hours, {"", "key", "model", "standard"}, {});
        samples.push_back(tally.show_all());
    };
    for (const bool used : {false, true}) add("", used);
    if (view == ServerUsageView::breakdown)
        for (const std::string_view by : server_usage_names) add(by, true);
    return samples;
}

// ---- Showing ------------------------------------------------------------------------------------

void ServerLoop::send_usage(Exchange& exchange, ServerUsageView view) {
    auto job = std::make_unique<UsageJob>();
    job->exchange = exchange.number;
    job->organisation = exchange.organisation;
    job->query = exchange.query;
    job->view = view;
    send_job<&ServerLoop::usage_work, &ServerLoop::answer_job>(std::move(job));
}

/// Hour by hour, so that the loop, which counts, never waits for all of them.
void ServerLoop::usage_work(UsageJob& job) {
    auto wanted = server_parameter(job.query, server_range);
    auto by = job.view == ServerUsageView::breakdown ? server_parameter(job.query, server_by)
                                                     : Result<Json>(Json());
    if (!wanted || !by) {
        job.error = wanted ? by.error() : wanted.error();
        return;
    }
    const auto range = std::find_if(
        std::begin(usage_ranges), std::end(usage_ranges) - 1,
        [&](const UsageRange& row) { return row.name == wanted->as_string(usage_ranges[0].name); });
    UsageTally tally(job.view, *range, by->as_string(), usage_now());
    for (int64_t hour = range->first(tally.now); hour <= tally.now; ++hour) {
        const std::lock_guard<std::mutex> lock(usage_mutex);
        const auto found = used_hours.find(hour);
        if (found == used_hours.end()) continue;
        const auto& rows = found->second.rows;
        auto row = rows.lower_bound({job.organisation, {}, {}, {}});
        for (; row != rows.end() && row->first.organisation == job.organisation; ++row)
            tally.take(hour, row->first, row->second);
    }
    job.text = tally.show_all().write();
}

// ---- Counting -------------------------------------------------------------------------------------

ServerUsageKey ServerLoop::usage_key(const ResponseRecord& record) const {
    ServerUsageKey of{record.organisation, record.key, record.model, {}};
    for (const Responder* responder : responders)
        for (const ModelInfo& model : responder->models())
            if (server_answers_to(model, record.model)) of.model = model.id;
    of.window = record.request["metadata"][kWindowKey].as_string(window_name(Window::standard));
    return of;
}

void ServerLoop::count_usage(const FinishJob& job) {
    const Outcome& outcome = *job.outcome;
    Counters counters{1,
                      outcome.status == Status::failed,
                      outcome.status == Status::cancelled,
                      outcome.usage.input_tokens,
                      outcome.usage.cached_tokens,
                      outcome.usage.output_tokens,
                      outcome.usage.reasoning_tokens};
    const std::lock_guard<std::mutex> lock(usage_mutex);
    ServerUsageHour& hour = used_hours[usage_now()];
    hour.changed = true;
    usage_add(&hour.rows[job.used], counters);
}

void ServerLoop::save_usage() {
    if (store_failed_ns != 0) return;  // what room is left is for responses
    for (auto& [number, hour] : used_hours) {
        if (!std::exchange(hour.changed, false)) continue;
        auto job = std::make_unique<UsageSaveJob>();
        job->hour = number;
        if (!std::exchange(hour.kept, true)) {
            StoredResponse record;
            record.id = usage_id(number);
            record.kept = true;
            record.created_at_ms = store->now_ms();
            store->add(std::move(record), when_kept(std::make_unique<Job>()));
        }
        store->finish(usage_id(number), server_shared(usage_written(hour)), store->now_ms(),
                      on_kept<&ServerLoop::usage_saved>(std::move(job)));
    }
}

void ServerLoop::usage_saved(JobPtr<UsageSaveJob> job) {
    const auto hour = used_hours.find(job->hour);
    if (!job->error || hour == used_hours.end()) return;
    hour->second.changed = true;  // again in a second
    if (job->error->kind == ErrorKind::not_found) hour->second.kept = false;
}

void ServerLoop::expire_usage() {
    const int64_t first = usage_now() - usage_kept_hours;
    const std::lock_guard<std::mutex> lock(usage_mutex);
    while (!used_hours.empty() && used_hours.begin()->first < first) {
        store->erase({}, usage_id(used_hours.begin()->first), false, store->now_ms(),
                     when_kept(std::make_unique<Job>()));
        used_hours.erase(used_hours.begin());
    }
}

void ServerLoop::recover_usage(const StoredResponse& kept) {
    const auto number = Json::parse(std::string_view(kept.id).substr(kept.id.find('_') + 1));
    const auto stored = store->find(kept.organisation, kept.id);
    if (!number || !number->is_int() || !kept.organisation.empty() || !stored) return;
    ServerUsageHour& hour = used_hours[number->as_int()];
    if (stored->object) hour = usage_read(*stored->object);
    hour.kept = true;
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER
