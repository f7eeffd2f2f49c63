// template_dump CASES: what each template renders to, a line of JSON each: {"text":...} or
// {"error":...}. CASES is an array of {"template", "request", "own"}. Used by template_check.py.
#include <cstdio>

#include "base/internal.hpp"
#include "template/internal.hpp"

int main(int argc, char** argv) {
    using namespace valar;
    using namespace valar::detail;
    if (argc != 2) return std::fputs("usage: template_dump CASES\n", stderr), 2;
    const auto text = detail::read_file(argv[1], uint64_t{1} << 30);
    const auto cases = text ? Json::parse(*text) : Result<Json>(text.error());
    if (!cases) return std::fprintf(stderr, "%s\n", cases.error().message.c_str()), 1;
    for (const Json& c : cases->items()) {
        const auto parsed = ChatTemplate::parse(std::string(c["template"].as_string()));
        const TemplateInput input{c["request"], c["own"], 1'790'000'000};
        const auto made = parsed ? parsed->render(input) : Result<MarkedText>(parsed.error());
        Json line = Json::object();
        if (made) line.set("text", made->text);
        else line.set("error", made.error().message);
        std::puts(line.write().c_str());
    }
    return 0;
}
