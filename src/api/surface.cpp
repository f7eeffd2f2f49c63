// Bodies of other surfaces as bodies of POST /v1/responses, by the tables of those surfaces.
#include "prologue.hpp"

#include "api/document.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>

namespace valar {
inline namespace v1 {
namespace detail {

Fault surface_stop(const Json& value, SurfaceBody* out) {
    out->body.set("stop", value.is_string() ? Json::array().push(value) : value);
    return {};
}

Fault surface_stream(const Json& value, SurfaceBody* out) {
    out->stream = value.as_bool();
    return check_bool(value, "stream");
}

Fault surface_stream_options(const Json& value, SurfaceBody* out) {
    if (!value.is_object()) return api_wrong_type("stream_options", "an object", value);
    const Json& usage = value["include_usage"];
    out->include_usage = usage.as_bool();
    out->body.set("stream_options",
                  Json::object().set("prompt_progress", value["prompt_progress"]));
    return usage.is_null() ? Fault() : check_bool(usage, "stream_options.include_usage");
}

Json doc_surface_stream(Dialect) {
    return doc_type("boolean").set("description", "Answered in server-sent events.");
}

Json doc_surface_stream_options(Dialect) {
    return doc_object(
        0, {{"include_usage", doc_type("boolean")}, {"prompt_progress", doc_type("boolean")}});
}

Json doc_request(const Surface& surface, Dialect dialect) {
    const Json ours = doc_fields(dialect);
    Json fields = Json::object();
    for (const SurfaceField& row : surface.fields) {
        if (row.openai && dialect != Dialect::openai) fields.set(row.name, doc_type("null"));
        else fields.set(row.name, row.schema ? row.schema(dialect) : ours[row.to]);
    }
    for (const std::string_view name : surface.refused) fields.set(name, doc_type("null"));
    return doc_body(std::move(fields), surface.required);
}

namespace {

Fault surface_field(const Surface& surface, const JsonMember& member, SurfaceBody* out) {
    const std::string& name = member.key;
    if (member.value.is_null()) return {};
    const auto row = std::find_if(surface.fields.begin(), surface.fields.end(),
                                  [&](const SurfaceField& one) { return one.name == name; });
    const bool known = row != surface.fields.end();
    const auto& refused = surface.refused;
    if (known ? row->openai && out->dialect != Dialect::openai
              : std::find(refused.begin(), refused.end(), name) != refused.end())
        return api_unsupported("unsupported_parameter", name);
    if (!known) return {};
    if (row->to != row->name && !row->to.empty()) out->renamed.emplace_back(row->to, row->name);
    if (row->read) return row->read(member.value, out);
    out->body.set(row->to, member.value);
    return {};
}

/// The place of an error, as the client wrote it.
std::string surface_path(const Surface& surface, const std::string& path, const SurfaceBody& read) {
    const size_t open = path.find('['), close = path.find(']');
    const std::string name = path.substr(0, std::min(open, path.find('.')));
    const std::string below = close < path.size() ? path.substr(close + 1) : "";
    const size_t index = open < close ? static_cast<size_t>(std::atoi(path.c_str() + open + 1)) : 0;
    if (name == "input" && index < read.origins.size())
        return read.origins[index] + surface.rest(name, read.body[name][index], below);
    if (name == "tools" && open < close)
        return path.substr(0, close + 1) + surface.rest(name, read.body[name][index], below);
    for (const auto& [ours, theirs] : read.renamed)
        if (path.starts_with(ours))
            return theirs + surface.rest(ours, read.body[ours], path.substr(ours.size()));
    return name + surface.rest(name, read.body[name], path.substr(name.size()));
}

}  // namespace

Result<SurfaceBody> read_surface(const Surface& surface, const Json& body, Dialect dialect) {
    SurfaceBody out;
    out.dialect = dialect;
    if (!body.is_object())
        return make_error(ErrorKind::invalid_request, "the body must be a JSON object",
                          "invalid_type");
    for (const std::string_view name : surface.required)
        if (body[name].is_null()) return api_missing(std::string(name));
    for (const JsonMember& member : body.members())
        if (Fault fault = surface_field(surface, member, &out)) return std::move(*fault);
    if (Fault fault = surface.check ? surface.check(&out) : Fault()) return std::move(*fault);
    return out;
}

Error surface_error(const Surface& surface, Error error, const SurfaceBody& read) {
    const std::string path = surface_path(surface, error.param, read);
    if (const size_t at = error.message.find(error.param);
        !error.param.empty() && at != std::string::npos)
        error.message.replace(at, error.param.size(), path);
    error.param = path;
    return error;
}

Error surface_failure(const Outcome& outcome) {
    if (outcome.status == Status::cancelled)
        return make_error(ErrorKind::closed, "the request was cancelled", "overloaded");
    if (outcome.error && failure_is_told(outcome.error->code)) return *outcome.error;
    return make_error(ErrorKind::internal, "the model could not be run", "internal_error");
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
