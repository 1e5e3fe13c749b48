// OpenAI's own client for JavaScript.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import {
  MODEL, PERSON_QUESTION, QUESTION, UNKNOWN_MODEL, WEATHER_QUESTION, getWeather, byResponseFormat, run,
} from "./contract.mjs";

const Person = z.object({ name: z.string(), age: z.number().int() });
const completions = (url) => new OpenAI({ baseURL: url, apiKey: "unused", maxRetries: 0 }).chat.completions;
const user = (content) => [{ role: "user", content }];

await run({
  async chat(url) {
    const answer = await completions(url).create({ model: MODEL, messages: user(QUESTION) });
    return answer.choices[0].message.content;
  },
  async stream(url) {
    const pieces = [];
    for await (const chunk of await completions(url).create({ model: MODEL, messages: user(QUESTION), stream: true })) {
      if (chunk.choices[0]?.delta.content) pieces.push(chunk.choices[0].delta.content);
    }
    return pieces;
  },
  async tool_loop(url) {
    const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
    const tools = [
      { type: "function", function: { name: "get_weather", function: getWeather, parse: JSON.parse, parameters } },
    ];
    return completions(url).runTools({ model: MODEL, messages: user(WEATHER_QUESTION), tools }).finalContent();
  },
  async structured(url) {
    const response_format = zodResponseFormat(Person, "person");
    const answer = await completions(url).parse({ model: MODEL, messages: user(PERSON_QUESTION), response_format });
    return byResponseFormat(answer.choices[0].message.parsed);
  },
  async error(url) {
    return completions(url)
      .create({ model: UNKNOWN_MODEL, messages: user(QUESTION) })
      .catch((error) => (error instanceof OpenAI.NotFoundError ? error.message : Promise.reject(error)));
  },
});
