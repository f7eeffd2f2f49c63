#include "prologue.hpp"

#include "api_internal.hpp"
#include "engine/state.hpp"
#include "json_internal.hpp"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {

// ---- Conversation ----------------------------------------------------------------------------
//
// A save is a SaveHeader, the history as JSON, the pages, and the CRC-32C of all that.

namespace detail {
namespace {

// What every turn is made of, without what only a server reads.
Json settings_json(Request settings) {
    settings.user.clear();
    settings.metadata.clear();
    settings.previous_response_id.clear();
    settings.background = false;
    settings.store = true;
    return request_json(settings).set("organisation", settings.organisation);
}

Result<Request> read_settings(const Json& from) {
    auto settings = read_request(from, Dialect::openai);
    if (settings) settings->organisation = from["organisation"].as_string();
    return settings;
}

template <class Kind>
Kind read_kind(const Json& from, Kind last) {
    return static_cast<Kind>(std::min<uint64_t>(from.as_uint(), static_cast<uint64_t>(last)));
}

// ---- Saves of version 2: settings and items had forms of their own ---------------------------

Json settings_of_version_2(Json from) {
    Json bias = Json::object();
    for (const Json& pair : from["logit_bias"].items())
        bias.set(std::to_string(pair[0].as_int()), pair[1]);
    if (from["logprobs"].as_bool())
        from.set("include", Json::array().push("message.output_text.logprobs"));
    const auto window = read_kind(from["window"], Window::flex);
    from.set("metadata", Json::object().set(kWindowKey, window_name(window)));
    for (const char* name : {"model", "instructions", "prompt_cache_key"})
        if (from[name].as_string().empty()) from.erase(name);
    return from.set("logit_bias", std::move(bias));
}

Item item_of_version_2(const Json& from) {
    Item out;
    out.kind = read_kind(from[0], Item::Kind::custom_tool_call_output);
    out.role = read_kind(from[1], Role::function);
    out.call_id = from[2].as_string();
    out.name = from[3].as_string();
    out.arguments = from[4].as_string();
    for (const Json& part : from[5].items())
        out.content.push_back(
            {read_kind(part[0], ContentPart::Kind::refusal), std::string(part[1].as_string())});
    return out;
}

Result<std::vector<Item>> read_items(const Json& from) {
    std::vector<Item> items;
    for (size_t i = 0; i < from.size(); ++i) {
        if (from[i].is_array()) {
            items.push_back(item_of_version_2(from[i]));
            continue;
        }
        auto item = read_item(from[i], format("items[%zu]", i));
        if (!item) return item.error();
        items.push_back(std::move(*item));
    }
    return items;
}

// ---- The format of a save --------------------------------------------------------------------

struct SaveHeader {
    char magic[8] = {'v', 'a', 'l', 'a', 'r', 's', 'a', 'v'};
    uint32_t version = 3, numerics = kNumerics;
    Hash256 model;
    uint32_t precision = 0, kv_type = 0, page_tokens = 0;
    uint32_t pages = 0, unused[2] = {};  // pages that the text fills
    uint64_t page_bytes = 0, json_bytes = 0;
};
static_assert(sizeof(SaveHeader) == 88 && std::is_trivially_copyable_v<SaveHeader>);

// What a save must share with this engine.
Result<SaveHeader> save_header(const LoadedModel& model, const EngineOptions& options,
                               const PrefixCache& cache) {
    auto hash = model.fingerprint();
    if (!hash) return hash.error();
    SaveHeader out;
    out.model = *hash;
    out.precision = static_cast<uint32_t>(options.precision);
    out.kv_type = static_cast<uint32_t>(options.kv_type);
    out.page_tokens = options.page_tokens;
    out.page_bytes = cache.page_bytes();
    return out;
}

Error conversation_busy_error() {
    return make_error(ErrorKind::invalid_request, "the last turn is not finished yet",
                      "conversation_busy");
}

}  // namespace
}  // namespace detail

struct Conversation::State {
    Engine::State* engine = nullptr;
    Request settings;  // its input is items
    std::vector<Item> items;
    WhenFull when_full = WhenFull::refuse;
    size_t fixed = 0;        // of items: said before the first turn
    uint32_t forgotten = 0;  // turns
    std::string salt;        // of its pages' keys, if they came from bytes: see restore()
    std::shared_ptr<detail::Mailbox> reply;  // of the turn under way
    size_t saying = 0;                       // of items: what it says

    bool settle();
    Request request(std::vector<Item> said) const;
    bool forget_half(bool but_last);
    Result<detail::PromptPtr> prepare(const std::vector<Item>& more);
    Reply say(std::vector<Item> more);
    Result<std::vector<detail::Hash256>> page_keys() const;
    std::string history() const;
};

// Takes over the turn that was under way; false: it still is.
bool Conversation::State::settle() {
    if (!reply) return true;
    if (!reply->finished.load(std::memory_order_acquire)) return false;
    const Outcome& outcome = *reply->outcome;
    const bool said = outcome.status == Status::completed ||
                      (outcome.status == Status::cancelled && !outcome.text.empty());
    if (said) items.insert(items.end(), outcome.items.begin(), outcome.items.end());
    else items.resize(items.size() - saying);
    reply.reset();
    return true;
}

Request Conversation::State::request(std::vector<Item> said) const {
    Request out = settings;
    out.input = Input(std::move(said));
    return out;
}

namespace {

bool begins_turn(const Item& item) {
    return item.kind == Item::Kind::message && item.role == Role::user;
}

}  // namespace

// A turn begins with what the user said. False: there is none left, or only the last one, which
// results of its calls still belong to.
bool Conversation::State::forget_half(bool but_last) {
    std::vector<size_t> begins;
    for (size_t i = fixed; i < items.size(); ++i)
        if (begins_turn(items[i])) begins.push_back(i);
    if (!but_last) begins.push_back(items.size());
    if (begins.size() < 2) return false;
    const size_t half = begins.size() / 2;
    const auto first = items.begin() + static_cast<ptrdiff_t>(fixed);
    items.erase(first, items.begin() + static_cast<ptrdiff_t>(begins[half]));
    forgotten += static_cast<uint32_t>(half);
    return true;
}

// An answer should have as much room as it may take, or at least a quarter of the context.
Result<detail::PromptPtr> Conversation::State::prepare(const std::vector<Item>& more) {
    const uint32_t quarter = engine->prompts.context() / 4;
    const uint32_t room = std::min(settings.max_output_tokens.value_or(quarter), quarter);
    for (;;) {
        std::vector<Item> said = items;
        said.insert(said.end(), more.begin(), more.end());
        auto prompt = engine->prompts.prepare(request(std::move(said)), salt);
        const bool full = prompt ? (*prompt)->max_output < room
                                 : prompt.error().code == "context_length_exceeded";
        const bool goes_on = more.empty() || !begins_turn(more.front());
        if (!full || when_full == WhenFull::refuse || !forget_half(goes_on)) return prompt;
    }
}

Reply Conversation::State::say(std::vector<Item> more) {
    if (!settle()) return engine->reply_to(detail::conversation_busy_error());
    Reply made = engine->reply_to(prepare(more));
    reply = made.mailbox_;
    saying = more.size();
    items.insert(items.end(), std::make_move_iterator(more.begin()),
                 std::make_move_iterator(more.end()));
    return made;
}

// Of the pages that what was said fills.
Result<std::vector<detail::Hash256>> Conversation::State::page_keys() const {
    if (items.empty()) return std::vector<detail::Hash256>();
    return engine->prompts.page_keys(request(items), salt);
}

std::string Conversation::State::history() const {
    Json said = Json::array();
    for (const Item& item : items) said.push(detail::item_json(item));
    return Json::object()
        .set("settings", detail::settings_json(settings))
        .set("when_full", static_cast<uint32_t>(when_full))
        .set("fixed", fixed)
        .set("forgotten", forgotten)
        .set("items", std::move(said))
        .write();
}

Conversation::Conversation(std::unique_ptr<State> state) : state_(std::move(state)) {}
Conversation::Conversation(Conversation&& other) noexcept = default;
Conversation& Conversation::operator=(Conversation&& other) noexcept = default;
Conversation::~Conversation() = default;

Conversation::Conversation(Engine& engine, Request settings, WhenFull when_full)
    : state_(std::make_unique<State>()) {
    state_->engine = engine.state_.get();
    state_->when_full = when_full;
    state_->items = std::move(settings.input.items);
    if (state_->items.empty() && !settings.input.text.empty())
        state_->items.push_back(Item::message(Role::user, std::move(settings.input.text)));
    state_->fixed = state_->items.size();
    settings.input = {};
    state_->settings = std::move(settings);
}

Reply Conversation::say(std::string_view words) {
    return say({Item::message(Role::user, std::string(words))});
}

Reply Conversation::say(std::vector<Item> items) { return state_->say(std::move(items)); }

std::span<const Item> Conversation::items() {
    const bool settled = state_->settle();
    return std::span(state_->items).first(state_->items.size() - (settled ? 0 : state_->saying));
}

uint32_t Conversation::forgotten_turns() const { return state_->forgotten; }

Result<Conversation> Conversation::fork() {
    if (!state_->settle()) return detail::conversation_busy_error();
    return Conversation(std::make_unique<State>(*state_));
}

Result<std::vector<std::byte>> Conversation::save(bool pages) {
    if (!state_->settle()) return detail::conversation_busy_error();
    Engine::State& engine = *state_->engine;
    auto turn = engine.take_turn("save()");
    if (!turn) return turn.error();
    const std::string history = state_->history();
    auto keys = pages ? state_->page_keys() : Result(std::vector<detail::Hash256>());
    if (!keys) return keys.error();
    const size_t end = engine.cache.find_end(*keys);
    auto page_bytes = engine.cache.count_bytes(end);
    if (!page_bytes) return page_bytes.error();
    auto made = detail::save_header(*engine.model, engine.options, engine.cache);
    if (!made) return made.error();
    detail::SaveHeader header = *made;
    header.pages = static_cast<uint32_t>(end);
    header.json_bytes = history.size();
    std::vector<std::byte> out(sizeof header + history.size() + static_cast<size_t>(*page_bytes) +
                               sizeof(uint32_t));
    std::byte* at = out.data();
    const auto put = [&](const void* from, size_t size) {
        std::memcpy(at, from, size);
        at += size;
    };
    put(&header, sizeof header);
    put(history.data(), history.size());
    engine.cache.export_pages(std::span(*keys).first(end), at);
    at += static_cast<size_t>(*page_bytes);
    const uint32_t sum = detail::crc32c(out.data(), out.size() - sizeof sum);
    put(&sum, sizeof sum);
    return out;
}

Result<Conversation> Conversation::restore(Engine& to, std::span<const std::byte> saved) {
    const auto refuse = [](ErrorKind kind, const char* why) {
        return detail::make_error(kind, std::string("saved conversation: ") + why);
    };
    Engine::State& engine = *to.state_;
    auto made = detail::save_header(*engine.model, engine.options, engine.cache);
    if (!made) return made.error();
    const detail::SaveHeader& here = *made;
    detail::SaveHeader header;
    uint32_t sum = 0;
    if (saved.size() < sizeof header + sizeof sum) return refuse(ErrorKind::bad_data, "too short");
    std::memcpy(&header, saved.data(), sizeof header);
    if (std::memcmp(header.magic, here.magic, sizeof header.magic) != 0)
        return refuse(ErrorKind::bad_data, "this is none");
    if (header.version != here.version && header.version != 2)
        return refuse(ErrorKind::unsupported, "written by another version of valar");
    const auto body = saved.subspan(sizeof header, saved.size() - sizeof header - sizeof sum);
    std::memcpy(&sum, saved.data() + saved.size() - sizeof sum, sizeof sum);
    if (detail::crc32c(saved.data(), saved.size() - sizeof sum) != sum ||
        header.json_bytes > body.size())
        return refuse(ErrorKind::bad_data, "damaged");
    if (!(header.model == here.model)) return refuse(ErrorKind::unsupported, "of another model");
    const auto options = [](const detail::SaveHeader& of) {
        return std::tuple(of.numerics, of.precision, of.kv_type, of.page_tokens, of.page_bytes);
    };
    if (header.pages && options(header) != options(here))
        return refuse(ErrorKind::unsupported, "of an engine with other options");
    auto page_bytes = engine.cache.count_bytes(header.pages);
    if (!page_bytes || *page_bytes != body.size() - header.json_bytes)
        return refuse(ErrorKind::bad_data, "damaged");
    auto json = Json::parse(
        {reinterpret_cast<const char*>(body.data()), static_cast<size_t>(header.json_bytes)});
    if (!json) return refuse(ErrorKind::bad_data, json.error().message.c_str());

    const Json& kept = (*json)["settings"];
    auto settings = detail::read_settings(header.version == 2 ? detail::settings_of_version_2(kept)
                                                              : kept);
    auto items = detail::read_items((*json)["items"]);
    if (!settings || !items)
        return refuse(ErrorKind::bad_data,
                      (settings ? items.error() : settings.error()).message.c_str());
    auto state = std::make_unique<State>();
    state->engine = &engine;
    state->settings = std::move(*settings);
    state->items = std::move(*items);
    state->when_full = detail::read_kind((*json)["when_full"], WhenFull::drop_oldest_turns);
    state->forgotten = static_cast<uint32_t>((*json)["forgotten"].as_uint());
    state->fixed = static_cast<size_t>(
        std::min<uint64_t>((*json)["fixed"].as_uint(), state->items.size()));
    if (header.pages) state->salt = detail::sha256(saved.data(), saved.size()).hex();
    auto turn = engine.take_turn("restore()");
    if (!turn) return turn.error();
    auto keys = header.pages ? state->page_keys() : Result(std::vector<detail::Hash256>());
    if (!keys) return keys.error();
    if (engine.backend)
        engine.cache.import_pages(*keys, header.pages,
                                  body.data() + static_cast<size_t>(header.json_bytes));
    return Conversation(std::move(state));
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
