// >>grammar
// A place in the text has to satisfy a set of schemas and to miss another: a conjunction of signed
// literals. `expand` takes it apart into branches without choices, each a plain set of rules by type;
// so allOf, $ref, if, not, oneOf and dependencies need no rules of their own, and what they mean is
// exact. Equal conjunctions are one part of the grammar: that makes recursion end.
#include "prologue.hpp"

#include "grammar/grammar.hpp"
#include "grammar/number.hpp"
#include "grammar/regex.hpp"
#include "grammar/schema_document.hpp"
#include "json_internal.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

constexpr size_t kMostBranches = 512, kMostPatterns = 6;
constexpr std::string_view kNegated = "where a schema must not match";
constexpr std::string_view kLongStrings = "the strings are too long to be told apart";
constexpr std::string_view kDivisors = "except for whole numbers to 20,000 and binary fractions";
constexpr uint32_t kMostUnique = 8;

enum : uint32_t {
    t_null = 1,
    t_false = 2,
    t_true = 4,
    t_integer = 8,
    t_fraction = 16,
    t_string = 32,
    t_array = 64,
    t_object = 128,
    t_all = 255
};

uint32_t types_of(std::string_view name) {
    if (name == "null") return t_null;
    if (name == "boolean") return t_false | t_true;
    if (name == "integer") return t_integer;
    if (name == "number") return t_integer | t_fraction;
    if (name == "string") return t_string;
    return name == "array" ? t_array : t_object;
}
uint32_t type_of(const Json& v) {
    if (v.is_null()) return t_null;
    if (v.is_bool()) return v.as_bool() ? t_true : t_false;
    if (v.is_number()) return is_whole_number(v) ? t_integer : t_fraction;
    return v.is_string() ? t_string : v.is_array() ? t_array : t_object;
}

struct Literal {
    const Json* schema;
    bool positive = true;
    bool operator<(const Literal& o) const {
        return std::pair(schema, positive) < std::pair(o.schema, o.positive);
    }
    bool operator==(const Literal&) const = default;
};
using Conjunction = std::vector<Literal>;  // in the order found, each once

void add_literal(Conjunction& out, Literal literal) {
    if (std::find(out.begin(), out.end(), literal) == out.end()) out.push_back(literal);
}

// One way to satisfy a conjunction: rules by type and nothing to choose.
struct Branch {
    uint32_t types = t_all;
    Conjunction done = {};
    std::optional<std::vector<const Json*>> values = {};
    std::vector<const Json*> excluded = {};
    NumberRules numbers = {};
    uint32_t least_chars = 0, most_chars = unlimited;
    struct Language {
        std::string name;
        bool format, positive;
        const Json* schema;
    };
    std::vector<Language> languages = {};
    struct Counted {
        Literal literal;
        uint32_t least, most;
        const Json* schema;
    };
    std::vector<const Json*> arrays = {}, objects = {};  // schemas with rules for items, members
    std::vector<Counted> contains = {};
    uint32_t least_items = 0, most_items = unlimited;
    const Json* unique = nullptr;
    std::vector<std::string> required = {}, absent = {};
    std::vector<Literal> names = {};  // propertyNames
    uint32_t least_members = 0, most_members = unlimited;
    // Schemas of whose keywords for members that are not declared one member must miss one, and
    // what else a member must be because of that.
    std::vector<const Json*> broken = {};
    std::vector<std::pair<std::string, Literal>> also = {};
    // Schemas with unevaluatedProperties, each with all schemas that evaluate properties for it.
    struct Unevaluated {
        const Json* schema;
        std::vector<const Json*> scope;
    };
    std::vector<Unevaluated> unevaluated = {};
    std::vector<std::vector<Conjunction>> choices = {};
    std::vector<const Json*> one_ofs = {};  // lists that become choices when all else is known
};

}  // namespace

class SchemaCompiler {
public:
    SchemaCompiler(GrammarBuilder& builder, const Json& root, bool strict)
        : builder_(builder), document_(root, builder.budget()), root_(root), strict_(strict) {}

    Result<Part> compile() {
        if (auto ok = document_.check(); !ok) return std::move(ok.error());
        const Part part = part_of({{&root_}});
        if (builder_.budget().spent()) exceed();
        if (failed_) return std::move(error_);
        if (!part) return document_.refuse(root_, "", "nothing matches it");
        return part;
    }

private:
    // What cannot be promised: the end under strict, else left out.
    bool refuse(const Json& schema, std::string_view keyword, std::string_view why = {}) {
        if (builder_.budget().spent()) return exceed();
        if (!strict_ || probing_) return true;
        return fail(document_.refuse(
            schema, keyword, "is not supported" + (why.empty() ? "" : ": " + std::string(why))));
    }
    bool fail(Error error) {
        if (!failed_) error_ = std::move(error);
        failed_ = true;
        return false;
    }
    bool stack_is_low() {
        return document_.stack_is_low() &&
               !fail(document_.refuse(root_, "", "nests too deep for this thread's stack"));
    }
    bool exceed() { return fail(document_.refuse(root_, "", budget_error().message)); }
    const Json* made(const Json* of, const std::string& key, Json schema) {
        auto& known = made_[{of, key}];
        if (!known) claim(*(known = document_.make(std::move(schema))));
        return known;
    }
    // Only in schemas of our own making have our keywords a meaning.
    void claim(const Json& schema) {
        own_[&schema] = true;
        for (const char* keyword : {"items", "contains"})
            if (const Json* inside = schema.find(keyword)) own_[inside] = true;
        for (const Json& inside : schema["prefixItems"].items()) own_[&inside] = true;
        for (const JsonMember& inside : schema["properties"].members()) own_[&inside.value] = true;
    }
    // A schema of one keyword of ours: {"\1not": i} stands for what the i-th schema refuses.
    Json negation_of(const Json* schema) {
        negated_.push_back(schema);
        return Json::object().set("\1not", uint64_t(negated_.size() - 1));
    }

    // ---- Positive literals
    using Todo = Conjunction;
    bool apply(Branch& b, const Json& s, Todo& todo) {
        if (s.is_bool()) return s.as_bool();
        for (const char* keyword : reference_keywords) {
            if (!s.contains(keyword)) continue;
            const Json* target = document_.resolve(s, keyword);
            if (!target && !refuse(s, keyword, "its target is not in this document, or not fixed"))
                return false;
            if (target) todo.push_back({target});
            if (target && document_.refs_hide_siblings()) return true;
        }
        if (s.contains("unevaluatedItems") && !refuse(s, "unevaluatedItems")) return false;
        if (own_.count(&s) && !apply_own(b, s, todo)) return false;
        return apply_values(b, s) && apply_number(b, s) && apply_string(b, s) &&
               apply_array(b, s) && apply_object(b, s, todo) && apply_logic(b, s, todo);
    }
    bool apply_own(Branch& b, const Json& s, Todo& todo) {
        if (const Json* i = s.find("\1not"))
            todo.push_back({negated_[size_t(i->as_uint())], false});
        if (const Json* i = s.find("\1excluded"))
            for (const Json& v : (*negated_[size_t(i->as_uint())])["enum"].items())
                b.excluded.push_back(&v);
        if (const Json* i = s.find("\1excluded1"))
            b.excluded.push_back(negated_[size_t(i->as_uint())]->find("const"));
        if (const Json* name = s.find("\1absent")) b.absent.emplace_back(name->as_string());
        if (const Json* i = s.find("\1broken")) b.broken.push_back(negated_[size_t(i->as_uint())]);
        if (const Json* p = s.find("\1notPattern"))
            b.languages.push_back({std::string(p->as_string()), false, false, &s});
        if (const Json* f = s.find("\1notFormat"))
            b.languages.push_back({std::string(f->as_string()), true, false, &s});
        if (const Json* m = s.find("\1notMultiple"))
            b.numbers.not_multiples.push_back(*Divisor::of(*m));
        if (const Json* t = s.find("\1types")) b.types &= uint32_t(t->as_uint());
        return b.types != 0;
    }
    bool apply_values(Branch& b, const Json& s) {
        if (const Json* type = s.find("type")) {
            uint32_t mask = type->is_string() ? types_of(type->as_string()) : 0;
            for (const Json& t : type->items()) mask |= types_of(t.as_string());
            b.types &= mask;
        }
        std::vector<const Json*> values;
        if (const Json* list = s.find("enum"))
            for (const Json& v : list->items()) values.push_back(&v);
        if (const Json* v = s.find("const")) values.push_back(v);
        if (s.contains("enum") || s.contains("const"))
            if (!b.values) b.values = std::move(values);
        return b.types != 0;
    }
    static uint32_t count_of(const Json& s, const char* keyword, uint32_t otherwise) {
        const Json* v = s.find(keyword);
        return v ? uint32_t(std::min(v->as_double(), double(most_repeats))) : otherwise;
    }
    static void tighten(std::optional<NumberBound>& bound, NumberBound to, int sign) {
        const int order = bound ? compare(to.value, bound->value) * sign : 1;
        if (order > 0 || (order == 0 && to.exclusive)) bound = std::move(to);
    }
    bool apply_number(Branch& b, const Json& s) {
        const bool low_open = s["exclusiveMinimum"].as_bool(),
                   high_open = s["exclusiveMaximum"].as_bool();
        if (const Json* v = s.find("minimum"))
            tighten(b.numbers.lower, {ExactDecimal::of(*v), low_open}, 1);
        if (const Json* v = s.find("maximum"))
            tighten(b.numbers.upper, {ExactDecimal::of(*v), high_open}, -1);
        if (const Json& v = s["exclusiveMinimum"]; v.is_number())
            tighten(b.numbers.lower, {ExactDecimal::of(v), true}, 1);
        if (const Json& v = s["exclusiveMaximum"]; v.is_number())
            tighten(b.numbers.upper, {ExactDecimal::of(v), true}, -1);
        if (const Json* m = s.find("multipleOf")) {
            if (!(b.types & (t_integer | t_fraction))) return true;
            const auto divisor = Divisor::of(*m);
            if ((!divisor || !divisor->is_binary()) && !refuse(s, "multipleOf", kDivisors))
                return false;
            if (!divisor) return true;
            if (divisor->units > 1 || divisor->digits) b.numbers.multiples.push_back(*divisor);
            if (!divisor->digits) b.types &= ~uint32_t(t_fraction);
        }
        return b.types != 0;
    }
    bool apply_string(Branch& b, const Json& s) {
        b.least_chars = std::max(b.least_chars, count_of(s, "minLength", 0));
        b.most_chars = std::min(b.most_chars, count_of(s, "maxLength", unlimited));
        if (const Json* p = s.find("pattern"))
            b.languages.push_back({std::string(p->as_string()), false, true, &s});
        if (const Json* f = s.find("format")) {
            const uint32_t most = most_format_chars(f->as_string());
            if (most) b.most_chars = std::min(b.most_chars, most);
            if (most) b.languages.push_back({std::string(f->as_string()), true, true, &s});
            else if ((b.types & t_string) && !refuse(s, "format", "it is not a known format"))
                return false;
        }
        return true;
    }
    bool apply_array(Branch& b, const Json& s) {
        b.least_items = std::max(b.least_items, count_of(s, "minItems", 0));
        b.most_items = std::min(b.most_items, count_of(s, "maxItems", unlimited));
        if (s.contains("items") || s.contains("prefixItems")) b.arrays.push_back(&s);
        if (const Json* c = s.find("contains"))
            b.contains.push_back(
                {{c}, count_of(s, "minContains", 1), count_of(s, "maxContains", unlimited), &s});
        if (s["uniqueItems"].as_bool()) b.unique = &s;
        return true;
    }
    bool apply_object(Branch& b, const Json& s, Todo& todo) {
        b.least_members = std::max(b.least_members, count_of(s, "minProperties", 0));
        b.most_members = std::min(b.most_members, count_of(s, "maxProperties", unlimited));
        for (const Json& name : s["required"].items()) b.required.emplace_back(name.as_string());
        if (s.contains("properties") || s.contains("patternProperties") ||
            s.contains("additionalProperties"))
            b.objects.push_back(&s);
        if (const Json* names = s.find("propertyNames")) b.names.push_back({names});
        if (!(b.types & t_object)) return true;
        if (s.contains("unevaluatedProperties") && !document_.refs_hide_siblings())
            b.unevaluated.push_back({&s, {}});
        for (const char* keyword : {"dependentRequired", "dependentSchemas", "dependencies"})
            for (const JsonMember& m : s[keyword].members()) {
                const Json* has = made(&m.value, "has",
                                       Json::object().set("required", Json::array().push(m.key)));
                const Json* then = &m.value;
                if (then->is_array()) {
                    if (then->empty()) continue;
                    then = made(&m.value, "then", Json::object().set("required", *then));
                }
                const Json* other = made(
                    &m.value, "other", Json::object().set("\1types", uint32_t(t_all & ~t_object)));
                b.choices.push_back({{{other}}, {{has, false}}, {{has}, {then}}});
            }
        (void)todo;
        return true;
    }
    bool apply_logic(Branch& b, const Json& s, Todo& todo) {
        for (const Json& part : s["allOf"].items()) todo.push_back({&part});
        if (const Json* part = s.find("not")) todo.push_back({part, false});
        if (const Json* any = s.find("anyOf")) {
            std::vector<Conjunction> ways;
            for (const Json& part : any->items()) ways.push_back({{&part}});
            b.choices.push_back(std::move(ways));
        }
        if (const Json* condition = s.find("if")) {
            Conjunction yes = {{condition}}, no = {{condition, false}};
            if (const Json* then = s.find("then")) yes.push_back({then});
            if (const Json* otherwise = s.find("else")) no.push_back({otherwise});
            if (yes.size() + no.size() > 2) b.choices.push_back({yes, no});
        }
        if (const Json* one = s.find("oneOf")) b.one_ofs.push_back(one);
        return true;
    }
    // Each alone; where two cannot hold together in this branch there is no need to say so.
    std::vector<Conjunction> one_of(Branch context, const Json& list) {
        context.choices.clear();
        context.one_ofs.clear();
        const size_t count = list.size();
        std::vector<Conjunction> ways(count);
        for (size_t i = 0; i < count; ++i) ways[i].push_back({&list[i]});
        for (size_t i = 0; i < count && !failed_; ++i)
            for (size_t j = 0; j < i; ++j) {
                if (is_apart(list[i], list[j]) ||
                    is_impossible({{&list[i]}, {&list[j]}}, 0, context))
                    continue;
                ways[i].push_back({&list[j], false});
                ways[j].push_back({&list[i], false});
            }
        return ways;
    }
    // Whether two schemas exclude each other wherever they stand.
    bool is_apart(const Json& a, const Json& b) {
        const auto [at, is_new] = apart_.try_emplace({&a, &b}, false);
        if (is_new) at->second = is_impossible({{&a}, {&b}}, 0);
        return at->second;
    }

    // ---- Negative literals: the ways not to satisfy a schema
    bool negate(Branch& b, const Json& s, Todo& todo) {
        if (s.is_bool()) return !s.as_bool();
        std::vector<Conjunction> ways;
        const auto way = [&](const std::string& key, Json schema) {  // if it is one in this branch
            const std::string_view type = schema["type"].as_string();
            if (type.empty() || (types_of(type) & b.types))
                ways.push_back({{made(&s, key, std::move(schema))}});
        };
        const auto typed = [](std::string_view type) { return Json::object().set("type", type); };
        for (const char* keyword : reference_keywords) {
            if (!s.contains(keyword)) continue;
            const Json* target = document_.resolve(s, keyword);
            if (!target && !refuse(s, keyword, "its target is not in this document, or not fixed"))
                return false;
            if (target) ways.push_back({{target, false}});
        }
        for (const char* keyword : {"unevaluatedProperties", "unevaluatedItems"})
            if (s.contains(keyword) && !refuse(s, keyword, kNegated)) return false;
        negate_simple(b, s, way, typed);
        if (!negate_array(b, s, way, typed)) return false;
        if (b.types & t_object) negate_object(s, ways, way, typed);
        if (const Json* list = s.find("anyOf")) {
            ways.emplace_back();
            for (const Json& part : list->items()) ways.back().push_back({&part, false});
        }
        for (const Json& part : s["allOf"].items()) ways.push_back({{&part, false}});
        if (const Json* part = s.find("not")) ways.push_back({{part}});
        if (const Json* condition = s.find("if")) {
            if (const Json* then = s.find("then")) ways.push_back({{condition}, {then, false}});
            if (const Json* other = s.find("else"))
                ways.push_back({{condition, false}, {other, false}});
        }
        if (const Json* list = s.find("oneOf")) {
            Conjunction none;
            for (const Json& part : list->items()) none.push_back({&part, false});
            ways.push_back(std::move(none));
            for (size_t i = 0; i < list->size(); ++i)
                for (size_t j = 0; j < i; ++j) ways.push_back({{&(*list)[i]}, {&(*list)[j]}});
        }
        (void)todo;
        if (ways.empty()) return false;
        b.choices.push_back(std::move(ways));
        return true;
    }
    template <class Way, class Typed>
    void negate_simple(const Branch& b, const Json& s, const Way& way, const Typed& typed) {
        if (const Json* type = s.find("type")) {
            uint32_t mask = type->is_string() ? types_of(type->as_string()) : 0;
            for (const Json& t : type->items()) mask |= types_of(t.as_string());
            if (b.types & ~mask)
                way("type", Json::object().set("\1types", uint32_t(t_all & ~mask)));
        }
        negated_.push_back(&s);
        const uint64_t self = negated_.size() - 1;
        if (s.contains("enum")) way("enum", Json::object().set("\1excluded", self));
        if (s.contains("const")) way("const", Json::object().set("\1excluded1", self));
        const auto bound = [&](const char* keyword, const char* opposite) {
            if (const Json& v = s[keyword]; v.is_number())
                way(keyword, typed("number").set(opposite, v));
        };
        bound("minimum", s["exclusiveMinimum"].as_bool() ? "maximum" : "exclusiveMaximum");
        bound("maximum", s["exclusiveMaximum"].as_bool() ? "minimum" : "exclusiveMinimum");
        bound("exclusiveMinimum", "maximum");
        bound("exclusiveMaximum", "minimum");
        if (const Json* m = s.find("multipleOf")) {
            const auto divisor = Divisor::of(*m);
            if (!divisor || !divisor->is_binary()) (void)refuse(s, "multipleOf", kDivisors);
            if (divisor) way("multipleOf", typed("number").set("\1notMultiple", *m));
        }
        const auto count = [&](const char* keyword, const char* type, const char* opposite,
                               int step) {
            const Json* v = s.find(keyword);
            if (v && v->as_double() + step >= 0)
                way(keyword, typed(type).set(opposite, int64_t(v->as_double()) + step));
        };
        count("minLength", "string", "maxLength", -1);
        count("maxLength", "string", "minLength", 1);
        count("minItems", "array", "maxItems", -1);
        count("maxItems", "array", "minItems", 1);
        count("minProperties", "object", "maxProperties", -1);
        count("maxProperties", "object", "minProperties", 1);
        if (const Json* p = s.find("pattern"))
            way("pattern", typed("string").set("\1notPattern", *p));
        if (const Json* f = s.find("format"); f && is_format(f->as_string()))
            way("format", typed("string").set("\1notFormat", *f));
        for (const Json& name : s["required"].items())
            way("required " + std::string(name.as_string()), typed("object").set("\1absent", name));
    }
    template <class Way, class Typed>
    bool negate_array(Branch& b, const Json& s, const Way& way, const Typed& typed) {
        if (!(b.types & t_array)) return true;
        if (s["uniqueItems"].as_bool() && !refuse(s, "uniqueItems", kNegated)) return false;
        const bool old = s["items"].is_array();
        const Json& first = old ? s["items"] : s["prefixItems"];
        const Json* rest = s.find(old ? "additionalItems" : "items");
        if (rest && first.empty()) way("items", typed("array").set("contains", negation_of(rest)));
        else if (rest && !refuse(s, "items", kNegated)) return false;
        for (size_t i = 0; i < first.size(); ++i) {
            Json list = Json::array();
            for (size_t j = 0; j < i; ++j) list.push(true);
            list.push(negation_of(&first[i]));
            way("item " + std::to_string(i), typed("array")
                                                 .set("prefixItems", std::move(list))
                                                 .set("minItems", uint64_t(i + 1)));
        }
        if (const Json* c = s.find("contains")) {
            if (s.contains("maxContains") && !refuse(s, "maxContains", kNegated)) return false;
            const uint32_t least = count_of(s, "minContains", 1);
            if (least == 1) way("contains", typed("array").set("items", negation_of(c)));
            else if (least && !refuse(s, "minContains", kNegated)) return false;
        }
        return true;
    }
    template <class Way, class Typed>
    void negate_object(const Json& s, std::vector<Conjunction>& ways, const Way& way,
                       const Typed& typed) {
        for (const JsonMember& m : s["properties"].members())
            if (m.value != Json(true) && (m.value.size() || m.value.is_bool()))
                way("property " + m.key,
                    typed("object")
                        .set("required", Json::array().push(m.key))
                        .set("properties", Json::object().set(m.key, negation_of(&m.value))));
        const Json* additional = s.find("additionalProperties");
        if ((additional && !(additional->is_bool() && additional->as_bool())) ||
            s["patternProperties"].size() || s.contains("propertyNames")) {
            negated_.push_back(&s);
            way("broken", typed("object").set("\1broken", uint64_t(negated_.size() - 1)));
        }
        for (const char* keyword : {"dependentRequired", "dependentSchemas", "dependencies"})
            for (const JsonMember& m : s[keyword].members()) {
                const auto has = [&] {
                    return typed("object").set("required", Json::array().push(m.key));
                };
                for (const Json& name : m.value.items())
                    way("dependent " + m.key + " " + std::string(name.as_string()),
                        has().set("\1absent", name));
                if (m.value.is_array()) continue;
                way("dependent " + m.key, has());
                ways.back().push_back({&m.value, false});
            }
    }
    // ---- Expansion
    void expand(Branch b, Todo todo, std::vector<Branch>& out) {
        for (size_t i = 0; i < todo.size(); ++i) {
            if (failed_ || !builder_.budget().take(20) || stack_is_low()) return;
            const Literal literal = todo[i];
            const auto known = [&](Literal l) {
                return std::find(b.done.begin(), b.done.end(), l) != b.done.end();
            };
            if (known(literal)) continue;
            if (known({literal.schema, !literal.positive})) return;
            b.done.push_back(literal);
            if (literal.positive ? !apply(b, *literal.schema, todo)
                                 : !negate(b, *literal.schema, todo))
                return;
            if (!b.types) return;
        }
        if (lacks_required(b)) return;
        while (!b.one_ofs.empty()) {
            const Json* list = b.one_ofs.back();
            b.one_ofs.pop_back();
            b.choices.push_back(one_of(b, *list));
        }
        if (b.choices.empty()) {
            if (out.size() >= kMostBranches) {
                fail(document_.refuse(*b.done[0].schema, "", "has more than 512 combinations"));
                return;
            }
            for (Branch::Unevaluated& u : b.unevaluated) find_scope(b, *u.schema, u.scope);
            out.push_back(std::move(b));
            return;
        }
        const std::vector<Conjunction> ways = std::move(b.choices.back());
        b.choices.pop_back();
        for (const Conjunction& way : ways) expand(b, way, out);
    }
    // Whether an object would be needed that must not have what it has to have: early, since such
    // branches multiply.
    bool lacks_required(const Branch& b) {
        if (b.types != t_object || b.values) return false;
        for (const std::string& name : b.required) {
            if (std::find(b.absent.begin(), b.absent.end(), name) != b.absent.end()) return true;
            for (const Json* s : b.objects)
                if ((*s)["additionalProperties"] == Json(false) && !(*s)["properties"].find(name) &&
                    !(*s)["patternProperties"].size())
                    return true;
        }
        return false;
    }
    // The schemas that hold in the branch and apply in the same place as `s` because of it.
    void find_scope(const Branch& b, const Json& s, std::vector<const Json*>& out) {
        const auto seen = [&](const auto& list, const auto& item) {
            return std::find(list.begin(), list.end(), item) != list.end();
        };
        if (!seen(b.done, Literal{&s}) || seen(out, &s)) return;
        out.push_back(&s);
        for (const char* keyword : reference_keywords)
            if (const Json* target = s.contains(keyword) ? document_.resolve(s, keyword) : nullptr)
                find_scope(b, *target, out);
        for (const char* keyword : {"allOf", "anyOf", "oneOf"})
            for (const Json& part : s[keyword].items()) find_scope(b, part, out);
        for (const char* keyword : {"if", "then", "else"})
            if (const Json* part = s.find(keyword)) find_scope(b, *part, out);
        for (const JsonMember& m : s["dependentSchemas"].members()) find_scope(b, m.value, out);
    }
    VALAR_NOINLINE std::vector<Branch> branches_of(const Conjunction& conjunction) {
        std::vector<Branch> out;
        expand({}, conjunction, out);
        return out;
    }

    // Whether nothing satisfies a conjunction; false where that is hard to tell.
    bool is_impossible(const Conjunction& conjunction, int depth, Branch context = {}) {
        if (depth > 4 || failed_ || !builder_.budget().take(20)) return false;
        const bool probing = std::exchange(probing_, true);
        std::vector<Branch> branches;
        expand(std::move(context), conjunction, branches);
        bool possible = false;
        for (const Branch& b : branches) possible = possible || !is_impossible(b, depth);
        probing_ = probing;
        return !possible && !failed_;
    }
    bool is_impossible(const Branch& b, int depth) {
        if (b.values) return allowed_values(b).empty();
        uint32_t types = b.types;
        const auto& low = b.numbers.lower;
        const auto& high = b.numbers.upper;
        if (low && high) {
            const int order = compare(low->value, high->value);
            if (order > 0 || (order == 0 && (low->exclusive || high->exclusive)))
                types &= ~uint32_t(t_integer | t_fraction);
        }
        if (b.least_chars > b.most_chars) types &= ~uint32_t(t_string);
        if (b.least_items > b.most_items) types &= ~uint32_t(t_array);
        if (types & t_object) {
            bool none = b.least_members > b.most_members;
            for (const std::string& name : b.required) {
                none = none || std::find(b.absent.begin(), b.absent.end(), name) != b.absent.end();
                none = none || is_impossible(member_conjunction(b, name), depth + 1);
            }
            if (none) types &= ~uint32_t(t_object);
        }
        return types == 0;
    }
    VALAR_NOINLINE std::vector<const Json*> allowed_values(const Branch& b) {
        std::vector<const Json*> out;
        for (const Json* v : *b.values) {
            bool ok = type_of(*v) & b.types;
            if (ok && v->is_object() && !b.unevaluated.empty())
                ok = refuse(*b.unevaluated[0].schema, "unevaluatedProperties", "beside values");
            for (const Literal& l : b.done)
                ok = ok &&
                     (own_.count(l.schema) || document_.is_valid(*l.schema, *v) == l.positive);
            if (ok) out.push_back(v);
        }
        return out;
    }

    // ---- Parts
    struct Known {
        Part part = no_part;
        Part rule = no_part;
        bool open = true;
    };
    Part part_of(const Conjunction& conjunction) {
        if (failed_ || builder_.budget().spent()) return no_part;
        const auto [at, is_new] = known_.try_emplace(conjunction);
        Known& known = at->second;  // a map's elements stay where they are
        if (!is_new) {
            if (!known.open) return known.part;
            if (!known.rule) known.rule = builder_.new_rule();
            return known.rule;
        }
        if (++depth_ > 200) {
            fail(document_.refuse(root_, "", "nests too deep"));
            return no_part;
        }
        if (stack_is_low()) return no_part;
        std::vector<Part> parts;
        for (const Branch& b : branches_of(conjunction)) add_parts(b, parts);
        known.part = builder_.choice(std::move(parts));
        known.open = false;
        --depth_;
        if (known.rule) {
            builder_.define(known.rule, known.part);
            known.part = known.rule;
        }
        return known.part;
    }
    Part written(const Json& v) {
        if (v.is_real() && is_whole_number(v)) return builder_.bytes(ExactDecimal::of(v).text());
        return builder_.bytes(
            v.write(builder_.space == JsonSpace::one ? json_python : JsonStyle{}));
    }
    void add_parts(const Branch& b, std::vector<Part>& out) {
        if (b.values) {
            for (const Json* v : allowed_values(b)) out.push_back(written(*v));
            return;
        }
        uint32_t types = b.types;
        for (const Json* v : b.excluded) {
            types &= ~(type_of(*v) & (t_null | t_false | t_true));
            if ((type_of(*v) & types & (t_array | t_object)) &&
                !refuse(*b.done[0].schema, "", "to exclude an array or object by its value"))
                return;
        }
        if (types & t_null) out.push_back(builder_.bytes("null"));
        if (types & t_false) out.push_back(builder_.bytes("false"));
        if (types & t_true) out.push_back(builder_.bytes("true"));
        if (types & (t_integer | t_fraction)) out.push_back(number_part(b, types));
        if (types & t_string) out.push_back(string_part(b));
        if (types & t_array) out.push_back(array_part(b));
        if (types & t_object) out.push_back(object_part(b));
    }
    static DfaPtr plain_number(bool fractions) {
        NumberRules rules;
        rules.fractions = fractions;
        Budget budget;
        return *number_dfa(rules, budget);
    }
    VALAR_NOINLINE Part number_part(const Branch& b, uint32_t types) {
        NumberRules rules = b.numbers;
        rules.integers = types & t_integer;
        rules.fractions = types & t_fraction;
        for (const Json* v : b.excluded)
            if (v->is_number()) rules.excluded.push_back(ExactDecimal::of(*v));
        std::string key = std::string(rules.integers ? "i" : "") + (rules.fractions ? "f" : "");
        const auto say = [&](const std::optional<NumberBound>& bound) {
            key += bound ? (bound->exclusive ? "x" : "=") + bound->value.text() : std::string("-");
        };
        say(rules.lower), say(rules.upper);
        const auto say_divisor = [&](char mark, const Divisor& d) {
            key += mark + std::to_string(d.units) + "e" + std::to_string(d.digits);
        };
        for (const Divisor& d : rules.multiples) say_divisor('*', d);
        for (const Divisor& d : rules.not_multiples) say_divisor('/', d);
        for (const ExactDecimal& d : rules.excluded) key += "!" + d.text();
        if (key == "i--" || key == "if--") {  // most of them
            static const DfaPtr plain[2] = {plain_number(false), plain_number(true)};
            return builder_.terminal(plain[rules.fractions], 0, most_number_chars);
        }
        DfaPtr& known = numbers_[key];
        if (!known) {
            auto dfa = number_dfa(rules, builder_.budget());
            if (!dfa) return exceed(), no_part;
            known = std::move(*dfa);
        }
        return builder_.terminal(known, 0, most_number_chars);
    }

    // ---- Strings
    Result<DfaPtr> language_dfa(const Branch::Language& l) {
        auto dfa = l.format ? format_dfa(l.name, Spelling::json)
                            : document_.pattern(l.name, Spelling::json);
        return dfa || is_too_large(dfa.error()) ? dfa : pattern_error(l, dfa.error());
    }
    Error pattern_error(const Branch::Language& l, const Error& error) {
        if (!error.param.empty()) return error;
        return document_.refuse(*l.schema, l.format ? "format" : "pattern", error.message);
    }
    // All that the branch says of strings but their length; null: anything.
    DfaPtr string_dfa(const Branch& b) {
        DfaPtr out;
        for (const bool positive : {true, false})
            for (const Branch::Language& l : b.languages) {
                if (l.positive != positive) continue;
                auto one = language_dfa(l);
                if (!one) return fail(pattern_error(l, one.error())), nullptr;
                if (!out && positive) {
                    out = *one;
                    continue;
                }
                if (!out) out = any_text_dfa(Spelling::json);
                auto both = positive ? intersect(out, *one, builder_.budget())
                                     : subtract(out, *one, builder_.budget());
                if (!both) return exceed(), nullptr;
                out = *both;
            }
        if (const auto texts = texts_of(b.excluded); !texts.empty()) {
            if (!out) out = any_text_dfa(Spelling::json);
            out = without(out, texts);
        }
        return out;
    }
    DfaPtr without(const DfaPtr& dfa, const std::vector<std::string>& texts) {
        auto set = texts_dfa(texts, builder_.budget());
        auto out = set ? subtract(dfa, *set, builder_.budget()) : std::move(set);
        if (!out) return exceed(), nullptr;
        return *out;
    }
    Part quoted(Part inside) {
        return inside ? builder_.sequence({builder_.bytes("\""), inside, builder_.bytes("\"")})
                      : no_part;
    }
    VALAR_NOINLINE Part string_part(const Branch& b) {
        if (b.languages.size() == 1 && b.excluded.empty() && !b.languages[0].format &&
            b.languages[0].positive) {
            auto dfa = language_dfa(b.languages[0]);
            if (!dfa && is_too_large(dfa.error())) return long_pattern_part(b);
        }
        DfaPtr dfa = string_dfa(b);
        if (failed_) return no_part;
        return quoted(builder_.terminal(dfa ? dfa : any_string_dfa(), b.least_chars, b.most_chars));
    }
    // A pattern whose repeats must be counted: as a part of the grammar, not as one automaton.
    Part long_pattern_part(const Branch& b) {
        const Branch::Language& l = b.languages[0];
        if (b.least_chars || b.most_chars != unlimited) {
            (void)refuse(*l.schema, "pattern",
                         "it repeats too often to be joined with bounds of the length");
            if (failed_) return no_part;
        }
        auto part = add_pattern_part(builder_, l.name, Spelling::json, true);
        if (!part)
            return fail(document_.refuse(*l.schema, "pattern", part.error().message)), no_part;
        return quoted(*part);
    }

    // ---- Arrays
    Conjunction item_conjunction(const Branch& b, size_t index) const {
        Conjunction out;
        for (const Json* s : b.arrays) {
            const bool old = (*s)["items"].is_array();
            const Json& first = old ? (*s)["items"] : (*s)["prefixItems"];
            if (index < first.size()) add_literal(out, {&first[index]});
            else if (const Json* rest = s->find(old ? "additionalItems" : "items"))
                add_literal(out, {rest});
        }
        return out;
    }
    Part array_part(const Branch& b) {
        size_t first = 0;
        for (const Json* s : b.arrays) {
            const Json& list = (*s)["items"].is_array() ? (*s)["items"] : (*s)["prefixItems"];
            first = std::max(first, list.size());
        }
        if (b.unique && b.most_items > 1) return unique_part(b, first);
        ArrayRules rules;
        rules.least = b.least_items, rules.most = b.most_items;
        const Branch::Counted* counted = b.contains.empty() ? nullptr : &b.contains[0];
        if (b.contains.size() > 1 &&
            !refuse(*b.contains[1].schema, "contains", "more than once in the same place"))
            return no_part;
        if (counted) rules.least_counted = counted->least, rules.most_counted = counted->most;
        const auto item = [&](size_t index) {
            Conjunction all = item_conjunction(b, index);
            if (!counted) return ArrayItem{no_part, part_of(all)};
            Conjunction with = all, without = all;
            add_literal(with, counted->literal);
            add_literal(without, {counted->literal.schema, false});
            ArrayItem out{part_of(with), part_of(without)};
            return out;
        };
        for (size_t i = 0; i < first && i < b.most_items; ++i) rules.first.push_back(item(i));
        rules.rest = item(first);
        return failed_ ? no_part : builder_.array(std::move(rules));
    }
    // The values of all branches, where they can be counted.
    std::optional<std::vector<std::string>> values_of(const std::vector<Branch>& branches) {
        std::vector<std::string> out;
        for (const Branch& b : branches) {
            if (b.values) {
                for (const Json* v : allowed_values(b)) out.push_back(v->write());
                continue;
            }
            if (b.types & ~uint32_t(t_null | t_false | t_true)) return {};
            if (b.types & t_null) out.push_back("null");
            if (b.types & t_false) out.push_back("false");
            if (b.types & t_true) out.push_back("true");
        }
        std::sort(out.begin(), out.end());
        out.erase(std::unique(out.begin(), out.end()), out.end());
        return out;
    }
    // Items that differ. Strings do as the keys of an object do; few values in a part for every set
    // of those that are there.
    VALAR_NOINLINE Part unique_part(const Branch& b, size_t first) {
        const Conjunction item = item_conjunction(b, first);
        const std::vector<Branch> branches = branches_of(item);
        const bool simple = !first && b.contains.empty();
        auto values = values_of(branches);
        if (simple && values && values->size() <= kMostUnique) return unique_values(b, *values);
        if (simple && std::all_of(branches.begin(), branches.end(), has_only_strings))
            return unique_strings(b, branches);
        return without_unique(b, "except for strings and for at most 8 values");
    }
    VALAR_NOINLINE Part without_unique(Branch b, std::string_view why) {
        if (!refuse(*b.unique, "uniqueItems", why)) return no_part;
        b.unique = nullptr;
        return array_part(b);
    }
    static bool has_only_strings(const Branch& b) {
        if (!b.values) return b.types == t_string;
        return std::all_of(b.values->begin(), b.values->end(),
                           [](const Json* v) { return v->is_string(); });
    }
    Part unique_strings(const Branch& b, const std::vector<Branch>& branches) {
        ObjectRules rules;
        rules.is_list = true;
        rules.least = b.least_items, rules.most = b.most_items;
        auto strings = strings_of(branches);
        if (!strings) return failed_ ? no_part : without_unique(b, kLongStrings);
        rules.other = *strings;
        rules.others = {builder_.bytes("")};
        return failed_ ? no_part : builder_.object(std::move(rules));
    }
    Part unique_values(const Branch& b, const std::vector<std::string>& values) {
        const uint32_t count = uint32_t(values.size());
        std::vector<Part> rest(size_t{1} << count,
                               no_part);  // by what was there: how the array goes on
        const Part comma = builder_.choice({builder_.bytes(","), builder_.bytes(", ")});
        for (uint32_t set = (1u << count); set-- > 0;) {
            const uint32_t size = uint32_t(__builtin_popcount(set));
            std::vector<Part> ways;
            if (size >= b.least_items && size <= b.most_items) ways.push_back(builder_.bytes("]"));
            for (uint32_t v = 0; v < count && size < b.most_items; ++v)
                if (!(set >> v & 1) && rest[set | 1u << v])
                    ways.push_back(
                        builder_.sequence({set ? comma : builder_.bytes(""),
                                           builder_.bytes(values[v]), rest[set | 1u << v]}));
            rest[set] = builder_.choice(std::move(ways));
        }
        return rest[0] ? builder_.sequence({builder_.bytes("["), rest[0]}) : no_part;
    }

    // ---- Objects
    // What a schema says of members whose keys `matches` tells from its patterns; whether it says
    // anything.
    template <class Matches>
    bool add_group(const Json& s, const Json* property, const Matches& matches, Conjunction& out) {
        bool known = property != nullptr;
        if (property) add_literal(out, {property});
        for (const JsonMember& p : s["patternProperties"].members())
            if (matches(p.key)) add_literal(out, {&p.value}), known = true;
        const Json* additional = s.find("additionalProperties");
        if (additional && !known) add_literal(out, {additional});
        return known || additional;
    }
    template <class Property, class Matches>
    Conjunction group_conjunction(const Branch& b, const Property& property,
                                  const Matches& matches) {
        Conjunction out;
        std::vector<const Json*> evaluating;
        for (const Json* s : b.objects)
            if (add_group(*s, property(*s), matches, out)) evaluating.push_back(s);
        for (const Branch::Unevaluated& u : b.unevaluated) {
            bool evaluated = false;
            for (const Json* s : u.scope)
                evaluated |= std::find(evaluating.begin(), evaluating.end(), s) !=
                                 evaluating.end() ||
                             (s != u.schema && s->contains("unevaluatedProperties"));
            if (!evaluated) add_literal(out, {u.schema->find("unevaluatedProperties")});
        }
        return out;
    }
    VALAR_NOINLINE Conjunction member_conjunction(const Branch& b, std::string_view name) {
        Conjunction out = group_conjunction(
            b, [&](const Json& s) { return s["properties"].find(name); },
            [&](const std::string& pattern) { return document_.matches(pattern, name); });
        for (const auto& [also, literal] : b.also)
            if (also == name) add_literal(out, literal);
        return out;
    }
    VALAR_NOINLINE Conjunction other_conjunction(const Branch& b,
                                                 const std::vector<std::string>& patterns,
                                                 uint32_t bits) {
        return group_conjunction(
            b, [](const Json&) { return nullptr; },
            [&](const std::string& pattern) {
                const auto at = std::find(patterns.begin(), patterns.end(), pattern);
                return at != patterns.end() && (bits >> (at - patterns.begin()) & 1);
            });
    }
    bool may_be_name(const Branch& b, const std::string& name) {
        for (const Literal& l : b.names)
            if (document_.is_valid(*l.schema, Json(name)) != l.positive) return false;
        return std::find(b.absent.begin(), b.absent.end(), name) == b.absent.end();
    }
    VALAR_NOINLINE std::vector<std::string> names_of(const Branch& b) {
        std::vector<std::string> names;
        std::map<std::string, bool, std::less<>> known;
        const auto add_name = [&](const std::string& name) {
            if (!known[name]) known[name] = true, names.push_back(name);
        };
        for (const Json* s : b.objects)
            for (const JsonMember& m : (*s)["properties"].members()) add_name(m.key);
        for (const std::string& name : b.required) add_name(name);
        for (const std::string& name : b.absent) add_name(name);
        return names;
    }
    Part object_part(const Branch& b) {
        if (!b.broken.empty()) return broken_part(b);
        ObjectRules rules;
        rules.least = b.least_members, rules.most = b.most_members;
        for (const std::string& name : names_of(b)) {
            ObjectMember m;
            write_json_string(m.key, name);
            m.key += ":";
            m.required = std::find(b.required.begin(), b.required.end(), name) != b.required.end();
            if (may_be_name(b, name)) m.value = part_of(member_conjunction(b, name));
            rules.members.push_back(std::move(m));
        }
        add_others(b, rules);
        return failed_ ? no_part : builder_.object(std::move(rules));
    }
    // What a member with a key can miss of a schema's keywords for members.
    template <class Matches>
    std::vector<Literal> misses(const Json& s, bool declared, const Matches& matches) {
        std::vector<Literal> out;
        bool known = declared;
        for (const JsonMember& p : s["patternProperties"].members())
            if (matches(p.key)) out.push_back({&p.value, false}), known = true;
        if (const Json* additional = s.find("additionalProperties"); additional && !known)
            out.push_back({additional, false});
        return out;
    }
    // One of the named members misses what the schema says; where another key may, that cannot be
    // promised.
    VALAR_NOINLINE Part broken_part(Branch b) {
        const Json& s = *b.broken.back();
        b.broken.pop_back();
        if (may_miss_elsewhere(b, s))
            return refuse(s,
                          s.contains("propertyNames")          ? "propertyNames"
                          : s.contains("additionalProperties") ? "additionalProperties"
                                                               : "patternProperties",
                          kNegated)
                       ? object_part(b)
                       : no_part;
        std::vector<Part> ways;
        for (const std::string& name : names_of(b)) {
            if (!may_be_name(b, name) || failed_ || !builder_.budget().take(20)) continue;
            auto literals = misses(s, s["properties"].contains(name), [&](const std::string& p) {
                return document_.matches(p, name);
            });
            if (const Json* names = s.find("propertyNames");
                names && !document_.is_valid(*names, Json(name)))
                literals.push_back({&document_.anything()});
            for (const Literal& literal : literals) {
                Branch with = b;
                with.required.push_back(name);
                with.also.emplace_back(name, literal);
                ways.push_back(object_part(with));
            }
        }
        return builder_.choice(std::move(ways));
    }
    bool may_miss_elsewhere(const Branch& b, const Json& s) {
        Branch both = b;
        both.objects.push_back(&s);
        const std::vector<std::string> patterns = patterns_of(both);
        if (patterns.size() > kMostPatterns) return true;
        for (uint32_t bits = 0; bits < 1u << patterns.size(); ++bits) {
            const Conjunction rest = other_conjunction(b, patterns, bits);
            if (is_impossible(rest, 0)) continue;
            if (s.contains("propertyNames")) return true;
            const auto matches = [&](const std::string& p) {
                const auto at = std::find(patterns.begin(), patterns.end(), p);
                return bool(bits >> (at - patterns.begin()) & 1);
            };
            for (const Literal& literal : misses(s, false, matches)) {
                Conjunction all = rest;
                add_literal(all, literal);
                if (!is_impossible(all, 0)) return true;
            }
        }
        return false;
    }
    static std::vector<std::string> patterns_of(const Branch& b) {
        std::vector<std::string> patterns;
        for (const Json* s : b.objects)
            for (const JsonMember& p : (*s)["patternProperties"].members())
                if (std::find(patterns.begin(), patterns.end(), p.key) == patterns.end())
                    patterns.push_back(p.key);
        return patterns;
    }
    // Keys that are not named: by which of the patterns they match.
    VALAR_NOINLINE void add_others(const Branch& b, ObjectRules& rules) {
        std::vector<std::string> patterns = patterns_of(b);
        if (patterns.size() > kMostPatterns) {
            (void)refuse(*b.objects[0], "patternProperties",
                         "more than 6 patterns in the same place");
            patterns.resize(kMostPatterns);
        }
        std::vector<DfaPtr> dfas;
        for (const std::string& p : patterns) {
            auto dfa = document_.pattern(p, Spelling::json);
            if (!dfa) {
                fail(document_.refuse(*b.objects[0], "patternProperties", dfa.error().message));
                return;
            }
            dfas.push_back(*dfa);
        }
        for (uint32_t bits = 0; bits < 1u << patterns.size(); ++bits)
            rules.others.push_back(part_of(other_conjunction(b, patterns, bits)));
        if (std::all_of(rules.others.begin(), rules.others.end(),
                        [](Part p) { return p == no_part; }))
            return;
        const DfaPtr all = names_dfa(b);
        if (failed_ || !all) return;
        if (dfas.empty()) {
            rules.other = all;
            return;
        }
        auto labelled = label_by(all, dfas, builder_.budget());
        if (!labelled) exceed();
        else if (!(*labelled)->empty()) rules.other = *labelled;
    }
    // What propertyNames leaves of all keys; null: nothing.
    DfaPtr names_dfa(const Branch& b) {
        if (b.names.empty()) return any_text_dfa(Spelling::json);
        if (auto names = strings_of(branches_of(b.names))) return *names;
        (void)refuse(*b.names[0].schema, "", kLongStrings);
        return any_text_dfa(Spelling::json);
    }
    // The strings of all branches, between their quotes; null: there are none. An error where that
    // would take more than half of what is left to spend.
    Result<DfaPtr> strings_of(const std::vector<Branch>& branches) {
        Budget& whole = builder_.budget();
        Budget part = whole.part({whole.states / 2, whole.work / 2, whole.bytes / 2});
        Result<DfaPtr> out = DfaPtr();
        for (const Branch& b : branches) {
            if (!(b.types & t_string)) continue;
            auto one = strings_of(b, part);
            if (failed_ || !one) out = std::move(one);
            if (failed_ || !out) break;
            if (!(*one)->empty()) out = *out ? unite(*out, *one, part) : std::move(one);
            if (!out) break;
        }
        whole.give_back(part);
        return out;
    }
    Result<DfaPtr> strings_of(const Branch& b, Budget& budget) {
        auto out = b.values ? texts_dfa(texts_of(allowed_values(b)), budget)
                            : Result<DfaPtr>(string_dfa(b));
        if (out && !*out) out = any_text_dfa(Spelling::json);
        const bool counts = !b.values && (b.least_chars || b.most_chars != unlimited);
        if (out && counts && !failed_)
            out = limit_length(*out, b.least_chars, b.most_chars, budget);
        return out;
    }
    // The strings among some values, as they stand between quotes.
    static std::vector<std::string> texts_of(const std::vector<const Json*>& values) {
        std::vector<std::string> out;
        for (const Json* v : values)
            if (v->is_string()) write_json_escaped(out.emplace_back(), v->as_string());
        return out;
    }

    GrammarBuilder& builder_;
    SchemaDocument document_;
    const Json& root_;
    bool strict_, probing_ = false, failed_ = false;
    int depth_ = 0;
    Error error_;
    std::map<Conjunction, Known> known_;
    std::map<std::pair<const Json*, std::string>, const Json*> made_;
    std::map<const Json*, bool> own_;
    std::vector<const Json*> negated_;
    std::map<std::string, DfaPtr> numbers_;
    std::map<std::pair<const Json*, const Json*>, bool> apart_;
};

Result<Part> add_json_schema(GrammarBuilder& builder, const Json& schema, bool strict) {
    return SchemaCompiler(builder, schema, strict).compile();
}

Result<GrammarPtr> compile_json_schema(const Json& schema, const SchemaOptions& options) {
    GrammarBuilder builder;
    builder.space = options.space;
    auto part = add_json_schema(builder, schema, options.strict);
    const bool made = part.ok();
    auto grammar = builder.build(std::move(part));
    if (grammar || !made) return grammar;
    return SchemaDocument(schema, builder.budget()).refuse(schema, "", grammar.error().message);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif
