// bench_tokenizer MODEL TEXT: time to open the vocabulary, speed on a text, and the three hard
// cases of 10 MB. CPU time of the calling thread; best of five where it is short.
//   c++ -std=c++20 -O2 -I. tests/bench/tokenizer.cpp -o bench_tokenizer -pthread
#include <algorithm>
#include <cstdio>
#include <string>

#define VALAR_IMPLEMENTATION
#include "valar.hpp"

int main(int argc, char** argv) {
    using valar::Result, valar::detail::thread_cpu_ns;
    if (argc != 3) return std::fputs("usage: bench_tokenizer MODEL TEXT\n", stderr), 2;
    auto file = valar::Gguf::open(argv[1]);
    auto text = valar::detail::read_file(argv[2], uint64_t{1} << 30);
    if (!file || !text) return std::fputs("cannot read the model or the text\n", stderr), 1;
    auto seconds = [](int runs, auto&& function) {
        double best = 1e9;
        for (int i = 0; i < runs; ++i) {
            const uint64_t begin = thread_cpu_ns();
            function();
            best = std::min(best, double(thread_cpu_ns() - begin) * 1e-9);
        }
        return best;
    };
    auto tokenizer = valar::Tokenizer::open(*file);
    if (!tokenizer) return std::fprintf(stderr, "%s\n", tokenizer.error().message.c_str()), 1;
    size_t count = 0;
    auto encode = [&](const std::string& input) {
        auto ids = tokenizer->encode(input);
        count = ids ? ids->size() : 0;
    };
    std::printf("open           %8.1f ms, %zu tokens\n",
                1e3 * seconds(5, [&] { (void)valar::Tokenizer::open(*file).ok(); }),
                tokenizer->size());
    const double time = seconds(5, [&] { encode(*text); });
    std::printf("the text       %8.1f MB/s, %zu ids\n", double(text->size()) / time / 1e6, count);

    std::string emoji;
    while (emoji.size() < 10'000'000) emoji += "\xF0\x9F\x98\x80";
    const std::pair<const char*, std::string> cases[] = {
        {"10 MB of a    ", std::string(10'000'000, 'a')},
        {"10 MB of emoji", emoji},
        {"10 MB of space", std::string(10'000'000, ' ')}};
    for (const auto& entry : cases) {
        const double once = seconds(1, [&] { encode(entry.second); });
        std::printf("%s %8.2f s, %zu ids\n", entry.first, once, count);
    }
    return 0;
}
