#include "prologue.hpp"

#include "template/items.hpp"
#include "template/literal.hpp"

#include <algorithm>
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

class PlainOutput final : public OutputParser {
public:
    explicit PlainOutput(bool ends_at_marks) : ends_at_marks_(ends_at_marks) {}
    void text(std::string_view more, OutputSink& out) override {
        if (more.empty()) return;
        if (!begun_) out.begin_item(Item::Kind::message);
        begun_ = true;
        out.extend_item(more);
    }
    bool mark(const OutputMark& mark, OutputSink& out) override {
        if (mark.is_text && !mark.ends) text(mark.spelling, out);
        return mark.ends || (ends_at_marks_ && !mark.is_text);
    }
    void finish(bool, OutputSink& out) override {
        if (begun_) out.end_item();
    }

private:
    bool ends_at_marks_, begun_ = false;
};

}  // namespace

std::unique_ptr<OutputParser> plain_output() { return std::make_unique<PlainOutput>(false); }
std::unique_ptr<OutputParser> raw_output() { return std::make_unique<PlainOutput>(true); }

std::unique_ptr<OutputParser> answer_parser(std::shared_ptr<const AnswerSyntax> syntax,
                                            AnswerParserOptions options) {
    if (syntax->channels()) return channel_parser(std::move(options));
    if (options.tools.empty() && !syntax->has_thought()) return plain_output();
    return mark_parser(std::move(syntax), std::move(options));
}

// ---- Items ------------------------------------------------------------------------------------

void ItemWriter::extend(Kind kind, std::string_view text) {
    const bool begun = kind_ == kind;
    if (!begun && (trims_ || kind == Kind::thought)) {
        gap_.clear();
        text.remove_prefix(std::min(text.find_first_not_of(kSpaces), text.size()));
    }
    const size_t end = text.find_last_not_of(kSpaces) + 1;  // 0 where there is none
    if (end > 0) {
        if (!begun) {
            end_text();
            sink_->begin_item(kind == Kind::message ? Item::Kind::message : Item::Kind::reasoning);
        }
        kind_ = kind;
        any_ = true;
        if (!gap_.empty()) sink_->extend_item(std::exchange(gap_, {}));
        sink_->extend_item(text.substr(0, end));
    }
    gap_ += text.substr(end);
}

void ItemWriter::end_text() {
    if (kind_ == Kind::none) return;
    sink_->end_item();
    kind_ = Kind::none;
    gap_.clear();
    trims_ = true;
}

const Tool* ItemWriter::find(std::string_view name) const {
    for (const Tool& tool : tools_)
        if (tool.name == name) return &tool;
    return nullptr;
}

void ItemWriter::call(const Tool& tool, bool whole) {
    tool_ = &tool;
    whole_ = whole;
    if (!committed()) return;
    end_text();
    any_ = true;
    sink_->begin_item(tool.custom ? Item::Kind::custom_tool_call : Item::Kind::function_call,
                      tool.name);
}

void ItemWriter::send_arguments() {
    if (!committed() || tool_->custom || arguments_.empty()) return;
    sink_->extend_item(arguments_);
    arguments_.clear();
}

void ItemWriter::end_call() {
    if (!committed()) {
        end_text();
        any_ = true;
        sink_->begin_item(tool_->custom ? Item::Kind::custom_tool_call : Item::Kind::function_call,
                          tool_->name);
    }
    if (tool_->custom) {
        const auto whole = Json::parse(arguments_);
        if (whole && (*whole)["input"].is_string()) arguments_ = (*whole)["input"].as_string();
    }
    if (!arguments_.empty()) sink_->extend_item(arguments_);
    sink_->end_item();
    gap_.clear();
    trims_ = true;
    drop_call();
}

void ItemWriter::drop_call() {
    tool_ = nullptr;
    arguments_.clear();
}

void ItemWriter::finish() {
    if (committed()) return;
    if (kind_ == Kind::message && !gap_.empty()) sink_->extend_item(std::exchange(gap_, {}));
    if (kind_ == Kind::none && !any_ && !trims_ && !gap_.empty()) {
        sink_->begin_item(Item::Kind::message);
        sink_->extend_item(gap_);
        kind_ = Kind::message;
    }
    end_text();
}

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
