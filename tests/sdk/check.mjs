// The official Node client against a running server: node check.mjs BASE_URL KEY MODEL
// (see check.py). Needs npm's openai; only base URL and key are set.
import OpenAI from "openai";

const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey });
let checks = 0;

function check(condition, what) {
    ++checks;
    if (condition) return;
    console.error(`check.mjs: ${what}`);
    process.exit(1);
}

async function refused(type, status, code, param, call) {
    try {
        await call();
    } catch (error) {
        const what = `${error?.constructor?.name}: ${error.status} ${error.code} ${error.param}`;
        check(error instanceof type, `${what}: not a ${type.name}`);
        check(error.status === status && error.code === code, what);
        check((error.param ?? null) === param, what);
        check(error.requestID?.length === 36, `${what}: no request id`);
        return;
    }
    check(false, `no ${type.name} for ${code} ${param}`);
}

const listed = [];
for await (const entry of client.models.list()) listed.push(entry.id);
check(listed.includes(model), `${model} is not among ${listed}`);
for (const name of listed)
    check((await client.models.retrieve(name)).id === name, `models.retrieve(${name})`);

const response =
    await client.responses.create({ model, input: "Say hello.", max_output_tokens: 12 });
check(response.status === "completed", response.status);
check(response.output_text.length > 0, "no text");
check(response._request_id?.length === 36, "X-Request-ID");
check(response.usage.total_tokens === response.usage.input_tokens + response.usage.output_tokens,
      "usage");
const kept = await client.responses.retrieve(response.id);
check(JSON.stringify(kept.output) === JSON.stringify(response.output), "retrieve() differs");

const again = await client.responses.create({
    model,
    input: [{ role: "user", content: "Hello." }, ...response.output,
            { role: "user", content: [{ type: "input_text", text: "Go on." }] }],
    max_output_tokens: 4,
});
check(again.status === "completed", again.status);

const stranger = new OpenAI({ baseURL, apiKey: "sk-not-a-key-of-this-server" });
await refused(OpenAI.AuthenticationError, 401, "invalid_api_key", null,
              () => stranger.models.list());
await refused(OpenAI.NotFoundError, 404, "model_not_found", "model",
              () => client.responses.create({ model: "no/such-model", input: "x" }));
await refused(OpenAI.NotFoundError, 404, "model_not_found", "model",
              () => client.models.retrieve("no/such-model"));
await refused(OpenAI.NotFoundError, 404, "not_found", null,
              () => client.responses.retrieve("resp_000000000000000000000000"));
for (const [code, param, fields] of [
    ["decimal_above_max_value", "temperature", { temperature: 3 }],
    ["integer_below_min_value", "max_output_tokens", { max_output_tokens: 0 }],
    ["invalid_type", "instructions", { instructions: 7 }],
    ["invalid_value", "input[0].role", { input: [{ role: "boss", content: "x" }] }],
    ["unsupported_parameter", "tools", { tools: [{ type: "web_search" }] }],
]) {
    await refused(OpenAI.BadRequestError, 400, code, param,
                  () => client.responses.create({ model, input: "x", ...fields }));
}
await refused(OpenAI.BadRequestError, 400, "unsupported_parameter", "Idempotency-Key",
              () => client.responses.create({ model, input: "x" },
                                            { headers: { "Idempotency-Key": "k" } }));

console.log(`check.mjs: ${checks} checks passed`);
