#include "api/document.hpp"
#include "api/surface.hpp"
#include "api_internal.hpp"
#include "base/internal.hpp"

#include <doctest/doctest.h>

using namespace valar;
using namespace valar::detail;

namespace {

Json parse(std::string_view text) {
    auto json = Json::parse(text);
    REQUIRE_MESSAGE(json.ok(), std::string(text));
    return std::move(*json);
}

// {"model":"m","input":"x", <field>}
Result<Request> with(const std::string& field) {
    return parse_response_request(parse(R"({"model":"m","input":"x",)" + field + "}"));
}

struct Refusal {
    const char* body;
    const char* code;
    const char* param;
};

void check(const Refusal& refusal, const Result<Request>& result) {
    CAPTURE(std::string(refusal.body));
    REQUIRE_FALSE(result.ok());
    CHECK(result.error().kind == ErrorKind::invalid_request);
    CHECK(result.error().code == refusal.code);
    CHECK(result.error().param == refusal.param);
    CHECK_FALSE(result.error().message.empty());
}

}  // namespace

TEST_CASE("bodies that are refused, and the first fault is the one that is named") {
    const Refusal refusals[] = {
        {"[]", "invalid_type", ""},
        {"\"x\"", "invalid_type", ""},
        {"{}", "missing_required_parameter", "model"},
        {R"({"input":"x"})", "missing_required_parameter", "model"},
        {R"({"model":null,"input":"x"})", "missing_required_parameter", "model"},
        {R"({"model":"m"})", "missing_required_parameter", "input"},
        {R"({"temperature":9,"model":"m"})", "missing_required_parameter", "input"},
        {R"({"temperature":9,"model":3,"input":"x"})", "decimal_above_max_value", "temperature"},
        {R"({"model":3,"temperature":9,"input":"x"})", "invalid_type", "model"},
        {R"({"model":"","input":"x"})", "string_below_min_length", "model"},
        {R"({"model":"m","input":""})", "string_below_min_length", "input"},
        {R"({"model":"m","input":[]})", "array_below_min_length", "input"},
        {R"({"model":"m","input":7})", "invalid_type", "input"},
        {R"({"model":"m","input":{}})", "missing_required_parameter", "input.messages"},
        {R"({"model":"m","input":{"messages":3}})", "invalid_type", "input.messages"},
        {R"({"model":"m","input":{"messages":[]}})", "array_below_min_length", "input.messages"},
        {R"({"model":"m","input":{"messages":[{"role":"boss","content":"x"}]}})", "invalid_value",
         "input.messages[0].role"},
    };
    for (const Refusal& refusal : refusals)
        check(refusal, parse_response_request(parse(refusal.body)));
}

TEST_CASE("names of other surfaces and slips of the hand are refused, newer ones are not") {
    const Refusal refusals[] = {
        {R"({"model":"m","messages":[{"role":"user","content":"x"}]})", "unknown_parameter",
         "messages"},
        {R"({"model":"m","input":"x","max_tokens":5})", "unknown_parameter", "max_tokens"},
        {R"({"model":"m","input":"x","n":null})", "unknown_parameter", "n"},
        {R"({"model":"m","input":"x","temprature":1})", "unknown_parameter", "temprature"},
        {R"({"model":"m","input":"x","Temperature":1})", "unknown_parameter", "Temperature"},
        {R"({"modle":"m","input":"x"})", "unknown_parameter", "modle"},
    };
    for (const Refusal& refusal : refusals)
        check(refusal, parse_response_request(parse(refusal.body)));
    const auto near = parse_response_request(parse(R"({"model":"m","input":"x","temprature":1})"));
    CHECK(near.error().message.find("did you mean 'temperature'?") != std::string::npos);
    const auto other = parse_response_request(parse(R"({"model":"m","input":"x","max_tokens":1})"));
    CHECK(other.error().message.find("'max_output_tokens'") != std::string::npos);
    CHECK(with(R"("context_management":[],"client_metadata":{})").ok());
    std::string many;
    for (int i = 0; i < 200; ++i) many += "\"of_tomorrow_" + std::to_string(i) + "\":1,";
    CHECK(with(many + R"("temprature":1)").ok());  // nobody looks that far
}

TEST_CASE("fields that nothing reads are named, once each") {
    const auto ignored = [](const char* body, const Surface* surface = nullptr) {
        return ignored_fields(parse(body), surface, Dialect::openai);
    };
    CHECK(ignored(R"({"model":"m","input":"x","temperature":1,"metadata":{"a":"b"}})") == "");
    CHECK(ignored(R"({"model":"m","input":"x","later":{"deep":1},"never":null})") == "later");
    CHECK(ignored(R"({"model":"m","text":{"format":{"type":"text"},"verbosity":"low"},
        "input":[{"role":"user","content":[{"type":"input_text","text":"x","hue":1}],"mood":2},
                 {"role":"user","content":"y","mood":3},
                 {"type":"function_call","call_id":"c","name":"f","arguments":"{}","mood":4}],
        "tools":[{"type":"function","name":"f","parameters":{"type":"object","any":1},"rank":1}]})") ==
          "text.verbosity, input.content.hue, input.mood, tools.rank");
    CHECK(ignored(R"({"model":"m","input":"x","a\r\nSet-Cookie: b":1})").find('\n') ==
          std::string::npos);
    std::string many = R"({"model":"m","input":"x")";
    for (int i = 0; i < 100; ++i) many += ",\"of_tomorrow_" + std::to_string(i) + "\":1";
    const std::string names = ignored((many + "}").c_str());
    CHECK(names.size() <= 512);
    CHECK(names.size() > 450);
    CHECK(names.ends_with("_31"));
    const std::string messages = R"("messages":[{"role":"user","content":"x","hue":1}])";
    CHECK(ignored(("{\"model\":\"m\",\"stop\":\"y\"," + messages + "}").c_str(), &chat_surface) ==
          "messages.hue");
    CHECK(ignored(("{\"model\":\"m\",\"top\":1," + messages + "}").c_str(), &messages_surface) ==
          "top, messages.hue");
}

TEST_CASE("fields that are refused") {
    const std::string long_user(257, 'u'), long_value(8193, 'v');
    const std::string user = "\"user\":\"" + long_user + "\"";
    const std::string value = "\"metadata\":{\"k\":\"" + long_value + "\"}";
    const Refusal refusals[] = {
        {R"("instructions":3)", "invalid_type", "instructions"},
        {R"("max_output_tokens":0)", "integer_below_min_value", "max_output_tokens"},
        {R"("max_output_tokens":1.5)", "invalid_type", "max_output_tokens"},
        {R"("max_output_tokens":"3")", "invalid_type", "max_output_tokens"},
        {R"("temperature":-0.1)", "decimal_below_min_value", "temperature"},
        {R"("temperature":2.01)", "decimal_above_max_value", "temperature"},
        {R"("temperature":"hot")", "invalid_type", "temperature"},
        {R"("top_p":1.1)", "decimal_above_max_value", "top_p"},
        {R"("top_p":-1)", "decimal_below_min_value", "top_p"},
        {R"("seed":1.5)", "invalid_type", "seed"},
        {R"("seed":18446744073709551615)", "integer_above_max_value", "seed"},
        {R"("text":3)", "invalid_type", "text"},
        {R"("text":{"format":3})", "invalid_type", "text.format"},
        {R"("text":{"format":{}})", "missing_required_parameter", "text.format.type"},
        {R"("text":{"format":{"type":"json_object"}})", "unsupported_value", "text.format.type"},
        {R"("text":{"format":{"type":"xml"}})", "invalid_value", "text.format.type"},
        {R"("text":{"format":{"type":"json_schema"}})", "missing_required_parameter",
         "text.format.name"},
        {R"("text":{"format":{"type":"json_schema","name":"a b"}})", "invalid_value",
         "text.format.name"},
        {R"("text":{"format":{"type":"json_schema","name":"n","schema":[]}})", "invalid_type",
         "text.format.schema"},
        {R"("text":{"format":{"type":"json_schema","name":"n","strict":1}})", "invalid_type",
         "text.format.strict"},
        {R"("text":{"format":{"type":"regex"}})", "missing_required_parameter",
         "text.format.pattern"},
        {R"("text":{"format":{"type":"regex","pattern":""}})", "string_below_min_length",
         "text.format.pattern"},
        {R"("text":{"format":{"type":"choice","choices":[]}})", "array_below_min_length",
         "text.format.choices"},
        {R"("text":{"format":{"type":"choice","choices":["a",1]}})", "invalid_type",
         "text.format.choices[1]"},
        {R"("text":{"format":{"type":"grammar","syntax":"lark","definition":"x"}})",
         "unsupported_value", "text.format.syntax"},
        {R"("text":{"format":{"type":"grammar","syntax":"gbnf"}})", "missing_required_parameter",
         "text.format.definition"},
        {R"("reasoning":[])", "invalid_type", "reasoning"},
        {R"("reasoning":{"effort":"huge"})", "invalid_value", "reasoning.effort"},
        {R"("reasoning":{"summary":1})", "invalid_type", "reasoning.summary"},
        {R"("reasoning":{"generate_summary":"long"})", "invalid_value",
         "reasoning.generate_summary"},
        {R"("background":1)", "invalid_type", "background"},
        {R"("prompt_cache_key":1)", "invalid_type", "prompt_cache_key"},
        {R"("store":false)", "unsupported_value", "store"},
        {R"("store":"yes")", "invalid_type", "store"},
        {R"("stream":true)", "unsupported_value", "stream"},
        {R"("truncation":"auto")", "unsupported_value", "truncation"},
        {R"("service_tier":"flex")", "unsupported_value", "service_tier"},
        {user.c_str(), "string_above_max_length", "user"},
        {value.c_str(), "string_above_max_length", "metadata.k"},
        {R"("metadata":[])", "invalid_type", "metadata"},
        {R"("metadata":{"k":1})", "invalid_type", "metadata.k"},
        {R"("metadata":{"completion_window":"flex"})", "invalid_value",
         "metadata.completion_window"},
        {R"("metadata":{"completion_window":"soon"})", "invalid_value",
         "metadata.completion_window"},
        {R"("metadata":{"completion_webhook":1})", "invalid_type", "metadata.completion_webhook"},
        {R"("metadata":{"webhook_token":"a b"})", "invalid_value", "metadata.webhook_token"},
        {R"("tools":{})", "invalid_type", "tools"},
        {R"("tools":[3])", "invalid_type", "tools[0]"},
        {R"("tools":[{"name":"f"}])", "missing_required_parameter", "tools[0].type"},
        {R"("tools":[{"type":"function"}])", "missing_required_parameter", "tools[0].name"},
        {R"("tools":[{"type":"function","name":"a.b"}])", "invalid_value", "tools[0].name"},
        {R"("tools":[{"type":"function","name":"f","description":1}])", "invalid_type",
         "tools[0].description"},
        {R"("tools":[{"type":"function","name":"f","parameters":"x"}])", "invalid_type",
         "tools[0].parameters"},
        {R"("tools":[{"type":"function","name":"f","strict":"yes"}])", "invalid_type",
         "tools[0].strict"},
        {R"("tools":[{"type":"function","name":"f"},{"type":"custom","name":"f"}])",
         "invalid_value", "tools[1].name"},
        {R"("tools":[{"type":"web_search"}])", "unsupported_value", "tools[0].type"},
        {R"("tools":[{"type":"mcp"}])", "unsupported_value", "tools[0].type"},
        {R"("tools":[{"type":"spell"}])", "invalid_value", "tools[0].type"},
        {R"("tools":[{"type":"custom","name":"f","format":{"type":"json_schema"}}])",
         "invalid_value", "tools[0].format.type"},
        {R"("tools":[{"type":"custom","name":"f","format":{"type":"grammar","syntax":"x"}}])",
         "invalid_value", "tools[0].format.syntax"},
        {R"("tools":[{"type":"local_shell"}])", "unsupported_value", "tools[0].type"},
        {R"("tools":[{"type":"function","name":"f"},{"type":"namespace","name":"n","tools":[]}])",
         "unsupported_value", "tools[1].type"},
        {R"("tools":[{"type":"function","function":{"name":"f"}}])", "missing_required_parameter",
         "tools[0].name"},
        {R"("tools":[{"type":"custom","name":"f","format":{"type":"grammar","syntax":"lark",
            "definition":"start: A"}}])",
         "unsupported_value", "tools[0].format.syntax"},
        {R"("tools":[{"type":"custom","name":"f","format":{"type":"grammar","syntax":"gbnf"}}])",
         "missing_required_parameter", "tools[0].format.definition"},
        {R"("tool_choice":{"type":"web_search_preview"})", "unsupported_value", "tool_choice.type"},
        {R"("tool_choice":{"type":"auto"})", "invalid_value", "tool_choice.type"},
        {R"("tool_choice":{"type":"allowed_tools","mode":"none","tools":[]})", "invalid_value",
         "tool_choice.mode"},
        {R"("tool_choice":{"type":"allowed_tools","mode":"auto","tools":["f"]})", "invalid_type",
         "tool_choice.tools[0]"},
        {R"("tool_choice":{"type":"allowed_tools","mode":"auto","tools":[{"type":"mcp"}]})",
         "unsupported_value", "tool_choice.tools[0].type"},
        {R"("tools":[{"type":"function","name":"f"}],
            "tool_choice":{"type":"function","function":{"name":"f"}})",
         "missing_required_parameter", "tool_choice.name"},
        {R"("tool_choice":{"type":"function"})", "missing_required_parameter", "tool_choice.name"},
        {R"("tool_choice":{"type":"function","name":"g"})", "invalid_value", "tool_choice.name"},
        {R"("tools":[{"type":"function","name":"f"}],"tool_choice":{"type":"custom","name":"f"})",
         "invalid_value", "tool_choice.name"},
        {R"("tool_choice":{"type":"allowed_tools","tools":[]})", "missing_required_parameter",
         "tool_choice.mode"},
        {R"("tool_choice":{"type":"allowed_tools","mode":"auto","tools":[]})",
         "array_below_min_length", "tool_choice.tools"},
        {R"("tools":[{"type":"function","name":"f"}],"tool_choice":{"type":"allowed_tools",
            "mode":"auto","tools":[{"type":"function","name":"f"},{"type":"function","name":"g"}]})",
         "invalid_value", "tool_choice.tools[1].name"},
        {R"("max_tool_calls":0)", "integer_below_min_value", "max_tool_calls"},
        {R"("max_tool_calls":"2")", "invalid_type", "max_tool_calls"},
        {R"("top_k":-1)", "integer_below_min_value", "top_k"},
        {R"("min_p":1.5)", "decimal_above_max_value", "min_p"},
        {R"("presence_penalty":3)", "decimal_above_max_value", "presence_penalty"},
        {R"("repetition_penalty":0)", "decimal_below_min_value", "repetition_penalty"},
        {R"("stop":[""])", "invalid_value", "stop"},
        {R"("stop":{})", "invalid_type", "stop"},
        {R"("logit_bias":[])", "invalid_type", "logit_bias"},
        {R"("logit_bias":{"x":1})", "invalid_value", "logit_bias.x"},
        {R"("logit_bias":{"7":101})", "decimal_above_max_value", "logit_bias.7"},
        {R"("tool_choice":"maybe")", "invalid_value", "tool_choice"},
        {R"("tool_choice":3)", "invalid_type", "tool_choice"},
        {R"("tool_choice":"required")", "invalid_value", "tool_choice"},
        {R"("tool_choice":{"name":"f"})", "missing_required_parameter", "tool_choice.type"},
        {R"("parallel_tool_calls":"no")", "invalid_type", "parallel_tool_calls"},
        {R"("include":"x")", "invalid_type", "include"},
        {R"("include":["a",3])", "invalid_type", "include[1]"},
        {R"("include":["reasoning.encrypted_content"])", "unsupported_value", "include[0]"},
        {R"("top_logprobs":21)", "integer_above_max_value", "top_logprobs"},
        {R"("top_logprobs":-1)", "integer_below_min_value", "top_logprobs"},
        {R"("previous_response_id":"resp_x")", "unsupported_parameter", "previous_response_id"},
        {R"("conversation":"c")", "unsupported_parameter", "conversation"},
        {R"("prompt":{})", "unsupported_parameter", "prompt"},
    };
    for (const Refusal& refusal : refusals) check(refusal, with(refusal.body));
}

TEST_CASE("items that are refused") {
    const Refusal refusals[] = {
        {R"([3])", "invalid_type", "input[0]"},
        {R"([{"content":"x"}])", "missing_required_parameter", "input[0].role"},
        {R"([{"role":"user"}])", "missing_required_parameter", "input[0].content"},
        {R"([{"role":"user","content":3}])", "invalid_type", "input[0].content"},
        {R"([{"type":3}])", "invalid_type", "input[0].type"},
        {R"([{"type":"item_reference","id":"x"}])", "unsupported_value", "input[0].type"},
        {R"([{"type":"poem"}])", "invalid_value", "input[0].type"},
        {R"([{"role":"user","content":["x"]}])", "invalid_type", "input[0].content[0]"},
        {R"([{"role":"user","content":[{"text":"x"}]}])", "missing_required_parameter",
         "input[0].content[0].type"},
        {R"([{"role":"user","content":[{"type":"input_text"}]}])", "missing_required_parameter",
         "input[0].content[0].text"},
        {R"([{"role":"user","content":"a"},{"role":"user","content":[{"type":"input_text","text":"b"},
             {"type":"input_audio"}]}])",
         "unsupported_value", "input[1].content[1].type"},
        {R"([{"role":"user","content":[{"type":"input_file"}]}])", "unsupported_value",
         "input[0].content[0].type"},
        {R"([{"role":"user","content":[{"type":"input_image","image_url":"u"}]}])",
         "unsupported_parameter", "input[0].content[0].type"},
        {R"([{"role":"user","content":[{"type":"output_text","text":"x"}]}])", "invalid_value",
         "input[0].content[0].type"},
        {R"([{"type":"function_call","name":"f","arguments":"{}"}])", "missing_required_parameter",
         "input[0].call_id"},
        {R"([{"type":"function_call","call_id":"","name":"f","arguments":"{}"}])",
         "string_below_min_length", "input[0].call_id"},
        {R"([{"type":"function_call","call_id":"c","arguments":"{}"}])",
         "missing_required_parameter", "input[0].name"},
        {R"([{"type":"function_call","call_id":"c","name":"f","arguments":{}}])", "invalid_type",
         "input[0].arguments"},
        {R"([{"type":"custom_tool_call","call_id":"c","name":"f","arguments":"{}"}])",
         "missing_required_parameter", "input[0].input"},
        {R"([{"type":"function_call_output","output":"x"}])", "missing_required_parameter",
         "input[0].call_id"},
        {R"([{"type":"custom_tool_call_output","call_id":7,"output":"x"}])", "invalid_type",
         "input[0].call_id"},
        {R"([{"type":"function_call","call_id":"c","name":"f","arguments":"{}"},
             {"type":"function_call_output","call_id":"c"}])",
         "missing_required_parameter", "input[1].output"},
        {R"([{"type":"function_call","call_id":"c","name":"f","arguments":"{}"},
             {"type":"function_call_output","call_id":"c","output":{"a":1}}])",
         "invalid_type", "input[1].output"},
        {R"([{"type":"function_call","call_id":"c","name":"f","arguments":"{}"},
             {"type":"function_call_output","call_id":"c","output":[{"type":"input_file"}]}])",
         "unsupported_value", "input[1].output[0].type"},
        {R"([{"type":"reasoning","summary":[{"type":"summary_text"}]}])",
         "missing_required_parameter", "input[0].summary[0].text"},
        {R"([{"type":"reasoning","content":7}])", "invalid_type", "input[0].content"},
        {R"([{"type":"function_call_output","call_id":"c","output":"x"}])", "invalid_value",
         "input[0].call_id"},
        {R"([{"type":"function_call_output","call_id":"c","output":"x"},
             {"type":"function_call","call_id":"c","name":"f","arguments":"{}"}])",
         "invalid_value", "input[0].call_id"},
    };
    for (const Refusal& refusal : refusals)
        check(refusal, parse_response_request(
                           parse(std::string(R"({"model":"m","input":)") + refusal.body + "}")));
    const auto unknown_call = parse_response_request(parse(
        R"({"model":"m","input":[{"type":"custom_tool_call_output","call_id":"call_9","output":"x"}]})"));
    CHECK(unknown_call.error().message.find("call_9") != std::string::npos);
}

TEST_CASE("a refusal says what was wrong, what was received and what is allowed") {
    const auto error = with(R"("temperature":9)").error();
    CHECK(error.message == "'temperature' must be at most 2, but 9 was received");
    CHECK(with(R"("truncation":"auto")").error().message ==
          "'truncation' must be \"disabled\", but \"auto\" was received");
    CHECK(
        with(R"("tools":[{"type":"web_search"}])").error().message ==
        "'tools[0].type' must be one of \"function\", \"custom\", but \"web_search\" was received");
    for (const auto& [field, message] :
         {std::pair(R"("conversation":"c")",
                    "'conversation' is not supported in this dialect: start the server with "
                    "--dialect openai (in C++ ServerOptions::dialect), or send its items in "
                    "'input'"),
          std::pair(R"("stream":true)",
                    "'stream': true is not supported in this dialect: start the server with "
                    "--dialect openai (in C++ ServerOptions::dialect), or ask with 'background': "
                    "true and poll GET /v1/responses/{id}; POST /v1/chat/completions streams in "
                    "both"),
          std::pair(R"("text":{"format":{"type":"json_object"}})",
                    "'text.format.type': \"json_object\" is not supported: send \"json_schema\" "
                    "with the schema {\"type\": \"object\"}"),
          std::pair(R"("include":["file_search_call.results"])",
                    "'include[0]': \"file_search_call.results\" is not supported")})
        CHECK(with(field).error().message == message);
    const auto image = parse_response_request(
        parse(R"({"model":"m","input":[{"role":"user","content":[{"type":"input_image"}]}]})"));
    CHECK(image.error().message == "'input[0].content[0].type': \"input_image\" is not supported");
}

TEST_CASE("a full request is read") {
    auto request = parse_response_request(
        parse(R"({"unknown":{"a":1},"model":"m","instructions":"Be brief.",
        "input":[{"role":"developer","content":"d"},{"type":"message","role":"user","phase":"x","id":"msg_1",
        "content":[{"type":"input_text","text":"a"},{"type":"input_text","text":"b"}]},
        {"id":"msg_2","type":"message","role":"assistant","status":"completed",
         "content":[{"type":"output_text","text":"c","annotations":[]}]},
        {"type":"reasoning","id":"rs_1","summary":[{"type":"summary_text","text":"t"}]},
        {"type":"function_call","id":"fc_1","call_id":"c1","name":"f","arguments":"{}","status":"completed"},
        {"type":"function_call_output","call_id":"c1","output":[{"type":"input_text","text":"42"}]}],
        "max_output_tokens":9007199254740993,"temperature":0,"top_p":0.5,"seed":-7,"top_logprobs":3,
        "include":["message.output_text.logprobs","whatever"],"user":null,"tools":[],"tool_choice":"none",
        "text":{"format":{"type":"text"},"verbosity":"low"},"reasoning":{"effort":"low","other":1},
        "metadata":{"a":"b","completion_window":"standard"},"store":true,"stream":false})"));
    REQUIRE(request.ok());
    CHECK(request->instructions == "Be brief.");
    REQUIRE(request->input.items.size() == 6);
    CHECK(request->input.items[0].role == Role::developer);
    CHECK(request->input.items[1].text() == "ab");
    CHECK(request->input.items[2].content[0].kind == ContentPart::Kind::output_text);
    CHECK(request->input.items[3].kind == Item::Kind::reasoning);
    CHECK(request->input.items[4].arguments == "{}");
    CHECK(request->input.items[5].text() == "42");
    CHECK(*request->max_output_tokens == UINT32_MAX);
    CHECK(*request->temperature == 0);
    CHECK(*request->seed == -7);
    CHECK(request->logprobs);
    CHECK(request->top_logprobs == 3);
    CHECK(request->metadata.size() == 2);
}

TEST_CASE("what an answer must be is read, and is the same after it was written") {
    auto request = parse_response_request(parse(R"({"model":"m","input":[
        {"role":"user","content":"a"},
        {"type":"reasoning","id":"rs_1","summary":[],"content":[{"type":"reasoning_text","text":"t"}]},
        {"type":"message","role":"assistant","content":[{"type":"output_text","text":"o"},
         {"type":"refusal","refusal":"r"}]},
        {"type":"function_call","id":"fc_1","call_id":"c1","name":"f","arguments":"{}"},
        {"type":"custom_tool_call","call_id":"c2","name":"g","input":"x = 1"},
        {"type":"function_call_output","call_id":"c1","output":"1"},
        {"type":"custom_tool_call_output","call_id":"c2","output":[{"type":"input_text","text":"2"}]}],
        "text":{"format":{"type":"json_schema","name":"n","description":"d","strict":true,
                          "schema":{"type":"object"}}},
        "tools":[{"type":"function","name":"f","description":"F","parameters":{"type":"object"}},
                 {"type":"function","name":"h","parameters":null,"strict":true},
                 {"type":"custom","name":"g","format":{"type":"grammar","syntax":"regex","definition":"a+"}}],
        "tool_choice":{"type":"allowed_tools","mode":"required","tools":[{"type":"custom","name":"g"}]},
        "parallel_tool_calls":false,"max_tool_calls":3,"reasoning":{"effort":"high","summary":"auto"},
        "stop":"END","top_k":40,"min_p":0.1,"presence_penalty":0.5,"frequency_penalty":-1,
        "repetition_penalty":1.1,"logit_bias":{"7":-2.5},"seed":9,"temperature":0.25,"user":"u",
        "include":["message.output_text.logprobs"],"top_logprobs":2,"background":true,
        "metadata":{"completion_window":"flex","k":"v"}})"));
    REQUIRE_MESSAGE(request.ok(), request.error().message);
    CHECK(request->format.schema.write() == R"({"type":"object"})");
    CHECK(request->format.strict);
    CHECK(request->format.name == "n");
    REQUIRE(request->tools.size() == 3);
    CHECK(request->tools[0].parameters["type"].as_string() == "object");
    CHECK_FALSE(request->tools[0].strict);
    CHECK(request->tools[1].strict);
    CHECK(request->tools[2].custom);
    CHECK(request->tools[2].format.regex == "a+");
    CHECK(request->tool_choice.mode == ToolChoice::Mode::required);
    CHECK(request->tool_choice.names == std::vector<std::string>{"g"});
    CHECK_FALSE(request->parallel_tool_calls);
    CHECK(*request->max_tool_calls == 3);
    CHECK(*request->effort == Effort::high);
    CHECK(request->stop == std::vector<std::string>{"END"});
    CHECK(*request->top_k == 40);
    CHECK(request->logit_bias[0] == std::pair<int32_t, double>(7, -2.5));
    CHECK(request->window == Window::flex);
    CHECK(request->input.items[1].text() == "t");
    CHECK(request->input.items[2].content[1].kind == ContentPart::Kind::refusal);
    CHECK(request->input.items[4].arguments == "x = 1");
    CHECK(check_request(*request).ok());

    const Json written = request_json(*request);
    auto again = parse_response_request(written);
    REQUIRE_MESSAGE(again.ok(), again.error().message);
    CHECK(request_json(*again) == written);
    for (size_t i = 0; i < request->input.items.size(); ++i) {
        CHECK(again->input.items[i].kind == request->input.items[i].kind);
        CHECK(again->input.items[i].text() == request->input.items[i].text());
        CHECK(again->input.items[i].arguments == request->input.items[i].arguments);
    }
    CHECK(request_json(Request()).write() == "{}");

    const char* const formats[] = {
        R"({"type":"regex","pattern":"a|b"})", R"({"type":"choice","choices":["yes","no",""]})",
        R"({"type":"grammar","syntax":"gbnf","definition":"root ::= \"a\""})",
        R"({"type":"json_schema","name":"any"})"};
    for (const char* format : formats) {
        auto read = with(R"("text":{"format":)" + std::string(format) + "}");
        REQUIRE(read.ok());
        CHECK_FALSE(read->format.empty());
        auto back = parse_response_request(request_json(*read));
        REQUIRE(back.ok());
        CHECK(back->format.schema == read->format.schema);
        CHECK(back->format.regex == read->format.regex);
        CHECK(back->format.one_of == read->format.one_of);
        CHECK(back->format.gbnf == read->format.gbnf);
    }
    CHECK(with(R"("text":{"format":{"type":"text"}})")->format.empty());
}

TEST_CASE("the forms of tool_choice") {
    const auto chosen = [](const std::string& choice) {
        auto request = with(
            R"("tools":[{"type":"function","name":"f"},{"type":"custom","name":"g"}],
            "tool_choice":)" +
            choice);
        REQUIRE_MESSAGE(request.ok(), request.error().message);
        std::string shown = std::to_string(static_cast<int>(request->tool_choice.mode));
        for (const std::string& name : request->tool_choice.names) shown += " " + name;
        auto again = parse_response_request(request_json(*request));
        REQUIRE(again.ok());
        CHECK(again->tool_choice.mode == request->tool_choice.mode);
        CHECK(again->tool_choice.names == request->tool_choice.names);
        CHECK(again->parallel_tool_calls == request->parallel_tool_calls);
        return shown + (request->parallel_tool_calls ? "" : ", one call");
    };
    CHECK(chosen("null") == "0");
    CHECK(chosen(R"("auto")") == "0");
    CHECK(chosen(R"("none")") == "1");
    CHECK(chosen(R"("required")") == "2");
    CHECK(chosen(R"("required","parallel_tool_calls":false)") == "2, one call");
    CHECK(chosen(R"({"type":"function","name":"f"})") == "2 f, one call");
    CHECK(chosen(R"({"type":"custom","name":"g"},"parallel_tool_calls":true)") == "2 g, one call");
    CHECK(chosen(R"({"type":"allowed_tools","mode":"auto","tools":[{"type":"function","name":"f"},
                    {"type":"custom","name":"g"}]})") == "0 f g");
    CHECK(
        chosen(
            R"({"type":"allowed_tools","mode":"required","tools":[{"type":"custom","name":"g"}]})") ==
        "2 g");
}

TEST_CASE("rules that a C++ caller's request must keep too") {
    const auto code = [](auto change) {
        Request request;
        request.input = "x";
        change(request);
        const auto checked = check_request(request);
        return checked ? std::string("fine") : checked.error().param;
    };
    CHECK(code([](Request&) {}) == "fine");
    CHECK(code([](Request& r) { r.format = {.regex = "a", .gbnf = "b"}; }) == "text.format");
    CHECK(code([](Request& r) { r.tools = {{.name = "a b"}}; }) == "tools[0].name");
    CHECK(code([](Request& r) { r.tools = {{.name = "a"}, {.name = "a"}}; }) == "tools[1].name");
    CHECK(code([](Request& r) { r.tools = {{.name = "a", .parameters = 3}}; }) ==
          "tools[0].parameters");
    CHECK(code([](Request& r) {
              r.tools = {{.name = "a", .custom = true, .format = {.regex = "x"}}};
          }) == "fine");
    for (const Format& format : {Format{.schema = Json::object()}, Format{.one_of = {"x"}},
                                 Format{.regex = "x", .gbnf = "y"}})
        CHECK(code([&](Request& r) {
                  r.tools = {{.name = "a", .custom = true, .format = format}};
              }) == "tools[0].format");
    CHECK(code([](Request& r) { r.tools = {{.name = "a", .format = {.regex = "x"}}}; }) ==
          "tools[0].format");
    CHECK(code([](Request& r) { r.tool_choice.names = {"a"}; }) == "tool_choice");
    CHECK(code([](Request& r) { r.tool_choice.mode = ToolChoice::Mode::required; }) ==
          "tool_choice");
    CHECK(code([](Request& r) { r.max_tool_calls = 0; }) == "max_tool_calls");
    CHECK(code([](Request& r) {
              r.input = std::vector<Item>{Item::output({.call_id = "c"}, "result")};
          }) == "input[0].call_id");
}

TEST_CASE("lengths count code points") {
    std::string emoji;
    for (int i = 0; i < 256; ++i) emoji += "\xf0\x9f\x98\x80";
    CHECK(with("\"user\":\"" + emoji + "\"").ok());
    CHECK_FALSE(with("\"user\":\"" + emoji + "e\"").ok());
}

namespace {

ResponseRecord sample() {
    ResponseRecord record;
    record.id = "resp_a";
    record.message_id = "msg_a";
    record.created_at = 5;
    record.model = "m";
    record.request = parse(R"({"model":"m","input":"x","metadata":{"webhook_token":"secret"}})");
    return record;
}

}  // namespace

TEST_CASE("the response object has all keys in their order") {
    // clang-format off
    const char* keys[] = {"id", "object", "created_at", "completed_at", "status", "background", "model",
                          "input", "instructions", "output", "error", "incomplete_details",
                          "max_output_tokens", "max_tool_calls", "reasoning", "text", "store",
                          "temperature", "top_p", "presence_penalty", "frequency_penalty",
                          "top_logprobs", "parallel_tool_calls", "tool_choice", "tools", "truncation",
                          "service_tier", "previous_response_id", "prompt_cache_key",
                          "safety_identifier", "user", "metadata", "usage"};
    // clang-format on
    ResponseRecord record = sample();
    Json object = render_response(record);
    REQUIRE(object.size() == std::size(keys));
    for (size_t i = 0; i < std::size(keys); ++i) CHECK(object.members()[i].key == keys[i]);
    CHECK(object["status"].as_string() == "pending");
    CHECK(object["completed_at"].is_null());
    CHECK(object["output"].size() == 0);
    CHECK(object["metadata"]["webhook_token"].as_string() == "***");
    CHECK(object["text"].write() == R"({"format":{"type":"text"}})");
    CHECK(object["reasoning"].write() == R"({"effort":null,"summary":null})");
    CHECK(object["usage"]["total_tokens"].as_int() == 0);

    record.status = Status::completed;
    record.completed_at = 6;
    Outcome outcome;
    outcome.text = "hi";
    outcome.cut = true;
    outcome.usage = {3, 1, 2, 0};
    outcome.logprobs = {{"h\xff", -0.5f, {{"i", -1.0f}}}};
    record.outcome = std::make_shared<Outcome>(outcome);
    object = render_response(record);
    CHECK(object["status"].as_string() == "completed");
    CHECK(object["incomplete_details"].write() == R"({"reason":"max_output_tokens"})");
    CHECK(
        object["output"].write() ==
        R"([{"id":"msg_a","type":"message","role":"assistant","status":"completed","content":[{)"
        R"("type":"output_text","text":"hi","annotations":[],"logprobs":[{"token":"h)"
        "\xef\xbf\xbd"
        R"(","logprob":-0.5,"bytes":[104,255],"top_logprobs":[{"token":"i","logprob":-1.0,"bytes":[105]}]}]}]}])");
    CHECK(object["usage"].write() ==
          R"({"input_tokens":3,"input_tokens_details":{"cached_tokens":1,"reasoning_tokens":0},)"
          R"("output_tokens":2,"output_tokens_details":{"cached_tokens":0,"reasoning_tokens":0},)"
          R"("total_tokens":5,"prompt_tokens":3,"completion_tokens":2})");
    CHECK(render_response(record, Dialect::openai)["status"].as_string() == "incomplete");

    record.status = Status::failed;
    outcome = {};
    outcome.error = Error{ErrorKind::internal, "layer 3 at /secret/path", "", ""};
    record.outcome = std::make_shared<Outcome>(outcome);
    object = render_response(record);
    CHECK(object["status"].as_string() == "failed");
    CHECK(object["error"].write() ==
          R"({"code":"internal_error","message":"the model could not be run"})");
    CHECK(object["output"].size() == 0);
}

TEST_CASE("the response object shows items, tools and formats") {
    ResponseRecord record = sample();
    record.request = parse(R"({"model":"m","input":"x","max_tool_calls":2,"presence_penalty":0.5,
        "text":{"format":{"type":"json_schema","name":"n","schema":{}}},
        "tools":[{"type":"function","name":"f"},{"type":"custom","name":"g"}],
        "tool_choice":"required","parallel_tool_calls":false,"reasoning":{"effort":"low"}})");
    Json object = render_response(record);
    CHECK(object["tools"].write() ==
          R"([{"type":"function","name":"f","description":null,"parameters":null,"strict":null},)"
          R"({"type":"custom","name":"g","description":null,"format":{"type":"text"}}])");
    CHECK(
        object["text"].write() ==
        R"({"format":{"type":"json_schema","name":"n","schema":{},"description":null,"strict":false}})");
    CHECK(object["tool_choice"].as_string() == "required");
    CHECK_FALSE(object["parallel_tool_calls"].as_bool(true));
    CHECK(object["max_tool_calls"].as_int() == 2);
    CHECK(object["presence_penalty"].as_double() == 0.5);
    CHECK(object["reasoning"].write() == R"({"effort":"low","summary":null})");

    Outcome outcome;
    Item thought, call, custom;
    thought.kind = Item::Kind::reasoning;
    thought.role = Role::assistant;
    thought.content = {{ContentPart::Kind::output_text, "hm"}};
    call.kind = Item::Kind::function_call;
    call.call_id = "call_1";
    call.name = "f";
    call.arguments = "{}";
    custom = call;
    custom.kind = Item::Kind::custom_tool_call;
    custom.call_id = "call_2";
    custom.arguments = "text";
    outcome.items = {thought, Item::message(Role::assistant, "said"), call, custom};
    outcome.logprobs = {{"hm", -1, {}, 0}, {"said", -2, {}, 1}};
    outcome.text = "said";
    record.status = Status::completed;
    record.outcome = std::make_shared<Outcome>(outcome);
    object = render_response(record);
    const Json& output = object["output"];
    REQUIRE(output.size() == 4);
    CHECK(output[0]["id"].as_string().starts_with("rs_"));
    CHECK(output[0]["summary"].write() == "[]");
    CHECK(output[0]["content"].write() == R"([{"type":"reasoning_text","text":"hm"}])");
    CHECK(output[1]["id"].as_string() == "msg_a");
    CHECK(output[1]["content"][0]["logprobs"].size() == 1);
    CHECK(output[1]["content"][0]["logprobs"][0]["token"].as_string() == "said");
    CHECK(output[2]["id"].as_string().starts_with("fc_"));
    CHECK(output[2]["id"].as_string() == output_item_id(record.id, Item::Kind::function_call, 2));
    CHECK(output[2]["call_id"].as_string() == "call_1");
    CHECK(output[2]["arguments"].as_string() == "{}");
    CHECK(output[3]["id"].as_string().starts_with("ctc_"));
    CHECK(output[3]["input"].as_string() == "text");
    for (size_t i = 0; i < 3; ++i) CHECK(output[i]["status"].as_string() == "completed");
    CHECK_FALSE(output[3].contains("status"));
    CHECK(render_response(record) == object);  // ids are drawn once
    // All of it is input again.
    Json items = output;
    items.push(parse(R"({"type":"function_call_output","call_id":"call_1","output":"1"})"));
    items.push(parse(R"({"type":"custom_tool_call_output","call_id":"call_2","output":"2"})"));
    auto again = parse_response_request(
        Json::object().set("model", "m").set("input", std::move(items)));
    REQUIRE_MESSAGE(again.ok(), again.error().message);
    CHECK(again->input.items.size() == 6);
    CHECK(again->input.items[0].text() == "hm");

    outcome.cut = true;  // within a call: there is no item of it, nor an empty message
    outcome.items.clear();
    outcome.text.clear();
    record.outcome = std::make_shared<Outcome>(outcome);
    object = render_response(record);
    CHECK(object["output"].empty());
    CHECK(object["incomplete_details"]["reason"].as_string() == "max_output_tokens");
}

TEST_CASE("errors: envelope, status, and nothing of ours leaks") {
    CHECK(
        render_error({ErrorKind::not_found, "no model 'x'", "model_not_found", "model"}).write() ==
        R"({"error":{"message":"no model 'x'","type":"not_found_error","param":"model","code":"model_not_found"}})");
    CHECK(
        render_error({ErrorKind::io, "/home/me/file: denied", "", ""}).write() ==
        R"({"error":{"message":"something went wrong on the server","type":"api_error","param":null,"code":"internal_error"}})");
    CHECK(http_status({ErrorKind::authentication, ""}) == 401);
    CHECK(http_status({ErrorKind::overloaded, ""}) == 503);
    CHECK(http_status({ErrorKind::timeout, ""}) == 504);
    CHECK(http_status({ErrorKind::bad_data, ""}) == 500);
    CHECK(http_status({ErrorKind::invalid_request, ""}) == 400);
    CHECK(http_status({ErrorKind::conflict, ""}) == 400);
    CHECK(http_status({ErrorKind::invalid_request, "", "method_not_allowed"}) == 405);
    CHECK(http_status({ErrorKind::invalid_request, "", "unsupported_media_type"}) == 415);
}

TEST_CASE("event writers: tokens that come before their item, or with another's text") {
    using Kind = Event::Kind;
    const auto token = [](const char* bytes, uint32_t item) {
        return TokenLogprob{bytes, -1, {}, item};
    };
    Item thought = Item::message(Role::assistant, "hm");
    thought.kind = Item::Kind::reasoning;
    const Item message = Item::message(Role::assistant, "a b");
    Outcome outcome;
    outcome.items = {thought, message};
    outcome.logprobs = {token("<think>", 0), token("hm", 0), token("</think>", 1), token("a", 1),
                        token(" b", 1)};
    const auto begun = [](Item item, uint32_t index) {
        item.content.clear();
        return Event{Kind::item_begun, {}, nullptr, {}, index, item};
    };
    const Event events[] = {
        {Kind::started, {}, nullptr, {}, 0, {}},
        {Kind::text_delta, "", nullptr, {outcome.logprobs[0]}, 0, {}},
        begun(thought, 0),
        {Kind::reasoning_delta, "hm", nullptr, {outcome.logprobs[1], outcome.logprobs[2]}, 0, {}},
        {Kind::item_ended, {}, nullptr, {}, 0, thought},
        begun(message, 1),
        {Kind::text_delta, "a", nullptr, {outcome.logprobs[3]}, 1, {}},
        {Kind::text_delta, " b", nullptr, {outcome.logprobs[4]}, 1, {}},
        {Kind::item_ended, {}, nullptr, {}, 1, message},
    };
    ResponseRecord record;
    record.id = "resp_1";
    record.message_id = "msg_1";
    const auto written = [&](const Surface* surface) {
        const auto writer = event_writer({.surface = surface, .stream = true}, record,
                                         Dialect::openai);
        writer->begin(Json::object());
        for (const Event& event : events) writer->add(event);
        writer->end(outcome, "{}");
        return writer->take();
    };
    const auto count = [](const std::string& text, const std::string& what) {
        size_t found = 0;
        for (size_t at = 0; (at = text.find(what, at)) != text.npos; at += what.size()) ++found;
        return found;
    };
    const std::string stream = written(nullptr);
    CHECK(count(stream, "event: response.output_item.added") == 2);
    CHECK(count(stream, "event: response.output_item.done") == 2);
    CHECK(count(stream, "event: response.output_text.delta") == 2);
    CHECK(count(stream, R"("token":"<think>")") == 0);
    for (const char* own : {"</think>", "a", " b"})  // in a delta, and in three events at the end
        CHECK(count(stream, "\"token\":\"" + std::string(own) + "\"") == 4);
    const std::string chunks = written(&chat_surface);
    CHECK(count(chunks, R"("token":"<think>")") == 0);
    for (const char* own : {"</think>", "a", " b"})
        CHECK(count(chunks, "\"token\":\"" + std::string(own) + "\"") == 1);
}

TEST_CASE("event writers: a failure ends a stream in the surface's own way") {
    ResponseRecord record;
    record.id = "resp_1";
    const auto failed = [&](const Surface* surface) {
        const auto writer = event_writer({.surface = surface, .stream = true}, record,
                                         Dialect::openai);
        writer->begin(Json::object().set("id", "resp_1"));
        writer->take();
        writer->fail(make_error(ErrorKind::internal, "a path", "internal_error"));
        return writer->take();
    };
    const std::string events = failed(nullptr);
    CHECK(events.find("event: response.failed") < events.find("event: error"));
    CHECK(events.find(R"("status":"failed")") != events.npos);
    CHECK(events.find("a path") == events.npos);
    CHECK(failed(&chat_surface).find("data: {\"error\":{") == 0);
    CHECK(failed(&messages_surface).find("event: error\ndata: {\"type\":\"error\",\"error\":{") ==
          0);
}

TEST_CASE(
    "event writers: messages: thoughts are signed, what says nothing is no block, a cut call "
    "ends") {
    using Kind = Event::Kind;
    Item thought = Item::message(Role::assistant, "hm m");
    thought.kind = Item::Kind::reasoning;
    Item call;
    call.kind = Item::Kind::function_call;
    call.call_id = "call_1";
    call.name = "f";
    const auto delta = [](Kind kind, const char* text, uint32_t index) {
        return Event{kind, text, nullptr, {}, index, {}};
    };
    const auto begun = [](Item item, uint32_t index) {
        item.content.clear();
        return Event{Kind::item_begun, {}, nullptr, {}, index, item};
    };
    ResponseRecord record;
    record.id = "resp_1";
    record.model = "m";
    record.input_tokens = 9;
    const auto writer = event_writer({.surface = &messages_surface, .stream = true}, record,
                                     Dialect::openai);
    writer->begin(Json());
    for (const Event& event :
         {begun(thought, 0), delta(Kind::reasoning_delta, "hm", 0),
          delta(Kind::reasoning_delta, " m", 0),
          Event{Kind::item_ended, {}, nullptr, {}, 0, thought},
          begun(Item::message(Role::assistant, {}), 1), delta(Kind::text_delta, "", 1),
          begun(call, 2), delta(Kind::arguments_delta, R"({"a)", 2)})
        writer->add(event);
    Outcome outcome;
    outcome.items = {thought, Item::message(Role::assistant, {})};
    outcome.cut = true;
    outcome.usage = {9, 4, 7, 2};
    writer->end(outcome, "{}");
    const std::string stream = writer->take();
    std::string seen;  // the data of each
    for (size_t at = 0; (at = stream.find("data: ", at)) != stream.npos;) {
        const size_t end = stream.find('\n', at);
        seen.append(stream, at + 6, end - at - 5);
        at = end;
    }
    const std::string id = derive_id("msg_", "resp_1");
    const std::string signature = base64_encode(sha256("hm m").view());
    CHECK(
        seen ==
        R"({"type":"message_start","message":{"id":")" + id +
            R"(","type":"message","role":"assistant","model":"m","content":[],)"
            R"("stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":9,)"
            R"("cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":0,)"
            R"("output_tokens_details":{"thinking_tokens":0}}}}
{"type":"ping"}
{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}
{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"hm"}}
{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":" m"}}
{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":")" +
            signature +
            R"("}}
{"type":"content_block_stop","index":0}
{"type":"content_block_start","index":1,"content_block":{"type":"tool_use","id":"call_1","name":"f","input":{}}}
{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"{\"a"}}
{"type":"content_block_stop","index":1}
{"type":"message_delta","delta":{"stop_reason":"max_tokens","stop_sequence":null},"usage":)"
            R"({"input_tokens":5,"cache_creation_input_tokens":0,)"
            R"("cache_read_input_tokens":4,"output_tokens":7,"output_tokens_details":{"thinking_tokens":2}}}
{"type":"message_stop"}
)");
    // The whole answer has the same blocks, but for the call, whose arguments are none.
    record.status = Status::completed;
    record.outcome = std::make_shared<Outcome>(outcome);
    const auto whole = render_answer({.surface = &messages_surface},
                                     render_response(record).write(), Dialect::valar);
    REQUIRE(whole.ok());
    CHECK(parse(*whole)["content"].write() ==
          R"([{"type":"thinking","thinking":"hm m","signature":")" + signature + R"("}])");
}

namespace {

/// A surface with what its document says of requests, and its check.
struct Documented {
    const Surface* surface;
    Dialect dialect;
    Json schemas = Json::object();

    Documented(const Surface* of, Dialect with) : surface(of), dialect(with) {
        doc_add_shared(&schemas);
        doc_add_surface(&schemas, of, with);
    }
    const Json& fields() const { return schemas[doc_name_of(surface) + "Request"]["properties"]; }
    Json body() const {
        Json body = parse(R"({"model":"m"})");
        const Json message = Json::object().set("role", "user").set("content", "x");
        if (!surface) body.set("input", "x");
        else body.set("messages", Json::array().push(message));
        if (surface == &messages_surface) body.set("max_tokens", 9);
        return body;
    }
    static std::string told(const Error& error) {
        for (const char* rule :
             {"stands earlier", "declares no", "'tools' is empty", "may be \"flex",
              "must not end with", "there is a tool", "true with 'background'"})
            if (error.message.find(rule) != error.message.npos) return "";
        return error.param.empty() ? error.message : error.param;
    }
    /// "" or the field that is refused; rules across fields do not count.
    std::string refused(std::string_view name, Json value) const {
        Json asked = body();
        asked.set(name, std::move(value));
        SurfaceBody read;
        if (surface) {
            auto given = read_surface(*surface, asked, dialect);
            if (!given) return told(given.error());
            read = std::move(*given);
            asked = read.body;
        }
        const auto request = parse_response_request(asked, dialect);
        if (request) return "";
        const Error error = surface ? surface_error(*surface, request.error(), read)
                                    : request.error();
        return told(error);
    }
    std::vector<Json> samples(const Json& schema) const;
    std::vector<Json> samples_of_object(const Json& schema) const;
};

/// Values that a schema takes: each word, each choice, both ends of what has two.
std::vector<Json> Documented::samples(const Json& schema) const {
    if (schema.contains("$ref"))
        return samples(schemas[schema["$ref"].as_string().substr(strlen("#/components/schemas/"))]);
    if (schema.contains("const")) return {schema["const"]};
    if (schema.contains("enum")) {
        std::vector<Json> words;
        for (const Json& word : schema["enum"].items())
            if (schema["not"].is_null() || word != schema["not"]["const"]) words.push_back(word);
        return words;
    }
    std::vector<Json> all;
    for (const Json& choice : schema["anyOf"].items())
        for (Json& one : samples(choice)) all.push_back(std::move(one));
    const Json types = schema["type"].is_array() ? schema["type"]
                                                 : Json::array().push(schema["type"]);
    for (const Json& type : types.items()) {
        const std::string_view name = type.as_string();
        if (name == "null") all.emplace_back(nullptr);
        if (name == "boolean") all.insert(all.end(), {true, false});
        if (name == "string")
            for (const char* end : {"minLength", "maxLength"})
                all.emplace_back(std::string(
                    schema.contains("pattern") ? 1 : size_t(schema[end].as_int(1)), 'a'));
        if (name == "integer" || name == "number")
            for (const char* end : {"minimum", "maximum"})
                if (schema.contains(end)) all.push_back(schema[end]);
        if ((name == "integer" || name == "number") && !schema.contains("minimum"))
            all.emplace_back(1);
        if (name == "array")
            for (Json& one : samples(schema["items"])) all.push_back(Json::array().push(one));
        if (name == "object")
            for (Json& one : samples_of_object(schema)) all.push_back(std::move(one));
    }
    return all;
}

/// With what must be there, and each field in each of its forms.
std::vector<Json> Documented::samples_of_object(const Json& schema) const {
    Json least = Json::object();
    for (const Json& name : schema["required"].items())
        least.set(name.as_string(), samples(schema["properties"][name.as_string()])[0]);
    std::vector<Json> all = {least};
    for (const JsonMember& field : schema["properties"].members())
        if (field.value.is_object())
            for (Json& value : samples(field.value))
                all.push_back(Json(least).set(field.key, std::move(value)));
    return all;
}

}  // namespace

TEST_CASE("the document: what it allows is read, what it forbids is refused") {
    for (const Dialect dialect : {Dialect::valar, Dialect::openai})
        for (const Surface* surface :
             {static_cast<const Surface*>(nullptr), &chat_surface, &messages_surface}) {
            const Documented shown(surface, dialect);
            size_t tried = 0;
            for (const JsonMember& field : shown.fields().members()) {
                const std::string name = field.key;
                const Json& schema = field.value;
                CAPTURE(name);
                for (const Json& value : shown.samples(schema)) {
                    ++tried;
                    CHECK_MESSAGE(shown.refused(name, value) == "", value.write());
                }
                const auto refuses = [&](const Json& value) {
                    ++tried;
                    CHECK_MESSAGE(shown.refused(name, value).starts_with(name), value.write());
                };
                if (schema["minimum"].is_number() && schema["minimum"].as_int() != INT64_MIN)
                    refuses(schema["minimum"].is_real() ? Json(schema["minimum"].as_double() - 0.5)
                                                        : Json(schema["minimum"].as_int() - 1));
                if (schema["maximum"].is_number() && schema["maximum"].as_int() != INT64_MAX)
                    refuses(schema["maximum"].is_real() ? Json(schema["maximum"].as_double() + 0.5)
                                                        : Json(schema["maximum"].as_int() + 1));
                if (schema.contains("minLength")) refuses("");
                if (schema.contains("maxLength"))
                    refuses(std::string(size_t(schema["maxLength"].as_int()) + 1, 'a'));
                if (schema.contains("enum") && schema["enum"][0].is_string()) refuses("no word");
                const std::string types = schema["type"].write();
                if (!schema.contains("type")) continue;  // choices
                if (types == "\"null\"") refuses(1);
                if (types.find("object") == types.npos) refuses(Json::object());
                if (types.find("array") == types.npos) refuses(Json::array().push(1));
                if (types.find("boolean") == types.npos) refuses(true);
            }
            CHECK(tried > 200);
        }
}

TEST_CASE("the document: every option has its row, with the default that a request has") {
    for (const Dialect dialect : {Dialect::valar, Dialect::openai}) {
        const Json shown = doc_fields(dialect);
        const auto check_row = [&](const char* name) {
            CAPTURE(std::string(name));
            CHECK_FALSE(shown[name]["description"].as_string().empty());
            const Json& usual = shown[name]["default"];
            if (usual.is_null()) return;
            Json body = parse(R"({"model":"m","input":"x"})");
            const auto plain = parse_response_request(body, dialect);
            const auto given = parse_response_request(body.set(name, usual), dialect);
            REQUIRE(given.ok());
            CHECK(request_json(*given) == request_json(*plain));
        };
        for (const auto& row : number_options) check_row(row.name);
        for (const auto& row : count_options) check_row(row.name);
        for (const auto& row : text_options) check_row(row.name);
        for (const auto& row : switch_options) check_row(row.name);
        const auto full = with(
            R"("seed":1,"stop":"a","text":{"format":{"type":"regex","pattern":"a"}})");
        const Json kept = request_json(*full);
        for (const JsonMember& member : kept.members()) check_row(member.key.c_str());
    }
}

// ---- README's table of fields ------------------------------------------------------------------

namespace {

/// The member of Request that a field is, where it has another name.
constexpr std::pair<const char*, const char*> members[] = {{"text", "format"},
                                                           {"reasoning", "effort"},
                                                           {"stream_options", "prompt_progress"},
                                                           {"include", "logprobs"},
                                                           {"truncation", ""},
                                                           {"service_tier", ""},
                                                           {"prompt", ""},
                                                           {"store", ""},
                                                           {"stream", ""},
                                                           {"previous_response_id", ""},
                                                           {"conversation", ""}};

std::string joined(const Json& all, const char* between) {
    std::string text;
    for (const Json& one : all.items())
        text += (text.empty() ? "" : between) + ("`" + one.write() + "`");
    return text;
}

/// "1..256", or "1 or more"; nothing where there is no bound.
std::string bounds(const Json& schema, const char* least, const char* most) {
    const Json &low = schema[least], &high = schema[most];
    if (low == Json(INT64_MIN)) return "of 64 bits";
    if (low.is_null() && high.is_null()) return "";
    if (high.is_null()) return low.write() + " or more";
    return (low.is_null() ? "0" : low.write()) + ".." + high.write();
}

std::string with_bounds(std::string what, const std::string& range, const char* of) {
    return what + (range.empty() ? "" : " " + range + of);
}

/// What a schema takes, in a few words.
std::string taken(const Json& schema) {
    if (schema.contains("const")) return "`" + schema["const"].write() + "`";
    if (schema.contains("enum")) return joined(schema["enum"], ", ");
    if (const Json* name = schema.find("$ref")) {
        const std::string_view path = name->as_string();
        return std::string(path.substr(path.rfind('/') + 1));
    }
    if (const Json* choices = schema.find("anyOf")) {
        std::string all;
        for (const Json& one : choices->items()) {
            const std::string words = taken(one);
            if (all.find(words) == all.npos) all += (all.empty() ? "" : " or ") + words;
        }
        return all;
    }
    const std::string type(schema["type"].as_string());
    if (type == "string")
        return with_bounds("text", bounds(schema, "minLength", "maxLength"), " characters");
    if (type == "array") {
        const std::string range = bounds(schema, "minItems", "maxItems");
        return "array of " + (range.empty() ? "" : range + " ") + taken(schema["items"]);
    }
    if (type == "object" && schema["properties"].size() > 0) {
        std::string names;
        for (const JsonMember& member : schema["properties"].members())
            if (member.value.is_object()) names += (names.empty() ? "`" : ", `") + member.key + "`";
        return "object: " + names;
    }
    if (type == "null") return "nothing: 400";
    return with_bounds(type, bounds(schema, "minimum", "maximum"), "");
}

/// The row of a field: what either dialect takes, its default, and what it is in C++.
std::string readme_row(const std::string& name, const Json& here, const Json& openai,
                       bool required) {
    std::string takes = taken(here), member = name, usual = here["default"].write();
    if (const std::string other = taken(openai); other != takes) takes += "; openai: " + other;
    const std::string about(here["description"].as_string());
    if (const size_t at = about.find("Default: "); at != about.npos)
        usual = about.substr(at + 9, about.size() - at - 10);
    else usual = required ? "required" : usual == "null" ? "" : "`" + usual + "`";
    for (const auto& [field, as] : members)
        if (field == name) member = as;
    if (!member.empty()) member = "`" + member + "`";
    return "| `" + name + "` | " + takes + " | " + usual + " | " + member + " |\n";
}

}  // namespace

TEST_CASE("README's table of fields is the one that requests are checked by") {
    const auto file = [](const char* name) {
        auto text = read_file(std::string(VALAR_SOURCE_DIR) + "/" + name, 1 << 20);
        REQUIRE(text.ok());
        return *text;
    };
    const Json here = doc_fields(Dialect::valar), openai = doc_fields(Dialect::openai);
    REQUIRE(here.size() == openai.size());
    const std::string required = doc_request(Dialect::valar)["required"].write();
    std::string rows;
    for (const JsonMember& field : here.members())
        rows += readme_row(field.key, field.value, openai[field.key],
                           required.find('"' + field.key + '"') != std::string::npos);
    CHECK_MESSAGE(file("README.md").find(rows) != std::string::npos,
                  "README's table of fields is not:\n"
                      << rows);
    const std::string header = file("src/api.hpp");
    const size_t begin = header.find("struct Request {"), end = header.find("\n};", begin);
    const std::string request = header.substr(begin, end - begin);
    for (const JsonMember& field : here.members()) {
        std::string member = field.key;
        for (const auto& [name, as] : members)
            if (name == member) member = as;
        CAPTURE(field.key);
        CHECK((member.empty() || request.find(" " + member + " = ") != std::string::npos));
    }
}
