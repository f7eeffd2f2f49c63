// >>base: sockets
// Owns: the TCP and Unix socket calls of Linux, Windows, macOS and BSD, readiness (epoll, kqueue, WSAPoll) and the
//       wake-up of a waiting loop from another thread.
// Assumes: numeric addresses; names are resolved elsewhere.
// Promises: no call blocks but Poller::wait; no SIGPIPE, and no signal handler either.
#pragma once

#include "base/internal.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// An IP address and a TCP port. IPv4 is held as ::ffff:a.b.c.d.
struct NetAddress {
    uint8_t ip[16] = {};
    uint16_t port = 0;
    bool v4 = false;
    bool local = false;  ///< of a Unix socket: without address and port

    /// "127.0.0.1", "::1", "[::1]" or "localhost" (which is 127.0.0.1); anything else is an Error.
    static Result<NetAddress> parse(std::string_view host, uint16_t port);
    std::string host() const;  ///< "127.0.0.1", "::1", "unix"
    std::string text() const;  ///< "127.0.0.1:8080", "[::1]:8080", "unix"
    bool is_loopback() const;  ///< 127.0.0.0/8, ::1, the former mapped into IPv6, a Unix socket
};

/// Whether a connection to the one would come to who listens at the other; "0.0.0.0" and "::" stand
/// for every address of this machine. Port 0: nobody listens.
bool net_reaches(const NetAddress& address, const NetAddress& listener);

/// The addresses of a name, as the system resolves it: at least one. It may take long.
/// Errors: io. Threads: any.
Result<std::vector<NetAddress>> net_resolve(const std::string& name, uint16_t port);

/// Of "unix:/path" the path; nothing: it is no Unix socket's name.
std::optional<std::string> unix_path(std::string_view host);
/// Which file lies at the path of a Unix socket; 0: none. Remove it while the socket is open.
uint64_t socket_file(const std::string& path);
void remove_socket_file(const std::string& path, uint64_t file);  ///< if it is still that one

/// How a socket call ended. `full`: accept found no free descriptor (EMFILE and kin): the caller
/// must stop asking until one is free, or it will spin.
enum class IoStatus : uint8_t { done, again, closed, full, failed };

struct IoResult {
    IoStatus status = IoStatus::failed;
    size_t bytes = 0;  ///< > 0 when done; `closed` is the peer's end of stream, or a reset
};

/// A non-blocking stream socket that closes itself. Threads: one at a time.
class Socket {
public:
    static constexpr uintptr_t none = UINTPTR_MAX;

    /// Port 0 takes any free port; "::" takes IPv4 as well.
    static Result<Socket> listen(const NetAddress& address, int backlog);
    /// A Unix socket with mode 0660. A file of one that nobody listens on any more is replaced.
    /// Errors: io: in use, no place; invalid_request: no path that fits; unsupported: Windows.
    static Result<Socket> listen_unix(const std::string& path, int backlog);
    static Result<Socket> connect_unix(const std::string& path);
    /// Begins; the socket is writable once connected() can tell how it went.
    static Result<Socket> connect(const NetAddress& address);
    /// Does nothing but hold a descriptor.
    static Result<Socket> spare();

    Socket() = default;
    Socket(Socket&& other) noexcept : handle_(std::exchange(other.handle_, none)) {}
    Socket& operator=(Socket&& other) noexcept;
    ~Socket() { close(); }

    IoStatus accept(Socket* accepted, NetAddress* peer);
    IoStatus connected() const;  ///< done or failed; only after the socket became writable
    IoResult read(void* bytes, size_t size);
    /// Sends `head`, then `body`, in one call; `bytes` counts over both.
    IoResult write(std::string_view head, std::string_view body = {});
    void shutdown_write();  ///< sends the end of stream; reading goes on
    void close();
    Result<NetAddress> local() const;
    bool is_open() const { return handle_ != none; }
    uintptr_t handle() const { return handle_; }

private:
    explicit Socket(uintptr_t handle) : handle_(handle) {}
    static Result<Socket> open_unix();
    uintptr_t handle_ = none;
};

struct PollEvent {
    uint64_t tag = 0;
    bool readable = false;  ///< bytes, an end of stream or an error wait to be read
    bool writable = false;
    bool hangup = false;  ///< the peer sends no more, or is gone
};

/// What a socket is watched for. poll_hangup tells an end of stream behind bytes that nobody reads
/// yet; where the system cannot (kqueue, poll) it is silent until they are read.
enum PollInterest : unsigned { poll_read = 1, poll_write = 2, poll_hangup = 4 };

/// Level-triggered readiness of many sockets. Threads: wake() from any, the rest from one.
class Poller {
public:
    static Result<Poller> open();
    Poller(Poller&& other) noexcept;
    Poller& operator=(Poller&& other) noexcept;
    ~Poller();

    /// Watches a socket, or changes what it is watched for.
    Result<void> set(const Socket& socket, uint64_t tag, unsigned interest);
    void remove(const Socket& socket);  ///< before the socket is closed
    /// Waits for events or wake(), at most timeout_ms (-1: without limit), and fills `events`.
    Result<void> wait(int timeout_ms, std::vector<PollEvent>* events);
    void wake();

private:
    struct State;
    explicit Poller(std::unique_ptr<State> state);
    std::unique_ptr<State> state_;
};

}  // namespace detail
}  // namespace v1
}  // namespace valar
