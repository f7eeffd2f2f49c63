// The peer of server_load.py: cpp-httplib (Debian: libcpp-httplib-dev, -lcpp-httplib) answers GET /1k with 1 KB of
// JSON. Its thread pool has a thread for each of the 64 connections, its best case. Prints its port.
#include <httplib.h>

#include <cstdio>

int main() {
    httplib::Server server;
    server.new_task_queue = [] { return new httplib::ThreadPool(64); };
    server.set_keep_alive_max_count(1'000'000'000);
    server.set_tcp_nodelay(true);
    const std::string body = "{\"text\":\"" + std::string(1011, 'x') + "\"}";
    server.Get("/1k", [&](const httplib::Request&, httplib::Response& reply) {
        reply.set_content(body, "application/json");
    });
    const int port = server.bind_to_any_port("127.0.0.1");
    std::printf("%d\n", port);
    std::fflush(stdout);
    return server.listen_after_bind() ? 0 : 1;
}
