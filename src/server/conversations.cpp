// Conversations: records whose object, {"created_at", "metadata", "items"}, is replaced as a whole.
// The changes of one follow each other; its items are a response's input as they stand.
#include "prologue.hpp"

#include "server/loop.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

Json server_conversation(const std::string& id, const ServerConversation& conversation) {
    return Json::object()
        .set("id", id)
        .set("object", "conversation")
        .set("created_at", conversation.created_at)
        .set("metadata", conversation.metadata);
}

Json server_deleted_conversation(const std::string& id) {
    return Json::object().set("id", id).set("object", "conversation.deleted").set("deleted", true);
}

namespace {

Error server_no_conversation(std::string_view id) {
    return server_not_found("no conversation '" + printable(id) + "'");
}

Error server_no_item(std::string_view id) {
    return server_not_found("no item '" + printable(id) + "' in this conversation");
}

Result<ServerConversation> conversation_read(const std::string& text) {
    auto object = Json::parse(text);
    if (!object) return object.error();
    ServerConversation read{(*object)["created_at"], (*object)["metadata"], {}};
    for (Json& item : object->find("items")->items()) read.items.push_back(std::move(item));
    return read;
}

std::shared_ptr<const std::string> conversation_written(const ServerConversation& conversation) {
    return server_shared(Json::object()
                             .set("created_at", conversation.created_at)
                             .set("metadata", conversation.metadata)
                             .set("items", Json(std::vector<Json>(conversation.items)))
                             .write());
}

/// The body of a request; what is not there is an empty object.
Result<Json> conversation_body(const std::string& body) {
    if (trim(body).empty()) return Json::object();
    auto json = Json::parse(body);
    if (json && !json->is_object())
        return server_field("invalid_type", "", "the body must be a JSON object");
    return json;
}

Result<Json> conversation_metadata(const Json& body) {
    const Json& metadata = body["metadata"];
    if (metadata.is_null()) return Json::object();
    auto read = read_request(Json::object().set("metadata", metadata), Dialect::openai);
    if (!read) return read.error();
    return metadata;
}

/// The items of a body, in their long form, with ids of their own.
Result<std::vector<Json>> conversation_items(const Json& body) {
    std::vector<Json> items;
    const Json& given = body["items"];
    if (given.is_null()) return items;
    if (!given.is_array()) return api_wrong_type("items", "an array", given);
    if (given.size() > server_most_new_items)
        return server_field("array_above_max_length", "items",
                            format("'items' has %zu items; at most %zu are allowed", given.size(),
                                   server_most_new_items));
    auto seed = draw_id("items_");
    if (!seed) return seed.error();
    Json fresh = given;
    for (size_t i = 0; i < given.size(); ++i) {
        if (auto read = read_item(given[i], api_index("items", i)); !read) return read.error();
        fresh.items()[i].erase("id");
    }
    return render_input_items(Json::object().set("input", std::move(fresh)), *seed);
}

std::vector<Json>::iterator conversation_find(ServerConversation& conversation,
                                              std::string_view id) {
    return std::find_if(conversation.items.begin(), conversation.items.end(),
                        [&](const Json& item) { return item["id"].as_string() == id; });
}

/// Those that are there already, as after a crash, stay as they are.
void conversation_add(ServerConversation& conversation, const std::vector<Json>& items) {
    for (const Json& item : items)
        if (conversation_find(conversation, item["id"].as_string()) == conversation.items.end())
            conversation.items.push_back(item);
}

}  // namespace

// ---- What is asked of one ------------------------------------------------------------------------

/// An operation: with the conversation as it is it makes the answer; `changes`: the next one too.
struct ServerLoop::ConversationStep {
    using Job = ConversationJob;
    static Result<void> show(Job& job, ServerConversation& conversation) {
        job.text = server_conversation(job.id, conversation).write();
        return {};
    }
    static Result<void> update(Job& job, ServerConversation& conversation) {
        auto body = conversation_body(job.body);
        if (!body) return body.error();
        if ((*body)["metadata"].is_null())
            return server_field("missing_required_parameter", "metadata", "'metadata' is required");
        auto metadata = conversation_metadata(*body);
        if (!metadata) return metadata.error();
        conversation.metadata = std::move(*metadata);
        return show(job, conversation);
    }
    static Result<void> list(Job& job, ServerConversation& conversation) {
        auto page = server_page_of(std::move(conversation.items), job.query);
        if (!page) return page.error();
        job.text = std::move(*page);
        return {};
    }
    static Result<void> add(Job& job, ServerConversation& conversation) {
        auto body = conversation_body(job.body);
        if (!body) return body.error();
        if ((*body)["items"].is_null())
            return server_field("missing_required_parameter", "items", "'items' is required");
        auto items = conversation_items(*body);
        if (!items) return items.error();
        conversation_add(conversation, *items);
        job.text = server_list(std::move(*items), false).write();
        return {};
    }
    static Result<void> show_item(Job& job, ServerConversation& conversation) {
        const auto item = conversation_find(conversation, job.item);
        if (item == conversation.items.end()) return server_no_item(job.item);
        job.text = item->write();
        return {};
    }
    static Result<void> remove_item(Job& job, ServerConversation& conversation) {
        const auto item = conversation_find(conversation, job.item);
        if (item == conversation.items.end()) return server_no_item(job.item);
        conversation.items.erase(item);
        return show(job, conversation);
    }
    /// What a response was asked and what it answered.
    static Result<void> extend(Job& job, ServerConversation& conversation) {
        conversation_add(conversation, job.finish->said);
        return {};
    }
};

void ServerLoop::send_conversation(Exchange& exchange, HttpRequest& request,
                                   ConversationApply apply, bool changes) {
    auto job = std::make_unique<ConversationJob>();
    job->exchange = exchange.number;
    job->organisation = exchange.organisation;
    job->id = exchange.argument;
    job->item = exchange.extra().item;
    job->query = exchange.query;
    job->body = std::move(request.body);
    job->apply = apply;
    job->changes = changes;
    send_conversation(std::move(job));
}

/// Changes wait for those before them.
void ServerLoop::send_conversation(JobPtr<ConversationJob> job) {
    if (job->changes) {
        const auto [line, first] = conversations.try_emplace(job->id);
        if (!first) return line->second.push_back(std::move(job));
    }
    send_job<&ServerLoop::conversation_work, &ServerLoop::conversation_keep>(std::move(job));
}

void ServerLoop::conversation_work(ConversationJob& job) {
    const auto work = [&]() -> Result<void> {
        const auto stored = find_record(job.organisation, job.id, true);
        if (!stored || !stored->object) return server_no_conversation(job.id);
        auto conversation = conversation_read(*stored->object);
        if (!conversation) return conversation.error();
        auto applied = job.apply(job, *conversation);
        if (applied && job.changes) job.changed = conversation_written(*conversation);
        if (job.changed && job.changed->size() > options.max_body_bytes)
            return server_field("invalid_value", "items", "the conversation is too long");
        return applied;
    };
    if (auto worked = work(); !worked) job.error = std::move(worked.error());
}

void ServerLoop::conversation_keep(JobPtr<ConversationJob> job) {
    if (job->error || !job->changes) return conversation_done(std::move(job));
    const std::string id = job->id;
    auto changed = job->changed;
    store->finish(id, std::move(changed), store->now_ms(),
                  on_kept<&ServerLoop::conversation_kept>(std::move(job)));
}

void ServerLoop::conversation_kept(JobPtr<ConversationJob> job) {
    if (job->error && job->error->kind == ErrorKind::not_found)  // deleted meanwhile
        job->error = server_no_conversation(job->id);
    conversation_done(std::move(job));
}

void ServerLoop::conversation_done(JobPtr<ConversationJob> job) {
    if (const auto line = conversations.find(job->id);
        job->changes && line != conversations.end()) {
        if (line->second.empty()) {
            conversations.erase(line);
        } else {
            auto next = std::move(line->second.front());
            line->second.pop_front();
            send_job<&ServerLoop::conversation_work, &ServerLoop::conversation_keep>(
                std::move(next));
        }
    }
    if (!job->finish) return answer_job(std::move(job));
    if (job->error) note_trouble("conversation", *job->error, job->id);
    finish_keep(std::move(job->finish));
}

/// Before the response is kept as finished: after a crash in between it is made again, and adds the
/// same items again, which then are there already.
void ServerLoop::extend_conversation(JobPtr<FinishJob> finish) {
    auto job = std::make_unique<ConversationJob>();
    job->organisation = finish->stored.organisation;
    job->id = std::exchange(finish->conversation, {});
    job->apply = &ConversationStep::extend;
    job->changes = true;
    job->finish = std::move(finish);
    send_conversation(std::move(job));
}

// ---- Making one, and its end ---------------------------------------------------------------------

void ServerLoop::post_conversation(Exchange& exchange, HttpRequest& request) {
    auto job = std::make_unique<ConversationJob>();
    job->exchange = exchange.number;
    job->organisation = exchange.organisation;
    job->body = std::move(request.body);
    send_job<&ServerLoop::create_work, &ServerLoop::create_keep>(std::move(job));
}

void ServerLoop::create_work(ConversationJob& job) {
    const auto work = [&]() -> Result<void> {
        auto body = conversation_body(job.body);
        if (!body) return body.error();
        auto metadata = conversation_metadata(*body);
        if (!metadata) return metadata.error();
        auto items = conversation_items(*body);
        if (!items) return items.error();
        auto id = draw_id("conv_");
        if (!id) return id.error();
        job.id = std::move(*id);
        const ServerConversation conversation{unix_time_ms() / 1000, std::move(*metadata),
                                              std::move(*items)};
        job.changed = conversation_written(conversation);
        job.text = server_conversation(job.id, conversation).write();
        return {};
    };
    if (auto worked = work(); !worked) job.error = std::move(worked.error());
}

void ServerLoop::create_keep(JobPtr<ConversationJob> job) {
    if (job->error) return answer_job(std::move(job));
    StoredResponse record;
    record.id = job->id;
    record.organisation = job->organisation;
    record.conversation = true;
    record.created_at_ms = store->now_ms();
    store->add(std::move(record), on_kept<&ServerLoop::create_done>(std::move(job)));
}

void ServerLoop::create_done(JobPtr<ConversationJob> job) {
    if (job->error) return answer_job(std::move(job));
    const std::string id = job->id;
    auto object = job->changed;
    store->finish(id, std::move(object), store->now_ms(),
                  on_kept<&ServerLoop::conversation_kept>(std::move(job)));
}

void ServerLoop::delete_conversation(Exchange& exchange, HttpRequest&) {
    auto job = std::make_unique<ConversationJob>();
    job->exchange = exchange.number;
    job->id = exchange.argument;
    job->text = server_deleted_conversation(job->id).write();
    const std::string id = job->id;
    if (!id.starts_with("conv_")) return refuse(exchange, server_no_conversation(id));
    store->erase(exchange.organisation, id, false, store->now_ms(),
                 on_kept<&ServerLoop::conversation_kept>(std::move(job)));
}

void ServerLoop::get_conversation(Exchange& exchange, HttpRequest& request) {
    send_conversation(exchange, request, &ConversationStep::show, false);
}
void ServerLoop::update_conversation(Exchange& exchange, HttpRequest& request) {
    send_conversation(exchange, request, &ConversationStep::update, true);
}
void ServerLoop::get_items(Exchange& exchange, HttpRequest& request) {
    send_conversation(exchange, request, &ConversationStep::list, false);
}
void ServerLoop::post_items(Exchange& exchange, HttpRequest& request) {
    send_conversation(exchange, request, &ConversationStep::add, true);
}
void ServerLoop::get_item(Exchange& exchange, HttpRequest& request) {
    send_conversation(exchange, request, &ConversationStep::show_item, false);
}
void ServerLoop::delete_item(Exchange& exchange, HttpRequest& request) {
    send_conversation(exchange, request, &ConversationStep::remove_item, true);
}

/// The items of its conversation, up to the one that was the last at acceptance, come before the
/// request's own.
Result<void> ServerLoop::add_conversation(const std::string& organisation, Json* body,
                                          std::string* last) const {
    const Json& given = (*body)["conversation"];
    const std::string id(given.is_object() ? given["id"].as_string() : given.as_string());
    const auto stored = find_record(organisation, id, true);
    if (!stored || !stored->object) return server_no_conversation(id);
    auto conversation = conversation_read(*stored->object);
    if (!conversation) return conversation.error();
    Json items = Json::array();
    for (const Json& item : conversation->items) {
        if (*last == "none") break;
        items.push(item);
        if (item["id"].as_string() == *last) break;
    }
    *last = items.empty() ? "none" : std::string(items.items().back()["id"].as_string());
    for (Json& item : render_input_items(*body, "")) items.push(std::move(item));
    body->set("input", std::move(items)).erase("conversation");
    return {};
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER
