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
    return record->sequence > 0 && record->sequence <= journal_last_sequence &&
           crc32c(record->payload.data(), size, salt) == journal_get<uint32_t>(head + 24);
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

std::shared_ptr<JournalSegment> journal_segment(const std::string& name) {
    uint32_t number = 0;
    for (const char digit : name.substr(0, 8)) number = number * 10 + uint32_t(digit - '0');
    for (const bool copied : {false, true}) {
        if (number > journal_last_number || name != journal_name(number, copied)) continue;
        auto segment = std::make_shared<JournalSegment>();
        segment->name = name;
        segment->number = number;
        segment->copied = copied;
        return segment;
    }
    return nullptr;
}

Error journal_damage(const std::string& name, uint64_t offset, std::string_view what) {
    return make_error(ErrorKind::bad_data,
                      format("the journal is damaged: '%s' at offset %llu: ", name.c_str(),
                             static_cast<unsigned long long>(offset)) +
                          std::string(what));
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
        set_failure(broken);
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
        return journal_damage(segment.name, place.offset, "a record changed");
    return bytes;
}

// ---- Time --------------------------------------------------------------------------------------

/// From each record that is read, in order.
void JournalTime::learn(uint16_t type, const StoredResponse& record, int64_t died_ms) {
    if (type == journal_mark) {
        const int64_t clock_ms = int64_t(begin_ns / 1'000'000), since_ms = record.ended_at_ms;
        const bool goes_on = !boot.empty() && record.id == boot && clock_ms >= since_ms;
        begin_ms = record.created_at_ms + (goes_on ? clock_ms - since_ms : 0);
        marked = true;
        return;
    }
    const int64_t then_ms = std::max({record.created_at_ms, record.ended_at_ms, died_ms});
    if (then_ms > 0) begin_ms = marked ? std::max(begin_ms, then_ms) : then_ms;
}

void JournalTime::begin() {
    constexpr int64_t last_ms = INT64_C(253'402'300'799'999);  // of the year 9999
    begin_ms = std::clamp<int64_t>(begin_ms ? begin_ms : unix_time_ms(), 1, last_ms);
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
            if (!found || !found->takes_object())
                return segment.note_dead(record.ended_at_ms);  // of one that expired
            if (found->record.ended_at_ms != 0) died_ms = record.ended_at_ms;  // the object before
            entry.put_object(record.object, record.ended_at_ms);
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

namespace {

constexpr size_t manifest_heads[] = {20, 28}, manifest_rows[] = {20, 32};  // by version - 1

std::string beside_manifest(const char* what) {
    return std::string(what) + "; it and 'manifest' come from different moments";
}

}  // namespace

/// The bytes of a file.
Result<Buffer> journal_read(FolderFile& file) {
    auto size = file.size();
    if (!size) return size.error();
    auto bytes = Buffer::allocate(*size, "a file of the journal");
    if (!bytes) return bytes.error();
    if (auto read = file.read_at(0, bytes->data(), bytes->size()); !read) return read.error();
    return bytes;
}

std::string journal_aside(std::vector<std::string>* names, const std::string& name) {
    std::string aside = name + ".damaged";
    for (int i = 2; std::find(names->begin(), names->end(), aside) != names->end(); ++i)
        aside = name + format(".damaged.%d", i);
    names->push_back(aside);
    return aside;
}

Result<void> FileJournal::load() {
    auto names = folder->list();
    if (!names) return names.error();
    auto loaded = load_whole(*names);
    if (loaded || loaded.error().kind != ErrorKind::bad_data || !options.recover) return loaded;
    options.log(LogLevel::warning, loaded.error().message);
    return recover(*names);
}

/// Changes nothing before all of it was found to be whole.
Result<void> FileJournal::load_whole(const std::vector<std::string>& names) {
    if (auto listed = load_manifest(names); !listed) return listed;
    if (auto checked = check_numbers(names); !checked) return checked;
    for (const auto& segment : segments) {
        const bool newest = segment == segments.back();
        if (auto loaded = load_segment(*segment, newest); !loaded) return loaded;
    }
    auto strangers = find_strangers(names);
    if (!strangers) return strangers.error();
    return settle(*strangers);
}

/// Fills `segments`, as the manifest says they are; nothing where the journal is new.
Result<void> FileJournal::load_manifest(const std::vector<std::string>& names) {
    if (std::find(names.begin(), names.end(), "manifest") == names.end()) {
        for (const std::string& name : names)
            if (journal_segment(name))
                return journal_damage("manifest", 0, "it is missing, and '" + name + "' is there");
        uint8_t random[4];
        if (auto drawn = random_bytes(random, sizeof random); !drawn) return drawn;
        std::memcpy(&salt, random, sizeof salt);
        return {};
    }
    auto file = folder->open_file("manifest", false);
    if (!file) return file.error();
    auto bytes = journal_read(**file);
    if (!bytes) return bytes.error();
    return read_manifest({bytes->as<const char>(), bytes->size()});
}

Result<void> FileJournal::read_manifest(std::string_view bytes) {
    if (bytes.size() < 12 || bytes.substr(0, 8) != "valarman")
        return journal_damage("manifest", 0, "it does not begin as a manifest of ours does");
    const char* at = bytes.data();
    const uint32_t version = journal_get<uint32_t>(at + 8);
    if (version > journal_manifest_version) return journal_newer("manifest");
    const size_t head = manifest_heads[version == 2], row = manifest_rows[version == 2];
    if (bytes.size() < head + 4 || (bytes.size() - head - 4) % row != 0 || version == 0 ||
        journal_get<uint32_t>(at + 16) != (bytes.size() - head - 4) / row ||
        journal_get<uint32_t>(at + bytes.size() - 4) != crc32c(at, bytes.size() - 4))
        return journal_damage("manifest", 0, "its checksum does not match");
    const Error impossible = journal_damage("manifest", 0, "a segment's number cannot be");
    salt = journal_get<uint32_t>(at + 12);
    manifest_version = version;
    uint32_t most = 0;
    for (const char *end = at + bytes.size() - 4, *next = at + head; next < end; next += row) {
        auto segment = std::make_shared<JournalSegment>();
        segment->number = journal_get<uint32_t>(next);
        segment->copied = version == 2 && journal_get<uint32_t>(next + 4) != 0;
        const char* rest = next + (version == 2 ? 8 : 4);
        segment->first_sequence = journal_get<uint64_t>(rest);
        segment->bytes = std::max<uint64_t>(journal_get<uint64_t>(rest + 8), journal_segment_head);
        if (version == 2) segment->records = journal_get<uint32_t>(rest + 16);
        if (version == 2) segment->digest = journal_get<uint32_t>(rest + 20);
        if (segment->number == 0 || segment->number > journal_last_number ||
            find_segment(segment->number))
            return impossible;
        segment->name = journal_name(segment->number, segment->copied);
        most = std::max(most, segment->number);
        segments.push_back(std::move(segment));
    }
    next_number = version == 2 ? journal_get<uint32_t>(at + 20) : most + 1;
    planned = version == 2 ? journal_get<uint32_t>(at + 24) : 0;
    const bool growing = segments.empty() ? planned != 0 : !segments.back()->copied;
    if (!growing || next_number <= most || next_number > journal_last_number + 1 ||
        planned >= next_number || find_segment(planned))
        return impossible;
    return {};
}

/// A segment that grew has a number which a manifest of its time or later knows.
Result<void> FileJournal::check_numbers(const std::vector<std::string>& names) const {
    if (manifest_version < 2) return {};
    for (const std::string& name : names) {
        const auto found = journal_segment(name);
        if (found && !found->copied && found->number >= next_number)
            return journal_damage(name, 0, "it is newer than 'manifest', which does not name it");
    }
    return {};
}

Result<void> FileJournal::load_segment(JournalSegment& segment, bool newest) {
    auto file = folder->open_file(segment.name, false);
    if (!file && file.error().kind != ErrorKind::not_found) return file.error();
    if (!file)
        return journal_damage(segment.name, 0, "it is missing, or 'manifest' is of another moment");
    segment.file = std::move(*file);
    auto bytes = journal_read(*segment.file);
    if (!bytes) return bytes.error();
    const std::string_view text(bytes->as<const char>(), bytes->size());
    if (auto head = check_head(segment, text); !head) return head;
    if (newest ? text.size() < segment.bytes : text.size() != segment.bytes)
        return journal_damage(segment.name, std::min<uint64_t>(text.size(), segment.bytes),
                              beside_manifest("it has not the size that 'manifest' says"));
    return replay(segment, text, newest);
}

Result<void> FileJournal::check_head(const JournalSegment& segment, std::string_view bytes) const {
    const char* at = bytes.data();
    if (bytes.size() >= 12 && bytes.substr(0, 8) == "valarjnl" &&
        journal_get<uint32_t>(at + 8) > journal_version)
        return journal_newer(segment.name);
    if (bytes.size() < journal_segment_head)
        return journal_damage(segment.name, bytes.size(), "it ends within its head");
    if (bytes.substr(0, 8) == "valarjnl" && journal_get<uint32_t>(at + 8) != 0 &&
        journal_get<uint32_t>(at + 12) == salt &&
        journal_get<uint32_t>(at + 16) == segment.number &&
        journal_get<uint64_t>(at + 20) == segment.first_sequence &&
        journal_get<uint32_t>(at + 28) == crc32c(at, 28))
        return {};
    return journal_damage(segment.name, 0, "its head does not match");
}

/// `segment` comes as the manifest has it and goes as it is.
Result<void> FileJournal::replay(JournalSegment& segment, std::string_view bytes, bool newest) {
    const uint64_t named_bytes = std::exchange(segment.bytes, journal_segment_head);
    const uint32_t named_digest = std::exchange(segment.digest, 0);
    segment.records = 0;
    if (segment.first_sequence > journal_last_start)
        return journal_damage(segment.name, 20, "no journal comes so far");
    if (newest) next_sequence = std::max(next_sequence, segment.first_sequence);
    JournalRecord record;
    for (size_t at = journal_segment_head; at < bytes.size(); at = size_t(segment.bytes)) {
        const bool whole = journal_parse(bytes, at, salt, &record);
        const bool follows = whole && (newest ? record.sequence == next_sequence
                                              : record.sequence >= next_sequence);
        // of this record's commit nothing was reported, unless a later commit follows
        if (newest && !follows && at >= named_bytes &&
            journal_search(bytes, at, salt, next_sequence, 0) == bytes.size())
            break;
        auto applied = follows ? replay_record(segment, record, at) : Result<bool>(false);
        if (!applied) return applied.error();
        if (!*applied) return journal_damage(segment.name, at, "no record that belongs here");
        if (newest && record.type == journal_roll && at >= named_bytes && !planned)
            return journal_damage(
                "manifest", 0,
                "it is older than '" + segment.name + "', which another segment follows");
        segment.bytes = at + record.size;
        segment.count(bytes.data() + at);
        if (record.type != journal_copied) next_sequence = record.sequence + 1;
        if (at < named_bytes && segment.bytes >= named_bytes && manifest_version == 2 &&
            (segment.bytes > named_bytes || segment.digest != named_digest))
            return journal_damage(segment.name, 0,
                                  beside_manifest("its checksum is not that in 'manifest'"));
    }
    return {};
}

/// False: it is whole, but says nothing that could be understood.
Result<bool> FileJournal::replay_record(JournalSegment& segment, const JournalRecord& record,
                                        size_t offset) {
    if (record.type == 0 || record.type >= journal_types) return journal_newer(segment.name);
    if (record.type == journal_copied) return record.payload.size() == 8;
    StoredResponse read;
    int64_t died_ms = 0;
    bool good = false;
    journal_fields(JournalDecoder{record.payload}, record.type, read, died_ms, &good);
    if (!good) return false;
    time.learn(record.type, read, died_ms);
    const JournalPlace place{offset, segment.number, uint32_t(record.size)};
    apply(segment, record.type, std::move(read), died_ms, place);
    return true;
}

/// Files that a compaction, or the beginning of a segment, left when it was interrupted. Damage
/// where one holds more than copies of what is there. What is not whole stays beside: a recovery
/// may have left it so.
Result<std::vector<JournalStranger>> FileJournal::find_strangers(
    std::vector<std::string> names) const {
    std::vector<JournalStranger> strangers;
    for (const std::string& name : std::vector<std::string>(names)) {
        const auto segment = journal_segment(name);
        const auto known = [&](const auto& one) { return one->name == name; };
        if (std::any_of(segments.begin(), segments.end(), known)) continue;
        if (segment || name == "manifest.new") strangers.push_back({name});
        if (!segment) continue;
        auto file = folder->open_file(name, false);
        if (!file) return file.error();
        auto read = journal_read(**file);
        if (!read) return read.error();
        const std::string_view bytes(read->as<const char>(), read->size());
        if (auto old = check_stranger(*segment, bytes); !old) return old.error();
        const bool torn = segment->copied || segment->number == planned || manifest_version < 2;
        size_t at = std::min(bytes.size(), journal_segment_head);
        for (JournalRecord record; journal_parse(bytes, at, salt, &record);) at += record.size;
        if (!torn && (at < bytes.size() || at < journal_segment_head))
            strangers.back().aside = journal_aside(&names, name);
    }
    return strangers;
}

Result<void> FileJournal::check_stranger(const JournalSegment& segment,
                                         std::string_view bytes) const {
    const char* newer = "'manifest' does not name it, and it is newer than what is named";
    const size_t head = journal_segment_head;
    const bool is_planned = !segment.copied && segment.number == planned;
    if (is_planned && bytes.size() > head) return journal_damage(segment.name, head, newer);
    size_t at = 0;
    if (bytes.size() > head) at = journal_search(bytes, head - 1, salt, 0, next_sequence - 1);
    if (bytes.size() > head && at < bytes.size()) return journal_damage(segment.name, at, newer);
    JournalRecord first;
    if (segment.copied && bytes.size() > head && journal_parse(bytes, head, salt, &first) &&
        first.type == journal_copied && first.payload.size() == 8 &&
        journal_get<uint64_t>(first.payload.data()) > next_sequence)
        return journal_damage(segment.name, head,
                              "it was copied when the journal had more records than are there");
    return {};
}

/// The directory becomes what a journal in use is.
Result<void> FileJournal::settle(const std::vector<JournalStranger>& strangers) {
    for (const auto& [name, aside] : strangers) {
        auto gone = aside.empty() ? folder->remove(name) : folder->rename(name, aside);
        if (!gone) return gone;
        if (aside.empty()) continue;
        options.log(LogLevel::warning,
                    "'" + name + "' is damaged and not needed; it lies beside as '" + aside + "'");
    }
    if (!strangers.empty())
        if (auto synced = stop_if_failed(folder->sync()); !synced) return synced;
    if (segments.empty()) return roll();
    JournalSegment& newest = *segments.back();
    auto size = newest.file->size();
    if (!size) return size.error();
    if (*size > newest.bytes) {
        if (auto cut = newest.file->truncate(newest.bytes); !cut) return cut;
        options.log(LogLevel::warning,
                    format("the journal's torn tail of %llu bytes was cut",
                           static_cast<unsigned long long>(*size - newest.bytes)));
        if (auto synced = stop_if_failed(newest.file->sync()); !synced) return synced;
    }
    if (!planned && manifest_version == journal_manifest_version) return {};
    const uint32_t number = std::exchange(planned, 0);
    if (write_manifest(segments)) return {};
    planned = number;  // on a full disk the one that is there will do
    return broken ? Result<void>(*broken) : Result<void>();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_STORE
