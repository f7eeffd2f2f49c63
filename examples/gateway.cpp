// Serves what other servers answer: any that speak OpenAI's Chat Completions, behind valar's surfaces,
// keys, store, batches and webhooks.
//
//     gateway --upstream http://10.0.0.5:8000 --upstream http://10.0.0.6:8000 --store DIR --port 8080
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#endif
#include "valar.hpp"

#include "serving.hpp"

namespace {

struct Settings : example::ServingSettings {
    valar::UpstreamOptions upstream;
};

void add_upstream_flags(example::Flags& flags, Settings& settings) {
    valar::UpstreamOptions& upstream = settings.upstream;
    flags.add("upstream", "URL", &upstream.urls,
              "a server that answers: http://10.0.0.5:8000, unix:/path (repeatable)", "urls");
    flags.add("upstream-key", "SECRET", &upstream.key,
              "the API key of all of them; VALAR_UPSTREAM_KEY in the environment does the same",
              "key");
    flags
        .add("upstream-running", "N", &upstream.max_running,
             "requests at one of them at once; what is beyond waits (default: 256)", "max_running")
        .within(1, UINT32_MAX);
    flags
        .add_in<1000>("upstream-refresh", "SECONDS", &upstream.refresh_ms,
                      "between two lists of its models (default: 10)", "refresh_ms")
        .within(1);
    flags
        .add_in<1000>("upstream-silence", "SECONDS", &upstream.silence_timeout_ms,
                      "without a byte of an answer it has failed (default: 300)",
                      "silence_timeout_ms")
        .within(1);
}

bool is_ready(const valar::Responder& responder) {
    for (const valar::ModelInfo& model : responder.models())
        if (model.ready) return true;
    return false;
}

}  // namespace

int main(int argc, char** argv) {
    example::Flags flags("gateway", "Serves what other servers answer (the Valar Responses API).");
    example::hold_signals();
    Settings settings;
    add_upstream_flags(flags, settings);
    example::add_server_flags(flags, settings);
    example::add_store_flags(flags, settings);
    flags.add("version", &settings.version, "prints it");
    std::string key = example::take_secret(argc, argv, "--api-key");
    std::string upstream_key = example::take_secret(argc, argv, "--upstream-key");
    if (const auto exit_code = flags.parse(argc, argv)) return *exit_code;
    if (!key.empty()) settings.key = key;
    if (!upstream_key.empty()) settings.upstream.key = upstream_key;
    else if (auto variable = example::take_environment("VALAR_UPSTREAM_KEY"))
        settings.upstream.key = *variable;
    example::wipe(&key);
    example::wipe(&upstream_key);
    if (settings.version) return std::printf("valar %s\n", VALAR_VERSION), 0;
    if (flags.given("backup")) return example::back_up(flags, settings);

    if (auto opened = example::open_log(settings); !opened) return flags.fail(opened.error());
    if (auto completed = example::complete_serving(flags, settings); !completed)
        return example::fail(flags, settings, completed.error());
    auto store = example::open_store(flags, settings);
    if (!store) return example::fail(flags, settings, store.error());
    settings.server.store = store->get();
    settings.upstream.max_queued = settings.server.max_queued;
    settings.upstream.log = settings.log.sink();

    auto upstream = valar::Upstream::open(settings.upstream);
    if (!upstream) return example::fail(flags, settings, upstream.error());
    valar::Responder* responder = upstream->responder();
    auto server = valar::Server::open(responder, settings.server);
    if (!server) return example::fail(flags, settings, server.error());
    example::count_signals();
    std::vector<std::string> names;
    for (const valar::ModelInfo& model : responder->models()) names.push_back(model.id);
    if (names.empty()) names.emplace_back("no model yet");
    example::print_ready(settings.server.host, server->port(), names, !settings.server.keys.empty(),
                         settings.server.log_json);
    return example::serve(*server, settings, [&] { return is_ready(*responder); });
}
