// Serves a model over HTTP: POST /v1/responses and the routes around it.
//
//     server --model model.gguf --alias my-model --port 8080
//     server --ask "What is the capital of France?" --temperature 0
//
// With --ask it starts, posts the request to itself, prints the response object and ends.
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#endif
#include "valar.hpp"

#include "common.hpp"

#include <csignal>
#include <thread>

namespace {

volatile std::sig_atomic_t interrupted = 0;

/// What the command line sets.
struct Settings {
    valar::EngineOptions model;
    valar::ServerOptions server;
    valar::FileStoreOptions journal;
    std::string key, key_file, template_file;
    uint64_t store_bytes = 0;
    bool quiet = false;
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

void print_ready(const std::string& host, uint16_t port, const std::string& model, bool key) {
    const std::string url = "http://" + host_in_url(host) + ":" + std::to_string(port);
    valar::Json body = valar::Json::object();
    body.set("model", model)
        .set("input", "Explain the key ideas behind transformer architectures.");
    std::printf("%s serves %s\n", url.c_str(), model.c_str());
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
    valar::EngineOptions& model = settings.model;
    example::add_model_flags(flags, model);
    flags.add("model-id", "ID", &model.model_id, "its name (default: as its file has it)");
    flags.add("alias", "ID", &model.aliases, "a further id that it answers to (repeatable)",
              "aliases");
    flags.add("chat-template", "FILE|NAME", &settings.template_file,
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
    if (flags.given("chat-template")) {
        std::error_code none;
        const std::string& file = settings.template_file;
        const bool name = file.find_first_of("./\\") == file.npos &&
                          !std::filesystem::exists(file, none);
        auto text = name ? valar::Result<std::string>(file) : example::read_text(file);
        if (!text) return wrong("chat_template", text.error().message);
        if (text->find_first_not_of(" \t\r\n") == text->npos)
            return wrong("chat_template", "'" + settings.template_file + "' is empty");
        settings.model.chat_template = std::move(*text);
    }
    for (const char* needs_store : {"recover", "segment-bytes"})
        if (flags.given(needs_store) && !flags.given("store"))
            return wrong(needs_store, "needs --store DIR");
    server.memory_store.retention_s = settings.journal.retention_s;
    if (flags.given("store-bytes"))
        server.memory_store.max_bytes = settings.journal.max_bytes = settings.store_bytes;
    settings.model.max_queued = server.max_queued;
    server.log.write = settings.quiet ? print_trouble : print_log;
    settings.model.log = server.log;
    settings.journal.log.write = print_log;  // quiet or not: what a damaged store lost is said once
    return {};
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

    auto engine = example::open_engine(settings.model);
    if (!engine) return flags.fail(engine.error());
    const auto id = engine->responder()->models().front().id;
    auto server = valar::Server::open(engine->responder(), options);
    if (!server) return flags.fail(server.error());
    if (auto started = engine->start(); !started) return flags.fail(started.error());
    if (asking) return serve_question(*server, question, id, settings.key);

    const auto& aliases = settings.model.aliases;
    print_ready(options.host, server->port(), aliases.empty() ? id : aliases.front(),
                !options.keys.empty());
    return serve(*server);
}
