// Clients of npm, unchanged: node clients.mjs openai|ai_chat|ai_responses BASE_URL
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [name, baseURL] = process.argv.slice(2);
const Weather = z.object({ city: z.string(), rainy: z.boolean() });
const messages = [{ role: "user", content: "How is the weather in Köln?" }];

async function withOpenAI() {
  const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
  const chats = client.chat.completions;
  const models = await client.models.list();
  assert.deepEqual(models.data.map((model) => model.id), ["tiny"]);

  const given = { model: "tiny", messages, seed: 1 };
  const whole = (await chats.create(given)).choices[0].message.content;
  let text = "";
  for await (const chunk of await chats.create({ ...given, stream: true }))
    text += chunk.choices[0]?.delta?.content ?? "";
  assert.ok(text && text === whole);

  const format = zodResponseFormat(Weather, "weather");
  const parsed = await chats.parse({ ...given, response_format: format });
  Weather.parse(parsed.choices[0].message.parsed);

  const parameters = z.toJSONSchema(Weather);
  const tools = [{ type: "function", function: { name: "weather", parameters } }];
  const called = await chats.create({ ...given, tools, tool_choice: "required" });
  Weather.parse(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments));

  const response = await client.responses.create({ model: "tiny", input: "hi" });
  assert.ok(response.output_text);
}

async function withAi(model) {
  const { text } = await generateText({ model, messages });
  assert.ok(text);
  const streamed = streamText({ model, messages });
  let pieces = "";
  for await (const piece of streamed.textStream) pieces += piece;
  assert.ok(pieces && (await streamed.finishReason) === "stop");
  assert.ok((await streamed.usage).outputTokens > 0);

  const output = Output.object({ schema: Weather });
  Weather.parse((await generateText({ model, messages, output })).output);

  const asked = [];
  const weather = tool({
    description: "Weather of a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => (asked.push(city), "rain"),
  });
  const steps = await generateText({
    model,
    messages,
    tools: { weather },
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "auto" : "required" }),
    stopWhen: stepCountIs(2),
  });
  assert.ok(asked.length === 1 && steps.text);
}

const provider = createOpenAI({ baseURL, apiKey: "none" });
await {
  openai: withOpenAI,
  ai_chat: () => withAi(provider.chat("tiny")),
  ai_responses: () => withAi(provider.responses("tiny")),
}[name]();
