#include "prologue.hpp"

#include "template/output.hpp"

#include <memory>
#include <string_view>

#ifndef VALAR_NO_INFERENCE
namespace valar {
inline namespace v1 {
namespace detail {
namespace {

class PlainOutput final : public OutputParser {
public:
    void text(std::string_view more, OutputSink& out) override {
        if (more.empty()) return;
        if (!begun_) out.begin_item(Item::Kind::message);
        begun_ = true;
        out.extend_item(more);
    }
    bool mark(const OutputMark& mark, OutputSink& out) override {
        if (mark.is_text && !mark.ends) text(mark.spelling, out);
        return mark.ends;
    }
    void finish(bool, OutputSink& out) override {
        if (begun_) out.end_item();
    }

private:
    bool begun_ = false;
};

}  // namespace

std::unique_ptr<OutputParser> plain_output() { return std::make_unique<PlainOutput>(); }

}  // namespace detail
}  // namespace v1
}  // namespace valar
#endif  // VALAR_NO_INFERENCE
