// A log that holds nobody up: lines go through a bounded queue to a thread that alone may wait for the
// disk or for who reads. What does not fit is counted, and said once there is room again.
// Include it after valar.hpp.
#ifndef VALAR_EXAMPLES_LOG_WRITER_HPP
#define VALAR_EXAMPLES_LOG_WRITER_HPP

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include <fcntl.h>
#if defined(_WIN32)
#include <io.h>
#include <sys/stat.h>
#else
#include <poll.h>
#include <unistd.h>
#endif

namespace example {

struct LogOptions {
    std::string path = {};  ///< appended to; empty: stderr
    bool json = false;      ///< each line is a JSON object
    valar::LogLevel least = valar::LogLevel::info;
    size_t most_bytes = 1 << 20;  ///< that wait to be written
    int last_ms = 2000;           ///< to write, at the end, what waits
};

/// Threads: open and the destructor from one at a time, the rest from any. The program ignores
/// SIGPIPE, else a dead reader of stderr ends it.
class LogWriter {
public:
    LogWriter() = default;
    LogWriter(const LogWriter&) = delete;
    ~LogWriter() {
        if (!state_) return;
        bool ended = false;
        {
            std::unique_lock<std::mutex> lock(state_->mutex);
            state_->ending = true;
            state_->changed.notify_all();
            const std::chrono::milliseconds last(state_->options.last_ms);
            ended = state_->changed.wait_for(lock, last, [&] { return state_->ended; });
        }
        ended ? thread_.join() : thread_.detach();
    }

    /// Once, before any line.
    valar::Result<void> open(const LogOptions& options) {
        auto state = std::make_shared<State>();
        state->options = options;
        if (!options.path.empty() && (state->file = open_file(options.path)) < 0)
            return valar::Error{valar::ErrorKind::io, cannot_open(options.path), {}, "log_file"};
        state_ = state;
        thread_ = std::thread([state] { run(*state); });
        return {};
    }

    /// For lines of text.
    valar::LogSink sink() { return {write_text, state_.get()}; }
    /// For a server, whose lines are JSON objects where all of ours are.
    valar::LogSink server_sink() {
        return {state_->options.json ? write_object : write_text, state_.get()};
    }
    static uint64_t count_lost(void* state) {
        const std::lock_guard<std::mutex> lock(static_cast<State*>(state)->mutex);
        return static_cast<State*>(state)->lost;
    }
    /// The file may have been moved away: the next line goes into one of that name.
    void reopen() {
        const std::lock_guard<std::mutex> lock(state_->mutex);
        state_->reopen = !state_->options.path.empty();
        state_->changed.notify_all();
    }

    /// A line as it stands in the log, without its end.
    static std::string stamped(valar::LogLevel level, std::string_view line, bool json) {
        if (json)
            return valar::Json::object()
                .set("time", time_now())
                .set("level", level_name(level))
                .set("message", line)
                .write();
        std::string text = time_now() + " " + level_name(level) + " ";
        for (const char c : line)  // one line each
            text += static_cast<unsigned char>(c) < ' ' || c == 0x7f ? ' ' : c;
        return text;
    }

private:
    struct State {
        LogOptions options;
        int file = 2;
        std::mutex mutex;
        std::condition_variable changed;
        std::string waiting;
        uint64_t lost = 0, told = 0;  // lines; of them, those that a line told of
        bool reopen = false, ending = false, ended = false;
    };

    static const char* level_name(valar::LogLevel level) {
        constexpr const char* names[] = {"debug", "info", "warning", "error"};
        return names[static_cast<int>(level)];
    }

    /// RFC 3339, UTC.
    static std::string time_now() {
        using namespace std::chrono;
        const auto since = system_clock::now().time_since_epoch();
        const auto ms = duration_cast<milliseconds>(since).count();
        const auto seconds = static_cast<std::time_t>(ms / 1000);
        std::tm utc = {};
#if defined(_WIN32)
        gmtime_s(&utc, &seconds);
#else
        gmtime_r(&seconds, &utc);
#endif
        char text[32];
        const size_t size = std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S.", &utc);
        const std::string digits = std::to_string(1000 + ms % 1000);
        return std::string(text, size) + digits.substr(1) + "Z";
    }

    static void write_text(void* self, valar::LogLevel level, std::string_view line) {
        auto& state = *static_cast<State*>(self);
        if (level >= state.options.least) add(state, stamped(level, line, state.options.json));
    }
    static void write_object(void* self, valar::LogLevel level, std::string_view object) {
        auto& state = *static_cast<State*>(self);
        if (level < state.options.least) return;
        const std::string head =
            valar::Json::object().set("time", time_now()).set("level", level_name(level)).write();
        add(state, head.substr(0, head.size() - 1) + "," + std::string(object.substr(1)));
    }
    static void add(State& state, const std::string& line) {
        const std::lock_guard<std::mutex> lock(state.mutex);
        if (state.waiting.size() + line.size() >= state.options.most_bytes) {
            ++state.lost;
            return;
        }
        if (state.waiting.empty()) state.changed.notify_all();
        state.waiting.append(line).push_back('\n');
    }

    // ---- The thread ----

    static void run(State& state) {
        bool torn = false;  // the last line in the file is not whole
        std::unique_lock<std::mutex> lock(state.mutex);
        for (;;) {
            state.changed.wait(
                lock, [&] { return !state.waiting.empty() || state.reopen || state.ending; });
            if (state.waiting.empty() && !state.reopen) break;
            std::string piece = torn ? "\n" : "";
            const bool reopen = std::exchange(state.reopen, false);
            piece += std::exchange(state.waiting, {});
            const uint64_t untold = state.lost - std::exchange(state.told, state.lost);
            lock.unlock();
            if (reopen) open_again(state, &piece);
            if (untold > 0) {  // those came when what is in this piece had filled the queue
                const std::string line = std::to_string(untold) + " log lines were lost";
                piece += stamped(valar::LogLevel::warning, line, state.options.json) + "\n";
            }
            const size_t done = write_all(state.file, piece);
            lock.lock();
            if (done == piece.size()) {
                torn = false;
                continue;
            }
            if (torn && done == 0) --state.lost;  // the end of a line that is counted
            if (done > 0) torn = piece[done - 1] != '\n';
            const auto rest = piece.begin() + static_cast<ptrdiff_t>(done);
            state.lost += static_cast<uint64_t>(std::count(rest, piece.end(), '\n'));
            if (untold > 0) --state.lost, state.told -= untold;
        }
        state.ended = true;
        state.changed.notify_all();
    }

    static void open_again(State& state, std::string* piece) {
        const std::string& path = state.options.path;
        const int file = open_file(path);
        if (file < 0) {
            const std::string line = cannot_open(path) + "; lines go on into the old one";
            *piece += stamped(valar::LogLevel::error, line, state.options.json) + "\n";
            return;
        }
        close_file(std::exchange(state.file, file));
    }

    static std::string cannot_open(const std::string& path) {
        const std::string why = std::strerror(errno);
        return "cannot open the log file '" + path + "': " + why;
    }

#if defined(_WIN32)
    static int open_file(const std::string& path) {
        return _open(path.c_str(), _O_WRONLY | _O_APPEND | _O_CREAT | _O_BINARY | _O_NOINHERIT,
                     _S_IREAD | _S_IWRITE);
    }
    static void close_file(int file) { _close(file); }
    static size_t write_all(int file, std::string_view bytes) {
        const int done = _write(file, bytes.data(), static_cast<unsigned>(bytes.size()));
        return done < 0 ? 0 : static_cast<size_t>(done);
    }
#else
    static int open_file(const std::string& path) {
        return ::open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOCTTY, 0640);
    }
    static void close_file(int file) { ::close(file); }
    /// How many of the bytes were taken; fewer than all after an error.
    static size_t write_all(int file, std::string_view bytes) {
        size_t done = 0;
        while (done < bytes.size()) {
            const ssize_t more = ::write(file, bytes.data() + done, bytes.size() - done);
            if (more >= 0) {
                done += static_cast<size_t>(more);
            } else if (errno == EAGAIN) {  // somebody made our stderr non-blocking
                pollfd one = {file, POLLOUT, 0};
                ::poll(&one, 1, -1);
            } else if (errno != EINTR) {
                break;
            }
        }
        return done;
    }
#endif

    std::shared_ptr<State> state_;
    std::thread thread_;
};

}  // namespace example

#endif  // VALAR_EXAMPLES_LOG_WRITER_HPP
