#include "prologue.hpp"

#include "store/journal.hpp"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_STORE
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Backups -----------------------------------------------------------------------------------
// What the manifest names, as long as it is the manifest, is the journal: a segment that grows no
// more stays as it is, and of the newest every beginning is a moment that was. So the copy is one
// when the manifest was the same before the first and after the last of its files was read. Else
// the next pass brings what it names now, of what is there only the segment that grew.

namespace {

std::string_view backup_text(const Buffer& bytes) { return {bytes.as<const char>(), bytes.size()}; }

class Backup {
public:
    Backup(Folder* from, Folder* to) : from_(*from), to_(*to) {}
    /// One pass. False: the journal has another manifest by now.
    Result<bool> pass();

private:
    Result<Buffer> read(const std::string& name);
    Result<Buffer> read(const JournalSegment& segment, bool grows);
    Result<void> write(const std::string& name, const Buffer& bytes);

    Folder &from_, &to_;
    std::vector<std::string> done_;  // segments that grow no more
};

Result<Buffer> Backup::read(const std::string& name) {
    auto file = from_.open_file(name, false);
    if (!file) return file.error();
    return journal_read(**file);
}

Result<Buffer> Backup::read(const JournalSegment& segment, bool grows) {
    auto bytes = read(segment.name);
    if (bytes && (grows ? bytes->size() < segment.bytes : bytes->size() != segment.bytes))
        return journal_damage(segment.name, bytes->size(), "it has not the size in 'manifest'");
    return bytes;
}

Result<void> Backup::write(const std::string& name, const Buffer& bytes) {
    auto file = to_.open_file(name, true);
    if (!file) return file.error();
    auto put = (*file)->write_at(0, backup_text(bytes));
    return put ? (*file)->sync() : put;
}

/// Removes all files but those.
Result<void> backup_leave(Folder& folder, const JournalSegments& kept) {
    auto names = folder.list();
    if (!names) return names.error();
    for (const std::string& name : *names) {
        const auto same = [&](const auto& segment) { return segment->name == name; };
        if (name != "manifest" && !journal_segment(name)) continue;
        if (std::any_of(kept.begin(), kept.end(), same)) continue;
        if (auto gone = folder.remove(name); !gone) return gone;
    }
    return {};
}

Result<bool> Backup::pass() {
    auto manifest = read("manifest");
    if (!manifest) return manifest.error();
    FileJournal journal;
    if (auto listed = journal.read_manifest(backup_text(*manifest)); !listed) return listed.error();
    const auto moved_on = [&] {
        auto now = read("manifest");
        return now && backup_text(*now) != backup_text(*manifest);
    };
    for (const auto& segment : journal.segments) {
        const bool grows = segment == journal.segments.back();
        if (std::find(done_.begin(), done_.end(), segment->name) != done_.end()) continue;
        auto bytes = read(*segment, grows);
        if (!bytes && moved_on()) return false;  // a compaction took it away
        if (!bytes) return bytes.error();
        if (auto put = write(segment->name, *bytes); !put) return put.error();
        if (!grows) done_.push_back(segment->name);
    }
    if (moved_on()) return false;
    if (auto left = backup_leave(to_, journal.segments); !left) return left.error();
    if (auto put = write("manifest", *manifest); !put) return put.error();
    if (auto synced = to_.sync(); !synced) return synced.error();
    return true;
}

Result<void> backup_check_empty(Folder& folder, const std::string& path) {
    auto names = folder.list();
    if (!names) return names.error();
    for (const std::string& name : *names)
        if (name != "." && name != ".." && name != "lock")
            return make_error(
                ErrorKind::io,
                "'" + path + "' is not empty, as a copy's directory is: '" + name + "' is there");
    return {};
}

}  // namespace

Result<void> journal_copy(Folder& from, Folder& to) {
    Backup backup(&from, &to);
    for (;;) {
        auto whole = backup.pass();
        if (whole && *whole) return {};
        if (whole) continue;
        (void)backup_leave(to, {}).ok();
        return whole.error();
    }
}

}  // namespace detail

Result<uint64_t> FileStore::back_up(const std::string& from, const std::string& to) {
    auto source = detail::Folder::open_beside(from);
    if (!source) return source.error();
    for (bool empty = false;; empty = true) {
        auto target = detail::Folder::open(to);
        if (!target) return target.error();
        if (!empty)
            if (auto checked = detail::backup_check_empty(**target, to); !checked)
                return checked.error();
        auto copied = detail::journal_copy(**source, **target);
        if (!copied && copied.error().kind == ErrorKind::not_found)
            return detail::make_error(ErrorKind::io, "'" + from + "' holds no store");
        if (!copied) return copied.error();
        target->reset();
        Result<uint64_t> bytes = uint64_t{0};
        {
            auto opened = open({.path = to, .own_thread = false});
            if (opened) bytes = (*opened)->disk_bytes();
            else bytes = opened.error();
        }
        auto copy = detail::Folder::open_beside(to);
        if (copy) (void)(*copy)->remove("reserve").ok();  // of the copy's own disk
        if (bytes) return bytes;
        // On a full disk a write may have been undone, and another put there, while it was read.
        if (!empty && bytes.error().kind == ErrorKind::bad_data) continue;
        if (copy) (void)detail::backup_leave(**copy, {}).ok();
        return bytes;
    }
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_STORE
