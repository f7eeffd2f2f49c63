// Answers in channels, as gpt-oss writes them (harmony): each message has a head.
#include "prologue.hpp"

#include "template/items.hpp"
#include "template/literal.hpp"

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

/// The word behind `mark`, or nothing.
std::string_view word_after(std::string_view text, std::string_view mark) {
    const size_t at = text.find(mark);
    if (at == std::string_view::npos) return {};
    text.remove_prefix(at + mark.size());
    return text.substr(0, text.find_first_of(" \n\t<"));
}

class ChannelParser final : public OutputParser {
public:
    explicit ChannelParser(AnswerParserOptions options) : items_(options) {
        if (options.thought == ThoughtState::open) in_ = In::thought;
        if (options.thought == ThoughtState::closed) in_ = In::final_message;
    }

    void text(std::string_view more, OutputSink& out) override {
        items_.to(out);
        switch (in_) {
            case In::head:
                head_ += more;
                if (head_.size() > max_head) give_up();
                break;
            case In::thought: items_.think(more); break;
            case In::arguments: read(more); break;
            case In::message:
            case In::final_message: items_.say(more); break;
            case In::lost: break;
        }
    }

    bool mark(const OutputMark& mark, OutputSink& out) override {
        items_.to(out);
        const std::string_view name = mark.spelling;
        if (in_ == In::lost) return mark.ends;
        if (name == "<|message|>" && in_ == In::head) begin_body();
        else if (name == "<|end|>" && in_ != In::final_message) begin_head();
        else if (mark.ends) return true;
        else if (name == "<|start|>") begin_head();
        else if (in_ == In::head && (name == "<|channel|>" || name == "<|constrain|>"))
            (head_ += ' ') += name;
        else if (mark.is_text) text(name, out);
        return false;
    }

    void finish(bool whole, OutputSink& out) override {
        items_.to(out);
        if (in_ == In::head && head_.find("<|") == std::string::npos) items_.say(head_);
        if (in_ == In::arguments && whole && !items_.committed()) items_.say(raw_);
        items_.finish();
    }

    bool thinking() const override { return in_ == In::thought; }

private:
    enum class In : uint8_t { head, thought, message, final_message, arguments, lost };
    static constexpr size_t max_head = 256;

    void begin_head() {
        if (in_ == In::arguments) give_up();
        if (in_ == In::lost) return;
        items_.end_text();
        head_.clear();
        in_ = In::head;
    }

    void begin_body() {
        const std::string_view channel = word_after(head_, "<|channel|>");
        const Tool* tool = items_.find(word_after(head_, "to=functions."));
        if (tool) {
            items_.call(*tool);
            reader_ = LiteralReader();
            in_ = In::arguments;
        } else {
            in_ = channel == "analysis"     ? In::thought
                  : channel == "commentary" ? In::message
                                            : In::final_message;
        }
    }

    void read(std::string_view more) {
        for (size_t i = 0; i < more.size(); ++i) {
            const char c = more[i];
            const bool object = c == '{' || kSpaces.find(c) != std::string_view::npos;
            if (!items_.committed()) raw_ += c;
            const auto status = reader_.fresh() && !object ? LiteralReader::Status::wrong
                                                           : reader_.push(c, items_.arguments());
            if (status == LiteralReader::Status::more) continue;
            if (status != LiteralReader::Status::done) return give_up(more.substr(i + 1));
            items_.end_call();
            raw_.clear();
            in_ = In::message;  // of what follows there is none
            return items_.say(more.substr(i + 1));
        }
        items_.send_arguments();
    }

    /// What came is no head, or no arguments: then it is text.
    void give_up(std::string_view rest = {}) {
        if (items_.committed()) {
            items_.send_arguments();
            in_ = In::lost;
            return;
        }
        items_.drop_call();
        if (in_ == In::head) raw_ = std::exchange(head_, {});
        in_ = In::final_message;
        items_.say(std::exchange(raw_, {}));
        items_.say(rest);
    }

    ItemWriter items_;
    In in_ = In::head;
    std::string head_;
    std::string raw_;  // what became of a call's arguments, were they none
    LiteralReader reader_;
};

}  // namespace

std::unique_ptr<OutputParser> channel_parser(AnswerParserOptions options) {
    return std::make_unique<ChannelParser>(std::move(options));
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
