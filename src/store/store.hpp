// >>store
// Owns: the responses that a server has accepted: the request as received, what was resolved when
//       it was accepted, the object that was answered; the reservations of idempotency keys.
// Assumes: ids that nobody can guess and that are never used twice.
// Promises: a record is seen by its own organisation only; what is not terminal never goes early;
//           what a completion reported is kept.
#pragma once

#include "base/base.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {
class Folder;
}

/// What a Store keeps of one response, or of one conversation: that has an object alone, which may
/// be replaced; so may that of a record that is `kept`.
struct StoredResponse {
    std::string id;
    std::string organisation;
    std::string reservation;  ///< key id and idempotency key, unique in its organisation; or empty
    std::string fingerprint;  ///< of the request that reserved it
    bool background = false;
    bool conversation = false;  ///< is none of the responses that `list` tells of
    bool kept = false;          ///< neither, and never terminal: it stays until it is erased
    bool terminal = false;
    uint32_t attempts = 0;                            ///< how often its work was begun
    int64_t created_at_ms = 0;                        ///< by Store::now_ms
    int64_t ended_at_ms = 0;                          ///< by Store::now_ms; 0 until terminal
    std::shared_ptr<const std::string> head = {};     ///< JSON: what acceptance resolved
    std::shared_ptr<const std::string> request = {};  ///< JSON: the body as received
    std::shared_ptr<const std::string> object = {};   ///< JSON: as answered; null until terminal
};

/// Who holds a reservation.
struct Reservation {
    std::string id;
    std::string fingerprint;
    bool deleted = false;  ///< the response is gone; the key stays taken until it expires
};

/// How a Store reports that a change is kept, or is not: one call, from any thread, maybe at once.
struct StoreDone {
    void (*call)(void* context, Result<void> result) = nullptr;
    void* context = nullptr;
};

/// Where a Server keeps its records: MemoryStore, FileStore, or one of your own.
/// Threads: every member from any thread. Those with a StoreDone return at once and report when the
/// change cannot be lost any more; find may wait for a disk; the rest answer from memory.
class VALAR_API Store {
public:
    virtual ~Store() = default;
    /// What its times are: first unix time, then the monotonic clock's, whoever sets the calendar.
    virtual int64_t now_ms() const;
    /// A new unfinished record, its reservation with it. Errors: conflict, overloaded, io.
    virtual void add(StoredResponse record, StoreDone done) = 0;
    /// Work on it begins for the attempts-th time. Errors: not_found; io.
    virtual void begin(const std::string& id, uint32_t attempts, StoreDone done) = 0;
    /// Makes it terminal; of a conversation, also the next object; of what is kept, that alone.
    /// Errors: not_found; overloaded; io.
    virtual void finish(const std::string& id, std::shared_ptr<const std::string> object,
                        int64_t now_ms, StoreDone done) = 0;
    /// Drops a record; with `tombstone` its reservation stays its time. Errors: not_found; io.
    virtual void erase(const std::string& organisation, const std::string& id, bool tombstone,
                       int64_t now_ms, StoreDone done) = 0;
    /// Nothing when there is no such record or it is another organisation's.
    virtual std::optional<StoredResponse> find(std::string_view organisation,
                                               const std::string& id) = 0;
    virtual std::optional<Reservation> reserved(const std::string& organisation,
                                                const std::string& reservation) = 0;
    /// Ids of an organisation's records, newest first, those older than `after` (empty: from the
    /// newest). Errors: not_found when `after` is none of them.
    virtual Result<std::vector<std::string>> list(const std::string& organisation,
                                                  const std::string& after, size_t limit) = 0;
    /// The records that are not terminal, without head and request.
    virtual std::vector<StoredResponse> unfinished() = 0;
    /// Drops what has been terminal for longer than the store keeps it. Called about once a minute.
    virtual void expire(int64_t now_ms) = 0;
    virtual uint64_t bytes() const = 0;  ///< that records take
    virtual int64_t retention_ms() const { return int64_t{48} * 3600 * 1000; }  ///< see expire
    /// That its disk had free of late. UINT64_MAX: unknown, or it has none.
    virtual uint64_t free_bytes() const { return UINT64_MAX; }
    /// Why new records are refused until that is mended; nothing: they are taken.
    virtual std::optional<Error> failure() const { return std::nullopt; }
};

namespace detail {

/// What a Store is asked to change.
struct StoreChange {
    enum class Kind : uint8_t { add, begin, finish, erase, expire };
    Kind kind = Kind::expire;
    StoredResponse record = {};
    bool tombstone = false;
    int64_t now_ms = 0;
    StoreDone done = {};
};

struct StoreRecords;

/// What MemoryStore and FileStore share: the index, and what it can answer alone.
class VALAR_API IndexedStore : public Store {
public:
    IndexedStore();
    ~IndexedStore() override;
    void add(StoredResponse record, StoreDone done) override;
    void begin(const std::string& id, uint32_t attempts, StoreDone done) override;
    void finish(const std::string& id, std::shared_ptr<const std::string> object, int64_t now_ms,
                StoreDone done) override;
    void erase(const std::string& organisation, const std::string& id, bool tombstone,
               int64_t now_ms, StoreDone done) override;
    std::optional<Reservation> reserved(const std::string& organisation,
                                        const std::string& reservation) override;
    Result<std::vector<std::string>> list(const std::string& organisation, const std::string& after,
                                          size_t limit) override;
    std::vector<StoredResponse> unfinished() override;
    void expire(int64_t now_ms) override;
    uint64_t bytes() const override;

protected:
    virtual void change(StoreChange change) = 0;
    std::unique_ptr<StoreRecords> records_;
};

}  // namespace detail

struct MemoryStoreOptions {
    uint64_t max_bytes = uint64_t{256} << 20;  ///< past it the oldest terminal records go early
    int64_t retention_s = 48 * 3600;           ///< of a terminal record and its reservation
};

/// Records in memory, until the process ends.
class VALAR_API MemoryStore : public detail::IndexedStore {
public:
    explicit MemoryStore(const MemoryStoreOptions& options = {});
    ~MemoryStore() override;
    std::optional<StoredResponse> find(std::string_view organisation,
                                       const std::string& id) override;
    int64_t retention_ms() const override;

private:
    void change(detail::StoreChange change) override;
    struct State;
    std::unique_ptr<State> state_;
};

struct FileStoreOptions {
    std::string path = {};                   ///< a directory of its own; made where absent
    uint64_t max_bytes = uint64_t{4} << 30;  ///< past it the oldest terminal records go early
    int64_t retention_s = 48 * 3600;         ///< of a terminal record and its reservation
    /// Opens a damaged journal with what is whole in it; the damaged files stay beside, renamed.
    bool recover = false;
    bool own_thread = true;                       ///< false: the host calls step()
    uint64_t segment_bytes = uint64_t{32} << 20;  ///< of one file of the journal, about
    LogSink log = {};
};

/// Records in a directory: an append-only journal in files of segment_bytes, and an index in
/// memory. What a StoreDone reported is on the disk. All that waits is synced at once. Deleted and
/// expired texts are off the disk within a day, as long as expire() is called. After a sync that
/// failed nothing is accepted any more. On a full disk reads go on and new records fail with
/// `overloaded` until there is room again; for deletions and what is unfinished a file `reserve` is
/// given up. The directory takes up to twice max_bytes and three segments. Stack: 24 KiB.
class VALAR_API FileStore : public detail::IndexedStore {
public:
    /// Errors: io (also: held by another process), bad_data naming file and offset of damage,
    /// unsupported when a newer version wrote it; then nothing was changed.
    static Result<std::unique_ptr<FileStore>> open(const FileStoreOptions& options);
    static Result<std::unique_ptr<FileStore>> open(const FileStoreOptions& options,
                                                   std::unique_ptr<detail::Folder> folder);
    ~FileStore() override;  ///< after all that was asked for is done
    /// Copies the store in the directory `from`, whatever process works on it, into `to`, which is
    /// made or is empty, and opens the copy: it holds what was reported before this was called, and
    /// takes so many bytes. Errors: as open; then nothing is left in `to`.
    static Result<uint64_t> back_up(const std::string& from, const std::string& to);
    std::optional<StoredResponse> find(std::string_view organisation,
                                       const std::string& id) override;
    /// Without own_thread: does what was asked for and some upkeep. Not twice at once. True: more.
    bool step();
    int64_t retention_ms() const override;
    int64_t now_ms() const override;  ///< goes on over a restart; time without power is left out
    uint64_t disk_bytes() const;      ///< of the journal's files
    uint64_t free_bytes() const override;
    std::optional<Error> failure() const override;

private:
    struct State;
    explicit FileStore(std::unique_ptr<State> state);
    void change(detail::StoreChange change) override;
    std::unique_ptr<State> state_;
};

}  // namespace v1
}  // namespace valar
