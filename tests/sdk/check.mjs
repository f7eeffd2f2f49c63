// The official Node client against a running server: node check.mjs BASE_URL KEY MODEL
// (see check.py). Needs npm's openai and zod; only base URL and key are set.
import OpenAI from "openai";
import { zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

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
check(["completed", "incomplete"].includes(response.status), response.status);
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
check(["completed", "incomplete"].includes(again.status), again.status);

// an answer that is an instance of a schema, calls whose arguments are; a scripted model has none
const scripted = model === "fake";
if (!scripted) {
    const Guest = z.object({ name: z.string().max(12), age: z.int().min(1).max(99) });
    const Party = z.object({ day: z.enum(["friday", "saturday"]), note: z.string().max(16).nullable(),
                             guests: z.array(Guest).min(1).max(2) });
    const { output_parsed: party } = await client.responses.parse(
        { model, input: "Ann (31) comes on Friday.", text: { format: zodTextFormat(Party, "party") } });
    check(Party.safeParse(party).success, `not parsed: ${JSON.stringify(party)}`);
    const tools = [zodResponsesFunction({ name: "invite", parameters: Guest })];
    const { output } = await client.responses.parse(
        { model, input: "Bob (30) comes too.", tools, tool_choice: { type: "function", name: "invite" } });
    check(output.length === 1 && output[0].name === "invite", JSON.stringify(output));
    check(Guest.safeParse(output[0].parsed_arguments).success, output[0].arguments);
}

// two calls at once, their results, the final text
const cityTool = (name) => zodResponsesFunction({ name, parameters: z.object({ city: z.string() }) });
if (scripted) {
    const tools = [cityTool("weather"), cityTool("time")];
    const turns = [{ role: "user", content: "Oslo?" }];
    const { output } = await client.responses.parse({ model, input: turns, tools });
    const calls = output.filter((item) => item.type === "function_call");
    check(calls.map((call) => call.name).join() === "weather,time", JSON.stringify(output));
    check(calls.every((call) => call.parsed_arguments.city === "Oslo"), "parsed arguments");
    for (const { call_id } of calls)
        output.push({ type: "function_call_output", call_id, output: "fine" });
    const final = await client.responses.parse({ model, input: [...turns, ...output], tools });
    check(final.output_text.includes("fine"), JSON.stringify(final.output));
}

// Chat Completions: whole, and streamed the same
const chat = { model, messages: [{ role: "user", content: "Tell me a story." }],
               max_completion_tokens: 24, temperature: 0, seed: 7 };
const told = await client.chat.completions.create(chat);
check(told.choices[0].message.content.length > 0, "chat: no text");
let joined = "", pieces = 0, finish = null, usage = null;
for await (const chunk of await client.chat.completions.create(
    { ...chat, stream: true, stream_options: { include_usage: true } })) {
    const content = chunk.choices[0]?.delta.content ?? "";
    joined += content;
    pieces += content !== "";
    finish = chunk.choices[0]?.finish_reason ?? finish;
    usage = chunk.usage ?? usage;
}
check(joined === told.choices[0].message.content, `chat: "${joined}" streamed`);
check(scripted || pieces > 1, "chat: it came in one piece");
check(finish === told.choices[0].finish_reason, `chat: ${finish}`);
check(usage?.total_tokens === told.usage.total_tokens, `chat: ${JSON.stringify(usage)}`);
const collected = await client.chat.completions.stream(chat).finalChatCompletion();
check(collected.choices[0].message.content === joined, "chat: finalChatCompletion()");

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
    ["unsupported_value", "tools[0].type", { tools: [{ type: "file_search" }] }],
]) {
    await refused(OpenAI.BadRequestError, 400, code, param,
                  () => client.responses.create({ model, input: "x", ...fields }));
}

// the life of a response, in either dialect
const ended = (status) => !["pending", "running", "queued", "in_progress"].includes(status);
let background =
    await client.responses.create({ model, input: "Count.", background: true, max_output_tokens: 4 });
check(!ended(background.status), background.status);
for (let i = 0; i < 3000 && !ended(background.status); ++i) {
    await new Promise((done) => setTimeout(done, 20));
    background = await client.responses.retrieve(background.id);
}
check(["completed", "incomplete"].includes(background.status), background.status);
check((await client.responses.cancel(background.id)).status === background.status, "cancel");
await refused(OpenAI.BadRequestError, 400, "invalid_value", "response_id",
              () => client.responses.cancel(again.id));
const items = [];
for await (const item of client.responses.inputItems.list(again.id, { limit: 1, order: "asc" }))
    items.push(item.role);
check(items.join() === "user,assistant,user", `input items: ${items}`);
const idempotencyKey = crypto.randomUUID();
const headers = { "Idempotency-Key": idempotencyKey };
const once = { model, input: "Once.", max_output_tokens: 2 };
const first = await client.responses.create(once, { headers });
check((await client.responses.create(once, { headers })).id === first.id, "a retry is another one");
await refused(OpenAI.BadRequestError, 400, "idempotency_key_reused", null,
              () => client.responses.create({ ...once, input: "Twice." }, { headers }));
const newest = await client.get("/responses?limit=1");
check(newest.data.length === 1 && newest.has_more, "list");
await client.responses.delete(again.id);
await refused(OpenAI.NotFoundError, 404, "not_found", null,
              () => client.responses.retrieve(again.id));

console.log(`check.mjs: ${checks} checks passed`);
