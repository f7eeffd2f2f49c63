#include "prologue.hpp"

#include "store/journal.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#ifndef VALAR_NO_STORE
namespace valar {
inline namespace v1 {
namespace detail {

// ---- Commits ---------------------------------------------------------------------------------

namespace {

/// The record that a change leaves in the journal, and the place of an entry that it is kept in.
struct JournalKind {
    StoreChange::Kind change;
    uint16_t type;
    JournalPlace StoreEntry::*slot;
};
constexpr JournalKind journal_kinds[] = {
    {StoreChange::Kind::add, journal_add, &StoreEntry::added},
    {StoreChange::Kind::begin, journal_begin, &StoreEntry::begun},
    {StoreChange::Kind::finish, journal_finish, &StoreEntry::ended},
    {StoreChange::Kind::erase, journal_erase, &StoreEntry::ended},
};

const JournalKind& journal_kind(StoreChange::Kind change) {
    for (const JournalKind& row : journal_kinds)
        if (row.change == change) return row;
    VALAR_ASSERT(false && "what expires leaves no entry");
    return journal_kinds[0];
}

/// Fills in the head of a record that begins at `at` and whose payload ends the bytes.
void journal_put_head(std::string* bytes, size_t at, const JournalRecord& record, uint32_t salt) {
    const size_t size = bytes->size() - at - journal_record_head;
    std::string head;
    journal_put(&head, journal_magic);
    journal_put(&head, uint32_t{record.type});
    journal_put(&head, uint32_t(size));
    journal_put(&head, uint32_t(record.sequence - record.commit));
    journal_put(&head, record.sequence);
    journal_put(&head, crc32c(bytes->data() + at + journal_record_head, size, salt));
    journal_put(&head, crc32c(head.data(), head.size(), salt));
    std::memcpy(bytes->data() + at, head.data(), head.size());
}

}  // namespace

/// Appends a record to the commit; `place` is where it will lie.
Result<void> FileJournal::encode(uint16_t type, StoredResponse& record, int64_t died_ms,
                                 JournalPlace* place) {
    if (next_sequence >= journal_last_start)
        return make_error(ErrorKind::unsupported, "the journal's sequence numbers are used up");
    const JournalSegment& segment = *segments.back();
    const size_t at = out.size();
    out.resize(at + journal_record_head);
    journal_fields(JournalEncoder{&out}, type, record, died_ms);
    const size_t size = out.size() - at - journal_record_head;
    if (size > journal_max_payload) {
        out.resize(at);
        return make_error(ErrorKind::too_large, "a record is larger than the journal can hold");
    }
    journal_put_head(&out, at, {type, next_sequence, commit}, salt);
    digest = crc32c(out.data() + at, journal_record_head, digest);
    *place = {written + at, segment.number, uint32_t(journal_record_head + size)};
    ++next_sequence;
    return {};
}

/// Appends the record of a step that `change` takes; the step's entry then knows where it lies.
Result<void> FileJournal::encode_step(StoreChange::Kind change, StorePlan::Step& step) {
    if (step.expired) return {};  // follows from its end
    JournalPlace place;
    if (!step.entry) {
        StoredResponse dropped;
        dropped.id = step.id;
        return encode(journal_drop, dropped, step.died_ms, &place);
    }
    const JournalKind& kind = journal_kind(change);
    if (auto put = encode(kind.type, step.entry->record, step.died_ms, &place); !put) return put;
    (*step.entry).*kind.slot = place;
    step.entry->drop_texts();
    return {};
}

/// Decides a change and adds the records of its steps to the commit.
Result<void> FileJournal::add_to_commit(StoreChange& change) {
    if (broken && change.kind != StoreChange::Kind::expire) return *broken;
    if (write_failed) return *write_failed;
    const bool grows = change.kind == StoreChange::Kind::add ||
                       (change.kind == StoreChange::Kind::finish && out.size() >= spendable);
    if (full && grows) return *full;
    const size_t begin = plan->steps().size();
    if (auto decided = plan->decide(change); !decided) return decided;
    if (const size_t gone = plan->steps().size() - begin;
        gone > 0 && change.kind == StoreChange::Kind::expire)
        options.log(LogLevel::info, format("%zu finished records expired", gone));
    for (size_t i = begin; i < plan->steps().size(); ++i) {
        auto put = encode_step(change.kind, plan->steps()[i]);
        if (put) continue;
        write_failed = put.error();
        return put;
    }
    if (out.size() >= journal_write_bytes) flush();
    return {};
}

void FileJournal::flush() {
    if (write_failed || out.empty()) return;
    if (auto put = segments.back()->file->write_at(written, out); !put) write_failed = put.error();
    written += out.size();
    out.clear();
}

/// All that was encoded is on the disk, or none of it is in the journal.
Result<void> FileJournal::write() {
    JournalSegment& segment = *segments.back();
    flush();
    if (write_failed) {
        next_sequence = commit;
        if (written != segment.bytes)
            if (auto cut = segment.file->truncate(segment.bytes); !cut)
                (void)stop_if_failed(cut).ok();
        return *write_failed;
    }
    if (written == segment.bytes) return {};
    if (auto synced = stop_if_failed(segment.file->sync()); !synced) return *broken;
    spendable -= std::min(spendable, written - segment.bytes);
    segment.bytes = written;
    segment.records += uint32_t(next_sequence - commit);
    segment.digest = digest;
    return {};
}

void FileJournal::begin_commit() {
    commit = next_sequence;
    written = segments.back()->bytes;
    digest = segments.back()->digest;
    out.clear();
    write_failed.reset();
}

/// A record in a commit of its own.
Result<void> FileJournal::append(uint16_t type, StoredResponse record) {
    begin_commit();
    JournalPlace place;
    if (auto put = encode(type, record, 0, &place); !put) return put;
    return write();
}

Result<void> FileJournal::try_commit(std::vector<StoreChange>& changes,
                                     std::vector<Result<void>>* results) {
    begin_commit();
    results->clear();
    for (StoreChange& change : changes) results->push_back(add_to_commit(change));
    return write();
}

void FileJournal::commit_changes(std::vector<StoreChange>& changes) {
    look_for_room();
    std::vector<Result<void>> results;
    int64_t now_ms = 0;
    for (const StoreChange& change : changes)
        if (change.kind == StoreChange::Kind::expire) now_ms = std::max(now_ms, change.now_ms);
    auto done = try_commit(changes, &results);
    if (!done && done.error().kind == ErrorKind::overloaded && give_reserve(done.error())) {
        plan->clear();
        done = try_commit(changes, &results);
    }
    {
        const std::lock_guard<std::mutex> lock(records->mutex);
        if (done)
            for (auto& step : plan->steps()) install(step.id, std::move(step.entry), step.died_ms);
        plan->clear();
    }
    for (size_t i = 0; i < changes.size(); ++i) {
        const StoreDone& call = changes[i].done;
        if (call.call) call.call(call.context, done ? std::move(results[i]) : done);
    }
    if (segments.back()->bytes >= options.segment_bytes && !broken) (void)roll().ok();
    if (now_ms != 0) upkeep(now_ms);
    if (this->now_ms() >= time.next_mark_ms) write_mark();
}

// ---- A full disk -----------------------------------------------------------------------------

void FileJournal::set_failure(const std::optional<Error>& why) {
    const std::lock_guard<std::mutex> lock(failure_mutex);
    failure = why;
}

/// As much of a segment as there is room for.
void FileJournal::take_reserve() {
    const auto take = [&](uint64_t bytes) -> Result<void> {
        auto file = folder->open_file("reserve", false);
        if (!file) file = folder->open_file("reserve", true);
        return file ? (*file)->allocate(bytes) : file.error();
    };
    const uint64_t least = least_reserve();
    Result<void> taken;
    for (uint64_t bytes = options.segment_bytes; bytes > least; bytes /= 2) {
        taken = take(bytes);
        if (taken) {
            reserve = bytes;
            return;
        }
        (void)folder->remove("reserve").ok();
        if (taken.error().kind != ErrorKind::overloaded) return;  // it goes without
    }
    if (full || taken) return;
    full = taken.error();
    wanted_free = folder->free_bytes() + least;
    set_failure(full);
}

/// True: there is room for what cannot wait, for once.
bool FileJournal::give_reserve(const Error& why) {
    const uint64_t given = std::exchange(reserve, 0), left = folder->free_bytes();
    if (given == 0 || !folder->remove("reserve")) return false;
    full = why;
    spendable = given / 2;
    // what was given is no new room (where it cannot be known the sum wraps, and is no bound)
    wanted_free = left + given + least_reserve();
    set_failure(full);
    return true;
}

void FileJournal::look_for_room() {
    const uint64_t now_ns = folder->clock_ns();
    if (now_ns < next_look_ns) return;
    next_look_ns = now_ns + journal_look_ns;
    free_bytes = folder->free_bytes();
    if (!full || broken || free_bytes < wanted_free) return;
    take_reserve();
    if (reserve == 0) return;
    full.reset();
    set_failure(std::nullopt);
}

/// While there is something that ages.
void FileJournal::write_mark() {
    const auto has_dead = [](const auto& segment) { return segment->dead_since_ms != 0; };
    if (broken || (records->index.ended().empty() &&
                   std::none_of(segments.begin(), segments.end(), has_dead)))
        return;
    StoredResponse mark;
    mark.id = time.boot;
    const uint64_t clock_ns = folder->clock_ns();
    mark.created_at_ms = time.at(clock_ns);
    mark.ended_at_ms = int64_t(clock_ns / 1'000'000);
    time.next_mark_ms = mark.created_at_ms + journal_mark_ms;
    (void)append(journal_mark, std::move(mark)).ok();  // the next one says it better
}

/// One turn of the store thread. True: there is more to do.
bool FileJournal::step() {
    std::vector<StoreChange> changes;
    {
        const std::lock_guard<std::mutex> lock(queue_mutex);
        changes.swap(queue);
    }
    if (!changes.empty()) commit_changes(changes);
    if (!compaction || broken) return false;
    auto more = compact();
    if (more) return *more;
    options.log(LogLevel::error, "the journal was not compacted: " + more.error().message);
    abandon_compaction();
    return false;
}

void FileJournal::run() {
    for (bool more = false;;) {
        {
            std::unique_lock<std::mutex> lock(queue_mutex);
            queue_filled.wait(lock, [&] { return more || ending || !queue.empty(); });
            if (ending && queue.empty()) return;
        }
        more = step();
    }
}

void FileJournal::close() {
    if (thread.joinable()) {
        {
            const std::lock_guard<std::mutex> lock(queue_mutex);
            ending = true;
        }
        queue_filled.notify_one();
        thread.join();
    }
    if (!ready) return;
    step();
    abandon_compaction();
    write_mark();
    if (!broken) (void)append(journal_close).ok();
}

// ---- Segments and compaction -----------------------------------------------------------------

Result<uint32_t> FileJournal::take_number() {
    if (next_number <= journal_last_number) return next_number++;
    return make_error(ErrorKind::unsupported, "the journal's segment numbers are used up");
}

/// A file with a head, both on the disk.
Result<std::shared_ptr<JournalSegment>> FileJournal::new_segment(uint32_t number,
                                                                 uint64_t first_sequence,
                                                                 bool copied) {
    auto segment = std::make_shared<JournalSegment>();
    segment->name = journal_name(number, copied);
    segment->number = number;
    segment->copied = copied;
    segment->first_sequence = first_sequence;
    std::string head = "valarjnl";
    journal_put(&head, journal_version);
    journal_put(&head, salt);
    journal_put(&head, number);
    journal_put(&head, first_sequence);
    journal_put(&head, crc32c(head.data(), head.size()));
    if (copied) {
        const size_t at = head.size();
        head.resize(at + journal_record_head);
        journal_put(&head, next_sequence);
        journal_put_head(&head, at, {journal_copied, first_sequence, first_sequence}, salt);
        segment->count(head.data() + at);
    }
    segment->bytes = head.size();
    auto file = folder->open_file(segment->name, true);
    if (!file) return file.error();
    segment->file = std::move(*file);
    Result<void> made = segment->file->write_at(0, head);
    if (made) made = stop_if_failed(segment->file->sync());
    if (made) made = stop_if_failed(folder->sync());
    if (made) return segment;
    segment->file.reset();
    (void)folder->remove(segment->name).ok();
    return made.error();
}

Result<void> FileJournal::write_manifest(const JournalSegments& listed) {
    std::string bytes = "valarman";
    journal_put(&bytes, journal_manifest_version);
    journal_put(&bytes, salt);
    journal_put(&bytes, uint32_t(listed.size()));
    journal_put(&bytes, next_number);
    journal_put(&bytes, planned);
    for (const auto& segment : listed) {
        journal_put(&bytes, segment->number);
        journal_put(&bytes, uint32_t{segment->copied});
        journal_put(&bytes, segment->first_sequence);
        journal_put(&bytes, segment->bytes);
        journal_put(&bytes, segment->records);
        journal_put(&bytes, segment->digest);
    }
    journal_put(&bytes, crc32c(bytes.data(), bytes.size()));
    auto file = folder->open_file("manifest.new", true);
    if (!file) return file.error();
    if (auto put = (*file)->write_at(0, bytes); !put) return put;
    if (auto synced = stop_if_failed((*file)->sync()); !synced) return synced;
    file->reset();  // before it is renamed
    if (auto renamed = folder->rename("manifest.new", "manifest"); !renamed) return renamed;
    return stop_if_failed(folder->sync());
}

/// The newest segment ends and a new one begins. The order is what damage is told by: see "The
/// journal". A number stays planned until a manifest names it.
Result<void> FileJournal::roll() {
    auto number = planned ? Result<uint32_t>(planned) : take_number();
    if (!number) return number.error();
    planned = *number;
    if (auto put = write_manifest(segments); !put) return put;
    // where there is one before, this follows the record that says so
    auto made = new_segment(planned, next_sequence + (segments.empty() ? 0 : 1), false);
    if (!made) return made.error();
    Result<void> put = segments.empty() ? Result<void>() : append(journal_roll);
    JournalSegments listed = segments;
    listed.push_back(*made);
    planned = 0;
    if (put) put = write_manifest(listed);
    if (!put) {
        planned = *number;
        if (!broken) (void)folder->remove((*made)->name).ok();
        return put;
    }
    const std::lock_guard<std::mutex> lock(records->mutex);
    segments = std::move(listed);
    return {};
}

/// Begins a compaction when texts have been dead for long, or half of the journal is dead.
void FileJournal::upkeep(int64_t now_ms) {
    if (compaction || broken) return;
    size_t inputs = 0;
    uint64_t dead = 0, live = 0;
    for (size_t i = 0; i < segments.size(); ++i) {
        const JournalSegment& segment = *segments[i];
        if (segment.dead_since_ms != 0 &&
            store_is_past(segment.dead_since_ms, journal_dead_ms, now_ms))
            inputs = i + 1;
        live += segment.live;
        dead += segment.bytes - segment.live;
    }
    if (dead > live + options.segment_bytes) inputs = std::max(inputs, segments.size() - 1);
    if (inputs == 0 || (inputs == segments.size() && !roll())) return;
    begin_compaction(inputs, now_ms);
}

void FileJournal::begin_compaction(size_t inputs, int64_t now_ms) {
    compaction.emplace();
    compaction->inputs = inputs;
    compaction->began_ms = now_ms;
    std::unordered_map<uint32_t, size_t> order;
    for (size_t i = 0; i < inputs; ++i) order[segments[i]->number] = i;
    for (const auto& [id, entry] : records->index.entries())
        for (const auto slot : journal_slots)
            if (order.count((entry.*slot).segment))
                compaction->moves.push_back({id, slot, entry.*slot, {}});
    sort_items(compaction->moves, [&](const auto& a, const auto& b) {
        return std::pair(order[a.from.segment], a.from.offset) <
               std::pair(order[b.from.segment], b.from.offset);
    });
}

Result<bool> FileJournal::copy_piece() {
    JournalSegments& outputs = compaction->outputs;
    std::string copied;
    while (compaction->next < compaction->moves.size() && copied.size() < journal_copy_bytes) {
        auto& move = compaction->moves[compaction->next];
        auto bytes = read_record(*find_segment(move.from.segment), move.from);
        if (!bytes) return bytes.error();
        if (outputs.empty() || outputs.back()->bytes >= options.segment_bytes) {
            if (!copied.empty()) break;  // of the segment before
            auto number = take_number();
            if (!number) return number.error();
            auto made = new_segment(*number, journal_get<uint64_t>(bytes->data() + 16), true);
            if (!made) return made.error();
            outputs.push_back(*made);
        }
        move.to = {outputs.back()->bytes + copied.size(), outputs.back()->number, move.from.size};
        copied += *bytes;
        outputs.back()->count(bytes->data());
        ++compaction->next;
    }
    if (!copied.empty()) {
        JournalSegment& output = *outputs.back();
        if (auto put = output.file->write_at(output.bytes, copied); !put) return put.error();
        output.bytes += copied.size();
    }
    return compaction->next < compaction->moves.size();
}

Result<bool> FileJournal::compact() {
    auto more = copy_piece();
    if (!more || *more) return more;
    if (auto finished = finish_compaction(); !finished) return finished.error();
    return false;
}

Result<void> FileJournal::finish_compaction() {
    for (const auto& output : compaction->outputs)
        if (auto synced = stop_if_failed(output->file->sync()); !synced) return synced;
    JournalSegments listed = compaction->outputs, old;
    listed.insert(listed.end(), segments.begin() + std::ptrdiff_t(compaction->inputs),
                  segments.end());
    if (auto put = write_manifest(listed); !put) return put;
    {
        const std::lock_guard<std::mutex> lock(records->mutex);
        old.assign(segments.begin(), segments.begin() + std::ptrdiff_t(compaction->inputs));
        segments = std::move(listed);
        for (const auto& move : compaction->moves) {
            StoreEntry* entry = records->index.find(move.id);
            JournalSegment& output = *find_segment(move.to.segment);
            if (!entry || !((*entry).*move.slot == move.from)) {
                output.note_dead(compaction->began_ms);
                continue;
            }
            (*entry).*move.slot = move.to;
            output.live += move.to.size;
        }
    }
    compaction.reset();
    time.next_mark_ms = 0;  // the last one may be gone
    for (const auto& segment : old) {
        if (segment->aside.empty()) (void)folder->remove(segment->name).ok();
        else (void)folder->rename(segment->name, segment->aside).ok();
    }
    return stop_if_failed(folder->sync());
}

/// The manifest may already name the outputs when a sync failed: then they stay.
void FileJournal::abandon_compaction() {
    if (!compaction) return;
    for (const auto& output : compaction->outputs) {
        output->file.reset();
        if (!broken) (void)folder->remove(output->name).ok();
    }
    compaction.reset();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar

namespace valar {
inline namespace v1 {

// ---- FileStore -------------------------------------------------------------------------------

struct FileStore::State : detail::FileJournal {};

FileStore::FileStore(std::unique_ptr<State> state) : state_(std::move(state)) {}
FileStore::~FileStore() {
    detail::leave_to_parent(state_);
    if (state_) state_->close();
}

Result<std::unique_ptr<FileStore>> FileStore::open(const FileStoreOptions& options) {
    if (options.path.find_first_not_of(" \t\r\n") == std::string::npos)
        return detail::make_error(ErrorKind::invalid_request, "the store's path is empty");
    auto folder = detail::Folder::open(options.path);
    if (!folder) return folder.error();
    return open(options, std::move(*folder));
}

Result<std::unique_ptr<FileStore>> FileStore::open(const FileStoreOptions& options,
                                                   std::unique_ptr<detail::Folder> folder) {
    std::unique_ptr<FileStore> store(new FileStore(std::make_unique<State>()));
    State& state = *store->state_;
    state.options = options;
    state.folder = std::move(folder);
    state.records = store->records_.get();
    state.plan.emplace(&state.records->index, options.max_bytes, options.retention_s,
                       &state.records->serial);
    state.time.boot = state.folder->boot();
    state.time.begin_ns = state.folder->clock_ns();
    if (auto loaded = state.load(); !loaded) return loaded.error();
    state.time.begin();
    state.ready = true;
    state.take_reserve();
    state.look_for_room();
    if (!options.own_thread) return store;
    const auto run = [](void* self) { static_cast<State*>(self)->run(); };
    auto thread = detail::Thread::start(run, &state, "valar store");
    if (!thread) return thread.error();
    state.thread = std::move(*thread);
    return store;
}

void FileStore::change(detail::StoreChange change) {
    bool first = false;
    {
        const std::lock_guard<std::mutex> lock(state_->queue_mutex);
        first = state_->queue.empty();
        state_->queue.push_back(std::move(change));
    }
    if (first) state_->queue_filled.notify_one();
}

int64_t FileStore::retention_ms() const {
    return detail::store_retention_ms(state_->options.retention_s);
}
bool FileStore::step() { return state_->step(); }
int64_t FileStore::now_ms() const { return state_->now_ms(); }

uint64_t FileStore::free_bytes() const { return state_->free_bytes; }
std::optional<Error> FileStore::failure() const {
    const std::lock_guard<std::mutex> lock(state_->failure_mutex);
    return state_->failure;
}

uint64_t FileStore::disk_bytes() const {
    const std::lock_guard<std::mutex> lock(records_->mutex);
    uint64_t bytes = 0;
    for (const auto& segment : state_->segments) bytes += segment->bytes;
    return bytes;
}

std::optional<StoredResponse> FileStore::find(std::string_view organisation,
                                              const std::string& id) {
    std::optional<StoredResponse> found;
    detail::JournalPlace places[2];
    std::shared_ptr<detail::JournalSegment> segments[2];  // stay readable when compacted away
    {
        const std::lock_guard<std::mutex> lock(records_->mutex);
        const detail::StoreEntry* entry = std::as_const(records_->index).find(id);
        if (!entry || entry->erased || entry->record.organisation != organisation)
            return std::nullopt;
        found = entry->record;
        places[0] = entry->added;
        places[1] = entry->ended;
        for (int i = 0; i < 2; ++i) segments[i] = state_->find_segment(places[i].segment);
    }
    for (int i = 0; i < 2; ++i) {
        if (!segments[i]) continue;
        auto bytes = state_->read_record(*segments[i], places[i]);
        if (!bytes) {
            state_->options.log(LogLevel::error, bytes.error().message);
            return std::nullopt;
        }
        StoredResponse read;
        int64_t died_ms = 0;
        bool good = false;
        const detail::JournalDecoder payload{
            std::string_view(*bytes).substr(detail::journal_record_head)};
        const uint16_t type = i == 0 ? detail::journal_add : detail::journal_finish;
        detail::journal_fields(payload, type, read, died_ms, &good);
        if (i == 0) found->head = read.head, found->request = read.request;
        else found->object = read.object;
    }
    return found;
}

}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_STORE
