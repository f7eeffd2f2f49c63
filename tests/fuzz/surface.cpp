// A body of a surface beside /v1/responses: whatever it is, it is refused with a code, or makes a
// body of that one which is refused or makes a request; an answer out of its items can be shown by
// every surface, whole and in events.
#include "api/surface.hpp"

#include <cstdlib>

using namespace valar;
using namespace valar::detail;

namespace {

const Surface* const surfaces[] = {&chat_surface, &messages_surface, &messages_count_surface};
constexpr Dialect dialects[] = {Dialect::valar, Dialect::openai};

void check_error(const Surface& surface, const Error& error) {
    if (error.code.empty() || error.message.empty()) std::abort();
    for (const Dialect dialect : dialects) {
        const Json shown = surface.error ? surface.error(error, dialect) : render_error(error);
        if (shown["error"]["message"].as_string().empty()) std::abort();
    }
}

/// Each event whole, and its data JSON.
void check_events(std::string_view stream) {
    while (!stream.empty()) {
        const size_t end = stream.find("\n\n"), data = stream.find("data: ");
        if (end == stream.npos || data > end) std::abort();
        const std::string_view text = stream.substr(data + 6, end - data - 6);
        if (text != "[DONE]" && !Json::parse(text)) std::abort();
        stream.remove_prefix(end + 2);
    }
}

void check_answers(const Request& request, Json body, size_t size) {
    Outcome outcome;
    outcome.text = request.instructions;
    outcome.cut = size % 2 != 0;
    outcome.stopped_by = request.user;
    if (size % 3 != 0) outcome.items = request.input.items;
    ResponseRecord record;
    record.id = "resp_1";
    record.model = request.model;
    record.request = std::move(body);
    record.status = size % 5 == 0 ? Status::failed : Status::completed;
    record.outcome = std::make_shared<Outcome>(outcome);
    for (const Dialect dialect : dialects) {
        const std::string object = render_response(record, dialect).write();
        for (const Surface* surface : surfaces) {
            if (!surface->render) continue;
            const auto whole = render_answer({.surface = surface}, object, dialect);
            if (whole.ok() != (record.status == Status::completed)) std::abort();
            if (whole && !Json::parse(*whole)) std::abort();
            const auto events = render_answer({.surface = surface, .stream = true}, object,
                                              dialect);
            if (!events) std::abort();
            check_events(*events);
        }
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const auto body = Json::parse({reinterpret_cast<const char*>(data), size});
    if (!body) return 0;
    for (const Surface* surface : surfaces)
        for (const Dialect dialect : dialects) {
            auto read = read_surface(*surface, *body, dialect);
            if (!read) {
                check_error(*surface, read.error());
                continue;
            }
            auto request = parse_response_request(read->body, dialect);
            if (!request) check_error(*surface, surface_error(*surface, request.error(), *read));
            else check_answers(*request, std::move(read->body), size);
        }
    return 0;
}
