#include "prologue.hpp"

#include "api_internal.hpp"
#include "base/text.hpp"
#include "json_internal.hpp"
#include "template/renderer.hpp"

#include <algorithm>
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
    else if (stack_.is_low()) fail(stack_too_small);
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
    if (!charge_bytes(piece.size() + 48)) return false;           // 48: of a mark and the call
    const uint64_t grown = (out.text.size() + piece.size()) * 3;  // a growing string has room
    if (grown > size_t{1} << 12 && !room_for(grown)) return false;
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
    return text_value(std::move(text));
}

Value Renderer::escaped(const Value& v) {
    if (is_string(v) && v.markup) return v;
    static const char entities[][7] = {"&amp;", "&lt;", "&gt;", "&#34;", "&#39;"};
    const std::string_view marked = "&<>\"'";
    const Value s = to_string(v);
    Text out;
    each_run(text_in(s), [&](std::string_view run, bool request) {
        while (!run.empty() && !failed()) {
            const size_t at = std::min(run.find_first_of(marked), run.size());
            append(out, run.substr(0, at), request);
            if (at < run.size()) append(out, entities[marked.find(run[at])], request);
            run.remove_prefix(std::min(at + 1, run.size()));
        }
    });
    Value made = text_value(std::move(out));
    made.markup = true;
    return made;
}

Value Renderer::piece(const Value& string, ByteRange range) {
    Text text;
    charge(1);
    append(text, text_in(string), range);
    return text_value(std::move(text));
}

// containers

namespace {

template <class Item>
uint64_t held_bytes(const std::vector<Item>& items) {
    return items.capacity() * sizeof(Item);
}
uint64_t held_bytes(const Text& text) {
    return sizeof(Text) + text.text.capacity() + held_bytes(text.from_request);
}

/// A container or text that is counted while it lives.
template <class Items>
struct Counted : Items {
    Counted(Items&& items, uint64_t* total)
        : Items(std::move(items)),
          live(total),
          bytes(held_bytes(static_cast<const Items&>(*this)) + 64) {
        *live += bytes;
    }
    ~Counted() { *live -= bytes; }
    Counted(const Counted&) = delete;
    uint64_t* live;
    uint64_t bytes;
};

template <class Items>
void count(Value& made, uint64_t* live) {
    Items& items = *static_cast<Items*>(made.object.get());
    std::shared_ptr<Items> counted = std::make_shared<Counted<Items>>(std::move(items), live);
    made.object = std::move(counted);
}

}  // namespace

bool Renderer::room_for(uint64_t bytes) {
    if (bytes > allowed_ - std::min(live_, allowed_)) fail("text and lists of over 10 MiB");
    return !failed();
}

bool Renderer::room(uint64_t values) {
    return room_for(std::min<uint64_t>(values, UINT32_MAX) * sizeof(Value));
}

Value Renderer::text_value(Text made) {
    Value v;
    v.kind = Kind::string;
    std::shared_ptr<Text> counted = std::make_shared<Counted<Text>>(std::move(made), &live_);
    v.object = std::move(counted);
    return room(1) ? v : make_text("");  // still a text: who wanted one looks into it
}

Value Renderer::list(Kind kind, List items) {
    charge_bytes(items.size() * sizeof(Value));
    Value made = make_list(kind, std::move(items));
    count<List>(made, &live_);
    if (!room(1)) return {};
    return made.depth > ChatTemplate::max_value_depth ? fail("lists nested too deep") : made;
}

Value Renderer::dict(Dict entries) {
    charge_bytes(entries.size() * sizeof(Entry));
    Value made = make_dict(std::move(entries));
    count<Dict>(made, &live_);
    if (!room(1)) return {};
    return made.depth > ChatTemplate::max_value_depth ? fail("dicts nested too deep") : made;
}

Value Renderer::name_space(Dict fields) {
    charge(4 + fields.size() * 8);  // they stay to the end
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
        case Kind::iterator: {  // a generator gives its items once
            if (is_view(v)) return v;
            List& left = *static_cast<List*>(v.object.get());
            return make_list(Kind::list, std::exchange(left, {}));
        }
        case Kind::list:
        case Kind::tuple: return v;
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

namespace {

/// In a message's content, what stands between the bytes of tokens is the template's.
Text text_of(std::string_view chars, bool request, bool content) {
    Text text;
    while (!chars.empty()) {
        const size_t begin = content ? std::min(chars.find(kTokenBegin), chars.size())
                                     : chars.size();
        text.text += chars.substr(0, begin);
        if (request) add_mark(text, text.text.size() - begin, text.text.size());
        chars.remove_prefix(begin);
        if (chars.empty()) break;
        const size_t end = std::min(chars.find(kTokenEnd), chars.size());
        text.text += chars.substr(1, end - 1);
        chars.remove_prefix(std::min(end + 1, chars.size()));
    }
    return text;
}

}  // namespace

Value Renderer::from_json(const Json& json, bool request, Where where) {
    const Where inside = where == Where::elsewhere ? where : Where::messages;
    Value v;
    if (stack_.is_low()) return fail(stack_too_small);
    switch (json.kind()) {
        case Json::Kind::null: v = make_none(); break;
        case Json::Kind::boolean: v = make_bool(json.as_bool()); break;
        case Json::Kind::int64: v = make_int(json.as_int()); break;
        case Json::Kind::uint64: return fail("an integer over 63 bits");
        case Json::Kind::real: v = make_real(json.as_double()); break;
        case Json::Kind::string: {
            allowed_ += json.as_string().size() * 16;
            v = text_value(text_of(json.as_string(), request, where == Where::content));
            break;
        }
        case Json::Kind::array: {
            List items;
            items.reserve(json.size());
            allowed_ += json.size() * 1024;
            for (const Json& item : json.items()) items.push_back(from_json(item, request, inside));
            v = make_list(Kind::list, std::move(items));
            break;
        }
        case Json::Kind::object: {
            Dict entries;
            entries.reserve(json.size());
            for (const JsonMember& m : json.members()) {
                allowed_ += m.key.size() * 16 + 1024;
                Text key{m.key, {}};
                if (request) add_mark(key, 0, key.text.size());
                const bool content = m.key == "content" || m.key == "text";
                const Where at = content && inside == Where::messages ? Where::content : inside;
                entries.push_back({text_value(std::move(key)), from_json(m.value, request, at)});
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
        const bool messages = request && p_.names[id] == "messages";
        const Where where = messages ? Where::messages : Where::elsewhere;
        assign_name(id, from_json(*member, request, where));
        if (messages) trust_roles(frames_.back().bindings.back().second);
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
    charge_bytes(frames_.back().bindings.size() * 2);
    for (auto& [id, old] : frames_.back().bindings)
        if (id == name) {
            old = std::move(value);
            return;
        }
    frames_.back().bindings.emplace_back(name, std::move(value));
}

Value Renderer::lookup(const Node& node, uint32_t id) {
    for (uint32_t f = frame();; f = frames_[f].parent) {
        charge_bytes(frames_[f].bindings.size() * 2 + 1);
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
            assign_name(node.value, new_macro(id));
            break;
        }
        case Op::call_block: {
            const Value v = eval_call_block(node);
            if (!failed()) print(*out_, v);
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
    const Place place{uint32_t(&node - p_.nodes.data()), frame(), frames_.back().serial};
    return run_loop(place, std::move(items), 0);
}

/// The loop that stands at `place`; `depth`: of a recursive one.
Flow Renderer::run_loop(const Place& place, Value items, uint32_t depth) {
    const Node& node = p_.nodes[place.node];
    const auto children = p_.children(node);
    if (children[2]) items = list(Kind::list, selected(node, list_in(items)));
    if (failed()) return Flow::next;
    const auto state = std::make_shared<Loop>(Loop{items, 0, place, depth, std::nullopt});
    Value loop = make_kind(Kind::loop, 0);
    loop.depth = uint16_t(items.depth + 16);  // its destructor calls that of the items
    loop.object = state;
    if (list_in(items).empty()) return execute_scope(children[4]);
    push_frame(place.frame);
    Flow flow = Flow::next;
    for (; state->at < list_in(items).size() && !failed() && flow != Flow::break_loop;
         ++state->at) {
        frames_.back().bindings.clear();
        // What `changed` remembers may hold the loop: such a ring is cut below.
        if (p_.loop_name) assign_name(*p_.loop_name, loop);
        assign(children[0], list_in(items)[state->at]);
        if (!failed()) flow = execute(children[3]);
    }
    frames_.pop_back();
    state->last.reset();
    return Flow::next;
}

/// What `body` prints, as a string.
Flow Renderer::captured(uint32_t body, Value* value) {
    Text text;
    const Outer outer(*this, &text);
    const Flow flow = execute_scope(body);
    *value = text_value(std::move(text));
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
    if (failed()) return {};
    if (!is_number(v)) return fail(join({"a sign before ", what(v)}));
    if (is_int(v)) return binary(node.op == Op::plus ? Op::add : Op::subtract, make_int(0), v);
    Value made = make_real(node.op == Op::plus ? v.real : -v.real);
    made.request = v.request;
    return made;
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
    return failed() ? Value{} : slice(v, bounds[0], bounds[1], bounds[2], node.flag);
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
        if (child.op == Op::spread) spread(child, args);
        else if (child.op != Op::keyword) args.values.push_back(eval(id));
        else args.named.push_back({make_text(p_.names[child.value]), eval(p_.children(child)[0])});
    }
    return args;
}

/// *list or **dict. A dict's keys keep their marks: they may be printed again.
void Renderer::spread(const Node& node, Arguments& args) {
    const Value v = eval(p_.children(node)[0]);
    if (!failed() && !node.flag) {
        const Value items = items_of(v);
        if (failed() || !room(list_in(items).size()) ||
            !charge_bytes(list_in(items).size() * sizeof(Value) * 2))
            return;
        args.values.insert(args.values.end(), list_in(items).begin(), list_in(items).end());
        return;
    }
    if (failed() || !want(v, Kind::dict)) return;
    for (const Entry& e : dict_in(v)) {
        if (!want(e.key, Kind::string) || !charge_bytes(sizeof(Entry) + args.named.size() * 8))
            return;
        if (args.find(chars(e.key)))
            return void(fail(join({"the argument '", chars(e.key), "' was given twice"})));
        args.named.push_back(e);
    }
}

const Value* Arguments::find(std::string_view name) const { return find_entry(named, name); }

bool Arguments::take(std::string_view name, Value* value) {
    for (size_t i = 0; i < named.size(); ++i) {
        if (chars(named[i].key) != name) continue;
        *value = std::move(named[i].value);
        named.erase(named.begin() + ptrdiff_t(i));
        return true;
    }
    return false;
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
    if (!charge(3) || !bind(builtin, args)) return {};
    return builtin.function(*this, self, args);
}

namespace {

/// What a method of a string that is markup gives is markup too.
void pass_markup_on(Value& made) {
    if (is_string(made)) made.markup = true;
    if (!is_list(made)) return;
    for (Value& item : *static_cast<List*>(made.object.get())) pass_markup_on(item);
}

}  // namespace

Value Renderer::call_value(const Value& callee, Arguments& args) {
    if (callee.kind == Kind::macro)
        return call_macro(*static_cast<const Place*>(callee.object.get()), args);
    if (callee.kind == Kind::loop)
        return call_loop(*static_cast<const Loop*>(callee.object.get()), args);
    if (callee.kind != Kind::function)
        return fail(callee.kind == Kind::undefined
                        ? what(callee)
                        : join({"'", what(callee), "' is not callable"}));
    const Bound& bound = *static_cast<const Bound*>(callee.object.get());
    Value made = call(*bound.builtin, bound.self, args);
    if (bound.self.markup) pass_markup_on(made);
    return made;
}

/// Whether the block around a macro or loop still runs, and nothing calls itself without end.
bool Renderer::can_call(const Place& place) {
    if (calls_ >= ChatTemplate::max_calls) fail("macros call each other too deep");
    if (place.frame >= frames_.size() || frames_[place.frame].serial != place.serial)
        fail(join(
            {"'",
             p_.nodes[place.node].op == Op::macro ? p_.names[p_.nodes[place.node].value] : "loop",
             "' is called outside of the block that defines it"}));
    return !failed();
}

/// loop(items) in a recursive loop: what it prints for these.
Value Renderer::call_loop(const Loop& loop, Arguments& args) {
    const Level level(*this);
    const Place place = loop.place;
    if (!p_.nodes[place.node].flag) return fail("loop: is called, but not recursive");
    if (args.values.size() != 1 || !args.named.empty()) return fail("loop: needs the items");
    Value items = items_of(args.values[0]);
    if (failed() || !can_call(place)) return {};
    const uint32_t line = line_;
    Text text;
    const Outer outer(*this, &text);
    ++calls_;
    run_loop(place, std::move(items), loop.nesting + 1);
    --calls_;
    line_ = line;
    return text_value(std::move(text));
}

/// The call of {% call %}, with the block's body as `caller`.
Value Renderer::eval_call_block(const Node& node) {
    const auto children = p_.children(node), chain = p_.children(p_.nodes[children[0]]);
    Value callee = eval(chain[0]);
    for (uint32_t id : chain.subspan(1, chain.size() - 2))
        if (!failed()) callee = apply(std::move(callee), id);
    if (failed()) return {};
    Arguments args = eval_arguments(p_.nodes[chain.back()]);
    args.named.push_back({make_text("caller"), new_macro(children[1])});
    return failed() ? Value{} : call_value(callee, args);
}

Value Renderer::new_macro(uint32_t node) {
    Value v = make_kind(Kind::macro, 0);
    v.object = std::make_shared<Place>(Place{node, frame(), frames_.back().serial});
    return v;
}

Value Renderer::call_macro(const Place& macro, Arguments& args) {
    const Level level(*this);
    const Node& node = p_.nodes[macro.node];
    if (!can_call(macro) || !charge(4)) return {};
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
    const auto parameters = p_.children(node).subspan(2);
    bool has_caller = false;
    for (size_t i = 0; i < parameters.size() && !failed(); ++i) {
        const Node& parameter = p_.nodes[parameters[i]];
        has_caller = has_caller || p_.names[parameter.value] == "caller";
        Value v = make_kind(Kind::undefined, parameters[i]);
        charge_bytes(ChatTemplate::bytes_per_step + args.named.size());
        if (i < args.values.size()) v = args.values[i];
        else if (!args.take(p_.names[parameter.value], &v) && p_.children(parameter)[0])
            v = eval(p_.children(parameter)[0]);
        assign_name(parameter.value, std::move(v));
    }
    List rest;
    for (size_t i = parameters.size(); i < args.values.size(); ++i) rest.push_back(args.values[i]);
    return bind_special(node, has_caller, std::move(rest), args);
}

/// caller, kwargs and varargs, of which a macro has those that it uses.
bool Renderer::bind_special(const Node& node, bool has_caller, List rest, Arguments& args) {
    const uint32_t special = p_.children(node)[1];
    const std::string& name = p_.names[node.value];
    if ((special & special_caller) && !has_caller) {
        Value caller;
        args.take("caller", &caller);
        assign_name(*p_.caller_name, std::move(caller));
    }
    if (special & special_kwargs) assign_name(*p_.kwargs_name, dict(std::move(args.named)));
    else if (!args.named.empty() && !failed())
        fail(join({"an unknown argument for '", name, "', or one given twice"}));
    if (special & special_varargs)
        assign_name(*p_.varargs_name, list(Kind::tuple, std::move(rest)));
    else if (!rest.empty()) fail(join({"too many arguments for '", name, "'"}));
    return !failed();
}

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
