// The AI SDK with its OpenAI provider, in chat mode.
import { createOpenAI } from "@ai-sdk/openai";
import { APICallError, Output, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import {
  MODEL, PERSON_QUESTION, QUESTION, UNKNOWN_MODEL, WEATHER_QUESTION, getWeather, byResponseFormat, run,
} from "./contract.mjs";

const Person = z.object({ name: z.string(), age: z.number().int() });
const model = (url, name = MODEL) => createOpenAI({ baseURL: url, apiKey: "unused" }).chat(name);
const ask = (url, prompt, options = {}) => generateText({ model: model(url), prompt, maxRetries: 0, ...options });

await run({
  async chat(url) {
    return (await ask(url, QUESTION)).text;
  },
  async stream(url) {
    const pieces = [];
    for await (const piece of streamText({ model: model(url), prompt: QUESTION, maxRetries: 0 }).textStream) {
      pieces.push(piece);
    }
    return pieces;
  },
  async tool_loop(url) {
    const get_weather = tool({
      description: "Look up the weather of a city.",
      inputSchema: z.object({ city: z.string() }),
      execute: async (input) => getWeather(input),
    });
    return (await ask(url, WEATHER_QUESTION, { tools: { get_weather }, stopWhen: stepCountIs(3) })).text;
  },
  async structured(url) {
    const output = Output.object({ schema: Person });
    return byResponseFormat((await ask(url, PERSON_QUESTION, { output })).output);
  },
  async error(url) {
    return ask(url, QUESTION, { model: model(url, UNKNOWN_MODEL) }).catch((error) =>
      APICallError.isInstance(error) && error.statusCode === 404 ? error.message : Promise.reject(error),
    );
  },
});
