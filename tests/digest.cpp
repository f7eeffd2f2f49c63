#include <doctest/doctest.h>

#include "digest_internal.hpp"

#include <string>

using namespace valar::detail;

TEST_CASE("digest: SHA-256, FIPS 180-4 examples") {
    CHECK(sha256("").hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(sha256("abc").hex() ==
          "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq").hex() ==
          "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    CHECK(sha256(std::string(1'000'000, 'a')).hex() ==
          "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_CASE("digest: SHA-256 does not depend on how the bytes arrive") {
    std::string text;
    for (int i = 0; i < 300; ++i) text += char(i * 7);
    for (size_t length = 0; length <= 200; ++length) {
        const std::string_view part = std::string_view(text).substr(0, length);
        const Hash256 whole = sha256(part);
        for (const size_t step : {size_t(1), size_t(3), size_t(63), size_t(64), size_t(65)}) {
            Sha256 pieces;
            for (size_t i = 0; i < length; i += step) pieces.update(part.substr(i, step));
            REQUIRE(pieces.finish() == whole);
        }
    }
}

TEST_CASE("digest: HMAC-SHA256, RFC 4231") {
    CHECK(hmac_sha256(std::string(20, '\x0b'), "Hi There").hex() ==
          "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
    CHECK(hmac_sha256("Jefe", "what do ya want for nothing?").hex() ==
          "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    CHECK(hmac_sha256(std::string(20, '\xaa'), std::string(50, '\xdd')).hex() ==
          "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe");
    CHECK(hmac_sha256(std::string(131, '\xaa'),
                      "Test Using Larger Than Block-Size Key - Hash Key First")
              .hex() == "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

TEST_CASE("digest: CRC-32C, RFC 3720 appendix B.4") {
    std::string rising, falling;
    for (int i = 0; i < 32; ++i) (rising += char(i), falling += char(31 - i));
    CHECK(crc32c("", 0) == 0);
    CHECK(crc32c(std::string(32, '\0').data(), 32) == 0x8a9136aa);
    CHECK(crc32c(std::string(32, '\xff').data(), 32) == 0x62a8ab43);
    CHECK(crc32c(rising.data(), 32) == 0x46dd794e);
    CHECK(crc32c(falling.data(), 32) == 0x113fdb5c);
    CHECK(crc32c("123456789", 9) == 0xe3069283);
    CHECK(crc32c("56789", 5, crc32c("1234", 4)) == 0xe3069283);
}

TEST_CASE("digest: base64, RFC 4648 section 10, and one spelling only") {
    const std::pair<const char*, const char*> vectors[] = {{"", ""},
                                                           {"f", "Zg=="},
                                                           {"fo", "Zm8="},
                                                           {"foo", "Zm9v"},
                                                           {"foob", "Zm9vYg=="},
                                                           {"fooba", "Zm9vYmE="},
                                                           {"foobar", "Zm9vYmFy"}};
    for (const auto& [plain, coded] : vectors) {
        CHECK(base64_encode(plain) == coded);
        CHECK(*base64_decode(coded) == plain);
    }
    CHECK(base64_encode(std::string_view("\xfb\xff\x00", 3)) == "+/8A");
    for (const char* bad : {"Z", "Zg", "Zg=", "Zh==", "Zm9=", "Zg==Zg==", "=Zg=", "Z===", "====",
                            "Zm9v\n", "Zm 9v", "Zm-v", "Zm9vYmF\xff"})
        CHECK_MESSAGE(!base64_decode(bad), bad);
}

TEST_CASE("digest: hexadecimal") {
    CHECK(hex_encode("\x00\xab\xff", 3) == "00abff");
    CHECK(*hex_decode("00aBFf") == std::string("\x00\xab\xff", 3));
    CHECK(hex_decode("")->empty());
    for (const char* bad : {"0", "0g", "g0", " 00", "000"}) CHECK_MESSAGE(!hex_decode(bad), bad);
}

TEST_CASE("digest: comparison and randomness") {
    CHECK(constant_time_equal("", ""));
    CHECK(constant_time_equal("abc", "abc"));
    CHECK(!constant_time_equal("abc", "abd"));
    CHECK(!constant_time_equal("abc", "abcd"));
    std::string a(600, '\0'), b(600, '\0');
    REQUIRE(random_bytes(a.data(), a.size()));
    REQUIRE(random_bytes(b.data(), b.size()));
    CHECK(a != b);
    CHECK(a.find(std::string(8, '\0')) == std::string::npos);  // all of it was filled
}
