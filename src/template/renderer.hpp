#pragma once

#include "template/values.hpp"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace valar {
inline namespace v1 {
namespace detail {
namespace jinja {

enum class Flow : uint8_t { next, break_loop, continue_loop };

struct Arguments {
    List values = {};
    Dict named = {};

    const Value* find(std::string_view name) const;  // among the named ones, or null
    bool take(std::string_view name, Value* value);  // out of the named ones
};

class Renderer;
using Function = Value (*)(Renderer& r, const Value& self, Arguments& args);

/// A filter, test, method or global function. `parameters`: names with a space between them, `?`
/// behind the optional ones; `args.values` then has one value for each, undefined where none was
/// given. Null: it takes its arguments as they come.
struct Builtin {
    const char* name;
    const char* parameters;
    Function function;
};

const Builtin* find_filter(std::string_view name);
const Builtin* find_test(std::string_view name);
const Builtin* find_method(const Value& self, std::string_view name);
const Builtin* find_global(std::string_view name);

struct Bound {  // a function value: a method with what it belongs to, or a global function
    Value self;
    const Builtin* builtin;
};

struct Place {  // of a macro or a loop
    uint32_t node;
    uint32_t frame;   // where it was defined
    uint64_t serial;  // of that frame
};

struct Loop {  // what `loop` is
    Value items;
    size_t at;
    Place place;
    uint32_t nesting;          // of a recursive one
    std::optional<List> last;  // what `changed` was given last
};

/// How values are written: as Python's repr, or as json.dumps.
struct WriteStyle {
    bool json = false;
    bool ascii = false;
    bool sorted = false;
    std::string indent = {};
    bool lines = false;  // one item a line
    std::string comma = ", ";
    std::string colon = ": ";
};

/// One rendering. What fails sets the error, gives undefined, and stops everything else.
class Renderer {
public:
    Renderer(const TemplateProgram& program, int64_t now) : now_s(now), p_(program) {}
    Result<Text> run(const TemplateInput& input);

    const int64_t now_s;

    Value fail(std::string_view what, ErrorKind kind = ErrorKind::invalid_request);
    Value raise(std::string_view words);  // the template's own refusal
    bool failed() const { return error_.has_value(); }
    bool charge(uint64_t steps) { return charge_bytes(steps * ChatTemplate::bytes_per_step); }
    bool charge_bytes(uint64_t bytes);  // also sees the stack's end: whatever recurses has steps
    bool room(uint64_t values);         // whether so many more may live at once
    bool room_for(uint64_t bytes);

    bool append(Text& out, std::string_view piece, bool request);
    bool append(Text& out, const Text& from, ByteRange range);
    bool append(Text& out, const Text& from) { return append(out, from, {0, from.text.size()}); }
    void print(Text& out, const Value& v);  // Python's str()
    void write(Text& out, const Value& v, const WriteStyle& style, size_t level, bool request);
    Value to_string(const Value& v);
    Value escaped(const Value& v);  // as markup: <, >, &, " and ' in HTML's spelling
    Value piece(const Value& string, ByteRange range);  // of a string
    Value text_value(Text made);  // what a template makes is counted while it lives
    Value list(Kind kind, List items);
    Value dict(Dict entries);
    Value items_of(const Value& v);  // as a list, for iteration
    bool want(const Value& v, Kind kind);
    std::string what(const Value& v) const;  // for messages

    bool equal(const Value& a, const Value& b);
    bool less(const Value& a, const Value& b);
    bool contains(const Value& container, const Value& v);
    bool compare(Op op, const Value& a, const Value& b);
    Value binary(Op op, Value a, const Value& b);
    Value attribute(const Value& v, std::string_view name, uint32_t node = 0);
    Value subscript(const Value& v, const Value& key, uint32_t node = 0);
    Value path(const Value& v, const Value& dotted);  // filters' attribute = "a.b"
    Value slice(const Value& v, const Value& begin, const Value& end, const Value& step,
                bool constant = false);
    Value call(const Builtin& builtin, const Value& self, Arguments& args);
    Value name_space(Dict fields);
    Dict& fields(const Value& name_space) { return name_spaces_[size_t(name_space.integer)]; }

private:
    struct Frame {
        uint32_t parent;
        uint64_t serial;
        std::vector<std::pair<uint32_t, Value>> bindings;
    };
    /// One level of evaluation: bounds the machine's stack.
    struct Level {
        explicit Level(Renderer& renderer) : r(renderer) {
            if (++r.levels_ > ChatTemplate::max_levels) r.fail("evaluation nested too deep");
        }
        ~Level() { --r.levels_; }
        Level(const Level&) = delete;
        Renderer& r;
    };

    /// What is printed goes to `text`, and what went elsewhere before waits and is counted.
    struct Outer {
        Outer(Renderer& renderer, Text* text)
            : r(renderer), out(renderer.out_), bytes(out->text.capacity()) {
            r.live_ += bytes;
            r.out_ = text;
        }
        ~Outer() {
            r.live_ -= bytes;
            r.out_ = out;
        }
        Outer(const Outer&) = delete;
        Renderer& r;
        Text* out;
        uint64_t bytes;
    };

    /// Where a part of the request stands: bytes of tokens are the template's only in the content
    /// of messages, out of which those of the request were taken.
    enum class Where : uint8_t { elsewhere, messages, content };
    Value from_json(const Json& json, bool request, Where where = Where::elsewhere);
    void bind_context(const Json& object, bool request);

    void push_frame(uint32_t parent) { frames_.push_back({parent, ++serial_, {}}); }
    uint32_t frame() const { return uint32_t(frames_.size() - 1); }
    void assign_name(uint32_t name, Value value);
    Value lookup(const Node& node, uint32_t id);
    void assign(uint32_t target, const Value& value);

    Flow execute(uint32_t id);
    Flow execute_body(const Node& node);
    Flow execute_choice(const Node& node);
    Flow execute_loop(const Node& node);
    Flow execute_scope(uint32_t body);
    Flow execute_capture(const Node& node);
    Flow run_loop(const Place& place, Value items, uint32_t depth);
    List selected(const Node& node, const List& items);
    Flow captured(uint32_t body, Value* value);

    Value eval(uint32_t id);
    List eval_all(const Node& node);
    Value eval_dict(const Node& node);
    Value eval_conditional(const Node& node);
    Value eval_logic(const Node& node);
    Value eval_sign(const Node& node);
    Value eval_comparison(const Node& node);
    Value eval_chain(const Node& node);
    Value apply(Value v, uint32_t id);
    Value apply_slice(const Value& v, const Node& node);
    Value apply_builtin(const Value& v, const Node& node);
    Arguments eval_arguments(const Node& node);
    void spread(const Node& node, Arguments& args);
    Value eval_call_block(const Node& node);
    Value new_macro(uint32_t node);
    bool can_call(const Place& place);
    Value call_loop(const Loop& loop, Arguments& args);
    bool bind(const Builtin& builtin, Arguments& args);
    Value call_value(const Value& callee, Arguments& args);
    Value call_macro(const Place& macro, Arguments& args);
    bool bind_parameters(const Node& node, Arguments& args);
    bool bind_special(const Node& node, bool has_caller, List rest, Arguments& args);
    Value loop_attribute(const Loop& loop, std::string_view name);
    Value macro_attribute(const Place& macro, std::string_view name);
    Value concatenated(Value a, const Value& b);
    Value joined_markup(const Value& a, const Value& b);
    Value arithmetic(Op op, const Value& a, const Value& b);
    Value repeated(const Value& v, int64_t times);
    void write_object(Text& out, const Value& v, size_t level, bool request);
    void write_view(Text& out, const Value& v, size_t level, bool request);
    void write_container(Text& out, const Value& v, const WriteStyle& style, size_t level,
                         bool request);

    const TemplateProgram& p_;
    const StackLimit stack_ = {};
    uint64_t live_ = 0;  // bytes of the text and lists that were made; outlives them all
    uint64_t allowed_ = ChatTemplate::max_live_bytes;  // of those; more for a large request
    std::optional<Error> error_ = {};
    uint64_t spent_ = 0;  // in bytes, see ChatTemplate::bytes_per_step
    uint32_t line_ = 1;
    uint32_t levels_ = 0;
    uint32_t calls_ = 0;
    uint64_t serial_ = 0;
    Text output_ = {};
    Text* out_ = &output_;
    std::vector<Frame> frames_ = {};  // the last one is where names are set
    std::vector<Dict> name_spaces_ = {};
};

const Value* find_entry(const Dict& dict, std::string_view key);
const Value* find_entry(const Dict& dict, const Value& key);
void set_entry(Dict& dict, Value key, Value value);

}  // namespace jinja
}  // namespace detail
}  // namespace v1
}  // namespace valar
