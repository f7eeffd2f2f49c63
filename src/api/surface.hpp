// The surfaces that speak of responses in words of their own.
#pragma once

#include "api/events.hpp"

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// A body of another surface, as a body of POST /v1/responses.
struct SurfaceBody {
    Json body = Json::object();
    bool stream = false;
    bool include_usage = false;             ///< an event of its own at the end of a stream
    std::vector<std::string> origins = {};  ///< of each item of `input`: its path in the body given
    std::vector<std::pair<std::string, std::string>> renamed = {};  ///< fields: name here, as given
};

/// A surface beside POST /v1/responses: its requests become bodies of that one, its answers are made
/// from the response object. So each of them leaves a response that GET shows.
struct Surface {
    std::string_view path;
    Result<SurfaceBody> (*read)(const Json& body, Dialect dialect);
    /// An error of the body that `read` gave, with the names that its client knows.
    Error (*translate)(Error error, const SurfaceBody& body);
    /// The answer, from a terminal response object. Errors: of a response that failed.
    Result<std::string> (*render)(const std::string& object, Dialect dialect);
    std::unique_ptr<EventWriter> (*events)(const ResponseRecord& record, bool include_usage,
                                           Dialect dialect);
    int timeout_status;
};
extern const Surface chat_surface;

/// How the answer to a request is to look.
struct AnswerForm {
    const Surface* surface = nullptr;  ///< null: POST /v1/responses, as GET shows it
    bool stream = false;
    bool include_usage = false;
    uint64_t after = UINT64_MAX;  ///< of a stream, the last event that is known; UINT64_MAX: none
};
std::unique_ptr<EventWriter> event_writer(const AnswerForm& form, const ResponseRecord& record,
                                          Dialect dialect);
/// Of a response that has ended, from its object. A stream is as if all had come in one piece.
Result<std::string> render_answer(const AnswerForm& form, const std::string& object,
                                  Dialect dialect);

}  // namespace detail
}  // namespace v1
}  // namespace valar
