// extract: what a text says, as the fields of a struct. The answer is held to a schema while it is
// decoded: it always parses, and every field is there and of its type, however small the model is.
//
//     c++ -std=c++20 -O2 -pthread -I. examples/extract.cpp -o extract && ./extract
#ifndef VALAR_LINKED  // set where a library brings the implementation
#define VALAR_IMPLEMENTATION
#endif
#include "valar.hpp"

#include "common.hpp"

namespace {

using valar::Json;

struct Order {
    std::string customer, dish, size;
    int64_t pieces = 0;
    bool urgent = false;
};

// A row a field: what the model must write, and where it goes.
struct Field {
    const char* name;
    const char* schema;
    void (*read)(Order&, const Json&);
};
constexpr Field fields[] = {
    {"customer", R"({"type": "string", "description": "who orders", "maxLength": 40})",
     [](Order& order, const Json& value) { order.customer = value.as_string(); }},
    {"dish", R"({"type": "string", "maxLength": 40})",
     [](Order& order, const Json& value) { order.dish = value.as_string(); }},
    {"size", R"({"enum": ["small", "medium", "large"]})",
     [](Order& order, const Json& value) { order.size = value.as_string(); }},
    {"pieces", R"({"type": "integer", "minimum": 1, "maximum": 99})",
     [](Order& order, const Json& value) { order.pieces = value.as_int(); }},
    {"urgent", R"({"type": "boolean"})",
     [](Order& order, const Json& value) { order.urgent = value.as_bool(); }},
};

valar::Result<Json> order_schema() {
    Json properties = Json::object(), required = Json::array();
    for (const Field& field : fields) {
        auto schema = Json::parse(field.schema);
        if (!schema) return schema.error();
        properties.set(field.name, std::move(*schema));
        required.push(field.name);
    }
    return Json::object()
        .set("type", "object")
        .set("properties", std::move(properties))
        .set("required", std::move(required))
        .set("additionalProperties", false);
}

valar::Result<Order> read_order(valar::Engine& engine, const std::string& text) {
    auto schema = order_schema();
    if (!schema) return schema.error();
    valar::Reply reply = engine.submit({.instructions = "Put the order into JSON.",
                                        .input = text,
                                        .max_output_tokens = 200,
                                        .temperature = 0,
                                        .format = {.schema = *schema, .name = "order"}});
    if (auto worked = engine.step(); !worked) return worked.error();
    const valar::Outcome& outcome = reply.outcome();
    if (outcome.error) return *outcome.error;
    auto json = Json::parse(outcome.text);  // fails only where max_output_tokens cut it
    if (!json) return json.error();
    Order order;
    for (const Field& field : fields) field.read(order, (*json)[field.name]);
    return order;
}

}  // namespace

int main(int argc, char** argv) {
    valar::EngineOptions options;
    std::string text =
        "Hi, this is Martha from Mill Street. Could we have three large pizzas with olives? "
        "Please hurry, the children are hungry!";
    example::Flags flags("extract", "Reads an order for a meal into the fields of a struct.");
    flags.add_word("[TEXT]", &text);
    example::add_model_flags(flags, options);
    if (auto exit_code = flags.parse(argc, argv)) return *exit_code;

    auto engine = example::open_engine(options);
    if (!engine) return flags.fail(engine.error());
    const auto order = read_order(*engine, text);
    if (!order) return example::fail(order.error().message);
    std::printf("customer: %s\n%d x %s, %s%s\n", order->customer.c_str(),
                static_cast<int>(order->pieces), order->dish.c_str(), order->size.c_str(),
                order->urgent ? ", urgent" : "");
    return 0;
}
