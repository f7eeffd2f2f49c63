// Anthropic's Node client against a running server: node messages.mjs BASE_URL KEY MODEL DIALECT
// (see messages.py). Needs npm's @anthropic-ai/sdk and zod; only base URL and key are set.
import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { z } from "zod";

const [url, apiKey, model, dialect] = process.argv.slice(2);
const baseURL = url.replace(/\/v1$/, "");
const client = new Anthropic({ baseURL, apiKey, maxRetries: 0 });
const scripted = model === "fake", streams = dialect === "openai";
let checks = 0;

function check(condition, what) {
    ++checks;
    if (condition) return;
    console.error(`messages.mjs: ${what}`);
    process.exit(1);
}

async function refused(type, status, kind, call) {
    try {
        await call();
    } catch (error) {
        const what = `${error?.constructor?.name}: ${error.status} ${error.type} ${error.message}`;
        check(error instanceof type && error.status === status && error.type === kind, what);
        check(error.requestID?.length === 36, `${what}: no request id`);
        return;
    }
    check(false, `no ${type.name}`);
}

// Without what differs from one answer to the next: ids, what the cache had.
function shown({ id, usage, parsed_output, content, ...said }) {
    const tokens = usage.input_tokens + usage.cache_read_input_tokens;
    const blocks = content.map(({ id, ...block }) => block);
    return JSON.stringify({ ...said, blocks, tokens, output: usage.output_tokens });
}

// The answer, which is the same in events.
async function both(request) {
    const asked = { model, temperature: 0, seed: 7, ...request };
    const whole = await client.messages.create(asked);
    check(whole.id.startsWith("msg_") && whole.type === "message", JSON.stringify(whole));
    if (!streams) return whole;
    let text = "";
    const types = [];
    const stream = client.messages.stream(asked).on("text", (piece) => { text += piece; });
    for await (const event of stream) types.push(event.type);
    const final = await stream.finalMessage();
    check(shown(final) === shown(whole), `${shown(final)} is not ${shown(whole)}`);
    check(types[0] === "message_start" && types.at(-1) === "message_stop", types.join());
    check(text === whole.content.map((block) => block.text ?? "").join(""), text);
    return whole;
}

const hello = [{ role: "user", content: "Tell me a story of a king." }];
const whole = await both({ max_tokens: 16, messages: hello });
check(whole.content[0].type === "text" && whole.content[0].text.length > 0, "no text");
check(whole._request_id?.length === 36, "request-id");
const word = whole.content[0].text.split(/\s+/)[2];
const stopped = await both({ max_tokens: 16, messages: hello, stop_sequences: [word] });
check(stopped.stop_reason === "stop_sequence" && stopped.stop_sequence === word, shown(stopped));
await both({
    max_tokens: 8, system: [{ type: "text", text: "Be brief.", cache_control: { type: "ephemeral" } }],
    messages: [...hello, { role: "assistant", content: whole.content }, { role: "user", content: "Go on." }],
    thinking: { type: "adaptive" }, metadata: { user_id: "ann" },
});
const counted = await client.messages.countTokens({ model, messages: hello });
check(counted.input_tokens === whole.usage.input_tokens + whole.usage.cache_read_input_tokens, "count");

if (!scripted) {
    const Guest = z.object({ name: z.enum(["Ann", "Bob"]), comes: z.boolean() });
    const asked = { model, max_tokens: 200, output_config: { format: zodOutputFormat(Guest) },
                    messages: [{ role: "user", content: "Ann comes, Bob does not." }] };
    const { parsed_output } = await client.messages.parse(asked);
    check(Guest.safeParse(parsed_output).success, `not parsed: ${JSON.stringify(parsed_output)}`);
}

// a call, its result, the answer; then the client's own loop
const tool = { name: "weather", description: "Of a city.", strict: true, input_schema: {
    type: "object", properties: { city: { type: "string", maxLength: 16 } }, required: ["city"],
    additionalProperties: false } };
const question = [{ role: "user", content: "Is it cold in Oslo?" }];
const called = await both({ max_tokens: 64, messages: question, tools: [tool],
                            tool_choice: { type: "tool", name: "weather" } });
const call = called.content.find((block) => block.type === "tool_use");
check(called.stop_reason === "tool_use" && typeof call.input.city === "string", shown(called));
const final = await both({
    max_tokens: 8, tools: [tool], tool_choice: { type: "none" },
    messages: [...question, { role: "assistant", content: called.content },
               { role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "12 C" }] }],
});
check(final.content.every((block) => block.type === "text"), shown(final));
const cities = [];
const weather = {
    ...betaZodTool({
        name: "weather", description: "Of a city.", inputSchema: z.object({ city: z.enum(["Oslo", "Paris"]) }),
        run: ({ city }) => { cities.push(city); return `It rains in ${city}.`; },
    }),
    strict: true,
};
const loop = client.beta.messages.toolRunner({
    model, max_tokens: 64, messages: question, tools: [weather], max_iterations: 2, stream: streams,
    ...(scripted ? {} : { tool_choice: { type: "tool", name: "weather" } }),
});
let turns = 0;
for await (const turn of loop) {
    if (streams) await turn.finalMessage();
    ++turns;
}
check(turns === 2 && cities.length > 0, `${turns} turns, ${cities}`);

const stranger = new Anthropic({ baseURL, apiKey: "sk-not-a-key-of-this-server", maxRetries: 0 });
const fine = { model, max_tokens: 4, messages: hello };
await refused(Anthropic.AuthenticationError, 401, "authentication_error",
              () => stranger.messages.create(fine));
await refused(Anthropic.NotFoundError, 404, "not_found_error",
              () => client.messages.create({ ...fine, model: "no/such-model" }));
for (const fault of [{ max_tokens: 0 }, { messages: [] }, { temperature: 3 }, { system: 7 }])
    await refused(Anthropic.BadRequestError, 400, "invalid_request_error",
                  () => client.messages.create({ ...fine, ...fault }));

console.log(`messages.mjs: ${checks} checks passed in the ${dialect} dialect`);
