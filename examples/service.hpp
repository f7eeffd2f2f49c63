// What a service manager hears of a program: systemd's Type=notify and WatchdogSec=.
#ifndef VALAR_EXAMPLES_SERVICE_HPP
#define VALAR_EXAMPLES_SERVICE_HPP

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#if !defined(_WIN32)
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#endif

namespace example {

/// By the datagram socket that NOTIFY_SOCKET names ('@': an abstract one); without one it is silent.
class ServiceManager {
public:
    ServiceManager() {
        const char* path = std::getenv("NOTIFY_SOCKET");
        path_ = path ? path : "";
        const char* period = std::getenv("WATCHDOG_USEC");
        const char* process = std::getenv("WATCHDOG_PID");
        if (path_.empty() || !period || (process && std::strtoll(process, nullptr, 10) != own_id()))
            return;
        beat_ms_ = std::max<int64_t>(std::strtoll(period, nullptr, 10) / 2000, 1);
    }

    /// "READY=1", "STOPPING=1", "STATUS=..."; more than one in lines. What cannot be told is not.
    void tell(std::string text) const {
#if !defined(_WIN32)
        sockaddr_un name = {};
        name.sun_family = AF_UNIX;
        if (path_.empty() || path_.size() >= sizeof name.sun_path) return;
        std::memcpy(name.sun_path, path_.data(), path_.size());
        if (path_[0] == '@') name.sun_path[0] = 0;
        const int handle = socket(AF_UNIX, SOCK_DGRAM, 0);
        if (handle < 0) return;
        const size_t size = offsetof(sockaddr_un, sun_path) + path_.size();
        (void)!sendto(handle, text.data(), text.size(), MSG_DONTWAIT,
                      reinterpret_cast<const sockaddr*>(&name), static_cast<socklen_t>(size));
        close(handle);
#else
        (void)text;
#endif
    }

    /// Call it in each turn of a loop, which is alive then.
    void beat() {
        const int64_t now = now_ms();
        if (beat_ms_ == 0 || now < next_ms_) return;
        next_ms_ = now + beat_ms_;
        tell("WATCHDOG=1");
    }
    /// How long a turn may take.
    int turn_ms(int most) const {
        return beat_ms_ == 0 ? most : static_cast<int>(std::min<int64_t>(most, beat_ms_ / 2 + 1));
    }

private:
    static int64_t own_id() {
#if !defined(_WIN32)
        return getpid();
#else
        return 0;
#endif
    }
    static int64_t now_ms() {
        return std::chrono::duration_cast<std::chrono::milliseconds>(
                   std::chrono::steady_clock::now().time_since_epoch())
            .count();
    }

    std::string path_;
    int64_t beat_ms_ = 0;  // 0: nobody watches
    int64_t next_ms_ = 0;
};

}  // namespace example

#endif  // VALAR_EXAMPLES_SERVICE_HPP
