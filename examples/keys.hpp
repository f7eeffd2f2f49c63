// The keys of a server: a secret from the command line or the environment, and a file that may change
// while it serves. Include it after valar.hpp and common.hpp.
#ifndef VALAR_EXAMPLES_KEYS_HPP
#define VALAR_EXAMPLES_KEYS_HPP

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace example {

/// Overwrites what must not stay in memory, also where nobody reads it again.
inline void wipe(char* text, size_t size, char with) {
    volatile char* bytes = text;
    for (size_t i = 0; i < size; ++i) bytes[i] = with;
}
inline void wipe(std::string* text) {
    wipe(text->data(), text->size(), '\0');
    text->clear();
}

/// The value of a flag, before anybody copies it; stars stand in its place, since `ps` shows the command
/// line to everybody. Empty: it is not there. (Windows shows it to nobody, and keeps it elsewhere.)
inline std::string take_secret(int argc, char** argv, std::string_view flag) {
    std::string secret;
#if !defined(_WIN32)
    for (int i = 1; i < argc; ++i) {
        const std::string_view word = argv[i];
        char* value = nullptr;
        if (word == flag && i + 1 < argc && std::strncmp(argv[i + 1], "--", 2) != 0)
            value = argv[i + 1];
        else if (word.substr(0, flag.size()) == flag && word.substr(flag.size(), 1) == "=")
            value = argv[i] + flag.size() + 1;
        if (!value || std::strspn(value, " \t\r\n\v\f") == std::strlen(value)) continue;
        secret = value;
        wipe(value, secret.size(), '*');
    }
#else
    (void)argc, (void)argv, (void)flag;
#endif
    return secret;
}

/// A variable of the environment, which is taken out of it. Nothing: it is not set.
inline std::optional<std::string> take_environment(const char* name) {
    char* value = std::getenv(name);
    if (!value) return std::nullopt;
    std::string taken = value;
    wipe(value, taken.size(), '\0');
#if !defined(_WIN32)
    unsetenv(name);
#endif
    return taken;
}

/// The keys of a file and those beside it. Threads: one at a time.
class KeyFile {
public:
    std::string path;  ///< empty: there is none
    bool insecure = false;
    uint32_t poll_ms = 5000;            ///< a change is noticed within; 0: never by itself
    std::vector<valar::ApiKey> beside;  ///< hashed, and in force whatever the file says
    valar::LogSink log;

    valar::Result<std::vector<valar::ApiKey>> read() {
        if (path.empty()) return beside;
        taken_ = seen_ = contents();
        auto keys = valar::read_key_file(path, insecure);
        if (keys) keys->insert(keys->end(), beside.begin(), beside.end());
        else if (keys.error().kind == valar::ErrorKind::permission)
            return valar::Error{keys.error().kind,
                                keys.error().message + "; --insecure-keys takes it as it is"};
        return keys;
    }

    /// What stands there now counts. A file that does not will change nothing.
    void reload(valar::Server& server) {
        if (path.empty()) return;
        auto keys = read();
        auto done = keys ? server.replace_keys(*keys) : valar::Result<void>(keys.error());
        if (!done)
            log(valar::LogLevel::error, "keys: " + done.error().message + "; those of before stay");
    }

    /// To be called all the time. A change counts when it was there twice: an editor may be writing.
    void look(valar::Server& server) {
        const auto now = std::chrono::steady_clock::now();
        if (path.empty() || poll_ms == 0 || now < next_look_) return;
        next_look_ = now + std::chrono::milliseconds(poll_ms) * 2 / 5;
        const std::string before = std::exchange(seen_, contents());
        if (seen_ == before && seen_ != taken_) reload(server);
    }

private:
    std::string contents() const {
        auto text = read_text(path);
        return text ? std::move(*text) : "\n" + text.error().message;  // as if that stood in it
    }

    std::string seen_, taken_;
    std::chrono::steady_clock::time_point next_look_;
};

}  // namespace example

#endif  // VALAR_EXAMPLES_KEYS_HPP
