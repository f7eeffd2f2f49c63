// Serves a FakeResponder, for checks by other programs: serve_fake [PORT [KEY [DIALECT]]]. Port
// 0, the default, takes a free one; the first line printed is the port.
#include <cstdio>
#include <cstdlib>

#include "fake_responder.hpp"

int main(int argc, char** argv) {
    FakeResponder responder("org/fake-1", {"fake"});
    responder.info.context_tokens = 4096;
    valar::ServerOptions options;
    options.port = static_cast<uint16_t>(argc > 1 ? std::atoi(argv[1]) : 0);
    if (argc > 2) options.keys.push_back({"key", "default", argv[2]});
    if (argc > 3 && std::string_view(argv[3]) == "openai") options.dialect = valar::Dialect::openai;
    options.log.write = [](void*, valar::LogLevel, std::string_view line) {
        std::fprintf(stderr, "%.*s\n", static_cast<int>(line.size()), line.data());
    };
    auto server = valar::Server::open(&responder, options);
    if (!server) return std::fprintf(stderr, "%s\n", server.error().message.c_str()), 1;
    std::printf("%u\n", static_cast<unsigned>(server->port()));
    std::fflush(stdout);
    return server->run() ? 0 : 1;
}
