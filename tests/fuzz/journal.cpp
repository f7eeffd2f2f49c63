// The journal's reader: whatever a directory holds, opening it ends in a store that works or in an
// Error, and with `recover` in one that opens again without. The first byte chooses the target file,
// whether checksums are made to match, and whether the bytes come as a file that the manifest does
// not name; the rest are the bytes behind that file's head.
#include <cstdlib>
#include <cstring>

#include "../store_disk.hpp"
#include "digest_internal.hpp"
#include "store/store.hpp"

using namespace valar;
using namespace store_disk;

namespace {

FileStoreOptions options(bool recover) {
    FileStoreOptions made;
    made.own_thread = false;
    made.recover = recover;
    made.segment_bytes = 4096;
    return made;
}

Result<std::unique_ptr<FileStore>> open_on(Disk* disk, bool recover) {
    return FileStore::open(options(recover), std::make_unique<DiskFolder>(disk));
}

/// Gives each record that follows another the checksums that its bytes ask for.
void match_checksums(std::string* bytes, size_t at, uint32_t salt) {
    while (bytes->size() - at >= 32) {
        char* head = bytes->data() + at;
        uint32_t size = 0;
        std::memcpy(&size, head + 8, sizeof size);
        if (size > bytes->size() - at - 32) return;
        const uint32_t payload = detail::crc32c(head + 32, size, salt);
        std::memcpy(head + 24, &payload, sizeof payload);
        const uint32_t own = detail::crc32c(head, 28, salt);
        std::memcpy(head + 28, &own, sizeof own);
        at += 32 + size;
    }
}

void use(FileStore& store) {
    for (const StoredResponse& open : store.unfinished())
        (void)store.find(open.organisation, open.id);
    if (auto ids = store.list("a", "", 100))
        for (const std::string& id : *ids) {
            (void)store.find("a", id);
            store.finish(id, std::make_shared<const std::string>("next"), 1, {});
            store.erase("a", id, true, 1, {});
        }
    store.expire(int64_t{1} << 50);
    for (int i = 0; i < 100 && store.step(); ++i) {}
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    Disk disk;
    if (!open_on(&disk, false)) std::abort();
    const bool manifest = data[0] & 1;
    Disk::File& file = *disk.names[manifest ? "manifest" : "00000001.journal"];
    std::string& bytes = file.now;
    bytes.resize(manifest ? 8 : 32);
    bytes.append(reinterpret_cast<const char*>(data + 1), size - 1);
    if (!manifest && (data[0] & 2)) {
        uint32_t salt = 0;
        std::memcpy(&salt, bytes.data() + 12, sizeof salt);
        match_checksums(&bytes, 32, salt);
    } else if (manifest && (data[0] & 2) && bytes.size() >= 4) {
        const uint32_t own = detail::crc32c(bytes.data(), bytes.size() - 4);
        std::memcpy(bytes.data() + bytes.size() - 4, &own, sizeof own);
    }
    if (!manifest && (data[0] & 4)) {
        const char* names[] = {"00000001.copy", "00000002.journal", "00000003.copy"};
        Disk::Entry& stranger = disk.names[names[(data[0] >> 3) % 3]];
        stranger = std::make_shared<Disk::File>();
        stranger->now = stranger->synced = bytes;
        bytes = file.synced;
    }
    file.synced = bytes;
    if (auto store = open_on(&disk, false)) {
        use(**store);
        store->reset();
        if (!open_on(&disk, false)) std::abort();
    }
    if (auto store = open_on(&disk, true)) {
        use(**store);
        store->reset();
        if (!open_on(&disk, false)) std::abort();
    }
    return 0;
}
