#include <doctest/doctest.h>

#include <string>
#include <utility>
#include <vector>

#include "grammar/grammar.hpp"

using namespace valar;
using namespace valar::detail;

namespace {

GrammarPtr schema(std::string_view text, bool strict = true) {
    auto json = Json::parse(text);
    REQUIRE(json.ok());
    auto grammar = compile_json_schema(*json, {strict, JsonSpace::optional});
    if (!grammar) FAIL(grammar.error().message);
    return *grammar;
}

Error refusal(std::string_view text) {
    auto json = Json::parse(text);
    REQUIRE(json.ok());
    auto grammar = compile_json_schema(*json);
    REQUIRE_FALSE(grammar.ok());
    CHECK(grammar.error().code == "invalid_json_schema");
    return grammar.error();
}

bool accepts(const GrammarPtr& grammar, std::string_view text) {
    GrammarState state(grammar);
    return state.advance(text) && state.may_end();
}

struct Expectation {
    const char* schema;
    std::vector<const char*> valid, invalid;
};

void check(const std::vector<Expectation>& list) {
    for (const Expectation& e : list) {
        const GrammarPtr grammar = schema(e.schema);
        for (const char* text : e.valid) CHECK_MESSAGE(accepts(grammar, text), e.schema, " ", text);
        for (const char* text : e.invalid)
            CHECK_MESSAGE(!accepts(grammar, text), e.schema, " ", text);
    }
}

// A vocabulary of single bytes, of some longer pieces, of one special token and an end.
const std::vector<std::string>& pieces() {
    static const std::vector<std::string> list = [] {
        std::vector<std::string> out;
        for (int b = 0; b < 256; ++b) out.emplace_back(1, char(b));
        for (const char* text : {"ab",    "abc",     "the",      " the",      "hello", "\",",
                                 "\": ",  "\":\"",   "{\"",      "\"}",       "12",    "123",
                                 "e\"",   "ab\"",    "\xC3\xA9", "\xC3\xA9t", "\\n",   "a\\",
                                 "\\\"",  "], [",    "true",     "null",      "  ",    "\n\n",
                                 "name",  "name\":", "\xF0\x9F", "\x98\x80",  "aaaa",  "aaaaaaaa",
                                 "\",\"", "key\":1"})
            out.emplace_back(text);
        out.resize(out.size() + 2);
        return out;
    }();
    return list;
}
Token end_token() { return Token(pieces().size() - 1); }
Token special_token() { return Token(pieces().size() - 2); }
const TokenTriePtr& trie() {
    static const TokenTriePtr made = TokenTrie::build(pieces(), {end_token()});
    return made;
}
MaskMaker& maker() {
    static MaskMaker made(trie());
    return made;
}
std::vector<uint64_t> mask_of(const GrammarState& state) {
    const auto mask = maker().fill(state);
    return {mask.begin(), mask.end()};
}
bool has(const std::vector<uint64_t>& mask, Token token) {
    return mask[size_t(token) / 64] >> (token % 64) & 1;
}

// The mask is what trying every token gives, at each place of the text.
void check_masks(const GrammarPtr& grammar, std::string_view text) {
    GrammarState state(grammar);
    for (size_t at = 0; at <= text.size(); ++at) {
        const std::vector<uint64_t> mask = mask_of(state);
        for (Token t = 0; t < end_token(); ++t) {
            GrammarState copy = state;
            CHECK_MESSAGE(has(mask, t) == copy.accept_token(t, trie()->piece(t)),
                          text.substr(0, at), "|", trie()->piece(t));
        }
        CHECK(has(mask, end_token()) == state.may_end());
        for (const Token t : {Token('a'), Token('"'), end_token()}) {
            GrammarState copy = state;
            CHECK(has(mask, t) == maker().accept(copy, t));
        }
        if (at < text.size()) REQUIRE(state.advance(text.substr(at, 1)));
    }
}

}  // namespace

TEST_CASE("types, enumerations and constants") {
    check({{R"({"type":"null"})", {"null"}, {"nul", "0", "nulll"}},
           {R"({"type":["boolean","integer"]})",
            {"true", "false", "0", "-12"},
            {"1.5", "-0", "01", "null"}},
           {R"({"type":"number"})",
            {"0", "-1.25", "1e5", "2E-07", "1.0", "-62.0", "-0.5", "-0.0"},
            {".5", "1.", "+1", "0x1", "1e", "00"}},
           {R"({"enum":["a\"b",1,null,[1,2],{"x":true}]})",
            {R"("a\"b")", "1", "null", "[1,2]", R"({"x":true})"},
            {"2", "[1]", "\"a\""}},
           {R"({"const":"x"})", {"\"x\""}, {"\"y\"", "x"}},
           {R"({"enum":["abc",5,"x"],"type":"string","maxLength":2})", {"\"x\""}, {"5", "\"abc\""}},
           {R"({})",
            {"1", "{}", "[]", R"({"a":[{"b":null}]})", R"({"a\"b":1,"a":2,"b":3})"},
            {"", "{", "[1,]", R"({"a":1,"a":2})", R"({"\"":1,"\"":2})"}}});
}

TEST_CASE("numbers between bounds are compared by digits") {
    check({{R"({"type":"integer","minimum":-7,"maximum":130})",
            {"-7", "0", "9", "99", "130"},
            {"-8", "131", "1000", "-10"}},
           {R"({"type":"integer","exclusiveMinimum":0,"multipleOf":7})",
            {"7", "14", "700"},
            {"0", "-7", "8"}},
           {R"({"type":"number","minimum":0.5,"exclusiveMaximum":1})",
            {"0.5", "0.50", "0.999", "0.7"},
            {"0.49", "1", "1.0", "0", "5e-1", "-0.7"}},
           {R"({"type":"number","minimum":-1.5,"maximum":-0.25})",
            {"-1.5", "-1", "-0.25", "-0.3"},
            {"-1.51", "-0.2", "0", "-2"}},
           {R"({"type":"number","minimum":1e3})",
            {"1000", "1000.5", "99999"},
            {"999", "999.999", "-2000"}},
           {R"({"type":"number","not":{"type":"integer"}})", {"1.5", "0.10"}, {"1", "1.0"}}});
}

TEST_CASE("strings: characters are counted, whatever their spelling") {
    check({{R"({"type":"string","minLength":2,"maxLength":3})",
            {"\"ab\"", "\"\xC3\xA9\xF0\x9F\x98\x80\"", R"("\u00e9\ud83d\ude00")", R"("\n\"\\")"},
            {"\"a\"", "\"abcd\"", R"("\ud83d")", R"("\ude00a")", "\"a\x01\"", "\"\xC3\"",
             "\"\xED\xA0\x80\""}},
           {R"({"type":"string","pattern":"^[a-z]+\\d$"})",
            {"\"ab1\""},
            {"\"1\"", "\"ab\"", "\"ab12\""}},
           {R"({"type":"string","pattern":"b.d"})",
            {"\"abcde\"",
             "\"b\xC3\xA9"
             "d\""},
            {"\"bd\"", "\"acd\""}},
           {R"({"type":"string","pattern":"^\"q\\\\$"})", {R"("\"q\\")"}, {R"("q")"}},
           {R"({"type":"string","pattern":"^a*$","minLength":2,"maxLength":4})",
            {"\"aa\"", "\"aaaa\""},
            {"\"a\"", "\"aaaaa\""}},
           {R"({"type":"string","pattern":"^(ab)*$","minLength":3,"maxLength":5})",
            {"\"abab\""},
            {"\"ab\"", "\"ababab\""}},
           {R"({"type":"string","maxLength":100000})", {"\"\"", "\"x\""}, {"x"}},
           {R"({"type":"string","pattern":"^[a-z]{3,100000}$"})",
            {"\"abc\""},
            {"\"ab\"", "\"abC\""}}});
}

TEST_CASE("formats") {
    check(
        {{R"({"type":"string","format":"date"})",
          {"\"2024-02-29\"", "\"1999-12-31\""},
          {"\"2023-02-29\"", "\"2024-13-01\"", "\"0000-01-01\"", "\"1900-02-29\""}},
         {R"({"type":"string","format":"date-time"})",
          {"\"2024-02-29T23:59:59.25+01:00\"", "\"2020-01-01T00:00:00Z\""},
          {"\"2020-01-01T24:00:00Z\"", "\"2020-01-01T00:00:00\""}},
         {R"({"type":"string","format":"ipv6"})",
          {"\"::1\"", "\"1:2:3:4:5:6:7:8\"", "\"::ffff:1.2.3.4\"", "\"::\""},
          {"\"1::2::3\"", "\"1:2:3:4:5:6:7\"", "\"12345::\""}},
         {R"({"type":"string","format":"ipv4"})",
          {"\"0.10.255.9\""},
          {"\"256.1.1.1\"", "\"1.1.1\"", "\"01.1.1.1\""}},
         {R"({"type":"string","format":"uuid"})",
          {"\"123e4567-e89b-12d3-a456-426614174000\""},
          {"\"123e4567e89b12d3a456426614174000\""}},
         {R"({"type":"string","format":"duration"})",
          {"\"P1Y2M3DT4H5M6S\"", "\"PT1H\"", "\"P2W\""},
          {"\"P\"", "\"PT\"", "\"P1W1D\"", "\"1Y\""}},
         {R"({"type":"string","format":"email"})",
          {"\"a.b+c@example.org\""},
          {"\"a\"", "\"a@\"", "\".a@b\""}},
         {R"({"type":"string","format":"hostname"})", {"\"a-b.example\""}, {"\"-a\"", "\"a..b\""}},
         {R"({"type":"string","format":"uri"})",
          {"\"https://u@x.org:80/a%20b?c#d\"", "\"urn:a:b\""},
          {"\"//x\"", "\"a b\"", "\"https://[::1\""}}});
}

TEST_CASE("every format compiles in both spellings, alone and beside values") {
    const std::pair<const char*, const char*> names[] = {
        {"date", "2024-02-29"},
        {"time", "23:59:60Z"},
        {"date-time", "2016-12-31T23:59:60Z"},
        {"duration", "P2W"},
        {"uuid", "123e4567-e89b-12d3-a456-426614174000"},
        {"email", "a@b.example"},
        {"ipv4", "127.0.0.1"},
        {"ipv6", "::1"},
        {"hostname", "b.example"},
        {"uri", "urn:a:b"},
        {"uri-reference", "../a?b#c"}};
    for (const auto& row : names) {
        const std::string name = row.first, text = row.second;
        CAPTURE(name);
        for (const Spelling spelling : {Spelling::raw, Spelling::json}) {
            const auto dfa = format_dfa(name, spelling);
            REQUIRE(dfa.ok());
            CHECK((*dfa)->match(text) >= 0);
            CHECK((*dfa)->match("\t") < 0);
            CHECK(*format_dfa(name, spelling) == *dfa);
        }
        const Json format = Json::object().set("type", "string").set("format", name);
        Json among = format;
        among.set("enum", Json::array().push(text).push("\t"));
        const std::string quoted = Json(text).write();
        for (const Json& asked : {format, among}) {
            const GrammarPtr grammar = schema(asked.write());
            CHECK(accepts(grammar, quoted));
            CHECK_FALSE(accepts(grammar, "\"\\t\""));
        }
    }
    CHECK_FALSE(format_dfa("iri", Spelling::raw).ok());
}

TEST_CASE("arrays") {
    check(
        {{R"({"type":"array","items":{"type":"integer"},"minItems":1,"maxItems":3})",
          {"[1]", "[1, 2,3]"},
          {"[]", "[1,2,3,4]", "[\"a\"]"}},
         {R"({"type":"array","prefixItems":[{"type":"integer"},{"type":"string"}],"items":false})",
          {"[]", "[1]", "[1,\"a\"]"},
          {"[1,\"a\",2]", "[\"a\"]"}},
         {R"({"type":"array","items":{"type":"integer"},"contains":{"const":5},"minContains":1,"maxContains":2})",
          {"[5]", "[1,5,5]"},
          {"[]", "[1]", "[5,5,5]"}},
         {R"({"type":"array","items":{"enum":["a","b","c"]},"uniqueItems":true,"minItems":2})",
          {"[\"b\",\"a\"]", "[\"a\", \"b\",\"c\"]"},
          {"[\"a\"]", "[\"a\",\"a\"]"}}});
}

TEST_CASE("objects") {
    check(
        {{R"({"type":"object","properties":{"a":{"type":"integer"},"b":{"type":"string"},"c":{"const":1}},"required":["b"],"additionalProperties":false})",
          {R"({"b":""})", R"({"a": 1, "b": "x", "c": 1})"},
          {R"({})", R"({"b":"","a":1})", R"({"b":"","d":1})", R"({"a":1,})"}},
         {R"({"type":"object","properties":{"a":{}},"additionalProperties":{"type":"integer"}})",
          {R"({"a":"x","b":1})", R"({"ab":2})", R"({})"},
          {R"({"b":"x"})", R"({"b":1,"b":2})", R"({"b":1,"a":2})"}},
         {R"({"type":"object","patternProperties":{"^a":{"type":"integer"},"z$":{"type":"integer","minimum":10}},"additionalProperties":false})",
          {R"({"a":1,"z":10,"az":11})"},
          {R"({"az":1})", R"({"z":9})", R"({"b":1})"}},
         {R"({"type":"object","patternProperties":{"^[ab]$":{"const":0}},"additionalProperties":false,"minProperties":2})",
          {R"({"b":0,"a":0})"},
          {R"({"a":0})", R"({"a":0,"a":0})"}},
         {R"({"type":"object","minProperties":1,"maxProperties":2,"properties":{"a":{"const":1},"b":{"const":1},"c":{"const":1}},"additionalProperties":false})",
          {R"({"a":1})", R"({"b":1,"c":1})"},
          {R"({})", R"({"a":1,"b":1,"c":1})"}},
         {R"({"type":"object","properties":{"a":{"const":1},"b":{"const":1}},"dependentRequired":{"a":["b"]},"additionalProperties":false})",
          {R"({})", R"({"b":1})", R"({"a":1,"b":1})"},
          {R"({"a":1})"}},
         {R"({"type":"object","propertyNames":{"pattern":"^[a-z]+$"},"additionalProperties":{"const":0}})",
          {R"({"ab":0})"},
          {R"({"A":0})"}}});
}

TEST_CASE("no key begins that cannot be ended with a value behind it") {
    const auto takes = [](const GrammarPtr& grammar, std::string_view text) {
        return GrammarState(grammar).advance(text);
    };
    const GrammarPtr closed = schema(
        R"({"type":"object","patternProperties":{"^x":{"type":"null"}},"additionalProperties":false})");
    CHECK(accepts(closed, R"({"x1":null,"x":null})"));
    CHECK_FALSE(takes(closed, R"({"a)"));
    check_masks(closed, R"({"xab":null})");
    // What is behind the other keys has no end.
    const GrammarPtr round = schema(
        R"({"type":"object","patternProperties":{"^x":{"type":"null"}},
            "additionalProperties":{"$ref":"#/$defs/n"},
            "$defs":{"n":{"type":"object","properties":{"n":{"$ref":"#/$defs/n"}},"required":["n"]}}})");
    CHECK(accepts(round, R"({"x":null})"));
    CHECK_FALSE(takes(round, R"({"a)"));
    // Both patterns at once is all that there is.
    const GrammarPtr both = schema(
        R"({"type":"object","patternProperties":{"^a*$":{"enum":[1,2]},"^[ab]{2}$":{"enum":[2,3]},
            "^aa$":{"minimum":2},"^(a|b|ab|ba|bb|aaa+)?$":false},"additionalProperties":false})");
    CHECK(accepts(both, R"({"aa":2})"));
    CHECK(accepts(both, "{}"));
    for (const char* text : {R"({"b)", R"({"aaa)", R"({"aa":1)", R"({"")", R"({"aa":2,)"})
        CHECK_FALSE(takes(both, text));
    const GrammarPtr none = schema(
        R"({"type":"object","patternProperties":{"^x":true},"propertyNames":{"pattern":"^y"},
            "additionalProperties":false})");
    CHECK_FALSE(takes(none, R"({")"));
}

TEST_CASE("combinations") {
    check(
        {{R"({"anyOf":[{"type":"integer"},{"type":"string","maxLength":1}]})",
          {"1", "\"a\""},
          {"\"ab\"", "null"}},
         {R"({"allOf":[{"type":"integer","minimum":3},{"maximum":5}]})", {"3", "5"}, {"2", "6"}},
         {R"({"oneOf":[{"type":"integer","minimum":3},{"type":"integer","maximum":5}]})",
          {"2", "6"},
          {"3", "4", "5"}},
         {R"({"type":"string","not":{"enum":["a","b"]}})",
          {"\"\"", "\"c\"", "\"ab\""},
          {"\"a\"", "\"b\""}},
         {R"({"type":"object","properties":{"k":{"enum":["x","y"]},"v":{}},"required":["k","v"],"additionalProperties":false,
                "if":{"properties":{"k":{"const":"x"}}},"then":{"properties":{"v":{"type":"integer"}}},"else":{"properties":{"v":{"type":"string"}}}})",
          {R"({"k":"x","v":1})", R"({"k":"y","v":"s"})"},
          {R"({"k":"x","v":"s"})", R"({"k":"y","v":1})"}},
         {R"({"$defs":{"t":{"type":"object","properties":{"v":{"type":"integer"},"c":{"type":"array","items":{"$ref":"#/$defs/t"}}},"required":["v"],"additionalProperties":false}},"$ref":"#/$defs/t"})",
          {R"({"v":1,"c":[{"v":2},{"v":3,"c":[]}]})"},
          {R"({"v":1,"c":[{}]})"}}});
}

TEST_CASE("strings that differ, decimals, properties that nothing evaluated") {
    check(
        {{R"({"type":"array","items":{"type":"string","maxLength":3},"uniqueItems":true,"minItems":2})",
          {R"(["a","b"])", R"(["a", "ab", "b"])"},
          {R"(["a"])", R"(["a","a"])", R"([1,2])", R"(["a","b","a"])", R"({"a","b"})"}},
         {R"({"items":{"enum":["a","b","c","d","e","f","g","h","i","j"]},"uniqueItems":true,"type":"array"})",
          {"[]", R"(["j","i","a","b","c","d","e","f","g","h"])"},
          {R"(["j","j"])", R"(["k"])"}},
         {R"({"type":"object","propertyNames":{"enum":["ab","ac"]},"properties":{"ab":{"type":"null"}},
                "additionalProperties":{"const":1},"minProperties":2})",
          {R"({"ab":null,"ac":1})"},
          {R"({"ab":null})", R"({"ab":1,"ac":1})"}},
         {R"({"type":"number","multipleOf":0.25})",
          {"0", "1.25", "-3.75", "2.50"},
          {"0.1", "1.255", "0.125"}},
         {R"({"allOf":[{"properties":{"a":{"type":"null"}}},{"patternProperties":{"^x":{}}}],
                "anyOf":[{"properties":{"b":{"const":1}},"required":["b"]},{"required":["a"]}],
                "type":"object","unevaluatedProperties":false})",
          {R"({"a":null})", R"({"a":null,"b":1})", R"({"b":1,"x1":2})"},
          {R"({"b":2})", R"({"a":null,"c":1})"}}});
    CHECK(refusal(R"({"items":{"enum":["a","b"]},"uniqueItems":true,"minItems":3,"type":"array"})")
              .message == "schema at '': nothing matches it");
    CHECK(refusal(R"({"type":"object","propertyNames":{"enum":["a","b"]},"minProperties":3})")
              .param.empty());
}

TEST_CASE("one of several that overlap; references by name") {
    check(
        {{R"({"oneOf":[{"type":"object","properties":{"a":{"type":"integer"}},"additionalProperties":false},
                         {"type":"object","properties":{"a":{"type":"integer"},"b":{"type":"null"}},
                          "additionalProperties":false}]})",
          {R"({"b":null})", R"({"a":1,"b":null})"},
          {"{}", R"({"a":1})"}},
         {R"({"type":"object","required":["kind"],"properties":{"kind":{}},
                "oneOf":[{"properties":{"kind":{"const":"a"},"x":{"type":"null"}}},
                         {"properties":{"kind":{"const":"b"}},"patternProperties":{"^y":{"const":1}}}]})",
          {R"({"kind":"a","x":null})", R"({"kind":"b","y":1})"},
          {R"({"kind":"c"})", R"({"kind":"a","x":1})", R"({"kind":"b","y":2})"}},
         {R"({"$id":"http://x/a/b.json","$ref":"c.json#/$defs/d",
                "$defs":{"e":{"$id":"c.json","$defs":{"d":{"$ref":"#f"}},"allOf":[{"$anchor":"f","const":1}]}}})",
          {"1"},
          {"2"}},
         {R"({"properties":{"default":{"$id":"http://y/","$dynamicAnchor":"n","type":["object","null"],
                "properties":{"next":{"$dynamicRef":"#n"}}}},"type":"object"})",
          {R"({"default":{"next":{"next":null}}})"},
          {R"({"default":{"next":{"next":1}}})"}},
         {R"({"type":"string","pattern":"^(?!b)(?=.*[0-9])[a-z0-9]{2,4}$"})",
          {R"("a1")", R"("1b")"},
          {R"("b1")", R"("aa")", R"("a")"}}});
}

TEST_CASE("what cannot be promised is refused by its place and keyword") {
    CHECK(refusal(R"({"type":"object","properties":{"a/b":{"type":"string","format":"iri"}}})")
              .param == "/properties/a~1b/format");
    CHECK(refusal(R"({"$ref":"other.json"})").param == "/$ref");
    CHECK(refusal(R"({"type":"string","pattern":"a(?=b)c"})").param == "/pattern");
    CHECK(refusal(R"({"type":"array","items":{},"uniqueItems":true})").param == "/uniqueItems");
    CHECK(refusal(R"({"unevaluatedItems":false})").param == "/unevaluatedItems");
    CHECK(refusal(R"({"type":"strin"})").param == "/type");
    CHECK(refusal(R"({"type":"string","maxLength":100001})").param == "/maxLength");
    CHECK(refusal(R"({"type":"number","multipleOf":0.1})").param == "/multipleOf");
    CHECK(refusal(R"({"allOf":[{"type":"string"},{"type":"integer"}]})").message ==
          "schema at '': nothing matches it");
    CHECK(accepts(schema(R"({"type":"string","format":"iri"})", false), "\"x\""));
    std::string deep = "{}";
    for (int i = 0; i < 40; ++i) deep = R"({"items":{"items":)" + deep + "}}";
    CHECK(refusal(deep).message.find("deeper than 64") != std::string::npos);
}

TEST_CASE("not to match patterns of keys: all keys where that is not strict") {
    Json patterns = Json::object();
    for (int i = 0; i < 40; ++i)
        patterns.set("^" + std::to_string(i) + "x", Json::object().set("type", "integer"));
    const Json inner = Json::object().set("patternProperties", std::move(patterns));
    const std::string many = Json::object().set("type", "object").set("not", inner).write();
    CHECK(refusal(many).param == "/not/patternProperties");
    CHECK(accepts(schema(many, false), R"({"39x":"a"})"));
}

TEST_CASE("strings too long to be told apart are refused by name, or not told apart") {
    const char* const unique =
        R"({"properties":{"to":{"type":"array","uniqueItems":true,"items":{"format":"email","type":"string"}}}})";
    CHECK(refusal(unique).param == "/properties/to/uniqueItems");
    CHECK(accepts(schema(unique, false), R"({"to":["a@b.de","a@b.de"]})"));
    CHECK_FALSE(accepts(schema(unique, false), R"({"to":["a"]})"));
    const char* const names = R"({"type":"object","propertyNames":{"format":"email"}})";
    CHECK(refusal(names).param == "/propertyNames");
    CHECK(accepts(schema(names, false), R"({"a@b.de":1})"));
    const char* const enough =
        R"({"type":"array","uniqueItems":true,"items":{"type":"string","maxLength":200}})";
    CHECK(accepts(schema(enough), R"(["a","b"])"));
    CHECK_FALSE(accepts(schema(enough), R"(["a","a"])"));
}

TEST_CASE("identifiers are at most 2,048 bytes long, and kept once") {
    const auto identified = [](size_t bytes) {
        Json nodes = Json::array();
        for (int i = 0; i < 20'000; ++i) nodes.push(Json::array().push(Json::object()));
        return Json::object()
            .set("$id", "http://a/" + std::string(bytes - 9, 'b'))
            .set("$ref", "#/$defs/c")
            .set("$defs", Json::object().set("c", Json::object().set("const", 1)))
            .set("x-nodes", std::move(nodes));
    };
    CHECK(accepts(schema(identified(2048).write()), "1"));
    CHECK(refusal(identified(2049).write()).param == "/$id");
    const std::string part(1024, 'a');
    CHECK(refusal(R"({"items":{"$ref":"#)" + part + part + R"("}})").param == "/items/$ref");
    // Each behind the one around it.
    std::string chain = R"({"$ref":"#"})";
    for (int i = 0; i < 3; ++i) chain = R"({"$id":")" + part + R"(/","items":)" + chain + "}";
    CHECK(refusal(chain).message.find("too large") != std::string::npos);
    std::string many = R"({"$id":")" + part +
                       R"(/","$ref":"#/$defs/c","$defs":{"c":{"const":1}},"x":[)";
    for (int i = 0; i < 30'000; ++i) many += R"({"$id":"i)" + std::to_string(i) + "\"},";
    CHECK(refusal(many + "0]}").message.find("too large") != std::string::npos);
}

TEST_CASE("no text nests deeper than Json::parse reads") {
    GrammarState state(schema("{}"));
    size_t depth = 0;
    while (depth < 1000 && state.advance("[")) ++depth;
    CHECK(depth > 64);
    std::string text(depth, '[');
    text += std::string(depth, ']');
    CHECK(Json::parse(text).ok());
    CHECK(accepts(schema("{}"), text));
}

TEST_CASE("regular expressions, choices, grammars") {
    const auto regex = [](const char* pattern) {
        auto grammar = compile_regex(pattern);
        REQUIRE_MESSAGE(grammar.ok(), pattern);
        return *grammar;
    };
    CHECK(accepts(regex("(?:ab|c){2}d?"), "abc"));
    CHECK_FALSE(accepts(regex("(?:ab|c){2}d?"), "ab"));
    CHECK(accepts(regex("[^\\x00-\\x7F]+"), "\xC3\xA9\xE2\x82\xAC"));
    CHECK(accepts(regex("(a{1,60000}b){2,50000}"), "abaab"));
    CHECK_FALSE(accepts(regex("(a{1,60000}b){2,50000}"), "ab"));
    // Too many states for one automaton, not for its parts.
    CHECK(accepts(regex("([ab]*a[ab]{15}c?){1,3}d"), "abababababababababcd"));
    CHECK_FALSE(accepts(regex("([ab]*a[ab]{15}c?){1,3}d"), "bbbbbbbbbbbbbbbbbbcd"));
    for (const char* bad :
         {"(", "a**b(", "[z-a]", "\\1(a)", "b(?!a)", "a{2,1}", "a{100001}", "\\b", "a++"})
        CHECK_FALSE(compile_regex(bad).ok());
    auto choices = compile_choices({"north", "nor", "west"});
    REQUIRE(choices.ok());
    CHECK(accepts(*choices, "nor"));
    CHECK(accepts(*choices, "north"));
    CHECK_FALSE(accepts(*choices, "nort"));
    CHECK_FALSE(compile_choices({}).ok());
    auto gbnf = compile_gbnf(
        "# sums\nroot ::= term (\"+\" term){1,3}\nterm ::= [0-9]+ |\n  \"(\" root \")\"\n");
    REQUIRE(gbnf.ok());
    CHECK(accepts(*gbnf, "1+(2+3)"));
    CHECK_FALSE(accepts(*gbnf, "1+1+1+1+1"));
    CHECK_FALSE(compile_gbnf("root ::= root \"a\" | \"b\"").ok());
    CHECK_FALSE(compile_gbnf("root ::= x").ok());
}

TEST_CASE("masks are what trying every token gives") {
    check_masks(
        schema(
            R"({"type":"object","properties":{"name":{"type":"string","minLength":3,"maxLength":9},"n":{"type":"integer","maximum":130}},"required":["name"]})"),
        "{\"name\": \"aa\xC3\xA9\\nabc\", \"n\": 12, \"key\": [\"a\"], \"kez\": null}");
    check_masks(schema(R"({"type":"string","pattern":"^[a-z]+(,[a-z]{2,})*$"})"), "\"abc,ab\"");
    check_masks(schema(R"({"type":"array","items":{"enum":["ab","abc","name"]},"maxItems":2})"),
                "[\"abc\", \"ab\"]");
    // Chains of states that all letters lead along, with bounds of their own and without.
    check_masks(schema(R"({"type":"string","format":"email"})"), "\"the.name@[1.2.3.4]\"");
    check_masks(schema(R"({"type":"string","pattern":"^.{2,9}$"})"),
                "\"the\xC3\xA9"
                "abc\"");
    check_masks(schema(R"({"type":"string","pattern":"^[a-z\u00e9]{3,8}$","maxLength":6})"),
                "\"a\xC3\xA9hel\"");
    check_masks(schema(R"({"type":"string","pattern":"^(.{3})*$","minLength":5,"maxLength":9})"),
                "\"aaaaabcab\"");
    check_masks(schema(R"({"type":"string","maxLength":12})"), "\"hello\\n\xF0\x9F\x98\x80the\"");
    auto regex = compile_regex("[a-h]*abc!?");
    REQUIRE(regex.ok());
    check_masks(*regex, "aababc");
}

TEST_CASE("a composition: text until a mark, a token, a schema") {
    GrammarBuilder builder;
    auto arguments = add_json_schema(
        builder,
        *Json::parse(
            R"({"type":"object","properties":{"n":{"type":"integer"}},"required":["n"],"additionalProperties":false})"),
        true);
    REQUIRE(arguments.ok());
    const auto text = add_regex(builder, "([^<]|<[^ce])*");
    REQUIRE(text.ok());
    const Part call = builder.sequence(
        {builder.bytes("<call>"), *arguments, builder.bytes("</call>")});
    const Part end = builder.sequence({builder.bytes("<end>"), builder.token(special_token())});
    auto grammar = builder.build(builder.sequence({*text, builder.choice({call, end})}));
    REQUIRE(grammar.ok());
    CHECK(accepts(*grammar, "<b>hello <call>{\"n\":1}</call>"));
    CHECK_FALSE(accepts(*grammar, "hello <call>{\"m\":1}</call>"));
    check_masks(*grammar, "the <call>{\"n\": 12}</call>");
    GrammarState state(*grammar);
    REQUIRE(state.advance("x<end>"));
    const std::vector<uint64_t> mask = mask_of(state);
    CHECK(has(mask, special_token()));
    CHECK_FALSE(has(mask, 'a'));
    CHECK_FALSE(state.may_end());
    REQUIRE(state.accept_token(special_token(), ""));
    CHECK(state.may_end());
}

TEST_CASE("forced stretches, forks") {
    const GrammarPtr grammar = schema(
        R"({"type":"object","properties":{"first":{"enum":["alpha","alpine"]},"second":{"type":"null"}},"required":["first","second"],"additionalProperties":false})");
    GrammarState state(grammar);
    CHECK(state.forced_bytes() == "{\"first\":");
    REQUIRE(state.advance("{\"first\":"));
    REQUIRE(state.advance("\""));
    CHECK(state.forced_bytes() == "alp");
    GrammarState fork = state;
    REQUIRE(fork.advance("alph"));
    CHECK(fork.forced_bytes() == "a\",");
    CHECK_FALSE(state.advance("alpx"));
    REQUIRE(state.advance("alpi"));
    CHECK(state.forced_bytes() == "ne\",");
}

TEST_CASE("grammars of one shape have masks of their own") {
    for (const char* pattern : {"gi", "ha", "gi"}) {
        const auto grammar = compile_regex(pattern);
        REQUIRE(grammar.ok());
        check_masks(*grammar, pattern);
    }
}
