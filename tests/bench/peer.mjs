// llama.cpp, as npm's node-llama-cpp brings it, measured as examples/bench measures us: one round for
// each line on stdin, answered by a line of JSON, results keyed "prefill", "decode", "decode@2048" and
// "decode x4" in tok/s. The package's own scheduler and samplers stay out of the way: ids go straight
// into llama_decode(), all sequences of a step in one batch, nothing is sampled.
//     node peer.mjs MODEL '{"threads": 2, "prompt": 512, "decode": 32, "depth": 2048, "columns": [4]}'
//     node peer.mjs MODEL '{"threads": 2, "start": 100}'    time to the first token, then exit
import {createInterface} from "readline";
import {getLlama, getModuleVersion} from "node-llama-cpp";

const [model_path, text] = process.argv.slice(2);
const {threads, prompt = 0, decode = 0, depth = 0, columns = [], start = 0} = JSON.parse(text);
const llama = await getLlama({gpu: false, maxThreads: threads, build: "never", logLevel: "error"});
const {AddonModel, AddonContext, AddonSampler} = llama._bindings;
const about = {
    peer: `llama.cpp ${llama.llamaCppRelease.release} (node-llama-cpp ${await getModuleVersion()})`,
    cpu: llama.systemInfo.replace(/\s+/g, " ").trim()
};
const memory_before = process.resourceUsage().maxRSS / 1024, began = performance.now();
const model = new AddonModel(model_path, {addonExports: llama._bindings, gpuLayers: 0, useMmap: true});
if (!await model.init()) throw new Error("the model cannot be loaded");
const n_vocab = 512;  // ids that every vocabulary has

async function open_context(tokens, sequences) {
    const cells = (tokens + 255 & ~255) * sequences;
    const context = new AddonContext(model, {
        contextSize: cells, batchSize: 512, sequences, flashAttention: true, threads});
    if (!await context.init()) throw new Error("no context");
    context.setThreads(threads);
    return context;
}
// Positions first .. first + count - 1 of one sequence; the last one wants logits.
async function run_prompt(context, first, count) {
    for (let end = first + count; first < end; first += 512) {
        const n = Math.min(512, end - first);
        const ids = Uint32Array.from({length: n}, (_, i) => ((first + i) * 37 + 11) % n_vocab);
        context.initBatch(n);
        context.addToBatch(0, first, ids, first + n === end ? Uint32Array.of(n - 1) : new Uint32Array());
        await context.decodeBatch();
    }
}
async function run_columns(context, position, sequences) {
    context.initBatch(sequences);
    for (let s = 0; s < sequences; ++s)
        context.addToBatch(s, position, Uint32Array.of((position * 37 + s * 101 + 11) % n_vocab), Uint32Array.of(0));
    await context.decodeBatch();
}
async function speed_of(tokens, work) {
    const from = performance.now();
    await work();
    return tokens / (performance.now() - from) * 1000;
}
function forget(context, first, sequences) {
    for (let s = 0; s < sequences; ++s) context.removeTokenCellsFromSequence(s, first, -1);
}

if (start) {
    const context = await open_context(start + 1, 1);
    const loaded = performance.now();
    context.initBatch(start);
    const ids = Uint32Array.from({length: start}, (_, i) => (i * 37 + 11) % n_vocab);
    const [row] = context.addToBatch(0, 0, ids, Uint32Array.of(start - 1));
    await context.decodeBatch();
    const sampler = new AddonSampler(model);
    sampler.applyConfig({temperature: 0});
    await context.sampleToken(row, sampler);
    console.log(JSON.stringify({...about, load_ms: loaded - began, first_token_ms: performance.now() - began,
                                memory_before_mib: memory_before,
                                peak_memory_mib: process.resourceUsage().maxRSS / 1024}));
    process.exit(0);
}

const shallow = await open_context(Math.max(prompt, decode + 1), 1), contexts = [["decode", shallow, 0, 1]];
if (depth) {
    const deep = await open_context(depth + decode + 1, 1);
    await run_prompt(deep, 0, depth);
    contexts.push([`decode@${depth}`, deep, depth, 1]);
}
for (const n of columns) contexts.push([`decode x${n}`, await open_context(decode + 1, n), 0, n]);
console.log(JSON.stringify(about));
for await (const _ of createInterface({input: process.stdin})) {
    const results = {};
    forget(shallow, 0, 1);
    results["prefill"] = await speed_of(prompt, () => run_prompt(shallow, 0, prompt));
    for (const [test, context, first, sequences] of contexts) {
        forget(context, first, sequences);
        results[test] = await speed_of(decode * sequences, async () => {
            for (let i = 0; i < decode; ++i) await run_columns(context, first + i, sequences);
        });
    }
    console.log(JSON.stringify(results));
}
process.exit(0);
