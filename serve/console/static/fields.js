// What is asked for: the fields, and the address that has all of it, so that a link shows the same and runs nothing.
import { byId } from "./parts.js";

const DEFAULTS = { form: "chat", temperature: "0", tokens: "128", system: "", prompt: "" };
const BOXES = ["probabilities", "blind"];
const LONGEST = 20000; // letters of a field that the server takes from an address

export function settings() {
  const found = Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, byId(name).value]));
  return { ...found, probabilities: byId("probabilities").checked };
}

export const isBlind = () => byId("blind")?.checked ?? false; // there is no such box for a key that cannot vote

export function remember(models) {
  const asked = new URLSearchParams(models.map((model) => ["m", model]));
  for (const [name, value] of Object.entries(DEFAULTS)) {
    const set = byId(name).value;
    if (set !== value && set.length <= LONGEST) asked.set(name, set);
  }
  for (const name of BOXES) if (byId(name)?.checked) asked.set(name, "1");
  history.replaceState(null, "", `?${asked}`);
}

export function question(model, set) {
  const body = {
    model, stream: true, stream_options: { include_usage: true },
    temperature: Number(set.temperature), max_tokens: Number(set.tokens),
  };
  if (set.form === "text") {
    return ["/v1/completions", { ...body, prompt: set.prompt, ...(set.probabilities ? { logprobs: 5 } : {}) }];
  }
  const messages = [{ role: "user", content: set.prompt }];
  if (set.system) messages.unshift({ role: "system", content: set.system });
  const many = set.probabilities ? { logprobs: true, top_logprobs: 5 } : {};
  return ["/v1/chat/completions", { ...body, messages, ...many }];
}
