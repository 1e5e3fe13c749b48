// The constants of contract.py, which the test passes as JSON, and `run` with the same output.
export const {
  MODEL, QUESTION, WEATHER_QUESTION, WEATHER, PERSON_QUESTION, UNKNOWN_MODEL, STEPS,
} = JSON.parse(process.env.CONTRACT);

const calls = [];

export const record = (call) => calls.push(call);

export function getWeather({ city }) {
  record(city);
  return WEATHER;
}

export async function run(steps) {
  for (const url of process.argv.slice(2)) {
    for (const step of STEPS.filter((name) => name in steps)) {
      calls.length = 0;
      const result = { url, step, calls };
      try {
        result.shown = await steps[step](url);
      } catch (error) {
        result.failed = `${error.stack}`;
      }
      console.log(JSON.stringify(result));
    }
  }
}

export const byResponseFormat = (answer) => ({ by: "response_format", ...answer });
