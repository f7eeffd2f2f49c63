#pragma once

#include "base/internal.hpp"
#include "store/store.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

inline constexpr uint64_t store_bookkeeping_bytes =
    600;  // of one record: map nodes, strings, places

inline uint64_t size_of_text(const std::shared_ptr<const std::string>& text) {
    return text ? text->size() : 0;
}

/// Where a journal's record lies.
struct JournalPlace {
    uint64_t offset = 0;
    uint32_t segment = 0;  // 0: nowhere
    uint32_t size = 0;
};

/// A record in memory. MemoryStore keeps the texts in it, FileStore only their places.
struct StoreEntry {
    StoredResponse record = {};
    uint64_t serial = 0;  // of arrival
    uint64_t text_bytes = 0;
    uint64_t object_bytes = 0;  // of those
    bool erased = false;        // only the reservation is left
    JournalPlace added = {}, begun = {}, ended = {};

    uint64_t cost() const {
        return store_bookkeeping_bytes + 2 * record.id.size() + record.organisation.size() +
               2 * record.reservation.size() + record.fingerprint.size() + text_bytes;
    }
    /// Whether an object may be put here.
    bool takes_object() const { return !erased && (!record.terminal || record.conversation); }
    bool is_listed() const { return !erased && !record.conversation && !record.kept; }
    void put_object(const std::shared_ptr<const std::string>& object, int64_t ended_at_ms) {
        record.terminal = !record.kept;
        record.ended_at_ms = ended_at_ms;
        record.object = object;
        text_bytes += size_of_text(object) - object_bytes;
        object_bytes = size_of_text(object);
        begun = {};
    }
    void drop_texts() { record.head = record.request = record.object = nullptr; }
};

inline int64_t store_retention_ms(int64_t seconds) {
    return std::clamp<int64_t>(seconds, 0, INT64_MAX / 1000) * 1000;
}

/// Whether `age_ms`, which is not negative, has passed since then. No difference overflows.
inline bool store_is_past(int64_t since_ms, int64_t age_ms, int64_t now_ms) {
    return now_ms >= since_ms && uint64_t(now_ms) - uint64_t(since_ms) >= uint64_t(age_ms);
}

/// The records by id, by reservation, by organisation in order of arrival, and by their end.
class StoreIndex {
public:
    using Aged = std::map<std::pair<int64_t, uint64_t>, const StoreEntry*>;  // by end and serial

    const StoreEntry* find(const std::string& id) const {
        const auto found = entries_.find(id);
        return found == entries_.end() ? nullptr : &found->second;
    }
    const StoreEntry* holder(const std::string& organisation,
                             const std::string& reservation) const {
        const auto found = reserved_.find({organisation, reservation});
        return found == reserved_.end() ? nullptr : found->second;
    }
    const Aged& ended() const { return ended_; }
    const std::unordered_map<std::string, StoreEntry>& entries() const { return entries_; }
    uint64_t bytes() const { return bytes_; }

    /// Puts an entry in the place of the one with its id; nothing: takes that away.
    void set(const std::string& id, std::optional<StoreEntry> entry) {
        const auto found = entries_.find(id);
        if (found != entries_.end()) {
            unlink(found->second);
            if (!entry) entries_.erase(found);
        }
        if (!entry) return;
        StoreEntry& kept = entries_[id];
        kept = std::move(*entry);
        link(kept);
    }
    StoreEntry* find(const std::string& id) {
        return const_cast<StoreEntry*>(std::as_const(*this).find(id));
    }
    std::optional<Reservation> reserved(const std::string& organisation,
                                        const std::string& reservation) const {
        const StoreEntry* entry = holder(organisation, reservation);
        if (!entry) return std::nullopt;
        return Reservation{entry->record.id, entry->record.fingerprint, entry->erased};
    }
    Result<std::vector<std::string>> list(const std::string& organisation, const std::string& after,
                                          size_t limit) const;
    std::vector<StoredResponse> unfinished() const;

private:
    void link(const StoreEntry& entry);
    void unlink(const StoreEntry& entry);

    std::unordered_map<std::string, StoreEntry> entries_;  // its nodes stay put
    std::map<std::pair<std::string, std::string>, const StoreEntry*> reserved_;
    std::map<std::string, std::map<uint64_t, const StoreEntry*>> arrivals_;  // by serial
    Aged ended_;
    uint64_t bytes_ = 0;
};

/// Changes that are decided and not yet in the index, in order: a commit makes all of them visible
/// at once, or none. A decision sees the index as these will leave it.
class StorePlan {
public:
    struct Step {
        std::string id;
        std::optional<StoreEntry> entry;  // nothing: it goes
        int64_t died_ms = 0;              // when texts of it went; 0: none did
        bool expired = false;
    };
    StorePlan(const StoreIndex* index, uint64_t max_bytes, int64_t retention_s, uint64_t* serial)
        : index_(index),
          max_bytes_(max_bytes),
          retention_ms_(store_retention_ms(retention_s)),
          serial_(serial) {}

    /// Decides one change; the steps that it takes are appended.
    Result<void> decide(const StoreChange& change);
    std::vector<Step>& steps() { return steps_; }
    void clear();

private:
    Result<void> add(const StoreChange& change);
    Result<void> update(const StoreChange& change);
    Result<void> erase(const StoreChange& change);
    Result<void> expire(const StoreChange& change);
    void make_room(uint64_t wanted, const std::string& keep, int64_t now_ms);
    void step(const std::string& id, std::optional<StoreEntry> entry, int64_t died_ms,
              bool expired = false);
    const StoreEntry* find(const std::string& id) const;
    bool is_reserved(const StoredResponse& record) const;

    const StoreIndex* index_;
    uint64_t max_bytes_;
    int64_t retention_ms_;
    uint64_t* serial_;
    std::vector<Step> steps_;
    std::unordered_map<std::string, size_t> last_;                         // step of an id
    std::map<std::pair<std::string, std::string>, std::string> reserved_;  // by steps: id
    int64_t growth_ = 0;
};

/// The index of a store, and the lock under which it is changed.
struct StoreRecords {
    mutable std::mutex mutex;
    StoreIndex index;
    uint64_t serial = 0;  // of the last arrival

    /// The record that an organisation may see, or nothing.
    std::optional<StoreEntry> find(std::string_view organisation, const std::string& id) const {
        const std::lock_guard<std::mutex> lock(mutex);
        const StoreEntry* entry = index.find(id);
        if (!entry || entry->erased || entry->record.organisation != organisation)
            return std::nullopt;
        return *entry;
    }
};

}  // namespace detail
}  // namespace v1
}  // namespace valar
