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

#include "serving.hpp"

#include <atomic>
#include <memory>
#include <set>
#include <thread>

namespace {

struct Model {
    valar::EngineOptions options;
    std::string template_file;
};

/// What the command line sets.
struct Settings : example::ServingSettings {
    Model model;                // the one whose flags are being read
    std::vector<Model> models;  // all, and first what stands before the first --model
    valar::EnginePoolOptions pool;
    example::Duration keep_loaded;
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
    flags.add("ask", "TEXT", &question.text,
              "post this to itself, print the response, end; without --port at any free one");
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

valar::Result<void> read_template(Model& model) {
    const std::string& file = model.template_file;
    std::error_code none;
    const bool name = file.find_first_of("./\\") == file.npos &&
                      !std::filesystem::exists(file, none);
    auto text = name ? valar::Result<std::string>(file) : example::read_text(file);
    if (!text) return example::wrong("chat_template", text.error().message);
    if (text->find_first_not_of(" \t\r\n") == text->npos)
        return example::wrong("chat_template", "'" + file + "' is empty");
    model.options.chat_template = std::move(*text);
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
                return example::wrong("aliases", "'" + alias + "' names two models");
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
                return example::wrong("model_id", "'" + info.id + "' is the name of two models");
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

}  // namespace

int main(int argc, char** argv) {
    example::Flags flags("server", "Serves a model over HTTP (the Valar Responses API).");
    example::hold_signals();
    Settings settings;  // with the log, which is to outlive all that writes into it
    Question question;
    add_engine_flags(flags, settings);
    example::add_server_flags(flags, settings);
    example::add_store_flags(flags, settings);
    add_question_flags(flags, question);
    flags.add("version", &settings.version, "prints it");
    std::string secret = example::take_secret(argc, argv, "--api-key");
    if (const auto exit_code = flags.parse(argc, argv)) return *exit_code;
    if (!secret.empty()) settings.key = secret;
    example::wipe(&secret);
    if (settings.version) return std::printf("valar %s\n", VALAR_VERSION), 0;

    if (flags.given("backup")) return example::back_up(flags, settings);

    valar::ServerOptions& options = settings.server;
    const bool asking = flags.given("ask");
    if (asking) settings.quiet = true;
    if (asking && !flags.given("port")) options.port = 0;
    if (auto opened = example::open_log(settings); !opened) return flags.fail(opened.error());
    settings.keep_key = asking;
    if (auto completed = example::complete_serving(flags, settings); !completed)
        return example::fail(flags, settings, completed.error());
    if (auto models = complete_models(settings); !models)
        return example::fail(flags, settings, models.error());

    auto store = example::open_store(flags, settings);
    if (!store) return example::fail(flags, settings, store.error());
    options.store = store->get();

    auto served = Served::open(settings);
    if (!served) return example::fail(flags, settings, served.error());
    auto server = valar::Server::open(served->responders, options);
    if (!server) return example::fail(flags, settings, server.error());
    if (!asking) example::count_signals();
    Loader loader(*served, *server);
    if (!asking)
        example::print_ready(options.host, server->port(), served->names, !options.keys.empty(),
                             options.log_json);
    const int status = asking
                           ? serve_question(*server, question, served->names.front(), settings)
                           : example::serve(*server, settings, [&] { return served->is_ready(); });
    if (auto& loaded = loader.join(); !loaded)
        return example::fail(flags, settings, loaded.error());
    return status;
}
