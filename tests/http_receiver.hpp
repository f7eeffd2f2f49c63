// A server for tests of what calls servers: it answers with the bytes it was given.
#ifndef VALAR_TESTS_HTTP_RECEIVER_HPP
#define VALAR_TESTS_HTTP_RECEIVER_HPP

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "http/internal.hpp"

/// Answers once a head is read, and then closes the connection, or, where `ends` is not set, keeps it.
/// A GET gets `got`, where that is given, and then an end.
class Receiver {
public:
    explicit Receiver(std::string answer, bool ends = true, std::string got = {})
        : listener_(*valar::detail::Socket::listen(
              *valar::detail::NetAddress::parse("127.0.0.1", 0), 64)),
          port(listener_.local()->port),
          thread_([this, answer, ends, got] { run(answer, ends, got); }) {}
    ~Receiver() {
        over_ = true;
        thread_.join();
    }

private:
    void run(const std::string& answer, bool ends, const std::string& got) {
        using namespace valar::detail;
        std::vector<std::pair<Socket, std::string>> open;
        while (!over_) {
            std::pair<Socket, std::string> next;
            NetAddress peer;
            if (listener_.accept(&next.first, &peer) == IoStatus::done) {
                ++connections;
                open.push_back(std::move(next));
            }
            for (auto& [socket, read] : open) {
                char bytes[4096];
                const IoResult io = socket.is_open() ? socket.read(bytes, sizeof bytes)
                                                     : IoResult();
                if (io.status == IoStatus::closed) socket.close();
                if (io.status != IoStatus::done) continue;
                read.append(bytes, io.bytes);
                if (read.find("\r\n\r\n") == read.npos) continue;
                const bool lists = !got.empty() && read.starts_with("GET ");
                posts += read.starts_with("POST ");
                read.clear();
                (void)socket.write(lists ? got : answer);
                if (ends || lists) socket.close();
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }
    std::atomic<bool> over_ = false;
    valar::detail::Socket listener_;

public:
    std::atomic<int> connections = 0, posts = 0;
    const uint16_t port;

private:
    std::thread thread_;
};

#endif
