// >>grammar
#include "prologue.hpp"

#include "grammar/schema_document.hpp"

#include "base/text.hpp"
#include "grammar/number.hpp"
#include "unicode_internal.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr uint32_t kMostDepth = 64, kMostProperties = 5'000, kMostEnum = 1'000;
constexpr size_t kMostCharacters = 120'000, kMostUri = 2048;

struct Totals {
    size_t properties = 0, values = 0, characters = 0, nesting = 0;
};

// What kind of value a keyword has.
enum class Holds : uint8_t {
    count,
    number,
    schema,
    schemas,
    named_schemas,
    names,
    array,
    string,
    truth,
    schema_or_list,
    lists,
    type
};
struct Keyword {
    std::string_view name;
    Holds holds;
};
constexpr Keyword keywords[] = {
    {"type", Holds::type},
    {"enum", Holds::array},
    {"properties", Holds::named_schemas},
    {"patternProperties", Holds::named_schemas},
    {"additionalProperties", Holds::schema},
    {"required", Holds::names},
    {"items", Holds::schema_or_list},
    {"prefixItems", Holds::schemas},
    {"additionalItems", Holds::schema},
    {"contains", Holds::schema},
    {"minItems", Holds::count},
    {"maxItems", Holds::count},
    {"minLength", Holds::count},
    {"maxLength", Holds::count},
    {"minProperties", Holds::count},
    {"maxProperties", Holds::count},
    {"minContains", Holds::count},
    {"maxContains", Holds::count},
    {"minimum", Holds::number},
    {"maximum", Holds::number},
    {"multipleOf", Holds::number},
    {"pattern", Holds::string},
    {"format", Holds::string},
    {"$ref", Holds::string},
    {"$dynamicRef", Holds::string},
    {"$recursiveRef", Holds::string},
    {"anyOf", Holds::schemas},
    {"oneOf", Holds::schemas},
    {"allOf", Holds::schemas},
    {"not", Holds::schema},
    {"if", Holds::schema},
    {"then", Holds::schema},
    {"else", Holds::schema},
    {"propertyNames", Holds::schema},
    {"unevaluatedProperties", Holds::schema},
    {"dependentRequired", Holds::lists},
    {"dependentSchemas", Holds::named_schemas},
    {"dependencies", Holds::lists},
    {"$defs", Holds::named_schemas},
    {"definitions", Holds::named_schemas},
    {"uniqueItems", Holds::truth},
};

bool is_schema(const Json& v) { return v.is_bool() || v.is_object(); }

bool holds(const Json& v, Holds kind) {
    const auto all = [&](auto items, const auto& test) {
        return std::all_of(items.begin(), items.end(), test);
    };
    switch (kind) {
        case Holds::count: return v.is_number() && v.as_double() >= 0 && is_whole_number(v);
        case Holds::number: return v.is_number();
        case Holds::schema: return is_schema(v);
        case Holds::string: return v.is_string();
        case Holds::truth: return v.is_bool();
        case Holds::array: return v.is_array();
        case Holds::schemas: return v.is_array() && all(v.items(), is_schema);
        case Holds::schema_or_list: return is_schema(v) || holds(v, Holds::schemas);
        case Holds::named_schemas:
            return v.is_object() &&
                   all(v.members(), [](const JsonMember& m) { return is_schema(m.value); });
        case Holds::names:
            return v.is_array() && all(v.items(), [](const Json& i) { return i.is_string(); });
        case Holds::lists:
            return v.is_object() && all(v.members(), [](const JsonMember& m) {
                       return is_schema(m.value) || holds(m.value, Holds::names);
                   });
        case Holds::type: return v.is_string() || holds(v, Holds::names);
    }
    return false;
}

bool known_type(std::string_view name) {
    for (const std::string_view t :
         {"null", "boolean", "integer", "number", "string", "array", "object"})
        if (t == name) return true;
    return false;
}

std::string escaped(std::string_view key) {
    std::string out;
    for (const char c : key)
        if (c == '~') out += "~0";
        else if (c == '/') out += "~1";
        else out += c;
    return out;
}

bool find_pointer(const Json& at, const Json& wanted, std::string& path, const StackLimit& stack,
                  int depth = 0) {
    if (&at == &wanted) return true;
    if (depth > 200 || stack.is_low()) return false;
    const size_t size = path.size();
    for (size_t i = 0; i < at.items().size(); ++i) {
        path += "/" + std::to_string(i);
        if (find_pointer(at.items()[i], wanted, path, stack, depth + 1)) return true;
        path.resize(size);
    }
    for (const JsonMember& m : at.members()) {
        path += "/" + escaped(m.key);
        if (find_pointer(m.value, wanted, path, stack, depth + 1)) return true;
        path.resize(size);
    }
    return false;
}

size_t nesting_of(const Json& value) {
    size_t most = 0;
    for (const Json& item : value.items()) most = std::max(most, nesting_of(item));
    for (const JsonMember& m : value.members()) most = std::max(most, nesting_of(m.value));
    return most + (value.is_array() || value.is_object());
}

Result<void> check_schema(const SchemaDocument& document, const Json& schema, uint32_t depth,
                          Totals& totals);

Result<void> check_inside(const SchemaDocument& document, const Json& value, Holds kind,
                          uint32_t depth, Totals& totals) {
    const bool single = kind == Holds::schema ||
                        (kind == Holds::schema_or_list && is_schema(value));
    if (single) return check_schema(document, value, depth, totals);
    for (const Json& item : value.items())
        if (kind == Holds::schemas || kind == Holds::schema_or_list)
            if (auto ok = check_schema(document, item, depth, totals); !ok) return ok;
    for (const JsonMember& m : value.members())
        if ((kind == Holds::named_schemas || kind == Holds::lists) && is_schema(m.value))
            if (auto ok = check_schema(document, m.value, depth, totals); !ok) return ok;
    return {};
}

Result<void> check_schema(const SchemaDocument& document, const Json& schema, uint32_t depth,
                          Totals& totals) {
    if (depth > kMostDepth) return document.refuse(schema, "", "schemas nest deeper than 64");
    if (document.stack_is_low())
        return document.refuse(schema, "", "nests too deep for this thread's stack");
    for (const char* keyword : {"enum", "const"})
        totals.nesting = std::max(totals.nesting, nesting_of(schema[keyword]));
    for (const char* keyword :
         {"$id", "id", "$anchor", "$dynamicAnchor", "$ref", "$dynamicRef", "$recursiveRef"})
        if (schema[keyword].as_string().size() > kMostUri)
            return document.refuse(schema, keyword, "is longer than 2,048 bytes");
    for (const Keyword& keyword : keywords) {
        const Json* value = schema.find(keyword.name);
        if (!value) continue;
        if (!holds(*value, keyword.holds))
            return document.refuse(schema, keyword.name, "has a value of the wrong kind");
        if (keyword.holds == Holds::count && value->as_double() > most_repeats)
            return document.refuse(schema, keyword.name, "is above 100,000");
        if (keyword.holds == Holds::type) {
            if (value->is_string() && !known_type(value->as_string()))
                return document.refuse(schema, "type", "names no type");
            for (const Json& t : value->items())
                if (!known_type(t.as_string()))
                    return document.refuse(schema, "type", "names no type");
        }
        if (keyword.name == "properties") {
            totals.properties += value->size();
            for (const JsonMember& m : value->members()) totals.characters += m.key.size();
        }
        if (keyword.name == "enum") {
            totals.values += value->size();
            for (const Json& v : value->items()) totals.characters += v.as_string().size();
        }
        if (auto ok = check_inside(document, *value, keyword.holds, depth + 1, totals); !ok)
            return ok;
        if (totals.properties > kMostProperties)
            return document.refuse(schema, keyword.name, "there are more than 5,000 properties");
        if (totals.values > kMostEnum)
            return document.refuse(schema, keyword.name, "there are more than 1,000 enum values");
        if (totals.characters > kMostCharacters)
            return document.refuse(schema, keyword.name,
                                   "names and values have more than 120,000 characters");
    }
    return {};
}

}  // namespace

bool is_whole_number(const Json& value) {
    return value.is_integer() || (value.is_real() && ExactDecimal::of(value).is_integer());
}

bool same_json(const Json& a, const Json& b) {
    if (a.is_number() && b.is_number())
        return compare(ExactDecimal::of(a), ExactDecimal::of(b)) == 0;
    if (a.is_array() && b.is_array())
        return std::equal(a.items().begin(), a.items().end(), b.items().begin(), b.items().end(),
                          same_json);
    if (a.is_object() && b.is_object()) {
        if (a.size() != b.size()) return false;
        for (const JsonMember& m : a.members()) {
            const Json* other = b.find(m.key);
            if (!other || !same_json(m.value, *other)) return false;
        }
        return true;
    }
    return a == b;
}

Result<void> SchemaDocument::check() {
    if (!is_schema(root_)) return refuse(root_, "", "a schema is an object or a boolean");
    Totals totals;
    auto ok = check_schema(*this, root_, 0, totals);
    values_nesting_ = totals.nesting;
    return ok;
}

std::string SchemaDocument::pointer(const Json& schema) const {
    std::string path;
    return find_pointer(root_, schema, path, stack_) ? path : "";
}

Error SchemaDocument::refuse(const Json& schema, std::string_view keyword,
                             std::string_view why) const {
    std::string place = pointer(schema);
    if (!keyword.empty()) place += "/" + escaped(keyword);
    if (place.size() > 300) place = printable(place, 300);
    return make_error(ErrorKind::invalid_request,
                      format("schema at '%s': %.*s", place.c_str(), int(why.size()), why.data()),
                      "invalid_json_schema", place);
}

bool SchemaDocument::refs_hide_siblings() const {
    const std::string_view draft = root_["$schema"].as_string();
    for (const std::string_view old : {"draft-07", "draft-06", "draft-04", "draft-03"})
        if (draft.find(old) != draft.npos) return true;
    return false;
}

namespace {

const Json* by_pointer(const Json& root, std::string_view path) {
    const Json* at = &root;
    while (!path.empty()) {
        if (path[0] != '/') return nullptr;
        const size_t end = std::min(path.find('/', 1), path.size());
        std::string key;
        for (size_t i = 1; i < end; ++i) {
            if (path[i] == '~' && i + 1 < end) key += path[++i] == '1' ? '/' : '~';
            else if (path[i] == '%' && i + 2 < end && hex_value(path[i + 1]) >= 0 &&
                     hex_value(path[i + 2]) >= 0) {
                key += char(hex_value(path[i + 1]) * 16 + hex_value(path[i + 2]));
                i += 2;
            } else key += path[i];
        }
        path.remove_prefix(end);
        if (at->is_array()) {
            char* last = nullptr;
            const unsigned long index = std::strtoul(key.c_str(), &last, 10);
            if (key.empty() || *last || index >= at->size()) return nullptr;
            at = &at->items()[index];
        } else if (!(at = at->find(key))) {
            return nullptr;
        }
    }
    return at;
}

// RFC 3986, section 5.2: a reference against the base where it stands; fragments are off both.
struct Uri {
    std::string scheme, authority, path, query;  // with their marks
    explicit Uri(std::string_view text) {
        const size_t colon = text.find_first_of(":/?");
        if (colon != text.npos && colon && text[colon] == ':') take(text, colon + 1, scheme);
        if (text.substr(0, 2) == "//")
            take(text, std::min(text.find_first_of("/?", 2), text.size()), authority);
        take(text, std::min(text.find('?'), text.size()), path);
        query = text;
    }
    static void take(std::string_view& text, size_t size, std::string& out) {
        out = text.substr(0, size);
        text.remove_prefix(size);
    }
};
std::string without_dots(std::string_view path) {
    std::string out;
    while (!path.empty()) {
        const size_t end = std::min(path.find('/', 1), path.size());
        const std::string_view part = path.substr(0, end);
        if (part == "/..") out.erase(std::min(out.rfind('/'), out.size()));
        else if (part != "/.") out += part;
        path.remove_prefix(end);
        if (path.empty() && (part == "/.." || part == "/.")) out += '/';
    }
    return out;
}
std::string resolved_uri(const std::string& base, std::string_view reference) {
    Uri to(reference), from(base);
    if (to.scheme.empty()) {
        to.scheme = from.scheme;
        if (to.authority.empty()) {
            to.authority = from.authority;
            if (to.path.empty() && to.query.empty()) to.query = from.query;
            if (to.path.empty()) to.path = from.path;
            else if (to.path[0] != '/')
                to.path = from.path.substr(0, from.path.rfind('/') + 1) + to.path;
        }
    }
    return to.scheme + to.authority + without_dots(to.path) + to.query;
}

}  // namespace

// Of all bases and names; what is left out of them is never found, so the schema ends here.
bool SchemaDocument::may_keep(std::string_view uri) {
    const uint64_t bytes = uri.size() + 200;
    if (uri.size() > kMostUri || budget_.bytes < bytes) budget_.work = 0;
    if (!budget_.take(1 + uri.size() / 64)) return false;
    budget_.bytes -= bytes;
    return true;
}

void SchemaDocument::index(const Json& at, const std::string* base, int depth, bool named) {
    if (depth > 200 || (!at.is_object() && !at.is_array())) return;
    if (stack_is_low()) budget_.work = 0;
    if (budget_.spent()) return;
    if (named) {  // keys of it are names, not keywords
        for (const JsonMember& m : at.members()) index(m.value, base, depth + 1);
        return;
    }
    const bool hidden = refs_hide_siblings() && at.contains("$ref");
    for (const char* keyword : {"$id", "id"})
        if (const std::string_view id = at[keyword].as_string();
            !id.empty() && id.size() <= kMostUri && !hidden) {
            const size_t hash = std::min(id.find('#'), id.size());
            std::string uri = hash ? resolved_uri(*base, id.substr(0, hash)) : *base;
            if (!may_keep(uri)) return;
            if (hash) base = &uris_.emplace_back(std::move(uri));
            by_uri_.try_emplace(*base + (hash + 1 < id.size() ? std::string(id.substr(hash)) : ""),
                                &at);
            break;
        }
    if (depth == 0) by_uri_[*base] = &at;
    for (const char* keyword : {"$anchor", "$dynamicAnchor"})
        if (const std::string_view name = at[keyword].as_string();
            !name.empty() && name.size() <= kMostUri) {
            if (!may_keep(*base)) return;
            by_uri_.try_emplace(*base + "#" + std::string(name), &at);
            dynamic_[std::string(name)] += keyword[1] == 'd';
        }
    if (at["$recursiveAnchor"].as_bool()) ++dynamic_["#"];
    if (!base->empty() && at.is_object()) bases_[&at] = base;
    for (const Json& item : at.items()) index(item, base, depth + 1);
    for (const JsonMember& m : at.members()) {
        const auto known = std::find_if(std::begin(keywords), std::end(keywords),
                                        [&](const Keyword& k) { return k.name == m.key; });
        const Holds kind = known == std::end(keywords) ? Holds::schema : known->holds;
        if (m.key != "enum" && m.key != "const" && m.key != "default" && m.key != "examples")
            index(m.value, base, depth + 1, kind == Holds::named_schemas || kind == Holds::lists);
    }
}

// A dynamic reference is known where only one schema can be meant.
const Json* SchemaDocument::resolve(const Json& schema, const char* keyword) {
    if (uris_.empty()) index(root_, &uris_.emplace_back(), 0);
    const std::string_view reference = schema[keyword].as_string();
    const size_t hash = std::min(reference.find('#'), reference.size());
    const std::string_view fragment = reference.substr(std::min(hash + 1, reference.size()));
    if (const std::string_view name = keyword; name != "$ref") {
        const auto dynamic = dynamic_.find(name == "$dynamicRef" ? fragment : "#");
        if (dynamic != dynamic_.end() && dynamic->second > 1) return nullptr;
    }
    const auto base = bases_.find(&schema);
    const std::string uri = resolved_uri(base == bases_.end() ? "" : *base->second,
                                         reference.substr(0, hash));
    const bool is_pointer = fragment.empty() || fragment[0] == '/';
    const auto at = by_uri_.find(is_pointer ? uri : uri + "#" + std::string(fragment));
    if (at == by_uri_.end()) return nullptr;
    const Json* found = is_pointer ? by_pointer(*at->second, fragment) : at->second;
    return found && is_schema(*found) ? found : nullptr;
}

Result<DfaPtr> SchemaDocument::pattern(const std::string& text, Spelling spelling) {
    auto& known = patterns_[{text, spelling}];
    if (known) return known;
    auto dfa = pattern_dfa(text, spelling, true, budget_);
    if (dfa) known = *dfa;
    return dfa;
}

bool SchemaDocument::matches(const std::string& text, std::string_view value) {
    auto dfa = pattern(text, Spelling::raw);
    return !dfa || (*dfa)->match(value) >= 0;
}

// ---- Validity ------------------------------------------------------------------------------------

namespace {

bool has_type(const Json& value, std::string_view type) {
    if (type == "null") return value.is_null();
    if (type == "boolean") return value.is_bool();
    if (type == "integer") return is_whole_number(value);
    if (type == "number") return value.is_number();
    if (type == "string") return value.is_string();
    if (type == "array") return value.is_array();
    return value.is_object();
}

}  // namespace

bool SchemaDocument::is_valid_number(const Json& schema, const Json& value) {
    const ExactDecimal number = ExactDecimal::of(value);
    const auto order = [&](const char* keyword) {
        return compare(number, ExactDecimal::of(schema[keyword]));
    };
    if (schema["minimum"].is_number() && order("minimum") < 0) return false;
    if (schema["maximum"].is_number() && order("maximum") > 0) return false;
    if (schema["exclusiveMinimum"].is_number() && order("exclusiveMinimum") <= 0) return false;
    if (schema["exclusiveMaximum"].is_number() && order("exclusiveMaximum") >= 0) return false;
    const auto divisor = schema.contains("multipleOf") ? Divisor::of(schema["multipleOf"])
                                                       : std::nullopt;
    return !divisor || divisor->divides(number);
}

bool SchemaDocument::is_valid_string(const Json& schema, std::string_view text) {
    const size_t count = utf8_count(text);
    if (schema["minLength"].is_number() && double(count) < schema["minLength"].as_double())
        return false;
    if (schema["maxLength"].is_number() && double(count) > schema["maxLength"].as_double())
        return false;
    if (schema["pattern"].is_string() && !matches(std::string(schema["pattern"].as_string()), text))
        return false;
    if (const auto format = schema["format"]; format.is_string())
        if (auto dfa = format_dfa(format.as_string(), Spelling::raw);
            dfa && ((*dfa)->match(text) < 0 || count > most_format_chars(format.as_string())))
            return false;
    return true;
}

bool SchemaDocument::is_valid_array(const Json& schema, const Json& value, int depth) {
    const double size = double(value.size());
    if (schema["minItems"].is_number() && size < schema["minItems"].as_double()) return false;
    if (schema["maxItems"].is_number() && size > schema["maxItems"].as_double()) return false;
    const bool old = schema["items"].is_array();
    const Json& first = old ? schema["items"] : schema["prefixItems"];
    const Json* rest = schema.find(old ? "additionalItems" : "items");
    for (size_t i = 0; i < value.size(); ++i) {
        const Json* item = i < first.size() ? &first[i] : rest;
        if (item && !is_valid(*item, value[i], depth)) return false;
    }
    if (const Json* contains = schema.find("contains")) {
        double count = 0;
        for (const Json& item : value.items()) count += is_valid(*contains, item, depth);
        if (count < (schema.contains("minContains") ? schema["minContains"].as_double() : 1))
            return false;
        if (schema.contains("maxContains") && count > schema["maxContains"].as_double())
            return false;
    }
    if (schema["uniqueItems"].as_bool())
        for (size_t i = 0; i < value.size(); ++i)
            for (size_t j = 0; j < i; ++j)
                if (same_json(value[i], value[j])) return false;
    return true;
}

bool SchemaDocument::is_valid_object(const Json& schema, const Json& value, int depth) {
    const double size = double(value.size());
    if (schema["minProperties"].is_number() && size < schema["minProperties"].as_double())
        return false;
    if (schema["maxProperties"].is_number() && size > schema["maxProperties"].as_double())
        return false;
    for (const Json& name : schema["required"].items())
        if (!value.contains(name.as_string())) return false;
    for (const JsonMember& m : value.members()) {
        bool known = false;
        if (const Json* property = schema["properties"].find(m.key)) {
            known = true;
            if (!is_valid(*property, m.value, depth)) return false;
        }
        for (const JsonMember& p : schema["patternProperties"].members()) {
            if (!matches(p.key, m.key)) continue;
            known = true;
            if (!is_valid(p.value, m.value, depth)) return false;
        }
        const Json* additional = schema.find("additionalProperties");
        if (!known && additional && !is_valid(*additional, m.value, depth)) return false;
        if (const Json* names = schema.find("propertyNames");
            names && !is_valid(*names, Json(m.key), depth))
            return false;
        for (const char* keyword : {"dependentRequired", "dependentSchemas", "dependencies"}) {
            const Json* then = schema[keyword].find(m.key);
            if (!then) continue;
            for (const Json& name : then->items())
                if (!value.contains(name.as_string())) return false;
            if (!then->is_array() && !is_valid(*then, value, depth)) return false;
        }
    }
    return true;
}

bool SchemaDocument::is_valid(const Json& schema, const Json& value, int depth) {
    if (schema.is_bool()) return schema.as_bool();
    if (stack_is_low()) budget_.work = 0;
    if (depth > 200 || !budget_.take(1)) return false;
    ++depth;
    for (const char* keyword : reference_keywords) {
        if (!schema.contains(keyword)) continue;
        const Json* target = resolve(schema, keyword);
        if (target && !is_valid(*target, value, depth)) return false;
        if (refs_hide_siblings()) return true;
    }
    if (const Json* type = schema.find("type")) {
        bool any = type->is_string() && has_type(value, type->as_string());
        for (const Json& t : type->items()) any |= has_type(value, t.as_string());
        if (!any) return false;
    }
    if (const Json* constant = schema.find("const"); constant && !same_json(*constant, value))
        return false;
    if (const Json* list = schema.find("enum")) {
        bool any = false;
        for (const Json& v : list->items()) any |= same_json(v, value);
        if (!any) return false;
    }
    size_t count = 0;
    for (const Json& s : schema["allOf"].items())
        if (!is_valid(s, value, depth)) return false;
    for (const Json& s : schema["anyOf"].items()) count += is_valid(s, value, depth);
    if (schema.contains("anyOf") && !count) return false;
    count = 0;
    for (const Json& s : schema["oneOf"].items()) count += is_valid(s, value, depth);
    if (schema.contains("oneOf") && count != 1) return false;
    if (const Json* s = schema.find("not"); s && is_valid(*s, value, depth)) return false;
    if (const Json* s = schema.find("if")) {
        const Json* then = schema.find(is_valid(*s, value, depth) ? "then" : "else");
        if (then && !is_valid(*then, value, depth)) return false;
    }
    if (value.is_number()) return is_valid_number(schema, value);
    if (value.is_string()) return is_valid_string(schema, value.as_string());
    if (value.is_array()) return is_valid_array(schema, value, depth);
    return !value.is_object() || is_valid_object(schema, value, depth);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif
