// Serves a model over HTTP: POST /v1/responses and the routes around it.
//
//     server --model model.gguf --alias my-model --port 8080
//     server --ask "What is the capital of France?" --temperature 0
//
//     server --memory 8G --model a.gguf --alias small --model b.gguf --ctx 8192 --keep-loaded 10m
//
// With --ask it starts, posts the request to itself, prints the response object and ends.
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#endif
#include "valar.hpp"

#include "common.hpp"
#include "keys.hpp"
#include "log_writer.hpp"
#include "service.hpp"

#include <atomic>
#include <csignal>
#include <memory>
#include <set>
#include <thread>

namespace {

volatile std::sig_atomic_t interrupted = 0;  // how often
volatile std::sig_atomic_t hung_up = 0;

struct Model {
    valar::EngineOptions options;
    std::string template_file;
};

/// What the command line sets.
struct Settings {
    Model model;                // the one whose flags are being read
    std::vector<Model> models;  // all, and first what stands before the first --model
    valar::EnginePoolOptions pool;
    example::Duration keep_loaded, orphans = {3'600'000};
    valar::ServerOptions server;
    valar::FileStoreOptions journal;
    std::string key, listen, backup;
    example::KeyFile keys;
    uint64_t store_bytes = 0;
    bool quiet = false, version = false;
    std::string log_file;
    example::LogWriter log;
    bool is_pool() const { return models.size() > 1 || keep_loaded.ms; }
};

struct Question {
    std::string text, instructions;
    std::optional<double> temperature, top_p;
    std::optional<int64_t> seed, max_output_tokens;
};

valar::Json request_body(const Question& question, const std::string& model) {
    valar::Json body = valar::Json::object();
    body.set("model", model).set("input", question.text);
    if (!question.instructions.empty()) body.set("instructions", question.instructions);
    if (question.temperature) body.set("temperature", *question.temperature);
    if (question.top_p) body.set("top_p", *question.top_p);
    if (question.seed) body.set("seed", *question.seed);
    if (question.max_output_tokens) body.set("max_output_tokens", *question.max_output_tokens);
    return body;
}

// Posts the question over HTTP as any client would; 0 when a completed response came back.
int ask(const Question& question, const std::string& model, const std::string& host, uint16_t port,
        const std::string& key) {
    valar::HttpCall call;
    if (port == 0) call.host = host;  // a Unix socket
    call.port = port;
    call.method = "POST";
    call.target = "/v1/responses";
    call.headers = {{"Content-Type", "application/json"}};
    if (!key.empty()) call.headers.push_back({"Authorization", "Bearer " + key});
    call.body = request_body(question, model).write();
    auto reply = valar::http_call(call);
    if (!reply) return example::fail(reply.error().message);
    auto object = valar::Json::parse(reply->body);
    if (!object) return example::fail("the reply is not JSON: " + object.error().message);
    std::printf("%s\n", object->write(valar::json_pretty).c_str());
    return reply->status == 200 && (*object)["status"].as_string() == "completed" ? 0 : 1;
}

std::string host_in_url(const std::string& host) {
    if (host == "0.0.0.0" || host == "::") return "localhost";
    return host.find(':') != std::string::npos && host[0] != '[' ? "[" + host + "]" : host;
}

// Who starts it reads this, or nobody does: a pipe that is full is left alone. With --log-json it is an
// object like all that is said.
void print_ready(const std::string& host, uint16_t port, const std::vector<std::string>& models,
                 bool key, bool json) {
    if (!example::takes_some(stdout)) return;
    const bool local = port == 0;  // a Unix socket: host is "unix:/path"
    const std::string url = local ? "http://localhost"
                                  : "http://" + host_in_url(host) + ":" + std::to_string(port);
    valar::Json body = valar::Json::object();
    body.set("model", models.front())
        .set("input", "Explain the key ideas behind transformer architectures.");
    std::string serves = (local ? host : url) + " serves ";
    for (const std::string& model : models)
        serves += (&model == &models.front() ? "" : ", ") + model;
    if (json) serves = example::LogWriter::stamped(valar::LogLevel::info, serves, true);
    std::printf("%s\n", serves.c_str());
    if (!json)
        std::printf(
            "curl %s%s/v1/responses %s--header 'Content-Type: application/json' --data '%s'\n",
            local ? ("--unix-socket " + host.substr(5) + " ").c_str() : "", url.c_str(),
            key ? "--header \"Authorization: Bearer $KEY\" " : "",
            body.write(valar::json_python).c_str());
    std::fflush(stdout);
}

void add_server_flags(example::Flags& flags, Settings& settings) {
    valar::ServerOptions& server = settings.server;
    flags.add("port", "N", &server.port, "0: any free one (default: 8080; with --ask: 0)");
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

constexpr double most_retention_hours = 100 * 366 * 24;

void add_store_flags(example::Flags& flags, Settings& settings) {
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

void add_engine_flags(example::Flags& flags, Settings& settings) {
    valar::EngineOptions& model = settings.model.options;
    example::add_model_flags(flags, model);
    flags.add("model-id", "ID", &model.model_id, "its name (default: as its file has it)");
    flags.add("alias", "ID", &model.aliases, "a further id that it answers to (repeatable)",
              "aliases");
    flags.add("chat-template", "FILE|NAME", &settings.model.template_file,
              "Jinja, or the name of a known one, in place of the model's own");
    flags.add("tool-format", "NAME", &model.tool_format,
              "how calls are written: hermes, llama3, mistral ... (default: found)");
    flags.add("step-tokens", "N", &model.step_tokens,
              "of prompts in one pass, at most (default: 512)");
    flags.add("max-wait-step", "MS", &model.max_wait_step_ms,
              "of a pass, about: so long do newcomers wait for it; 0: any (default: 250)",
              "max_wait_step_ms");
    flags.add("page-tokens", "N", &model.page_tokens,
              "of a page of keys and values, a multiple of 16 (default: 16)");
    flags.add("prefix-cache", "on|off", &model.prefix_cache,
              "keep what requests that begin alike share (default: on)");
    flags.add("share-prefixes", "on|off", &model.share_prefixes,
              "among organisations, too: for a single tenant (default: off)");
    flags.add("speculation", "on|off", &model.speculation,
              "guess repeated text, the same answer sooner (default: on)");
    flags.add("show-schema", "on|off", &model.show_schema,
              "the schema of an answer stands in its prompt, too (default: on)");
    flags.add("windows", "WINDOW[,WINDOW...]", &model.windows,
              "of asap, standard, flex: those that are served (default: all)");
    flags.add_in<1000>("standard-target", "SECONDS", &model.standard_target_ms,
                       "after this wait standard counts as asap (default: 60)",
                       "standard_target_ms");
    flags.add_in<1000>("flex-target", "SECONDS", &model.flex_target_ms,
                       "after this wait flex counts as standard (default: 300)", "flex_target_ms");
    // Each --model has its own flags behind it; what stands before the first one is for all.
    flags.begin_sets("model", [&] {
        settings.models.push_back(settings.model);
        settings.model = settings.models.front();
    });
    flags.add("keep-loaded", "TIME", &settings.keep_loaded,
              "without requests, then a model's memory is given back: 90s, 10m (default: until "
              "another needs it)",
              "keep_loaded_ms");
    flags.add("preload", "on|off", &settings.pool.preload,
              "of several models, load what fits at the start (default: on)");
}

void add_question_flags(example::Flags& flags, Question& question) {
    flags.add("ask", "TEXT", &question.text, "post this to itself, print the response, end");
    flags.add("instructions", "TEXT", &question.instructions, "with --ask: the system message");
    flags.add("temperature", "T", &question.temperature, "with --ask: 0 (greedy) to 2")
        .within(0, 2);
    flags.add("top-p", "P", &question.top_p, "with --ask: 0 to 1").within(0, 1);
    flags.add("seed", "N", &question.seed, "with --ask: same seed, same answer");
    flags.add("max-output-tokens", "N", &question.max_output_tokens, "with --ask: length at most")
        .within(1, UINT32_MAX);
    flags.add_note(
        "Exit codes: 0: stopped by SIGTERM or SIGINT (a second one ends what runs at once), or "
        "the\n"
        "question was answered; 1: it could not start, or the question was not answered; 2: a "
        "flag\n"
        "is wrong; 128 and a signal's number: ended by that, or by the third SIGTERM or SIGINT.");
}

// An error about one option, as the library words it.
valar::Error wrong(const char* option, std::string message) {
    return {valar::ErrorKind::invalid_request, std::move(message), {}, option};
}

valar::Result<void> read_template(Model& model) {
    const std::string& file = model.template_file;
    std::error_code none;
    const bool name = file.find_first_of("./\\") == file.npos &&
                      !std::filesystem::exists(file, none);
    auto text = name ? valar::Result<std::string>(file) : example::read_text(file);
    if (!text) return wrong("chat_template", text.error().message);
    if (text->find_first_not_of(" \t\r\n") == text->npos)
        return wrong("chat_template", "'" + file + "' is empty");
    model.options.chat_template = std::move(*text);
    return {};
}

// "127.0.0.1:8080", "[::1]:8080", "unix:/path".
valar::Result<void> read_listen(const example::Flags& flags, Settings& settings) {
    if (!flags.given("listen")) return {};
    if (flags.given("host") || flags.given("port"))
        return wrong("host", "says where; --host and --port are not for beside it");
    const std::string& text = settings.listen;
    valar::ServerOptions& server = settings.server;
    server.host = text, server.port = 0;
    if (text.rfind("unix:", 0) == 0) return {};
    const size_t colon = text.rfind(':');
    if (colon == text.npos || !example::read_value(text.substr(colon + 1), &server.port))
        return wrong("host", "'" + text + "' is not ADDRESS:PORT or unix:PATH");
    server.host = text.substr(0, colon);
    return {};
}

// All of them, with what they have in common. A limit of memory before the first is of all together.
valar::Result<void> complete_models(Settings& settings) {
    settings.models.push_back(settings.model);
    settings.pool.memory_limit = settings.models.front().options.memory_limit;
    settings.pool.log = settings.log.sink();
    if (settings.models.size() > 1) settings.models.erase(settings.models.begin());
    std::set<std::string> names;
    for (Model& model : settings.models) {
        for (const std::string& alias : model.options.aliases)
            if (!names.insert(alias).second)
                return wrong("aliases", "'" + alias + "' names two models");
        if (!model.template_file.empty())
            if (auto read = read_template(model); !read) return read;
        valar::EngineOptions& options = model.options;
        options.max_queued = settings.server.max_queued;
        options.log = settings.pool.log;
        if (settings.is_pool() && options.memory_limit == settings.pool.memory_limit)
            options.memory_limit = 0;
    }
    return {};
}

// Of secrets only their hashes stay, unless the program is to ask itself.
valar::Result<void> read_keys(const example::Flags& flags, Settings& settings) {
    const bool by_flag = flags.given("api-key");
    auto variable = example::take_environment("VALAR_API_KEY");
    if (variable && !by_flag) settings.key = *variable;
    if (by_flag || variable) {
        valar::ApiKey key = {"key", "default", settings.key};
        if (auto hashed = valar::hash_secret(&key); !hashed)
            return by_flag ? wrong("keys", hashed.error().message)
                           : wrong("", "VALAR_API_KEY: " + hashed.error().message);
        settings.keys.beside.push_back(key);
    }
    if (variable) example::wipe(&*variable);
    if (!flags.given("ask")) example::wipe(&settings.key);
    settings.keys.log = settings.log.sink();
    auto keys = settings.keys.read();
    if (!keys) return wrong("keys", keys.error().message);
    settings.server.keys = std::move(*keys);
    settings.server.require_keys = by_flag || variable || flags.given("keys");
    return {};
}

// What follows from several flags, or from the files that they name.
valar::Result<void> complete(const example::Flags& flags, Settings& settings) {
    valar::ServerOptions& server = settings.server;
    if (auto read = read_listen(flags, settings); !read) return read;
    server.orphans_ms = settings.orphans.ms;
    if (auto read = read_keys(flags, settings); !read) return read;
    if (auto models = complete_models(settings); !models) return models;
    if (!flags.given("store")) {
        if (settings.journal.recover) return wrong("recover", "needs --store DIR");
        if (flags.given("segment-bytes")) return wrong("segment_bytes", "needs --store DIR");
    }
    server.memory_store.retention_s = settings.journal.retention_s;
    if (flags.given("store-bytes"))
        server.memory_store.max_bytes = settings.journal.max_bytes = settings.store_bytes;
    settings.journal.log = settings.log.sink();
    server.log = settings.log.server_sink();
    server.log_lost = example::LogWriter::count_lost;
    return {};
}

valar::Result<void> open_log(Settings& settings) {
    example::LogOptions options;
    options.path = settings.log_file;
    options.json = settings.server.log_json;
    if (settings.quiet) options.least = valar::LogLevel::warning;
    return settings.log.open(options);
}

// A copy of the store, while a server may work on it.
int back_up(const example::Flags& flags, const Settings& settings) {
    if (!flags.given("store")) return flags.fail(wrong("backup", "needs --store DIR"));
    auto bytes = valar::FileStore::back_up(settings.journal.path, settings.backup);
    if (!bytes) return flags.fail(bytes.error());
    std::printf("%s holds a copy of %s: %llu bytes\n", settings.backup.c_str(),
                settings.journal.path.c_str(), static_cast<unsigned long long>(*bytes));
    return 0;
}

// Why it does not start, or ends: into the log, and where that is a file to who started it, too.
int fail(const example::Flags& flags, Settings& settings, const valar::Error& error) {
    settings.log.sink()(valar::LogLevel::error, flags.explain(error));
    return settings.log_file.empty() ? 1 : flags.fail(error);
}

// What answers: one engine, or a pool of several.
struct Served {
    std::optional<valar::Engine> engine;
    std::optional<valar::EnginePool> pool;
    std::vector<valar::Responder*> responders;
    std::vector<std::string> names;

    static valar::Result<Served> open(Settings& settings);
    valar::Result<void> start() { return pool ? pool->start() : engine->start(); }
    bool is_ready() const;
};

valar::Result<Served> Served::open(Settings& settings) {
    Served out;
    if (settings.is_pool()) {
        settings.pool.keep_loaded_ms = settings.keep_loaded.ms;
        std::vector<valar::EngineOptions> options;
        for (const Model& model : settings.models) options.push_back(model.options);
        for (valar::EngineOptions& model : options)
            if (model.model_path.empty()) model.model_path = example::cached_model();
        auto pool = valar::EnginePool::open(options, settings.pool);
        if (!pool) return pool.error();
        out.pool = std::move(*pool);
        out.responders = out.pool->responders();
    } else {
        auto engine = example::begin_open_engine(settings.models.front().options);
        if (!engine) return engine.error();
        out.engine = std::move(*engine);
        out.responders = {out.engine->responder()};
    }
    std::set<std::string> ids;
    for (size_t i = 0; i < settings.models.size(); ++i) {
        for (const valar::ModelInfo& info : out.responders[i]->models())
            if (!ids.insert(info.id).second)
                return wrong("model_id", "'" + info.id + "' is the name of two models");
        const auto& aliases = settings.models[i].options.aliases;
        out.names.push_back(aliases.empty() ? out.responders[i]->models().front().id
                                            : aliases.front());
    }
    return out;
}

// Posts the question to the server from a thread of its own and serves it.
int serve_question(valar::Server& server, const Question& question, const std::string& model,
                   const Settings& settings) {
    int status = 1;
    std::thread client([&] {
        status = ask(question, model, settings.server.host, server.port(), settings.key);
        server.stop();
    });
    if (auto ran = server.run(); !ran) std::fprintf(stderr, "%s\n", ran.error().message.c_str());
    client.join();
    return status;
}

// A reader of the log that dies ends nothing, and neither does a terminal that goes.
void hold_signals() {
#if !defined(_WIN32)
    std::signal(SIGPIPE, SIG_IGN);
    std::signal(SIGHUP, [](int) { hung_up = 1; });
#endif
}

// After SIGHUP what lies in files is read, or opened, anew.
void on_hangup(Settings& settings, valar::Server& server) {
    hung_up = 0;
    settings.log.reopen();
    settings.keys.reload(server);
}

bool Served::is_ready() const {
    for (const valar::Responder* responder : responders)
        for (const valar::ModelInfo& model : responder->models())
            if (model.ready) return true;
    return false;
}

// Loads the model beside the server, which says how far that is; then it works. Where that fails the
// server stops.
class Loader {
public:
    Loader(Served& served, valar::Server& server) : thread_([&] { load(served, server); }) {}
    ~Loader() { join(); }
    /// Ends it, if it is not done; what went wrong.
    const valar::Result<void>& join() {
        cancelled_ = true;
        if (thread_.joinable()) thread_.join();
        return loaded_;
    }

private:
    void load(Served& served, valar::Server& server) {
        if (served.engine)
            loaded_ = example::load_engine(*served.engine, [&] { return !cancelled_; });
        if (loaded_ && !cancelled_) loaded_ = served.start();
        if (!loaded_) server.stop(true);
    }
    std::atomic<bool> cancelled_ = false;
    valar::Result<void> loaded_;
    std::thread thread_;
};

// A second signal does not wait for what runs; a third not even for the store.
void count_signal(int signal) {
    interrupted = interrupted + 1;
    if (interrupted > 2) std::_Exit(128 + signal);
}

// From before anybody is told that it serves.
void count_signals() {
    std::signal(SIGINT, count_signal);
    std::signal(SIGTERM, count_signal);
}

// Until a signal says stop; then what runs may finish.
int serve(valar::Server& server, const Served& served, Settings& settings) {
    example::ServiceManager manager;
    bool ready = false;
    for (int stops = 0;;) {
        if (hung_up) on_hangup(settings, server);
        settings.keys.look(server);
        auto more = server.step(manager.turn_ms(200));
        if (!more || !*more) return more ? 0 : 1;
        if (!ready && (ready = served.is_ready())) manager.tell("READY=1");
        manager.beat();
        if (interrupted == stops) continue;
        if (stops == 0) manager.tell("STOPPING=1");
        stops = interrupted;
        server.stop(stops > 1);
    }
}

}  // namespace

int main(int argc, char** argv) {
    example::Flags flags("server", "Serves a model over HTTP (the Valar Responses API).");
    hold_signals();
    Settings settings;  // with the log, which is to outlive all that writes into it
    Question question;
    add_engine_flags(flags, settings);
    add_server_flags(flags, settings);
    add_store_flags(flags, settings);
    add_question_flags(flags, question);
    flags.add("version", &settings.version, "prints it");
    std::string secret = example::take_secret(argc, argv, "--api-key");
    if (const auto exit_code = flags.parse(argc, argv)) return *exit_code;
    if (!secret.empty()) settings.key = secret;
    example::wipe(&secret);
    if (settings.version) return std::printf("valar %s\n", VALAR_VERSION), 0;

    if (flags.given("backup")) return back_up(flags, settings);

    valar::ServerOptions& options = settings.server;
    const bool asking = flags.given("ask");
    if (asking) settings.quiet = true;
    if (asking && !flags.given("port")) options.port = 0;
    if (auto opened = open_log(settings); !opened) return flags.fail(opened.error());
    if (auto completed = complete(flags, settings); !completed)
        return fail(flags, settings, completed.error());

    std::unique_ptr<valar::FileStore> store;
    if (flags.given("store")) {
        auto opened = valar::FileStore::open(settings.journal);
        if (!opened) {
            valar::Error error = opened.error();
            if (error.kind == valar::ErrorKind::bad_data)
                error.message += "; --recover keeps what is whole";
            if (error.param.empty()) error.param = "path";
            return fail(flags, settings, error);
        }
        store = std::move(*opened);
        options.store = store.get();
    }

    auto served = Served::open(settings);
    if (!served) return fail(flags, settings, served.error());
    auto server = valar::Server::open(served->responders, options);
    if (!server) return fail(flags, settings, server.error());
    if (!asking) count_signals();
    Loader loader(*served, *server);
    if (!asking)
        print_ready(options.host, server->port(), served->names, !options.keys.empty(),
                    options.log_json);
    const int status = asking ? serve_question(*server, question, served->names.front(), settings)
                              : serve(*server, *served, settings);
    if (auto& loaded = loader.join(); !loaded) return fail(flags, settings, loaded.error());
    return status;
}
