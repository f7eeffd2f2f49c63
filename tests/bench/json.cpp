// Parse and write a 4 KB chat body, here and with nlohmann's library, in alternating rounds.
//   c++ -std=c++20 -O2 -I. tests/bench/json.cpp -o bench_json -pthread    (nlohmann-json3-dev)
#define VALAR_IMPLEMENTATION
#include "valar.hpp"

#include <nlohmann/json.hpp>

#include <cstdio>
#include <string>

namespace {

std::string chat_body() {
    std::string body = R"({"model":"zai-org/GLM-5.1-FP8","temperature":0.7,"top_p":0.95,)"
                       R"("max_output_tokens":512,"stream":true,"metadata":{"user":"u-1029"},)"
                       R"("input":[)";
    while (body.size() < 4000)
        body += R"({"role":"user","content":[{"type":"input_text","text":"Can you mend this sword )"
                R"(before dawn?\nThe smith at the gate says \"yes\", and pays well. Sch)"
                "\xc3\xb6"
                R"(n!"}],"status":"completed","weights":[1,2.5,-30000,0.1]},)";
    body.back() = ']';
    return body + "}";
}

constexpr int calls = 2000, rounds = 15;

double valar_round(const std::string& body) {
    const uint64_t start = valar::detail::monotonic_ns();
    size_t bytes = 0;
    for (int i = 0; i < calls; ++i) bytes += valar::Json::parse(body).value().write().size();
    return bytes ? double(valar::detail::monotonic_ns() - start) / calls : 0;
}

double nlohmann_round(const std::string& body) {
    const uint64_t start = valar::detail::monotonic_ns();
    size_t bytes = 0;
    for (int i = 0; i < calls; ++i) bytes += nlohmann::ordered_json::parse(body).dump().size();
    return bytes ? double(valar::detail::monotonic_ns() - start) / calls : 0;
}

}  // namespace

int main() {
    const std::string body = chat_body();
    if (valar::Json::parse(body)->write() != nlohmann::ordered_json::parse(body).dump()) return 1;
    double ours = 1e300, theirs = 1e300;
    for (int i = 0; i < rounds; ++i) {
        ours = std::min(ours, valar_round(body));
        theirs = std::min(theirs, nlohmann_round(body));
    }
    std::printf("%zu bytes, parse and write: valar %.1f us, nlohmann %.1f us, ratio %.2f\n",
                body.size(), ours / 1000, theirs / 1000, theirs / ours);
    return theirs < 2 * ours;
}
