// What the programs have in common that serve over HTTP: flags of the server, its keys, store and log,
// signals, and the loop. Include it after valar.hpp.
#ifndef VALAR_EXAMPLES_SERVING_HPP
#define VALAR_EXAMPLES_SERVING_HPP

#include "common.hpp"
#include "keys.hpp"
#include "log_writer.hpp"
#include "service.hpp"

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace example {

inline volatile std::sig_atomic_t interrupted = 0;  // how often
inline volatile std::sig_atomic_t hung_up = 0;

/// What the command line sets.
struct ServingSettings {
    Duration orphans = {3'600'000};
    valar::ServerOptions server;
    valar::FileStoreOptions journal;
    std::string key, listen, backup;
    bool keep_key = false;  // the program is to use it itself
    KeyFile keys;
    uint64_t store_bytes = 0;
    bool quiet = false, version = false;
    std::string log_file;
    LogWriter log;  // outlives all that writes into it
};

inline std::string host_in_url(const std::string& host) {
    if (host == "0.0.0.0" || host == "::") return "localhost";
    return host.find(':') != std::string::npos && host[0] != '[' ? "[" + host + "]" : host;
}

// Who starts it reads this, or nobody does: a pipe that is full is left alone. With --log-json it is an
// object like all that is said.
inline void print_ready(const std::string& host, uint16_t port,
                        const std::vector<std::string>& models, bool key, bool json) {
    if (!takes_some(stdout)) return;
    const bool local = port == 0;  // a Unix socket: host is "unix:/path"
    const std::string url = local ? "http://localhost"
                                  : "http://" + host_in_url(host) + ":" + std::to_string(port);
    valar::Json body = valar::Json::object();
    body.set("model", models.front())
        .set("input", "Explain the key ideas behind transformer architectures.");
    std::string serves = (local ? host : url) + " serves ";
    for (const std::string& model : models)
        serves += (&model == &models.front() ? "" : ", ") + model;
    if (json) serves = LogWriter::stamped(valar::LogLevel::info, serves, true);
    std::printf("%s\n", serves.c_str());
    if (!json)
        std::printf(
            "curl %s%s/v1/responses %s--header 'Content-Type: application/json' --data '%s'\n",
            local ? ("--unix-socket " + host.substr(5) + " ").c_str() : "", url.c_str(),
            key ? "--header \"Authorization: Bearer $KEY\" " : "",
            body.write(valar::json_python).c_str());
    std::fflush(stdout);
}

inline void add_server_flags(Flags& flags, ServingSettings& settings) {
    valar::ServerOptions& server = settings.server;
    flags.add("port", "N", &server.port, "0: any free one (default: 8080)");
    flags.add("host", "ADDRESS", &server.host, "address to listen on (default: 127.0.0.1)");
    flags.add("listen", "ADDRESS:PORT|unix:PATH", &settings.listen,
              "in place of --host and --port; a Unix socket has mode 0660 and counts as loopback",
              "host");
    flags.add(
        "api-key", "SECRET", &settings.key,
        "16 characters or more, needed beyond loopback; VALAR_API_KEY in the environment does "
        "the same",
        "keys");
    flags.add("keys", "FILE", &settings.keys.path,
              "lines of `id organisation sha256 [requests-per-minute]`; may change at any time");
    flags.add_in<1000>("keys-poll", "SECONDS", &settings.keys.poll_ms,
                       "a change of that file is noticed within; 0: only SIGHUP tells (default: 5)",
                       "");
    flags.add("insecure-keys", &settings.keys.insecure,
              "take a file of keys that others may read or write");
    flags.add("allow-open", &server.allow_open, "without keys, too, listen beyond loopback");
    flags.add("allow-host", "NAME[:PORT]", &server.allowed_hosts,
              "without keys: a Host that is answered like localhost (repeatable)", "allowed_hosts");
    flags.add("webhook-policy", "any|loopback|public", &server.webhook_policy,
              "where webhooks may go (default: loopback without keys, else public)",
              "webhook_policy");
    flags.add("cors-origin", "ORIGIN", &server.cors_origins,
              "web pages from there may call: https://example.org (repeatable)", "cors_origins");
    flags.add("dialect", "valar|openai", &server.dialect, "names and fields (default: valar)");
    flags.add_in<1000>("sync-timeout", "SECONDS", &server.sync_timeout_ms,
                       "then 504, the work goes on; 0: never (default: 600)", "sync_timeout_ms");
    flags.add_in<1000>("drain", "SECONDS", &server.drain_timeout_ms,
                       "at the end, for what still runs (default: 10)", "drain_timeout_ms");
    flags
        .add_in<1000>("keep-alive", "SECONDS", &server.keep_alive_ms,
                      "of a connection without a request; a proxy's is shorter (default: 75)",
                      "keep_alive_ms")
        .within(1);
    flags
        .add("max-queued", "N", &server.max_queued,
             "requests accepted but not begun; then 503 (default: 1000)")
        .within(1, UINT32_MAX);
    flags.add("max-connections", "N", &server.max_connections,
              "an idle one makes room, else 503 (default: 10000)");
    flags.add("max-body-bytes", "BYTES", &server.max_body_bytes,
              "of one request: 500K, 32M; then 413 (default: 32M)");
    flags.add("max-inflight-body-bytes", "BYTES", &server.max_inflight_body_bytes,
              "of all requests that are being received; then 503 (default: 512M)");
    flags.add("trust-proxy", &server.trust_proxy,
              "a proxy is in front: X-Forwarded-For, or Forwarded, is who a client is, and without "
              "keys all that it passes on is let in");
    flags.add("log-json", &server.log_json, "each log line is a JSON object");
    flags.add("log-health", &server.log_health, "log GET /health and /metrics, too");
    flags.add("log-file", "FILE", &settings.log_file,
              "append to it, and open it anew after SIGHUP (default: stderr)");
    flags.add("quiet", &settings.quiet, "only warnings and errors are logged");
}

inline constexpr double most_retention_hours = 100 * 366 * 24;

inline void add_store_flags(Flags& flags, ServingSettings& settings) {
    flags.add("store", "DIR", &settings.journal.path,
              "keep responses there (default: in memory only)", "path");
    flags.add("recover", &settings.journal.recover, "open a damaged store, say what is lost");
    flags
        .add_in<3600>("retention", "HOURS", &settings.journal.retention_s,
                      "how long finished responses are kept (default: 48)", "retention_s")
        .within(1, most_retention_hours);
    flags
        .add("store-bytes", "BYTES", &settings.store_bytes,
             "then the oldest go early (default: 4G; in memory: 256M)", "max_bytes")
        .within(1);
    flags.add("orphans", "TIME", &settings.orphans,
              "how long work of before a restart waits for an alias that is missing (default: 1h)",
              "orphans_ms");
    flags
        .add("segment-bytes", "BYTES", &settings.journal.segment_bytes,
             "of one file of the store, about (default: 32M)")
        .within(1);
    flags.add("backup", "DIR", &settings.backup,
              "copy the store there, whatever server works on it; see that the copy opens; end");
}

// An error about one option, as the library words it.
inline valar::Error wrong(const char* option, std::string message) {
    return {valar::ErrorKind::invalid_request, std::move(message), {}, option};
}

// "127.0.0.1:8080", "[::1]:8080", "unix:/path".
inline valar::Result<void> read_listen(const Flags& flags, ServingSettings& settings) {
    if (!flags.given("listen")) return {};
    if (flags.given("host") || flags.given("port"))
        return wrong("host", "says where; --host and --port are not for beside it");
    const std::string& text = settings.listen;
    valar::ServerOptions& server = settings.server;
    server.host = text, server.port = 0;
    if (text.rfind("unix:", 0) == 0) return {};
    const size_t colon = text.rfind(':');
    if (colon == text.npos || !read_value(text.substr(colon + 1), &server.port))
        return wrong("host", "'" + text + "' is not ADDRESS:PORT or unix:PATH");
    server.host = text.substr(0, colon);
    return {};
}

// Of secrets only their hashes stay, unless the program is to ask itself.
inline valar::Result<void> read_keys(const Flags& flags, ServingSettings& settings) {
    const bool by_flag = flags.given("api-key");
    auto variable = take_environment("VALAR_API_KEY");
    if (variable && !by_flag) settings.key = *variable;
    if (by_flag || variable) {
        valar::ApiKey key = {"key", "default", settings.key};
        if (auto hashed = valar::hash_secret(&key); !hashed)
            return by_flag ? wrong("keys", hashed.error().message)
                           : wrong("", "VALAR_API_KEY: " + hashed.error().message);
        settings.keys.beside.push_back(key);
    }
    if (variable) wipe(&*variable);
    if (!settings.keep_key) wipe(&settings.key);
    settings.keys.log = settings.log.sink();
    auto keys = settings.keys.read();
    if (!keys) return wrong("keys", keys.error().message);
    settings.server.keys = std::move(*keys);
    settings.server.require_keys = by_flag || variable || flags.given("keys");
    return {};
}

// What follows from several flags, or from the files that they name.
inline valar::Result<void> complete_serving(const Flags& flags, ServingSettings& settings) {
    valar::ServerOptions& server = settings.server;
    if (auto read = read_listen(flags, settings); !read) return read;
    server.orphans_ms = settings.orphans.ms;
    if (auto read = read_keys(flags, settings); !read) return read;
    if (!flags.given("store")) {
        if (settings.journal.recover) return wrong("recover", "needs --store DIR");
        if (flags.given("segment-bytes")) return wrong("segment_bytes", "needs --store DIR");
    }
    server.memory_store.retention_s = settings.journal.retention_s;
    if (flags.given("store-bytes"))
        server.memory_store.max_bytes = settings.journal.max_bytes = settings.store_bytes;
    settings.journal.log = settings.log.sink();
    server.log = settings.log.server_sink();
    server.log_lost = LogWriter::count_lost;
    return {};
}

inline valar::Result<void> open_log(ServingSettings& settings) {
    LogOptions options;
    options.path = settings.log_file;
    options.json = settings.server.log_json;
    if (settings.quiet) options.least = valar::LogLevel::warning;
    return settings.log.open(options);
}

// A copy of the store, while a server may work on it.
inline int back_up(const Flags& flags, const ServingSettings& settings) {
    if (!flags.given("store")) return flags.fail(wrong("backup", "needs --store DIR"));
    auto bytes = valar::FileStore::back_up(settings.journal.path, settings.backup);
    if (!bytes) return flags.fail(bytes.error());
    std::printf("%s holds a copy of %s: %llu bytes\n", settings.backup.c_str(),
                settings.journal.path.c_str(), static_cast<unsigned long long>(*bytes));
    return 0;
}

// Why it does not start, or ends: into the log, and where that is a file to who started it, too.
inline int fail(const Flags& flags, ServingSettings& settings, const valar::Error& error) {
    settings.log.sink()(valar::LogLevel::error, flags.explain(error));
    return settings.log_file.empty() ? 1 : flags.fail(error);
}

// The directory of a store, opened; null: there is none.
inline valar::Result<std::unique_ptr<valar::FileStore>> open_store(
    const Flags& flags, const ServingSettings& settings) {
    if (!flags.given("store")) return std::unique_ptr<valar::FileStore>();
    auto opened = valar::FileStore::open(settings.journal);
    if (opened) return opened;
    valar::Error error = opened.error();
    if (error.kind == valar::ErrorKind::bad_data)
        error.message += "; --recover keeps what is whole";
    if (error.param.empty()) error.param = "path";
    return error;
}

// A reader of the log that dies ends nothing, and neither does a terminal that goes.
inline void hold_signals() {
#if !defined(_WIN32)
    std::signal(SIGPIPE, SIG_IGN);
    std::signal(SIGHUP, [](int) { hung_up = 1; });
#endif
}

// After SIGHUP what lies in files is read, or opened, anew.
inline void on_hangup(ServingSettings& settings, valar::Server& server) {
    hung_up = 0;
    settings.log.reopen();
    settings.keys.reload(server);
}

// A second signal does not wait for what runs; a third not even for the store.
inline void count_signal(int signal) {
    interrupted = interrupted + 1;
    if (interrupted > 2) std::_Exit(128 + signal);
}

// From before anybody is told that it serves.
inline void count_signals() {
    std::signal(SIGINT, count_signal);
    std::signal(SIGTERM, count_signal);
}

// Until a signal says stop; then what runs may finish.
template <class IsReady>
int serve(valar::Server& server, ServingSettings& settings, IsReady is_ready) {
    ServiceManager manager;
    bool ready = false;
    for (int stops = 0;;) {
        if (hung_up) on_hangup(settings, server);
        settings.keys.look(server);
        auto more = server.step(manager.turn_ms(200));
        if (!more || !*more) return more ? 0 : 1;
        if (!ready && (ready = is_ready())) manager.tell("READY=1");
        manager.beat();
        if (interrupted == stops) continue;
        if (stops == 0) manager.tell("STOPPING=1");
        stops = interrupted;
        server.stop(stops > 1);
    }
}

}  // namespace example

#endif  // VALAR_EXAMPLES_SERVING_HPP
