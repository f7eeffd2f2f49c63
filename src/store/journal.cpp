#include "prologue.hpp"

#include "store/journal.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_STORE
namespace valar {
inline namespace v1 {
namespace detail {

/// The record at `at`. False when there is none that is whole.
bool journal_parse(std::string_view bytes, size_t at, uint32_t salt, JournalRecord* record) {
    if (bytes.size() - at < journal_record_head) return false;
    const char* head = bytes.data() + at;
    if (journal_get<uint32_t>(head) != journal_magic) return false;
    if (journal_get<uint32_t>(head + 28) != crc32c(head, 28, salt)) return false;
    const size_t size = journal_get<uint32_t>(head + 8);
    const uint32_t back = journal_get<uint32_t>(head + 12);
    if (size > bytes.size() - at - journal_record_head) return false;
    record->type = journal_get<uint16_t>(head + 4);
    record->sequence = journal_get<uint64_t>(head + 16);
    record->commit = record->sequence - back;
    record->payload = bytes.substr(at + journal_record_head, size);
    record->size = journal_record_head + size;
    return crc32c(record->payload.data(), size, salt) == journal_get<uint32_t>(head + 24);
}

/// Where the first whole record behind `at` lies whose commit began after `commit` and whose
/// sequence is above `sequence`; the end when there is none.
size_t journal_search(std::string_view bytes, size_t at, uint32_t salt, uint64_t commit,
                      uint64_t sequence) {
    const std::string magic(reinterpret_cast<const char*>(&journal_magic), sizeof journal_magic);
    JournalRecord record;
    while ((at = bytes.find(magic, at + 1)) != bytes.npos)
        if (journal_parse(bytes, at, salt, &record) && record.commit > commit &&
            record.sequence > sequence)
            return at;
    return bytes.size();
}

Error journal_damage(const std::string& name, uint64_t offset, const char* what) {
    return make_error(ErrorKind::bad_data,
                      format("the journal is damaged: '%s' at offset %llu: %s", name.c_str(),
                             static_cast<unsigned long long>(offset), what));
}

Error journal_newer(const std::string& name) {
    return make_error(ErrorKind::unsupported,
                      "'" + name + "' was written by a newer version; nothing was changed");
}

/// Passes on what a sync returned. After one that failed what is on the disk is unknown, so nothing
/// more is accepted.
Result<void> FileJournal::stop_if_failed(Result<void> synced) {
    if (!synced && !broken) {
        broken = make_error(ErrorKind::io, "the journal takes no more: " + synced.error().message);
        options.log(LogLevel::error, broken->message);
    }
    return synced;
}

std::shared_ptr<JournalSegment> FileJournal::find_segment(uint32_t number) const {
    for (size_t i = segments.size(); i-- > 0;)
        if (segments[i]->number == number) return segments[i];
    return nullptr;
}

Result<std::string> FileJournal::read_record(const JournalSegment& segment,
                                             const JournalPlace& place) const {
    std::string bytes(place.size, '\0');
    if (auto read = segment.file->read_at(place.offset, bytes.data(), bytes.size()); !read)
        return read.error();
    JournalRecord record;
    if (!journal_parse(bytes, 0, salt, &record) || record.size != bytes.size())
        return journal_damage(segment.name(), place.offset, "a record changed");
    return bytes;
}

// ---- Changes of the index --------------------------------------------------------------------

/// Puts an entry into the index and counts what that leaves alive in each segment.
void FileJournal::install(const std::string& id, std::optional<StoreEntry> entry, int64_t died_ms) {
    const StoreEntry* before = std::as_const(records->index).find(id);
    for (const auto slot : journal_slots) {
        const JournalPlace was = before ? before->*slot : JournalPlace{};
        const JournalPlace is = entry ? (*entry).*slot : JournalPlace{};
        if (was == is) continue;
        if (was.segment) {
            JournalSegment& segment = *find_segment(was.segment);
            segment.live -= was.size;
            if (slot != &StoreEntry::begun) segment.note_dead(died_ms);
        }
        if (is.segment) find_segment(is.segment)->live += is.size;
    }
    records->index.set(id, std::move(entry));
}

/// A record that was read back does again what it did when it was written.
void FileJournal::apply(JournalSegment& segment, uint16_t type, StoredResponse record,
                        int64_t died_ms, JournalPlace place) {
    const StoreEntry* found = std::as_const(records->index).find(record.id);
    const bool open = found && !found->record.terminal;
    const std::string id = record.id;
    StoreEntry entry;
    if (found) entry = *found;
    switch (type) {
        case journal_add: {
            const StoreEntry* holder =
                std::as_const(records->index).holder(record.organisation, record.reservation);
            if (holder && !record.reservation.empty())  // it expired, which is not written down
                install(std::string(holder->record.id), std::nullopt, record.created_at_ms);
            entry = {};
            entry.serial = ++records->serial;
            entry.text_bytes = size_of_text(record.head) + size_of_text(record.request);
            entry.added = place;
            entry.record = std::move(record);
            break;
        }
        case journal_begin:
            if (!open) return;
            entry.record.attempts = record.attempts;
            entry.begun = place;
            break;
        case journal_finish:
            if (!open) return segment.note_dead(record.ended_at_ms);  // of one that expired
            entry.record.terminal = true;
            entry.record.ended_at_ms = record.ended_at_ms;
            entry.text_bytes += size_of_text(record.object);
            entry.begun = {};
            entry.ended = place;
            break;
        case journal_erase:
            entry = {};
            entry.serial = ++records->serial;
            entry.erased = true;
            entry.ended = place;
            entry.record = std::move(record);
            entry.record.terminal = true;
            break;
        case journal_drop: return found ? install(id, std::nullopt, died_ms) : void();
        default: return;
    }
    entry.drop_texts();
    install(id, std::move(entry), died_ms);
}

// ---- Opening ---------------------------------------------------------------------------------

Result<void> FileJournal::load() {
    auto names = folder->list();
    if (!names) return names.error();
    if (auto listed = load_manifest(*names); !listed) return listed;
    if (segments.empty()) {
        uint8_t random[4];
        if (auto drawn = random_bytes(random, sizeof random); !drawn) return drawn;
        std::memcpy(&salt, random, sizeof salt);
        auto made = new_segment(next_sequence);
        if (!made) return made.error();
        segments.push_back(*made);
        if (auto put = write_manifest(segments); !put) return put;
    } else {
        for (size_t i = 0; i < segments.size(); ++i) {
            JournalSegment& segment = *segments[i];
            const uint64_t bytes = std::exchange(segment.bytes, 0);
            const bool newest = i + 1 == segments.size();
            if (auto loaded = load_segment(segment, bytes, newest); !loaded) return loaded;
        }
        next_sequence = std::max(next_sequence, segments.back()->first_sequence);
    }
    remove_strangers(*names);
    const auto damaged = [](const auto& segment) { return segment->damaged; };
    if (std::any_of(segments.begin(), segments.end(), damaged)) return leave_damaged();
    return {};
}

bool journal_is_segment(const std::string& name) {
    return name.size() == 16 && name.substr(8) == ".journal" &&
           name.find_first_not_of("0123456789") == 8;
}

/// Fills `segments`, with their sizes in `bytes`; nothing where the journal is new.
Result<void> FileJournal::load_manifest(const std::vector<std::string>& names) {
    const auto has = [&](const auto& wanted) {
        return std::find_if(names.begin(), names.end(), wanted) != names.end();
    };
    Result<void> read = journal_damage("manifest", 0, "it is missing");
    if (has([](const std::string& name) { return name == "manifest"; })) {
        auto file = folder->open_file("manifest", false);
        if (!file) return file.error();
        auto size = (*file)->size();
        if (!size) return size.error();
        auto bytes = Buffer::allocate(*size, "the journal's manifest");
        if (!bytes) return bytes.error();
        if (auto got = (*file)->read_at(0, bytes->data(), bytes->size()); !got) return got;
        read = read_manifest({bytes->as<const char>(), bytes->size()});
        if (!read && read.error().kind == ErrorKind::unsupported) return read;
    } else if (!has(journal_is_segment)) {
        return {};
    }
    if (read) return read;
    bool empty = true;  // a first segment whose manifest was never written holds nothing
    for (const std::string& name : names) {
        if (!journal_is_segment(name)) continue;
        auto file = folder->open_file(name, false);
        auto size = file ? (*file)->size() : Result<uint64_t>(file.error());
        if (!size) return size.error();
        empty = empty && *size <= journal_segment_head;
    }
    segments.clear();
    if (empty && !has([](const std::string& name) { return name == "manifest"; })) return {};
    return options.recover ? salvage_manifest(names) : std::move(read);
}

Result<void> FileJournal::read_manifest(std::string_view bytes) {
    constexpr size_t head = 20, row = 20;
    if (bytes.size() >= 12 && bytes.substr(0, 8) == "valarman" &&
        journal_get<uint32_t>(bytes.data() + 8) > journal_version)
        return journal_newer("manifest");
    const char* at = bytes.data();
    if (bytes.size() < head + row + 4 || (bytes.size() - head - 4) % row != 0 ||
        bytes.substr(0, 8) != "valarman" || journal_get<uint32_t>(at + 8) != journal_version ||
        journal_get<uint32_t>(at + 16) != (bytes.size() - head - 4) / row ||
        journal_get<uint32_t>(at + bytes.size() - 4) != crc32c(at, bytes.size() - 4))
        return journal_damage("manifest", 0, "its checksum does not match");
    salt = journal_get<uint32_t>(at + 12);
    for (at += head; at + 4 < bytes.data() + bytes.size(); at += row) {
        auto segment = std::make_shared<JournalSegment>();
        segment->number = journal_get<uint32_t>(at);
        segment->first_sequence = journal_get<uint64_t>(at + 4);
        segment->bytes = journal_get<uint64_t>(at + 12);
        if (segment->number == 0 || segment->number > journal_last_number ||
            find_segment(segment->number))
            return journal_damage("manifest", 0, "a segment's number cannot be");
        next_number = std::max(next_number, segment->number + 1);
        segments.push_back(std::move(segment));
    }
    return {};
}

/// Takes every segment that is there, in the order of their first records.
Result<void> FileJournal::salvage_manifest(const std::vector<std::string>& names) {
    options.log(LogLevel::warning, "the journal's manifest is lost: all segments are read");
    for (const std::string& name : names) {
        if (!journal_is_segment(name)) continue;
        auto file = folder->open_file(name, false);
        if (!file) return file.error();
        char head[journal_segment_head] = {};
        const bool read = (*file)->read_at(0, head, sizeof head).ok();
        auto segment = std::make_shared<JournalSegment>();
        for (const char digit : name.substr(0, 8))
            segment->number = segment->number * 10 + uint32_t(digit - '0');
        segment->first_sequence = read ? journal_get<uint64_t>(head + 20) : 0;
        segment->damaged = true;
        if (read && journal_get<uint32_t>(head + 28) == crc32c(head, 28))
            salt = journal_get<uint32_t>(head + 12);
        next_number = std::max(next_number, segment->number + 1);
        segments.push_back(std::move(segment));
    }
    sort_items(segments, [](const auto& a, const auto& b) {
        return std::pair(a->first_sequence, a->number) < std::pair(b->first_sequence, b->number);
    });
    return {};
}

/// `expected_bytes` is 0 for one that was still growing.
Result<void> FileJournal::load_segment(JournalSegment& segment, uint64_t expected_bytes,
                                       bool newest) {
    auto file = folder->open_file(segment.name(), false);
    if (!file && !options.recover)
        return file.error().kind == ErrorKind::not_found
                   ? journal_damage(segment.name(), 0, "it is missing")
                   : file.error();
    segment.damaged = segment.damaged || !file;
    if (!file) return {};
    segment.file = std::move(*file);
    auto size = segment.file->size();
    if (!size) return size.error();
    auto bytes = Buffer::allocate(*size, "a segment of the journal");
    if (!bytes) return bytes.error();
    if (auto read = segment.file->read_at(0, bytes->data(), bytes->size()); !read) return read;
    const std::string_view text(bytes->as<const char>(), bytes->size());
    if (newest && text.size() < journal_segment_head) {  // torn as early as that
        next_sequence = std::max(next_sequence, segment.first_sequence);
        segments.pop_back();
        return roll();
    }
    if (expected_bytes != 0 && expected_bytes != *size) {
        if (!options.recover)
            return journal_damage(segment.name(), std::min(*size, expected_bytes),
                                  "it has not the size that the manifest says");
        segment.damaged = true;
    }
    auto head = check_head(segment, text);
    if (!head) return head.error();
    segment.damaged = segment.damaged || !*head;
    return replay(segment, text, newest);
}

/// False: damaged, and options.recover.
Result<bool> FileJournal::check_head(JournalSegment& segment, std::string_view bytes) {
    const char* at = bytes.data();
    if (bytes.size() >= 12 && bytes.substr(0, 8) == "valarjnl" &&
        journal_get<uint32_t>(at + 8) > journal_version)
        return journal_newer(segment.name());
    if (bytes.size() >= journal_segment_head && bytes.substr(0, 8) == "valarjnl" &&
        journal_get<uint32_t>(at + 8) == journal_version &&
        journal_get<uint32_t>(at + 12) == salt &&
        journal_get<uint32_t>(at + 16) == segment.number &&
        journal_get<uint64_t>(at + 20) == segment.first_sequence &&
        journal_get<uint32_t>(at + 28) == crc32c(at, 28))
        return true;
    if (options.recover) return false;
    return journal_damage(segment.name(), 0, "its head does not match");
}

Result<void> FileJournal::replay(JournalSegment& segment, std::string_view bytes, bool newest) {
    size_t at = std::min(journal_segment_head, bytes.size());
    if (newest) next_sequence = std::max(next_sequence, segment.first_sequence);
    JournalRecord record;
    while (at < bytes.size()) {
        const bool whole = journal_parse(bytes, at, salt, &record);
        const bool follows = whole &&
                             (newest && !segment.damaged ? record.sequence == next_sequence
                                                         : record.sequence >= next_sequence);
        bool strange = false;
        if (follows) {
            auto applied = replay_record(segment, record, at);
            if (!applied) return applied.error();
            if (*applied) {
                next_sequence = record.sequence + 1;
                at += record.size;
                segment.bytes = at;
                continue;
            }
            strange = true;
        }
        // of this record's commit nothing was reported, unless a later commit follows
        if (newest && !strange &&
            journal_search(bytes, at, salt, next_sequence, 0) == bytes.size()) {
            if (segment.damaged) break;
            if (auto cut = segment.file->truncate(at); !cut) return cut;
            segment.bytes = at;
            options.log(LogLevel::warning,
                        format("the journal's torn tail of %zu bytes was cut", bytes.size() - at));
            return stop_if_failed(segment.file->sync());
        }
        const Error damage = journal_damage(segment.name(), at, "no record that belongs here");
        if (!options.recover) return damage;
        options.log(LogLevel::warning, damage.message);
        segment.damaged = true;
        at = journal_search(bytes, at, salt, 0, next_sequence - 1);
    }
    segment.bytes = bytes.size();
    return {};
}

/// False: it is whole, but says nothing that could be understood.
Result<bool> FileJournal::replay_record(JournalSegment& segment, const JournalRecord& record,
                                        size_t offset) {
    if (record.type == 0 || record.type >= journal_types) return journal_newer(segment.name());
    StoredResponse read;
    int64_t died_ms = 0;
    bool good = false;
    journal_fields(JournalDecoder{record.payload}, record.type, read, died_ms, &good);
    if (!good) return false;
    const JournalPlace place{offset, segment.number, uint32_t(record.size)};
    apply(segment, record.type, std::move(read), died_ms, place);
    return true;
}

/// What is whole moves to new segments; the damaged ones stay beside.
Result<void> FileJournal::leave_damaged() {
    if (auto rolled = roll(); !rolled) return rolled;
    begin_compaction(segments.size() - 1, 0);
    for (;;) {
        auto more = compact();
        if (!more) return more.error();
        if (!*more) return {};
    }
}

/// Files that an interrupted compaction left.
void FileJournal::remove_strangers(const std::vector<std::string>& names) {
    for (const std::string& name : names) {
        const auto known = [&](const auto& segment) { return segment->name() == name; };
        const bool stranger = journal_is_segment(name) &&
                              std::none_of(segments.begin(), segments.end(), known);
        if (stranger || name == "manifest.new") (void)folder->remove(name).ok();
    }
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_STORE
