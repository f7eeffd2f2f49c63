// Answers with marks in their text: thoughts, and calls in the styles of CallStyle.
#include "prologue.hpp"

#include "base/text.hpp"
#include "json_internal.hpp"
#include "template/items.hpp"
#include "template/literal.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

bool is_blank(char c) { return kSpaces.find(c) != std::string_view::npos; }

bool is_name_byte(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '-' || c == '.';
}

std::string_view without_blanks(std::string_view text) {
    const size_t first = text.find_first_not_of(kSpaces);
    if (first == std::string_view::npos) return {};
    return text.substr(first, text.find_last_not_of(kSpaces) - first + 1);
}

// ---- Texts of a row in what a model wrote -----------------------------------------------------

enum class Found : uint8_t { no, partly, yes };  // partly: the input ends in the middle of it

struct Match {
    Found found = Found::no;
    size_t size = 0;        // bytes of input
    char is_string = '\0';  // of kIsString: 't' or 'f'
};

/// Whether `input` begins with `text`. White space stands for any, and none; at its end it does not
/// count.
Match match(std::string_view text, std::string_view input) {
    Match made;
    size_t& at = made.size;
    const auto skip = [&](auto belongs) {
        while (at < input.size() && belongs(input[at])) ++at;
    };
    text = text.substr(0, text.find_last_not_of(kSpaces) + 1);
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (is_blank(c)) {
            skip(is_blank);
            continue;
        }
        if (c == kCallNumber || c == kCallId) {
            skip(is_name_byte);
            continue;
        }
        if (at == input.size()) return {Found::partly, 0, '\0'};
        if (c == kIsString) {
            made.is_string = input[at];
            skip(is_name_byte);
        } else if (input[at++] != c) {
            return {};
        }
    }
    made.found = Found::yes;
    return made;
}

/// How many bytes at the end of `text` may be the beginning of `mark`.
size_t partial_suffix(std::string_view text, std::string_view mark) {
    for (size_t size = std::min(text.size(), mark.size() - 1); size > 0; --size)
        if (text.substr(text.size() - size) == mark.substr(0, size)) return size;
    return 0;
}

// ---- Arguments as they stand in a text --------------------------------------------------------

/// Of a whole value, as JSON, or nothing.
std::string read_value(std::string_view text) {
    LiteralReader reader(LiteralReader::Style::python);
    std::string made;
    auto status = LiteralReader::Status::more;
    size_t i = 0;
    while (i < text.size() && status == LiteralReader::Status::more)
        status = reader.push(text[i++], made);
    if (i < text.size() || status == LiteralReader::Status::wrong) return {};
    if (status == LiteralReader::Status::done) return made;
    return reader.finish(made) == LiteralReader::Status::ended ? made : std::string();
}

// ---- The parser -------------------------------------------------------------------------------

/// It reads from a buffer, and waits where the next bytes decide.
class MarkParser final : public OutputParser {
public:
    MarkParser(std::shared_ptr<const AnswerSyntax> syntax, AnswerParserOptions options)
        : syntax_(std::move(syntax)),
          calls_(syntax_->calls),
          items_(options),
          held_(options.constrained),
          answered_(std::move(options.answered)),
          bare_allowed_(options.bare_calls && items_.has_tools()) {
        if (options.thought == ThoughtState::open) in_ = In::thought;
        if (calls_.style == CallStyle::tagged) {
            const std::string_view after = without_blanks(calls_.after);
            after_head_ = after.substr(0, after.find_first_of(kSpaces));
            after_rest_ = after.substr(after_head_.size());
        } else {
            after_rest_ = calls_.after;
        }
        find_first_bytes();
    }

    void text(std::string_view more, OutputSink& out) override {
        items_.to(out);
        input_ += more;
        run();
    }

    bool mark(const OutputMark& mark, OutputSink& out) override {
        items_.to(out);
        const auto& known = syntax_->tokens;
        const bool ours = std::any_of(known.begin(), known.end(), [&](const auto& token) {
            return token.first == mark.spelling;
        });
        const std::string wrapped = kTokenBegin + std::string(mark.spelling) + kTokenEnd;
        if (mark.ends &&
            !(ours && in_ == In::thought && syntax_->thought.close.starts_with(wrapped)))
            return true;
        if (ours) text(wrapped, out);
        else if (mark.is_text) text(mark.spelling, out);
        return false;
    }

    void finish(bool whole, OutputSink& out) override {
        items_.to(out);
        const auto in_call = [&] {
            return in_ != In::text && in_ != In::thought && in_ != In::lost;
        };
        // What is held back is the beginning of a mark.
        const bool cut = !whole && (in_call() ? is_surely_a_call() : in_ == In::thought);
        if (cut && !items_.committed()) return items_.end_text();
        final_ = true;
        // Behind a call a mark that was cut in its middle is no text.
        if (!whole && in_section_ && (in_ == In::after || in_ == In::calls)) input_.clear();
        run();
        if (in_call() && !items_.committed()) give_up();
        items_.finish();
    }

    bool thinking() const override { return in_ == In::thought; }

private:
    enum class In : uint8_t {
        text,
        thought,
        calls,      // between two calls
        object,     // {"name": ...
        name,       // of a call
        arguments,  // one value
        key,        // tagged: before an argument or the end
        key_name,
        value,
        python_key,
        python_name,
        python_value,
        python_next,
        after,  // the arguments
        lost,   // a call that broke off after it went out: it is never ended
    };
    enum class At : uint8_t { key_or_end, key, in_key, colon, value, comma };  // of object
    static constexpr size_t max_key = 256;

    std::string_view rest() const { return std::string_view(input_).substr(at_); }
    bool at_end() const { return at_ == input_.size(); }
    /// Whether what was taken cannot become text. Without marks that is so where the syntax has no
    /// text that begins like it.
    bool is_surely_a_call() const {
        return !bare_ || (held_ && (has_name_ || has_arguments_ || object_at_ == At::value));
    }

    /// Takes bytes that may turn out to be no call.
    void take(size_t size) {
        if (!items_.committed()) raw_.append(input_, at_, size);
        at_ += size;
    }
    void take_blanks() {
        const size_t to = std::min(input_.find_first_not_of(kSpaces, at_), input_.size());
        take(to - at_);
    }

    /// Takes `text` if it comes; partly: wait.
    Found take_if(std::string_view text, Match* made = nullptr) {
        const Match found = match(text, rest());
        if (made) *made = found;
        if (found.found == Found::yes) take(found.size);
        return found.found == Found::partly && final_ ? Found::no : found.found;
    }

    void run() {
        while (step()) {}
        input_.erase(0, at_);
        at_ = 0;
        items_.send_arguments();
    }

    /// False: it waits for more.
    bool step() {
        switch (in_) {
            case In::text: return in_text();
            case In::thought: return in_thought();
            case In::calls: return between_calls();
            case In::object: return in_object();
            case In::name: return in_name();
            case In::arguments: return in_arguments();
            case In::key: return in_key();
            case In::key_name: return in_key_name();
            case In::value: return in_value();
            case In::python_key:
            case In::python_name:
            case In::python_value:
            case In::python_next: return in_python();
            case In::after: return after_call();
            case In::lost: break;
        }
        at_ = input_.size();
        return false;
    }

    // ---- text and thoughts ----

    void find_first_bytes() {
        const auto add = [&](std::string_view mark) {
            if (!mark.empty()) first_bytes_ += without_blanks(mark).front();
        };
        add(syntax_->thought.open);
        add(syntax_->thought.close);
        for (const std::string& mark : syntax_->thought.ignored) add(mark);
        for (const std::string& mark : calls_.marks) add(mark);
    }

    bool in_text() {
        if (bare_allowed_ && !items_.said()) {
            const size_t first = input_.find_first_not_of(kSpaces, at_);
            say(at_, std::min(first, input_.size()));
            at_ = std::min(first, input_.size());
            if (at_end()) return false;
            size_t size = 0;
            const Found bare = bare_call(first, &size);
            if (bare == Found::partly && !final_) return false;
            if (bare == Found::yes) {
                at_ = first;
                bare_ = true;
                take(size);
                begin_object();
                return true;
            }
        }
        size_t at = at_;
        Found found = Found::no;
        while (at < input_.size()) {
            at = std::min(input_.find_first_of(first_bytes_, at), input_.size());
            if (at == input_.size()) break;
            const In before = in_;
            size_t size = 0;
            found = mark_at(at, &size);
            if (found == Found::partly && !final_) break;
            if (found == Found::yes) {
                say(at_, at);
                at_ = at;
                if (in_ == before) at_ += size;  // an ignored one
                else if (in_ == In::thought) at_ += size;
                if (in_ != before) bare_allowed_ = bare_allowed_ && in_ == In::thought;
                return true;
            }
            ++at;
        }
        say(at_, at);
        at_ = at;
        return false;
    }

    void say(size_t from, size_t to) {
        items_.say(without_token_bytes(std::string_view(input_).substr(from, to - from)));
        if (items_.said()) bare_allowed_ = false;
    }

    /// Which mark stands there; sets what comes next.
    Found mark_at(size_t at, size_t* size) {
        const std::string_view input = std::string_view(input_).substr(at);
        const auto& thought = syntax_->thought;
        bool partly = false;
        const auto begins = [&](std::string_view mark) {
            if (mark.empty()) return false;
            const Match made = match(mark, input);
            partly = partly || made.found == Found::partly;
            *size = made.size;
            return made.found == Found::yes;
        };
        // What is spelled like a mark in the middle of a text may be a text about it.
        const bool counts = input.front() == kTokenBegin || blank_before(at);
        if (items_.has_tools())
            for (const std::string& mark : calls_.marks)
                if (begins(mark)) {
                    in_ = In::calls;
                    in_section_ = false;
                    bare_ = false;
                    return Found::yes;
                }
        if (counts && begins(thought.open)) {
            in_ = In::thought;
            items_.end_text();
            return Found::yes;
        }
        if (input.front() == kTokenBegin && begins(thought.close)) return Found::yes;
        for (size_t i = 0; i < thought.ignored.size(); ++i)
            if ((counts || i % 2 == 1) && begins(thought.ignored[i])) return Found::yes;
        return partly ? Found::partly : Found::no;
    }

    /// Whether no message is under way before `at`.
    bool blank_before(size_t at) const {
        return !items_.said() &&
               without_blanks(std::string_view(input_).substr(at_, at - at_)).empty();
    }

    bool in_thought() {
        const std::string_view close = without_blanks(syntax_->thought.close);
        size_t at = at_;
        while (true) {
            at = std::min(input_.find(close.front(), at), input_.size());
            if (at == input_.size()) break;
            const Match made = match(close, std::string_view(input_).substr(at));
            if (made.found == Found::partly && !final_) break;
            if (made.found == Found::yes) {
                items_.think(without_token_bytes(rest().substr(0, at - at_)));
                items_.end_thought();
                at_ = at + made.size;
                in_ = In::text;
                return true;
            }
            ++at;
        }
        items_.think(without_token_bytes(rest().substr(0, at - at_)));
        at_ = at;
        return false;
    }

    // ---- calls ----

    /// An object, a list of objects, or a fence with one of both.
    Found bare_call(size_t first, size_t* size) const {
        size_t at = first;
        const auto blanks = [&] {
            at = std::min(input_.find_first_not_of(kSpaces, at), input_.size());
        };
        if (input_[at] == '`') {
            for (int i = 0; i < 3; ++i, ++at) {
                if (at == input_.size()) return Found::partly;
                if (input_[at] != '`') return Found::no;
            }
            const size_t word = at;
            while (at < input_.size() && is_name_byte(input_[at])) ++at;
            if (at - word > 16) return Found::no;
            blanks();
        }
        if (at < input_.size() && input_[at] == '[') {
            ++at;
            blanks();
        }
        if (at - first > max_key) return Found::no;
        if (at == input_.size()) return Found::partly;
        *size = at - first;
        return input_[at] == '{' ? Found::yes : Found::no;
    }

    void begin_object() {
        in_ = In::object;
        object_at_ = At::key_or_end;
        began_object_ = has_name_ = has_arguments_ = false;
    }

    /// What was taken since the last call is none: it is text.
    void give_up() {
        if (items_.committed()) {
            in_ = In::lost;
            return;
        }
        items_.drop_call();
        // A mark with which nothing began must not be found again.
        if (raw_.empty() && !at_end() && first_bytes_.find(input_[at_]) != std::string::npos)
            take(1);
        while (!at_end() && (input_[at_] & 0xC0) == 0x80) take(1);  // text is whole characters
        items_.say(without_token_bytes(std::exchange(raw_, {})));
        in_ = In::text;
        bare_allowed_ = false;
    }

    bool gave_up() {
        give_up();
        return true;
    }

    void call_ended() {
        items_.end_call();
        raw_.clear();
        in_section_ = true;
        bare_allowed_ = false;
        in_ = In::after;
    }

    /// What closes a call, where it comes.
    bool after_call() {
        if (after_rest_.empty() || bare_ || calls_.style == CallStyle::object) {
            in_ = In::calls;
            return true;
        }
        take_blanks();
        if (take_if(after_rest_) == Found::partly) return false;
        in_ = In::calls;
        return true;
    }

    bool between_calls() {
        take_blanks();
        if (at_end() && !final_) return false;
        if (calls_.style == CallStyle::object || bare_) return between_objects();
        const std::string_view nothing;
        const bool python = calls_.style == CallStyle::python;
        struct Way {
            std::string_view text;
            In next;
        };
        const Way ways[] = {
            {calls_.before, In::name},
            {in_section_ ? std::string_view(calls_.close) : nothing, In::text},
            {in_section_ ? nothing : std::string_view(calls_.open), python ? In::name : In::calls},
            {in_section_ ? std::string_view(calls_.between) : nothing,
             python ? In::name : In::calls}};
        bool waits = false;
        for (const Way& way : ways) {
            if (without_blanks(way.text).empty()) continue;
            const Found found = take_if(way.text);
            waits = waits || found == Found::partly;
            if (found != Found::yes) continue;
            in_ = way.next;
            if (in_ == In::text) calls_over();
            name_.clear();
            return true;
        }
        if (waits) return false;
        if (!in_section_) return gave_up();
        calls_over();
        return true;
    }

    void calls_over() {
        raw_.clear();
        in_ = In::text;
    }

    bool between_objects() {
        if (at_end()) {
            in_section_ ? calls_over() : give_up();
            return true;
        }
        const char c = input_[at_];
        if (c == '{') {
            begin_object();
            return true;
        }
        bool waits = false;
        const std::string_view end = without_blanks(calls_.after),
                               close = without_blanks(calls_.close);
        const auto tag = [](std::string_view text) {
            return text.substr(std::min(text.find_first_not_of("{}[] \n\t`"), text.size()));
        };
        const auto takes = [&](std::string_view text) {
            if (text.empty()) return false;
            const Found found = take_if(text);
            waits = waits || found == Found::partly;
            return found == Found::yes;
        };
        if (takes("```json") || (!waits && takes("```"))) return true;
        for (const std::string& mark : calls_.marks)
            if (takes(mark)) return true;
        if (takes(tag(end)) || takes(tag(close))) return true;
        if (waits) return false;
        if (c == '[' || c == ']' || c == ',' || c == ';') {
            take(1);
            return true;
        }
        if (!in_section_) return gave_up();
        calls_over();
        return true;
    }

    // ---- {"name": "f", "arguments": {}} ----

    bool in_object() {
        while (!at_end()) {
            const char c = input_[at_];
            const Found found = object_byte(c);
            if (found == Found::no) return gave_up();
            take(1);
            if (found == Found::yes) return object_ended();
        }
        return false;
    }

    /// yes: the object is whole.
    Found object_byte(char c) {
        if (object_at_ == At::in_key) return key_byte(c);
        if (object_at_ == At::value) return value_byte(c);
        if (is_blank(c)) return Found::partly;
        if (!began_object_) {
            began_object_ = true;
            return c == '{' ? Found::partly : Found::no;
        }
        switch (object_at_) {
            case At::key_or_end:
            case At::key:
                if (c == '}' && object_at_ == At::key_or_end) return Found::yes;
                reader_ = LiteralReader();
                key_.clear();
                object_at_ = At::in_key;
                return c == '"' ? key_byte(c) : Found::no;
            case At::colon:
                if (bare_ && value_of(key_) == ValueIs::other) return Found::no;
                reader_ = LiteralReader();
                scratch_.clear();
                object_at_ = At::value;
                value_is_ = value_of(key_);
                return c == ':' ? Found::partly : Found::no;
            case At::comma:
                object_at_ = At::key;
                return c == '}' ? Found::yes : c == ',' ? Found::partly : Found::no;
            case At::in_key:
            case At::value: break;
        }
        return Found::no;
    }

    enum class ValueIs : uint8_t { name, arguments, other };
    static ValueIs value_of(std::string_view key) {
        if (key == "\"name\"" || key == "\"tool_name\"") return ValueIs::name;
        if (key == "\"arguments\"" || key == "\"parameters\"") return ValueIs::arguments;
        return ValueIs::other;
    }

    Found key_byte(char c) {
        const auto status = reader_.push(c, key_);
        if (status == LiteralReader::Status::done) object_at_ = At::colon;
        return status == LiteralReader::Status::wrong || key_.size() > max_key ? Found::no
                                                                               : Found::partly;
    }

    Found value_byte(char c) {
        const bool arguments = value_is_ == ValueIs::arguments;
        if (arguments && reader_.fresh() && !is_blank(c) && !begin_arguments(c)) return Found::no;
        std::string& to = arguments && !quoted_ ? items_.arguments() : scratch_;
        const auto status = reader_.push(c, to);
        if (status == LiteralReader::Status::more) {
            if (value_is_ == ValueIs::other) scratch_.clear();
            return Found::partly;
        }
        if (status == LiteralReader::Status::wrong || !value_ended()) return Found::no;
        object_at_ = At::comma;
        return status == LiteralReader::Status::ended ? object_byte(c) : Found::partly;
    }

    /// The arguments are an object, or a string that holds one.
    bool begin_arguments(char c) {
        if (has_arguments_ || (c != '{' && c != '"')) return false;
        has_arguments_ = true;
        quoted_ = c == '"';
        if (has_name_ && !quoted_) begin_call();
        return true;
    }

    bool value_ended() {
        if (value_is_ == ValueIs::name) {
            const auto name = Json::parse(scratch_);
            tool_ = name && !has_name_ ? items_.find(name->as_string()) : nullptr;
            if (!tool_) return false;
            has_name_ = true;
            if (has_arguments_) begin_call();
        } else if (value_is_ == ValueIs::arguments && quoted_) {
            const auto text = Json::parse(scratch_);
            const auto inner = Json::parse(text->as_string());
            if (!inner || !inner->is_object()) return false;
            items_.arguments() = inner->write();
            if (has_name_) begin_call();
        }
        return true;
    }

    // Where the name is that of an answered call, only all of it tells.
    void begin_call() { items_.call(*tool_, bare_ && is_echo(false)); }

    bool is_echo(bool whole) const {
        return std::any_of(answered_.begin(), answered_.end(), [&](const Item& call) {
            const std::string_view said = items_.arguments(), all = call.arguments;
            if (call.name != tool_->name || !whole) return call.name == tool_->name;
            const size_t size = all.size() - 1;  // without its bracket
            return said.size() > size && said.substr(0, size) == all.substr(0, size) &&
                   (said[size] == ',' || said[size] == '}');
        });
    }

    bool object_ended() {
        if (!has_name_ || (bare_ && (!has_arguments_ || is_echo(true)))) return gave_up();
        if (!has_arguments_) {
            items_.call(*tool_);
            items_.arguments() = "{}";
        }
        call_ended();
        return true;
    }

    // ---- a name, then arguments ----

    bool in_name() {
        if (name_.empty()) take_blanks();
        while (name_.size() <= 80 && !at_end() && is_name_byte(input_[at_])) {
            name_ += input_[at_];
            take(1);
        }
        if (at_end() && !final_) return false;
        tool_ = items_.find(name_);
        if (!tool_) return gave_up();
        const Found found = take_if(calls_.after_name);
        if (found == Found::partly) return false;
        if (found == Found::no) return gave_up();
        return begin_named();
    }

    bool begin_named() {
        const CallStyle style = calls_.style;
        if (style == CallStyle::named || style == CallStyle::gemma) {
            reader_ = LiteralReader(style == CallStyle::gemma ? LiteralReader::Style::gemma
                                                              : LiteralReader::Style::json,
                                    calls_.key);
            in_ = In::arguments;
            return true;
        }
        items_.call(*tool_);
        items_.arguments() = "{";
        keys_.clear();
        in_ = style == CallStyle::tagged ? In::key : In::python_key;
        return true;
    }

    bool in_arguments() {
        while (!at_end()) {
            const char c = input_[at_];
            if (reader_.fresh() && !is_blank(c)) {
                if (c != '{') return gave_up();
                items_.call(*tool_);
            }
            const auto status = reader_.push(c, items_.arguments());
            if (status == LiteralReader::Status::wrong) return gave_up();
            take(1);
            if (status == LiteralReader::Status::done) {
                call_ended();
                return true;
            }
        }
        return false;
    }

    // ---- arguments between marks ----

    bool in_key() {
        take_blanks();
        if (at_end() && !final_) return false;
        const Found end = take_if(after_head_),
                    key = end == Found::yes ? Found::no : take_if(calls_.key);
        if (end == Found::yes) {
            items_.arguments() += '}';
            call_ended();
            return true;
        }
        if (key == Found::yes) {
            in_ = In::key_name;
            return true;
        }
        if (end == Found::partly || key == Found::partly) return false;
        return gave_up();
    }

    bool in_key_name() {
        const std::string_view input = rest();
        for (size_t size = 0; size <= input.size() && size <= max_key; ++size) {
            Match made = match(calls_.value, input.substr(size));
            if (made.found == Found::partly && !final_) return false;
            if (made.found != Found::yes) continue;
            const bool line = calls_.value.ends_with('\n');
            const size_t end = size + made.size;
            if (line && end == input.size() && !final_) return false;
            return begin_value(std::string(without_blanks(input.substr(0, size))), made.is_string,
                               end + (line && end < input.size() && input[end] == '\n'));
        }
        return input.size() > max_key || final_ ? gave_up() : false;
    }

    bool begin_value(std::string key, char is_string, size_t size) {
        key = without_token_bytes(key);
        if (std::find(keys_.begin(), keys_.end(), key) != keys_.end()) return gave_up();
        take(size);
        kinds_ = argument_kinds(*tool_, key);
        if (is_string != '\0') kinds_ = is_string == 't' ? kString : kAll & ~kString;
        if (!keys_.empty()) items_.arguments() += ',';
        write_json_string(items_.arguments(), key);
        items_.arguments() += ':';
        keys_.push_back(std::move(key));
        streams_value_ = kinds_ == kString && calls_.name != "minicpm5";
        if (streams_value_) items_.arguments() += '"';
        reader_ = LiteralReader(LiteralReader::Style::python);
        seen_ = read_ = 0;
        first_end_ = std::string::npos;
        value_goes_on_ = true;
        in_ = In::value;
        return true;
    }

    /// Where the value ends, or npos. A mark inside of a list or a quoted string is none.
    size_t value_end(std::string_view end) {
        if (streams_value_) return input_.find(end, at_);
        while (true) {
            const size_t at = input_.find(end, at_ + seen_);
            if (at == std::string::npos) break;
            if (!inside_value(at - at_)) return at;
            first_end_ = std::min(first_end_, at - at_);
            seen_ = at - at_ + 1;
        }
        seen_ = std::max(seen_, rest().size() - partial_suffix(rest(), end));
        return final_ && first_end_ != std::string::npos ? at_ + first_end_ : std::string::npos;
    }

    bool inside_value(size_t size) {
        if (!(kinds_ & (kNumber | kList))) return false;  // its quotes are its own
        while (read_ < size && value_goes_on_)
            value_goes_on_ = reader_.push(input_[at_ + read_++], scratch_) ==
                             LiteralReader::Status::more;
        scratch_.clear();
        return value_goes_on_ && reader_.inside();
    }

    bool in_value() {
        const std::string_view end = without_blanks(calls_.value_end);
        const size_t found = value_end(end);
        size_t until = found;
        if (found == std::string::npos) until = input_.size() - partial_suffix(rest(), end);
        const bool line = calls_.value_end.starts_with('\n');
        if (line && until > at_ && input_[until - 1] == '\n') --until;
        const std::string_view raw = std::string_view(input_).substr(at_, until - at_);
        if (streams_value_) {
            write_json_escaped(items_.arguments(), without_token_bytes(raw));
            take(raw.size());
        }
        if (found == std::string::npos) return false;
        if (streams_value_) items_.arguments() += '"';
        else items_.arguments() += argument_value(without_wrapper(raw));
        take(found + end.size() - at_);
        in_ = In::key;
        return true;
    }

    /// A string has no quotes here, unless it might be a number or a list without them.
    std::string argument_value(std::string_view raw) const {
        if (kinds_ != kString) {
            std::string made = read_value(without_blanks(raw));
            const auto value = Json::parse(made);
            const uint8_t quoting = kNumber | kList;
            const uint8_t kinds = kinds_ & quoting ? kinds_ : kinds_ & ~kString;
            if (value && (argument_kind(*value) & kinds)) return made;
        }
        std::string made;
        write_json_string(made, without_token_bytes(raw));
        return made;
    }

    static uint8_t argument_kinds(const Tool& tool, std::string_view key) {
        if (tool.custom) return kString;
        const Json& parameters = resolved_schema(tool.parameters, tool.parameters);
        const Json* schema = parameters["properties"].find(key);
        return schema ? argument_kinds_of(*schema, tool.parameters) : uint8_t{kAll};
    }

    static std::string_view without_wrapper(std::string_view raw) {
        constexpr std::string_view begin = "<![CDATA[", end = "]]>";
        if (!raw.starts_with(begin) || !raw.ends_with(end)) return raw;
        raw.remove_prefix(begin.size());
        return raw.substr(0, raw.size() - end.size());
    }

    // ---- f(key=value, ...) ----

    bool in_python() {
        while (!at_end()) {
            const char c = input_[at_];
            const Found found = python_byte(c);
            if (found == Found::no) return gave_up();
            take(1);
            if (found == Found::yes) {
                items_.arguments() += '}';
                call_ended();
                return true;
            }
        }
        return false;
    }

    /// yes: the closing bracket.
    Found python_byte(char c) {
        if (in_ == In::python_value) {
            const auto status = reader_.push(c, items_.arguments());
            if (status == LiteralReader::Status::wrong) return Found::no;
            if (status == LiteralReader::Status::more) return Found::partly;
            in_ = In::python_next;
            return status == LiteralReader::Status::ended ? python_byte(c) : Found::partly;
        }
        if (is_blank(c) && (in_ != In::python_name || key_.empty())) return Found::partly;
        if (in_ == In::python_next) {
            in_ = In::python_key;
            return c == ')' ? Found::yes : c == ',' ? Found::partly : Found::no;
        }
        if (in_ == In::python_key) {
            if (c == ')') return Found::yes;
            key_.clear();
            in_ = In::python_name;
        }
        if (c != '=') {
            key_ += c;
            return is_name_byte(c) && key_.size() <= max_key ? Found::partly : Found::no;
        }
        if (key_.empty() || std::find(keys_.begin(), keys_.end(), key_) != keys_.end())
            return Found::no;
        if (!keys_.empty()) items_.arguments() += ',';
        write_json_string(items_.arguments(), key_);
        items_.arguments() += ':';
        keys_.push_back(key_);
        reader_ = LiteralReader(LiteralReader::Style::python);
        in_ = In::python_value;
        return Found::partly;
    }

    std::shared_ptr<const AnswerSyntax> syntax_;
    const AnswerSyntax::Calls& calls_;
    ItemWriter items_;
    bool held_;                // to the syntax
    std::string first_bytes_;  // of the marks
    std::string after_head_, after_rest_;

    In in_ = In::text;
    std::string input_;
    size_t at_ = 0;
    bool final_ = false;
    const std::vector<Item> answered_;
    bool bare_allowed_;
    bool bare_ = false;        // a call without marks
    bool in_section_ = false;  // a call went before
    std::string raw_;          // what was taken and is text if it is no call

    const Tool* tool_ = nullptr;
    std::string name_;
    LiteralReader reader_;
    At object_at_ = At::key_or_end;
    ValueIs value_is_ = ValueIs::other;
    bool began_object_ = false, has_name_ = false, has_arguments_ = false, quoted_ = false;
    std::string key_, scratch_;
    std::vector<std::string> keys_;
    uint8_t kinds_ = 0;
    bool streams_value_ = false;
    // Of a value that does not stream, from its first byte on: no end begins before; what reader_
    // has read; the first mark inside of it.
    size_t seen_ = 0, read_ = 0, first_end_ = 0;
    bool value_goes_on_ = false;
};

}  // namespace

std::unique_ptr<OutputParser> mark_parser(std::shared_ptr<const AnswerSyntax> syntax,
                                          AnswerParserOptions options) {
    return std::make_unique<MarkParser>(std::move(syntax), std::move(options));
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
