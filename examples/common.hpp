// What the examples share: flags with --help, the default model, a progress line while loading.
// Include it after valar.hpp.
#ifndef VALAR_EXAMPLES_COMMON_HPP
#define VALAR_EXAMPLES_COMMON_HPP

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <limits>
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
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>
#endif

namespace example {

/// Standard streams that the caller closed lead to nowhere. Else the first files that are opened
/// get their numbers, and what is printed goes into them.
inline void hold_standard_streams() {
#if !defined(_WIN32)
    int stream = 0;
    while (stream >= 0 && stream < 3) stream = open("/dev/null", O_RDWR);
    if (stream >= 3) close(stream);
#endif
}

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
    const bool decimal = text.find_first_not_of("+-.0123456789eE") == text.npos;
    return decimal && end != text.c_str() && *end == 0 && std::isfinite(*out);
}
inline bool read_value(const std::string& text, int64_t* out) {
    char* end = nullptr;
    errno = 0;
    *out = std::strtoll(text.c_str(), &end, 10);
    const bool digits = text.find_first_not_of("+-0123456789") == text.npos;
    return digits && end != text.c_str() && *end == 0 && errno != ERANGE;
}
// Bytes; K, M or G behind the number count them by 1,024.
inline bool read_value(const std::string& text, uint64_t* out) {
    const size_t unit = std::string_view("KMG").find(text.empty() ? 0 : text.back());
    const int shift = unit == std::string_view::npos ? 0 : 10 * (static_cast<int>(unit) + 1);
    int64_t count = 0;
    if (!read_value(shift ? text.substr(0, text.size() - 1) : text, &count)) return false;
    if (count < 0 || count > std::numeric_limits<int64_t>::max() >> shift) return false;
    if (count == 0 && shift) return false;  // 0 alone may mean something
    *out = static_cast<uint64_t>(count) << shift;
    return true;
}
/// A time; s, m or h behind the number: seconds, which it is without, minutes or hours.
struct Duration {
    uint32_t ms = 0;
};
inline bool read_value(const std::string& text, Duration* out) {
    const size_t unit = std::string_view("smh").find(text.empty() ? 0 : text.back());
    const int64_t ms = unit == 1 ? 60'000 : unit == 2 ? 3'600'000 : 1000;
    int64_t count = 0;
    if (!read_value(text.substr(0, text.size() - (unit < 3)), &count)) return false;
    if (count < 0 || count > std::numeric_limits<uint32_t>::max() / ms) return false;
    out->ms = static_cast<uint32_t>(count * ms);
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

// A word of a list, which stands for the value at its place.
template <class Value, size_t count>
bool read_name(const std::string& text, const char* const (&names)[count], Value* out) {
    const auto found = std::find(std::begin(names), std::end(names), text);
    if (found != std::end(names)) *out = static_cast<Value>(found - std::begin(names));
    return found != std::end(names);
}
inline bool read_value(const std::string& text, bool* out) {
    constexpr const char* names[] = {"off", "on", "false", "true"};
    int place = 0;
    const bool known = read_name(text, names, &place);
    *out = place & 1;
    return known;
}
inline bool read_value(const std::string& text, valar::Precision* out) {
    constexpr const char* names[] = {"fast", "fine"};
    return read_name(text, names, out);
}
constexpr const char* kv_type_names[] = {"f16", "f32", "q8_0"};
inline bool read_value(const std::string& text, valar::KvType* out) {
    return read_name(text, kv_type_names, out);
}
inline bool read_value(const std::string& text, valar::Weights* out) {
    constexpr const char* names[] = {"packed", "mapped"};
    return read_name(text, names, out);
}
inline bool read_value(const std::string& text, valar::WebhookPolicy* out) {
    constexpr const char* names[] = {"auto", "any", "loopback", "public"};
    return read_name(text, names, out);
}
inline bool read_value(const std::string& text, valar::Dialect* out) {
    constexpr const char* names[] = {"valar", "openai"};
    return read_name(text, names, out);
}
inline bool read_value(const std::string& text, std::vector<valar::Window>* out) {
    constexpr const char* names[] = {"asap", "standard", "flex"};
    out->clear();
    for (size_t at = 0; at <= text.size();) {
        const size_t end = std::min(text.find(',', at), text.size());
        if (!read_name(text.substr(at, end - at), names, &out->emplace_back())) return false;
        if (std::count(out->begin(), out->end(), out->back()) > 1) return false;
        at = end + 1;
    }
    return true;
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

/// The least and the most that a number may be, as it stands on the command line.
struct Range {
    double least = -HUGE_VAL, most = HUGE_VAL;
    bool unlimited() const { return std::isinf(least); }
    bool holds(double number) const { return number >= least && number <= most; }
    std::string shown() const {
        char text[64];
        std::snprintf(text, sizeof text, std::isinf(most) ? "%.10g or more" : "%.10g..%.10g", least,
                      most);
        return text;
    }
};
template <class T>
constexpr Range range_of(const T*) {
    if constexpr (std::is_integral_v<T> && sizeof(T) < 8 && !std::is_same_v<T, bool>)
        return {std::numeric_limits<T>::min(), std::numeric_limits<T>::max()};
    return {};
}
constexpr Range range_of(const Duration*) { return {0, UINT32_MAX / 1000}; }
template <class T>
constexpr Range range_of(const std::optional<T>*) {
    return range_of(static_cast<const T*>(nullptr));
}

template <class T>
constexpr bool takes_many = false;
template <class T>
constexpr bool takes_many<std::vector<T>> = std::is_same_v<T, std::string>;

/// The flags of a program: add() them, then parse(). Make it first of all: see
/// hold_standard_streams().
class Flags {
public:
    Flags(std::string program, std::string summary)
        : program_(std::move(program)), summary_(std::move(summary)) {
        hold_standard_streams();
    }

    struct Flag;

    /// --name VALUE, or --name=VALUE; `value` is how the help calls it. `option` is what the
    /// library calls it in its errors, where that is not the name.
    template <class T>
    Flag& add(const char* name, const char* value, T* out, const char* help,
              const char* option = "") {
        const auto read = [](const std::string& text, void* to) {
            return read_value(text, static_cast<T*>(to));
        };
        return flags_.emplace_back(
            Flag{name, value, help, option, out, read, range_of(out), takes_many<T>});
    }
    /// The same for a number that becomes the variable times `unit`, and `offset` more.
    template <int64_t unit, int64_t offset = 0, class T>
    Flag& add_in(const char* name, const char* value, T* out, const char* help,
                 const char* option = "") {
        const auto read = [](const std::string& text, void* to) {
            int64_t count = 0;
            if (!read_value(text, &count) || count < 0) return false;
            if (count > std::numeric_limits<int64_t>::max() / unit) return false;
            if (!std::in_range<T>(count * unit + offset)) return false;
            *static_cast<T*>(to) = static_cast<T>(count * unit + offset);
            return true;
        };
        const Range range{0, static_cast<double>(std::numeric_limits<T>::max() / unit)};
        return flags_.emplace_back(Flag{name, value, help, option, out, read, range, false});
    }
    /// --name alone, or --name=false and --name=true.
    Flag& add(const char* name, bool* out, const char* help, const char* option = "") {
        const auto read = [](const std::string& text, void* to) {
            return read_value(text.empty() ? "true" : text, static_cast<bool*>(to));
        };
        return flags_.emplace_back(Flag{name, "", help, option, out, read, {}, false});
    }
    /// The flags that were added so far make a set, which `name`, one of them, begins: all may come
    /// once more behind it. `next` is called before each set is read.
    void begin_sets(const char* name, std::function<void()> next) {
        set_name_ = name;
        set_size_ = flags_.size();
        next_set_ = std::move(next);
    }
    /// The one word that may stand without a flag.
    void add_word(const char* value, std::string* out) {
        word_name_ = value;
        word_ = out;
    }

    /// What --help ends with.
    void add_note(const char* note) { note_ = note; }

    /// Nothing: go on. Else the exit code: after --help, or after a mistake that was explained.
    std::optional<int> parse(int argc, char** argv) {
        bool help = false;
        const std::string wrong = take(arguments(argc, argv), &help);
        if (help) return print_help();
        if (!wrong.empty()) return mistake(wrong);
        return std::nullopt;
    }

    /// Was it on the command line?
    bool given(const std::string& name) const {
        for (const Flag& flag : flags_)
            if (name == flag.name) return flag.given;
        return false;
    }
    /// Says what the library refused; the exit code.
    int fail(const valar::Error& error) const {
        std::fprintf(stderr, "%s\n", explain(error).c_str());
        return 1;
    }
    /// What the library refused, by the flags that set it.
    std::string explain(const valar::Error& error) const {
        const std::string name = error.param.empty() ? "" : names_of(error.param);
        std::string text = error.message;
        if (!name.empty() && text.rfind(error.param + ": ", 0) == 0)
            text.erase(0, error.param.size() + 2);
        return name + (name.empty() ? "" : ": ") + in_flags(text);
    }

    struct Flag {
        const char* name;
        const char* value;
        const char* help;
        const char* option;
        void* out;
        bool (*read)(const std::string& text, void* out);
        Range range;
        bool repeatable;
        bool given = false;
        std::function<std::string()> here = nullptr;

        /// What its number may be, as it stands on the command line.
        Flag& within(double least, double most = HUGE_VAL) {
            range = {least, most};
            return *this;
        }
        /// The help says, too, what the default is on this machine.
        Flag& shows(std::function<std::string()> default_here) {
            here = std::move(default_here);
            return *this;
        }
        std::string option_name() const {
            std::string own = *option ? option : name;
            std::replace(own.begin(), own.end(), '-', '_');
            return own;
        }
    };

private:
    // Takes all words; what is wrong with the first that is, else nothing. Behind --help go on: what
    // a default is may depend on other flags.
    std::string take(const std::vector<std::string>& words, bool* help) {
        for (size_t i = 0; i < words.size(); ++i) {
            if (words[i] == "--help" || words[i] == "-h") {
                *help = true;
                continue;
            }
            if (words[i].empty() || words[i][0] != '-') {
                if (!word_) return "unexpected '" + words[i] + "'";
                *std::exchange(word_, nullptr) = words[i];
                continue;
            }
            const size_t equals = words[i].find('=');
            const std::string name = words[i].substr(0, equals);
            Flag* flag = find(name);
            if (!flag) return unknown(name);
            std::optional<std::string> value;
            if (equals != std::string::npos) value = words[i].substr(equals + 1);
            else if (*flag->value && i + 1 < words.size() && words[i + 1].rfind("--", 0) != 0)
                value = words[++i];
            if (flag->name == set_name_) begin_set();
            if (std::string wrong = read(*flag, name, value); !wrong.empty()) return wrong;
        }
        return {};
    }

    void begin_set() {
        for (size_t i = 0; i < set_size_; ++i) flags_[i].given = false;
        next_set_();
    }
    // Takes the value of one flag; what is wrong with it, else nothing. Nobody means an empty value:
    // it is a variable of a script that is not set, and would leave, say, a server without keys.
    static std::string read(Flag& flag, const std::string& name,
                            const std::optional<std::string>& value) {
        if (std::exchange(flag.given, true) && !flag.repeatable) return name + " is given twice";
        if (*flag.value && !value) return name + " needs " + flag.value;
        const std::string wanted = *flag.value ? flag.value : "true or false";
        if (value && value->find_first_not_of(" \t\r\n\v\f") == value->npos)
            return name + " needs " + wanted + ", which is empty here";
        double number = 0;
        const bool beyond = value && read_value(*value, &number) && !flag.range.holds(number);
        if (!beyond && flag.read(value.value_or(""), flag.out)) return {};
        return name + ": '" + *value + "' is not " + wanted +
               (flag.range.unlimited() ? "" : ": " + flag.range.shown());
    }
    // The flags that set an option of the library: of several those that were given.
    std::string names_of(const std::string& option) const {
        std::string all;
        for (const bool only_given : {true, false})
            for (const Flag& flag : flags_) {
                if (flag.option_name() != option || (only_given ? !flag.given : !all.empty()))
                    continue;
                all += (all.empty() ? "--" : ", --") + std::string(flag.name);
            }
        return all;
    }
    // A text of the library's, with flags for the options that it names. One that is a plain word
    // ("keys") may mean the thing itself.
    std::string in_flags(std::string text) const {
        for (const Flag& flag : flags_) {
            const std::string option = flag.option_name();
            if (option.find('_') == option.npos) continue;
            const std::string own = std::string("--") + flag.name;
            for (size_t at = 0; (at = text.find(option, at)) != text.npos;) {
                const bool whole = !is_in_word(text, at, option.size());
                if (whole) text.replace(at, option.size(), own);
                at += whole ? own.size() : option.size();
            }
        }
        return text;
    }
    static bool is_in_word(const std::string& text, size_t at, size_t size) {
        const auto letter = [](char c) {
            return std::isalnum(static_cast<unsigned char>(c)) || c == '_';
        };
        return (at > 0 && letter(text[at - 1])) ||
               (at + size < text.size() && letter(text[at + size]));
    }

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
    Flag* find(const std::string& name) {
        for (Flag& flag : flags_)
            if (name == std::string("--") + flag.name) return &flag;
        return nullptr;
    }
    int mistake(const std::string& text) const {
        std::fprintf(stderr, "%s: %s (see --help)\n", program_.c_str(), text.c_str());
        return 2;
    }
    std::string unknown(const std::string& name) const {
        std::string nearest = "--help";
        for (const Flag& flag : flags_) {
            const std::string candidate = std::string("--") + flag.name;
            if (edit_distance(name, candidate) < edit_distance(name, nearest)) nearest = candidate;
        }
        const bool slip = edit_distance(name, nearest) <= 2;  // of the hand
        return "there is no " + name + (slip ? "; did you mean " + nearest + "?" : "");
    }
    static std::string help_of(const Flag& flag) {
        std::string help = flag.help;
        const std::string here = flag.here ? flag.here() : "";
        if (!here.empty() && help.back() == ')') help.insert(help.size() - 1, "; here: " + here);
        return help;
    }
    int print_help() const {
        std::printf("%s [flags]%s%s\n\n%s\n\n", program_.c_str(), *word_name_ ? " " : "",
                    word_name_, summary_.c_str());
        for (const Flag& flag : flags_)
            std::printf("  --%-30s %s\n", (std::string(flag.name) + " " + flag.value).c_str(),
                        help_of(flag).c_str());
        std::printf("  --%-30s %s\n", "help", "shows this");
        if (*note_) std::printf("\n%s\n", note_);
        return 0;
    }

    std::string program_, summary_;
    const char* note_ = "";
    std::vector<Flag> flags_;
    std::string set_name_;
    size_t set_size_ = 0;
    std::function<void()> next_set_;
    const char* word_name_ = "";
    std::string* word_ = nullptr;
};

// ---- The model -------------------------------------------------------------------------------

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

/// How much these options are here: a context, and all memory of the plan. Empty without a model.
inline std::string default_context(valar::EngineOptions options) {
    if (options.model_path.empty()) options.model_path = cached_model();
    options.log.write = [](void*, valar::LogLevel, std::string_view) {};
    auto engine = valar::Engine::begin_open(options);
    return engine ? std::to_string(engine->responder()->models().front().context_tokens) : "";
}
inline std::string default_memory(valar::EngineOptions options) {
    if (options.model_path.empty()) options.model_path = cached_model();
    const auto plan = valar::Engine::memory_plan(options);
    return plan ? std::to_string(plan->total() >> 20) + "M" : "";
}
constexpr double most_threads = 1024;

/// Flags that every program with a model has.
/// The default model is small enough to afford `fine`.
inline void add_model_flags(Flags& flags, valar::EngineOptions& options) {
    options.precision = valar::Precision::fine;
    flags.add("model", "FILE", &options.model_path,
              "a GGUF file (default: what fetch_model.py brought)", "model_path");
    // The library counts helpers beside the caller.
    flags.add_in<1, -1>("threads", "N", &options.threads, "in all (default: physical cores)")
        .within(1, most_threads)
        .shows([] { return std::to_string(valar::physical_cores()); });
    flags
        .add("ctx", "TOKENS", &options.context_tokens,
             "prompt and answer at most (default: the model's own, as memory allows)",
             "context_tokens")
        .shows([&options] { return default_context(options); });
    flags.add("weights", "packed|mapped", &options.weights,
              "mapped: no private copy, slower (default: packed)");
    flags
        .add("memory", "BYTES", &options.memory_limit,
             "weights, keys and values at most: 600M, 2G (default: two full contexts, or what "
             "memory allows)",
             "memory_limit")
        .shows([&options] { return default_memory(options); });
    flags
        .add("parallel", "N", &options.max_running, "requests side by side (default: 16)",
             "max_running")
        .shows([usual = options.max_running] { return std::to_string(usual); });
    flags.add("precision", "fast|fine", &options.precision,
              "fast: less exact, quicker with long prompts (default: fine)");
    flags.add("kv-type", "f16|f32|q8_0", &options.kv_type,
              "how keys and values are kept; q8_0: in half the memory (default: f16)");
}

/// What programs with a loop of frames have, too.
inline void add_budget_flag(Flags& flags, int* budget_us) {
    flags
        .add("budget", "US", budget_us, "of each frame for the model, microseconds (default: 2000)")
        .within(0, INT32_MAX);
}

/// A small file as it is. Not one that would make us wait (a pipe) or that never ends (a device).
inline valar::Result<std::string> read_text(const std::string& path) {
    const auto name = std::filesystem::path(std::u8string(path.begin(), path.end()));
    std::error_code none;
    std::FILE* file = nullptr;
    if (std::filesystem::is_regular_file(name, none))
#if defined(_WIN32)
        file = _wfopen(name.c_str(), L"rb");
#else
        file = std::fopen(name.c_str(), "rb");
#endif
    if (!file) return valar::Error{valar::ErrorKind::io, "cannot read the file '" + path + "'"};
    std::string text;
    char piece[4096];
    while (const size_t got = std::fread(piece, 1, sizeof piece, file)) text.append(piece, got);
    std::fclose(file);
    return text;
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

/// Whether a few lines can be printed to it now, without waiting for who reads them.
inline bool takes_some(FILE* file) {
#if defined(_WIN32)
    (void)file;
    return true;
#else
    pollfd one = {fileno(file), POLLOUT, 0};
    return ::poll(&one, 1, 1000) > 0 && (one.revents & POLLERR) == 0;
#endif
}

/// Whether stdout is a terminal that knows "\x1b[2m" and its kin.
inline bool shows_colours() {
    if (!is_terminal(stdout)) return false;
#if defined(_WIN32)
    const HANDLE console = GetStdHandle(STD_OUTPUT_HANDLE);
    DWORD mode = 0;
    constexpr DWORD escapes = 4;  // ENABLE_VIRTUAL_TERMINAL_PROCESSING, which old headers lack
    return GetConsoleMode(console, &mode) && SetConsoleMode(console, mode | escapes);
#else
    return true;
#endif
}

inline void print_log(void*, valar::LogLevel level, std::string_view line) {
    if (level == valar::LogLevel::debug) return;
    std::fprintf(stderr, "\r%.*s\n", static_cast<int>(line.size()), line.data());
}
inline void print_warning(void*, valar::LogLevel level, std::string_view line) {
    if (level < valar::LogLevel::warning) return;
    std::fprintf(stderr, "%.*s\n", static_cast<int>(line.size()), line.data());
}

/// Begins to open the engine; step() then loads it. Its warnings go to stderr.
/// Without a model_path the model that fetch_model.py brought is taken.
inline valar::Result<valar::Engine> begin_open_engine(valar::EngineOptions options) {
    if (!options.log.write) options.log.write = print_warning;
    const bool by_default = options.model_path.empty();
    if (by_default) options.model_path = cached_model();
    auto engine = valar::Engine::begin_open(options);
    if (!engine && by_default && engine.error().kind == valar::ErrorKind::not_found)
        engine.error().message =
            "no model: pass --model FILE, or get a small one (98 MB) with\n"
            "    python3 examples/fetch_model.py";
    return engine;
}

/// Loads it while `go_on` says so, with a progress line where somebody is looking.
template <class GoOn>
valar::Result<void> load_engine(valar::Engine& engine, GoOn go_on) {
    const bool show = is_terminal(stderr);
    valar::Result<void> loaded;
    while (loaded && !engine.is_loaded() && go_on()) {
        auto more = engine.step(50'000);
        if (!more) loaded = more.error();
        else if (show)
            std::fprintf(stderr, "\rloading %3.0f %%",
                         100.0 * static_cast<double>(engine.load_progress()));
    }
    if (show) std::fprintf(stderr, "\r%16s\r", "");
    return loaded;
}

/// Opens the engine, as begin_open_engine() does, and loads it.
inline valar::Result<valar::Engine> open_engine(valar::EngineOptions options) {
    auto engine = begin_open_engine(std::move(options));
    if (!engine) return engine;
    if (auto loaded = load_engine(*engine, [] { return true; }); !loaded) return loaded.error();
    return engine;
}

}  // namespace example

#endif  // VALAR_EXAMPLES_COMMON_HPP
