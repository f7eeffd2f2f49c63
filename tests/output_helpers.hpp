// An answer fed to a parser, and the items that come out.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "template/syntax.hpp"
#include "unicode_internal.hpp"

struct TokenSet {
    std::vector<std::string> spellings;
    std::vector<std::string> ends;
    valar::detail::SpecialTokens special() const {
        valar::detail::SpecialTokens made;
        for (size_t i = 0; i < spellings.size(); ++i)
            made.add(spellings[i], static_cast<valar::Token>(i));
        return made;
    }
    /// The longest that `text` begins with.
    std::string_view at(std::string_view text) const {
        std::string_view best;
        for (const std::string& token : spellings)
            if (token.size() > best.size() && text.starts_with(token)) best = token;
        return best;
    }
};

/// Checks the order of what it is told: an item begins when none is open, has text when one is.
struct Items final : valar::detail::OutputSink {
    struct Item {
        valar::Item::Kind kind;
        std::string name, text;
        bool ended = false;
        bool operator==(const Item&) const = default;
    };
    std::vector<Item> all;

    static void require(bool condition) {
        if (!condition) std::abort();
    }
    bool open() const { return !all.empty() && !all.back().ended; }
    void begin_item(valar::Item::Kind kind, std::string_view name) override {
        require(!open());
        all.push_back({kind, std::string(name), {}});
    }
    void extend_item(std::string_view text) override {
        require(open() && valar::detail::utf8_valid(text));
        all.back().text += text;
    }
    void end_item() override {
        require(open());
        all.back().ended = true;
    }

    static const char* word(valar::Item::Kind kind) {
        using Kind = valar::Item::Kind;
        return kind == Kind::message         ? "message"
               : kind == Kind::reasoning     ? "reasoning"
               : kind == Kind::function_call ? "call"
                                             : "custom";
    }
    valar::Json json() const {
        valar::Json out = valar::Json::array();
        for (const Item& item : all)
            out.push(valar::Json::object()
                         .set("kind", word(item.kind))
                         .set("name", item.name)
                         .set("text", item.text)
                         .set("ended", item.ended));
        return out;
    }
    /// thought(..) say(..) name(..); a call without an end: name(..
    std::string shown() const {
        std::string out;
        for (const Item& item : all) {
            if (!out.empty()) out += ' ';
            out += item.kind == valar::Item::Kind::message     ? "say"
                   : item.kind == valar::Item::Kind::reasoning ? "thought"
                                                               : item.name.c_str();
            (out += '(') += item.text;
            if (item.ended) out += ')';
        }
        return out;
    }
};

inline std::vector<valar::Tool> tools_of(const valar::Json& list) {
    std::vector<valar::Tool> tools;
    for (const valar::Json& one : list.items()) {
        valar::Tool tool;
        tool.name = one["name"].as_string();
        tool.parameters = one["parameters"];
        tool.custom = one["custom"].as_bool();
        tools.push_back(std::move(tool));
    }
    return tools;
}

/// Special tokens as marks, what lies between in pieces of up to `step` bytes (whole characters).
inline void feed(valar::detail::OutputParser& parser, std::string_view text, const TokenSet& tokens,
                 size_t step, Items& items) {
    std::string piece;
    const auto flush = [&] {
        if (!piece.empty()) parser.text(piece, items);
        piece.clear();
    };
    while (!text.empty()) {
        if (const std::string_view token = tokens.at(text); !token.empty()) {
            flush();
            const bool ends = std::find(tokens.ends.begin(), tokens.ends.end(), token) !=
                              tokens.ends.end();
            if (parser.mark({token, false, ends}, items)) return;
            text.remove_prefix(token.size());
            continue;
        }
        size_t size = 1;
        while (size < text.size() && !valar::detail::utf8_begins(text[size])) ++size;
        piece += text.substr(0, size);
        text.remove_prefix(size);
        if (piece.size() >= step) flush();
    }
    flush();
}
