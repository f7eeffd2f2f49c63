// >>base: sockets
// Owns: the operating systems' TCP calls and readiness, each difference in one small function.
// Assumes: a call may fail at any time; EINTR and "would block" are no failures.
// Promises: what the declarations say, the same on every system.

#include "prologue.hpp"

#include "base/sockets.hpp"
#include "base/system.hpp"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <unordered_map>
#include <utility>
#include <vector>

#ifndef VALAR_NO_SERVER
namespace valar {
inline namespace v1 {
namespace detail {

namespace {

#if defined(_WIN32)
using NetHandle = SOCKET;
using NetLength = int;
int net_errno() { return WSAGetLastError(); }
bool net_would_block(int error) { return error == WSAEWOULDBLOCK || error == WSAEINTR; }
bool net_connecting(int error) { return error == WSAEWOULDBLOCK; }
bool net_no_descriptor(int error) { return error == WSAEMFILE || error == WSAENOBUFS; }
#else
using NetHandle = int;
using NetLength = socklen_t;
int net_errno() { return errno; }
bool net_would_block(int error) {
    return error == EAGAIN || error == EWOULDBLOCK || error == EINTR;
}
bool net_connecting(int error) { return error == EINPROGRESS || error == EINTR; }
bool net_no_descriptor(int error) {
    return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}
#endif

constexpr uint8_t mapped_prefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF};

NetHandle net_native(uintptr_t handle) { return static_cast<NetHandle>(handle); }

Error net_error(const std::string& what) {
    return make_error(ErrorKind::io, what + ": " + std::system_category().message(net_errno()));
}

/// Windows wants its sockets started once per process; the count it keeps makes this harmless
/// beside a host that does the same.
bool net_start() {
#if defined(_WIN32)
    static const bool started = [] {
        WSADATA data;
        return WSAStartup(MAKEWORD(2, 2), &data) == 0;
    }();
    return started;
#else
    return true;
#endif
}

void net_close(NetHandle handle) {
#if defined(_WIN32)
    ::closesocket(handle);
#else
    ::close(handle);
#endif
}

// Not inherited by child processes from the first moment on, where the system can do that: another
// thread of the host may fork between two calls.
#if defined(_WIN32)
NetHandle net_socket(int family, int type, int protocol) {
    return ::socket(family, type, protocol);
}
NetHandle net_accept(NetHandle handle, sockaddr* name, NetLength* length) {
    return ::accept(handle, name, length);
}
#else
#if defined(SOCK_CLOEXEC)
constexpr int net_private = SOCK_CLOEXEC;
#else
constexpr int net_private = 0;  // net_prepare sees to it
#endif
NetHandle net_socket(int family, int type, int protocol) {
    return own_descriptor(::socket(family, type | net_private, protocol));
}
NetHandle net_accept(NetHandle handle, sockaddr* name, NetLength* length) {
#if defined(__linux__) || defined(__FreeBSD__) || defined(__OpenBSD__)
    return own_descriptor(::accept4(handle, name, length, net_private));
#else
    return own_descriptor(::accept(handle, name, length));
#endif
}
#endif

/// Non-blocking, not inherited by child processes, no SIGPIPE, no delay for small replies.
bool net_prepare(NetHandle handle) {
    const int on = 1;
    ::setsockopt(handle, IPPROTO_TCP, TCP_NODELAY, reinterpret_cast<const char*>(&on), sizeof on);
#if defined(_WIN32)
    u_long nonblocking = 1;
    return ::ioctlsocket(handle, static_cast<long>(FIONBIO), &nonblocking) == 0;
#else
#if defined(SO_NOSIGPIPE)
    ::setsockopt(handle, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
    const int flags = ::fcntl(handle, F_GETFL, 0);
    return flags >= 0 && ::fcntl(handle, F_SETFL, flags | O_NONBLOCK) == 0 &&
           ::fcntl(handle, F_SETFD, FD_CLOEXEC) == 0;
#endif
}

NetLength net_pack(const NetAddress& address, sockaddr_storage* storage) {
    *storage = {};
    if (address.v4) {
        auto* out = reinterpret_cast<sockaddr_in*>(storage);
        out->sin_family = AF_INET;
        out->sin_port = htons(address.port);
        std::memcpy(&out->sin_addr, address.ip + 12, 4);
        return static_cast<NetLength>(sizeof *out);
    }
    auto* out = reinterpret_cast<sockaddr_in6*>(storage);
    out->sin6_family = AF_INET6;
    out->sin6_port = htons(address.port);
    std::memcpy(&out->sin6_addr, address.ip, 16);
    return static_cast<NetLength>(sizeof *out);
}

NetAddress net_unpack(const sockaddr_storage& storage) {
    NetAddress address;
    address.local = storage.ss_family == AF_UNIX;
    if (address.local) return address;
    if (storage.ss_family == AF_INET) {
        const auto& in = reinterpret_cast<const sockaddr_in&>(storage);
        address.v4 = true;
        address.port = ntohs(in.sin_port);
        std::memcpy(address.ip, mapped_prefix, 12);
        std::memcpy(address.ip + 12, &in.sin_addr, 4);
    } else {
        const auto& in = reinterpret_cast<const sockaddr_in6&>(storage);
        address.port = ntohs(in.sin6_port);
        std::memcpy(address.ip, &in.sin6_addr, 16);
    }
    return address;
}

Result<uintptr_t> net_new_socket(int family) {
    if (!net_start()) return net_error("cannot start the system's sockets");
    const NetHandle handle = net_socket(family, SOCK_STREAM, 0);
    const auto value = static_cast<uintptr_t>(handle);
    if (value == Socket::none) return net_error("cannot make a socket");
    if (net_prepare(handle)) return value;
    Error error = net_error("cannot prepare a socket");
    net_close(handle);
    return error;
}

}  // namespace

Result<NetAddress> NetAddress::parse(std::string_view host, uint16_t port) {
    if (host == "localhost") host = "127.0.0.1";
    const bool brackets = host.size() > 2 && host.front() == '[' && host.back() == ']';
    const std::string text(brackets ? host.substr(1, host.size() - 2) : host);
    NetAddress address;
    address.port = port;
    if (!brackets && ::inet_pton(AF_INET, text.c_str(), address.ip + 12) == 1) {
        address.v4 = true;
        std::memcpy(address.ip, mapped_prefix, 12);
    } else if (text.find('\0') != text.npos ||
               ::inet_pton(AF_INET6, text.c_str(), address.ip) != 1) {
        return make_error(ErrorKind::invalid_request,
                          format("'%.*s' is not an IP address or localhost",
                                 static_cast<int>(host.size()), host.data()));
    }
    return address;
}

std::optional<std::string> unix_path(std::string_view host) {
    constexpr std::string_view prefix = "unix:";
    if (!host.starts_with(prefix)) return std::nullopt;
    return std::string(host.substr(prefix.size()));
}

std::string NetAddress::host() const {
    if (local) return "unix";
    char text[INET6_ADDRSTRLEN] = {};
    const void* bytes = v4 ? ip + 12 : ip;
    ::inet_ntop(v4 ? AF_INET : AF_INET6, bytes, text, sizeof text);
    return text;
}

std::string NetAddress::text() const {
    if (local) return host();
    return format(v4 ? "%s:%u" : "[%s]:%u", host().c_str(), unsigned{port});
}

bool NetAddress::is_loopback() const {
    if (local) return true;
    if (std::memcmp(ip, mapped_prefix, 12) == 0) return ip[12] == 127;
    static constexpr uint8_t loopback[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1};
    return std::memcmp(ip, loopback, 16) == 0;
}

namespace {

/// Whether a socket can be bound to it.
bool is_own(NetAddress address) {
    address.port = 0;
    auto handle = net_new_socket(address.v4 ? AF_INET : AF_INET6);
    if (!handle) return true;  // then it is not called
    sockaddr_storage storage;
    const NetLength length = net_pack(address, &storage);
    const bool bound = ::bind(net_native(*handle), reinterpret_cast<sockaddr*>(&storage), length) ==
                       0;
    net_close(net_native(*handle));
    return bound;
}

}  // namespace

bool net_reaches(const NetAddress& address, const NetAddress& listener) {
    if (listener.port == 0 || address.port != listener.port) return false;
    if (std::memcmp(address.ip, listener.ip, sizeof address.ip) == 0) return true;
    const std::string everywhere = listener.host();
    return (everywhere == "0.0.0.0" || everywhere == "::") && is_own(address);
}

Result<std::vector<NetAddress>> net_resolve(const std::string& name, uint16_t port) {
    if (!net_start()) return net_error("cannot start the system's sockets");
    addrinfo wanted = {}, *found = nullptr;
    wanted.ai_family = AF_UNSPEC;
    wanted.ai_socktype = SOCK_STREAM;
    const int failed = ::getaddrinfo(name.c_str(), nullptr, &wanted, &found);
    std::vector<NetAddress> addresses;
    for (const addrinfo* one = failed ? nullptr : found; one; one = one->ai_next) {
        if (one->ai_family != AF_INET && one->ai_family != AF_INET6) continue;
        sockaddr_storage storage = {};
        std::memcpy(&storage, one->ai_addr, std::min<size_t>(one->ai_addrlen, sizeof storage));
        addresses.push_back(net_unpack(storage));
        addresses.back().port = port;
    }
    if (!failed) ::freeaddrinfo(found);
    if (addresses.empty()) return make_error(ErrorKind::io, "cannot resolve '" + name + "'");
    return addresses;
}

Socket& Socket::operator=(Socket&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
}

void Socket::close() {
    if (is_open()) net_close(net_native(std::exchange(handle_, none)));
}

Result<Socket> Socket::listen(const NetAddress& address, int backlog) {
    auto handle = net_new_socket(address.v4 ? AF_INET : AF_INET6);
    if (!handle) return handle.error();
    Socket socket(*handle);
    const NetHandle native = net_native(*handle);
    const int on = 1, off = 0;
#if defined(_WIN32)
    // There, SO_REUSEADDR would let another process take the port over.
    ::setsockopt(native, SOL_SOCKET, SO_EXCLUSIVEADDRUSE, reinterpret_cast<const char*>(&on),
                 sizeof on);
#else
    ::setsockopt(native, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
#endif
    if (!address.v4)
        ::setsockopt(native, IPPROTO_IPV6, IPV6_V6ONLY, reinterpret_cast<const char*>(&off),
                     sizeof off);
    sockaddr_storage storage;
    const NetLength length = net_pack(address, &storage);
    if (::bind(native, reinterpret_cast<sockaddr*>(&storage), length) != 0 ||
        ::listen(native, backlog) != 0)
        return net_error("cannot listen on " + address.text());
    return socket;
}

#if defined(_WIN32)
uint64_t socket_file(const std::string&) { return 0; }
void remove_socket_file(const std::string&, uint64_t) {}

Result<Socket> Socket::listen_unix(const std::string&, int) {
    return make_error(ErrorKind::unsupported, "no Unix sockets on this system");
}
Result<Socket> Socket::connect_unix(const std::string& path) { return listen_unix(path, 0); }
#else
uint64_t socket_file(const std::string& path) {
    struct stat found;
    if (::lstat(path.c_str(), &found) != 0 || !S_ISSOCK(found.st_mode)) return 0;
    const uint64_t file = static_cast<uint64_t>(found.st_ino) ^ static_cast<uint64_t>(found.st_dev)
                                                                    << 40;
    return file ? file : 1;
}

void remove_socket_file(const std::string& path, uint64_t file) {
    if (file != 0 && socket_file(path) == file) ::unlink(path.c_str());
}

namespace {

Result<sockaddr_un> net_unix_name(const std::string& path) {
    sockaddr_un name = {};
    if (path.empty() || path.size() >= sizeof name.sun_path || path.find('\0') != path.npos)
        return make_error(ErrorKind::invalid_request,
                          format("the path of a Unix socket has 1 to %zu bytes, not %zu",
                                 sizeof name.sun_path - 1, path.size()));
    name.sun_family = AF_UNIX;
    std::memcpy(name.sun_path, path.data(), path.size());
    return name;
}

/// Calls ::bind or ::connect; 0, or what went wrong.
template <class Call>
int net_with_name(Call call, const Socket& socket, const sockaddr_un& name) {
    const int rc = call(net_native(socket.handle()), reinterpret_cast<const sockaddr*>(&name),
                        sizeof name);
    return rc == 0 ? 0 : errno;
}

}  // namespace

Result<Socket> Socket::open_unix() {
    auto handle = net_new_socket(AF_UNIX);
    if (!handle) return handle.error();
    return Socket(*handle);
}

Result<Socket> Socket::listen_unix(const std::string& path, int backlog) {
    const auto name = net_unix_name(path);
    auto socket = name ? open_unix() : name.error();
    if (!socket) return socket;
    int failed = net_with_name(::bind, *socket, *name);
    // What is left over from one that is gone, and nobody listens at, is replaced.
    if (failed == EADDRINUSE && socket_file(path) != 0) {
        const auto probe = open_unix();
        if (probe && net_with_name(::connect, *probe, *name) == ECONNREFUSED &&
            ::unlink(path.c_str()) == 0)
            failed = net_with_name(::bind, *socket, *name);
    }
    const bool bound = failed == 0;
    constexpr mode_t mode = 0660;  // before anybody can connect
    if (bound &&
        (::chmod(path.c_str(), mode) != 0 || ::listen(net_native(socket->handle()), backlog) != 0))
        failed = errno;
    if (failed == 0) return socket;
    if (bound) ::unlink(path.c_str());
    errno = failed;
    return net_error("cannot listen on unix:" + path);
}

Result<Socket> Socket::connect_unix(const std::string& path) {
    const auto name = net_unix_name(path);
    auto socket = name ? open_unix() : name.error();
    if (!socket) return socket;
    const int failed = net_with_name(::connect, *socket, *name);
    if (failed == 0 || net_connecting(failed)) return socket;
    errno = failed;
    return net_error("cannot connect to unix:" + path);
}
#endif

Result<Socket> Socket::connect(const NetAddress& address) {
    auto handle = net_new_socket(address.v4 ? AF_INET : AF_INET6);
    if (!handle) return handle.error();
    Socket socket(*handle);
    sockaddr_storage storage;
    const NetLength length = net_pack(address, &storage);
    if (::connect(net_native(*handle), reinterpret_cast<sockaddr*>(&storage), length) != 0 &&
        !net_connecting(net_errno()))
        return net_error("cannot connect to " + address.text());
    return socket;
}

Result<Socket> Socket::spare() {
    auto handle = net_new_socket(AF_INET);
    if (!handle) return handle.error();
    return Socket(*handle);
}

IoStatus Socket::connected() const {
    int error = 0;
    NetLength length = sizeof error;
    const int rc = ::getsockopt(net_native(handle_), SOL_SOCKET, SO_ERROR,
                                reinterpret_cast<char*>(&error), &length);
    return rc == 0 && error == 0 ? IoStatus::done : IoStatus::failed;
}

IoStatus Socket::accept(Socket* accepted, NetAddress* peer) {
    sockaddr_storage storage = {};
    NetLength length = sizeof storage;
    const NetHandle native = net_accept(net_native(handle_), reinterpret_cast<sockaddr*>(&storage),
                                        &length);
    const auto handle = static_cast<uintptr_t>(native);
    if (handle == none) {
        const int error = net_errno();
        if (net_would_block(error)) return IoStatus::again;
        // All else (a client that left the queue, a filter) concerns one connection only.
        return net_no_descriptor(error) ? IoStatus::full : IoStatus::failed;
    }
    *accepted = Socket(handle);
    *peer = net_unpack(storage);
    return net_prepare(native) ? IoStatus::done : IoStatus::failed;
}

IoResult Socket::read(void* bytes, size_t size) {
#if defined(_WIN32)
    const int want = static_cast<int>(std::min<size_t>(size, 1 << 30));
    const auto got = ::recv(net_native(handle_), static_cast<char*>(bytes), want, 0);
#else
    const auto got = ::recv(net_native(handle_), bytes, size, 0);
#endif
    if (got > 0) return {IoStatus::done, static_cast<size_t>(got)};
    if (got < 0 && net_would_block(net_errno())) return {IoStatus::again, 0};
    return {IoStatus::closed, 0};
}

IoResult Socket::write(std::string_view head, std::string_view body) {
#if defined(_WIN32)
    const auto part = [](std::string_view bytes) {
        return WSABUF{static_cast<ULONG>(std::min<size_t>(bytes.size(), 1 << 30)),
                      const_cast<char*>(bytes.data())};
    };
    WSABUF parts[2] = {part(head), part(body)};
    DWORD sent = 0;
    const bool ok = WSASend(net_native(handle_), parts, 2, &sent, 0, nullptr, nullptr) == 0;
#else
    const auto part = [](std::string_view bytes) {
        return iovec{const_cast<char*>(bytes.data()), bytes.size()};
    };
    iovec parts[2] = {part(head), part(body)};
    msghdr message = {};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
#if defined(MSG_NOSIGNAL)
    const auto sent = ::sendmsg(net_native(handle_), &message, MSG_NOSIGNAL);
#else
    const auto sent = ::sendmsg(net_native(handle_), &message, 0);
#endif
    const bool ok = sent >= 0;
#endif
    if (ok) return {IoStatus::done, static_cast<size_t>(sent)};
    return {net_would_block(net_errno()) ? IoStatus::again : IoStatus::closed, 0};
}

void Socket::shutdown_write() {
#if defined(_WIN32)
    ::shutdown(net_native(handle_), SD_SEND);
#else
    ::shutdown(net_native(handle_), SHUT_WR);
#endif
}

Result<NetAddress> Socket::local() const {
    sockaddr_storage storage = {};
    NetLength length = sizeof storage;
    if (::getsockname(net_native(handle_), reinterpret_cast<sockaddr*>(&storage), &length) != 0)
        return net_error("cannot read a socket's address");
    return net_unpack(storage);
}

// ---- Readiness -------------------------------------------------------------------------------
// Three systems, one shape: State owns the handles; open, set, remove, wait, wake.

namespace {

constexpr uint64_t wake_tag = UINT64_MAX;  // never a user's
constexpr size_t max_events_per_wait = 256;

}  // namespace

#if defined(__linux__)

struct Poller::State {
    int epoll = -1, event = -1;
    epoll_event events[max_events_per_wait];
    ~State() {
        if (epoll >= 0) ::close(epoll);
        if (event >= 0) ::close(event);
    }
};

Result<Poller> Poller::open() {
    auto state = std::make_unique<State>();
    state->epoll = own_descriptor(::epoll_create1(EPOLL_CLOEXEC));
    state->event = own_descriptor(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
    epoll_event interest = {};
    interest.events = EPOLLIN;
    interest.data.u64 = wake_tag;
    if (state->epoll < 0 || state->event < 0 ||
        ::epoll_ctl(state->epoll, EPOLL_CTL_ADD, state->event, &interest) != 0)
        return net_error("cannot watch sockets");
    return Poller(std::move(state));
}

Result<void> Poller::set(const Socket& socket, uint64_t tag, unsigned interest) {
    epoll_event event = {};
    event.data.u64 = tag;
    if (interest & poll_read) event.events |= EPOLLIN;
    if (interest & poll_write) event.events |= EPOLLOUT;
    if (interest & poll_hangup) event.events |= EPOLLRDHUP;
    const int handle = net_native(socket.handle());
    if (::epoll_ctl(state_->epoll, EPOLL_CTL_MOD, handle, &event) == 0) return {};
    if (errno == ENOENT && ::epoll_ctl(state_->epoll, EPOLL_CTL_ADD, handle, &event) == 0)
        return {};
    return net_error("cannot watch a socket");
}

void Poller::remove(const Socket& socket) {
    ::epoll_ctl(state_->epoll, EPOLL_CTL_DEL, net_native(socket.handle()), nullptr);
}

Result<void> Poller::wait(int timeout_ms, std::vector<PollEvent>* events) {
    events->clear();
    const int count = ::epoll_wait(state_->epoll, state_->events, max_events_per_wait, timeout_ms);
    if (count < 0 && errno != EINTR) return net_error("cannot wait for sockets");
    for (int i = 0; i < count; ++i) {
        const epoll_event& event = state_->events[i];
        if (event.data.u64 == wake_tag) {
            uint64_t drained = 0;
            [[maybe_unused]] auto got = ::read(state_->event, &drained, sizeof drained);
            continue;
        }
        const auto has = [&](uint32_t bits) { return (event.events & bits) != 0; };
        events->push_back({event.data.u64, has(EPOLLIN | EPOLLERR | EPOLLHUP), has(EPOLLOUT),
                           has(EPOLLRDHUP | EPOLLERR | EPOLLHUP)});
    }
    return {};
}

void Poller::wake() {
    const uint64_t one = 1;
    [[maybe_unused]] auto sent = ::write(state_->event, &one, sizeof one);
}

#elif defined(__APPLE__) || defined(__FreeBSD__) || defined(__OpenBSD__)

struct Poller::State {
    int queue = -1, ends[2] = {-1, -1};
    struct kevent events[max_events_per_wait];
    ~State() {
        for (const int handle : {queue, ends[0], ends[1]})
            if (handle >= 0) ::close(handle);
    }
    bool change(uintptr_t handle, int filter, int flags, uint64_t tag) {
        struct kevent event;
        EV_SET(&event, handle, static_cast<short>(filter), static_cast<unsigned short>(flags), 0, 0,
               reinterpret_cast<void*>(static_cast<uintptr_t>(tag)));
        return ::kevent(queue, &event, 1, nullptr, 0, nullptr) == 0 ||
               ((flags & EV_DELETE) && errno == ENOENT);
    }
};

Result<Poller> Poller::open() {
    static_assert(sizeof(void*) == 8, "kqueue carries the 64-bit tag in its pointer");
    auto state = std::make_unique<State>();
    state->queue = own_descriptor(::kqueue());
    const bool piped = state->queue >= 0 && ::pipe(state->ends) == 0;
    for (int& end : state->ends) end = own_descriptor(end);
    if (!piped || ::fcntl(state->queue, F_SETFD, FD_CLOEXEC) != 0 || !net_prepare(state->ends[0]) ||
        !net_prepare(state->ends[1]) ||
        !state->change(static_cast<uintptr_t>(state->ends[0]), EVFILT_READ, EV_ADD, wake_tag))
        return net_error("cannot watch sockets");
    return Poller(std::move(state));
}

Result<void> Poller::set(const Socket& socket, uint64_t tag, unsigned interest) {
    const int read = (interest & poll_read) ? EV_ADD : EV_DELETE;
    const int write = (interest & poll_write) ? EV_ADD : EV_DELETE;
    if (state_->change(socket.handle(), EVFILT_READ, read, tag) &&
        state_->change(socket.handle(), EVFILT_WRITE, write, tag))
        return {};
    return net_error("cannot watch a socket");
}

void Poller::remove(const Socket& socket) {
    state_->change(socket.handle(), EVFILT_READ, EV_DELETE, 0);
    state_->change(socket.handle(), EVFILT_WRITE, EV_DELETE, 0);
}

Result<void> Poller::wait(int timeout_ms, std::vector<PollEvent>* events) {
    events->clear();
    timespec limit = {timeout_ms / 1000, timeout_ms % 1000 * 1'000'000L};
    const int count = ::kevent(state_->queue, nullptr, 0, state_->events, max_events_per_wait,
                               timeout_ms < 0 ? nullptr : &limit);
    if (count < 0 && errno != EINTR) return net_error("cannot wait for sockets");
    for (int i = 0; i < count; ++i) {
        const struct kevent& event = state_->events[i];
        const auto tag = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(event.udata));
        if (tag == wake_tag) {
            char drained[64];
            while (::read(state_->ends[0], drained, sizeof drained) > 0) {}
            continue;
        }
        const bool writable = event.filter == EVFILT_WRITE;
        events->push_back({tag, !writable, writable, !writable && (event.flags & EV_EOF)});
    }
    return {};
}

void Poller::wake() { [[maybe_unused]] auto sent = ::write(state_->ends[1], "", 1); }

#else  // poll: Windows, and whatever else there is

namespace {

#if defined(_WIN32)
using NetPollEntry = WSAPOLLFD;
int net_poll(NetPollEntry* entries, size_t count, int timeout_ms) {
    return WSAPoll(entries, static_cast<ULONG>(count), timeout_ms);
}
#else
using NetPollEntry = pollfd;
int net_poll(NetPollEntry* entries, size_t count, int timeout_ms) {
    return ::poll(entries, static_cast<nfds_t>(count), timeout_ms);
}
#endif

/// A UDP socket connected to itself: the one wake-up that poll understands on every system, and
/// nobody else can write to it.
bool net_open_self(NetHandle* handle) {
    if (!net_start()) return false;
    sockaddr_storage storage;
    NetLength length = net_pack(*NetAddress::parse("127.0.0.1", 0), &storage);
    auto* name = reinterpret_cast<sockaddr*>(&storage);
    *handle = net_socket(AF_INET, SOCK_DGRAM, IPPROTO_UDP);
    return static_cast<uintptr_t>(*handle) != Socket::none && net_prepare(*handle) &&
           ::bind(*handle, name, length) == 0 && ::getsockname(*handle, name, &length) == 0 &&
           ::connect(*handle, name, length) == 0;
}

}  // namespace

struct Poller::State {
    NetHandle self = net_native(Socket::none);
    std::vector<NetPollEntry> entries;
    std::vector<uint64_t> tags;
    std::unordered_map<uintptr_t, size_t> places;
    ~State() {
        if (static_cast<uintptr_t>(self) != Socket::none) net_close(self);
    }
};

Result<Poller> Poller::open() {
    auto state = std::make_unique<State>();
    if (!net_open_self(&state->self)) return net_error("cannot watch sockets");
    NetPollEntry entry = {};
    entry.fd = state->self;
    entry.events = POLLIN;
    state->entries.push_back(entry);
    state->tags.push_back(wake_tag);
    return Poller(std::move(state));
}

Result<void> Poller::set(const Socket& socket, uint64_t tag, unsigned interest) {
    const auto found = state_->places.try_emplace(socket.handle(), state_->entries.size());
    if (found.second) {
        state_->entries.push_back({});
        state_->tags.push_back(tag);
    }
    const size_t place = found.first->second;
    NetPollEntry& entry = state_->entries[place];
    entry.fd = net_native(socket.handle());
    entry.events = static_cast<short>(((interest & poll_read) ? POLLIN : 0) |
                                      ((interest & poll_write) ? POLLOUT : 0));
    state_->tags[place] = tag;
    return {};
}

void Poller::remove(const Socket& socket) {
    const auto found = state_->places.find(socket.handle());
    if (found == state_->places.end()) return;
    const size_t place = found->second, last = state_->entries.size() - 1;
    state_->places.erase(found);
    if (place != last) {
        state_->entries[place] = state_->entries[last];
        state_->tags[place] = state_->tags[last];
        state_->places[static_cast<uintptr_t>(state_->entries[place].fd)] = place;
    }
    state_->entries.pop_back();
    state_->tags.pop_back();
}

Result<void> Poller::wait(int timeout_ms, std::vector<PollEvent>* events) {
    events->clear();
    int count = net_poll(state_->entries.data(), state_->entries.size(), timeout_ms);
    if (count < 0 && !net_would_block(net_errno())) return net_error("cannot wait for sockets");
    for (size_t i = 0; i < state_->entries.size() && count > 0; ++i) {
        const NetPollEntry& entry = state_->entries[i];
        if (entry.revents == 0) continue;
        --count;
        if (i == 0) {
            char drained[64];
            while (::recv(state_->self, drained, sizeof drained, 0) > 0) {}
            continue;
        }
        const bool gone = (entry.revents & (POLLHUP | POLLERR | POLLNVAL)) != 0;
        events->push_back({state_->tags[i], gone || (entry.revents & POLLIN),
                           (entry.revents & POLLOUT) != 0, gone});
    }
    return {};
}

void Poller::wake() { ::send(state_->self, "", 1, 0); }

#endif

Poller::Poller(std::unique_ptr<State> state) : state_(std::move(state)) {}
Poller::Poller(Poller&& other) noexcept = default;
Poller& Poller::operator=(Poller&& other) noexcept = default;
Poller::~Poller() = default;

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_SERVER
