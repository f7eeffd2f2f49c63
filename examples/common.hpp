// What the examples share: flags with --help, the default model, a progress line while loading.
// Include it after valar.hpp.
#ifndef VALAR_EXAMPLES_COMMON_HPP
#define VALAR_EXAMPLES_COMMON_HPP

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#if defined(_WIN32)
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <io.h>
#include <windows.h>

#include <shellapi.h>  // wants windows.h before it
#if defined(_MSC_VER)
#pragma comment(lib, "shell32")
#endif
#else
#include <unistd.h>
#endif

namespace example {

// ---- Flags -----------------------------------------------------------------------------------

// Reads a value as the type of the variable that it goes to; false: not such a value.
inline bool read_value(const std::string& text, std::string* out) {
    *out = text;
    return true;
}
inline bool read_value(const std::string& text, std::vector<std::string>* out) {
    out->push_back(text);
    return true;
}
inline bool read_value(const std::string& text, double* out) {
    char* end = nullptr;
    *out = std::strtod(text.c_str(), &end);
    return end != text.c_str() && *end == 0;
}
inline bool read_value(const std::string& text, int64_t* out) {
    char* end = nullptr;
    *out = std::strtoll(text.c_str(), &end, 10);
    return end != text.c_str() && *end == 0;
}
// Bytes; K, M or G behind the number count them by 1,024.
inline bool read_value(const std::string& text, uint64_t* out) {
    const size_t unit = std::string_view("KMG").find(text.empty() ? 0 : text.back());
    const int shift = unit == std::string_view::npos ? 0 : 10 * (static_cast<int>(unit) + 1);
    int64_t count = 0;
    if (!read_value(shift ? text.substr(0, text.size() - 1) : text, &count)) return false;
    if (count < 0 || count > INT64_MAX >> shift) return false;
    *out = static_cast<uint64_t>(count) << shift;
    return true;
}
template <class Integer>
requires(std::is_integral_v<Integer> &&
         sizeof(Integer) < 8) bool read_value(const std::string& text, Integer* out) {
    int64_t wide = 0;
    if (!read_value(text, &wide) || !std::in_range<Integer>(wide)) return false;
    *out = static_cast<Integer>(wide);
    return true;
}
inline bool read_value(const std::string& text, valar::Precision* out) {
    *out = text == "fine" ? valar::Precision::fine : valar::Precision::fast;
    return text == "fine" || text == "fast";
}
constexpr const char* kv_type_names[] = {"f16", "f32", "q8_0"};
inline bool read_value(const std::string& text, valar::KvType* out) {
    for (uint32_t i = 0; i < 3; ++i)
        if (text == kv_type_names[i]) return *out = static_cast<valar::KvType>(i), true;
    return false;
}
inline bool read_value(const std::string& text, valar::Weights* out) {
    *out = text == "mapped" ? valar::Weights::mapped : valar::Weights::packed;
    return text == "mapped" || text == "packed";
}
template <class T>
bool read_value(const std::string& text, std::optional<T>* out) {
    return read_value(text, &out->emplace());
}

// How many letters to change, add or take away to get from one word to the other.
inline size_t edit_distance(std::string_view a, std::string_view b) {
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
    for (size_t i = 0; i < a.size(); ++i) {
        size_t corner = std::exchange(row[0], i + 1);
        for (size_t j = 0; j < b.size(); ++j) {
            const size_t change = corner + (a[i] != b[j]);
            corner = row[j + 1];
            row[j + 1] = std::min({change, row[j + 1] + 1, row[j] + 1});
        }
    }
    return row[b.size()];
}

/// The flags of a program: add() them, then parse().
class Flags {
public:
    Flags(std::string program, std::string summary)
        : program_(std::move(program)), summary_(std::move(summary)) {}

    /// --name VALUE, or --name=VALUE; `value` is how the help calls it.
    template <class T>
    void add(const char* name, const char* value, T* out, const char* help) {
        flags_.push_back({name, value, help, out, [](const std::string& text, void* to) {
                              return read_value(text, static_cast<T*>(to));
                          }});
    }
    /// --name alone.
    void add(const char* name, bool* out, const char* help) {
        flags_.push_back({name, "", help, out, [](const std::string&, void* to) {
                              return *static_cast<bool*>(to) = true;
                          }});
    }
    /// The one word that may stand without a flag.
    void add_word(const char* value, std::string* out) {
        word_name_ = value;
        word_ = out;
    }

    /// Nothing: go on. Else the exit code: after --help, or after a mistake that was explained.
    std::optional<int> parse(int argc, char** argv) {
        const std::vector<std::string> words = arguments(argc, argv);
        for (size_t i = 0; i < words.size(); ++i) {
            if (words[i] == "--help" || words[i] == "-h") return print_help();
            if (words[i].empty() || words[i][0] != '-') {
                if (!word_) return mistake("unexpected '" + words[i] + "'");
                *std::exchange(word_, nullptr) = words[i];
                continue;
            }
            const size_t equals = words[i].find('=');
            const std::string name = words[i].substr(0, equals);
            const Flag* flag = find(name);
            if (!flag) return unknown(name);
            std::string value;
            if (equals != std::string::npos) value = words[i].substr(equals + 1);
            else if (*flag->value && ++i < words.size()) value = words[i];
            else if (*flag->value) return mistake(name + " needs " + flag->value);
            if (!flag->read(value, flag->out))
                return mistake(name + ": '" + value + "' is not " + flag->value);
        }
        return std::nullopt;
    }

private:
    struct Flag {
        const char* name;
        const char* value;
        const char* help;
        void* out;
        bool (*read)(const std::string& text, void* out);
    };

    // In UTF-8 on every system; on Windows main's own are not.
    static std::vector<std::string> arguments(int argc, char** argv) {
        std::vector<std::string> words;
#if defined(_WIN32)
        (void)argv;
        SetConsoleOutputCP(CP_UTF8);
        wchar_t** wide = CommandLineToArgvW(GetCommandLineW(), &argc);
        for (int i = 1; wide && i < argc; ++i) {
            std::string word(static_cast<size_t>(lstrlenW(wide[i])) * 3 + 1, '\0');
            const int size = WideCharToMultiByte(CP_UTF8, 0, wide[i], -1, word.data(),
                                                 static_cast<int>(word.size()), nullptr, nullptr);
            word.resize(static_cast<size_t>(std::max(size, 1) - 1));
            words.push_back(std::move(word));
        }
        if (wide) LocalFree(wide);
#else
        for (int i = 1; i < argc; ++i) words.push_back(argv[i]);
#endif
        return words;
    }
    const Flag* find(const std::string& name) const {
        for (const Flag& flag : flags_)
            if (name == std::string("--") + flag.name) return &flag;
        return nullptr;
    }
    int mistake(const std::string& text) const {
        std::fprintf(stderr, "%s: %s (see --help)\n", program_.c_str(), text.c_str());
        return 2;
    }
    int unknown(const std::string& name) const {
        std::string nearest = "--help";
        for (const Flag& flag : flags_) {
            const std::string candidate = std::string("--") + flag.name;
            if (edit_distance(name, candidate) < edit_distance(name, nearest)) nearest = candidate;
        }
        return mistake("there is no " + name + "; did you mean " + nearest + "?");
    }
    int print_help() const {
        std::printf("%s [flags]%s%s\n\n%s\n\n", program_.c_str(), *word_name_ ? " " : "",
                    word_name_, summary_.c_str());
        for (const Flag& flag : flags_)
            std::printf("  --%-26s %s\n", (std::string(flag.name) + " " + flag.value).c_str(),
                        flag.help);
        std::printf("  --%-26s %s\n", "help", "shows this");
        return 0;
    }

    std::string program_, summary_;
    std::vector<Flag> flags_;
    const char* word_name_ = "";
    std::string* word_ = nullptr;
};

// ---- The model -------------------------------------------------------------------------------

/// Flags that every program with a model has.
/// The default model is small enough to afford `fine`.
inline void add_model_flags(Flags& flags, valar::EngineOptions& options) {
    options.precision = valar::Precision::fine;
    flags.add("model", "FILE", &options.model_path,
              "a GGUF file (default: what fetch_model.py brought)");
    flags.add("threads", "N", &options.threads, "helpers beside the caller (default: cores - 1)");
    flags.add("ctx", "TOKENS", &options.context_tokens,
              "prompt and answer at most (default: 8192 or the model's)");
    flags.add("weights", "packed|mapped", &options.weights,
              "mapped: no private copy, slower (default: packed)");
    flags.add("memory", "BYTES", &options.memory_limit,
              "weights, keys and values at most: 600M, 2G (default: room for two full contexts)");
    flags.add("parallel", "N", &options.max_running, "requests side by side (default: 16)");
    flags.add("precision", "fast|fine", &options.precision,
              "fast: less exact, quicker with long prompts (default: fine)");
    flags.add("kv-type", "f16|f32|q8_0", &options.kv_type,
              "how keys and values are kept; q8_0: in half the memory (default: f16)");
}

inline std::string environment(const char* name) {
    const char* value = std::getenv(name);
    return value ? value : "";
}

/// Where fetch_model.py puts the model; empty when no home is known.
inline std::string cached_model() {
#if defined(_WIN32)
    std::string folder = environment("LOCALAPPDATA");
    if (folder.empty()) folder = environment("USERPROFILE") + "\\AppData\\Local";
    folder += "\\valar\\";
#elif defined(__APPLE__)
    const std::string folder = environment("HOME") + "/Library/Caches/valar/";
#else
    std::string folder = environment("XDG_CACHE_HOME");
    if (folder.empty()) folder = environment("HOME") + "/.cache";
    folder += "/valar/";
#endif
    return folder + "SmolLM2-135M-Instruct.Q4_1.gguf";
}

/// To the terminal at once.
inline void print(std::string_view text) {
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
}

/// Says what went wrong; the exit code.
inline int fail(const std::string& message) {
    std::fprintf(stderr, "%s\n", message.c_str());
    return 1;
}

inline bool is_terminal(FILE* file) {
#if defined(_WIN32)
    return _isatty(_fileno(file)) != 0;
#else
    return isatty(fileno(file)) != 0;
#endif
}

inline void print_warning(void*, valar::LogLevel level, std::string_view line) {
    if (level < valar::LogLevel::warning) return;
    std::fprintf(stderr, "%.*s\n", static_cast<int>(line.size()), line.data());
}

/// Opens the engine, with a progress line where somebody is looking; its warnings go to stderr.
/// Without a model_path the model that fetch_model.py brought is taken.
inline valar::Result<valar::Engine> open_engine(valar::EngineOptions options) {
    if (!options.log.write) options.log.write = print_warning;
    const bool by_default = options.model_path.empty();
    if (by_default) options.model_path = cached_model();
    auto engine = valar::Engine::begin_open(options);
    if (!engine && by_default && engine.error().kind == valar::ErrorKind::not_found)
        engine.error().message =
            "no model: pass --model FILE, or get a small one (98 MB) with\n"
            "    python3 examples/fetch_model.py";
    const bool show = is_terminal(stderr);
    while (engine && !engine->is_loaded()) {
        auto more = engine->step(50'000);
        if (!more) engine = more.error();
        else if (show)
            std::fprintf(stderr, "\rloading %3.0f %%",
                         100.0 * static_cast<double>(engine->load_progress()));
    }
    if (show) std::fprintf(stderr, "\r%16s\r", "");
    return engine;
}

}  // namespace example

#endif  // VALAR_EXAMPLES_COMMON_HPP
