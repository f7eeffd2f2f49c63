#include "prologue.hpp"

#include "api_internal.hpp"
#include "base/text.hpp"
#include "json_internal.hpp"
#include "template/renderer.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace jinja {

// ---- renderer -------------------------------------------------------------------------------

Value Renderer::fail(std::string_view what, ErrorKind kind) {
    if (!error_) error_ = template_error(kind, line_, what);
    return {};
}

Value Renderer::raise(std::string_view words) {
    constexpr size_t limit = 2000;
    if (words.size() > limit) words = words.substr(0, utf8_valid_prefix(words.substr(0, limit)));
    if (!error_) error_ = make_error(ErrorKind::invalid_request, std::string(words));
    return {};
}

bool Renderer::charge_bytes(uint64_t bytes) {
    spent_ += bytes;
    if (spent_ > ChatTemplate::max_steps * ChatTemplate::bytes_per_step) fail("too many steps");
    return !failed();
}

/// What an undefined value is called, or any value's type.
std::string Renderer::what(const Value& v) const {
    if (v.kind != Kind::undefined) return kind_name(v);
    const Node& node = p_.nodes[size_t(v.integer)];
    if (node.op == Op::name || node.op == Op::keyword)
        return join({"'", p_.names[node.value], "' is undefined"});
    if (node.op == Op::attribute)
        return join({"there is no attribute '", p_.names[node.value], "'"});
    return node.op == Op::item ? "there is no such item" : "the value is undefined";
}

bool Renderer::want(const Value& v, Kind kind) {
    if (v.kind == kind || (kind == Kind::integer && v.kind == Kind::boolean)) return true;
    fail(join({"expected ", kind_name(make_kind(kind, 0)), ", but ",
               v.kind == Kind::undefined ? "" : "got ", what(v)}));
    return false;
}

// text

bool Renderer::append(Text& out, std::string_view piece, bool request) {
    if (!charge_bytes(piece.size() + 16)) return false;  // 16: of a mark
    if (piece.size() > ChatTemplate::max_output_bytes - out.text.size()) {
        fail("a text of over 16 MiB", ErrorKind::too_large);
        return false;
    }
    if (request) add_mark(out, out.text.size(), out.text.size() + piece.size());
    out.text += piece;
    return true;
}

bool Renderer::append(Text& out, const Text& from, ByteRange range) {
    const size_t base = out.text.size();
    const std::string_view bytes = std::string_view(from.text).substr(range.begin,
                                                                      range.end - range.begin);
    if (!append(out, bytes, false)) return false;
    const auto& marks = from.from_request;
    auto mark = std::upper_bound(marks.begin(), marks.end(), range.begin,
                                 [](size_t at, const ByteRange& r) { return at < r.end; });
    for (; mark != marks.end() && mark->begin < range.end; ++mark) {
        add_mark(out, base + std::max(mark->begin, range.begin) - range.begin,
                 base + std::min(mark->end, range.end) - range.begin);
        if (!charge_bytes(16)) return false;
    }
    return true;
}

void Renderer::print(Text& out, const Value& v) {
    if (is_string(v)) append(out, text_in(v));
    else if (v.kind != Kind::undefined) write(out, v, {}, 0, false);
}

Value Renderer::to_string(const Value& v) {
    if (is_string(v)) return v;
    Text text;
    print(text, v);
    return make_text(std::move(text));
}

Value Renderer::piece(const Value& string, ByteRange range) {
    Text text;
    charge(1);
    append(text, text_in(string), range);
    return make_text(std::move(text));
}

// containers

Value Renderer::list(Kind kind, List items) {
    charge_bytes(items.size() * sizeof(Value));
    Value made = make_list(kind, std::move(items));
    return made.depth > ChatTemplate::max_value_depth ? fail("lists nested too deep") : made;
}

Value Renderer::dict(Dict entries) {
    charge_bytes(entries.size() * sizeof(Entry));
    Value made = make_dict(std::move(entries));
    return made.depth > ChatTemplate::max_value_depth ? fail("dicts nested too deep") : made;
}

Value Renderer::name_space(Dict fields) {
    name_spaces_.push_back(std::move(fields));
    return make_kind(Kind::name_space, int64_t(name_spaces_.size() - 1));
}

const Value* find_entry(const Dict& dict, std::string_view key) {
    for (const Entry& e : dict)
        if (is_string(e.key) && chars(e.key) == key) return &e.value;
    return nullptr;
}

const Value* find_entry(const Dict& dict, const Value& key) {
    if (is_string(key)) return find_entry(dict, chars(key));
    for (const Entry& e : dict)
        if (is_number(key) ? is_number(e.key) && number_in(e.key) == number_in(key)
                           : e.key.kind == key.kind)
            return &e.value;
    return nullptr;
}

void set_entry(Dict& dict, Value key, Value value) {
    if (const Value* found = find_entry(dict, key)) *const_cast<Value*>(found) = std::move(value);
    else dict.push_back({std::move(key), std::move(value)});
}

Value Renderer::items_of(const Value& v) {
    List items;
    switch (v.kind) {
        case Kind::list:
        case Kind::tuple:
        case Kind::iterator: return v;
        case Kind::undefined: break;
        case Kind::dict:
            for (const Entry& e : dict_in(v)) items.push_back(e.key);
            break;
        case Kind::string:
            for (size_t at = 0, end; at < chars(v).size() && !failed(); at = end) {
                end = at;
                utf8_next(chars(v), &end);
                items.push_back(piece(v, {at, end}));
            }
            break;
        default: return fail(join({"'", what(v), "' is not iterable"}));
    }
    return list(Kind::list, std::move(items));
}

// context

Value Renderer::from_json(const Json& json, bool request) {
    Value v;
    switch (json.kind()) {
        case Json::Kind::null: v = make_none(); break;
        case Json::Kind::boolean: v = make_bool(json.as_bool()); break;
        case Json::Kind::int64: v = make_int(json.as_int()); break;
        case Json::Kind::uint64:  // over 63 bits
        case Json::Kind::real: v = make_real(json.as_double()); break;
        case Json::Kind::string: {
            Text text{std::string(json.as_string()), {}};
            if (request) add_mark(text, 0, text.text.size());
            v = make_text(std::move(text));
            break;
        }
        case Json::Kind::array: {
            List items;
            items.reserve(json.size());
            for (const Json& item : json.items()) items.push_back(from_json(item, request));
            v = make_list(Kind::list, std::move(items));
            break;
        }
        case Json::Kind::object: {
            Dict entries;
            entries.reserve(json.size());
            for (const JsonMember& m : json.members()) {
                Text key{m.key, {}};
                if (request) add_mark(key, 0, key.text.size());
                entries.push_back({make_text(std::move(key)), from_json(m.value, request)});
            }
            v = make_dict(std::move(entries));
            break;
        }
    }
    v.request = request && !is_string(v);
    return v;
}

namespace {

/// A role that spells one of the six is a word of the template's.
void trust_roles(const Value& messages) {
    if (!is_list(messages)) return;
    for (const Value& message : list_in(messages)) {
        const Value* role = message.kind == Kind::dict ? find_entry(dict_in(message), "role")
                                                       : nullptr;
        if (!role || !is_string(*role)) continue;
        if (role_named(chars(*role)))  // the value is new: nobody else holds it
            static_cast<Text*>(role->object.get())->from_request.clear();
    }
}

}  // namespace

/// Those members that the template names become variables.
void Renderer::bind_context(const Json& object, bool request) {
    for (uint32_t id = 0; id < p_.names.size(); ++id) {
        const Json* member = object.find(p_.names[id]);
        if (!member) continue;
        assign_name(id, from_json(*member, request));
        if (request && p_.names[id] == "messages")
            trust_roles(frames_.back().bindings.back().second);
    }
}

Result<Text> Renderer::run(const TemplateInput& input) {
    push_frame(0);
    bind_context(input.request, true);
    bind_context(input.own, false);
    push_frame(0);
    execute(p_.root);
    if (error_) return std::move(*error_);
    return std::move(output_);
}

// names

void Renderer::assign_name(uint32_t name, Value value) {
    charge_bytes(frames_.back().bindings.size());
    for (auto& [id, old] : frames_.back().bindings)
        if (id == name) {
            old = std::move(value);
            return;
        }
    frames_.back().bindings.emplace_back(name, std::move(value));
}

Value Renderer::lookup(const Node& node, uint32_t id) {
    for (uint32_t f = frame();; f = frames_[f].parent) {
        charge_bytes(frames_[f].bindings.size() + 1);
        for (const auto& [name, value] : frames_[f].bindings)
            if (name == node.value) return value;
        if (f == 0) break;
    }
    const Builtin* builtin = find_global(p_.names[node.value]);
    if (!builtin) return make_kind(Kind::undefined, id);
    Value v = make_kind(Kind::function, 0);
    v.object = std::make_shared<Bound>(Bound{{}, builtin});
    return v;
}

void Renderer::assign(uint32_t target, const Value& value) {
    const Node& node = p_.nodes[target];
    if (node.op == Op::name) return assign_name(node.value, value);
    const auto children = p_.children(node);
    if (node.op == Op::field) {
        const Value owner = eval(children[0]);
        if (failed()) return;
        if (owner.kind != Kind::name_space) return void(fail("only a namespace has fields to set"));
        Dict& fields = name_spaces_[size_t(owner.integer)];
        charge_bytes(fields.size() * 4);
        return set_entry(fields, make_text(p_.names[node.value]), value);
    }
    const Value items = items_of(value);
    if (failed()) return;
    if (list_in(items).size() != children.size())
        return void(fail(format("cannot unpack %zu values into %zu names", list_in(items).size(),
                                children.size())));
    for (size_t i = 0; i < children.size() && !failed(); ++i)
        assign(children[i], list_in(items)[i]);
}

// statements

Flow Renderer::execute(uint32_t id) {
    const Level level(*this);
    const Node& node = p_.nodes[id];
    line_ = node.line;
    if (!charge(1)) return Flow::next;
    switch (node.op) {
        case Op::body: return execute_body(node);
        case Op::text: append(*out_, p_.texts[node.value], false); break;
        case Op::print: {
            const Value v = eval(p_.children(node)[0]);
            if (!failed()) print(*out_, v);
            break;
        }
        case Op::choice: return execute_choice(node);
        case Op::loop: return execute_loop(node);
        case Op::set: {
            const Value v = eval(p_.children(node)[1]);
            if (!failed()) assign(p_.children(node)[0], v);
            break;
        }
        case Op::set_block:
        case Op::filter_block: return execute_capture(node);
        case Op::macro: {
            Value v = make_kind(Kind::macro, 0);
            v.object = std::make_shared<Macro>(Macro{id, frame(), frames_.back().serial});
            assign_name(node.value, std::move(v));
            break;
        }
        case Op::scope: return execute_scope(p_.children(node)[0]);
        case Op::break_loop: return Flow::break_loop;
        case Op::continue_loop: return Flow::continue_loop;
        default: break;
    }
    return Flow::next;
}

Flow Renderer::execute_body(const Node& node) {
    for (uint32_t child : p_.children(node)) {
        const Flow flow = execute(child);
        if (failed() || flow != Flow::next) return flow;
    }
    return Flow::next;
}

Flow Renderer::execute_choice(const Node& node) {
    const auto children = p_.children(node);
    for (size_t i = 0; i + 1 < children.size(); i += 2) {
        const bool chosen = truth(eval(children[i]));
        if (failed()) return Flow::next;
        if (chosen) return execute(children[i + 1]);
    }
    return execute(children.back());
}

Flow Renderer::execute_scope(uint32_t body) {
    push_frame(frame());
    const Flow flow = execute(body);
    frames_.pop_back();
    return flow;
}

/// The items for which the loop's condition holds.
List Renderer::selected(const Node& node, const List& items) {
    const auto children = p_.children(node);
    List kept;
    push_frame(frame());
    for (const Value& item : items) {
        frames_.back().bindings.clear();
        assign(children[0], item);
        const bool keep = truth(eval(children[2]));
        if (failed()) break;
        if (keep) kept.push_back(item);
    }
    frames_.pop_back();
    return kept;
}

Flow Renderer::execute_loop(const Node& node) {
    const auto children = p_.children(node);  // target, iterable, condition, body, else
    Value items = items_of(eval(children[1]));
    if (failed()) return Flow::next;
    if (children[2]) items = list(Kind::list, selected(node, list_in(items)));
    if (failed()) return Flow::next;
    const auto state = std::make_shared<Loop>(Loop{items, 0});
    Value loop = make_kind(Kind::loop, 0);
    loop.depth = uint16_t(items.depth + 1);
    loop.object = state;
    if (list_in(items).empty()) return execute_scope(children[4]);
    push_frame(frame());
    Flow flow = Flow::next;
    for (; state->at < list_in(items).size() && !failed() && flow != Flow::break_loop;
         ++state->at) {
        frames_.back().bindings.clear();
        if (p_.loop_name) assign_name(*p_.loop_name, loop);
        assign(children[0], list_in(items)[state->at]);
        if (!failed()) flow = execute(children[3]);
    }
    frames_.pop_back();
    return Flow::next;
}

/// What `body` prints, as a string.
Flow Renderer::captured(uint32_t body, Value* value) {
    Text text;
    Text* const outer = std::exchange(out_, &text);
    const Flow flow = execute_scope(body);
    out_ = outer;
    *value = make_text(std::move(text));
    return flow;
}

/// {% set x | filters %} body {% endset %} and {% filter filters %} body {% endfilter %}.
Flow Renderer::execute_capture(const Node& node) {
    const auto children = p_.children(node);
    const bool block = node.op == Op::filter_block;
    Value v;
    const Flow flow = captured(children[block ? 0 : 1], &v);
    for (uint32_t filter : children.subspan(block ? 1 : 2)) v = apply(std::move(v), filter);
    if (failed() || flow != Flow::next) return flow;
    if (block) print(*out_, v);
    else assign(children[0], v);
    return flow;
}

// expressions

Value Renderer::eval(uint32_t id) {
    const Level level(*this);
    const Node& node = p_.nodes[id];
    line_ = node.line;
    if (!charge(1)) return {};
    switch (node.op) {
        case Op::constant: return p_.constants[node.value];
        case Op::name: return lookup(node, id);
        case Op::list: return list(Kind::list, eval_all(node));
        case Op::tuple: return list(Kind::tuple, eval_all(node));
        case Op::dict: return eval_dict(node);
        case Op::conditional: return eval_conditional(node);
        case Op::any:
        case Op::all: return eval_logic(node);
        case Op::negation: return make_bool(!truth(eval(p_.children(node)[0])));
        case Op::minus:
        case Op::plus: return eval_sign(node);
        case Op::comparison: return eval_comparison(node);
        case Op::chain: return eval_chain(node);
        default: return {};
    }
}

List Renderer::eval_all(const Node& node) {
    List items;
    for (uint32_t child : p_.children(node)) items.push_back(eval(child));
    return items;
}

Value Renderer::eval_dict(const Node& node) {
    const auto children = p_.children(node);
    Dict entries;
    for (size_t i = 0; i + 1 < children.size() && !failed(); i += 2) {
        Value key = eval(children[i]);
        if (key.depth > 0) return fail(join({"unhashable type: '", what(key), "'"}));
        charge_bytes(entries.size() * 4);
        set_entry(entries, std::move(key), eval(children[i + 1]));
    }
    return dict(std::move(entries));
}

Value Renderer::eval_conditional(const Node& node) {
    const auto children = p_.children(node);
    const bool chosen = truth(eval(children[0]));
    if (failed()) return {};
    if (chosen) return eval(children[1]);
    return children[2] ? eval(children[2]) : Value{};
}

Value Renderer::eval_logic(const Node& node) {
    Value v;
    for (uint32_t child : p_.children(node)) {
        v = eval(child);
        if (failed() || truth(v) == (node.op == Op::any)) break;
    }
    return v;
}

Value Renderer::eval_sign(const Node& node) {
    const Value v = eval(p_.children(node)[0]);
    if (failed() || node.op == Op::plus)
        return failed() || is_number(v) ? v : fail(join({"a sign before ", what(v)}));
    return is_int(v)      ? binary(Op::subtract, make_int(0), v)
           : is_number(v) ? make_real(-v.real)
                          : fail(join({"a sign before ", what(v)}));
}

Value Renderer::eval_comparison(const Node& node) {
    const auto children = p_.children(node);
    Value left = eval(children[0]);
    for (uint32_t id : children.subspan(1)) {
        const Node& next = p_.nodes[id];
        Value right = eval(p_.children(next)[0]);
        line_ = next.line;
        if (failed()) return {};
        if (!compare(next.op, left, right)) return make_bool(false);
        left = std::move(right);
    }
    return make_bool(true);
}

bool Renderer::compare(Op op, const Value& a, const Value& b) {
    switch (op) {
        case Op::equal: return equal(a, b);
        case Op::not_equal: return !equal(a, b);
        case Op::less: return less(a, b);
        case Op::greater: return less(b, a);
        case Op::less_equal: return less(a, b) || equal(a, b);
        case Op::greater_equal: return less(b, a) || equal(a, b);
        case Op::in: return contains(b, a);
        default: return !contains(b, a);
    }
}

Value Renderer::eval_chain(const Node& node) {
    const auto children = p_.children(node);
    Value v = eval(children[0]);
    for (uint32_t id : children.subspan(1)) {
        if (failed()) break;
        v = apply(std::move(v), id);
    }
    return v;
}

Value Renderer::apply(Value v, uint32_t id) {
    const Node& node = p_.nodes[id];
    line_ = node.line;
    if (!charge(1)) return {};
    const auto children = p_.children(node);
    switch (node.op) {
        case Op::attribute: return attribute(v, p_.names[node.value], id);
        case Op::slice: return apply_slice(v, node);
        case Op::filter:
        case Op::test: return apply_builtin(v, node);
        case Op::call: {
            Arguments args = eval_arguments(node);
            line_ = node.line;
            return failed() ? Value{} : call_value(v, args);
        }
        default: break;
    }
    const Value operand = eval(children[0]);
    line_ = node.line;
    if (failed()) return {};
    return node.op == Op::item ? subscript(v, operand, id) : binary(node.op, std::move(v), operand);
}

Value Renderer::apply_slice(const Value& v, const Node& node) {
    const auto children = p_.children(node);
    Value bounds[3] = {make_none(), make_none(), make_none()};
    for (size_t i = 0; i < 3; ++i)
        if (children[i]) bounds[i] = eval(children[i]);
    line_ = node.line;
    return failed() ? Value{} : slice(v, bounds[0], bounds[1], bounds[2]);
}

Value Renderer::apply_builtin(const Value& v, const Node& node) {
    const bool test = node.op == Op::test;
    const std::string& name = p_.names[node.value];
    const Builtin* builtin = test ? find_test(name) : find_filter(name);
    if (!builtin) return fail(join({"no ", test ? "test" : "filter", " named '", name, "'"}));
    Arguments args = eval_arguments(node);
    line_ = node.line;
    if (failed()) return {};
    Value made = call(*builtin, v, args);
    return test ? make_bool(truth(made) != node.flag) : made;
}

// calls

Arguments Renderer::eval_arguments(const Node& node) {
    Arguments args;
    for (uint32_t id : p_.children(node)) {
        const Node& child = p_.nodes[id];
        if (child.op != Op::keyword) args.values.push_back(eval(id));
        else args.named.emplace_back(p_.names[child.value], eval(p_.children(child)[0]));
    }
    return args;
}

const Value* Arguments::find(std::string_view name) const {
    for (const auto& [given, value] : named)
        if (given == name) return &value;
    return nullptr;
}

/// Puts the named arguments into their places.
bool Renderer::bind(const Builtin& builtin, Arguments& args) {
    if (!builtin.parameters) return true;
    const auto refuse = [&](std::string_view why) {
        fail(join({builtin.name, ": ", why}));
        return false;
    };
    std::string_view rest = builtin.parameters;
    const size_t given = args.values.size();
    size_t count = 0, used = 0;
    for (; !rest.empty(); ++count) {
        std::string_view name = rest.substr(0, rest.find(' '));
        rest.remove_prefix(std::min(rest.size(), name.size() + 1));
        const bool optional = name.back() == '?';
        name.remove_suffix(optional);
        if (count < given) continue;
        const Value* named = args.find(name);
        if (!named && !optional) return refuse(join({"needs ", name}));
        args.values.push_back(named ? *named : Value{});
        used += named != nullptr;
    }
    if (given > count) return refuse("too many arguments");
    return used == args.named.size() || refuse("an unknown argument, or one given twice");
}

Value Renderer::call(const Builtin& builtin, const Value& self, Arguments& args) {
    return bind(builtin, args) ? builtin.function(*this, self, args) : Value{};
}

Value Renderer::call_value(const Value& callee, Arguments& args) {
    if (callee.kind == Kind::macro)
        return call_macro(*static_cast<const Macro*>(callee.object.get()), args);
    if (callee.kind != Kind::function)
        return fail(callee.kind == Kind::undefined
                        ? what(callee)
                        : join({"'", what(callee), "' is not callable"}));
    const Bound& bound = *static_cast<const Bound*>(callee.object.get());
    return call(*bound.builtin, bound.self, args);
}

Value Renderer::call_macro(const Macro& macro, Arguments& args) {
    const Level level(*this);
    const Node& node = p_.nodes[macro.node];
    if (calls_ >= ChatTemplate::max_calls) return fail("macros call each other too deep");
    if (macro.frame >= frames_.size() || frames_[macro.frame].serial != macro.serial)
        return fail(
            join({"'", p_.names[node.value], "' is called outside of the block that defines it"}));
    const uint32_t line = line_;
    ++calls_;
    push_frame(macro.frame);
    Value v;
    if (bind_parameters(node, args)) captured(p_.children(node)[0], &v);
    frames_.pop_back();
    --calls_;
    line_ = line;
    return v;
}

bool Renderer::bind_parameters(const Node& node, Arguments& args) {
    const auto parameters = p_.children(node).subspan(1);
    if (args.values.size() > parameters.size()) {
        fail(join({"too many arguments for '", p_.names[node.value], "'"}));
        return false;
    }
    size_t used = 0;
    for (size_t i = 0; i < parameters.size() && !failed(); ++i) {
        const Node& parameter = p_.nodes[parameters[i]];
        const std::string& name = p_.names[parameter.value];
        Value v = make_kind(Kind::undefined, parameters[i]);
        charge_bytes(args.named.size());
        const Value* named = args.find(name);
        if (i < args.values.size()) {
            v = args.values[i];
        } else if (named) {
            v = *named;
            ++used;
        } else if (p_.children(parameter)[0]) {
            v = eval(p_.children(parameter)[0]);
        }
        assign_name(parameter.value, std::move(v));
    }
    if (used != args.named.size() && !failed())
        fail(join({"an unknown argument for '", p_.names[node.value], "', or one given twice"}));
    return !failed();
}

// operators

bool Renderer::equal(const Value& a, const Value& b) {
    if (!charge(1)) return false;
    if (is_number(a) && is_number(b))
        return is_int(a) && is_int(b) ? a.integer == b.integer : number_in(a) == number_in(b);
    if (a.kind != b.kind) return false;
    switch (a.kind) {
        case Kind::undefined:
        case Kind::none: return true;
        case Kind::string: return charge_bytes(chars(a).size() / 8) && chars(a) == chars(b);
        case Kind::name_space: return a.integer == b.integer;
        case Kind::dict: {
            if (dict_in(a).size() != dict_in(b).size()) return false;
            for (const Entry& e : dict_in(a)) {
                const Value other = subscript(b, e.key);
                if (failed() || other.kind == Kind::undefined || !equal(e.value, other))
                    return false;
            }
            return true;
        }
        case Kind::list:
        case Kind::tuple:
            return list_in(a).size() == list_in(b).size() &&
                   std::equal(list_in(a).begin(), list_in(a).end(), list_in(b).begin(),
                              [&](const Value& x, const Value& y) { return equal(x, y); });
        default: return a.object == b.object;
    }
}

bool Renderer::less(const Value& a, const Value& b) {
    if (!charge(1)) return false;
    if (is_number(a) && is_number(b))
        return is_int(a) && is_int(b) ? a.integer < b.integer : number_in(a) < number_in(b);
    if (is_string(a) && is_string(b))  // the order of UTF-8 is that of code points
        return charge_bytes(std::min(chars(a).size(), chars(b).size()) / 8) && chars(a) < chars(b);
    if (is_list(a) && a.kind == b.kind) {
        const List &x = list_in(a), &y = list_in(b);
        for (size_t i = 0; i < std::min(x.size(), y.size()) && !failed(); ++i)
            if (!equal(x[i], y[i])) return less(x[i], y[i]);
        return x.size() < y.size();
    }
    fail(join({"no order between ", what(a), " and ", what(b)}));
    return false;
}

bool Renderer::contains(const Value& container, const Value& v) {
    if (is_string(container)) {
        if (!want(v, Kind::string)) return false;
        if (!charge_bytes(chars(container).size() / 8 + chars(v).size() * 4)) return false;
        return find_text(chars(container), chars(v)) != std::string::npos;
    }
    if (container.kind == Kind::dict)
        return charge_bytes(dict_in(container).size() * 4) && find_entry(dict_in(container), v);
    const Value items = items_of(container);
    if (failed()) return false;
    for (const Value& item : list_in(items))
        if (failed() || equal(item, v)) return !failed();
    return false;
}

Value Renderer::concatenated(Value a, const Value& b) {
    // A string that nobody else holds grows in place: a + b + c copies each of them once.
    if (a.object.use_count() == 1 && a.object != b.object) {
        append(*static_cast<Text*>(a.object.get()), text_in(b));
        return a;
    }
    Text text;
    text.text.reserve(chars(a).size() + chars(b).size());
    append(text, text_in(a)) && append(text, text_in(b));
    return make_text(std::move(text));
}

Value Renderer::binary(Op op, Value a, const Value& b) {
    if (op == Op::concat) {
        const Value right = to_string(b);
        Value left = is_string(a) ? std::move(a) : to_string(a);
        return failed() ? Value{} : concatenated(std::move(left), right);
    }
    if (is_number(a) && is_number(b)) {
        Value v = arithmetic(op, a, b);
        v.request = a.request || b.request;
        return v;
    }
    if (op == Op::add && is_string(a) && is_string(b)) return concatenated(std::move(a), b);
    if (op == Op::add && is_list(a) && a.kind == b.kind) {
        List items = list_in(a);
        items.insert(items.end(), list_in(b).begin(), list_in(b).end());
        return list(a.kind, std::move(items));
    }
    if (op == Op::multiply && (is_string(a) || is_list(a)) && is_int(b))
        return repeated(a, b.integer);
    if (op == Op::multiply && (is_string(b) || is_list(b)) && is_int(a))
        return repeated(b, a.integer);
    if (a.kind == Kind::undefined || b.kind == Kind::undefined)
        return fail(what(a.kind == Kind::undefined ? a : b));
    return fail(join({"cannot combine ", what(a), " and ", what(b)}));
}

Value Renderer::repeated(const Value& v, int64_t times) {
    List items;
    Text text;
    for (int64_t i = 0; i < times && charge(1); ++i) {
        if (is_string(v)) append(text, text_in(v));
        else if (charge_bytes(list_in(v).size() * sizeof(Value)))
            items.insert(items.end(), list_in(v).begin(), list_in(v).end());
    }
    return is_string(v) ? make_text(std::move(text)) : list(v.kind, std::move(items));
}

namespace {

/// a op b for 64-bit integers; false: it does not fit, or is no integer.
bool integer_result(Op op, int64_t a, int64_t b, int64_t* out) {
    const uint64_t x = uint64_t(a), y = uint64_t(b);
    switch (op) {
        case Op::add: *out = int64_t(x + y); return ((a ^ *out) & (b ^ *out)) >= 0;
        case Op::subtract: *out = int64_t(x - y); return ((a ^ b) & (a ^ *out)) >= 0;
        case Op::multiply:
            *out = int64_t(x * y);
            return a == 0 || (*out / a == b && a != INT64_MIN && b != INT64_MIN);
        case Op::floor_divide:
            if (a == INT64_MIN) return false;
            *out = a / b - (a % b != 0 && (a < 0) != (b < 0));
            return true;
        case Op::modulo:
            if (a == INT64_MIN) return false;
            *out = a % b + (a % b != 0 && (a < 0) != (b < 0) ? b : 0);
            return true;
        case Op::power: {
            if (b < 0) return false;
            if (a >= -1 && a <= 1) {
                *out = b == 0 || (a == -1 && b % 2 == 0) ? 1 : a;
                return true;
            }
            *out = 1;
            for (int64_t i = 0; i < b; ++i)  // at most 63 times
                if (!integer_result(Op::multiply, *out, a, out)) return false;
            return true;
        }
        default: return false;
    }
}

}  // namespace

Value Renderer::arithmetic(Op op, const Value& a, const Value& b) {
    const bool divides = op == Op::divide || op == Op::floor_divide || op == Op::modulo;
    const double x = number_in(a), y = number_in(b);
    if (divides && y == 0) return fail("division by zero");
    const bool integers = is_int(a) && is_int(b) && op != Op::divide;
    int64_t i = 0;
    if (integers && integer_result(op, a.integer, b.integer, &i)) return make_int(i);
    if (integers && !(op == Op::power && b.integer < 0)) return fail("an integer over 63 bits");
    switch (op) {
        case Op::add: return make_real(x + y);
        case Op::subtract: return make_real(x - y);
        case Op::multiply: return make_real(x * y);
        case Op::divide: return make_real(x / y);
        case Op::floor_divide: return make_real(std::floor(x / y));
        case Op::modulo: return make_real(x - y * std::floor(x / y));
        default: return make_real(std::pow(x, y));
    }
}

// parts of values

Value Renderer::loop_attribute(const Loop& loop, std::string_view name) {
    const List& items = list_in(loop.items);
    const int64_t at = int64_t(loop.at), size = int64_t(items.size());
    if (name == "index") return make_int(at + 1);
    if (name == "index0") return make_int(at);
    if (name == "revindex") return make_int(size - at);
    if (name == "revindex0") return make_int(size - at - 1);
    if (name == "first") return make_bool(at == 0);
    if (name == "last") return make_bool(at + 1 >= size);
    if (name == "length") return make_int(size);
    if (name == "depth") return make_int(1);
    if (name == "depth0") return make_int(0);
    if (name == "previtem" && at > 0) return items[size_t(at) - 1];
    if (name == "nextitem" && at + 1 < size) return items[size_t(at) + 1];
    return {};
}

/// v.name: a method first, then a member, as Jinja does.
Value Renderer::attribute(const Value& v, std::string_view name, uint32_t node) {
    if (v.kind == Kind::undefined) return fail(what(v));
    if (const Builtin* method = find_method(v, name)) {
        Value made = make_kind(Kind::function, 0);
        made.depth = uint16_t(v.depth + 1);
        made.object = std::make_shared<Bound>(Bound{v, method});
        return made;
    }
    Value made;
    if (v.kind == Kind::loop)
        made = loop_attribute(*static_cast<const Loop*>(v.object.get()), name);
    const Dict* members = v.kind == Kind::dict         ? &dict_in(v)
                          : v.kind == Kind::name_space ? &name_spaces_[size_t(v.integer)]
                                                       : nullptr;
    if (members) charge_bytes(members->size() * 4);
    if (const Value* found = members ? find_entry(*members, name) : nullptr) return *found;
    return made.kind == Kind::undefined ? make_kind(Kind::undefined, node) : made;
}

/// v[key]: a member or an item first, then what v.key is.
Value Renderer::subscript(const Value& v, const Value& key, uint32_t node) {
    if (v.kind == Kind::undefined) return fail(what(v));
    if (v.kind == Kind::dict) {
        charge_bytes(dict_in(v).size() * 4);
        if (const Value* found = find_entry(dict_in(v), key)) return *found;
    }
    if (is_string(key)) return attribute(v, chars(key), node);
    const Value missing = make_kind(Kind::undefined, node);
    if (!is_int(key) || !(is_list(v) || is_string(v))) return missing;
    if (is_string(v)) charge_bytes(chars(v).size() / 8);
    const int64_t size = int64_t(is_list(v) ? list_in(v).size() : utf8_count(chars(v)));
    const int64_t at = key.integer < 0 ? key.integer + size : key.integer;
    if (at < 0 || at >= size) return missing;
    if (is_list(v)) return list_in(v)[size_t(at)];
    const size_t begin = utf8_offset(chars(v), size_t(at));
    size_t end = begin;
    utf8_next(chars(v), &end);
    return piece(v, {begin, end});
}

Value Renderer::path(const Value& v, const Value& dotted) {
    if (!is_string(dotted)) return subscript(v, dotted);
    const std::string_view names = chars(dotted);
    Value at = v;
    for (size_t begin = 0; begin <= names.size() && !failed();) {
        const size_t end = std::min(names.find('.', begin), names.size());
        const std::string_view name = names.substr(begin, end - begin);
        const bool digits = !name.empty() && name.size() < 10 &&
                            std::all_of(name.begin(), name.end(), is_digit);
        at = subscript(at,
                       digits ? make_int(std::atoi(std::string(name).c_str())) : make_text(name));
        begin = end + 1;
    }
    return at;
}

/// Python's rules: negative places count from the end, and what is outside is cut off.
Value Renderer::slice(const Value& v, const Value& begin, const Value& end, const Value& step) {
    if (!is_string(v) && !is_list(v)) return v.kind == Kind::undefined ? fail(what(v)) : Value{};
    for (const Value* bound : {&begin, &end, &step})
        if (bound->kind != Kind::none && !is_int(*bound)) return {};  // as Jinja does
    if (is_string(v)) charge_bytes(chars(v).size() / 8);
    const int64_t size = int64_t(is_list(v) ? list_in(v).size() : utf8_count(chars(v)));
    const int64_t by = step.kind == Kind::none
                           ? 1
                           : std::clamp<int64_t>(step.integer, -size - 1, size + 1);
    if (by == 0) return fail("a slice with step 0");
    const auto place = [&](const Value& bound, int64_t absent) {
        if (bound.kind == Kind::none) return absent;
        const int64_t at = bound.integer < 0 ? bound.integer + size : bound.integer;
        return std::clamp<int64_t>(at, by > 0 ? 0 : -1, by > 0 ? size : size - 1);
    };
    const int64_t from = place(begin, by > 0 ? 0 : size - 1), to = place(end, by > 0 ? size : -1);
    if (is_string(v) && by == 1) {
        const size_t first = utf8_offset(chars(v), size_t(from));
        const size_t count = size_t(std::max<int64_t>(to - from, 0));
        return piece(v,
                     {first, first + utf8_offset(std::string_view(chars(v)).substr(first), count)});
    }
    const Value items = items_of(v);
    List kept;
    Text text;
    for (int64_t i = from; (by > 0 ? i < to : i > to) && !failed(); i += by) {
        const Value& item = list_in(items)[size_t(i)];
        if (is_string(v)) append(text, text_in(item));
        else kept.push_back(item);
    }
    return is_string(v) ? make_text(std::move(text)) : list(v.kind, std::move(kept));
}

// writing

namespace {

/// The inside of Python's repr of a string.
std::string python_escaped(std::string_view s, char quote) {
    std::string out;
    for (size_t at = 0; at < s.size();) {
        const size_t begin = at;
        const char32_t c = utf8_next(s, &at);
        const Category k = category(c);
        if (c == char32_t(quote) || c == '\\') (out += '\\') += char(c);
        else if (c == '\n' || c == '\r' || c == '\t')
            out += c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t";
        else if (c == ' ' || k < Category::Zs) out += s.substr(begin, at - begin);
        else if (c > 0xffff) out += format("\\U%08x", unsigned(c));
        else out += format(c > 0xff ? "\\u%04x" : "\\x%02x", unsigned(c));
    }
    return out;
}

}  // namespace

void Renderer::write(Text& out, const Value& v, const WriteStyle& style, size_t level,
                     bool request) {
    if (!charge(1)) return;
    request = request || v.request;
    const auto word = [&](const char* json, const char* python) {
        append(out, style.json ? json : python, request);
    };
    switch (v.kind) {
        case Kind::none: return word("null", "None");
        case Kind::boolean: return v.integer ? word("true", "True") : word("false", "False");
        case Kind::integer: return void(append(out, number_text(v), request));
        case Kind::real:
            if (!style.json || std::isfinite(v.real))
                return void(append(out, number_text(v), request));
            return word(std::isnan(v.real) ? "NaN" : v.real > 0 ? "Infinity" : "-Infinity", "");
        case Kind::string: {
            const std::string& s = chars(v);
            const bool apostrophes = s.find('\'') != std::string::npos &&
                                     s.find('"') == std::string::npos;
            const char quote = style.json || apostrophes ? '"' : '\'';
            append(out, std::string_view(&quote, 1), request);
            each_run(text_in(v), [&](std::string_view run, bool marked) {
                charge_bytes(run.size());
                if (failed()) return;
                std::string escaped;
                if (style.json) write_json_escaped(escaped, run, style.ascii);
                else escaped = python_escaped(run, quote);
                append(out, escaped, request || marked);
            });
            append(out, std::string_view(&quote, 1), request);
            return;
        }
        case Kind::list:
        case Kind::tuple:
        case Kind::dict: return write_container(out, v, style, level, request);
        default:
            if (style.json) fail(join({"a value of type ", what(v), " has no JSON"}));
            else append(out, join({"<", kind_name(v), ">"}), false);
    }
}

void Renderer::write_container(Text& out, const Value& v, const WriteStyle& style, size_t level,
                               bool request) {
    const bool is_dict = v.kind == Kind::dict;
    const bool round = v.kind == Kind::tuple && !style.json;
    const size_t size = is_dict ? dict_in(v).size() : list_in(v).size();
    const auto new_line = [&](size_t depth) {
        if (!style.lines || size == 0) return;
        append(out, "\n", request);
        for (size_t i = 0; i < depth && !failed(); ++i) append(out, style.indent, request);
    };
    Dict entries;
    if (is_dict && style.sorted) {
        entries = dict_in(v);
        sort_items(entries, [&](const Entry& a, const Entry& b) { return less(a.key, b.key); });
    }
    append(out, is_dict ? "{" : round ? "(" : "[", request);
    for (size_t i = 0; i < size && !failed(); ++i) {
        if (i > 0) append(out, style.comma, request);
        new_line(level + 1);
        if (!is_dict) {
            write(out, list_in(v)[i], style, level + 1, request);
            continue;
        }
        const Entry& e = style.sorted ? entries[i] : dict_in(v)[i];
        const bool quoted = style.json && !is_string(e.key);  // {1: 2} is {"1": 2}
        if (quoted) append(out, "\"", request);
        write(out, e.key, style, level + 1, request);
        if (quoted) append(out, "\"", request);
        append(out, style.colon, request);
        write(out, e.value, style, level + 1, request);
    }
    if (round && size == 1) append(out, ",", request);
    new_line(level);
    append(out, is_dict ? "}" : round ? ")" : "]", request);
}

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
