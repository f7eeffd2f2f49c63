#include "prologue.hpp"

#include "store/journal.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_STORE
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Recovery --------------------------------------------------------------------------------
// Of a damaged journal every file is read, whatever the manifest names, and every whole record in
// them is done again in the order of the sequence numbers, each once. What then lives moves to new
// segments. Files that are damaged or that the manifest does not name stay beside, renamed.

namespace {

struct WholeRecord {
    uint64_t sequence = 0, offset = 0;
    uint32_t checksum = 0, size = 0;  // the checksum is of its head, and so of all of it
    uint16_t type = 0;
    size_t source = 0;
};

/// A file of the journal, or one that the manifest names and that is missing.
struct RecoverySource {
    std::string name;
    std::shared_ptr<JournalSegment> segment = {};          // null: it is missing
    const JournalSegment* named = nullptr;                 // as the manifest has it
    std::string fault = {};                                // the first one
    size_t whole = 0;                                      // records
    std::vector<std::pair<uint64_t, uint64_t>> gaps = {};  // sequence numbers: first and last
    bool open_end = true;  // what lay behind its last record cannot be told
    uint64_t lost = 0;     // records, at most

    void blame(std::string what) {
        if (fault.empty()) fault = std::move(what);
    }
    void note_gap(uint64_t first, uint64_t end) {
        if (first < end) gaps.emplace_back(first, end - 1);
    }
};

class Recovery {
public:
    Recovery(FileJournal* journal, const std::vector<std::string>& names)
        : journal_(*journal), names_(names) {}
    Result<void> run() {
        if (auto begun = begin(); !begun) return begun;
        for (size_t i = 0; i < sources_.size(); ++i)
            if (auto read = read_source(i); !read) return read;
        sort();
        if (auto replayed = replay(); !replayed) return replayed;
        count_losses();
        if (auto rebuilt = rebuild(); !rebuilt) {
            journal_.abandon_compaction();
            return rebuilt;
        }
        report();
        return {};
    }

private:
    Result<void> begin();
    Result<void> find_salt();
    Result<void> read_source(size_t index);
    Result<void> scan(size_t index, std::string_view bytes);
    void compare(RecoverySource& source, uint32_t digest);
    void sort();
    void lose(const WholeRecord& whole, const char* what);
    Result<void> replay();
    void count_losses();
    Result<void> rebuild();
    Result<void> put_manifest_aside();
    void report() const;

    FileJournal& journal_;
    std::vector<std::string> names_;
    bool manifest_read_ = false;
    JournalSegments named_;
    std::vector<RecoverySource> sources_;
    std::vector<WholeRecord> records_;  // in the end by sequence
    std::string manifest_aside_;
};

/// Forgets what was read, and lists the files.
Result<void> Recovery::begin() {
    journal_.records->index = {};
    journal_.records->serial = 0;
    journal_.next_sequence = journal_.next_number = 1;
    journal_.segments.clear();
    auto read = journal_.load_manifest(names_);
    if (!read && read.error().kind != ErrorKind::bad_data) return read;
    manifest_read_ = read.ok();
    if (manifest_read_) named_ = journal_.segments;
    journal_.segments.clear();
    for (const std::string& name : names_)
        if (auto segment = journal_segment(name)) sources_.push_back({name, std::move(segment)});
    for (const auto& named : named_) {
        const auto same = [&](const auto& source) { return source.name == named->name; };
        auto source = std::find_if(sources_.begin(), sources_.end(), same);
        if (source == sources_.end()) source = sources_.insert(source, {named->name});
        source->named = named.get();
    }
    for (auto& source : sources_) {
        if (!source.segment) continue;
        auto file = journal_.folder->open_file(source.name, false);
        if (!file) return file.error();
        source.segment->file = std::move(*file);
        journal_.next_number = std::max(journal_.next_number, source.segment->number + 1);
    }
    const auto count = static_cast<uint32_t>(sources_.size());  // read_source numbers them anew
    journal_.next_number = std::max(journal_.next_number, count + 1);
    return manifest_read_ ? Result<void>() : find_salt();
}

/// Without a manifest the first head that is whole has it.
Result<void> Recovery::find_salt() {
    for (const auto& source : sources_) {
        char head[journal_segment_head];
        if (!source.segment->file->read_at(0, head, sizeof head)) continue;
        if (std::memcmp(head, "valarjnl", 8) ||
            journal_get<uint32_t>(head + 28) != crc32c(head, 28))
            continue;
        journal_.salt = journal_get<uint32_t>(head + 12);
        return {};
    }
    return {};
}

Result<void> Recovery::read_source(size_t index) {
    RecoverySource& source = sources_[index];
    if (!source.segment) {
        source.fault = "it is missing";
        compare(source, 0);
        return {};
    }
    JournalSegment& segment = *source.segment;
    auto bytes = journal_read(*segment.file);
    if (!bytes) return bytes.error();
    const std::string_view text(bytes->as<const char>(), bytes->size());
    if (source.named) segment.first_sequence = source.named->first_sequence;
    else if (text.size() >= journal_segment_head)
        segment.first_sequence = journal_get<uint64_t>(text.data() + 20);
    if (manifest_read_ && !source.named) source.blame("'manifest' does not name it");
    if (!manifest_read_) source.blame("the manifest that named it is lost");
    auto scanned = scan(index, text);
    segment.number = static_cast<uint32_t>(index + 1);  // a number may be there twice
    journal_.segments.push_back(source.segment);
    return scanned;
}

/// Every whole record of a file, and what lies between them.
Result<void> Recovery::scan(size_t index, std::string_view bytes) {
    RecoverySource& source = sources_[index];
    JournalSegment& segment = *source.segment;
    auto head = journal_.check_head(segment, bytes);
    if (!head && head.error().kind != ErrorKind::bad_data) return head;
    if (!head) source.fault = head.error().message;
    uint32_t digest = 0;  // where the manifest's ends
    uint64_t next = segment.first_sequence;
    bool gap = false;
    JournalRecord record;
    for (size_t at = head ? journal_segment_head : 0; at < bytes.size();) {
        if (!journal_parse(bytes, at, journal_.salt, &record) ||
            record.sequence >= journal_last_start) {
            source.blame(format("no whole record at offset %zu", at));
            gap = true;
            at = journal_search(bytes, at, journal_.salt, 0, 0);
            continue;
        }
        if (record.type == 0 || record.type >= journal_types) return journal_newer(source.name);
        segment.count(bytes.data() + at);
        if (record.type == journal_copied) {
            if (record.payload.size() == 8)
                journal_.next_sequence = std::max(
                    journal_.next_sequence,
                    std::min(journal_get<uint64_t>(record.payload.data()), journal_last_start));
        } else {
            if (gap) source.note_gap(next, record.sequence);
            records_.push_back({record.sequence, at, journal_get<uint32_t>(bytes.data() + at + 28),
                                uint32_t(record.size), record.type, index});
            next = record.sequence + 1;
            gap = false;
            ++source.whole;
        }
        at += record.size;
        if (source.named && at == source.named->bytes) digest = segment.digest;
    }
    segment.bytes = bytes.size();
    compare(source, digest);
    return {};
}

/// With what the manifest says of it.
void Recovery::compare(RecoverySource& source, uint32_t digest) {
    if (!source.named) return;
    const JournalSegment& named = *source.named;
    const bool full = journal_.manifest_version == 2;  // it has more than sizes
    const bool newest = source.named == named_.back().get();
    uint64_t end = newest ? named.first_sequence + named.records : 0;
    for (size_t i = 0; i + 1 < named_.size(); ++i)
        if (named_[i].get() == source.named) end = named_[i + 1]->first_sequence;
    source.open_end = newest;
    const bool have = source.whole != 0;
    source.note_gap(have ? records_.back().sequence + 1 : named.first_sequence, end);
    if (!source.segment) return;
    const uint64_t bytes = source.segment->bytes;
    if (newest ? bytes < named.bytes : bytes != named.bytes)
        source.blame("it has not the size that 'manifest' says");
    else if (full && digest != named.digest) source.blame("its checksum is not that in 'manifest'");
}

/// Of copies one is enough. Of two that differ, and so come from different lives, only the first
/// can be kept: the next journal has each number once.
void Recovery::sort() {
    sort_items(records_, [](const WholeRecord& a, const WholeRecord& b) {
        return std::pair(a.sequence, a.checksum) < std::pair(b.sequence, b.checksum);
    });
    std::vector<WholeRecord> once;
    for (const WholeRecord& whole : records_) {
        if (once.empty() || once.back().sequence != whole.sequence) once.push_back(whole);
        else if (once.back().checksum != whole.checksum)
            lose(whole, "a record whose sequence number another file has, too,");
    }
    records_ = std::move(once);
}

void Recovery::lose(const WholeRecord& whole, const char* what) {
    RecoverySource& source = sources_[whole.source];
    source.blame(format("%s at offset %llu", what, static_cast<unsigned long long>(whole.offset)));
    source.gaps.emplace_back(whole.sequence, whole.sequence);
    ++source.lost;
}

/// Does the records again.
Result<void> Recovery::replay() {
    for (const WholeRecord& whole : records_) {
        JournalSegment& segment = *sources_[whole.source].segment;
        journal_.next_sequence = std::max(journal_.next_sequence, whole.sequence + 1);
        auto bytes = journal_.read_record(segment, {whole.offset, segment.number, whole.size});
        if (!bytes) return bytes.error();
        JournalRecord record;
        journal_parse(*bytes, 0, journal_.salt, &record);
        auto applied = journal_.replay_record(segment, record, size_t(whole.offset));
        if (!applied) return applied.error();
        if (!*applied) lose(whole, "no record that belongs here");
    }
    return {};
}

/// What is missing in a file may be in another.
void Recovery::count_losses() {
    for (RecoverySource& source : sources_) {
        uint64_t missing = 0;
        for (const auto& [first, last] : source.gaps) {
            missing += last - first + 1;
            const auto below = [](const WholeRecord& whole, uint64_t sequence) {
                return whole.sequence < sequence;
            };
            const auto begin = records_.begin(), end = records_.end();
            missing -= uint64_t(std::lower_bound(begin, end, last + 1, below) -
                                std::lower_bound(begin, end, first, below));
        }
        source.lost += missing;
    }
}

Result<void> Recovery::put_manifest_aside() {
    const auto odd = [](const auto& source) { return !source.named || !source.segment; };
    if (manifest_read_ && std::none_of(sources_.begin(), sources_.end(), odd)) return {};
    if (std::find(names_.begin(), names_.end(), "manifest") == names_.end()) return {};
    auto file = journal_.folder->open_file("manifest", false);
    if (!file) return file.error();
    auto bytes = journal_read(**file);
    if (!bytes) return bytes.error();
    manifest_aside_ = journal_aside(&names_, "manifest");
    auto copy = journal_.folder->open_file(manifest_aside_, true);
    if (!copy) return copy.error();
    auto put = (*copy)->write_at(0, {bytes->as<const char>(), bytes->size()});
    return put ? (*copy)->sync() : put;
}

/// What lives moves to new segments. A crash in between leaves the journal as it was.
Result<void> Recovery::rebuild() {
    if (auto put = put_manifest_aside(); !put) return put;
    for (RecoverySource& source : sources_)
        if (source.segment && !source.fault.empty())
            source.segment->aside = journal_aside(&names_, source.name);
    journal_.planned = 0;
    journal_.begin_compaction(journal_.segments.size(), 0);
    std::map<std::pair<uint32_t, uint64_t>, uint64_t> sequences;  // by place
    for (const WholeRecord& whole : records_)
        sequences[{uint32_t(whole.source + 1), whole.offset}] = whole.sequence;
    sort_items(journal_.compaction->moves, [&](const auto& a, const auto& b) {
        return sequences[{a.from.segment, a.from.offset}] <
               sequences[{b.from.segment, b.from.offset}];
    });
    for (bool more = true; more;) {
        auto copied = journal_.copy_piece();
        if (!copied) return copied.error();
        more = *copied;
    }
    auto number = journal_.take_number();
    if (!number) return number.error();
    auto newest = journal_.new_segment(*number, journal_.next_sequence, false);
    if (!newest) return newest.error();
    journal_.compaction->outputs.push_back(*newest);
    return journal_.finish_compaction();
}

void Recovery::report() const {
    const auto say = [&](const std::string& line) {
        journal_.options.log(LogLevel::warning, "recovery: " + line);
    };
    uint64_t lost = 0, first = UINT64_MAX, last = 0;
    bool open_end = false;
    for (const RecoverySource& source : sources_) {
        if (source.fault.empty()) continue;
        std::string line = format("'%s': ", source.name.c_str()) + source.fault +
                           format("; %zu whole records", source.whole);
        for (const auto& [from, to] : source.gaps) {
            first = std::min(first, from);
            last = std::max(last, to);
            line += format("; without sequence numbers %llu to %llu",
                           static_cast<unsigned long long>(from),
                           static_cast<unsigned long long>(to));
        }
        if (source.open_end) line += "; whether more followed its last record cannot be told";
        if (source.segment) line += "; it lies beside as '" + source.segment->aside + "'";
        say(line);
        lost += source.lost;
        open_end = open_end || source.open_end;
    }
    if (!manifest_aside_.empty())
        say("'manifest' does not fit the rest; it lies beside as '" + manifest_aside_ + "'");
    size_t kept = 0, unfinished = 0;
    for (const auto& [id, entry] : journal_.records->index.entries()) {
        kept += !entry.erased;
        unfinished += !entry.record.terminal;
    }
    std::string line = format("%zu responses are kept, %zu of them unfinished; ", kept, unfinished);
    if (lost)
        line += format("up to %llu records of the journal are lost, sequence numbers %llu to %llu",
                       static_cast<unsigned long long>(lost),
                       static_cast<unsigned long long>(first),
                       static_cast<unsigned long long>(last));
    else line += open_end ? "no record is known to be lost" : "no record is lost";
    say(line);
}

}  // namespace

Result<void> FileJournal::recover(const std::vector<std::string>& names) {
    return Recovery(this, names).run();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_STORE
