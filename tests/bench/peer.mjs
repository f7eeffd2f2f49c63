// Prefill and decode speed of llama.cpp (node-llama-cpp, prebuilt) on a file.
//     node peer.mjs MODEL THREADS PROMPT DECODE ROUNDS -> one JSON line
import {getLlama} from "node-llama-cpp";
const [model_path, threads, prompt, decode, rounds] = process.argv.slice(2).map((v, i) => i ? Number(v) : v);
const llama = await getLlama({gpu: false, maxThreads: threads, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: model_path});
const context = await model.createContext({contextSize: prompt + decode + 8, threads, batchSize: 512, flashAttention: true});
const sequence = context.getSequence();
const ids = Array.from({length: prompt}, (_, i) => (i * 37 + 11) % 40000);
const results = [];
for (let round = 0; round < rounds; ++round) {
    await sequence.clearHistory();
    let start = performance.now();
    let last;
    for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) { last = token; break; }
    const prefill = prompt / (performance.now() - start) * 1000;
    start = performance.now();
    let n = 0;
    for await (const token of sequence.evaluate([last], {temperature: 0, yieldEogToken: true})) if (++n >= decode) break;
    results.push({prefill, decode: n / (performance.now() - start) * 1000});
}
const median = key => results.map(r => r[key]).sort((a, b) => a - b)[results.length >> 1];
console.log(JSON.stringify({prefill: median("prefill"), decode: median("decode"), rounds}));
process.exit(0);
