// The HTTP parser: a stream in random pieces is read as the stream in one piece, and nothing that
// comes in, request or reply, breaks it. The first byte chooses the side, the limits and the cuts.
#include <cstdlib>

#include "../http_peer.hpp"
#include "server/loop.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace valar::detail;
    if (size == 0) return 0;
    const auto side = (data[0] & 1) ? HttpParser::Side::reply : HttpParser::Side::request;
    HttpLimits limits;
    if (data[0] & 2) limits = {30, 100, 3, 20};
    const std::string_view bytes(reinterpret_cast<const char*>(data + 1), size - 1);
    const std::string whole = describe_http(bytes, side, limits, [](size_t left) { return left; });
    uint32_t random = data[0] * 2654435761u + static_cast<uint32_t>(size);
    const auto piece = [&](size_t left) {
        random = random * 1664525u + 1013904223u;
        return std::min<size_t>(left, 1 + (random >> 24) % 16);
    };
    if (describe_http(bytes, side, limits, piece) != whole) std::abort();
    // what a proxy says of its client, and a query for the log
    HttpRequest request;
    request.headers = {{"X-Forwarded-For", std::string(bytes)}, {"Forwarded", std::string(bytes)}};
    const std::string client = server_client(request, true);
    if (client != "-" && !NetAddress::parse(client, 0)) std::abort();
    const std::string shown = server_shown_query(bytes, std::span(&server_limit, 1));
    if (shown.size() > 2 * server_shown_bytes || shown.find_first_of("\n\"") != shown.npos)
        std::abort();
    return 0;
}
