// Node clients, as they come, against a running server: node clients.mjs BASE_URL KEY MODEL [CLIENT...]
// A tour a client (see clients.py); CLIENT is a function's name below. A client whose package is missing
// is skipped. Run by hand, in a folder with the packages:
//
//     npm install ai @ai-sdk/openai @ai-sdk/openai-compatible @ai-sdk/open-responses @openai/agents \
//         @langchain/openai @langchain/core zod
//     cp .../tests/sdk/clients.mjs . && node clients.mjs http://127.0.0.1:8080/v1 $KEY qwen
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { z } from "zod";

const [baseURL, apiKey, model, ...wanted] = process.argv.slice(2);
const short = "What is the capital of France?";  // its answer ends by itself
const question = "Is it cold in Oslo?";
const Guest = z.object({ name: z.enum(["Ann", "Bob"]), comes: z.boolean() });
const City = z.object({ city: z.enum(["Oslo", "Paris"]) });

function check(condition, what) {
    if (!condition) throw new Error(typeof what === "string" ? what : JSON.stringify(what));
}

async function all(stream) {
    const pieces = [];
    for await (const piece of stream) pieces.push(piece);
    return pieces;
}

// The AI SDK with one of its providers: a text, a stream, objects, a loop of tools, the turn after it.
async function aiSdk(remote, { showsInput = true } = {}) {
    const { generateText, streamText, tool, stepCountIs, Output } = await import("ai");
    const asked = { model: remote, temperature: 0, maxOutputTokens: 100, maxRetries: 0 };
    const first = await generateText({ ...asked, system: "Be brief.", prompt: short });
    check(first.text && first.finishReason === "stop" && first.usage.outputTokens > 0, first);
    const stream = streamText({ ...asked, system: "Be brief.", prompt: short });
    const pieces = await all(stream.textStream);
    check(pieces.length > 3 && pieces.join("") === first.text, pieces);
    check((await stream.usage).outputTokens === first.usage.outputTokens, await stream.usage);
    check((await stream.finishReason) === "stop", await stream.finishReason);
    const output = Output.object({ schema: Guest });
    const held = await generateText({ ...asked, output, prompt: "Ann comes." });
    Guest.parse(held.output);
    const parts = streamText({ ...asked, output, prompt: "Ann comes." });
    const last = (await all(parts.partialOutputStream)).at(-1);
    check(JSON.stringify(last) === JSON.stringify(held.output), last);
    const calls = [];
    const weather = tool({ description: "The weather in a city.", inputSchema: City,
        execute: async ({ city }) => { calls.push(city); return `It rains in ${city}.`; } });
    const looping = { ...asked, tools: { weather }, stopWhen: stepCountIs(2),
        prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }) };
    const looped = await generateText({ ...looping, prompt: question });
    check(calls.length >= 1 && looped.steps.length === 2 && looped.text, looped.steps);
    const events = await all(streamText({ ...looping, prompt: question }).fullStream);
    const types = events.map((event) => event.type);
    const inputs = showsInput ? ["tool-input-start", "tool-input-delta"] : [];
    for (const type of [...inputs, "tool-call", "tool-result", "text-delta", "finish"])
        check(types.includes(type), `no ${type}: ${types}`);
    check(!types.includes("error"), events.find((event) => event.type === "error"));
    const text = events.filter((event) => event.type === "text-delta").map((event) => event.text).join("");
    check(text === looped.text, `${text} is not ${looped.text}`);
    const history = [{ role: "user", content: question }, ...looped.response.messages];
    const next = await generateText({ ...asked, tools: { weather }, toolChoice: "none",
        messages: [...history, { role: "user", content: short }] });
    check(next.text, next);
}

const clients = {
    ai_openai: ["@ai-sdk/openai", async () => {
        const { createOpenAI } = await import("@ai-sdk/openai");
        const provider = createOpenAI({ baseURL, apiKey });
        await aiSdk(provider(model));
        await aiSdk(provider.chat(model));
    }],
    ai_compatible: ["@ai-sdk/openai-compatible", async () => {
        const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
        const provider = createOpenAICompatible({ name: "local", baseURL, apiKey, includeUsage: true,
            supportsStructuredOutputs: true });
        await aiSdk(provider(model));
    }],
    ai_responses: ["@ai-sdk/open-responses", async () => {
        const { createOpenResponses } = await import("@ai-sdk/open-responses");
        const provider = createOpenResponses({ name: "local", url: `${baseURL}/responses`, apiKey });
        await aiSdk(provider(model), { showsInput: false });  // its stream has only whole calls
    }],
    agents: ["@openai/agents", async () => {
        const { Agent, OpenAIProvider, Runner, tool } = await import("@openai/agents");
        for (const useResponses of [true, false]) {
            const modelProvider = new OpenAIProvider({ baseURL, apiKey, useResponses });
            const runner = new Runner({ modelProvider, tracingDisabled: true });
            const modelSettings = { temperature: 0, maxTokens: 100 };
            const plain = new Agent({ name: "Poet", instructions: "Be brief.", model, modelSettings });
            const whole = await runner.run(plain, short);
            check(whole.finalOutput, "no final output");
            const stream = await runner.run(plain, short, { stream: true });
            const pieces = await all(stream.toTextStream());
            await stream.completed;
            check(pieces.length > 3 && pieces.join("") === whole.finalOutput, pieces);
            const calls = [];
            const weather = tool({ name: "weather", description: "The weather in a city.", parameters: City,
                execute: async ({ city }) => { calls.push(city); return `It rains in ${city}.`; } });
            const caller = new Agent({ name: "Forecaster", model, tools: [weather],
                modelSettings: { ...modelSettings, toolChoice: "required" } });
            const called = await runner.run(caller, question, { maxTurns: 6 });
            check(calls.length >= 1 && called.finalOutput, calls);
            const more = await runner.run(plain, [...called.history, { role: "user", content: short }]);
            check(more.finalOutput, "no second turn");
            const streamed = await runner.run(caller, question, { stream: true, maxTurns: 6 });
            await streamed.completed;
            check(streamed.finalOutput === called.finalOutput, streamed.finalOutput);
            const host = new Agent({ name: "Host", model, modelSettings, outputType: Guest });
            Guest.parse((await runner.run(host, "Ann comes.")).finalOutput);
            const triage = Agent.create({ name: "Triage", model, handoffs: [plain],
                modelSettings: { ...modelSettings, toolChoice: "required" } });
            const handed = await runner.run(triage, short, { maxTurns: 3 });
            check(handed.lastAgent?.name === "Poet" && handed.finalOutput, handed.lastAgent?.name);
        }
    }],
    langchain: ["@langchain/openai", async () => {
        const { ChatOpenAI } = await import("@langchain/openai");
        const { HumanMessage, ToolMessage } = await import("@langchain/core/messages");
        const { tool } = await import("@langchain/core/tools");
        const weather = tool(({ city }) => `It rains in ${city}.`,
            { name: "weather", description: "The weather in a city.", schema: City });
        for (const useResponsesApi of [false, true]) {
            const chat = new ChatOpenAI({ model, apiKey, temperature: 0, maxTokens: 100, maxRetries: 0,
                useResponsesApi, configuration: { baseURL } });
            const whole = await chat.invoke([["system", "Be brief."], ["human", short]]);
            check(whole.text && whole.usage_metadata.output_tokens > 0, whole);
            const pieces = await all(await chat.stream([["system", "Be brief."], ["human", short]]));
            const total = pieces.reduce((sum, piece) => sum.concat(piece));
            check(pieces.length > 3 && total.text === whole.text, `${total.text} is not ${whole.text}`);
            check(total.usage_metadata.output_tokens === whole.usage_metadata.output_tokens, total);
            const calling = chat.bindTools([weather], { tool_choice: "weather", strict: true });
            const called = await calling.invoke(question);
            check(called.tool_calls.length === 1 && City.parse(called.tool_calls[0].args), called);
            const streamed = (await all(await calling.stream(question))).reduce((sum, piece) => sum.concat(piece));
            check(JSON.stringify(streamed.tool_calls[0].args) === JSON.stringify(called.tool_calls[0].args), streamed);
            const result = new ToolMessage({ content: "It rains.", tool_call_id: called.tool_calls[0].id });
            const final = await chat.bindTools([weather]).invoke([new HumanMessage(question), called, result]);
            check(final.text || final.tool_calls.length > 0, final);
            for (const method of ["jsonSchema", "functionCalling"])
                Guest.parse(await chat.withStructuredOutput(Guest, { method, name: "guest" }).invoke("Ann comes."));
        }
    }],
};

const require = createRequire(import.meta.url);

function version(name) {
    for (const folder of require.resolve.paths(name))
        try {
            return JSON.parse(readFileSync(`${folder}/${name}/package.json`)).version;
        } catch { }
}

let failed = 0;
for (const name of wanted.length > 0 ? wanted : Object.keys(clients)) {
    const [title, tour] = clients[name];
    if (!version(title)) {
        console.log(`${title}: not installed, skipped`);
        continue;
    }
    const started = Date.now();
    try {
        await tour();
        console.log(`${title} ${version(title)}: passed in ${(Date.now() - started) / 1000} s`);
    } catch (error) {
        ++failed;
        console.log(`${title} ${version(title)}: ${error}`);
        if (process.env.VALAR_TRACE) console.log(error);
    }
}
process.exit(failed > 0 ? 1 : 0);
