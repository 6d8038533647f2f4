// A conversation of several turns by the AI SDK: node ai_sdk.mjs URL GENERATION PROVIDER, in a folder with the packages of
// package.json. Prints one line of JSON: the texts, the reasoning, the calls, and the objects that follow a schema.

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// The packages are in the current folder, which is not this file's
const require = createRequire(pathToFileURL(`${process.cwd()}/`));
const load = async (name) => import(pathToFileURL(require.resolve(name)));

const [url, generation, kind] = process.argv.slice(2);
const { generateText, streamText, stepCountIs, isStepCount, Output, tool } = await load(`ai-${generation}`);
const { z } = await load("zod");

async function provider() {
  const settings = { baseURL: `${url}/v1`, apiKey: "none" };
  if (kind === "mistral") return (await load(`mistral-${generation}`)).createMistral(settings);
  if (kind === "openai-chat") return (await load(`openai-${generation}`)).createOpenAI(settings).chat;
  if (kind === "openai-responses") return (await load(`openai-${generation}`)).createOpenAI(settings).responses;
  const { createOpenAICompatible } = await load(`openai-compatible-${generation}`);
  return createOpenAICompatible({ ...settings, name: "forge", includeUsage: true, supportsStructuredOutputs: true });
}

const model = await provider();
const verdict = z.object({ colour: z.enum(["red", "blue"]), sure: z.boolean() });
const paint = tool({
  description: "Paints.",
  inputSchema: verdict,
  execute: async ({ colour }) => `painted ${colour}`,
});
// Without it the client refers to items by their ids, as if they were stored
const providerOptions = { openai: { store: false }, forge: { reasoningEffort: "none", user: "ann" } };
const common = { maxRetries: 0, providerOptions };
const asked = { ...common, model: model("agent"), tools: { paint }, stopWhen: (isStepCount ?? stepCountIs)(3) };
const short = { ...common, model: model("tiny"), maxOutputTokens: 900, prompt: "Which colour?" };

// A question, the call, its result, the answer
const question = { role: "user", content: "Which colour?" };
const first = await generateText({ ...asked, messages: [question] });

// The same in a stream
const fail = ({ error }) => {
  throw error;
};
const stream = streamText({ ...asked, messages: [question], onError: fail });
let streamed = "";
for await (const piece of stream.textStream) streamed += piece;

// Its turns come back, and another question, with settings
const turns = (await stream.responseMessages) ?? (await stream.response).messages;
const second = await generateText({
  ...asked,
  messages: [{ role: "system", content: "Be brief." }, question, ...turns, { role: "user", content: "And now?" }],
  ...{ temperature: 0.5, topP: 0.9, seed: 7, stopSequences: ["<END>"], presencePenalty: 0.1, frequencyPenalty: 0.1 },
  allowSystemInMessages: true,
});

// An answer by a schema, whole and in a stream, and a call that is required
const { output } = await generateText({ ...short, output: Output.object({ schema: verdict }) });
const growing = streamText({ ...short, output: Output.object({ schema: verdict }), onError: fail });
for await (const _ of growing.textStream);
const forced = await generateText({ ...short, tools: { paint }, toolChoice: "required" });

console.log(
  JSON.stringify({
    first: first.text,
    reasoning: first.steps.map((step) => step.reasoningText ?? ""),
    streamed,
    second: second.text,
    calls: first.steps.flatMap((step) => step.toolCalls.map((call) => call.input)),
    outputs: [output, await growing.output],
    forced: forced.toolCalls.map((call) => call.input),
    usage: first.usage.outputTokens > 0,
  }),
);
