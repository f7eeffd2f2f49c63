// Deliveries, verified by npm's openai: node webhooks.mjs < CASES (see webhooks.py). CASES: a list of
// [body, headers, secret, valid]; prints the id of each that is valid, and null for the others.
import fs from "node:fs";
import OpenAI from "openai";

const found = [];
for (const [body, headers, webhookSecret, valid] of JSON.parse(fs.readFileSync(0, "utf8"))) {
    const client = new OpenAI({ apiKey: "none", webhookSecret });
    try {
        found.push((await client.webhooks.unwrap(body, headers)).id);
    } catch (error) {
        if (valid || !(error instanceof OpenAI.InvalidWebhookSignatureError)) throw error;
        found.push(null);
    }
}
console.log(JSON.stringify(found));
