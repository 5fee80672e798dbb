// Clients of npm as people install them, against one server: node npm_clients.mjs http://127.0.0.1:8000
import { readFileSync } from "node:fs";
import OpenAI from "openai";
import { generateText, streamText, tool, jsonSchema } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

const url = process.argv[2], names = process.argv.slice(3), baseURL = `${url}/v1`;
const version = (name) =>
  JSON.parse(readFileSync(new URL(`node_modules/${name}/package.json`, import.meta.url))).version;
const must = (value, what) => { if (!value) throw new Error(what); };
const weather = tool({
  description: "Says the weather",
  inputSchema: jsonSchema({ type: "object", properties: { place: { type: "string", enum: ["Rome", "Oslo"] } }, required: ["place"] }),
});

const clients = {
  "openai (npm)": ["openai", async () => {
    const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
    const messages = [{ role: "user", content: "Hello" }];
    const first = await client.chat.completions.create({ model: "alpha", messages, max_tokens: 8 });
    const turns = [...messages, first.choices[0].message, ...messages];
    must((await client.chat.completions.create({ model: "alpha", messages: turns, max_tokens: 8 })).usage, "usage");
    let chunks = 0;
    for await (const _ of client.chat.completions.stream({ model: "alpha", messages, max_tokens: 8 })) chunks += 1;
    must(chunks > 1, "chunks");
    const response = { model: "alpha", input: "Hello", max_output_tokens: 16 };
    const { id } = await client.responses.create(response);
    must((await client.responses.create({ ...response, previous_response_id: id })).usage.input_tokens > 16, "response");
    return "chat, two turns, stream, responses and going on from one";
  }],
  "ai + @ai-sdk/openai": ["@ai-sdk/openai", async () => {
    const provider = createOpenAI({ baseURL, apiKey: "none" });
    const options = { model: provider.chat("alpha"), maxOutputTokens: 90, maxRetries: 0 };
    const called = await generateText({ ...options, prompt: "Hello", tools: { weather }, toolChoice: "required" });
    must(called.toolCalls.length === 1, "one call");
    const tokens = [];  // of the second turn: by default it refers to the first answer, which is stored
    for (const openai of [{}, { store: false }]) {
      const ask = { ...options, model: provider("alpha"), maxOutputTokens: 16, temperature: 0, providerOptions: { openai } };
      const first = await generateText({ ...ask, prompt: "Hello" });
      const messages = [{ role: "user", content: "Hello" }, ...first.response.messages, { role: "user", content: "More" }];
      tokens.push((await generateText({ ...ask, messages })).usage.inputTokens);
    }
    must(tokens[0] > 0 && tokens[0] === tokens[1], "second turn");
    return "tools over chat, two turns over /v1/responses, stored (the default) and not";
  }],
  "ai + @ai-sdk/openai-compatible": ["@ai-sdk/openai-compatible", async () => {
    const model = createOpenAICompatible({ name: "here", baseURL, apiKey: "none" })("alpha");
    const options = { model, maxOutputTokens: 16, maxRetries: 0 };
    const history = [
      { role: "user", content: "Hello" },
      { role: "assistant", content: [{ type: "reasoning", text: "hm" }, { type: "text", text: "Hi" }] },
      { role: "user", content: "More" },
    ];
    must((await generateText({ ...options, messages: history })).usage, "a reasoning part in the history");
    let text = 0;
    for await (const _ of streamText({ ...options, prompt: "Hello" }).textStream) text += 1;
    must(text > 0, "a stream");
    return "history with a reasoning part, stream";
  }],
};

let failed = 0;
for (const [client, [module, run]] of Object.entries(clients)) {
  if (names.length && !names.includes(client)) continue;
  let told;
  try {
    told = { client, version: version(module), passes: true, what: await run() };
  } catch (error) {
    console.error(error);
    told = { client, version: version(module), passes: false, what: `${error.name}: ${error.message}` };
    failed += 1;
  }
  console.log(JSON.stringify(told));
}
process.exit(failed ? 1 : 0);
