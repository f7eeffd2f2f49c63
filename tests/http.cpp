// >>http and the sockets of >>base: the parser against RFC 9112, then a live server over loopback.
#include <doctest/doctest.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <ctime>
#include <map>
#include <mutex>
#include <thread>

#include "host.hpp"
#include "http/internal.hpp"
#include "http_peer.hpp"

#if !defined(_WIN32)
#include <sys/resource.h>
#endif

using namespace valar;
using namespace valar::detail;
using Side = HttpParser::Side;

namespace {

std::string whole(std::string_view bytes, Side side = Side::request, HttpLimits limits = {}) {
    return describe_http(bytes, side, limits, [](size_t left) { return left; });
}

/// Byte by byte, and in two pieces cut at every place: the same as whole.
void check_pieces(const std::string& bytes, Side side, const std::string& expected) {
    CHECK(describe_http(bytes, side, {}, [](size_t) { return size_t{1}; }) == expected);
    for (size_t cut = 1; cut < bytes.size(); ++cut) {
        bool first = true;
        const auto piece = [&](size_t left) { return std::exchange(first, false) ? cut : left; };
        const std::string found = describe_http(bytes, side, {}, piece);
        if (found != expected) FAIL_CHECK("cut at " << cut << ": " << found << " in " << bytes);
    }
}

struct Case {
    const char* bytes;
    const char* found;
};

std::string get(std::string_view fields) {
    return "GET / HTTP/1.1\r\nHost: a\r\n" + std::string(fields) + "\r\n";
}

}  // namespace

TEST_CASE("http parser: requests that are read") {
    static const Case cases[] = {
        {"GET /x HTTP/1.1\r\nHost: a\r\n\r\n", "GET /x a keep 1 fields, body=;"},
        {"GET /x?a=b%20&c HTTP/1.1\r\nhOsT:\t A.b:80 \t\r\n\r\n",
         "GET /x?a=b%20&c a.b:80 keep 1 fields, body=;"},
        {"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / a keep 1 fields, body=;"},
        {"GET / HTTP/1.9\r\nHost: a\r\n\r\n", "GET / a keep 1 fields, body=;"},
        // two in a row, the second cut short
        {"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n",
         "GET / a keep 1 fields, body=;GET /2 a keep 1 fields, body=;"},
        {"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHo",
         "GET / a keep 1 fields, body=;more"},
        // bodies by length
        {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
         "POST / a keep 2 fields, body=hello;"},
        {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 005\r\n\r\nhello",
         "POST / a keep 2 fields, body=hello;"},
        {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
         "POST / a keep 2 fields, body=;"},
        {"POST / HTTP/1.1\r\nHost: a\r\n\r\n", "POST / a keep 1 fields, body=;"},
        {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhell", "POST / a keepmore"},
        // chunked: extensions and trailers are dropped, letter case does not matter
        {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
         "POST / a keep 2 fields, body=hello;"},
        {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: CHUNKED\r\n\r\n"
         "A;x=\"y\"\r\n0123456789\r\n01 ; z\r\n!\r\n000\r\nTrailer: 1\r\nHost: b\r\n\r\n",
         "POST / a keep 2 fields, body=0123456789!;"},
        {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: "
         "chunked\r\n\r\n0000000000000001\r\nx\r\n0\r\n\r\n",
         "POST / a keep 2 fields, body=x;"},
        // a chunk's data may look like anything
        {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: "
         "chunked\r\n\r\n4\r\n\r\n0\r\r\n0\r\n\r\n",
         "POST / a keep 2 fields, body=\r\n0\r;"},
        // connection
        {"GET / HTTP/1.1\r\nHost: a\r\nConnection: x , CLOSE\r\n\r\n",
         "GET / a close 2 fields, body=;"},
        {"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\nConnection: close\r\n\r\n",
         "GET / a close 3 fields, body=;"},
        {"GET / HTTP/1.1\r\nHost: a\r\nConnection: closed\r\n\r\n",
         "GET / a keep 2 fields, body=;"},
        {"GET / HTTP/1.0\r\n\r\n", "GET /  close 0 fields, body=;"},
        {"GET / HTTP/1.0\r\nHost: a\r\nConnection: Keep-Alive\r\n\r\n",
         "GET / a keep 2 fields, body=;"},
        {"GET / HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n",
         "GET /  close 1 fields, body=;"},
        // expect, ignored in 1.0
        {"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 1\r\n\r\nx",
         "POST / a keep expect 3 fields, body=x;"},
        {"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx",
         "POST /  close 2 fields, body=x;"},
        // targets
        {"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS * a keep 1 fields, body=;"},
        {"OPTIONS http://b HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS * b keep 1 fields, body=;"},
        {"GET http://B:81/p?q HTTP/1.1\r\nHost: a\r\n\r\n", "GET /p?q b:81 keep 1 fields, body=;"},
        {"GET HTTPS://b?q HTTP/1.1\r\nHost: a\r\n\r\n", "GET /?q b keep 1 fields, body=;"},
        {"GET http://b HTTP/1.1\r\nHost: a\r\n\r\n", "GET / b keep 1 fields, body=;"},
        {"GET //x HTTP/1.1\r\nHost: a\r\n\r\n", "GET //x a keep 1 fields, body=;"},
        {"GET /[{|}] HTTP/1.1\r\nHost: a\r\n\r\n", "GET /[{|}] a keep 1 fields, body=;"},
        // hosts
        {"GET / HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n", "GET / [::1]:8080 keep 1 fields, body=;"},
        {"GET / HTTP/1.1\r\nHost: [::1]\r\n\r\n", "GET / [::1] keep 1 fields, body=;"},
        {"GET / HTTP/1.1\r\nHost: a:\r\n\r\n", "GET / a keep 1 fields, body=;"},
        // values may hold tabs and bytes over 127, and be empty
        {"GET / HTTP/1.1\r\nHost: a\r\nX:\r\nY: a\tb\xC3\xA9\r\n!#$%&'*+-.^_`|~9: z\r\n\r\n",
         "GET / a keep 4 fields, body=;"},
    };
    for (const Case& test : cases) {
        CHECK(whole(test.bytes) == test.found);
        check_pieces(test.bytes, Side::request, test.found);
    }
}

TEST_CASE("http parser: requests that are refused, never guessed") {
    const std::string chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    const std::pair<std::string, int> cases[] = {
        // the request line
        {"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400},
        {"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400},
        {"GET /  HTTP/1.1\r\nHost: a\r\n\r\n", 400},
        {"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400},
        {" GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400},
        {"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400},
        {"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400},
        {"GET /\r\n\r\n", 400},
        {"GET\r\n\r\n", 400},
        {"G(T / HTTP/1.1\r\nHost: a\r\n\r\n", 400},
        {"GET /\x80 HTTP/1.1\r\nHost: a\r\n\r\n", 400},
        {"GET /#f HTTP/1.1\r\nHost: a\r\n\r\n", 400},
        {"GET x HTTP/1.1\r\nHost: a\r\n\r\n", 400},
        {"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400},
        {"GET ftp://b/ HTTP/1.1\r\nHost: a\r\n\r\n", 400},
        {"GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n", 400},
        {"GET http://u@b/ HTTP/1.1\r\nHost: a\r\n\r\n", 400},
        {"CONNECT b:443 HTTP/1.1\r\nHost: a\r\n\r\n", 501},
        {"GET / http/1.1\r\nHost: a\r\n\r\n", 400},
        {"GET / HTTP/1.\r\nHost: a\r\n\r\n", 400},
        {"GET / HTTP/1.10\r\nHost: a\r\n\r\n", 400},
        {"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505},
        {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505},
        {"GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505},
        {"\x16\x03\x01\x02", 400},  // TLS on a plain port: at once
        // line ends and control characters
        {"GET / HTTP/1.1\nHost: a\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nHost: a\n\r\n", 400},
        {"GET / HTTP/1.1\r\nHost: a\r\n\n", 400},
        {"GET / HTTP/1.1\r\nHost: a\r\rb\r\n\r\n", 400},
        {get("X: a\rb\r\n"), 400},
        {get(std::string_view("X: a\0b\r\n", 8)), 400},
        {get("X: a\x01\r\n"), 400},
        {get("X: a\x7F\r\n"), 400},
        // header fields
        {get("X : a\r\n"), 400},
        {get("X\t: a\r\n"), 400},
        {get(": a\r\n"), 400},
        {get("X\r\n"), 400},
        {get("X Y: a\r\n"), 400},
        {get("X: a\r\n b\r\n"), 400},
        {get("X: a\r\n\tb\r\n"), 400},
        {"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400},
        // Host
        {"GET / HTTP/1.1\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nHost:\r\n\r\n", 400},
        {"GET http://b/ HTTP/1.1\r\n\r\n", 400},
        {get("Host: a\r\n"), 400},
        {"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nHost: a:x\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nHost: a:65536\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nHost: a:1:2\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nHost: ::1\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nHost: [1.2.3.4]\r\n\r\n", 400},
        {"GET / HTTP/1.1\r\nHost: [::1]x\r\n\r\n", 400},
        // Content-Length and Transfer-Encoding
        {get("Content-Length: 1\r\nContent-Length: 2\r\n"), 400},
        {get("Content-Length: 1\r\nContent-Length: 1\r\n"), 400},
        {get("Content-Length: 1, 1\r\n"), 400},
        {get("Content-Length: +1\r\n"), 400},
        {get("Content-Length: -1\r\n"), 400},
        {get("Content-Length: 0x1\r\n"), 400},
        {get("Content-Length: 1 1\r\n"), 400},
        {get("Content-Length:\r\n"), 400},
        {get("Content-Length: 18446744073709551616\r\n"), 400},
        {get("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"), 400},
        {get("Transfer-Encoding: chunked\r\nContent-Length: 1\r\n"), 400},
        {get("Transfer-Encoding: gzip, chunked\r\n"), 501},
        {get("Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"), 501},
        {get("Transfer-Encoding: chunked, chunked\r\n"), 501},
        {get("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"), 501},
        // not chunked at the end: 400 by RFC 9112, section 6.3
        {get("Transfer-Encoding: gzip\r\n"), 400},
        {get("Transfer-Encoding: identity\r\n"), 400},
        {get("Transfer-Encoding: chunked, gzip\r\n"), 400},
        {get("Transfer-Encoding: xchunked\r\n"), 400},
        {get("Transfer-Encoding: \"chunked\"\r\n"), 400},
        {get("Transfer-Encoding:\r\n"), 400},
        {"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
        // chunks
        {chunked + "\r\n", 400},
        {chunked + "x\r\n", 400},
        {chunked + "0x1\r\n", 400},
        {chunked + " 1\r\n", 400},
        {chunked + "1 \r\n", 400},
        {chunked + "-1\r\n", 400},
        {chunked + "1 1\r\n", 400},
        {chunked + "1\nx\r\n0\r\n\r\n", 400},
        {chunked + "1\r\nx\n0\r\n\r\n", 400},
        {chunked + "1\r\nxy\r\n0\r\n\r\n", 400},
        {chunked + "1\r\nx0\r\n\r\n", 400},
        {chunked + "00000000000000001\r\nx\r\n0\r\n\r\n", 400},
        {chunked + "10000000000000000\r\n", 400},
        {chunked + "FFFFFFFFFFFFFFFF\r\n", 413},
        {chunked + "2000001\r\n", 413},
        {chunked + "0\r\nX : a\r\n\r\n", 400},
        {chunked + "0\r\n folded\r\n\r\n", 400},
        {chunked + "0\r\n\r\r", 400},
        {get("Content-Length: 33554433\r\n"), 413},
        // Expect
        {get("Expect: 200-ok\r\n"), 417},
        {get("Expect: 100-continue\r\nExpect: 100-continue\r\n"), 417},
        {get("Expect:\r\n"), 417},
    };
    for (const auto& test : cases) {
        const std::string& bytes = test.first;
        const std::string found = whole(bytes);
        const std::string fault = "fault " + std::to_string(test.second);
        CAPTURE(bytes);
        REQUIRE(found.size() >= fault.size());
        CHECK(found.substr(found.size() - fault.size()) == fault);
        check_pieces(bytes, Side::request, found);
    }
}

TEST_CASE("http parser: limits hold at their edge") {
    HttpLimits limits;
    limits.max_request_line_bytes = 40;
    limits.max_head_bytes = 60;
    limits.max_headers = 3;
    limits.max_body_bytes = 10;
    const auto line = [](size_t length) {  // "GET / HTTP/1.1" is 14 bytes
        return "GET /" + std::string(length - 14, 'x') + " HTTP/1.1\r\nHost: a\r\n\r\n";
    };
    CHECK(whole(line(40), Side::request, limits).find("fault") == std::string::npos);
    CHECK(whole(line(41), Side::request, limits) == "fault 414");
    CHECK(whole(std::string(41, 'A'), Side::request, limits) == "fault 414");  // no line end needed
    const auto head = [](size_t bytes) {  // "Host: a" and "X: " take 10
        return get("X: " + std::string(bytes - 10, 'x') + "\r\n");
    };
    CHECK(whole(head(60), Side::request, limits).find("fault") == std::string::npos);
    CHECK(whole(head(61), Side::request, limits) == "fault 431");
    CHECK(whole(get("a:\r\nb:\r\n"), Side::request, limits).find("fault") == std::string::npos);
    CHECK(whole(get("a:\r\nb:\r\nc:\r\n"), Side::request, limits) == "fault 431");
    const auto length = [](int n) {
        return "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + std::to_string(n) + "\r\n\r\n" +
               std::string(static_cast<size_t>(n), 'x');
    };
    CHECK(whole(length(10), Side::request, limits).find("fault") == std::string::npos);
    CHECK(whole(length(11), Side::request, limits) == "POST / a keepfault 413");
    const std::string chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    CHECK(whole(chunked + "5\r\n12345\r\n5\r\n", Side::request, limits) == "POST / a keepmore");
    CHECK(whole(chunked + "5\r\n12345\r\n6\r\n", Side::request, limits) ==
          "POST / a keepfault 413");
    limits.max_body_bytes = 1000;
    std::string many = chunked;  // framing of honest chunks is free, extensions are not
    for (int i = 0; i < 200; ++i) many += "1\r\nx\r\n";
    CHECK(whole(many, Side::request, limits) == "POST / a keepmore");
    std::string padded = chunked;
    for (int i = 0; i < 200; ++i) padded += "1;a=b\r\nx\r\n";
    CHECK(whole(padded, Side::request, limits) == "POST / a keepfault 400");
    CHECK(whole(chunked + "0\r\na:\r\nb:\r\nc:\r\nd:\r\n", Side::request, limits) ==
          "POST / a keepfault 431");
}

TEST_CASE("http parser: replies") {
    static const Case cases[] = {
        {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "200  close 1 fields, body=hi;"},
        {"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", "200  close 1 fields, body=;"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
         "200  close 1 fields, body=hi;"},
        {"HTTP/1.0 404 Not found\r\n\r\nuntil the end", "404  close body=until the end;"},
        {"HTTP/1.1 204 No Content\r\n\r\n", "204  close 0 fields, body=;"},
        {"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx",
         "100  close 0 fields, body=;200  close 1 fields, body=x;"},
        {"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi", "200  closecut"},
        {"HTTP/1.1 2xx OK\r\n\r\n", "fault 400"},
        {"HTTP/1.1 200OK\r\n\r\n", "fault 400"},
        {"\r\nHTTP/1.1 200 OK\r\n\r\n", "fault 400"},
        {"SSH-2.0-x\r\n", "fault 400"},
    };
    for (const Case& test : cases) {
        CHECK(whole(test.bytes, Side::reply) == test.found);
        check_pieces(test.bytes, Side::reply, test.found);
    }
}

TEST_CASE("http parser: replies as servers send them, well and badly") {
    static const Case cases[] = {
        // the status line
        {"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", "200  close 1 fields, body=;"},
        {"HTTP/1.1 500 Fehler in \xC3\xA4\r\nContent-Length: 0\r\n\r\n",
         "500  close 1 fields, body=;"},
        {"HTTP/1.1 301 Moved  Permanently \r\nLocation: http://x/\r\nContent-Length: 2\r\n\r\nhi",
         "301  close 2 fields, body=hi;"},
        {"HTTP/1.1 999 odd\r\nContent-Length: 0\r\n\r\n", "999  close 1 fields, body=;"},
        {"HTTP/1.1 099 low\r\n\r\n", "fault 400"},
        {"HTTP/1.1 20 OK\r\n\r\n", "fault 400"},
        {"HTTP/1.1 2000 OK\r\n\r\n", "fault 400"},
        {"HTTP/1.1 +20 OK\r\n\r\n", "fault 400"},
        {"HTTP/1.1  200 OK\r\n\r\n", "fault 400"},
        {"HTTP/1.1\t200 OK\r\n\r\n", "fault 400"},
        {"HTTP/1.1\r\n\r\n", "fault 400"},
        {"HTTP/2 200\r\n\r\n", "fault 400"},
        {"HTTP/2.0 200 OK\r\n\r\n", "fault 400"},
        {"HTTP/0.9 200 OK\r\n\r\n", "fault 400"},
        {"HTTP/11.1 200 OK\r\n\r\n", "fault 400"},
        {"HTTP/1.01 200 OK\r\n\r\n", "fault 400"},
        {"http/1.1 200 OK\r\n\r\n", "fault 400"},
        {"RTSP/1.0 200 OK\r\n\r\n", "fault 400"},
        {"ICY 200 OK\r\n\r\n", "fault 400"},
        {"<html>no HTTP at all</html>\r\n", "fault 400"},
        {" HTTP/1.1 200 OK\r\n\r\n", "fault 400"},
        // those that have no body whatever they say
        {"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nHTTP/1.1 200 OK\r\n"
         "Content-Length: 1\r\n\r\nx",
         "204  close 1 fields, body=;200  close 1 fields, body=x;"},
        {"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nETag: \"a\"\r\n\r\n",
         "304  close 2 fields, body=;"},
        {"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n",
         "304  close 1 fields, body=;"},
        {"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Wait\r\n\r\n"
         "HTTP/1.1 200 OK\r\n\r\nall",
         "103  close 1 fields, body=;102  close 0 fields, body=;200  close body=all;"},
        // until the end of the stream
        {"HTTP/1.1 200 OK\r\n\r\n", "200  close body=;"},
        {"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\na\r\n\r\nb\0", "200  close body=a\r\n\r\nb;"},
        {"HTTP/1.1 404 Not Found\r\nServer: x\r\n\r\n<html>", "404  close body=<html>;"},
        // lengths
        {"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 201 Made\r\nContent-Length: "
         "0\r\n\r\n",
         "200  close 1 fields, body=;201  close 1 fields, body=;"},
        {"HTTP/1.1 200 OK\r\ncontent-LENGTH:2\r\n\r\nhi", "200  close 1 fields, body=hi;"},
        {"HTTP/1.1 200 OK\r\nContent-Length: 002\r\n\r\nhi", "200  close 1 fields, body=hi;"},
        {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi", "fault 400"},
        {"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nhi", "fault 400"},
        {"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nhi", "fault 400"},
        {"HTTP/1.1 200 OK\r\nContent-Length: 2 3\r\n\r\nhi", "fault 400"},
        {"HTTP/1.1 200 OK\r\nContent-Length: 0x2\r\n\r\nhi", "fault 400"},
        {"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nhi", "fault 400"},
        {"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nhi", "fault 400"},
        {"HTTP/1.1 200 OK\r\nContent-Length: 9999999999999999999\r\n\r\nhi", "200  closefault 413"},
        {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
         "fault 400"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
         "fault 400"},
        // chunks
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n",
         "200  close 1 fields, body=;"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nB\r\nhello world\r\n0005\r\n, "
         "you\r\n"
         "000\r\n\r\n",
         "200  close 1 fields, body=hello world, you;"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: "
         "chunked\r\n\r\n2;name\r\nhi\r\n1;a=b;c=\"d;\\\"e\"\r\n!\r\n"
         "0 ; last=\"yes\"\r\n\r\n",
         "200  close 1 fields, body=hi!;"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Digest\r\n\r\n2\r\nhi\r\n0\r\n"
         "Digest: abc\r\nContent-Length: 7\r\n\r\nHTTP/1.1 204 x\r\n\r\n",
         "200  close 2 fields, body=hi;204  close 0 fields, body=;"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n", "200  closecut"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n", "200  closecut"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi!\r\n0\r\n\r\n",
         "200  closefault 400"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2 \r\nhi\r\n0\r\n\r\n",
         "200  closefault 400"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n 2\r\nhi\r\n",
         "200  closefault 400"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\nhi\r\n",
         "200  closefault 400"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x2\r\nhi\r\n",
         "200  closefault 400"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2_\r\nhi\r\n",
         "200  closefault 400"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\nhi\n0\n\n",
         "200  closefault 400"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\nhi",
         "200  closefault 413"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000000\r\nhi",
         "200  closefault 400"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n folded\r\n\r\n",
         "200  closefault 400"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nhi",
         "fault 400"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\nhi", "fault 400"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "fault 501"},
        {"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "fault 400"},
        // fields
        {"HTTP/1.1 200 OK\r\nX_under-score: 1\r\nX-Empty:\r\nX-Spaces: \t a b \t "
         "\r\nContent-Length: 0\r\n\r\n",
         "200  close 4 fields, body=;"},
        {"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nContent-Length: 0\r\n\r\n",
         "200  close 3 fields, body=;"},
        {"HTTP/1.1 200 OK\r\nX: \xE4\xFF\r\nContent-Length: 0\r\n\r\n",
         "200  close 2 fields, body=;"},
        {"HTTP/1.1 200 OK\r\nX-Long: first\r\n second\r\nContent-Length: 0\r\n\r\n", "fault 400"},
        {"HTTP/1.1 200 OK\r\nX-Long: first\r\n\tsecond\r\nContent-Length: 0\r\n\r\n", "fault 400"},
        {"HTTP/1.1 200 OK\r\n Content-Length: 0\r\n\r\n", "fault 400"},
        {"HTTP/1.1 200 OK\r\nContent-Length : 0\r\n\r\n", "fault 400"},
        {"HTTP/1.1 200 OK\r\nContent Length: 0\r\n\r\n", "fault 400"},
        {"HTTP/1.1 200 OK\r\nnone\r\n\r\n", "fault 400"},
        {"HTTP/1.1 200 OK\r\n: nameless\r\n\r\n", "fault 400"},
        {"HTTP/1.1 200 OK\r\nX: a\x01z\r\n\r\n", "fault 400"},
        // ends of lines
        {"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi", "fault 400"},
        {"HTTP/1.1 200 OK\r\nContent-Length: 2\n\r\nhi", "fault 400"},
        {"HTTP/1.1 200 OK\rContent-Length: 2\r\r\n", "fault 400"},
        {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\r\n\r\nhi", "fault 400"},
        // cut short
        {"HTTP/1.1 200 O", "cut"},
        {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n", "cut"},
        {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r", "cut"},
    };
    for (const Case& test : cases) {
        INFO(test.bytes);
        CHECK(whole(test.bytes, Side::reply) == test.found);
        check_pieces(test.bytes, Side::reply, test.found);
    }
    const std::string_view ok = "HTTP/1.1 200 OK\r\n";
    const HttpLimits small = {30, 100, 3, 20};
    const auto bounded = [&](std::string_view start, std::string_view rest) {
        return whole(std::string(start) + std::string(rest), Side::reply, small);
    };
    CHECK(bounded("HTTP/1.1 200 " + std::string(30, 'O'), "\r\n\r\n") == "fault 414");
    CHECK(bounded(ok, "X: " + std::string(100, 'x') + "\r\n\r\n") == "fault 431");
    CHECK(bounded(ok, "A: 1\r\nB: 2\r\nC: 3\r\nD: 4\r\n\r\n") == "fault 431");
    CHECK(bounded(ok, "Content-Length: 20\r\n\r\n" + std::string(20, 'x')) ==
          "200  close 1 fields, body=" + std::string(20, 'x') + ";");
    CHECK(bounded(ok, "Content-Length: 21\r\n\r\n") == "200  closefault 413");
    CHECK(bounded(ok, "\r\n" + std::string(21, 'x')) == "200  closefault 413");
    const std::string_view chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    CHECK(bounded(chunked, "14\r\n" + std::string(20, 'x') + "\r\n1\r\nx") ==
          "200  closefault 413");
    CHECK(bounded(chunked, "1;" + std::string(100, 'x') + "\r\n") == "200  closefault 400");
    CHECK(bounded(chunked, "0\r\nX: " + std::string(100, 'x') + "\r\n") == "200  closefault 431");
}

TEST_CASE("net: addresses") {
    CHECK(NetAddress::parse("127.0.0.1", 80)->text() == "127.0.0.1:80");
    CHECK(NetAddress::parse("localhost", 1)->text() == "127.0.0.1:1");
    CHECK(NetAddress::parse("[::1]", 80)->text() == "[::1]:80");
    CHECK(NetAddress::parse("2001:DB8::1", 80)->host() == "2001:db8::1");
    for (const char* bad :
         {"", "a", "1.2.3", "01.2.3.4", "256.1.1.1", "[127.0.0.1]", "::g", "[::1"})
        CHECK_FALSE(NetAddress::parse(bad, 80));
    for (const char* yes : {"127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"})
        CHECK(NetAddress::parse(yes, 80)->is_loopback());
    for (const char* no : {"0.0.0.0", "::", "128.0.0.1", "::ffff:10.0.0.1", "::2"})
        CHECK_FALSE(NetAddress::parse(no, 80)->is_loopback());
}

TEST_CASE("net: a wake-up from another thread ends a wait") {
    auto poller = Poller::open();
    REQUIRE(poller);
    std::vector<PollEvent> events;
    std::thread other([&] { poller->wake(); });
    CHECK(poller->wait(-1, &events));
    other.join();
    CHECK(events.empty());
    CHECK(poller->wait(0, &events));  // it was consumed
}

// -- a live server ----------------------------------------------------------------------------

namespace {

/// Answers with what it was asked. /refuse is refused at the head, /small takes 10 bytes of body,
/// /held waits for release(), /pieces is begun and then held, everything else is answered at once.
class EchoHandler : public HttpHandler {
public:
    HttpServer* server = nullptr;

    std::optional<HttpReply> on_head(HttpRequest& request) override {
        request.tag = 7;
        if (request.target == "/refuse") return HttpReply{401, {{"X-Why", "no"}}, "refused", false};
        if (request.target == "/small") request.max_body = 10;
        return {};
    }
    void on_request(HttpRequest&& request) override {
        if (request.tag != 7) return;  // would fail every test
        const bool pieces = request.target == "/pieces";
        if (pieces) server->begin(request.exchange, {200, {{"X-Kind", "pieces"}}, "first;", false});
        const std::lock_guard<std::mutex> lock(mutex_);
        if (pieces || request.target == "/held") {
            held_.push_back(request.exchange);
            changed_.notify_all();
            return;
        }
        HttpReply reply;
        reply.headers = {
            {"X-Host", request.host}, {"X-Bad", "a\r\nX-Injected: 1"}, {"Date", "mine"}};
        reply.body = request.method + " " + request.target + " " + request.body;
        if (request.target == "/large") reply.body.assign(8 << 20, 'L');
        if (request.target == "/none") reply.status = 204;
        reply.close = request.target == "/close";
        server->reply(request.exchange, std::move(reply));
    }
    void on_closed(uint64_t exchange) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        closed_.push_back(exchange);
        changed_.notify_all();
    }
    HttpReply on_error(const detail::HttpRequest&, int status, std::string_view code,
                       std::string_view message) override {
        return {status, {{"X-Error", "1"}}, std::string(code) + ": " + std::string(message), false};
    }
    void on_sent(uint64_t exchange) override {
        ++sent;
        if (server->unsent(exchange) != 0) sent = -1000;
    }
    void on_tick() override { ++ticks; }

    uint64_t wait_held(size_t count = 1) {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait_for(lock, std::chrono::seconds(10), [&] { return held_.size() >= count; });
        return held_.size() >= count ? held_[count - 1] : 0;
    }
    size_t wait_closed(size_t count) {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait_for(lock, std::chrono::seconds(10), [&] { return closed_.size() >= count; });
        return closed_.size();
    }
    std::atomic<int> ticks = 0, sent = 0;

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<uint64_t> held_, closed_;
};

/// A server on a thread of its own, or pumped by hand.
struct LiveServer {
    explicit LiveServer(HttpOptions options = {}, bool threaded = true) {
        auto opened = HttpServer::open(options, &handler);
        if (!opened) return;
        server = std::make_unique<HttpServer>(std::move(*opened));
        handler.server = server.get();
        if (threaded)
            thread = std::thread([this] {
                while (server->step(-1)) {}
            });
    }
    ~LiveServer() { end(); }
    void end() {
        if (!thread.joinable()) return;
        server->stop();
        thread.join();
    }
    EchoHandler handler;
    std::unique_ptr<HttpServer> server;
    std::thread thread;
    uint16_t port() const { return server->port(); }
};

std::string request(std::string_view target, std::string_view fields = "",
                    std::string_view body = "", std::string_view method = "GET") {
    std::string text = std::string(method) + " " + std::string(target) + " HTTP/1.1\r\nHost: h\r\n";
    if (!body.empty()) text += "Content-Length: " + std::to_string(body.size()) + "\r\n";
    return text + std::string(fields) + "\r\n" + std::string(body);
}

std::string header(const HttpReply& reply, std::string_view name) {
    const std::string* value = find_header(reply.headers, name);
    return value ? *value : "";
}

}  // namespace

TEST_CASE("http server: keep-alive, headers, HEAD, 204, HTTP/1.0") {
    LiveServer live;
    HttpPeer peer(live.port());
    for (int i = 0; i < 3; ++i) {
        REQUIRE(peer.send(request("/a", "", "body", "POST")));
        const HttpReply reply = peer.reply();
        CHECK(reply.status == 200);
        CHECK(reply.body == "POST /a body");
        CHECK(header(reply, "content-length") == "12");
        CHECK(header(reply, "X-Host") == "h");
        CHECK(header(reply, "Connection") == "");
        CHECK(header(reply, "X-Bad") == "");  // would break out of its line
        CHECK(header(reply, "X-Injected") == "");
        CHECK(count_headers(reply.headers, "Date") == 1);
    }
    peer.send(request("/a", "", "", "HEAD") + request("/none") + request("/a"));
    const HttpReply to_head = peer.reply(true);
    CHECK(header(to_head, "Content-Length") == "8");  // as GET would have it
    const HttpReply empty = peer.reply();
    CHECK(empty.status == 204);
    CHECK(count_headers(empty.headers, "Content-Length") == 0);
    CHECK(peer.reply().body == "GET /a ");

    peer.send("GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    CHECK(header(peer.reply(), "Connection") == "keep-alive");
    peer.send("GET /a HTTP/1.0\r\n\r\n");
    CHECK(header(peer.reply(), "Connection") == "close");
    CHECK(peer.ended());
}

TEST_CASE("http server: the date is now, in English, in GMT") {
    LiveServer live;
    HttpPeer peer(live.port());
    const int64_t before = unix_time_ms() / 1000;
    peer.send(request("/"));
    const std::string date = header(peer.reply(), "Date");
    bool matches = false;
    for (int64_t second = before; second <= unix_time_ms() / 1000; ++second) {
        const std::time_t when = static_cast<std::time_t>(second);
        char text[64];
        std::strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", std::gmtime(&when));
        matches |= date == text;
    }
    CHECK_MESSAGE(matches, date);
}

TEST_CASE("http server: pipelined requests are answered in order") {
    LiveServer live;
    HttpPeer peer(live.port());
    std::string all;
    for (int i = 0; i < 2000; ++i) all += request("/" + std::to_string(i));
    REQUIRE(peer.send(all));
    for (int i = 0; i < 2000; ++i) {
        const std::string expected = "GET /" + std::to_string(i) + " ";
        if (peer.reply().body != expected) FAIL("reply " << i);
    }
    // A held one holds back those behind it.
    peer.send(request("/held") + request("/after"));
    const uint64_t held = live.handler.wait_held();
    peer.send(request("/later"));
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    live.server->reply(held, {200, {}, "first", false});
    CHECK(peer.reply().body == "first");
    CHECK(peer.reply().body == "GET /after ");
    CHECK(peer.reply().body == "GET /later ");
    live.server->reply(held, {200, {}, "twice", false});  // without effect
    live.server->reply(0, {200, {}, "nobody", false});
    peer.send(request("/last"));
    CHECK(peer.reply().body == "GET /last ");
}

TEST_CASE("http server: Connection: close ends it, and bytes after it are ignored") {
    LiveServer live;
    for (const std::string& first : {request("/a", "Connection: close\r\n"), request("/close")}) {
        HttpPeer peer(live.port());
        peer.send(first + request("/b"));
        const HttpReply reply = peer.reply();
        CHECK(reply.status == 200);
        CHECK(header(reply, "Connection") == "close");
        CHECK(peer.ended());
    }
}

TEST_CASE("http server: 100-continue only for a body that is wanted") {
    LiveServer live;
    const std::string expect = "Expect: 100-continue\r\nContent-Length: ";
    HttpPeer wanted(live.port());
    wanted.send(request("/small", expect + "10\r\n", "", "POST"));
    CHECK(wanted.reply().status == 100);
    wanted.send("0123456789");
    CHECK(wanted.reply().body == "POST /small 0123456789");
    wanted.send(request("/a", expect + "3\r\n", "", "POST") + "abc");  // sent without waiting
    const int status = wanted.reply().status;
    CHECK(status == 200);

    const std::pair<std::string, int> refused[] = {
        {request("/small", expect + "11\r\n", "", "POST"), 413},
        {request("/refuse", expect + "10\r\n", "", "POST"), 401},
        {request("/a", "Expect: x\r\nContent-Length: 1\r\n", "", "POST"), 417}};
    for (const auto& [bytes, expected] : refused) {
        HttpPeer peer(live.port());
        peer.send(bytes);
        const HttpReply reply = peer.reply();
        CHECK(reply.status == expected);
        CHECK(header(reply, "Connection") == "close");
        CHECK(peer.ended());
    }
}

TEST_CASE("http server: a refusal reaches a client that is still sending") {
    LiveServer live;
    const std::string megabytes(4 << 20, 'x');
    HttpPeer peer(live.port());
    peer.send(request("/small", "Content-Length: 4194304\r\n", "", "POST") + megabytes);
    const HttpReply reply = peer.reply();
    CHECK(reply.status == 413);
    CHECK(reply.body == "request_too_large: the body is larger than this server takes");
    HttpPeer chunks(live.port());
    chunks.send(request("/small", "Transfer-Encoding: chunked\r\n", "", "POST") +
                "5\r\n12345\r\n6\r\n");
    CHECK(chunks.reply().status == 413);  // as soon as it is clear
    CHECK(live.handler.wait_closed(2) == 2);

    HttpPeer refused(live.port());  // without a body, the connection stays
    refused.send(request("/refuse") + request("/a"));
    CHECK(refused.reply().body == "refused");
    CHECK(refused.reply().status == 200);
}

TEST_CASE("http server: malformed requests get a reply and the end") {
    LiveServer live;
    const std::pair<std::string, int> cases[] = {
        {"GET / HTTP/1.1\r\n\r\n", 400},
        {"GET / HTTP/2.0\r\n\r\n", 505},
        {"GET /" + std::string(9000, 'x'), 414},
        {"GET / HTTP/1.1\r\nHost: h\r\nX: " + std::string(17000, 'x'), 431},
        {request("/", "Transfer-Encoding: gzip, chunked\r\n"), 501}};
    for (const auto& [bytes, status] : cases) {
        HttpPeer peer(live.port());
        peer.send(bytes);
        const HttpReply reply = peer.reply();
        CHECK(reply.status == status);
        CHECK(header(reply, "X-Error") == "1");
        CHECK(reply.body.substr(0, 13) == "bad_request: ");
        CHECK(peer.ended());
    }
}

TEST_CASE("http server: large bodies both ways") {
    LiveServer live;
    HttpCall call;
    call.port = live.port();
    call.method = "POST";
    call.target = "/big";
    call.body.assign(20 << 20, 'b');
    auto reply = checked_call(call);
    REQUIRE(reply);
    CHECK(reply->body == "POST /big " + call.body);
    HttpPeer slow(live.port());  // several writes, with the next request waiting behind them
    slow.send(request("/large") + request("/a"));
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    CHECK(slow.reply().body.size() == size_t{8} << 20);
    CHECK(slow.reply().body == "GET /a ");
#if !defined(_WIN32)               // there an end of stream cannot be told from a broken connection
    slow.send(request("/large"));  // a client that ends its own side still gets what is on its way
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    slow.end();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(slow.reply().body.size() == size_t{8} << 20);
    CHECK(slow.ended());
#endif
}

#if !defined(_WIN32)
TEST_CASE("http server: signals that interrupt system calls") {
    LiveServer live;
    const Interrupts interrupts;  // the loop's thread and this one take them
    HttpCall call;
    call.port = live.port();
    call.method = "POST";
    call.target = "/big";
    call.body.assign(4 << 20, 'b');
    for (int i = 0; i < 10; ++i) {
        auto reply = checked_call(call);
        REQUIRE(reply);
        CHECK(reply->body == "POST /big " + call.body);
        HttpPeer peer(live.port());
        peer.send(request("/large") + request("/a"));
        CHECK(peer.reply().body.size() == size_t{8} << 20);
        CHECK(peer.reply().body == "GET /a ");
    }
}
#endif

TEST_CASE("http server: timeouts") {
    HttpOptions options;
    options.idle_timeout_ms = 150;
    options.header_timeout_ms = 150;
    options.body_timeout_ms = 150;
    options.write_timeout_ms = 150;
    options.linger_timeout_ms = 150;
    options.tick_ms = 20;
    LiveServer live(options);
    SUBCASE("a head that comes too slowly: 408") {
        HttpPeer peer(live.port());
        peer.send("GET / HT");
        CHECK(peer.reply().status == 408);
        CHECK(peer.ended());
    }
    SUBCASE("a body that comes too slowly: 408, and the handler hears of it") {
        HttpPeer peer(live.port());
        peer.send(request("/", "Content-Length: 10\r\n", "", "POST") + "12345");
        CHECK(peer.reply().status == 408);
        CHECK(live.handler.wait_closed(1) == 1);
    }
    SUBCASE("a body that keeps the pace may take many windows") {
        options.body_min_bytes = 5;
        LiveServer paced(options);
        HttpPeer peer(paced.port());
        peer.send(request("/", "Content-Length: 200\r\n", "", "POST"));
        for (int i = 0; i < 20; ++i) {
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            peer.send("0123456789");
        }
        CHECK(peer.reply().status == 200);
    }
    SUBCASE("an idle connection is closed without a word") {
        HttpPeer fresh(live.port()), used(live.port());
        used.send(request("/"));
        CHECK(used.reply().status == 200);
        CHECK(fresh.ended());
        CHECK(used.ended());
    }
    SUBCASE("a reply that nobody reads") {
        HttpPeer peer(live.port(), 300);
        peer.send(request("/large"));
        std::this_thread::sleep_for(std::chrono::milliseconds(600));
        CHECK(peer.reply().status == 0);  // cut short
    }
    SUBCASE("work may take long") {
        HttpPeer peer(live.port());
        peer.send(request("/held"));
        const uint64_t held = live.handler.wait_held();
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        live.server->reply(held, {200, {}, "done", false});
        CHECK(peer.reply().body == "done");
        CHECK(live.handler.ticks > 3);
    }
}

TEST_CASE("http server: a client that goes away is noticed") {
    HttpOptions options;
    options.drain_timeout_ms = 50;
    LiveServer live(options);
    {
        HttpPeer reset(live.port());
        reset.send(request("/held"));
        CHECK(live.handler.wait_held(1) != 0);
    }
    CHECK(live.handler.wait_closed(1) == 1);
    HttpPeer half(live.port());  // an end of stream counts
    half.send(request("/held"));
    CHECK(live.handler.wait_held(2) != 0);
    half.end();
    CHECK(live.handler.wait_closed(2) == 2);
    CHECK(half.ended());
    HttpPeer pipelined(live.port());  // also behind more bytes than are read ahead
    pipelined.send(request("/held") + std::string(40'000, 'x'));
    CHECK(live.handler.wait_held(3) != 0);
#if defined(__linux__)
    pipelined.end();
    CHECK(live.handler.wait_closed(3) == 3);
#endif
    {
        HttpPeer sending(live.port());
        sending.send(request("/", "Content-Length: 10\r\n", "", "POST") + "12345");
        sending.end();
        CHECK(sending.ended());
    }
    live.end();
    CHECK(live.handler.wait_closed(4) == 4);
}

namespace {

/// Calls of a begun reply, made on the loop.
struct Piece {
    HttpServer* server;
    uint64_t exchange;
    std::string bytes;
    bool last = false;
    size_t unsent = 0;
    std::atomic<bool> done = false;

    static void run(void* context) {
        Piece& piece = *static_cast<Piece*>(context);
        if (!piece.bytes.empty()) piece.server->append(piece.exchange, piece.bytes);
        if (piece.last) piece.server->end(piece.exchange);
        piece.unsent = piece.server->unsent(piece.exchange);
        piece.done = true;
    }
};

/// Waits for it; the bytes that the client has not taken yet.
size_t send_piece(HttpServer* server, uint64_t exchange, std::string bytes, bool last = false) {
    Piece piece{server, exchange, std::move(bytes), last};
    server->post(&Piece::run, &piece);
    while (!piece.done) std::this_thread::yield();
    return piece.unsent;
}

}  // namespace

TEST_CASE("http server: replies in pieces") {
    LiveServer live;
    HttpServer* server = live.server.get();
    HttpPeer peer(live.port());
    SUBCASE("chunked, and the connection goes on") {
        peer.send(request("/pieces") + request("/after"));
        const uint64_t exchange = live.handler.wait_held();
        send_piece(server, exchange, "second;");
        send_piece(server, exchange, std::string(300, 'x'));
        send_piece(server, exchange, "last", true);
        send_piece(server, exchange, "too late", true);
        const HttpReply reply = peer.reply();
        CHECK(header(reply, "X-Kind") == "pieces");
        CHECK(header(reply, "Transfer-Encoding") == "chunked");
        CHECK(header(reply, "Content-Length") == "");
        CHECK(reply.body == "first;second;" + std::string(300, 'x') + "last");
        CHECK(peer.reply().body == "GET /after ");
    }
    SUBCASE("the head leaves at once, each piece with its turn") {
        peer.send(request("/pieces"));
        const uint64_t exchange = live.handler.wait_held();
        CHECK(peer.until("first;\r\n").find("200 OK") != std::string::npos);
        send_piece(server, exchange, "second;");
        CHECK(peer.until(";\r\n") == "7\r\nsecond;\r\n");
        send_piece(server, exchange, "", true);
        CHECK(peer.until("\r\n\r\n") == "0\r\n\r\n");
    }
    SUBCASE("an old client gets the bytes alone, and the end of the stream") {
        peer.send("GET /pieces HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
        send_piece(server, live.handler.wait_held(), "last", true);
        const std::string all = peer.rest();
        CHECK(all.find("chunked") == std::string::npos);
        CHECK(all.substr(all.find("\r\n\r\n")) == "\r\n\r\nfirst;last");
    }
    SUBCASE("HEAD gets the head") {
        peer.send(request("/pieces", "", "", "HEAD"));
        send_piece(server, live.handler.wait_held(), "unseen", true);
        CHECK(header(peer.reply(true), "Transfer-Encoding") == "chunked");
        peer.send(request("/after"));
        CHECK(peer.reply().body == "GET /after ");
    }
    SUBCASE("a reply like any other does not end one that was begun") {
        peer.send(request("/pieces"));
        const uint64_t exchange = live.handler.wait_held();
        server->reply(exchange, {500, {}, "other", false});
        send_piece(server, exchange, "last", true);
        CHECK(peer.reply().body == "first;last");
    }
    SUBCASE("an end of the client's stream counts as gone") {
        peer.send(request("/pieces"));
        const uint64_t exchange = live.handler.wait_held();
        peer.end();
        CHECK(live.handler.wait_closed(1) == 1);
        CHECK(send_piece(server, exchange, "unseen", true) == 0);
    }
    CHECK(live.handler.sent == 0);  // none of them was slow
}

TEST_CASE("http server: a client that does not read the pieces") {
    HttpOptions options;
    options.write_timeout_ms = 300;
    options.linger_timeout_ms = 300;
    LiveServer live(options);
    HttpServer* server = live.server.get();
    HttpPeer peer(live.port());
    peer.send(request("/pieces"));
    const uint64_t exchange = live.handler.wait_held();
    std::string sent = "first;";
    const std::string piece(100'000, 'p');
    size_t unsent = 0;
    while (unsent < 500'000) {
        unsent = send_piece(server, exchange, piece);
        sent += piece;
    }
    SUBCASE("and then does: nothing is lost, and the handler hears that all is sent") {
        std::thread reader([&] {
            const HttpReply reply = peer.reply();
            CHECK(reply.body.size() == sent.size() + 4);
            CHECK(reply.body == sent + "last");
        });
        while (live.handler.sent == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        CHECK(live.handler.sent == 1);
        send_piece(server, exchange, "last", true);
        reader.join();
    }
    SUBCASE("reads a little now and then: that does not hold it for ever") {
        for (int i = 0; i < 400 && !peer.ended_after_some(); ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
        CHECK(live.handler.wait_closed(1) == 1);
        CHECK(live.handler.sent == 0);
    }
    SUBCASE("is closed after write_timeout_ms without progress") {
        CHECK(live.handler.wait_closed(1) == 1);
        CHECK(send_piece(server, exchange, piece) == 0);
        CHECK(peer.reply().status == 0);
        CHECK(live.handler.sent == 0);
    }
}

TEST_CASE("http server: a begun reply may be silent for long, and ends with the server") {
    HttpOptions options;
    options.write_timeout_ms = 50;
    options.idle_timeout_ms = 50;
    options.drain_timeout_ms = 5'000;
    LiveServer live(options);
    HttpPeer peer(live.port());
    peer.send(request("/pieces"));
    const uint64_t exchange = live.handler.wait_held();
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    live.server->stop();
    send_piece(live.server.get(), exchange, "last", true);
    CHECK(peer.reply().body == "first;last");
    CHECK(peer.ended());
}

TEST_CASE("http server: bodies in flight are bounded") {
    HttpOptions options;
    options.max_inflight_body_bytes = 100;
    LiveServer live(options);
    HttpPeer first(live.port());
    first.send(request("/held", "", std::string(60, 'x'), "POST"));
    const uint64_t held = live.handler.wait_held();
    HttpPeer second(live.port()), third(live.port());
    second.send(request("/a", "", std::string(60, 'x'), "POST"));
    CHECK(second.reply().status == 503);
    third.send(request("/a", "Transfer-Encoding: chunked\r\n", "", "POST") + "3c\r\n" +
               std::string(60, 'x'));
    CHECK(third.reply().status == 503);
    live.server->reply(held, {200, {}, "", false});
    CHECK(first.reply().status == 200);
    HttpPeer fourth(live.port());
    fourth.send(request("/a", "", std::string(60, 'x'), "POST"));
    CHECK(fourth.reply().status == 200);
}

TEST_CASE("http server: at max_connections an idle one makes room, else 503") {
    HttpOptions options;
    options.max_connections = 2;
    LiveServer live(options);
    HttpPeer busy(live.port()), idle(live.port());
    busy.send(request("/held"));
    const uint64_t held = live.handler.wait_held();
    idle.send(request("/a"));
    CHECK(idle.reply().status == 200);
    HttpPeer third(live.port());
    third.send(request("/held"));
    CHECK(live.handler.wait_held(2) != 0);
    CHECK(idle.ended());
    // Those that there is no room for are answered, although they may ask late, and much.
    std::vector<HttpPeer> refused;
    for (int i = 0; i < 100; ++i) REQUIRE(refused.emplace_back(live.port()).connected());
    for (HttpPeer& peer : refused) {
        peer.send(request("/a", "", std::string(100'000, 'x'), "POST"));
        const HttpReply reply = peer.reply();
        if (reply.status != 503) FAIL_CHECK("status " << reply.status);
        CHECK(header(reply, "Connection") == "close");
        peer.end();
    }
    live.server->reply(held, {200, {}, "done", false});
    CHECK(busy.reply().body == "done");
    live.server->reply(live.handler.wait_held(2), {200, {}, "", false});
    HttpPeer after(live.port());
    after.send(request("/a"));
    CHECK(after.reply().status == 200);
    live.end();
    CHECK(live.server->stats().no_room == 100);
    CHECK(live.server->stats().no_descriptor == 0);
}

TEST_CASE("http server: a thousand idle connections do not hinder a new client") {
    size_t wanted = 1000;
#if !defined(_WIN32)
    rlimit limit = {};
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = std::min<rlim_t>(limit.rlim_max, 4096);
    setrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_cur < 4096) wanted = limit.rlim_cur / 6;
#endif
    LiveServer live;
    std::vector<HttpPeer> idle;
    while (idle.size() < wanted) REQUIRE(idle.emplace_back(live.port()).connected());
    HttpPeer peer(live.port());
    peer.send(request("/a"));
    CHECK(peer.reply().body == "GET /a ");
    live.end();
    CHECK(live.server->stats().accepted == wanted + 1);
}

#if defined(__linux__)
TEST_CASE(
    "http server: with no descriptor left newcomers are told, unless an idle one makes room") {
    LiveServer live({}, false);
    HttpPeer busy(live.port()), idle(live.port());
    busy.send(request("/held"));
    idle.send(request("/a"));
    for (int i = 0; i < 20; ++i) live.server->step(10);
    const uint64_t held = live.handler.wait_held();
    CHECK(idle.reply().status == 200);
    std::vector<HttpPeer> late;
    for (int i = 0; i < 20; ++i) REQUIRE(late.emplace_back(live.port()).connected());
    // It begins before: without descriptors UBSan cannot tell that a thread's state is one.
    std::atomic<bool> begun = false, full = false;
    live.thread = std::thread([&] {
        begun = true;
        begun.notify_one();
        full.wait(false);
        while (live.server->step(-1)) {}
    });
    begun.wait(false);
    std::vector<Socket> all;
    rlimit before = {};
    getrlimit(RLIMIT_NOFILE, &before);
    const rlimit few = {512, before.rlim_max};
    setrlimit(RLIMIT_NOFILE, &few);
    for (auto one = Socket::spare(); one.ok(); one = Socket::spare())
        all.push_back(std::move(*one));
    late[0].send(request("/held"));
    for (int i = 0; i < 20; ++i) live.server->step(10);
    CHECK(idle.ended());
    full = true;
    full.notify_one();
    for (size_t i = 1; i < late.size(); ++i) {
        late[i].send(request("/a"));
        CHECK(late[i].reply().status == 503);
        CHECK(late[i].ended());
        late[i].end();
    }
    setrlimit(RLIMIT_NOFILE, &before);
    live.server->reply(held, {200, {}, "done", false});
    CHECK(busy.reply().body == "done");
    live.server->reply(live.handler.wait_held(2), {200, {}, "too", false});
    CHECK(late[0].reply().body == "too");
    HttpPeer after(live.port());
    after.send(request("/a"));
    CHECK(after.reply().status == 200);
    live.end();
    CHECK(live.server->stats().no_descriptor == 19);
    CHECK(live.server->stats().no_room == 0);
}

TEST_CASE("http server: out of descriptors it waits, without spinning, and recovers") {
    LiveServer live({}, false);
    HttpPeer first(live.port());
    {
        const NoDescriptors none;
        int turns = 0;
        const uint64_t start = monotonic_ns();
        while (monotonic_ns() - start < 250'000'000) live.server->step(1000), ++turns;
        CHECK(turns < 20);
        CHECK(live.server->stats().accepted == 0);
    }
    first.send(request("/a"));
    for (int i = 0; i < 50 && live.server->stats().requests == 0; ++i) live.server->step(100);
    live.server->step(0);
    CHECK(first.reply().body == "GET /a ");
}
#endif

TEST_CASE("http server: stop lets work finish") {
    LiveServer live;
    HttpPeer idle(live.port()), working(live.port());
    working.send(request("/held"));
    const uint64_t held = live.handler.wait_held();
    live.server->stop();
    CHECK(idle.ended());
    HttpPeer late(live.port());
    CHECK_FALSE(late.connected());
    live.server->reply(held, {200, {}, "finished", false});
    const HttpReply reply = working.reply();
    CHECK(reply.body == "finished");
    CHECK(header(reply, "Connection") == "close");
    CHECK(working.ended());
    working.end();
    live.thread.join();
    CHECK_FALSE(live.server->step(0));
}

TEST_CASE("http server: stop does not wait for ever") {
    HttpOptions options;
    options.drain_timeout_ms = 50;
    LiveServer live(options);
    HttpPeer peer(live.port());
    peer.send(request("/held"));
    live.handler.wait_held();
    live.end();
    CHECK(live.handler.wait_closed(1) == 1);
    CHECK(peer.ended());
}

TEST_CASE("http server: pumped by hand, posted calls run on the loop") {
    LiveServer live({}, false);
    int calls = 0;
    live.server->post([](void* context) { ++*static_cast<int*>(context); }, &calls);
    CHECK(calls == 0);
    CHECK(live.server->step(0));
    CHECK(calls == 1);
    live.server->stop();
    CHECK_FALSE(live.server->step(-1));
}

TEST_CASE("http server: replies from many threads") {
    LiveServer live;
    std::vector<std::thread> threads;
    std::atomic<int> right = 0;
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([&] {
            HttpPeer peer(live.port());
            for (int i = 0; i < 50; ++i) {
                peer.send(request("/held"));
                right += peer.reply().body == "ok";
            }
        });
    for (size_t i = 1; i <= 200; ++i)
        live.server->reply(live.handler.wait_held(i), {200, {}, "ok", false});
    for (std::thread& thread : threads) thread.join();
    CHECK(right == 200);
}

TEST_CASE("http server: over IPv6, alone and with IPv4") {
    HttpOptions options;
    for (const char* host : {"::1", "::"}) {
        options.host = host;
        LiveServer live(options);
        if (!live.server) {
            MESSAGE("skipped: no IPv6 here");
            return;
        }
        HttpCall call;
        call.host = "[::1]";
        call.port = live.port();
        auto reply = checked_call(call);
        REQUIRE(reply);
        CHECK(header(*reply, "X-Host") == "[::1]:" + std::to_string(live.port()));
        if (options.host == "::") CHECK(HttpPeer(live.port()).connected());
    }
}

TEST_CASE("http server: options that cannot work are errors") {
    EchoHandler handler;
    LiveServer live;
    HttpOptions taken, nowhere, none;
    taken.port = live.port();
    nowhere.host = "example.org";
    none.max_connections = 0;
    for (const HttpOptions& options : {taken, nowhere, none})
        CHECK_FALSE(HttpServer::open(options, &handler));
}

// -- the client -------------------------------------------------------------------------------

namespace {

/// Accepts one connection, reads a head, answers with the bytes given, closes.
struct ScriptedServer {
    explicit ScriptedServer(std::string answer)
        : listener(*Socket::listen(*NetAddress::parse("127.0.0.1", 0), 4)) {
        port = listener.local()->port;
        thread = std::thread([this, answer] {
            Socket client;
            NetAddress peer;
            while (listener.accept(&client, &peer) != IoStatus::done) pause_a_little();
            std::string head;
            char bytes[4096];
            while (head.find("\r\n\r\n") == head.npos) {
                const IoResult got = client.read(bytes, sizeof bytes);
                if (got.status == IoStatus::closed) return;
                head.append(bytes, got.bytes);
                pause_a_little();
            }
            (void)client.write(answer);
            if (answer.empty())
                while (client.read(bytes, sizeof bytes).status != IoStatus::closed)
                    pause_a_little();
        });
    }
    ~ScriptedServer() { thread.join(); }
    static void pause_a_little() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }
    Socket listener;
    uint16_t port = 0;
    std::thread thread;
};

Result<HttpReply> ask(uint16_t port, int timeout_ms = 10'000, uint64_t limit = 1000) {
    HttpCall call;
    call.port = port;
    call.timeout_ms = timeout_ms;
    call.max_reply_bytes = limit;
    return checked_call(call);
}

}  // namespace

TEST_CASE("http client: each way a reply can end") {
    static const Case cases[] = {
        {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "hi"},
        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nh\r\n1\r\ni\r\n0\r\n\r\n",
         "hi"},
        {"HTTP/1.0 200 OK\r\n\r\nhi", "hi"},
        {"HTTP/1.1 102 Wait\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "hi"},
    };
    for (const Case& test : cases) {
        ScriptedServer server(test.bytes);
        auto reply = ask(server.port);
        REQUIRE(reply);
        CHECK(reply->status == 200);
        CHECK(reply->body == test.found);
    }
}

TEST_CASE("http client: failures are errors of their own kind") {
    const auto kind = [](const char* answer, int timeout_ms = 10'000) {
        ScriptedServer server(answer);
        auto reply = ask(server.port, timeout_ms);
        return reply ? ErrorKind::internal : reply.error().kind;
    };
    CHECK(kind("", 50) == ErrorKind::timeout);
    CHECK(kind("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi") == ErrorKind::bad_data);
    CHECK(kind("nonsense\r\n") == ErrorKind::bad_data);
    CHECK(kind("HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n") == ErrorKind::too_large);
    uint16_t free_port = 0;
    {
        auto listener = Socket::listen(*NetAddress::parse("127.0.0.1", 0), 1);
        free_port = listener->local()->port;
    }
    auto refused = ask(free_port);
    REQUIRE_FALSE(refused);
    CHECK(refused.error().kind == ErrorKind::io);
    HttpCall call;
    call.target = "/a b";
    CHECK(checked_call(call).error().kind == ErrorKind::invalid_request);
    call.target = "/";
    call.headers = {{"X", "a\r\nY: b"}};
    CHECK(checked_call(call).error().kind == ErrorKind::invalid_request);
    call.headers = {};
    call.host = "nowhere";
    CHECK(checked_call(call).error().kind == ErrorKind::invalid_request);
}
