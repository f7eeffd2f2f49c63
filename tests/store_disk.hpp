// A disk in memory that forgets: what was written but not synced, names too, is kept apart, and
// after a crash any part of it may be there.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/internal.hpp"

namespace store_disk {

using namespace valar;

struct Random {  // splitmix64
    uint64_t state = 0;
    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    uint64_t below(uint64_t limit) { return next() % limit; }
};

/// A number that a test may set while a store's thread reads it.
struct Shared {
    std::atomic<uint64_t> value;
    Shared(uint64_t from) : value(from) {}
    Shared(const Shared& other) : value(other.value.load()) {}
    Shared& operator=(const Shared& other) {
        value = other.value.load();
        return *this;
    }
    operator uint64_t() const { return value; }
    void operator+=(uint64_t more) { value += more; }
    void operator-=(uint64_t less) { value -= less; }
};

class Disk {
public:
    static constexpr size_t sector = 512;
    struct Change {
        bool cut = false;  // truncates at `offset`
        uint64_t offset = 0;
        std::string bytes = {};
    };
    struct File {
        std::mutex mutex;  // guards `now`: a FolderFile is read from any thread while one writes
        std::string now, synced;
        std::vector<Change> unsynced;
        uint64_t allocated = 0;  // of the capacity
    };
    using Entry = std::shared_ptr<File>;  // null: no such name

    std::map<std::string, Entry> names;
    std::map<std::string, std::vector<Entry>> history;  // of names since the folder was synced
    int64_t until_crash = -1;                           // operations that still work; -1: all
    int64_t operations = 0;                             // done so far
    Shared capacity = UINT64_MAX;                       // bytes that can still be written
    int syncs_until_failure = -1;
    Shared clock_ns = 1'000'000'000;  // of the machine, and since which start of it
    std::string boot = "first";

    static Result<void> failure(ErrorKind kind, const char* message) {
        return detail::make_error(kind, message);
    }
    /// Counts an operation; an error once the power is gone.
    Result<void> operate() {
        ++operations;
        if (until_crash < 0) return {};
        if (until_crash == 0) return failure(ErrorKind::io, "no power");
        --until_crash;
        return {};
    }
    Result<void> sync() {
        if (auto powered = operate(); !powered) return powered;
        if (syncs_until_failure < 0 || syncs_until_failure-- > 0) return {};
        return failure(ErrorKind::io, "the disk fails");
    }
    void set(const std::string& name, Entry entry) {
        auto& values = history[name];
        if (values.empty()) values.push_back(names.count(name) ? names[name] : nullptr);
        values.push_back(entry);
        if (entry) names[name] = std::move(entry);
        else names.erase(name);
    }
    static void apply(std::string* text, const Change& change, uint64_t from, uint64_t to) {
        if (change.cut)
            return text->resize(size_t(std::min<uint64_t>(text->size(), change.offset)));
        if (text->size() < to) text->resize(size_t(to));
        text->replace(size_t(from), size_t(to - from), change.bytes, size_t(from - change.offset),
                      size_t(to - from));
    }
    /// What is found after the power came back.
    Disk after_crash(Random& random) const;
};

inline Disk Disk::after_crash(Random& random) const {
    Disk disk;
    disk.clock_ns = clock_ns;
    disk.boot = boot;
    std::map<std::string, Entry> chosen = names;
    for (const auto& [name, values] : history) {
        const Entry& value = values[size_t(random.below(values.size()))];
        if (value) chosen[name] = value;
        else chosen.erase(name);
    }
    for (const auto& [name, entry] : chosen) {
        auto file = std::make_shared<File>();
        std::string& text = file->now = entry->synced;
        std::vector<Change> changes = entry->unsynced;
        for (size_t i = changes.size(); i > 1; --i)
            std::swap(changes[i - 1], changes[size_t(random.below(i))]);
        for (const Change& change : changes) {
            const uint64_t fate = random.below(3);  // dropped, kept, torn
            const uint64_t end = change.offset + change.bytes.size();
            if (fate == 0) continue;
            if (fate == 1 || change.cut) {
                apply(&text, change, change.offset, end);
                continue;
            }
            for (uint64_t at = change.offset; at < end;) {
                const uint64_t next = std::min<uint64_t>(end, (at / sector + 1) * sector);
                if (random.below(2)) apply(&text, change, at, next);
                at = next;
            }
        }
        file->synced = text;
        disk.names[name] = std::move(file);
    }
    return disk;
}

class DiskFile : public detail::FolderFile {
public:
    DiskFile(Disk* disk, Disk::Entry file) : disk_(disk), file_(std::move(file)) {}
    Result<uint64_t> size() override {
        const std::lock_guard<std::mutex> lock(file_->mutex);
        return uint64_t{file_->now.size()};
    }
    Result<void> read_at(uint64_t offset, void* bytes, size_t size) override {
        const std::lock_guard<std::mutex> lock(file_->mutex);
        if (offset > file_->now.size() || size > file_->now.size() - offset)
            return Disk::failure(ErrorKind::io, "the file ends too early");
        if (size) std::memcpy(bytes, file_->now.data() + offset, size);
        return {};
    }
    Result<void> write_at(uint64_t offset, std::string_view bytes) override {
        auto done = disk_->operate();
        size_t fits = bytes.size();
        if (done && bytes.size() > disk_->capacity) {
            done = Disk::failure(ErrorKind::overloaded, "the disk is full");
            fits = size_t(disk_->capacity);
        } else if (!done) {
            fits /= 2;  // of the write that the crash cut short
        }
        if (disk_->capacity != UINT64_MAX) disk_->capacity -= fits;
        change({false, offset, std::string(bytes.substr(0, fits))});
        return done;
    }
    Result<void> truncate(uint64_t size) override {
        if (auto done = disk_->operate(); !done) return done;
        change({true, size, {}});
        return {};
    }
    Result<void> sync() override {
        if (auto done = disk_->sync(); !done) return done;
        const std::lock_guard<std::mutex> lock(file_->mutex);
        file_->synced = file_->now;
        file_->unsynced.clear();
        return {};
    }

    Result<void> allocate(uint64_t size) override {
        if (disk_->capacity == UINT64_MAX || size <= file_->allocated) {
            file_->allocated = std::max(file_->allocated, size);
            return {};
        }
        if (size - file_->allocated > disk_->capacity)
            return Disk::failure(ErrorKind::overloaded, "the disk is full");
        disk_->capacity -= size - std::exchange(file_->allocated, size);
        return {};
    }

private:
    void change(Disk::Change change) {
        const std::lock_guard<std::mutex> lock(file_->mutex);
        Disk::apply(&file_->now, change, change.offset, change.offset + change.bytes.size());
        file_->unsynced.push_back(std::move(change));
    }
    Disk* disk_;
    Disk::Entry file_;
};

class DiskFolder : public detail::Folder {
public:
    explicit DiskFolder(Disk* disk) : disk_(disk) {}
    Result<std::vector<std::string>> list() override {
        std::vector<std::string> names;
        for (const auto& [name, file] : disk_->names) names.push_back(name);
        return names;
    }
    Result<std::unique_ptr<detail::FolderFile>> open_file(const std::string& name,
                                                          bool create) override {
        if (create) {
            if (auto done = disk_->operate(); !done) return done.error();
            disk_->set(name, std::make_shared<Disk::File>());
        }
        const auto found = disk_->names.find(name);
        if (found == disk_->names.end())
            return detail::make_error(ErrorKind::not_found, "no file '" + name + "'");
        return std::unique_ptr<detail::FolderFile>(new DiskFile(disk_, found->second));
    }
    Result<void> rename(const std::string& from, const std::string& to) override {
        if (auto done = disk_->operate(); !done) return done;
        if (!disk_->names.count(from)) return Disk::failure(ErrorKind::not_found, "no such file");
        disk_->set(to, disk_->names[from]);
        disk_->set(from, nullptr);
        return {};
    }
    Result<void> remove(const std::string& name) override {
        if (auto done = disk_->operate(); !done) return done;
        const auto found = disk_->names.find(name);
        if (found != disk_->names.end() && disk_->capacity != UINT64_MAX)
            disk_->capacity += std::exchange(found->second->allocated, 0);
        disk_->set(name, nullptr);
        return {};
    }
    uint64_t free_bytes() const override { return disk_->capacity; }
    Result<void> sync() override {
        if (auto done = disk_->sync(); !done) return done;
        disk_->history.clear();
        return {};
    }

    uint64_t clock_ns() const override { return disk_->clock_ns; }
    std::string boot() const override { return disk_->boot; }

private:
    Disk* disk_;
};

}  // namespace store_disk
