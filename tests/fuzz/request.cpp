// A body of POST /v1/responses: whatever it is, it is refused with a code or makes a request whose
// response object can be rendered and read again.
#include "api/surface.hpp"

#include <cstdlib>

// As a body of another surface: what that makes of it is refused with a name that its client knows,
// or is a request.
static void read_surfaces(const valar::Json& body) {
    using namespace valar::detail;
    for (const Surface* surface : {&chat_surface, &completions_surface}) {
        auto read = read_surface(*surface, body, valar::Dialect::openai);
        if (!read) {
            if (read.error().code.empty() || read.error().message.empty()) std::abort();
            continue;
        }
        auto request = parse_response_request(read->body, valar::Dialect::openai);
        if (!request) (void)surface_error(*surface, request.error(), *read);
        else if (!read->raw.is_null()) (void)raw_prompt(read->raw);
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    auto body = valar::Json::parse({reinterpret_cast<const char*>(data), size});
    if (!body) return 0;
    (void)valar::detail::parse_response_request(*body, valar::Dialect::openai).ok();
    read_surfaces(*body);
    auto request = valar::detail::parse_response_request(*body);
    if (!request) {
        if (request.error().code.empty() || request.error().message.empty()) std::abort();
        (void)valar::detail::render_error(request.error()).write();
        return 0;
    }
    if (request->model.empty() || request->input.empty()) std::abort();
    // What is kept of it says the same.
    const valar::Json kept = valar::detail::request_json(*request);
    auto read = valar::detail::read_request(kept, valar::Dialect::openai);
    if (!read || !(valar::detail::request_json(*read) == kept)) std::abort();
    (void)valar::detail::check_request(*request).ok();
    // What input_items shows is a valid input again, and says the same.
    const valar::Dialect openai = valar::Dialect::openai;
    valar::Json items = valar::detail::render_input_items(*body, "resp_1");
    body->set("input", items);
    auto again = valar::detail::parse_response_request(*body, openai);
    if (!again || again->input.items.size() != items.size()) std::abort();
    valar::detail::ResponseRecord record;
    record.request = std::move(*body);
    record.model = request->model;
    for (const valar::Status status : {valar::Status::pending, valar::Status::completed,
                                       valar::Status::failed, valar::Status::cancelled}) {
        record.status = status;
        valar::Outcome outcome;
        outcome.text = request->instructions;
        outcome.cut = size % 2 != 0;
        if (size % 3 != 0) outcome.items = request->input.items;
        outcome.logprobs = {{request->user, -1.0f, {{request->model, -2.0f}}}};
        if (status == valar::Status::failed)
            outcome.error = valar::Error{valar::ErrorKind::internal, "x", "", ""};
        record.outcome = std::make_shared<valar::Outcome>(outcome);
        for (const valar::Dialect dialect : {valar::Dialect::valar, valar::Dialect::openai})
            if (!valar::Json::parse(valar::detail::render_response(record, dialect).write()))
                std::abort();
    }
    return 0;
}
