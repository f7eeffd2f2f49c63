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
constexpr uint32_t kMostDivisor = 20'000, kMostUnique = 8;

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
    std::vector<std::vector<Conjunction>> choices = {};
};

}  // namespace

class SchemaCompiler {
public:
    SchemaCompiler(GrammarBuilder& builder, const Json& root, bool strict)
        : builder_(builder), document_(root, builder.budget()), root_(root), strict_(strict) {}

    Result<Part> compile() {
        if (auto ok = document_.check(); !ok) return std::move(ok.error());
        const Part part = part_of({{&root_}});
        if (failed_) return std::move(error_);
        if (builder_.budget().spent()) return budget_error();
        return part;
    }

private:
    // What cannot be promised: the end under strict, else left out.
    bool refuse(const Json& schema, std::string_view keyword, std::string_view why) {
        if (!strict_ || probing_) return true;
        return fail(document_.refuse(schema, keyword, why));
    }
    bool fail(Error error) {
        if (!failed_) error_ = std::move(error);
        failed_ = true;
        return false;
    }
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
        if (const Json* ref = s.find("$ref")) {
            const Json* target = document_.resolve(ref->as_string());
            if (!target) {
                if (!refuse(s, "$ref", "is not in this document")) return false;
            } else {
                todo.push_back({target});
                if (document_.refs_hide_siblings()) return true;
            }
        }
        for (const char* keyword :
             {"unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef"})
            if (s.contains(keyword) && !refuse(s, keyword, "is not supported")) return false;
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
        if (const Json* p = s.find("\1notPattern"))
            b.languages.push_back({std::string(p->as_string()), false, false, &s});
        if (const Json* f = s.find("\1notFormat"))
            b.languages.push_back({std::string(f->as_string()), true, false, &s});
        if (const Json* m = s.find("\1notMultiple"))
            b.numbers.not_multiples.push_back(uint32_t(m->as_uint()));
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
            if (!is_whole_number(*m) || m->as_double() < 1 || m->as_double() > kMostDivisor)
                return refuse(s, "multipleOf", "only integers from 1 to 20,000 are supported");
            if (m->as_double() > 1) b.numbers.multiples.push_back(uint32_t(m->as_double()));
            b.types &= ~uint32_t(t_fraction);
        }
        return b.types != 0;
    }
    bool apply_string(Branch& b, const Json& s) {
        b.least_chars = std::max(b.least_chars, count_of(s, "minLength", 0));
        b.most_chars = std::min(b.most_chars, count_of(s, "maxLength", unlimited));
        if (const Json* p = s.find("pattern"))
            b.languages.push_back({std::string(p->as_string()), false, true, &s});
        if (const Json* f = s.find("format")) {
            if (format_pattern(f->as_string()))
                b.languages.push_back({std::string(f->as_string()), true, true, &s});
            else if ((b.types & t_string) && !refuse(s, "format", "is not one that is supported"))
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
        if (const Json* one = s.find("oneOf")) b.choices.push_back(one_of(*one));
        return true;
    }
    // Each alone; where two cannot hold together anyway there is no need to say so.
    std::vector<Conjunction> one_of(const Json& list) {
        std::vector<Conjunction> ways;
        for (const Json& part : list.items()) {
            Conjunction way = {{&part}};
            for (const Json& other : list.items())
                if (&other != &part && !is_impossible({{&part}, {&other}}, 0))
                    way.push_back({&other, false});
            ways.push_back(std::move(way));
        }
        return ways;
    }

    // ---- Negative literals: the ways not to satisfy a schema
    bool negate(Branch& b, const Json& s, Todo& todo) {
        if (s.is_bool()) return !s.as_bool();
        std::vector<Conjunction> ways;
        const auto way = [&](const std::string& key, Json schema) {
            ways.push_back({{made(&s, key, std::move(schema))}});
        };
        const auto typed = [](std::string_view type) { return Json::object().set("type", type); };
        if (const Json* ref = s.find("$ref")) {
            const Json* target = document_.resolve(ref->as_string());
            if (!target && !refuse(s, "$ref", "is not in this document")) return false;
            if (target) ways.push_back({{target, false}});
        }
        for (const char* keyword :
             {"unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef",
              "dependentSchemas", "dependencies", "propertyNames"})
            if (s.contains(keyword) &&
                !refuse(s, keyword, "is not supported where a schema must not match"))
                return false;
        negate_simple(s, way, typed);
        if (!negate_array(b, s, way, typed) || !negate_object(b, s, way, typed)) return false;
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
    void negate_simple(const Json& s, const Way& way, const Typed& typed) {
        if (const Json* type = s.find("type")) {
            uint32_t mask = type->is_string() ? types_of(type->as_string()) : 0;
            for (const Json& t : type->items()) mask |= types_of(t.as_string());
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
            if (!is_whole_number(*m) || m->as_double() < 1 || m->as_double() > kMostDivisor)
                (void)refuse(s, "multipleOf", "only integers from 1 to 20,000 are supported");
            else way("multipleOf", typed("number").set("\1notMultiple", uint64_t(m->as_double())));
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
        if (const Json* f = s.find("format"); f && format_pattern(f->as_string()))
            way("format", typed("string").set("\1notFormat", *f));
        for (const Json& name : s["required"].items())
            way("required " + std::string(name.as_string()), typed("object").set("\1absent", name));
    }
    template <class Way, class Typed>
    bool negate_array(Branch& b, const Json& s, const Way& way, const Typed& typed) {
        if (!(b.types & t_array)) return true;
        if (s["uniqueItems"].as_bool() &&
            !refuse(s, "uniqueItems", "is not supported where a schema must not match"))
            return false;
        const bool old = s["items"].is_array();
        const Json& first = old ? s["items"] : s["prefixItems"];
        const Json* rest = s.find(old ? "additionalItems" : "items");
        if (rest && first.empty()) way("items", typed("array").set("contains", negation_of(rest)));
        else if (rest && !refuse(s, "items", "is not supported where a schema must not match"))
            return false;
        for (size_t i = 0; i < first.size(); ++i) {
            Json list = Json::array();
            for (size_t j = 0; j < i; ++j) list.push(true);
            list.push(negation_of(&first[i]));
            way("item " + std::to_string(i), typed("array")
                                                 .set("prefixItems", std::move(list))
                                                 .set("minItems", uint64_t(i + 1)));
        }
        if (const Json* c = s.find("contains")) {
            if (s.contains("maxContains") &&
                !refuse(s, "maxContains", "is not supported where a schema must not match"))
                return false;
            const uint32_t least = count_of(s, "minContains", 1);
            if (least == 1) way("contains", typed("array").set("items", negation_of(c)));
            else if (least &&
                     !refuse(s, "minContains", "is not supported where a schema must not match"))
                return false;
        }
        return true;
    }
    template <class Way, class Typed>
    bool negate_object(Branch& b, const Json& s, const Way& way, const Typed& typed) {
        if (!(b.types & t_object)) return true;
        for (const JsonMember& m : s["properties"].members())
            way("property " + m.key,
                typed("object")
                    .set("required", Json::array().push(m.key))
                    .set("properties", Json::object().set(m.key, negation_of(&m.value))));
        if (s["patternProperties"].size() &&
            !refuse(s, "patternProperties", "is not supported where a schema must not match"))
            return false;
        const Json* additional = s.find("additionalProperties");
        if (additional && !(additional->is_bool() && additional->as_bool()) &&
            !refuse(s, "additionalProperties", "is not supported where a schema must not match"))
            return false;
        for (const JsonMember& m : s["dependentRequired"].members())
            for (const Json& name : m.value.items())
                way("dependent " + m.key + " " + std::string(name.as_string()),
                    typed("object")
                        .set("required", Json::array().push(m.key))
                        .set("\1absent", name));
        return true;
    }
    // ---- Expansion
    void expand(Branch b, Todo todo, std::vector<Branch>& out) {
        for (size_t i = 0; i < todo.size(); ++i) {
            if (failed_ || !builder_.budget().take(20)) return;
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
        if (b.choices.empty()) {
            if (out.size() >= kMostBranches) {
                fail(document_.refuse(*b.done[0].schema, "", "has more than 512 combinations"));
                return;
            }
            out.push_back(std::move(b));
            return;
        }
        const std::vector<Conjunction> ways = std::move(b.choices.back());
        b.choices.pop_back();
        for (const Conjunction& way : ways) expand(b, way, out);
    }
    std::vector<Branch> branches_of(const Conjunction& conjunction) {
        std::vector<Branch> out;
        expand({}, conjunction, out);
        return out;
    }

    // Whether nothing satisfies a conjunction; false where that is hard to tell.
    bool is_impossible(const Conjunction& conjunction, int depth) {
        if (depth > 4 || failed_) return false;
        const bool probing = std::exchange(probing_, true);
        const std::vector<Branch> branches = branches_of(conjunction);
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
    std::vector<const Json*> allowed_values(const Branch& b) {
        std::vector<const Json*> out;
        for (const Json* v : *b.values) {
            bool ok = type_of(*v) & b.types;
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
                !refuse(*b.done[0].schema, "", "excludes an array or object by its value"))
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
    Part number_part(const Branch& b, uint32_t types) {
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
        for (const uint32_t m : rules.multiples) key += "*" + std::to_string(m);
        for (const uint32_t m : rules.not_multiples) key += "/" + std::to_string(m);
        for (const ExactDecimal& d : rules.excluded) key += "!" + d.text();
        if (key == "i--" || key == "if--") {  // most of them
            static const DfaPtr plain[2] = {plain_number(false), plain_number(true)};
            return builder_.terminal(plain[rules.fractions], 0, most_number_chars);
        }
        DfaPtr& known = numbers_[key];
        if (!known) {
            auto dfa = number_dfa(rules, builder_.budget());
            if (!dfa) return fail(std::move(dfa.error())), no_part;
            known = std::move(*dfa);
        }
        return builder_.terminal(known, 0, most_number_chars);
    }

    // ---- Strings
    Result<DfaPtr> language_dfa(const Branch::Language& l) {
        auto dfa = l.format ? format_dfa(l.name, Spelling::json)
                            : document_.pattern(l.name, Spelling::json);
        if (dfa || is_too_large(dfa.error())) return dfa;
        return document_.refuse(*l.schema, l.format ? "format" : "pattern", dfa.error().message);
    }
    // All that the branch says of strings but their length; null: anything.
    DfaPtr string_dfa(const Branch& b) {
        DfaPtr out;
        for (const bool positive : {true, false})
            for (const Branch::Language& l : b.languages) {
                if (l.positive != positive) continue;
                auto one = language_dfa(l);
                if (!one)
                    return fail(document_.refuse(*l.schema, l.format ? "format" : "pattern",
                                                 one.error().message)),
                           nullptr;
                if (!out && positive) {
                    out = *one;
                    continue;
                }
                if (!out) out = any_text_dfa(Spelling::json);
                auto both = positive ? intersect(out, *one, builder_.budget())
                                     : subtract(out, *one, builder_.budget());
                if (!both) return fail(std::move(both.error())), nullptr;
                out = *both;
            }
        std::vector<std::string> texts;
        for (const Json* v : b.excluded)
            if (v->is_string()) {
                std::string text;
                write_json_escaped(text, v->as_string());
                texts.push_back(std::move(text));
            }
        if (!texts.empty()) {
            if (!out) out = any_text_dfa(Spelling::json);
            out = without(out, texts);
        }
        return out;
    }
    DfaPtr without(const DfaPtr& dfa, const std::vector<std::string>& texts) {
        auto set = texts_dfa(texts, builder_.budget());
        auto out = set ? subtract(dfa, *set, builder_.budget()) : std::move(set);
        if (!out) return fail(std::move(out.error())), nullptr;
        return *out;
    }
    Part quoted(Part inside) {
        return inside ? builder_.sequence({builder_.bytes("\""), inside, builder_.bytes("\"")})
                      : no_part;
    }
    Part string_part(const Branch& b) {
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
                         "repeats too often to be joined with bounds of the length");
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
            !refuse(*b.contains[1].schema, "contains", "is there more than once"))
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
    // The values that satisfy a conjunction, where they can be counted.
    std::optional<std::vector<std::string>> values_of(const Conjunction& conjunction) {
        std::vector<std::string> out;
        for (const Branch& b : branches_of(conjunction)) {
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
    // Items that differ: a part for every set of those that are there.
    Part unique_part(const Branch& b, size_t first) {
        auto values = values_of(item_conjunction(b, first));
        if (first || !values || values->size() > kMostUnique || !b.contains.empty()) {
            if (!refuse(*b.unique, "uniqueItems",
                        "is supported for enumerations of at most 8 values"))
                return no_part;
            Branch other = b;
            other.unique = nullptr;
            return array_part(other);
        }
        const uint32_t count = uint32_t(values->size());
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
                                           builder_.bytes((*values)[v]), rest[set | 1u << v]}));
            rest[set] = builder_.choice(std::move(ways));
        }
        return rest[0] ? builder_.sequence({builder_.bytes("["), rest[0]}) : no_part;
    }

    // ---- Objects
    void add_group(const Json& s, std::string_view name, Conjunction& out) {
        bool known = false;
        if (const Json* property = s["properties"].find(name))
            add_literal(out, {property}), known = true;
        for (const JsonMember& p : s["patternProperties"].members())
            if (document_.matches(p.key, name)) add_literal(out, {&p.value}), known = true;
        if (const Json* additional = s.find("additionalProperties"); additional && !known)
            add_literal(out, {additional});
    }
    Conjunction member_conjunction(const Branch& b, std::string_view name) {
        Conjunction out;
        for (const Json* s : b.objects) add_group(*s, name, out);
        return out;
    }
    bool may_be_name(const Branch& b, const std::string& name) {
        for (const Literal& l : b.names)
            if (document_.is_valid(*l.schema, Json(name)) != l.positive) return false;
        return std::find(b.absent.begin(), b.absent.end(), name) == b.absent.end();
    }
    Part object_part(const Branch& b) {
        std::vector<std::string> names;
        std::map<std::string, bool, std::less<>> known;
        const auto add_name = [&](const std::string& name) {
            if (!known[name]) known[name] = true, names.push_back(name);
        };
        for (const Json* s : b.objects)
            for (const JsonMember& m : (*s)["properties"].members()) add_name(m.key);
        for (const std::string& name : b.required) add_name(name);
        for (const std::string& name : b.absent) add_name(name);
        ObjectRules rules;
        rules.least = b.least_members, rules.most = b.most_members;
        for (const std::string& name : names) {
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
    // Keys that are not named: by which of the patterns they match.
    void add_others(const Branch& b, ObjectRules& rules) {
        std::vector<std::string> patterns;
        for (const Json* s : b.objects)
            for (const JsonMember& p : (*s)["patternProperties"].members())
                if (std::find(patterns.begin(), patterns.end(), p.key) == patterns.end())
                    patterns.push_back(p.key);
        if (patterns.size() > kMostPatterns) {
            (void)refuse(*b.objects[0], "patternProperties", "there are more than 6 patterns");
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
        DfaPtr all = names_dfa(b);
        if (failed_ || !all) return;
        if (dfas.empty()) {
            rules.other = all;
            return;
        }
        auto labelled = label_by(all, dfas, builder_.budget());
        if (!labelled) fail(std::move(labelled.error()));
        else if (!(*labelled)->empty()) rules.other = *labelled;
    }
    Conjunction other_conjunction(const Branch& b, const std::vector<std::string>& patterns,
                                  uint32_t bits) {
        Conjunction out;
        for (const Json* s : b.objects) {
            bool known = false;
            for (size_t i = 0; i < patterns.size(); ++i)
                if (const Json* p = (*s)["patternProperties"].find(patterns[i]);
                    p && (bits >> i & 1))
                    add_literal(out, {p}), known = true;
            if (const Json* additional = s->find("additionalProperties"); additional && !known)
                add_literal(out, {additional});
        }
        return out;
    }
    // What propertyNames leaves of all keys; null: nothing.
    DfaPtr names_dfa(const Branch& b) {
        DfaPtr out = any_text_dfa(Spelling::json);
        if (b.names.empty()) return out;
        const std::vector<Branch> branches = branches_of(b.names);
        if (branches.empty()) return nullptr;
        if (branches.size() > 1)
            (void)refuse(*b.names[0].schema, "", "as propertyNames has alternatives");
        const Branch& names = branches[0];
        if (!(names.types & t_string)) return nullptr;
        if (names.values) {
            std::vector<std::string> texts;
            for (const Json* v : allowed_values(names)) {
                texts.emplace_back();
                write_json_escaped(texts.back(), v->as_string());
            }
            auto set = texts_dfa(texts, builder_.budget());
            if (!set) return fail(std::move(set.error())), nullptr;
            return (*set)->empty() ? nullptr : *set;
        }
        if (DfaPtr found = string_dfa(names)) out = found;
        if (failed_) return nullptr;
        auto counted = names.least_chars || names.most_chars != unlimited
                           ? limit_length(out, names.least_chars, names.most_chars,
                                          builder_.budget())
                           : Result<DfaPtr>(out);
        if (!counted) return fail(std::move(counted.error())), nullptr;
        return (*counted)->empty() ? nullptr : *counted;
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
};

Result<Part> add_json_schema(GrammarBuilder& builder, const Json& schema, bool strict) {
    return SchemaCompiler(builder, schema, strict).compile();
}

Result<GrammarPtr> compile_json_schema(const Json& schema, const SchemaOptions& options) {
    GrammarBuilder builder;
    builder.space = options.space;
    auto part = add_json_schema(builder, schema, options.strict);
    if (!part) return std::move(part.error());
    return builder.build(*part);
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif
