// Whatever parses is written and parsed again to the same value, in every style.
#include "json_internal.hpp"

#include <cstdint>
#include <cstdlib>

namespace {
void require(bool condition) {
    if (!condition) std::abort();
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using valar::Json;
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const std::string loose = Json(text).write();  // any bytes at all make a string
    require(Json::parse(loose).ok());
    auto value = Json::parse(text);
    if (!value) return 0;
    const valar::JsonStyle styles[] = {{}, valar::json_pretty, valar::json_python};
    for (const valar::JsonStyle style : styles) {
        const std::string written = value->write(style);
        const auto again = Json::parse(written);
        require(again && *again == *value && again->write(style) == written);
    }
    const std::string canonical = value->canonical();
    const auto again = Json::parse(canonical);
    require(again && again->canonical() == canonical);

    // edits keep an object's index true
    Json copy = *value;
    for (const valar::JsonMember& member : value->members()) {
        require(&(*value)[member.key] == &member.value);
        require(copy.erase(member.key) && !copy.contains(member.key));
        copy.set(member.key, member.value);
    }
    require(copy == *value && !(copy.push(1) == *value && !value->is_array()));
    return 0;
}
