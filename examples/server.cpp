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

#include <csignal>
#include <memory>
#include <set>
#include <thread>

namespace {

volatile std::sig_atomic_t interrupted = 0;

struct Model {
    valar::EngineOptions options;
    std::string template_file;
};

/// What the command line sets.
struct Settings {
    Model model;                // the one whose flags are being read
    std::vector<Model> models;  // all, and first what stands before the first --model
    valar::EnginePoolOptions pool;
    example::Duration keep_loaded;
    valar::ServerOptions server;
    valar::FileStoreOptions journal;
    std::string key, key_file;
    uint64_t store_bytes = 0;
    bool quiet = false;
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
int ask(const Question& question, const std::string& model, uint16_t port, const std::string& key) {
    valar::HttpCall call;
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

void print_ready(const std::string& host, uint16_t port, const std::vector<std::string>& models,
                 bool key) {
    const std::string url = "http://" + host_in_url(host) + ":" + std::to_string(port);
    valar::Json body = valar::Json::object();
    body.set("model", models.front())
        .set("input", "Explain the key ideas behind transformer architectures.");
    std::printf("%s serves ", url.c_str());
    for (const std::string& model : models)
        std::printf("%s%s", &model == &models.front() ? "" : ", ", model.c_str());
    std::printf("\n");
    std::printf("curl %s/v1/responses %s--header 'Content-Type: application/json' --data '%s'\n",
                url.c_str(), key ? "--header \"Authorization: Bearer $KEY\" " : "",
                body.write(valar::json_python).c_str());
    std::fflush(stdout);
}

void print_log(void*, valar::LogLevel level, std::string_view line) {
    if (level == valar::LogLevel::debug) return;
    std::fprintf(stderr, "%.*s\n", static_cast<int>(line.size()), line.data());
}

void print_trouble(void* context, valar::LogLevel level, std::string_view line) {
    if (level >= valar::LogLevel::warning) print_log(context, level, line);
}

void add_server_flags(example::Flags& flags, Settings& settings) {
    valar::ServerOptions& server = settings.server;
    flags.add("port", "N", &server.port, "0: any free one (default: 8080; with --ask: 0)");
    flags.add("host", "ADDRESS", &server.host, "address to listen on (default: 127.0.0.1)");
    flags.add("api-key", "SECRET", &settings.key,
              "16 characters or more; needed beyond loopback addresses", "keys");
    flags.add("keys", "FILE", &settings.key_file,
              "lines of `id organisation sha256 [requests-per-minute]`");
    flags.add("allow-open", &server.allow_open, "without keys, too, listen beyond loopback");
    flags.add("allow-host", "NAME[:PORT]", &server.allowed_hosts,
              "without keys: a Host that is answered like localhost (repeatable)", "allowed_hosts");
    flags.add("cors-origin", "ORIGIN", &server.cors_origins,
              "web pages from there may call: https://example.org (repeatable)", "cors_origins");
    flags.add("dialect", "valar|openai", &server.dialect, "names and fields (default: valar)");
    flags.add_in<1000>("sync-timeout", "SECONDS", &server.sync_timeout_ms,
                       "then 504, the work goes on (default: 600)", "sync_timeout_ms");
    flags.add_in<1000>("drain-timeout", "SECONDS", &server.drain_timeout_ms,
                       "at the end, for what still runs (default: 10)", "drain_timeout_ms");
    flags.add("max-queued", "N", &server.max_queued,
              "requests accepted but not begun; then 503 (default: 1000)");
    flags.add("max-connections", "N", &server.max_connections,
              "an idle one makes room, else 503 (default: 10000)");
    flags.add("max-body-bytes", "BYTES", &server.max_body_bytes,
              "of one request: 500K, 32M; then 413 (default: 32M)");
    flags.add("max-inflight-body-bytes", "BYTES", &server.max_inflight_body_bytes,
              "of all requests that are being received; then 503 (default: 512M)");
    flags.add("log-json", &server.log_json, "log lines are JSON objects");
    flags.add("quiet", &settings.quiet, "only warnings and errors are logged");
}

void add_store_flags(example::Flags& flags, Settings& settings) {
    flags.add("store", "DIR", &settings.journal.path,
              "keep responses there (default: in memory only)", "path");
    flags.add("recover", &settings.journal.recover, "open a damaged store, say what is lost");
    flags.add_in<3600>("retention", "HOURS", &settings.journal.retention_s,
                       "how long finished responses are kept (default: 48)", "retention_s");
    flags.add("store-bytes", "BYTES", &settings.store_bytes,
              "then the oldest go early (default: 4G; in memory: 256M)", "max_bytes");
    flags.add("segment-bytes", "BYTES", &settings.journal.segment_bytes,
              "of one file of the store, about (default: 32M)");
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
    flags.add("temperature", "T", &question.temperature, "with --ask: 0 (greedy) to 2");
    flags.add("top-p", "P", &question.top_p, "with --ask: 0 to 1");
    flags.add("seed", "N", &question.seed, "with --ask: same seed, same answer");
    flags.add("max-output-tokens", "N", &question.max_output_tokens, "with --ask: length at most");
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

// All of them, with what they have in common. A limit of memory before the first is of all together.
valar::Result<void> complete_models(Settings& settings) {
    settings.server.log.write = settings.quiet ? print_trouble : print_log;
    settings.models.push_back(settings.model);
    settings.pool.memory_limit = settings.models.front().options.memory_limit;
    settings.pool.log = settings.server.log;
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
        options.log = settings.server.log;
        if (settings.is_pool() && options.memory_limit == settings.pool.memory_limit)
            options.memory_limit = 0;
    }
    return {};
}

// What follows from several flags, or from the files that they name.
valar::Result<void> complete(const example::Flags& flags, Settings& settings) {
    valar::ServerOptions& server = settings.server;
    if (flags.given("keys")) {
        auto read = valar::read_key_file(settings.key_file);
        if (!read) return wrong("keys", read.error().message);
        server.keys = std::move(*read);
    }
    if (flags.given("api-key")) server.keys.push_back({"key", "default", settings.key});
    server.require_keys = flags.given("keys") || flags.given("api-key");
    if (auto models = complete_models(settings); !models) return models;
    for (const char* needs_store : {"recover", "segment-bytes"})
        if (flags.given(needs_store) && !flags.given("store"))
            return wrong(needs_store, "needs --store DIR");
    server.memory_store.retention_s = settings.journal.retention_s;
    if (flags.given("store-bytes"))
        server.memory_store.max_bytes = settings.journal.max_bytes = settings.store_bytes;
    settings.journal.log.write = print_log;  // quiet or not: what a damaged store lost is said once
    return {};
}

// What answers: one engine, or a pool of several.
struct Served {
    std::optional<valar::Engine> engine;
    std::optional<valar::EnginePool> pool;
    std::vector<valar::Responder*> responders;
    std::vector<std::string> names;

    static valar::Result<Served> open(Settings& settings);
    valar::Result<void> start() { return pool ? pool->start() : engine->start(); }
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
        auto engine = example::open_engine(settings.models.front().options);
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
                   const std::string& key) {
    int status = 1;
    std::thread client([&] {
        status = ask(question, model, server.port(), key);
        server.stop();
    });
    if (auto ran = server.run(); !ran) std::fprintf(stderr, "%s\n", ran.error().message.c_str());
    client.join();
    return status;
}

// Until a signal says stop; then what runs may finish.
int serve(valar::Server& server) {
    std::signal(SIGINT, [](int) { interrupted = 1; });
    std::signal(SIGTERM, [](int) { interrupted = 1; });
    while (!interrupted)
        if (auto more = server.step(200); !more || !*more) break;
    server.stop();
    return server.run() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    example::Flags flags("server", "Serves a model over HTTP (the Valar Responses API).");
    Settings settings;
    Question question;
    add_engine_flags(flags, settings);
    add_server_flags(flags, settings);
    add_store_flags(flags, settings);
    add_question_flags(flags, question);
    if (const auto exit_code = flags.parse(argc, argv)) return *exit_code;

    valar::ServerOptions& options = settings.server;
    const bool asking = flags.given("ask");
    if (asking) options.port = 0, settings.quiet = true;
    if (auto completed = complete(flags, settings); !completed)
        return flags.fail(completed.error());

    std::unique_ptr<valar::FileStore> store;
    if (flags.given("store")) {
        auto opened = valar::FileStore::open(settings.journal);
        if (!opened) {
            valar::Error error = opened.error();
            if (error.kind == valar::ErrorKind::bad_data)
                error.message += "; --recover keeps what is whole";
            if (error.param.empty()) error.param = "path";
            return flags.fail(error);
        }
        store = std::move(*opened);
        options.store = store.get();
    }

    auto served = Served::open(settings);
    if (!served) return flags.fail(served.error());
    auto server = valar::Server::open(served->responders, options);
    if (!server) return flags.fail(server.error());
    if (auto started = served->start(); !started) return flags.fail(started.error());
    if (asking) return serve_question(*server, question, served->names.front(), settings.key);
    print_ready(options.host, server->port(), served->names, !options.keys.empty());
    return serve(*server);
}
