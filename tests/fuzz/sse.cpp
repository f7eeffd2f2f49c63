// Server-sent events: a stream in random pieces is read as the stream in one piece, and as a reader
// that splits all of it into lines first has it. The first byte chooses the limit and the cuts.
#include <cstdlib>
#include <string>
#include <vector>

#include "http/sse.hpp"

namespace {

using valar::detail::SseReader;

template <class Piece>
std::string read(std::string_view bytes, size_t most, Piece piece) {
    SseReader reader(most);
    std::string out;
    while (!bytes.empty()) {
        const std::string_view next = bytes.substr(0, piece(bytes.size()));
        size_t used = 0;
        const auto found = reader.feed(next, &used);
        if (used > next.size()) std::abort();
        if (found == SseReader::Found::fault) return out + "fault";
        if (found == SseReader::Found::more && used != next.size()) std::abort();
        if (found == SseReader::Found::event)
            out.append(reader.type()).append("|").append(reader.data()).append("\x01");
        if (reader.data().size() > most) std::abort();
        bytes.remove_prefix(used);
    }
    return out;
}

std::string read_lines(std::string_view bytes) {
    std::string lines, out, type, data;
    for (size_t i = 0; i < bytes.size(); ++i)
        if (bytes[i] != '\r') lines += bytes[i];
        else if (i + 1 == bytes.size() || bytes[i + 1] != '\n') lines += '\n';
    if (lines.starts_with("\xEF\xBB\xBF")) lines.erase(0, 3);
    for (size_t at = 0, end; (end = lines.find('\n', at)) != lines.npos; at = end + 1) {
        const std::string line = lines.substr(at, end - at);
        if (line.empty() && !data.empty())
            out.append(type).append("|").append(data, 0, data.size() - 1).append("\x01");
        if (line.empty()) type = data = {};
        const size_t colon = line.find(':');
        std::string value = colon == line.npos ? "" : line.substr(colon + 1);
        if (value.starts_with(' ')) value.erase(0, 1);
        if (line.substr(0, colon) == "data") data += value + "\n";
        if (line.substr(0, colon) == "event") type = value;
    }
    return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    const std::string_view bytes(reinterpret_cast<const char*>(data + 1), size - 1);
    const size_t most = (data[0] & 1) ? 20 : size;
    const std::string whole = read(bytes, most, [](size_t left) { return left; });
    uint32_t random = data[0] * 2654435761u + static_cast<uint32_t>(size);
    const auto piece = [&](size_t left) {
        random = random * 1664525u + 1013904223u;
        return std::min<size_t>(left, 1 + (random >> 24) % 16);
    };
    if (read(bytes, most, piece) != whole) std::abort();
    if (most == size && whole != read_lines(bytes)) std::abort();
    return 0;
}
