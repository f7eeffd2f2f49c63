// >>http as a client: which URLs and addresses may be called, and the calls.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "http/client.hpp"
#include "http/sse.hpp"
#include "http_receiver.hpp"

using namespace valar;
using namespace valar::detail;

namespace {

NetAddress address_of(const char* text) { return *NetAddress::parse(text, 80); }

std::string read(std::string_view text) {
    const auto url = http_parse_url(text);
    if (!url) return "refused: " + url.error().message;
    return std::string(url->tls ? "https " : "http ") + url->host + " " +
           std::to_string(url->port) + " " + url->target + (url->address ? " address" : "");
}

}  // namespace

TEST_CASE("urls: those that can be called") {
    static constexpr struct {
        const char *text, *found;
    } cases[] = {
        {"http://example.org", "http example.org 80 /"},
        {"HTTPS://Example.ORG/", "https example.org 443 /"},
        {"http://example.org:8080/a/b?c=d&e", "http example.org 8080 /a/b?c=d&e"},
        {"http://example.org?c=d", "http example.org 80 /?c=d"},
        {"http://example.org#part", "http example.org 80 /"},
        {"http://example.org/a#part?x", "http example.org 80 /a"},
        {"http://a-b.c_d.example:65535/%41/../x", "http a-b.c_d.example 65535 /%41/../x"},
        {"http://xn--bcher-kva.example/", "http xn--bcher-kva.example 80 /"},
        {"http://1.2.3.4.example/", "http 1.2.3.4.example 80 /"},
        {"http://localhost:3000/hook", "http localhost 3000 /hook"},
        {"http://93.184.216.34/a", "http 93.184.216.34 80 /a address"},
        {"http://[2606:2800:220:1::248]:81/a", "http [2606:2800:220:1::248] 81 /a address"},
        {"http://[2606:2800:0220:0001:0:0:0:0248]/", "http [2606:2800:220:1::248] 80 / address"},
    };
    for (const auto& one : cases) CHECK(read(one.text) == one.found);
    CHECK(http_parse_url("http://a:80")->authority() == "a");
    CHECK(http_parse_url("https://a:80")->authority() == "a:80");
    CHECK(http_parse_url("http://[::1]:81")->authority() == "[::1]:81");
    CHECK(http_parse_url("http://1.2.3.4:81")->address->text() == "1.2.3.4:81");
}

/// Each is refused by the parser, or, where it names an address, by the policy for the Internet.
TEST_CASE("urls: hostile ones") {
    static constexpr const char* cases[] = {
        // IPv4 that is not of the Internet
        "http://0.0.0.0/",
        "http://0.1.2.3/",
        "http://10.0.0.1/",
        "http://10.255.255.255/",
        "http://100.64.0.1/",
        "http://100.127.255.254/",
        "http://127.0.0.1/",
        "http://127.0.0.1:80/",
        "http://127.1.2.3/",
        "http://127.255.255.254/",
        "http://169.254.169.254/latest/meta-data/",
        "http://169.254.0.1/",
        "http://172.16.0.1/",
        "http://172.31.255.255/",
        "http://192.0.0.1/",
        "http://192.0.0.170/",
        "http://192.0.2.1/",
        "http://192.31.196.1/",
        "http://192.52.193.1/",
        "http://192.88.99.1/",
        "http://192.168.0.1/",
        "http://192.168.255.255/",
        "http://192.175.48.1/",
        "http://198.18.0.1/",
        "http://198.19.255.255/",
        "http://198.51.100.7/",
        "http://203.0.113.9/",
        "http://224.0.0.1/",
        "http://239.255.255.255/",
        "http://240.0.0.1/",
        "http://255.255.255.255/",
        // IPv6 that is not
        "http://[::]/",
        "http://[::1]/",
        "http://[::1]:8080/",
        "http://[0:0:0:0:0:0:0:1]/",
        "http://[::2]/",
        "http://[::127.0.0.1]/",
        "http://[::8.8.8.8]/",
        "http://[100::1]/",
        "http://[fc00::1]/",
        "http://[fd12:3456:789a::1]/",
        "http://[fd00:ec2::254]/",
        "http://[fe80::1]/",
        "http://[febf::1]/",
        "http://[fec0::1]/",
        "http://[ff02::1]/",
        "http://[ff0e::1]/",
        "http://[2001:db8::1]/",
        "http://[3fff::1]/",
        "http://[3fff:fff::1]/",
        "http://[2001:2::1]/",
        "http://[2001:10::1]/",
        "http://[2001:20::1]/",
        "http://[2001:1ff::1]/",
        "http://[2620:4f:8000::1]/",
        "http://[4000::1]/",
        "http://[5f00::1]/",
        "http://[1fff::1]/",
        "http://[64:ff9b:1::8.8.8.8]/",
        "http://[64:ff9b:0:1::1]/",
        // IPv4 inside IPv6
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[::ffff:10.0.0.1]/",
        "http://[::ffff:169.254.169.254]/",
        "http://[::ffff:192.168.1.1]/",
        "http://[0:0:0:0:0:ffff:7f00:1]/",
        "http://[::FFFF:0.0.0.0]/",
        "http://[::ffff:0:127.0.0.1]/",
        "http://[64:ff9b::127.0.0.1]/",
        "http://[64:ff9b::10.1.2.3]/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://[2002:7f00:1::]/",
        "http://[2002:a00:1::1]/",
        "http://[2002:a9fe:a9fe::]/",
        "http://[2002:c0a8:101::1]/",
        "http://[2001:0:4136:e378:8000:63bf:80ff:fffe]/",
        "http://[2001::f5ff:fffe]/",
        "http://[2001:0:1:2:3:4:3f57:fefe]/",
        // IPv4 in odd spellings
        "http://127.1/",
        "http://127.0.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.0.0.1/",
        "http://0X7F.1/",
        "http://0177.0.0.1/",
        "http://017700000001/",
        "http://127.0.0.01/",
        "http://127.000.000.001/",
        "http://127.0.0.1./",
        "http://256.1.1.1/",
        "http://1.2.3/",
        "http://1.2.3.4.5/",
        "http://1.2.3.0x4/",
        "http://00000010.1/",
        "http://example.7/",
        "http://example.0x7/",
        "http://\xE2\x91\xA0\xE2\x91\xA1\xE2\x91\xA6.0.0.1/",  // circled digits
        "http://\xEF\xBC\x91.1.1.1/",                          // a wide one
        "http://127\xE3\x80\x82"
        "0.0.1/",  // an ideographic full stop
        // IPv6 in odd spellings
        "http://[::1%25lo]/",
        "http://[fe80::1%eth0]/",
        "http://[v1.fe80]/",
        "http://[::1/",
        "http://::1/",
        "http://::1]/",
        "http://[[::1]]/",
        "http://[]/",
        "http://[127.0.0.1]/",
        "http://[::1]x/",
        "http://[::1].example/",
        "http://x[::1]/",
        "http://[localhost]/",
        // who would be logged in, and readers that differ
        "http://user@example.org/",
        "http://user:pass@example.org/",
        "http://example.org@127.0.0.1/",
        "http://127.0.0.1:80@example.org/",
        "http://example.org%40127.0.0.1/",
        "http://@example.org/",
        "http://example.org\\@127.0.0.1/",
        "http:\\\\example.org/",
        "http://example.org\\/",
        "http://example.org/\\x",
        "http://exa\tmple.org/",
        "http://example.org/\n",
        "http://example.org/ x",
        "http://example.org/\r\nX-Injected: 1",
        " http://example.org/",
        "http://example.org /",
        "http://ex\x01mple.org/",
        "http://example.org/\x7F",
        "http://%31%32%37.0.0.1/",
        "http://127.0.0.1%00.example.org/",
        "http://ex%61mple.org/",
        "http://b\xC3\xBC"
        "cher.example/",
        // ports and names that are none
        "http://example.org:0/",
        "http://example.org:65536/",
        "http://example.org:99999999999/",
        "http://example.org:/",
        "http://example.org:80x/",
        "http://example.org:-1/",
        "http://example.org:80:80/",
        "http://:80/",
        "http:///",
        "http://",
        "http:///example.org/",
        "http://.example.org/",
        "http://example..org/",
        "http://example.org./",
        "http://./",
        "http://exa!mple.org/",
        "http://exa*mple.org/",
        "http://aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.example/",
        // other schemes
        "",
        "/",
        "example.org",
        "//example.org/",
        "ftp://example.org/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:70/_x",
        "unix:/run/x.sock",
        "http+unix://%2Frun%2Fx/",
        "data:,x",
        "javascript:alert(1)",
        "http:example.org",
        "http:/example.org",
        "ws://example.org/",
        "httpss://example.org/",
        "http ://example.org/",
        "http\t://example.org/",
    };
    CHECK(std::size(cases) >= 120);
    const NetPolicy policy{NetPolicy::Reach::global, {}};
    for (const char* text : cases) {
        const auto url = http_parse_url(text);
        const bool called = url && !(url->address && !policy.allows(*url->address));
        if (called) FAIL_CHECK(text << " would be called: " << read(text));
    }
    CHECK_FALSE(http_parse_url("http://example.org/" + std::string(8192, 'x')));
    CHECK_FALSE(http_parse_url(std::string_view("http://example.org/\0", 20)));
    // what it says shows nothing of what it was given
    CHECK(http_parse_url("http://user:secret@x/").error().message.find("secret") ==
          std::string::npos);
}

TEST_CASE("addresses: each block at its edges") {
    static constexpr struct {
        const char* address;
        bool global;
    } cases[] = {
        {"1.0.0.0", true},
        {"9.255.255.255", true},
        {"11.0.0.0", true},
        {"100.63.255.255", true},
        {"100.128.0.0", true},
        {"126.255.255.255", true},
        {"128.0.0.0", true},
        {"169.253.255.255", true},
        {"169.255.0.0", true},
        {"172.15.255.255", true},
        {"172.32.0.0", true},
        {"191.255.255.255", true},
        {"192.0.1.0", true},
        {"192.0.3.0", true},
        {"192.167.255.255", true},
        {"192.169.0.0", true},
        {"198.17.255.255", true},
        {"198.20.0.0", true},
        {"203.0.112.255", true},
        {"203.0.114.0", true},
        {"223.255.255.255", true},
        {"224.0.0.0", false},
        {"::ffff:8.8.8.8", true},
        {"64:ff9b::8.8.8.8", true},
        {"2002:808:808::1", true},
        {"2001:0:1:2:3:4:f7f7:f7f7", true},  // 8.8.8.8, flipped
        {"2001:200::1", true},
        {"2001:db7:ffff::", true},
        {"2001:db9::", true},
        {"2620:4f:7fff::", true},
        {"2620:4f:8001::", true},
        {"2a00:1450::1", true},
        {"3ffe:ffff::", true},
        {"3fff:1000::", true},
        {"64:ff9a:ffff::8.8.8.8", false},
        {"::fffe:8.8.8.8", false},
        {"::1:ffff:8.8.8.8", false},
    };
    for (const auto& one : cases) {
        INFO(one.address);
        CHECK(net_is_global(address_of(one.address)) == one.global);
    }
}

TEST_CASE("addresses: what a policy lets through") {
    using Reach = NetPolicy::Reach;
    const auto allows = [](Reach reach, const char* address, const char* own = nullptr) {
        NetPolicy policy{reach, own ? address_of(own) : NetAddress()};
        return policy.allows(address_of(address));
    };
    CHECK(allows(Reach::any, "10.0.0.1"));
    CHECK(allows(Reach::any, "127.0.0.1", "127.0.0.1"));
    CHECK(allows(Reach::loopback, "127.0.0.1"));
    CHECK(allows(Reach::loopback, "::1"));
    CHECK_FALSE(allows(Reach::loopback, "0.0.0.0"));
    CHECK_FALSE(allows(Reach::loopback, "10.0.0.1"));
    CHECK_FALSE(allows(Reach::loopback, "8.8.8.8"));
    CHECK(allows(Reach::global, "8.8.8.8"));
    CHECK_FALSE(allows(Reach::global, "127.0.0.1"));
    // its own listener, by whatever address
    CHECK_FALSE(allows(Reach::loopback, "127.0.0.1", "127.0.0.1"));
    CHECK_FALSE(allows(Reach::loopback, "::ffff:127.0.0.1", "127.0.0.1"));
    CHECK(allows(Reach::loopback, "127.0.0.2", "127.0.0.1"));
    CHECK_FALSE(allows(Reach::loopback, "127.0.0.2", "0.0.0.0"));
    CHECK_FALSE(allows(Reach::global, "8.8.8.8", "8.8.8.8"));
    CHECK(allows(Reach::global, "8.8.8.8", "0.0.0.0"));
    NetPolicy other{Reach::loopback, address_of("127.0.0.1")};
    other.own.port = 81;
    CHECK(other.allows(address_of("127.0.0.1")));
}

TEST_CASE("names are resolved by the system") {
    const auto found = net_resolve("localhost", 81);
    REQUIRE(found);
    for (const NetAddress& address : *found) {
        CHECK(address.is_loopback());
        CHECK(address.port == 81);
    }
    CHECK(net_resolve("no-such-name.invalid", 80).error().kind == ErrorKind::io);
}

// -- calls ------------------------------------------------------------------------------------

namespace {

std::atomic<int> resolved = 0;

/// "a.b.c" has the addresses of a, b and c.
Result<std::vector<NetAddress>> resolve(const std::string& name, uint16_t port) {
    ++resolved;
    static const std::map<std::string, const char*> known = {
        {"loopback", "127.0.0.1"},      {"nobody", "127.0.0.9"},         {"private", "10.0.0.1"},
        {"mapped", "::ffff:127.0.0.1"}, {"metadata", "169.254.169.254"}, {"six", "::1"}};
    std::vector<NetAddress> addresses;
    for (std::string_view rest = name; !rest.empty();) {
        const std::string_view label = rest.substr(0, rest.find('.'));
        rest.remove_prefix(std::min(label.size() + 1, rest.size()));
        if (label == "slow") std::this_thread::sleep_for(std::chrono::milliseconds(300));
        const auto found = known.find(std::string(label));
        if (found != known.end()) addresses.push_back(*NetAddress::parse(found->second, port));
    }
    if (addresses.empty()) return make_error(ErrorKind::io, "cannot resolve '" + name + "'");
    return addresses;
}

/// Makes calls and waits for their ends.
struct Caller : HttpCaller {
    Poller poller = *Poller::open();
    std::optional<HttpClient> client;
    std::map<uint64_t, Result<HttpReply>> ended;
    Caller() { client.emplace(&poller, resolve); }
    void on_reply(uint64_t call, Result<HttpReply> reply) override {
        ended.emplace(call, std::move(reply));
    }
    std::string pieces = {};
    bool cancels = false;  // with the first piece
    void on_piece(uint64_t call, int status, std::string_view bytes) override {
        CHECK(status == 200);
        pieces += bytes;
        if (cancels) client->cancel(call);
    }
    void run(size_t calls) {
        std::vector<PollEvent> events;
        while (ended.size() < calls) {
            client->step(monotonic_ns() / 1'000'000);
            if (ended.size() >= calls) return;
            REQUIRE(poller.wait(10, &events));
            for (const PollEvent& event : events) client->on_event(event);
        }
    }
    Result<HttpReply> ask(HttpErrand errand) {
        const uint64_t call = client->start(std::move(errand), this);
        CHECK(ended.count(call) == 0);  // never from start()
        run(ended.size() + 1);
        return std::move(ended.find(call)->second);
    }
};

HttpErrand errand_to(const char* host, uint16_t port, const NetPolicy* policy = nullptr) {
    HttpErrand errand;
    errand.call.host = host;
    errand.call.port = port;
    errand.call.method = "POST";
    errand.call.body = "{}";
    errand.call.timeout_ms = 5000;
    errand.call.max_reply_bytes = 1000;
    errand.policy = policy;
    return errand;
}

constexpr const char* accepted = "HTTP/1.1 204 No Content\r\n\r\n";

}  // namespace

TEST_CASE("http client: every address of a name is judged, and a judged one is dialled") {
    Receiver receiver(accepted);
    const NetPolicy global{NetPolicy::Reach::global, {}}, loopback{NetPolicy::Reach::loopback, {}};
    Caller caller;
    for (const char* host : {"loopback", "mapped", "private.metadata", "127.0.0.1", "[::1]",
                             "[::ffff:127.0.0.1]", "six.loopback"}) {
        const auto reply = caller.ask(errand_to(host, receiver.port, &global));
        INFO(host);
        REQUIRE_FALSE(reply);
        CHECK(reply.error().kind == ErrorKind::permission);
    }
    CHECK(receiver.connections == 0);
    resolved = 0;
    CHECK(caller.ask(errand_to("private.loopback", receiver.port, &loopback))->status == 204);
    CHECK(resolved == 1);  // what was judged is what is dialled
    CHECK(receiver.connections == 1);
    NetPolicy own = loopback;
    own.own = *NetAddress::parse("127.0.0.1", receiver.port);
    CHECK(caller.ask(errand_to("loopback", receiver.port, &own)).error().kind ==
          ErrorKind::permission);
    CHECK(receiver.connections == 1);
}

TEST_CASE("http client: where one address does not answer the next is tried") {
    Receiver receiver(accepted);
    Caller caller;
    CHECK(caller.ask(errand_to("nobody.loopback", receiver.port))->status == 204);
    CHECK(caller.ask(errand_to("nobody", receiver.port)).error().kind == ErrorKind::io);
    CHECK(caller.ask(errand_to("unknown", receiver.port)).error().kind == ErrorKind::io);
}

TEST_CASE("http client: no redirect is followed") {
    Receiver other(accepted);
    Receiver receiver("HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1:" +
                      std::to_string(other.port) + "/\r\nContent-Length: 0\r\n\r\n");
    Caller caller;
    CHECK(caller.ask(errand_to("loopback", receiver.port))->status == 307);
    CHECK(other.connections == 0);
}

TEST_CASE("http client: where the head is enough its body may be too long, broken or silent") {
    const std::string big = "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" +
                            std::string(4000, 'x');
    const std::string endless = "HTTP/1.1 200 OK\r\n\r\n" + std::string(4000, 'x');
    const std::string silent = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx";
    const std::string broken = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n";
    for (const std::string& answer : {big, endless, silent, broken}) {
        Receiver receiver(answer, false);
        Caller caller;
        HttpErrand errand = errand_to("loopback", receiver.port);
        errand.call.timeout_ms = 200;
        CHECK_FALSE(caller.ask(errand));
        errand.head_is_enough = true;
        const auto reply = caller.ask(errand);
        REQUIRE(reply);
        CHECK(reply->status == 200);
        CHECK(reply->body.empty());
    }
    Receiver nothing("", false), cut("HTTP/1.1 2");
    Caller caller;
    for (const uint16_t port : {nothing.port, cut.port}) {
        HttpErrand errand = errand_to("loopback", port);
        errand.call.timeout_ms = 200;
        errand.head_is_enough = true;
        CHECK_FALSE(caller.ask(errand));
    }
}

TEST_CASE("http client: a name that takes long holds up nothing but itself") {
    Receiver receiver(accepted);
    Caller caller;
    HttpErrand slow = errand_to("slow.loopback", receiver.port);
    slow.call.timeout_ms = 50;
    const uint64_t first = caller.client->start(slow, &caller);
    const uint64_t second = caller.client->start(errand_to("127.0.0.1", receiver.port), &caller);
    caller.run(2);
    CHECK(caller.ended.at(first).error().kind == ErrorKind::timeout);
    CHECK(caller.ended.at(second)->status == 204);
    // and its addresses, which come later, are nobody's
    CHECK(caller.ask(errand_to("loopback", receiver.port))->status == 204);
    // what is under way when the client ends is dropped
    caller.client->start(errand_to("slow.loopback", receiver.port), &caller);
    caller.client->step(monotonic_ns() / 1'000'000);
    caller.client.reset();
}

TEST_CASE("http client: many calls at once") {
    Receiver receiver("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
    Caller caller;
    for (int i = 0; i < 64; ++i)
        caller.client->start(errand_to(i % 2 ? "loopback" : "127.0.0.1", receiver.port), &caller);
    caller.run(64);
    for (const auto& [call, reply] : caller.ended) {
        REQUIRE(reply);
        CHECK(reply->body == "hi");
    }
}

namespace {

HttpErrand stream_from(uint16_t port) {
    HttpErrand errand = errand_to("127.0.0.1", port);
    errand.streams = errand.keeps_alive = true;
    return errand;
}

constexpr const char* chunked =
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    "3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n";

}  // namespace

TEST_CASE("http client: a body is told of piece by piece, whatever frames it") {
    for (const char* answer :
         {chunked, "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nabcdefg",
          "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabcdefg"}) {
        Receiver receiver(answer);
        Caller caller;
        const auto reply = caller.ask(stream_from(receiver.port));
        REQUIRE(reply);
        CHECK(reply->status == 200);
        CHECK(reply->body.empty());
        CHECK(caller.pieces == "abcdefg");
    }
    // one that is cut, one that is longer than allowed in all, one that falls silent
    Receiver cut("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n");
    Caller caller;
    CHECK(caller.ask(stream_from(cut.port)).error().kind == ErrorKind::bad_data);
    CHECK(caller.pieces == "abc");
    Receiver receiver(chunked);
    HttpErrand errand = stream_from(receiver.port);
    errand.call.max_reply_bytes = 6;
    CHECK(caller.ask(errand).error().kind == ErrorKind::too_large);
    Receiver silent("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nabc", false);
    errand = stream_from(silent.port);
    errand.silence_timeout_ms = 50;
    CHECK(caller.ask(errand).error().kind == ErrorKind::timeout);
}

TEST_CASE("http client: nothing is told of a call that was cancelled") {
    Receiver receiver("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nabc", false);
    Receiver other(accepted);
    Caller caller;
    caller.cancels = true;
    const uint64_t first = caller.client->start(stream_from(receiver.port), &caller);
    const uint64_t second = caller.client->start(stream_from(receiver.port), &caller);
    caller.client->cancel(second);
    caller.client->cancel(77);
    std::vector<PollEvent> events;
    while (caller.pieces.empty()) {
        caller.client->step(monotonic_ns() / 1'000'000);
        REQUIRE(caller.poller.wait(10, &events));
        for (const PollEvent& event : events) caller.client->on_event(event);
    }
    CHECK(caller.ask(errand_to("127.0.0.1", other.port))->status == 204);
    CHECK(caller.pieces == "abc");
    CHECK(caller.ended.count(first) + caller.ended.count(second) == 0);
}

TEST_CASE("http client: a connection that is left open is used again") {
    Receiver receiver(chunked, false);
    Caller caller;
    for (int i = 0; i < 3; ++i) CHECK(caller.ask(stream_from(receiver.port))->status == 200);
    CHECK(receiver.connections == 1);
    CHECK(caller.pieces == "abcdefgabcdefgabcdefg");
    // another name, another policy: another connection
    HttpErrand errand = stream_from(receiver.port);
    errand.call.host = "loopback";
    CHECK(caller.ask(errand)->status == 200);
    CHECK(receiver.connections == 2);
    const NetPolicy loopback{NetPolicy::Reach::loopback, {}};
    errand.policy = &loopback;
    CHECK(caller.ask(errand)->status == 200);
    CHECK(receiver.connections == 3);
    CHECK(caller.ask(errand)->status == 200);
    CHECK(receiver.connections == 3);
    // two at once need two; none is left open where bytes came behind the reply
    caller.client->start(errand, &caller);
    caller.client->start(errand, &caller);
    caller.run(caller.ended.size() + 2);
    CHECK(receiver.connections == 4);
    Receiver more("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi!", false);
    for (int i = 0; i < 2; ++i) CHECK(caller.ask(stream_from(more.port))->status == 200);
    CHECK(more.connections == 2);
}

TEST_CASE("http client: where a connection was closed meanwhile another is made") {
    Receiver receiver("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");  // which closes it
    Caller caller;
    for (const char* host : {"127.0.0.1", "loopback"}) {
        HttpErrand errand = stream_from(receiver.port);
        errand.call.host = host;
        for (int i = 0; i < 20; ++i) {
            const auto reply = caller.ask(errand);
            REQUIRE(reply);
            CHECK(reply->status == 200);
            if (i % 2) std::this_thread::sleep_for(std::chrono::milliseconds(3));
        }
    }
    CHECK(receiver.connections == 40);
}

TEST_CASE("server-sent events: what is one") {
    const auto read = [](std::string_view bytes) {
        SseReader reader(100);
        std::string out;
        for (size_t used = 0; !bytes.empty(); bytes.remove_prefix(used)) {
            const auto found = reader.feed(bytes, &used);
            if (found == SseReader::Found::fault) return out + "fault";
            if (found == SseReader::Found::event)
                out.append(reader.type()).append("(").append(reader.data()).append(")");
        }
        return out;
    };
    CHECK(read("data: a\n\ndata:b\r\n\r\ndata:  c\r\r") == "(a)(b)( c)");
    CHECK(read("event: ping\ndata: 1\ndata: 2\n\ndata: 3\n\n") == "ping(1\n2)(3)");
    CHECK(read(": comment\nid: 1\nretry: 2\n\nevent: lost\n\ndata\n\ndata: cut") == "()");
    CHECK(read("\xEF\xBB\xBF"
               "data: a\n\n") == "(a)");
    CHECK(read("data: a\n\ndata: " + std::string(200, 'x')) == "(a)fault");
    CHECK(read("data: " + std::string(60, 'x') + "\ndata: " + std::string(60, 'x')) == "fault");
}
