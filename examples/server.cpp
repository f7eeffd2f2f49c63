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

}  // namespace

int main(int argc, char** argv) {
    valar::EngineOptions model;
    valar::ServerOptions options;
    options.port = 8080;
    Question question;
    std::string key, keys, dialect = "valar";
    valar::FileStoreOptions journal;
    std::optional<std::string> folder;
    bool quiet = false;
    uint32_t sync_timeout_s = options.sync_timeout_ms / 1000;
    uint32_t retention_h = static_cast<uint32_t>(options.memory_store.retention_s / 3600);

    example::Flags flags("server", "Serves a model over HTTP (the Valar Responses API).");
    example::add_model_flags(flags, model);
    flags.add("alias", "ID", &model.aliases, "a further id that the model answers to (repeatable)");
    flags.add("port", "N", &options.port, "0: any free one (default: 8080; with --ask: 0)");
    flags.add("host", "ADDRESS", &options.host, "address to listen on (default: 127.0.0.1)");
    flags.add("api-key", "SECRET", &key, "16 characters or more; needed beyond loopback addresses");
    flags.add("store", "DIR", &folder, "keep responses there; default: in memory only");
    flags.add("recover", &journal.recover, "open a damaged store, say what is lost");
    flags.add("keys", "FILE", &keys, "lines of `id organisation sha256 [requests-per-minute]`");
    flags.add("dialect", "NAME", &dialect, "valar (default) or openai");
    flags.add("sync-timeout", "S", &sync_timeout_s, "then 504, the work goes on (default: 600)");
    flags.add("retention", "HOURS", &retention_h, "how long responses are kept (default: 48)");
    flags.add("log-json", &options.log_json, "log lines are JSON objects");
    flags.add("quiet", &quiet, "no log line for each request");
    flags.add("ask", "TEXT", &question.text, "post this to itself, print the response, end");
    flags.add("instructions", "TEXT", &question.instructions, "with --ask: the system message");
    flags.add("temperature", "T", &question.temperature, "with --ask: 0 (greedy) to 2");
    flags.add("top-p", "P", &question.top_p, "with --ask: 0 to 1");
    flags.add("seed", "N", &question.seed, "with --ask: same seed, same answer");
    flags.add("max-output-tokens", "N", &question.max_output_tokens, "with --ask: length at most");
    if (const auto exit_code = flags.parse(argc, argv)) return *exit_code;

    const bool asking = !question.text.empty();
    if (asking) options.port = 0;
    if (!keys.empty()) {
        auto read = valar::read_key_file(keys);
        if (!read) return example::fail(read.error().message);
        options.keys = std::move(*read);
    }
    if (!key.empty()) options.keys.push_back({"key", "default", key});
    if (!quiet && !asking) options.log.write = print_log;
    if (dialect != "valar" && dialect != "openai") return example::fail("--dialect: " + dialect);
    options.dialect = dialect == "openai" ? valar::Dialect::openai : valar::Dialect::valar;
    options.sync_timeout_ms = sync_timeout_s * 1000;
    options.memory_store.retention_s = journal.retention_s = int64_t{retention_h} * 3600;
    journal.log.write = print_log;  // quiet or not: what a damaged store lost is said once

    std::unique_ptr<valar::FileStore> store;
    if (journal.recover && !folder) return example::fail("--recover needs --store DIR");
    if (folder) {
        journal.path = *folder;
        auto opened = valar::FileStore::open(journal);
        if (!opened) {
            const bool damaged = opened.error().kind == valar::ErrorKind::bad_data;
            return example::fail("--store: " + opened.error().message +
                                 (damaged ? "; --recover keeps what is whole" : ""));
        }
        store = std::move(*opened);
        options.store = store.get();
    }

    model.log = options.log;
    auto engine = example::open_engine(model);
    if (!engine) return example::fail(engine.error().message);
    const auto id = engine->responder()->models().front().id;
    auto server = valar::Server::open(engine->responder(), options);
    if (!server) return example::fail(server.error().message);
    if (auto started = engine->start(); !started) return example::fail(started.error().message);

    if (asking) {
        int status = 1;
        std::thread client([&] {
            status = ask(question, id, server->port(), key);
            server->stop();
        });
        if (auto ran = server->run(); !ran)
            std::fprintf(stderr, "%s\n", ran.error().message.c_str());
        client.join();
        return status;
    }

    print_ready(options.host, server->port(), model.aliases.empty() ? id : model.aliases.front(),
                !options.keys.empty());
    std::signal(SIGINT, [](int) { interrupted = 1; });
    std::signal(SIGTERM, [](int) { interrupted = 1; });
    while (!interrupted)
        if (auto more = server->step(200); !more || !*more) break;
    server->stop();
    return server->run() ? 0 : 1;
}
