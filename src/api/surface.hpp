// The surfaces that speak of responses in words of their own.
#pragma once

#include "api/events.hpp"

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {

/// A body of another surface, as a body of POST /v1/responses.
struct SurfaceBody {
    Dialect dialect = Dialect::valar;
    Json body = Json::object();
    bool stream = false;
    bool include_usage = false;  ///< an event of its own at the end of a stream
    Json raw = {};               ///< of a prompt past the template: see raw_prompt
    bool echoes = false;
    std::string echo = {};                  ///< what stands before the answer, if it echoes
    std::vector<std::string> origins = {};  ///< of each item of `input`: its path in the body given
    std::vector<std::pair<std::string, std::string>> renamed = {};  ///< fields: name here, as given

    /// To `input`, which is an array: an item that is made of what stands at `origin`.
    void add(Json item, std::string origin) {
        body.find("input")->push(std::move(item));
        origins.push_back(std::move(origin));
    }
};

/// A field of a surface's body: its value goes on under another name, or as `read` says.
struct SurfaceField {
    std::string_view name;
    std::string_view to = {};  ///< its place in a body of /v1/responses, for values and for errors
    Fault (*read)(const Json& value, SurfaceBody* out) = nullptr;
    bool openai = false;                        ///< of that dialect alone
    Json (*schema)(Dialect dialect) = nullptr;  ///< what `read` takes; null: what `to` does
};
// How fields are read that several surfaces have.
Fault surface_stop(const Json& value, SurfaceBody* out);
Fault surface_stream(const Json& value, SurfaceBody* out);
Fault surface_stream_options(const Json& value, SurfaceBody* out);
Json doc_surface_stream(Dialect dialect);
Json doc_surface_stream_options(Dialect dialect);

/// A comment: proxies and clients see that somebody is there.
inline constexpr std::string_view stream_beat = ": still here\n\n";

/// A surface beside POST /v1/responses: its requests become bodies of that one, its answers are made
/// from the response object. So each of them leaves a response that GET shows.
struct Surface {
    std::string_view name;  ///< of its schemas
    std::string_view path;
    std::span<const SurfaceField> fields;  ///< others are ignored
    std::span<const std::string_view> refused = {};
    std::span<const std::string_view> required = {};
    Fault (*check)(SurfaceBody* out) = nullptr;  ///< rules across fields
    /// The end of the place of an error, below `field` of a body of /v1/responses, as the client
    /// wrote it. `value`: of that field; of arrays (input, tools) the element.
    std::string (*rest)(std::string_view field, const Json& value, const std::string& rest);
    Json (*error)(const Error& error, Dialect dialect) = nullptr;  ///< null: render_error
    /// The answer, from a terminal response object. Errors: of a response that failed.
    Result<std::string> (*render)(const std::string& object, Dialect dialect) = nullptr;
    std::unique_ptr<EventWriter> (*events)(const ResponseRecord& record, bool include_usage,
                                           Dialect dialect) = nullptr;
    int timeout_status = 504;
    const char* request_id = nullptr;     ///< the header that clients look for X-Request-ID in
    std::string_view beat = stream_beat;  ///< of a stream in which nothing happens
};
Result<SurfaceBody> read_surface(const Surface& surface, const Json& body, Dialect dialect);
/// An error of the body that `read_surface` gave, with the names that its client knows.
Error surface_error(const Surface& surface, Error error, const SurfaceBody& read);
/// Of a response that has no answer.
Error surface_failure(const Outcome& outcome);

extern const Surface chat_surface, completions_surface, messages_surface;
extern const Surface messages_count_surface;  ///< of which only the prompt's tokens are wanted

/// {"tokens": [...], "suffix": "..."}, each of them if it is there.
RawPrompt raw_prompt(const Json& raw);

/// How the answer to a request is to look.
struct AnswerForm {
    const Surface* surface = nullptr;  ///< null: POST /v1/responses, as GET shows it
    bool stream = false;
    bool include_usage = false;
    std::string echo = {};
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
