#include "prologue.hpp"

#include "base/internal.hpp"
#include "base/system.hpp"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

#if defined(_WIN32)
std::wstring utf16_from(std::string_view text) {
    const int count = MultiByteToWideChar(CP_UTF8, 0, text.data(), int(text.size()), nullptr, 0);
    std::wstring wide(size_t(count > 0 ? count : 0), L'\0');
    MultiByteToWideChar(CP_UTF8, 0, text.data(), int(text.size()), wide.data(), count);
    return wide;
}
#endif

// ---- Memory and files ------------------------------------------------------------------------

namespace {

constexpr size_t buffer_alignment = 64;
constexpr size_t buffer_from_system = size_t(1) << 20;  // from here on pages, not the heap
constexpr size_t transfer_bytes = size_t(1) << 30;      // of one call: systems take less than 2 GiB
constexpr uint64_t at_position = UINT64_MAX;            // an offset: where the file stands

// A path for the system: text that a NUL would cut short is refused.
Result<void> check_path(const std::string& path) {
    if (!path.empty() && path.find('\0') == std::string::npos) return {};
    return make_error(ErrorKind::invalid_request,
                      path.empty() ? "a path is empty" : "a path contains a NUL byte");
}

#if defined(_WIN32)

void* map_pages(size_t size, bool) {
    return VirtualAlloc(nullptr, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}

void unmap_pages(void* data, size_t) { VirtualFree(data, 0, MEM_RELEASE); }

using SystemHandle = HANDLE;
const SystemHandle no_handle = INVALID_HANDLE_VALUE;

bool is_open(SystemHandle file) { return file != no_handle && file != nullptr; }
void close_handle(SystemHandle file) { CloseHandle(file); }

SystemHandle open_to_read(const std::string& path) {
    return CreateFileW(utf16_from(path).c_str(), GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE,
                       nullptr, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr);
}

bool is_regular(SystemHandle file) { return GetFileType(file) == FILE_TYPE_DISK; }
unsigned open_mode(SystemHandle) { return 0; }

OVERLAPPED place(uint64_t offset) {
    OVERLAPPED where{};
    where.Offset = DWORD(offset);
    where.OffsetHigh = DWORD(offset >> 32);
    return where;
}

// One call of the system: how many bytes it moved, 0 at the end of the file, -1 when it failed.
int64_t read_some(SystemHandle file, uint64_t offset, void* bytes, size_t size) {
    OVERLAPPED where = place(offset);
    DWORD got = 0;
    const DWORD want = DWORD(std::min(size, transfer_bytes));
    const bool placed = offset != at_position;
    return ReadFile(file, bytes, want, &got, placed ? &where : nullptr) ? int64_t(got) : -1;
}

int64_t write_some(SystemHandle file, uint64_t offset, const void* bytes, size_t size) {
    OVERLAPPED where = place(offset);
    DWORD put = 0;
    const DWORD want = DWORD(std::min(size, transfer_bytes));
    const bool placed = offset != at_position;
    return WriteFile(file, bytes, want, &put, placed ? &where : nullptr) ? int64_t(put) : -1;
}

#else

#if defined(__wasi__)  // there mmap only reads and allocates: nothing to advise
int madvise(void*, size_t, int) { return 0; }
#endif

void* map_pages(size_t size, [[maybe_unused]] bool huge) {
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (data == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)
    if (huge) madvise(data, size, MADV_HUGEPAGE);  // a wish: failing is fine
#endif
    return data;
}

void unmap_pages(void* data, size_t size) { munmap(data, size); }

using SystemHandle = int;
constexpr SystemHandle no_handle = -1;

bool is_open(SystemHandle file) { return file >= 0; }
void close_handle(SystemHandle file) { ::close(file); }

// By the name that ends at no 2 GiB: where off_t has 32 bits the plain calls refuse such files.
#if !defined(__LP64__) && (defined(__GLIBC__) || defined(__ANDROID__))
using FileStatus = struct stat64;
constexpr int large_file = O_LARGEFILE;
int status_of(int file, FileStatus* status) { return fstat64(file, status); }
ssize_t read_from(int file, void* bytes, size_t size, uint64_t offset) {
    return pread64(file, bytes, size, off64_t(offset));
}
ssize_t write_to(int file, const void* bytes, size_t size, uint64_t offset) {
    return pwrite64(file, bytes, size, off64_t(offset));
}
int set_size(int file, uint64_t size) { return ftruncate64(file, off64_t(size)); }
#else
using FileStatus = struct stat;
constexpr int large_file = 0;
int status_of(int file, FileStatus* status) { return fstat(file, status); }
ssize_t read_from(int file, void* bytes, size_t size, uint64_t offset) {
    return pread(file, bytes, size, off_t(offset));
}
ssize_t write_to(int file, const void* bytes, size_t size, uint64_t offset) {
    return pwrite(file, bytes, size, off_t(offset));
}
int set_size(int file, uint64_t size) { return ftruncate(file, off_t(size)); }
#endif

// A call of the system, again after a signal.
template <class Call>
auto again_after_signals(Call call) {
    auto result = call();
    while (result < 0 && errno == EINTR) result = call();
    return result;
}

SystemHandle open_path(const std::string& path, int flags, mode_t mode = 0) {
    return own_descriptor(again_after_signals(
        [&] { return ::open(path.c_str(), flags | large_file | O_CLOEXEC, mode); }));
}

// Not waiting: a FIFO would keep us until somebody writes to it. Regular files take no notice.
SystemHandle open_to_read(const std::string& path) {
    return open_path(path, O_RDONLY | O_NONBLOCK);
}

bool is_regular(SystemHandle file) {
    FileStatus status{};
    return status_of(file, &status) == 0 && S_ISREG(status.st_mode);
}

// What others than the owner may do that they should not with a secret.
unsigned open_mode(SystemHandle file) {
    FileStatus status{};
    if (status_of(file, &status) != 0) return 0;
    return (status.st_mode & (S_IWGRP | S_IROTH | S_IWOTH)) ? status.st_mode & 0777u : 0;
}

// How many bytes one call moved, 0 at the end of the file, -1 when it failed.
int64_t read_some(SystemHandle file, uint64_t offset, void* bytes, size_t size) {
    const size_t want = std::min(size, transfer_bytes);
    return again_after_signals([&] {
        return offset == at_position ? ::read(file, bytes, want)
                                     : read_from(file, bytes, want, offset);
    });
}

int64_t write_some(SystemHandle file, uint64_t offset, const void* bytes, size_t size) {
    const size_t want = std::min(size, transfer_bytes);
    return again_after_signals([&] {
        return offset == at_position ? ::write(file, bytes, want)
                                     : write_to(file, bytes, want, offset);
    });
}

bool sync_all(SystemHandle file) {
    return again_after_signals([&] { return fsync(file); }) == 0;
}

#endif

struct FileHandle {  // closes itself
    FileHandle(SystemHandle opened = no_handle) : handle(opened) {}
    FileHandle(FileHandle&& other) noexcept : handle(std::exchange(other.handle, no_handle)) {}
    ~FileHandle() {
        if (ok()) close_handle(handle);
    }
    bool ok() const { return is_open(handle); }
    SystemHandle handle;
};

/// A file that holds its bytes: no folder, pipe, socket or device.
Result<FileHandle> open_regular(const std::string& path) {
    if (auto checked = check_path(path); !checked) return checked.error();
    FileHandle file = open_to_read(path);
    if (!file.ok()) return os_error("cannot open '" + path + "'");
    if (is_regular(file.handle)) return file;
    return make_error(ErrorKind::io, "cannot read '" + path + "': not a regular file");
}

// All of the bytes, from `offset` on or where the file stands.
bool write_all(SystemHandle file, uint64_t offset, const char* bytes, size_t size) {
    for (size_t done = 0; done < size;) {
        const uint64_t at = offset == at_position ? offset : offset + done;
        const int64_t put = write_some(file, at, bytes + done, size - done);
        if (put < 0) return false;
        done += size_t(put);
    }
    return true;
}
}  // namespace

Result<Buffer> Buffer::allocate(uint64_t bytes, const char* what, bool huge_pages,
                                const Allocator& allocator) {
    Buffer buffer;
    if (bytes == 0) return buffer;
    if (bytes <= SIZE_MAX / 2) {
        const size_t size = size_t(bytes);
        if (allocator.allocate) {
            buffer.allocator_ = allocator;
            void* p = allocator.allocate(allocator.context, bytes, buffer_alignment);
            if (p != nullptr) buffer.data_ = static_cast<std::byte*>(std::memset(p, 0, size));
        } else if (size >= buffer_from_system) {
            buffer.data_ = static_cast<std::byte*>(map_pages(size, huge_pages));
        } else {
            void* p = ::operator new(size, std::align_val_t(buffer_alignment), std::nothrow);
            if (p != nullptr) buffer.data_ = static_cast<std::byte*>(std::memset(p, 0, size));
        }
    }
    if (buffer.data_ == nullptr)
        return make_error(ErrorKind::out_of_memory,
                          format("out of memory: %llu bytes for %s",
                                 static_cast<unsigned long long>(bytes), what));
    buffer.size_ = size_t(bytes);
    return buffer;
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, size_t(0))),
      allocator_(other.allocator_) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(allocator_, other.allocator_);
    return *this;
}

Buffer::~Buffer() {
    if (data_ == nullptr) return;
    if (allocator_.allocate) {
        if (allocator_.release) allocator_.release(allocator_.context, data_, size_);
    } else if (size_ >= buffer_from_system) unmap_pages(data_, size_);
    else ::operator delete(data_, std::align_val_t(buffer_alignment));
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, size_t(0))) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

namespace {
Error file_too_large(const std::string& path, uint64_t size) {
    return make_error(
        ErrorKind::unsupported,
        format("'%s' has %llu bytes: more than a process of %u bits can map", path.c_str(),
               static_cast<unsigned long long>(size), static_cast<unsigned>(sizeof(void*) * 8)));
}
}  // namespace

#if defined(_WIN32)

Result<MappedFile> MappedFile::open(const std::string& path) {
    auto file = open_regular(path);
    if (!file) return file.error();
    LARGE_INTEGER size{};
    if (!GetFileSizeEx(file->handle, &size)) return os_error("cannot open '" + path + "'");
    MappedFile mapped;
    if (size.QuadPart == 0) return mapped;
    const uint64_t bytes = uint64_t(size.QuadPart);
    if (bytes > SIZE_MAX / 2) return file_too_large(path, bytes);
    FileHandle section{CreateFileMappingW(file->handle, nullptr, PAGE_READONLY, 0, 0, nullptr)};
    const void* data = nullptr;
    if (section.ok()) data = MapViewOfFile(section.handle, FILE_MAP_READ, 0, 0, 0);
    if (data == nullptr) return os_error("cannot map '" + path + "'");
    mapped.data_ = static_cast<const std::byte*>(data);
    mapped.size_ = size_t(bytes);
    return mapped;
}

MappedFile::~MappedFile() {
    if (data_) UnmapViewOfFile(data_);
}

void MappedFile::release(size_t offset, size_t length) const {
    // Unlocking pages that are not locked fails, and takes them out of the working set.
    if (offset <= size_ && length <= size_ - offset && length > 0)
        VirtualUnlock(const_cast<std::byte*>(data_) + offset, length);
}

#else

Result<MappedFile> MappedFile::open(const std::string& path) {
    auto file = open_regular(path);
    if (!file) return file.error();
    FileStatus status{};
    if (status_of(file->handle, &status) != 0) return os_error("cannot open '" + path + "'");
    MappedFile mapped;
    const uint64_t size = uint64_t(status.st_size);
    if (size == 0) return mapped;
    if (size > SIZE_MAX / 2) return file_too_large(path, size);
    void* data = mmap(nullptr, size_t(size), PROT_READ, MAP_SHARED, file->handle, 0);
    if (data == MAP_FAILED) return os_error("cannot map '" + path + "'");
    mapped.data_ = static_cast<const std::byte*>(data);
    mapped.size_ = size_t(size);
    return mapped;
}

MappedFile::~MappedFile() {
    if (data_) munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::release(size_t offset, size_t length) const {
    if (offset > size_ || length > size_ - offset) return;
    // Neighbours go too, and come back when they are read: a page may be as large as this.
    constexpr size_t largest_page = size_t{2} << 20;
    const size_t begin = offset / largest_page * largest_page;
    const size_t end = (offset + length + largest_page - 1) / largest_page * largest_page;
    madvise(const_cast<std::byte*>(data_) + begin, std::min(end, size_) - begin, MADV_DONTNEED);
}

#endif

Result<std::string> read_file(const std::string& path, uint64_t limit, bool is_private) {
    const auto file = open_regular(path);
    if (!file) return file.error();
    if (const unsigned mode = is_private ? open_mode(file->handle) : 0)
        return make_error(
            ErrorKind::permission,
            format("'%s' has the mode %04o: others may read or write it (chmod 600, or "
                   "640 for its group to read it)",
                   path.c_str(), mode));
    std::string text;
    char piece[16384];
    for (;;) {
        const int64_t got = read_some(file->handle, at_position, piece, sizeof piece);
        if (got < 0) return os_error("cannot read '" + path + "'");
        if (got == 0) return text;
        if (uint64_t(got) > limit - text.size())
            return make_error(ErrorKind::too_large,
                              format("'%s' has more than %llu bytes", path.c_str(),
                                     static_cast<unsigned long long>(limit)));
        text.append(piece, size_t(got));
    }
}

namespace {

#if defined(_WIN32)

intptr_t create_file(const std::string& path) {
    return reinterpret_cast<intptr_t>(CreateFileW(utf16_from(path).c_str(), GENERIC_WRITE, 0,
                                                  nullptr, CREATE_NEW, FILE_ATTRIBUTE_NORMAL,
                                                  nullptr));
}

SystemHandle system_handle(intptr_t file) { return reinterpret_cast<HANDLE>(file); }
bool sync_file(intptr_t file) { return FlushFileBuffers(system_handle(file)) != 0; }

bool replace_file(const std::string& from, const std::string& to) {
    return MoveFileExW(utf16_from(from).c_str(), utf16_from(to).c_str(),
                       MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH) != 0;
}

void remove_file(const std::string& path) {
    const DWORD cause = GetLastError();
    DeleteFileW(utf16_from(path).c_str());
    SetLastError(cause);
}

#else

intptr_t create_file(const std::string& path) {
    return open_path(path, O_WRONLY | O_CREAT | O_EXCL, 0666);
}

SystemHandle system_handle(intptr_t file) { return static_cast<int>(file); }
bool sync_file(intptr_t file) { return sync_all(system_handle(file)); }

bool replace_file(const std::string& from, const std::string& to) {
    if (rename(from.c_str(), to.c_str()) != 0) return false;
    const size_t slash = to.rfind('/');  // the new name is safe once its folder is
    const std::string folder = slash == std::string::npos ? "." : to.substr(0, slash + 1);
    const FileHandle opened = open_to_read(folder);
    if (opened.ok()) sync_all(opened.handle);
    return true;
}

void remove_file(const std::string& path) {
    const int cause = errno;
    unlink(path.c_str());
    errno = cause;
}

#endif
}  // namespace

Result<NewFile> NewFile::create(const std::string& path) {
    if (auto checked = check_path(path); !checked) return checked.error();
    NewFile file;
    file.path_ = path;
    // Two writers at once differ in the address of their stack, one after another in the time.
    const uint64_t unique = monotonic_ns() ^ uint64_t(reinterpret_cast<uintptr_t>(&path)) << 20;
    const std::string name = path + format(".%llx.tmp", static_cast<unsigned long long>(unique));
    file.handle_ = create_file(name);
    if (file.handle_ == -1) return os_error("cannot write '" + path + "'");
    file.temporary_ = name;
    return file;
}

NewFile::NewFile(NewFile&& other) noexcept
    : path_(std::move(other.path_)),
      temporary_(std::exchange(other.temporary_, {})),
      handle_(std::exchange(other.handle_, -1)) {}

NewFile::~NewFile() {
    if (handle_ != -1) close_handle(system_handle(handle_));
    if (!temporary_.empty()) remove_file(temporary_);
}

Result<void> NewFile::append(std::span<const std::byte> bytes) {
    const char* text = reinterpret_cast<const char*>(bytes.data());
    if (write_all(system_handle(handle_), at_position, text, bytes.size())) return {};
    return os_error("cannot write '" + path_ + "'");
}

Result<void> NewFile::commit() {
    if (!sync_file(handle_)) return os_error("cannot write '" + path_ + "'");
    close_handle(
        system_handle(std::exchange(handle_, -1)));  // Windows renames no file that is open
    if (!replace_file(temporary_, path_)) return os_error("cannot write '" + path_ + "'");
    temporary_.clear();
    return {};
}

Result<void> write_file(const std::string& path, std::span<const std::byte> bytes) {
    auto file = NewFile::create(path);
    if (!file) return file.error();
    if (auto written = file->append(bytes); !written) return written;
    return file->commit();
}

// ---- Folders ---------------------------------------------------------------------------------

namespace {

#if defined(_WIN32)

HANDLE open_handle(const std::string& path, DWORD share, DWORD disposition) {
    return CreateFileW(utf16_from(path).c_str(), GENERIC_READ | GENERIC_WRITE, share, nullptr,
                       disposition, FILE_ATTRIBUTE_NORMAL, nullptr);
}

bool file_size(SystemHandle file, uint64_t* size) {
    LARGE_INTEGER got{};
    if (!GetFileSizeEx(file, &got)) return false;
    *size = uint64_t(got.QuadPart);
    return true;
}

bool truncate_file(SystemHandle file, uint64_t size) {
    LARGE_INTEGER end{};
    end.QuadPart = LONGLONG(size);
    return SetFilePointerEx(file, end, nullptr, FILE_BEGIN) && SetEndOfFile(file);
}

bool allocate_file(SystemHandle file, uint64_t size) { return truncate_file(file, size); }

uint64_t free_on_disk(const std::string& path) {
    ULARGE_INTEGER free{};
    return GetDiskFreeSpaceExW(utf16_from(path).c_str(), &free, nullptr, nullptr) ? free.QuadPart
                                                                                  : UINT64_MAX;
}

bool sync_data(SystemHandle file) { return FlushFileBuffers(file) != 0; }

using SystemCode = DWORD;
SystemCode system_code() { return GetLastError(); }

bool make_folder(const std::string& path) {
    return CreateDirectoryW(utf16_from(path).c_str(), nullptr) != 0 ||
           GetLastError() == ERROR_ALREADY_EXISTS;
}

void lock_file(const std::string& path, FileHandle* file) {
    file->handle = open_handle(path, 0, OPEN_ALWAYS);  // shared with nobody
}

FileHandle open_in_folder(const std::string& path, bool create) {
    return open_handle(path, FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE,
                       create ? CREATE_ALWAYS : OPEN_EXISTING);
}

bool unlink_path(const std::string& path) { return DeleteFileW(utf16_from(path).c_str()) != 0; }

bool open_folder(const std::string&, FileHandle*) { return true; }
bool sync_folder(const FileHandle&) { return true; }  // NTFS keeps a log of its names

bool rename_path(const std::string& from, const std::string& to) { return replace_file(from, to); }

Result<std::vector<std::string>> list_names(const std::string& path) {
    std::vector<std::string> names;
    WIN32_FIND_DATAW entry;
    const HANDLE search = FindFirstFileW(utf16_from(path + "/*").c_str(), &entry);
    if (search == INVALID_HANDLE_VALUE) return os_error("cannot list '" + path + "'");
    do {
        char name[MAX_PATH * 3 + 1] = "";
        WideCharToMultiByte(CP_UTF8, 0, entry.cFileName, -1, name, sizeof name, nullptr, nullptr);
        names.emplace_back(name);
    } while (FindNextFileW(search, &entry));
    FindClose(search);
    return names;
}

#else

bool file_size(SystemHandle file, uint64_t* size) {
    FileStatus status{};
    if (status_of(file, &status) != 0) return false;
    *size = uint64_t(status.st_size);
    return true;
}

bool truncate_file(SystemHandle file, uint64_t size) { return set_size(file, size) == 0; }

bool allocate_file(SystemHandle file, uint64_t size) {
    const off_t bytes = static_cast<off_t>(std::min<uint64_t>(size, INT32_MAX));
#if defined(__APPLE__)
    fstore_t wanted = {F_ALLOCATEALL, F_PEOFPOSMODE, 0, bytes, 0};
    return fcntl(file, F_PREALLOCATE, &wanted) != -1 && truncate_file(file, size);
#elif defined(__linux__) || defined(__FreeBSD__)
    const int error = posix_fallocate(file, 0, bytes);
    errno = error;
    return error == 0 || error == EINVAL || error == EOPNOTSUPP;  // where nothing can be taken
#else
    return truncate_file(file, size);
#endif
}

uint64_t free_on_disk(const std::string& path) {
    struct statvfs found = {};
    if (statvfs(path.c_str(), &found) != 0) return UINT64_MAX;
    return uint64_t(found.f_bavail) * uint64_t(found.f_frsize);
}

bool sync_data(SystemHandle file) {
#if defined(__APPLE__)
    // fsync leaves it in the drive's cache
    return again_after_signals([&] { return fcntl(file, F_FULLFSYNC); }) != -1;
#else
    return again_after_signals([&] { return fdatasync(file); }) == 0;
#endif
}

using SystemCode = int;
SystemCode system_code() { return errno; }

bool make_folder(const std::string& path) {
    return mkdir(path.c_str(), 0700) == 0 || errno == EEXIST;
}

void lock_file(const std::string& path, FileHandle* file) {
    file->handle = open_path(path, O_RDWR | O_CREAT, 0600);
    if (file->ok() && flock(file->handle, LOCK_EX | LOCK_NB) == 0) return;
    const int cause = errno;
    if (file->ok()) close_handle(std::exchange(file->handle, no_handle));
    errno = cause;
}

FileHandle open_in_folder(const std::string& path, bool create) {
    return open_path(path, O_RDWR | (create ? O_CREAT | O_TRUNC : 0), 0600);
}

bool unlink_path(const std::string& path) { return unlink(path.c_str()) == 0; }

bool open_folder(const std::string& path, FileHandle* folder) {
    folder->handle = open_to_read(path);
    return folder->ok();
}
bool sync_folder(const FileHandle& folder) { return sync_all(folder.handle); }

bool rename_path(const std::string& from, const std::string& to) {
    return ::rename(from.c_str(), to.c_str()) == 0;
}

Result<std::vector<std::string>> list_names(const std::string& path) {
    std::vector<std::string> names;
    const SystemHandle opened = open_to_read(path);
    DIR* folder = is_open(opened) ? fdopendir(opened) : nullptr;
    if (!folder) {
        const Error error = os_error("cannot list '" + path + "'");
        if (is_open(opened)) close_handle(opened);
        return error;
    }
    while (const dirent* entry = readdir(folder)) names.emplace_back(entry->d_name);
    closedir(folder);
    return names;
}

#endif

Result<void> system_result(bool done, const std::string& what, const std::string& path) {
    if (done) return {};
    return os_error("cannot " + what + " '" + path + "'");
}

class SystemFile : public FolderFile {
public:
    SystemFile(std::string path, FileHandle file)
        : path_(std::move(path)), file_(std::move(file)) {}
    Result<uint64_t> size() override {
        uint64_t size = 0;
        if (!file_size(file_.handle, &size)) return os_error("cannot measure '" + path_ + "'");
        return size;
    }
    Result<void> read_at(uint64_t offset, void* bytes, size_t size) override {
        for (char* at = static_cast<char*>(bytes); size > 0;) {
            const int64_t got = read_some(file_.handle, offset, at, size);
            if (got < 0) return os_error("cannot read '" + path_ + "'");
            if (got == 0) return make_error(ErrorKind::io, "'" + path_ + "' ends too early");
            at += got;
            offset += uint64_t(got);
            size -= size_t(got);
        }
        return {};
    }
    Result<void> write_at(uint64_t offset, std::string_view bytes) override {
        return system_result(write_all(file_.handle, offset, bytes.data(), bytes.size()), "write",
                             path_);
    }
    Result<void> truncate(uint64_t size) override {
        return system_result(truncate_file(file_.handle, size), "truncate", path_);
    }
    Result<void> sync() override { return system_result(sync_data(file_.handle), "sync", path_); }
    Result<void> allocate(uint64_t size) override {
        return system_result(allocate_file(file_.handle, size), "allocate", path_);
    }

private:
    std::string path_;
    FileHandle file_;
};

/// Whether what lies there is another user's.
bool is_foreign(const std::string& path) {
#if defined(_WIN32)
    (void)path;
    return false;
#else
    struct stat status {};
    return stat(path.c_str(), &status) == 0 && status.st_uid != geteuid();
#endif
}

/// Why a folder cannot be made, or not locked, where the system's own words say too little.
struct FolderFault {
    SystemCode code;
    const char* making;
    const char* locking;
};
constexpr const char* folder_in_use = "is in use by another process";
constexpr const char* folder_forbidden = "may not be written by this user: its permissions";
constexpr const char* folder_foreign =
    "belongs to another user, or a file in it does: this one may not write it";
constexpr const char* folder_read_only = "lies on a read-only file system";
constexpr const char* folder_orphan = "cannot be made: the directory that is to hold it is missing";
constexpr const char* folder_is_none = "is not a directory";
constexpr const char* folder_lockless = "lies on a file system that cannot lock files";
constexpr const char* folder_full = "cannot be written: the disk is full";
constexpr FolderFault folder_faults[] = {
#if defined(_WIN32)
    {ERROR_SHARING_VIOLATION, folder_in_use, folder_in_use},
    {ERROR_ACCESS_DENIED, folder_forbidden, folder_forbidden},
    {ERROR_WRITE_PROTECT, folder_read_only, folder_read_only},
    {ERROR_PATH_NOT_FOUND, folder_orphan, folder_is_none},
    {ERROR_FILE_NOT_FOUND, folder_orphan, folder_is_none},
    {ERROR_DIRECTORY, folder_is_none, folder_is_none},
    {ERROR_DISK_FULL, folder_full, folder_full},
#else
    {EWOULDBLOCK, folder_in_use, folder_in_use},
    {EACCES, folder_forbidden, folder_forbidden},
    {EPERM, folder_forbidden, folder_forbidden},
    {EROFS, folder_read_only, folder_read_only},
    {ENOENT, folder_orphan, folder_is_none},
    {ENOTDIR, "cannot be made: a part of its path is not a directory", folder_is_none},
    {ENOLCK, folder_lockless, folder_lockless},
    {EOPNOTSUPP, folder_lockless, folder_lockless},
    {ENOSPC, folder_full, folder_full},
    {EDQUOT, folder_full, folder_full},
#endif
};

Error folder_error(const std::string& path, bool made) {
    const SystemCode code = system_code();
    Error error = os_error("cannot use the directory '" + path + "'");
    for (const FolderFault& fault : folder_faults)
        if (fault.code == code) {
            const char* why = made ? fault.locking : fault.making;
            const bool foreign = made && why == folder_forbidden &&
                                 (is_foreign(path) || is_foreign(path + "/lock"));
            error.message = "'" + path + "' " + (foreign ? folder_foreign : why);
        }
    if (error.kind == ErrorKind::not_found) error.kind = ErrorKind::io;
    return error;
}

class SystemFolder : public Folder {
public:
    SystemFolder(const std::string& path) : path_(path) {}
    Result<void> lock() {
        if (open_folder(path_, &self_)) lock_file(path_ + "/lock", &lock_);
        if (lock_.ok()) return {};
        return folder_error(path_, true);
    }
    Result<void> look() {
        if (open_folder(path_, &self_)) return {};
        return folder_error(path_, true);
    }
    Result<std::vector<std::string>> list() override { return list_names(path_); }
    Result<std::unique_ptr<FolderFile>> open_file(const std::string& name, bool create) override {
        const std::string path = path_ + "/" + name;
        FileHandle file = open_in_folder(path, create);
        if (!file.ok()) return os_error("cannot open '" + path + "'");
        return std::unique_ptr<FolderFile>(std::make_unique<SystemFile>(path, std::move(file)));
    }
    Result<void> rename(const std::string& from, const std::string& to) override {
        return system_result(rename_path(path_ + "/" + from, path_ + "/" + to), "rename",
                             path_ + "/" + from);
    }
    Result<void> remove(const std::string& name) override {
        return system_result(unlink_path(path_ + "/" + name), "remove", path_ + "/" + name);
    }
    Result<void> sync() override { return system_result(sync_folder(self_), "sync", path_); }
    uint64_t free_bytes() const override { return free_on_disk(path_); }

private:
    std::string path_;
    FileHandle self_, lock_;  // held: a sync that fails, for want of a descriptor too, is final
};

}  // namespace

uint64_t Folder::clock_ns() const { return monotonic_ns(); }
std::string Folder::boot() const { return boot_id(); }

Result<std::unique_ptr<Folder>> Folder::open(const std::string& path) {
    if (auto checked = check_path(path); !checked) return checked.error();
    if (!make_folder(path)) return folder_error(path, false);
    auto folder = std::make_unique<SystemFolder>(path);
    if (auto locked = folder->lock(); !locked) return locked.error();
    return std::unique_ptr<Folder>(std::move(folder));
}

Result<std::unique_ptr<Folder>> Folder::open_beside(const std::string& path) {
    if (auto checked = check_path(path); !checked) return checked.error();
    auto folder = std::make_unique<SystemFolder>(path);
    if (auto found = folder->look(); !found) return found.error();
    return std::unique_ptr<Folder>(std::move(folder));
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
