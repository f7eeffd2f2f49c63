#include "prologue.hpp"

#include "server/loop.hpp"
#include "server/webhooks.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Webhooks ----------------------------------------------------------------------------------

/// Reads the record of a delivery: where it goes, or all that a try needs.
struct Webhooks::HookJob : ServerLoop::Job {
    std::string id = {}, organisation = {};
    bool tries = false;
    std::string host = {};
    HttpErrand errand = {};
};

namespace {

std::string hook_record(const std::string& id) { return join({webhook_prefix, id}); }

std::string metadata_of(const Request& request, std::string_view key) {
    for (const auto& [name, value] : request.metadata)
        if (name == key) return value;
    return {};
}

/// Between 80 and 120 % of it.
uint64_t with_jitter_ns(uint32_t seconds) {
    uint32_t drawn = 0;
    (void)random_bytes(&drawn, sizeof drawn).ok();
    const double part = static_cast<double>(drawn) / UINT32_MAX * 2 - 1;
    return static_cast<uint64_t>(seconds * 1e9 * (1 + webhook_jitter * part));
}

}  // namespace

HttpHeaders webhook_headers(const std::string& response_id, std::string_view token,
                            std::string_view body, int64_t unix_s) {
    HttpHeaders fields = {{"Content-Type", "application/json"},
                          {"User-Agent", "valar/" VALAR_VERSION},
                          {"X-Valar-Response-Id", response_id}};
    if (token.empty()) return fields;
    const std::string time = std::to_string(unix_s);
    fields.emplace_back("Authorization", "Bearer " + std::string(token));
    const Hash256 ours = hmac_sha256(token, join({time, ".", response_id, ".", body}));
    fields.emplace_back("X-Valar-Signature", "t=" + time + ",v1=" + ours.hex());
    constexpr std::string_view standard = "whsec_";  // github.com/standard-webhooks
    if (!token.starts_with(standard)) return fields;
    const auto secret = base64_decode(token.substr(standard.size()));
    if (!secret) return fields;
    const Hash256 theirs = hmac_sha256(*secret, join({response_id, ".", time, ".", body}));
    fields.emplace_back("webhook-id", response_id);
    fields.emplace_back("webhook-timestamp", time);
    fields.emplace_back("webhook-signature", "v1," + base64_encode(theirs.view()));
    return fields;
}

/// Without keys, on this machine alone: so are those that it calls.
void Webhooks::open() {
    using Reach = NetPolicy::Reach;
    const NetAddress address = loop_->http->address();
    const bool local = !loop_->has_keys && address.is_loopback();
    switch (loop_->options.webhook_policy) {
        case WebhookPolicy::automatic:
            policy_.reach = local ? Reach::loopback : Reach::global;
            break;
        case WebhookPolicy::any: policy_.reach = Reach::any; break;
        case WebhookPolicy::loopback_only: policy_.reach = Reach::loopback; break;
        case WebhookPolicy::public_only: policy_.reach = Reach::global; break;
    }
    policy_.own = address;
}

// What is kept.

Result<std::string> Webhooks::read(const Request& request) const {
    const auto is_hook = [](const auto& pair) { return pair.first == kWebhookKey; };
    if (std::none_of(request.metadata.begin(), request.metadata.end(), is_hook))
        return std::string();
    const std::string text = metadata_of(request, kWebhookKey);
    auto url = http_parse_url(text);
    if (!url) return url.error();
    if (url->tls)
        return make_error(ErrorKind::invalid_request,
                          "the URL is https, which this server has not");
    if (url->address && !policy_.allows(*url->address))
        return make_error(ErrorKind::permission, "blocked: " + url->host);
    return Json::object()
        .set("url", text)
        .set("token", metadata_of(request, kWebhookTokenKey))
        .write();
}

void Webhooks::refuse(const char* what, const std::string& id, const Error& why, size_t count) {
    ended_["refused"] += count;
    loop_->say(LogLevel::warning, Json::object()
                                      .set("event", "webhook")
                                      .set(what, id)
                                      .set("outcome", "refused")
                                      .set("count", count)
                                      .set("error", why.message));
}

/// Before the record of the response, so that none is without.
void Webhooks::keep(const std::string& id, const std::string& organisation, std::string head) {
    StoredResponse record;
    record.id = hook_record(id);
    record.organisation = organisation;
    record.kept = true;
    record.created_at_ms = loop_->store->now_ms();
    record.head = server_shared(std::move(head));
    loop_->store->add(std::move(record), loop_->when_kept(std::make_unique<ServerLoop::Job>()));
}

void Webhooks::forget(const std::string& id, const std::string& organisation) {
    loop_->store->erase(organisation, hook_record(id), false, loop_->store->now_ms(),
                        loop_->when_kept(std::make_unique<ServerLoop::Job>()));
}

void Webhooks::keep_body(const std::string& id, std::shared_ptr<const std::string> body) {
    if (!has(id)) return;
    loop_->store->finish(hook_record(id), std::move(body), loop_->store->now_ms(),
                         loop_->when_kept(std::make_unique<ServerLoop::Job>()));
}

void Webhooks::recover(StoredResponse stored) { left_.push_back(std::move(stored)); }

/// Those whose response goes on wait for its end; the others go on themselves. One of a batch's item
/// that is no response yet gets another record with that.
void Webhooks::recover_all() {
    for (const StoredResponse& stored : std::exchange(left_, {})) {
        const std::string id = stored.id.substr(webhook_prefix.size());
        const auto live = loop_->live.find(id);
        if (live != loop_->live.end()) live->second.webhook = true;
        else if (loop_->item_waits(id)) forget(id, stored.organisation);
        else begin_again(id, stored);
    }
}

// When it is sent.

void Webhooks::begin(const std::string& id, const std::string& organisation) {
    if (counts_[organisation] >= webhook_most_queued) {
        ++ended_["dropped"];
        loop_->note_trouble("webhook", server_overloaded("too many deliveries wait"), id);
        return forget(id, organisation);
    }
    StoredResponse stored;
    stored.organisation = organisation;
    begin_again(id, stored);
}

/// First to learn which host it goes to.
void Webhooks::begin_again(const std::string& id, const StoredResponse& stored) {
    Delivery& delivery = deliveries_[id];
    delivery.organisation = stored.organisation;
    delivery.tries = stored.attempts;
    delivery.began_ns = monotonic_ns();
    ++counts_[stored.organisation];
    send(id, delivery, false);
}

void Webhooks::send(const std::string& id, const Delivery& delivery, bool tries) {
    auto job = std::make_unique<HookJob>();
    job->id = id;
    job->organisation = delivery.organisation;
    job->tries = tries;
    job->work = [](ServerLoop& loop, ServerLoop::Job& one) {
        if (auto loaded = loop.webhooks.load(static_cast<HookJob&>(one)); !loaded)
            one.error = std::move(loaded.error());
    };
    job->next = [](ServerLoop& loop, ServerLoop::JobPtr<ServerLoop::Job> one) {
        loop.webhooks.loaded(static_cast<HookJob&>(*one));
    };
    loop_->outgoing.push_back(std::move(job));
}

/// On a worker. The response first: where it is gone, its body was kept before.
Result<void> Webhooks::load(HookJob& job) const {
    const auto response = loop_->store->find(job.organisation, job.id);
    const auto hook = loop_->store->find(job.organisation, hook_record(job.id));
    if (!hook || !hook->head) return make_error(ErrorKind::not_found, "its record is gone");
    const auto head = Json::parse(*hook->head);
    if (!head) return head.error();
    const auto url = http_parse_url((*head)["url"].as_string());
    if (!url) return url.error();
    job.host = url->host;
    if (!job.tries) return {};
    const auto body = response && response->object ? response->object : hook->object;
    if (!body) return make_error(ErrorKind::not_found, "its response is gone");
    HttpCall& call = job.errand.call;
    call.host = url->host;
    call.port = url->port;
    call.method = "POST";
    call.target = url->target;
    call.headers = webhook_headers(job.id, (*head)["token"].as_string(), *body,
                                   unix_time_ms() / 1000);
    call.headers.emplace_back("Host", url->authority());
    call.body = *body;
    call.timeout_ms = webhook_timeout_ms;
    call.max_reply_bytes = webhook_reply_bytes;
    job.errand.policy = &policy_;
    job.errand.head_is_enough = true;
    return {};
}

void Webhooks::loaded(HookJob& job) {
    const auto found = deliveries_.find(job.id);
    if (found == deliveries_.end()) return;
    Delivery& delivery = found->second;
    if (!job.tries) {
        if (job.error) return end(job.id, "failed", job.error->message);
        delivery.host = job.host;
        return queue(job.id, delivery);
    }
    if (job.error) return end_try(job.id, *job.error);
    ++tried_;
    calls_[loop_->http->call(std::move(job.errand), this)] = job.id;
}

void Webhooks::queue(const std::string& id, const Delivery& delivery) {
    Host& host = hosts_[delivery.host];
    host.waiting.push_back(id);
    offer(delivery.host, host);
    run();
}

void Webhooks::offer(const std::string& name, Host& host) {
    if (host.ready || host.waiting.empty() || host.active >= webhook_most_per_host) return;
    host.ready = true;
    ready_.push_back(name);
}

/// Hosts take turns.
void Webhooks::run() {
    while (active_ < webhook_most_active && !ready_.empty()) {
        const std::string name = std::move(ready_.front());
        ready_.pop_front();
        Host& host = hosts_[name];
        host.ready = false;
        const std::string id = std::move(host.waiting.front());
        host.waiting.pop_front();
        ++active_;
        ++host.active;
        offer(name, host);
        send(id, deliveries_[id], true);
    }
}

void Webhooks::on_tick(uint64_t now_ns) {
    while (!later_.empty() && later_.begin()->first <= now_ns) {
        const std::string id = std::move(later_.begin()->second);
        later_.erase(later_.begin());
        if (const auto found = deliveries_.find(id); found != deliveries_.end())
            queue(id, found->second);
    }
}

// How it went.

void Webhooks::on_reply(uint64_t call, Result<HttpReply> reply) {
    const auto found = calls_.find(call);
    const std::string id = std::move(found->second);
    calls_.erase(found);
    end_try(id, std::move(reply));
}

void Webhooks::end_try(const std::string& id, Result<HttpReply> reply) {
    Delivery& delivery = deliveries_[id];
    const std::string name = delivery.host;
    Host& host = hosts_[name];
    --active_;
    --host.active;
    offer(name, host);
    if (host.active == 0 && !host.ready) hosts_.erase(name);
    ++delivery.tries;
    delivery.status = reply ? reply->status : 0;
    if (reply && reply->status / 100 == 2) end(id, "delivered");
    else if (!reply && reply.error().kind == ErrorKind::permission)
        end(id, "refused", reply.error().message);
    else if (!reply && reply.error().kind == ErrorKind::not_found)
        end(id, "failed", reply.error().message);
    else if (delivery.tries >= webhook_tries) end(id, "failed", reply ? "" : reply.error().message);
    else retry(id, delivery);
    run();
}

/// The count of tries survives a restart; the pause does not.
void Webhooks::retry(const std::string& id, const Delivery& delivery) {
    loop_->store->begin(hook_record(id), delivery.tries,
                        loop_->when_kept(std::make_unique<ServerLoop::Job>()));
    const uint64_t pause_ns = with_jitter_ns(webhook_retry_s[delivery.tries - 1]);
    later_.emplace(monotonic_ns() + pause_ns, id);
}

void Webhooks::end(const std::string& id, const char* outcome, const std::string& error) {
    const auto found = deliveries_.find(id);
    const Delivery delivery = std::move(found->second);
    deliveries_.erase(found);
    if (--counts_[delivery.organisation] == 0) counts_.erase(delivery.organisation);
    ++ended_[outcome];
    forget(id, delivery.organisation);
    const double ms = static_cast<double>(monotonic_ns() - delivery.began_ns) / 1e6;
    Json line = Json::object()
                    .set("event", "webhook")
                    .set("response", id)
                    .set("host", delivery.host)
                    .set("outcome", outcome)
                    .set("status", delivery.status)
                    .set("tries", delivery.tries)
                    .set("ms", server_rounded(ms));
    if (!error.empty()) line.set("error", printable(error));
    const bool delivered = std::string_view(outcome) == "delivered";
    loop_->say(delivered ? LogLevel::info : LogLevel::warning, line);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER
