#pragma once

#include "digest_internal.hpp"
#include "store/index.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

// ---- The journal -----------------------------------------------------------------------------
// A directory holds `manifest` (which segments there are, in order), segments that grew
// (`00000001.journal`) or were copied by a compaction (`00000002.copy`), and `lock`. Numbers are
// little-endian.
//
//     manifest: "valarman", u32 version, u32 salt, u32 count, u32 next number, u32 planned number
//               (0: none), then for each segment u32 number, u32 kind (0: grew, 1: copied), u64
//               first sequence, u64 bytes, u32 records, u32 CRC of the heads of its records: all of
//               it, of the newest segment what it had then; u32 CRC of all before
//     segment:  "valarjnl", u32 version, u32 salt, u32 number, u64 first sequence, u32 CRC; records
//     record:   u32 magic, u16 type, u16 zero, u32 payload bytes, u32 back, u64 sequence,
//               u32 CRC of the payload, u32 CRC of the 28 bytes before; payload
//
// Sequence numbers ascend; in a segment that grew by one. `back` counts the records before this one
// in its commit, which is what one sync covered: a commit begins only when the one before it is on
// the disk. So a bad record is a torn tail if no valid record of a later commit follows: a crash
// may lose any part of a commit, but nothing before it. An orderly close writes a commit of its
// own. CRC-32C begins with the salt: no text that a client sends can look like a record.
//
// A mark says what the store's time was at an instant of the machine's clock. The next opening
// goes on from the newest one, with what that clock has counted since, if the machine was not
// started again meanwhile; else from just there, since nothing tells time without power from a
// calendar that was set. So records may be kept for longer, never for less. Where no mark is left,
// or an older version wrote the journal, time goes on from its last record.
//
// Compaction copies what is live in the oldest segments to new ones, byte for byte, and puts those
// in their place. It always begins with the oldest segment: a record that ends another's life never
// goes before that other does.
//
// Files that come from different moments (half of a backup, a disk that lost some) contradict each
// other, so that no record is lost without an error:
// * A segment that no longer grows is in the manifest with its size and checksum.
// * The manifest plans the number of the next segment before that file is made, and names it only
//   when its head is on the disk. A segment beyond the manifest's numbers is newer than it; one
//   that it names is never without a head.
// * Between the two the segment before gets a record which says that another follows: a manifest
//   that neither names nor plans one is older than that.
// * A copy begins with the sequence number that the journal had reached: one that is left over
//   shows when the rest is older.
// What cannot be told is the newest segment alone put back to an earlier moment of its own.

namespace valar {
inline namespace v1 {
namespace detail {

inline constexpr uint32_t journal_version = 2;               // of segments; 1 knew no `kept`
inline constexpr uint32_t journal_manifest_version = 2;      // 1 had sizes, and no more to compare
inline constexpr uint32_t journal_last_number = 99'999'999;  // a name has eight digits
inline constexpr uint64_t journal_last_sequence = uint64_t{1} << 63;  // far from where sums wrap
inline constexpr uint64_t journal_last_start = uint64_t{1} << 62;  // no file begins behind it, so
                                                                   // no record is written there
inline constexpr size_t journal_segment_head = 32;
inline constexpr size_t journal_record_head = 32;
inline constexpr uint32_t journal_magic = 0x315f4a56;  // "VJ_1"
inline constexpr uint64_t journal_max_payload = uint64_t{1} << 30;
inline constexpr size_t journal_write_bytes = size_t{4} << 20;  // gathered before a write
inline constexpr size_t journal_copy_bytes = size_t{1} << 20;   // of compaction, between commits
inline constexpr int64_t journal_dead_ms = 12 * 3600 * 1000;    // then what died leaves the disk
inline constexpr uint64_t journal_least_reserve = 64 << 10;     // on a small disk
inline constexpr uint64_t journal_look_ns = 1'000'000'000;      // between looks for room
inline constexpr int64_t journal_mark_ms = 10 * 60 * 1000;      // between marks

enum JournalType : uint16_t {
    journal_add = 1,
    journal_begin,
    journal_finish,
    journal_erase,
    journal_drop,
    journal_close,
    journal_roll,    // another segment follows
    journal_copied,  // first in a copy: u64, the sequence that the journal had reached
    journal_mark,    // the time: see above
    journal_types
};

template <class T>
void journal_put(std::string* out, T value) {
    out->append(reinterpret_cast<const char*>(&value), sizeof value);
}

template <class T>
T journal_get(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

/// Payloads are fields in a row: numbers of 7 bits a byte, the last byte below 128; texts behind
/// their size.
struct JournalEncoder {
    std::string* out;
    template <class Number>
    void number(Number& value) {
        uint64_t left = static_cast<uint64_t>(value);
        for (; left >= 128; left >>= 7) *out += static_cast<char>(left | 128);
        *out += static_cast<char>(left);
    }
    void text(const std::string& value) {
        size_t size = value.size();
        number(size);
        *out += value;
    }
    void shared(const std::shared_ptr<const std::string>& value) { text(value ? *value : ""); }
};

struct JournalDecoder {
    std::string_view left;
    bool good = true;

    uint64_t take_number() {
        uint64_t value = 0;
        for (int shift = 0; shift < 64 && !left.empty(); shift += 7) {
            const auto byte = static_cast<uint8_t>(left.front());
            left.remove_prefix(1);
            value |= uint64_t{byte & 127u} << shift;
            if (byte < 128) return value;
        }
        good = false;
        return 0;
    }
    template <class Number>
    void number(Number& value) {
        const uint64_t taken = take_number();
        value = static_cast<Number>(taken);
        good = good && static_cast<uint64_t>(value) == taken;
    }
    void text(std::string& value) {
        const uint64_t size = take_number();
        good = good && size <= left.size();
        if (!good) return;
        value = left.substr(0, size_t(size));
        left.remove_prefix(size_t(size));
    }
    void shared(std::shared_ptr<const std::string>& value) {
        std::string taken;
        text(taken);
        value = std::make_shared<const std::string>(std::move(taken));
    }
};

/// The fields of each type, for writing and for reading.
template <class Codec>
void journal_fields(Codec codec, uint16_t type, StoredResponse& record, int64_t& died_ms,
                    bool* good = nullptr) {
    if (type < journal_close || type == journal_mark) codec.text(record.id);  // a mark's: the boot
    if (type == journal_mark) {
        codec.number(record.created_at_ms);  // the store's time
        codec.number(record.ended_at_ms);    // the machine's, since that boot
    }
    if (type == journal_add || type == journal_erase) {
        codec.text(record.organisation);
        codec.text(record.reservation);
        codec.text(record.fingerprint);
        codec.number(record.created_at_ms);
    }
    if (type == journal_add) {
        unsigned flags = unsigned(record.background) | unsigned(record.conversation) << 1 |
                         unsigned(record.kept) << 2;
        codec.number(flags);
        record.background = flags & 1;
        record.conversation = flags & 2;
        record.kept = flags & 4;
        if constexpr (std::is_same_v<Codec, JournalDecoder>) codec.good = codec.good && flags < 8;
    }
    if (type == journal_add || type == journal_begin) codec.number(record.attempts);
    if (type == journal_finish || type == journal_erase) codec.number(record.ended_at_ms);
    if (type == journal_erase || type == journal_drop) codec.number(died_ms);
    if (type == journal_add) {
        codec.shared(record.head);
        codec.shared(record.request);
    }
    if (type == journal_finish) codec.shared(record.object);
    if constexpr (std::is_same_v<Codec, JournalDecoder>) *good = codec.good && codec.left.empty();
}

struct JournalRecord {
    uint16_t type = 0;
    uint64_t sequence = 0, commit = 0;  // `commit`: the sequence that its commit began with
    std::string_view payload = {};
    size_t size = 0;  // with the head
};

bool journal_parse(std::string_view bytes, size_t at, uint32_t salt, JournalRecord* record);

size_t journal_search(std::string_view bytes, size_t at, uint32_t salt, uint64_t commit,
                      uint64_t sequence);

struct JournalSegment {
    std::string name = {};
    uint32_t number = 0;
    bool copied = false;
    uint64_t first_sequence = 0;
    uint64_t bytes = 0;         // that are committed
    uint32_t records = 0;       // in them
    uint32_t digest = 0;        // CRC of their heads
    uint64_t live = 0;          // bytes of records that the index points to
    int64_t dead_since_ms = 0;  // since when texts in it are dead; 0: none are
    std::string aside = {};     // what it is renamed to when it is compacted; empty: it is removed
    std::unique_ptr<FolderFile> file = {};

    void note_dead(int64_t since_ms) {
        if (dead_since_ms == 0 || since_ms < dead_since_ms) dead_since_ms = since_ms;
    }
    /// Counts a record that begins with these bytes.
    void count(const char* head) {
        ++records;
        digest = crc32c(head, journal_record_head, digest);
    }
};
using JournalSegments = std::vector<std::shared_ptr<JournalSegment>>;

inline std::string journal_name(uint32_t number, bool copied) {
    return format(copied ? "%08u.copy" : "%08u.journal", unsigned(number));
}

/// A segment by its file's name; null when it is none.
std::shared_ptr<JournalSegment> journal_segment(const std::string& name);

Error journal_damage(const std::string& name, uint64_t offset, std::string_view what);

Error journal_newer(const std::string& name);

Result<Buffer> journal_read(FolderFile& file);

/// Copies a journal that may be at work meanwhile: an instant of it since the call. `to` is empty.
Result<void> journal_copy(Folder& from, Folder& to);

/// A name for a damaged file, which joins `names`.
std::string journal_aside(std::vector<std::string>* names, const std::string& name);

/// A file that the journal does not need.
struct JournalStranger {
    std::string name;
    std::string aside = {};  // what it is renamed to; empty: it is removed
};

/// A copy of live records out of segments [0, inputs).
struct JournalCompaction {
    struct Move {
        std::string id;
        JournalPlace StoreEntry::*slot;
        JournalPlace from, to;
    };
    size_t inputs = 0;
    int64_t began_ms = 0;
    std::vector<Move> moves = {};
    size_t next = 0;
    JournalSegments outputs = {};
};

inline bool operator==(const JournalPlace& a, const JournalPlace& b) {
    return a.segment == b.segment && a.offset == b.offset;
}

inline constexpr JournalPlace StoreEntry::*journal_slots[] = {
    &StoreEntry::added, &StoreEntry::begun, &StoreEntry::ended};

/// The store's time, and what is known of it while a journal is read.
struct JournalTime {
    std::string boot = {};
    int64_t begin_ms = 0;   // 0: nothing is known
    uint64_t begin_ns = 0;  // by the machine's clock
    bool marked = false;
    int64_t next_mark_ms = 0;

    int64_t at(uint64_t clock_ns) const {
        return begin_ms + int64_t((clock_ns - begin_ns) / 1'000'000);
    }
    void learn(uint16_t type, const StoredResponse& record, int64_t died_ms);
    void begin();
};

/// What the store thread owns. Only it changes index and segments, under the lock of the records;
/// it reads them without.
struct FileJournal {
    Process process;
    FileStoreOptions options;
    std::unique_ptr<Folder> folder;
    StoreRecords* records = nullptr;
    std::optional<StorePlan> plan;
    uint32_t salt = 0, next_number = 1;
    uint32_t planned = 0;           // a number whose file may be there without being named
    uint32_t manifest_version = 0;  // of the one that was read; 0: there was none
    uint64_t next_sequence = 1;
    JournalSegments segments;  // in order, the newest last
    JournalTime time;
    std::optional<JournalCompaction> compaction;
    std::optional<Error> broken;  // after a sync that failed
    uint64_t reserve = 0;         // bytes of the file that is given up when the disk is full
    std::optional<Error> full;    // since then, until the reserve could be taken anew
    uint64_t wanted_free = 0;     // on the disk, before that is tried
    uint64_t spendable = 0;       // of what it gave, for outcomes; the rest is for deletions
    uint64_t next_look_ns = 0;    // for room
    std::atomic<uint64_t> free_bytes = UINT64_MAX;
    mutable std::mutex failure_mutex;
    std::optional<Error> failure;  // broken or full, for other threads

    // one commit
    std::string out;
    uint64_t written = 0, commit = 1;
    uint32_t digest = 0;
    std::optional<Error> write_failed;

    std::mutex queue_mutex;
    std::condition_variable queue_filled;
    std::vector<StoreChange> queue;
    bool ending = false, ready = false;
    Thread thread;

    // opening: what is whole
    Result<void> load();
    Result<void> load_whole(const std::vector<std::string>& names);
    Result<void> load_manifest(const std::vector<std::string>& names);
    Result<void> read_manifest(std::string_view bytes);
    Result<void> check_numbers(const std::vector<std::string>& names) const;
    Result<void> load_segment(JournalSegment& segment, bool newest);
    Result<void> check_head(const JournalSegment& segment, std::string_view bytes) const;
    Result<void> replay(JournalSegment& segment, std::string_view bytes, bool newest);
    Result<bool> replay_record(JournalSegment& segment, const JournalRecord& record, size_t offset);
    void apply(JournalSegment& segment, uint16_t type, StoredResponse record, int64_t died_ms,
               JournalPlace place);
    Result<std::vector<JournalStranger>> find_strangers(std::vector<std::string> names) const;
    Result<void> check_stranger(const JournalSegment& segment, std::string_view bytes) const;
    Result<void> settle(const std::vector<JournalStranger>& strangers);
    // opening: what is damaged
    Result<void> recover(const std::vector<std::string>& names);
    int64_t now_ms() const { return time.at(folder->clock_ns()); }

    bool step();
    void run();
    void close();
    void commit_changes(std::vector<StoreChange>& changes);
    Result<void> try_commit(std::vector<StoreChange>& changes, std::vector<Result<void>>* results);
    void take_reserve();
    uint64_t least_reserve() const {
        return std::min(journal_least_reserve, options.segment_bytes / 32);
    }
    bool give_reserve(const Error& why);
    void look_for_room();
    void set_failure(const std::optional<Error>& why);
    void begin_commit();
    Result<void> append(uint16_t type, StoredResponse record = {});
    Result<void> add_to_commit(StoreChange& change);
    Result<void> encode_step(StoreChange::Kind change, StorePlan::Step& step);
    Result<void> encode(uint16_t type, StoredResponse& record, int64_t died_ms,
                        JournalPlace* place);
    void flush();
    Result<void> write();
    void write_mark();
    void install(const std::string& id, std::optional<StoreEntry> entry, int64_t died_ms);

    Result<uint32_t> take_number();
    Result<std::shared_ptr<JournalSegment>> new_segment(uint32_t number, uint64_t first_sequence,
                                                        bool copied);
    Result<void> write_manifest(const JournalSegments& listed);
    Result<void> roll();
    Result<void> stop_if_failed(Result<void> synced);
    void upkeep(int64_t now_ms);
    void begin_compaction(size_t inputs, int64_t now_ms);
    Result<bool> compact();     // a piece; true: there is more
    Result<bool> copy_piece();  // likewise, without the end
    Result<void> finish_compaction();
    void abandon_compaction();
    std::shared_ptr<JournalSegment> find_segment(uint32_t number) const;
    Result<std::string> read_record(const JournalSegment& segment, const JournalPlace& place) const;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar
