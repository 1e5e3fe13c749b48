// The AI SDK with its OpenAI provider in its default mode, which is /v1/responses.
// By default its next turn refers to the text of the last answer, which a stateless server does not have: step `error`.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { MODEL, getWeather, record, run } from "./contract.mjs";

const tools = {
  get_weather: tool({ inputSchema: z.object({ city: z.string() }), execute: async (input) => getWeather(input) }),
  get_time: tool({
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => {
      record(`time in ${city}`);
      return { time: "8:00" };
    },
  }),
};
const options = (url) => ({
  model: createOpenAI({ baseURL: url, apiKey: "unused" })(MODEL),
  system: "简短",
  prompt: process.env.TWO_TOOLS,
  maxRetries: 0,
  stopWhen: stepCountIs(5),
  tools,
});

async function twoTurns(url, settings) {
  const first = await generateText(options(url));
  const { prompt, ...rest } = options(url);
  const messages = [
    { role: "user", content: prompt }, ...first.response.messages, { role: "user", content: "say 再见" },
  ];
  return [first.text, (await generateText({ ...rest, messages, ...settings })).text];
}

await run({
  async tool_loop(url) {
    return await twoTurns(url, { providerOptions: { openai: { store: false } } });
  },
  async error(url) {
    try {
      return await twoTurns(url, {});
    } catch (error) {
      return error.message;
    }
  },
  async stream(url) {
    const result = streamText(options(url));
    const pieces = [];
    for await (const piece of result.textStream) pieces.push(piece);
    return [await result.text, pieces.join("")];
  },
});
