#include <doctest/doctest.h>

#include "base/internal.hpp"
#include "gguf_internal.hpp"
#include "tiny_model.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>

using namespace valar;

namespace {

using Bytes = std::vector<std::byte>;

/// A file put together by hand, so that reading is not tested against our own writer alone.
struct RawFile {
    std::string out;
    RawFile& u32(uint32_t v) { return add(&v, 4); }
    RawFile& u64(uint64_t v) { return add(&v, 8); }
    RawFile& text(std::string_view s) {
        u64(s.size());
        out += s;
        return *this;
    }
    RawFile& head(uint32_t version, uint64_t tensors, uint64_t keys) {
        out += "GGUF";
        return u32(version).u64(tensors).u64(keys);
    }
    RawFile& key_u32(std::string_view name, uint32_t value) { return text(name).u32(4).u32(value); }
    RawFile& tensor(std::string_view name, std::vector<uint64_t> dims, uint32_t type,
                    uint64_t offset) {
        text(name).u32(static_cast<uint32_t>(dims.size()));
        for (uint64_t dim : dims) u64(dim);
        return u32(type).u64(offset);
    }
    RawFile& data(size_t n, size_t alignment = 32) {
        out.resize((out.size() + alignment - 1) / alignment * alignment);
        out.append(n, 'x');
        return *this;
    }
    std::span<const std::byte> bytes() const { return std::as_bytes(std::span(out)); }

private:
    RawFile& add(const void* v, size_t n) {
        out.append(static_cast<const char*>(v), n);
        return *this;
    }
};

std::string refusal(const RawFile& file) {
    auto gguf = Gguf::from_bytes(file.bytes(), "bad.gguf");
    if (gguf) return "opened";
    CHECK(gguf.error().message.find("bad.gguf") == 0);
    return gguf.error().message;
}

#define CHECK_REFUSED(file, fragment)                                        \
    do {                                                                     \
        const std::string message = refusal(file);                           \
        CHECK_MESSAGE(message.find(fragment) != std::string::npos, message); \
    } while (0)

/// A folder of its own for a test, gone when the test ends.
struct Folder {
    std::filesystem::path path = std::filesystem::temp_directory_path() /
                                 ("valar-gguf-" + std::to_string(detail::monotonic_ns()));
    Folder() { std::filesystem::create_directories(path); }
    ~Folder() { std::filesystem::remove_all(path); }
    std::string file(const std::string& name) const { return (path / name).string(); }
};

struct MemoryReader {
    std::span<const std::byte> bytes;
    uint64_t calls = 0;
    uint64_t fail_at = UINT64_MAX;
    static bool read(void* context, uint64_t offset, void* dst, size_t size) {
        auto& self = *static_cast<MemoryReader*>(context);
        if (self.calls++ >= self.fail_at) return false;
        REQUIRE(offset + size <= self.bytes.size());
        std::memcpy(dst, self.bytes.data() + offset, size);
        return true;
    }
    GgufReader reader() { return {read, this, bytes.size(), "archive/model"}; }
};

Bytes every_kind_of_key() {
    GgufWriter writer;
    writer.set<uint8_t>("u8", 200);
    writer.set<int8_t>("i8", -100);
    writer.set<uint16_t>("u16", 60000);
    writer.set<int16_t>("i16", -30000);
    writer.set<uint32_t>("u32", 4000000000u);
    writer.set<int32_t>("i32", 2000000000);
    writer.set<uint64_t>("u64", std::numeric_limits<uint64_t>::max());
    writer.set<int64_t>("i64", -5);
    writer.set("f32", 1.5f);
    writer.set("f64", -0.1);
    writer.set("yes", true);
    writer.set("no", false);
    writer.set_string("text", std::string_view("a\0b\xff", 4));
    writer.set_string("empty", "");
    const std::vector<std::string_view> words = {"one", "", "three"};
    writer.set_strings("words", words);
    writer.set_strings("none", {});
    const std::vector<int16_t> shorts = {-1, 0, 32767};
    writer.set_array<int16_t>("shorts", shorts);
    const std::vector<uint64_t> longs = {1, 2};
    writer.set_array<uint64_t>("longs", longs);
    const std::vector<float> floats = {0.5f, -2};
    writer.set_array<float>("floats", floats);
    const std::vector<double> doubles = {0.1};
    writer.set_array<double>("doubles", doubles);
    const bool flags[] = {true, false};
    writer.set_array<bool>("flags", flags);
    auto bytes = writer.to_bytes();
    REQUIRE(bytes);
    return *bytes;
}

}  // namespace

TEST_CASE("gguf: keys of every type come back") {
    const Bytes bytes = every_kind_of_key();
    auto gguf = Gguf::from_bytes(bytes);
    REQUIRE(gguf);
    CHECK(gguf->version() == 3);
    CHECK(gguf->keys().size() == 21);
    CHECK(gguf->keys()[0].name == "u8");
    CHECK(*gguf->get_uint("u8") == 200);
    CHECK(*gguf->get_uint("u16") == 60000);
    CHECK(*gguf->get_uint("u32") == 4000000000u);
    CHECK(*gguf->get_uint("i32") == 2000000000);
    CHECK(*gguf->get_uint("u64") == std::numeric_limits<uint64_t>::max());
    CHECK(*gguf->get_float("f32") == 1.5);
    CHECK(*gguf->get_float("f64") == -0.1);
    CHECK(*gguf->get_bool("yes"));
    CHECK(!*gguf->get_bool("no"));
    CHECK(*gguf->get_string("text") == std::string_view("a\0b\xff", 4));
    CHECK(gguf->get_string("empty")->empty());

    auto words = gguf->get_strings("words");
    REQUIRE(words);
    CHECK(words->size() == 3);
    std::vector<std::string> seen;
    for (std::string_view word : *words) seen.emplace_back(word);
    CHECK(seen == std::vector<std::string>{"one", "", "three"});
    CHECK(gguf->get_strings("none")->size() == 0);
    CHECK(gguf->get_strings("none")->begin() == gguf->get_strings("none")->end());

    auto shorts = gguf->get_ints("shorts");
    REQUIRE(shorts);
    CHECK(shorts->size() == 3);
    CHECK((*shorts)[0] == -1);
    CHECK((*shorts)[2] == 32767);
    CHECK((*gguf->get_ints("flags"))[0] == 1);
    CHECK((*gguf->get_floats("floats"))[1] == -2);
    CHECK((*gguf->get_floats("doubles"))[0] == 0.1);
}

TEST_CASE("gguf: a getter says what is wrong with a key") {
    const Bytes bytes = every_kind_of_key();
    auto gguf = Gguf::from_bytes(bytes, "some.gguf");
    REQUIRE(gguf);
    auto absent = gguf->get_uint("absent");
    REQUIRE(!absent);
    CHECK(absent.error().kind == ErrorKind::not_found);
    CHECK(absent.error().message == "some.gguf: key 'absent' is missing");
    CHECK(gguf->get_uint("i8").error().message == "some.gguf: key 'i8' is negative");
    CHECK(!gguf->get_uint("i16"));
    CHECK(!gguf->get_uint("i64"));
    CHECK(gguf->get_uint("f32").error().message == "some.gguf: key 'f32' is not an integer");
    CHECK(!gguf->get_uint("shorts"));
    CHECK(!gguf->get_float("u8"));
    CHECK(!gguf->get_bool("u8"));
    CHECK(!gguf->get_string("words"));
    CHECK(!gguf->get_strings("text"));
    CHECK(!gguf->get_ints("longs"));
    CHECK(!gguf->get_floats("shorts"));
    // A fallback is for an absent key, not for a wrong one.
    CHECK(*gguf->get_uint("absent", 7) == 7);
    CHECK(*gguf->get_uint("u8", 7) == 200);
    CHECK(!gguf->get_uint("text", 7));
    CHECK(*gguf->get_float("absent", 0.5) == 0.5);
    CHECK(*gguf->get_float("f32", 0.5) == 1.5);
    CHECK(*gguf->get_bool("absent", true));
    CHECK(!*gguf->get_bool("no", true));
    CHECK(*gguf->get_string("absent", "x") == "x");
    CHECK(gguf->get_string("empty", "x")->empty());
}

TEST_CASE("gguf: the three sources give the same, and a move keeps the views") {
    const Bytes bytes = tiny::model({.n_embd = 32, .n_ff = 32});
    Folder folder;
    const std::string path = folder.file("tiny.gguf");
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
    MemoryReader memory{bytes};
    auto mapped = Gguf::open(path);
    auto borrowed = Gguf::from_bytes(bytes);
    auto fetched = Gguf::from_reader(memory.reader());
    REQUIRE(mapped);
    REQUIRE(borrowed);
    REQUIRE(fetched);
    CHECK(mapped->name() == path);
    CHECK(fetched->name() == "archive/model");
    const TensorInfo* held = mapped->find_tensor("blk.1.ffn_down.weight");
    Gguf moved = std::move(*mapped);
    CHECK(moved.find_tensor("blk.1.ffn_down.weight") == held);
    for (const TensorInfo& tensor : borrowed->tensors()) {
        auto expected = borrowed->tensor_bytes(tensor);
        REQUIRE(expected);
        for (const Gguf* source : {&moved, &*borrowed, &*fetched}) {
            const TensorInfo* found = source->find_tensor(tensor.name);
            REQUIRE(found);
            CHECK(found->offset == tensor.offset);
            Bytes copy(tensor.bytes);
            REQUIRE(source->read_tensor(*found, 0, copy));
            CHECK(std::equal(copy.begin(), copy.end(), expected->begin(), expected->end()));
            source->release(*found);
            source->release(*found, 4, 8);
        }
        auto bytes_of_map = moved.tensor_bytes(*moved.find_tensor(tensor.name));
        REQUIRE(bytes_of_map);
        CHECK(reinterpret_cast<uintptr_t>(bytes_of_map->data()) % 32 == 0);
        CHECK(std::equal(bytes_of_map->begin(), bytes_of_map->end(), expected->begin()));
    }
    CHECK(!moved.find_tensor("absent"));
    CHECK(fetched->tensor_bytes(*fetched->find_tensor("token_embd.weight")).error().kind ==
          ErrorKind::unsupported);
}

TEST_CASE("gguf: a range of a tensor is read, and nothing outside it") {
    const Bytes bytes = tiny::model({.n_embd = 32, .n_ff = 32});
    MemoryReader memory{bytes};
    auto gguf = Gguf::from_reader(memory.reader());
    REQUIRE(gguf);
    const TensorInfo& tensor = *gguf->find_tensor("output_norm.weight");
    CHECK(tensor.bytes == 128);
    Bytes piece(28);
    REQUIRE(gguf->read_tensor(tensor, 100, piece));
    CHECK(std::memcmp(piece.data(), bytes.data() + tensor.offset + 100, 28) == 0);
    CHECK(!gguf->read_tensor(tensor, 101, piece));
    CHECK(!gguf->read_tensor(tensor, UINT64_MAX, piece));
    CHECK(gguf->read_tensor(tensor, 128, {}));
    memory.fail_at = memory.calls;
    auto failed = gguf->read_tensor(tensor, 0, piece);
    REQUIRE(!failed);
    CHECK(failed.error().message == "archive/model: tensor 'output_norm.weight' could not be read");
}

TEST_CASE("gguf: a reader is asked for more until the header is whole") {
    GgufWriter writer;
    const std::string word(20, 'w');
    const std::vector<std::string_view> words(300000, word);  // 8 MB
    writer.set_strings("words", words);
    const float number = 3;
    const uint64_t dims[] = {1};
    writer.add_tensor("t", TensorType::f32, dims, std::as_bytes(std::span(&number, 1)));
    auto bytes = writer.to_bytes();
    REQUIRE(bytes);
    MemoryReader memory{*bytes};
    auto gguf = Gguf::from_reader(memory.reader());
    REQUIRE(gguf);
    CHECK(memory.calls == 3);  // 1, 4 and 16 MiB
    CHECK(gguf->get_strings("words")->size() == 300000);
    MemoryReader failing{*bytes, 0, 1};
    CHECK(!Gguf::from_reader(failing.reader()));
    MemoryReader short_file{std::span(*bytes).first(bytes->size() - 32)};
    CHECK(!Gguf::from_reader(short_file.reader()));
    CHECK(!Gguf::from_reader({nullptr, nullptr, 100}));
    MemoryReader empty{{}};
    CHECK(!Gguf::from_reader(empty.reader()));
}

TEST_CASE("gguf: versions, byte order, and what is no GGUF at all") {
    CHECK(Gguf::from_bytes(RawFile().head(2, 0, 0).bytes()));
    CHECK(Gguf::from_bytes(RawFile().head(3, 0, 0).bytes()));
    CHECK_REFUSED(RawFile().head(1, 0, 0), "GGUF version 1; only 2 and 3 are read");
    CHECK_REFUSED(RawFile().head(4, 0, 0), "version 4");
    CHECK_REFUSED(RawFile().head(0, 0, 0), "version 0");
    CHECK_REFUSED(RawFile().head(0x03000000, 0, 0), "big-endian");
    CHECK_REFUSED(RawFile().text("not a model"), "not a GGUF file");
    CHECK_REFUSED(RawFile(), "ends inside its header");
    CHECK(!Gguf::open("/no/such/model.gguf"));
}

TEST_CASE("gguf: no count or length is believed") {
    CHECK_REFUSED(RawFile().head(3, UINT64_MAX, 0), "too many tensors");
    CHECK_REFUSED(RawFile().head(3, 0, UINT64_MAX), "too many keys");
    CHECK_REFUSED(RawFile().head(3, 0, 1), "ends inside its header");
    CHECK_REFUSED(RawFile().head(3, 0, 1).u64(UINT64_MAX), "ends inside its header");
    CHECK_REFUSED(RawFile().head(3, 0, 1).text(""), "name is empty or too long");
    CHECK_REFUSED(RawFile().head(3, 0, 1).text(std::string(256, 'k')), "empty or too long");
    CHECK_REFUSED(RawFile().head(3, 0, 1).text("a\nb"), "not printable ASCII");
    CHECK_REFUSED(RawFile().head(3, 0, 1).text("k").u32(13), "key 'k' has an unknown type");
    CHECK_REFUSED(RawFile().head(3, 0, 1).text("k").u32(9).u32(9).u64(0), "array of arrays");
    CHECK_REFUSED(RawFile().head(3, 0, 1).text("k").u32(9).u32(12).u64(UINT64_MAX / 4),
                  "too many values");
    CHECK_REFUSED(RawFile().head(3, 0, 1).text("k").u32(9).u32(0).u64(UINT64_MAX),
                  "ends inside its header");
    CHECK_REFUSED(RawFile().head(3, 0, 1).text("k").u32(9).u32(8).u64(2).text("ab").u32(0),
                  "ends inside its header");
    CHECK_REFUSED(RawFile().head(3, 0, 1).text("k").u32(7).u64(2), "a bool that is not 0 or 1");
    CHECK_REFUSED(RawFile().head(3, 0, 2).key_u32("k", 1).key_u32("k", 2), "key 'k' occurs twice");
    for (uint32_t alignment : {0u, 1u, 4u, 24u, 1u << 21})
        CHECK_REFUSED(RawFile().head(3, 0, 1).key_u32("general.alignment", alignment),
                      "key 'general.alignment' is not a power of two");
}

TEST_CASE("gguf: the tensor directory is checked") {
    const auto one = [](std::vector<uint64_t> dims, uint32_t type, uint64_t offset) {
        return RawFile().head(3, 1, 0).tensor("t", std::move(dims), type, offset).data(64);
    };
    CHECK(Gguf::from_bytes(one({16}, 0, 0).bytes()));
    CHECK(Gguf::from_bytes(one({8}, 0, 32).bytes()));
    CHECK_REFUSED(one({}, 0, 0), "tensor 't' does not have 1 to 4 dimensions");
    CHECK_REFUSED(one({1, 1, 1, 1, 1}, 0, 0), "1 to 4 dimensions");
    CHECK_REFUSED(one({4, 0}, 0, 0), "has an empty dimension");
    CHECK_REFUSED(one({1, UINT64_MAX, 2}, 0, 0), "has too many values");
    CHECK_REFUSED(one({1, UINT64_MAX / 3}, 0, 0), "has too many bytes");
    CHECK_REFUSED(one({33}, 2, 0), "rows that are not whole blocks");
    CHECK_REFUSED(one({4}, 4, 0), "type that is not known");
    CHECK_REFUSED(one({4}, 0xffffffff, 0), "type that is not known");
    CHECK_REFUSED(one({4}, 0, 16), "offset that is not aligned");
    CHECK_REFUSED(one({17}, 0, 0), "tensor 't' lies outside the file");
    CHECK_REFUSED(one({9}, 0, 32), "lies outside the file");
    CHECK_REFUSED(one({4}, 0, UINT64_MAX - 31), "lies outside the file");
    CHECK_REFUSED(one({4}, 0, 1ull << 62), "lies outside the file");
    CHECK_REFUSED(RawFile().head(3, 2, 0).tensor("a", {9}, 0, 0).tensor("b", {4}, 0, 32).data(64),
                  "tensor 'b' overlaps another tensor");
    CHECK_REFUSED(RawFile().head(3, 2, 0).tensor("b", {4}, 0, 0).tensor("a", {4}, 0, 0).data(64),
                  "overlaps another tensor");
    CHECK_REFUSED(RawFile().head(3, 2, 0).tensor("a", {4}, 0, 0).tensor("a", {4}, 0, 32).data(64),
                  "tensor 'a' occurs twice");
    const RawFile wide = RawFile()
                             .head(3, 2, 1)
                             .key_u32("general.alignment", 128)
                             .tensor("a", {4}, 0, 0)
                             .tensor("b", {4}, 0, 128)
                             .data(144, 128);
    auto aligned = Gguf::from_bytes(wide.bytes());
    REQUIRE(aligned);
    CHECK(aligned->find_tensor("b")->offset % 128 == 0);
}

TEST_CASE("gguf: a file cut anywhere is refused") {
    GgufWriter writer;
    const std::vector<std::string_view> words = {"a", "bc"};
    writer.set_strings("words", words);
    writer.set("number", 1.0);
    const float values[] = {1, 2, 3};
    const uint64_t dims[] = {3, 1};
    writer.add_tensor("t", TensorType::f32, dims, std::as_bytes(std::span(values)));
    auto bytes = writer.to_bytes();
    REQUIRE(bytes);
    const TensorInfo tensor = Gguf::from_bytes(*bytes)->tensors()[0];
    const size_t end = static_cast<size_t>(tensor.offset + tensor.bytes);
    for (size_t n = 0; n < end; ++n) {
        const Bytes cut(bytes->begin(), bytes->begin() + static_cast<std::ptrdiff_t>(n));
        CHECK(!Gguf::from_bytes(cut));
        MemoryReader memory{cut};
        CHECK(!Gguf::from_reader(memory.reader()));
    }
    CHECK(Gguf::from_bytes(std::span(*bytes).first(end)));
}

TEST_CASE("gguf: split files") {
    Folder folder;
    const float values[] = {1, 2, 3, 4};
    const uint64_t dims[] = {4};
    const auto write = [&](const char* name, uint16_t number, uint16_t count, int32_t total,
                           const char* tensor) {
        GgufWriter writer;
        writer.set("split.no", number);
        writer.set("split.count", count);
        writer.set("split.tensors.count", total);
        if (number == 0) writer.set_string("general.name", "parted");
        writer.add_tensor(tensor, TensorType::f32, dims, std::as_bytes(std::span(values)));
        REQUIRE(writer.write(folder.file(name)));
    };
    const auto error_of = [&](const char* name) {
        auto gguf = Gguf::open(folder.file(name));
        return gguf ? std::string("opened") : gguf.error().message;
    };
    write("m-00001-of-00003.gguf", 0, 3, 3, "a");
    write("m-00002-of-00003.gguf", 1, 3, 3, "b");
    CHECK(error_of("m-00001-of-00003.gguf").find("m-00003-of-00003.gguf") != std::string::npos);
    write("m-00003-of-00003.gguf", 2, 3, 3, "c");
    auto gguf = Gguf::open(folder.file("m-00001-of-00003.gguf"));
    REQUIRE(gguf);
    CHECK(*gguf->get_string("general.name") == "parted");
    CHECK(gguf->tensors().size() == 3);
    CHECK(gguf->find_tensor("c")->file == 2);
    auto bytes = gguf->tensor_bytes(*gguf->find_tensor("c"));
    REQUIRE(bytes);
    CHECK(std::memcmp(bytes->data(), values, sizeof values) == 0);
    gguf->release(*gguf->find_tensor("c"));

    CHECK(error_of("m-00002-of-00003.gguf").find("open the first") != std::string::npos);
    write("other.gguf", 0, 3, 3, "a");
    CHECK(error_of("other.gguf").find("-00001-of-00003.gguf") != std::string::npos);
    write("n-00001-of-00002.gguf", 0, 2, 3, "a");
    write("n-00002-of-00002.gguf", 1, 2, 3, "b");
    CHECK(error_of("n-00001-of-00002.gguf").find("'split.tensors.count'") != std::string::npos);
    write("n-00002-of-00002.gguf", 1, 2, 3, "a");
    write("n-00001-of-00002.gguf", 0, 2, 2, "a");
    CHECK(error_of("n-00001-of-00002.gguf").find("tensor 'a' occurs twice") != std::string::npos);
    write("n-00002-of-00002.gguf", 0, 2, 2, "b");
    CHECK(error_of("n-00001-of-00002.gguf").find("another part") != std::string::npos);
    write("p-00001-of-02000.gguf", 0, 2000, 2, "a");
    CHECK(error_of("p-00001-of-02000.gguf").find("'split.count' is too large") !=
          std::string::npos);

    auto loaded = detail::read_file(folder.file("m-00001-of-00003.gguf"), 1 << 20);
    REQUIRE(loaded);
    auto alone = Gguf::from_bytes(std::as_bytes(std::span(*loaded)));
    REQUIRE(!alone);
    CHECK(alone.error().kind == ErrorKind::unsupported);
    const auto keyed = [](std::string_view key) {
        return RawFile().head(3, 0, 1).text(key).u32(5).u32(0xffffffff);  // an i32, -1
    };
    CHECK_REFUSED(keyed("split.count"), "key 'split.count' is negative");
    CHECK_REFUSED(keyed("split.no"), "key 'split.no' is negative");
}

TEST_CASE("gguf: the writer refuses what could not be read") {
    const float value = 1;
    const uint64_t dims[] = {1};
    const auto bytes = std::as_bytes(std::span(&value, 1));
    const auto error_of = [](const GgufWriter& writer) {
        auto out = writer.to_bytes();
        return out ? std::string("written") : out.error().message;
    };
    GgufWriter twice;
    twice.set("k", 1);
    twice.set("k", 2);
    CHECK(error_of(twice).find("key 'k' occurs twice") != std::string::npos);
    GgufWriter two_tensors;
    two_tensors.add_tensor("t", TensorType::f32, dims, bytes);
    two_tensors.add_tensor("t", TensorType::f32, dims, bytes);
    CHECK(error_of(two_tensors).find("tensor 't' occurs twice") != std::string::npos);
    GgufWriter longer;
    longer.add_tensor("t", TensorType::f16, dims, bytes);
    CHECK(error_of(longer).find("tensor 't' has another size") != std::string::npos);
    GgufWriter shorter;
    shorter.add_tensor("t", TensorType::f64, dims, bytes);
    shorter.add_tensor("u", TensorType::f32, dims, bytes);
    CHECK(error_of(shorter).find("tensor 't' has another size") != std::string::npos);
    CHECK(error_of(GgufWriter(24)).find("general.alignment") != std::string::npos);
    CHECK(error_of(GgufWriter(0)).find("general.alignment") != std::string::npos);
    CHECK(!twice.write("unused.gguf"));

    GgufWriter wide(64);
    wide.add_tensor("t", TensorType::f32, dims, bytes);
    wide.add_tensor("u", TensorType::f32, dims, bytes);
    auto out = wide.to_bytes();
    REQUIRE(out);
    auto gguf = Gguf::from_bytes(*out);
    REQUIRE(gguf);
    CHECK(gguf->tensors()[1].offset - gguf->tensors()[0].offset == 64);
}

TEST_CASE("gguf: packed tensors") {
    constexpr uint32_t packed_q4_0 = detail::packed_type_bit | 2;
    const auto file = [](uint32_t version, std::vector<uint64_t> dims, uint32_t type,
                         size_t bytes) {
        return RawFile()
            .head(3, 1, 1)
            .key_u32("valar.packed", version)
            .tensor("t", dims, type, 0)
            .data(bytes);
    };
    const RawFile good = file(detail::packed_version, {96, 17}, packed_q4_0, 2 * 896);
    auto gguf = Gguf::from_bytes(good.bytes());
    REQUIRE(gguf);
    const TensorInfo& tensor = gguf->tensors()[0];
    CHECK(tensor.packed);
    CHECK(tensor.type == TensorType::q4_0);
    CHECK(tensor.bytes == 2 * 896);  // two tiles of three blocks, 864 bytes, padded
    CHECK_REFUSED(file(detail::packed_version, {96, 17}, packed_q4_0, 2 * 896 - 1),
                  "lies outside the file");
    CHECK_REFUSED(file(detail::packed_version + 1, {96, 17}, packed_q4_0, 9999),
                  "not in version 1");
    CHECK_REFUSED(RawFile().head(3, 1, 0).tensor("t", {32, 1}, packed_q4_0, 0).data(999),
                  "not in version 1");
    CHECK_REFUSED(file(1, {96}, packed_q4_0, 9999), "never packed");
    CHECK_REFUSED(file(1, {96, 1, 1}, packed_q4_0, 9999), "never packed");
    CHECK_REFUSED(file(1, {256, 1}, detail::packed_type_bit | 41, 9999), "never packed");  // Q1_0
    CHECK_REFUSED(file(1, {33, 1}, packed_q4_0, 9999), "not whole blocks");
    CHECK_REFUSED(file(1, {uint64_t{1} << 58, 32}, detail::packed_type_bit, 9999),
                  "too many bytes");
}

TEST_CASE("gguf: the writer asks for tensors piece by piece") {
    Folder folder;
    struct Source {
        uint64_t asked = 0, fail_at = UINT64_MAX;
        static std::byte at(uint64_t i) { return static_cast<std::byte>(i * 7 + i / 251); }
        static Result<void> fill(void* context, const TensorInfo& tensor, uint64_t offset,
                                 std::span<std::byte> out) {
            auto& self = *static_cast<Source*>(context);
            CHECK(tensor.name == "big");
            CHECK(offset == self.asked);
            CHECK(offset % (16 * 96 * 4) == 0);
            CHECK(out.size() <= 4 << 20);
            if (offset >= self.fail_at) return Error{ErrorKind::io, "the source is gone"};
            for (size_t i = 0; i < out.size(); ++i) out[i] = at(offset + i);
            self.asked += out.size();
            return {};
        }
    } source;
    TensorInfo info;
    info.name = "big";
    info.n_dims = 2;
    info.dims[0] = 96;
    info.dims[1] = 25'003;
    const uint64_t bytes = 96 * 25'003 * 4;
    const auto write = [&](const std::string& path) {
        GgufWriter writer(64);
        const float one = 1;
        const uint64_t dims[] = {1};
        writer.add_tensor(info, {Source::fill, &source});
        writer.add_tensor("small", TensorType::f32, dims, std::as_bytes(std::span(&one, 1)));
        return writer.write(path);
    };
    const std::string path = folder.file("big.gguf");
    REQUIRE(write(path));
    CHECK(source.asked == bytes);
    {
        auto gguf = Gguf::open(path);
        REQUIRE(gguf);
        auto there = gguf->tensor_bytes(*gguf->find_tensor("big"));
        REQUIRE(there->size() == bytes);
        bool same = true;
        for (uint64_t i = 0; i < bytes; ++i) same &= (*there)[i] == Source::at(i);
        CHECK(same);
        CHECK(gguf->tensor_bytes(*gguf->find_tensor("small"))->size() == 4);
    }
    source = {0, 4 << 20};
    const auto failed = write(path);
    REQUIRE(!failed);
    CHECK(failed.error().message == "the source is gone");
    CHECK(Gguf::open(path));  // the file that was there is untouched, and nothing lies beside it
    const std::filesystem::directory_iterator left(folder.path);
    CHECK(std::distance(left, std::filesystem::directory_iterator()) == 1);
}

TEST_CASE("gguf: keys are copied from file to file as they are") {
    const Bytes bytes = every_kind_of_key();
    auto from = Gguf::from_bytes(bytes);
    REQUIRE(from);
    GgufWriter writer;
    for (const GgufKey& key : from->keys()) writer.set(key);
    auto copy = writer.to_bytes();
    REQUIRE(copy);
    CHECK(*copy == bytes);
}

TEST_CASE("gguf: the table of types") {
    CHECK(std::string_view(type_info(TensorType::q4_k)->name) == "Q4_K");
    CHECK(type_info(TensorType::q6_k)->block_bytes == 210);
    CHECK(!type_info(static_cast<TensorType>(4)));
    CHECK(!type_info(static_cast<TensorType>(1000)));
}

TEST_CASE("gguf: the tiny model is the same bytes everywhere") {
    // FNV-1a of the file: whoever changes tiny_model.hpp changes every constant built on it.
    uint64_t hash = 0xcbf29ce484222325u;
    for (std::byte b : tiny::model({.types = tiny::all_types()}))
        hash = (hash ^ static_cast<uint64_t>(b)) * 0x100000001b3u;
    CHECK(hash == 6014575837970047673u);
}

TEST_CASE("gguf: a real file") {
    const std::string folder = detail::environment("VALAR_MODELS");
    if (folder.empty()) {
        MESSAGE("skipped: VALAR_MODELS is not set");
        return;
    }
    auto gguf = Gguf::open(folder + "/SmolLM2-135M-Instruct.Q4_1.gguf");
    REQUIRE_MESSAGE(gguf, gguf.error().message);
    CHECK(gguf->keys().size() == 33);
    CHECK(gguf->tensors().size() == 272);
    CHECK(gguf->get_strings("tokenizer.ggml.tokens")->size() == 49152);
    CHECK(gguf->get_strings("tokenizer.ggml.merges")->size() == 48900);
    CHECK(gguf->find_tensor("token_embd.weight")->type == TensorType::q8_0);
    CHECK(gguf->find_tensor("blk.29.ffn_down.weight")->bytes == 576 * 1536 / 32 * 20);
}
