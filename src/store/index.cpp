// >>store
// One index holds the records of either store and the rules for changing them; what differs is
// where texts lie. FileStore adds the journal: see "The journal" below for its format.
//
// Ages go by a store's own time, Store::now_ms: what the calendar shows may be set by decades, and
// then fresh records would be dropped, their work done again, and old ones kept for ever.
#include "prologue.hpp"

#include "store/index.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {

int64_t Store::now_ms() const {
    struct Begin {
        int64_t unix_ms = std::max<int64_t>(1, detail::unix_time_ms());  // 0 says "never"
        uint64_t clock_ns = detail::monotonic_ns();
    };
    static const Begin begin;
    return begin.unix_ms + int64_t((detail::monotonic_ns() - begin.clock_ns) / 1'000'000);
}

}  // namespace v1
}  // namespace valar

#ifndef VALAR_NO_STORE
namespace valar {
inline namespace v1 {
namespace detail {

void StoreIndex::link(const StoreEntry& entry) {
    const StoredResponse& record = entry.record;
    bytes_ += entry.cost();
    if (entry.is_listed()) arrivals_[record.organisation][entry.serial] = &entry;
    if (record.terminal) ended_[{record.ended_at_ms, entry.serial}] = &entry;
    if (!record.reservation.empty()) reserved_[{record.organisation, record.reservation}] = &entry;
}

void StoreIndex::unlink(const StoreEntry& entry) {
    const StoredResponse& record = entry.record;
    bytes_ -= entry.cost();
    arrivals_[record.organisation].erase(entry.serial);
    ended_.erase({record.ended_at_ms, entry.serial});
    if (holder(record.organisation, record.reservation) == &entry)
        reserved_.erase({record.organisation, record.reservation});
}

Error store_not_found() {
    return make_error(ErrorKind::not_found, "no response has this id", "not_found");
}

Result<std::vector<std::string>> StoreIndex::list(const std::string& organisation,
                                                  const std::string& after, size_t limit) const {
    uint64_t before = UINT64_MAX;
    if (!after.empty()) {
        const StoreEntry* entry = find(after);
        if (!entry || !entry->is_listed() || entry->record.organisation != organisation)
            return store_not_found();
        before = entry->serial;
    }
    std::vector<std::string> ids;
    const auto own = arrivals_.find(organisation);
    if (own == arrivals_.end()) return ids;
    for (auto at = own->second.lower_bound(before);
         ids.size() < limit && at != own->second.begin();)
        ids.push_back((--at)->second->record.id);
    return ids;
}

std::vector<StoredResponse> StoreIndex::unfinished() const {
    std::vector<const StoreEntry*> entries;
    for (const auto& [id, entry] : entries_)
        if (!entry.record.terminal) entries.push_back(&entry);
    sort_items(entries,
               [](const StoreEntry* a, const StoreEntry* b) { return a->serial < b->serial; });
    std::vector<StoredResponse> found;
    for (const StoreEntry* entry : entries) {
        found.push_back(entry->record);
        found.back().head = found.back().request = nullptr;
    }
    return found;
}

void StorePlan::clear() {
    steps_.clear();
    last_.clear();
    reserved_.clear();
    growth_ = 0;
}

const StoreEntry* StorePlan::find(const std::string& id) const {
    const auto found = last_.find(id);
    if (found == last_.end()) return index_->find(id);
    const Step& step = steps_[found->second];
    return step.entry ? &*step.entry : nullptr;
}

bool StorePlan::is_reserved(const StoredResponse& record) const {
    if (record.reservation.empty()) return false;
    const auto planned = reserved_.find({record.organisation, record.reservation});
    if (planned != reserved_.end() && find(planned->second)) return true;
    const StoreEntry* holder = index_->holder(record.organisation, record.reservation);
    return holder && find(holder->record.id);
}

void StorePlan::step(const std::string& id, std::optional<StoreEntry> entry, int64_t died_ms,
                     bool expired) {
    const StoreEntry* before = find(id);
    growth_ += (entry ? int64_t(entry->cost()) : 0) - (before ? int64_t(before->cost()) : 0);
    if (entry && !entry->record.reservation.empty())
        reserved_[{entry->record.organisation, entry->record.reservation}] = id;
    steps_.push_back({id, std::move(entry), died_ms, expired});
    last_[id] = steps_.size() - 1;
}

/// The oldest terminal records go until `wanted` bytes more have room, or none is left.
void StorePlan::make_room(uint64_t wanted, const std::string& keep, int64_t now_ms) {
    for (const auto& [age, entry] : index_->ended()) {
        if (int64_t(index_->bytes() + wanted) + growth_ <= int64_t(max_bytes_)) return;
        const std::string& id = entry->record.id;
        if (id != keep && find(id)) step(id, std::nullopt, now_ms);
    }
    // Then those that ended in this very commit: the index does not list them yet.
    for (size_t i = 0, count = steps_.size(); i < count; ++i) {
        if (int64_t(index_->bytes() + wanted) + growth_ <= int64_t(max_bytes_)) return;
        const std::string id = steps_[i].id;
        const bool ended = steps_[i].entry && steps_[i].entry->record.terminal && last_[id] == i;
        if (ended && id != keep) step(id, std::nullopt, now_ms);
    }
}

Result<void> StorePlan::decide(const StoreChange& change) {
    switch (change.kind) {
        case StoreChange::Kind::add: return add(change);
        case StoreChange::Kind::erase: return erase(change);
        case StoreChange::Kind::expire: return expire(change);
        default: return update(change);
    }
}

Result<void> StorePlan::add(const StoreChange& change) {
    if (is_reserved(change.record))
        return make_error(ErrorKind::conflict, "the idempotency key is taken",
                          "idempotency_key_reused");
    if (find(change.record.id))
        return make_error(ErrorKind::internal, "a response id was used twice");
    StoreEntry entry;
    entry.record = change.record;
    entry.serial = ++*serial_;
    entry.text_bytes = size_of_text(entry.record.head) + size_of_text(entry.record.request);
    const uint64_t cost = entry.cost();
    make_room(cost, {}, entry.record.created_at_ms);
    if (int64_t(index_->bytes() + cost) + growth_ > int64_t(max_bytes_))
        return make_error(ErrorKind::overloaded, "the store of responses is full", "overloaded");
    step(change.record.id, std::move(entry), 0);
    return {};
}

/// begin and finish.
Result<void> StorePlan::update(const StoreChange& change) {
    const StoreEntry* found = find(change.record.id);
    const bool begins = change.kind == StoreChange::Kind::begin;
    if (!found || !(begins ? !found->record.terminal : found->takes_object()))
        return make_error(ErrorKind::not_found, "no unfinished response has this id", "not_found");
    StoreEntry entry = *found;
    const int64_t died_ms = entry.record.ended_at_ms != 0 ? change.now_ms : 0;  // the object before
    if (begins) entry.record.attempts = change.record.attempts;
    else entry.put_object(change.record.object, change.now_ms);
    step(change.record.id, std::move(entry), died_ms);
    // What was worked for is kept, even where it alone is more than the limit.
    if (!begins) make_room(0, change.record.id, change.now_ms);
    return {};
}

/// A tombstone is a record without texts.
Result<void> StorePlan::erase(const StoreChange& change) {
    const StoreEntry* found = find(change.record.id);
    if (!found || found->erased || found->record.organisation != change.record.organisation)
        return store_not_found();
    std::optional<StoreEntry> left;
    if (change.tombstone && !found->record.reservation.empty()) {
        left = *found;
        left->erased = true;
        left->text_bytes = left->object_bytes = 0;
        left->added = left->begun = left->ended = {};
        left->drop_texts();
        if (!left->record.terminal) left->record.ended_at_ms = change.now_ms;
        left->record.terminal = true;
    }
    step(change.record.id, std::move(left), change.now_ms);
    return {};
}

Result<void> StorePlan::expire(const StoreChange& change) {
    for (const auto& [end, entry] : index_->ended()) {
        if (!store_is_past(end.first, retention_ms_, change.now_ms)) break;
        if (find(entry->record.id))
            step(entry->record.id, std::nullopt, end.first + retention_ms_, true);
    }
    return {};
}

IndexedStore::IndexedStore() : records_(std::make_unique<StoreRecords>()) {}
IndexedStore::~IndexedStore() = default;

void IndexedStore::add(StoredResponse record, StoreDone done) {
    change({StoreChange::Kind::add, std::move(record), false, 0, done});
}

void IndexedStore::begin(const std::string& id, uint32_t attempts, StoreDone done) {
    StoredResponse record;
    record.id = id;
    record.attempts = attempts;
    change({StoreChange::Kind::begin, std::move(record), false, 0, done});
}

void IndexedStore::finish(const std::string& id, std::shared_ptr<const std::string> object,
                          int64_t now_ms, StoreDone done) {
    StoredResponse record;
    record.id = id;
    record.object = std::move(object);
    change({StoreChange::Kind::finish, std::move(record), false, now_ms, done});
}

void IndexedStore::erase(const std::string& organisation, const std::string& id, bool tombstone,
                         int64_t now_ms, StoreDone done) {
    StoredResponse record;
    record.id = id;
    record.organisation = organisation;
    change({StoreChange::Kind::erase, std::move(record), tombstone, now_ms, done});
}

void IndexedStore::expire(int64_t now_ms) {
    change({StoreChange::Kind::expire, {}, false, now_ms, {}});
}

std::optional<Reservation> IndexedStore::reserved(const std::string& organisation,
                                                  const std::string& reservation) {
    const std::lock_guard<std::mutex> lock(records_->mutex);
    return records_->index.reserved(organisation, reservation);
}

Result<std::vector<std::string>> IndexedStore::list(const std::string& organisation,
                                                    const std::string& after, size_t limit) {
    const std::lock_guard<std::mutex> lock(records_->mutex);
    return records_->index.list(organisation, after, limit);
}

std::vector<StoredResponse> IndexedStore::unfinished() {
    const std::lock_guard<std::mutex> lock(records_->mutex);
    return records_->index.unfinished();
}

uint64_t IndexedStore::bytes() const {
    const std::lock_guard<std::mutex> lock(records_->mutex);
    return records_->index.bytes();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {

// ---- MemoryStore -----------------------------------------------------------------------------

struct MemoryStore::State {
    MemoryStoreOptions options;
    detail::StorePlan plan;
};

MemoryStore::MemoryStore(const MemoryStoreOptions& options)
    : state_(new State{
          options, {&records_->index, options.max_bytes, options.retention_s, &records_->serial}}) {
}
MemoryStore::~MemoryStore() = default;
int64_t MemoryStore::retention_ms() const {
    return detail::store_retention_ms(state_->options.retention_s);
}

void MemoryStore::change(detail::StoreChange change) {
    Result<void> result;
    {
        const std::lock_guard<std::mutex> lock(records_->mutex);
        result = state_->plan.decide(change);
        for (auto& step : state_->plan.steps()) records_->index.set(step.id, std::move(step.entry));
        state_->plan.clear();
    }
    if (change.done.call) change.done.call(change.done.context, std::move(result));
}

std::optional<StoredResponse> MemoryStore::find(std::string_view organisation,
                                                const std::string& id) {
    auto entry = records_->find(organisation, id);
    if (!entry) return std::nullopt;
    return std::move(entry->record);
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_STORE
