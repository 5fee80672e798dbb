// One answer while it is written: its text, what else each token could have been, and who answered how fast.
import { question } from "./fields.js";
import { button, make, refusal, visible } from "./parts.js";

const SHORTEST = 0.25; // seconds between first and last word below which a speed would be noise
const lines = new WeakMap(); // the span of a token -> what it was and could have been
const percent = (logprob) => `${(100 * Math.exp(logprob ?? 0)).toFixed(1)} %`;
const quoted = ([text, logprob]) => `${visible(JSON.stringify(text))} ${percent(logprob)}`;

export function answerParts(column, title) {
  const answer = make("div", "answer");
  answer.setAttribute("role", "log");
  answer.setAttribute("aria-label", title);
  answer.tabIndex = 0;
  const told = make("p", "hint");
  told.setAttribute("role", "status");
  const walk = make("div", "token-line");
  walk.hidden = true;
  const step = (by) => choose(column, by);
  const before = button("‹", () => step(-1)), after = button("›", () => step(1));
  before.setAttribute("aria-label", `Token before, ${title}`);
  after.setAttribute("aria-label", `Next token, ${title}`);
  walk.append(before, after, told);
  answer.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && !walk.hidden) { event.preventDefault(); step(by); }
  });
  answer.addEventListener("click", (event) => { if (lines.has(event.target)) choose(column, 0, event.target); });
  column.append(answer, walk, make("p", "hint facts-line"));
}

// Say what a token was and could have been: the one that is given, or the next or the one before.
function choose(column, by, chosen) {
  const tokens = [...column.querySelectorAll(".answer span")];
  const now = tokens.findIndex((token) => token.classList.contains("current"));
  const target = chosen ?? tokens[Math.max(0, Math.min(tokens.length - 1, now + by))];
  if (!target) return;
  tokens[now]?.classList.remove("current");
  target.classList.add("current");
  target.scrollIntoView({ block: "nearest" });
  column.querySelector(".token-line p").textContent = lines.get(target);
}

// Text, and for each token its log-probability and the likeliest others, of one event of either endpoint.
function piece(choice) {
  if (choice.delta) {
    const tokens = (choice.logprobs?.content ?? []).map((one) => ({
      text: one.token, logprob: one.logprob, others: one.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
    return { text: choice.delta.content ?? "", tokens };
  }
  const kept = choice.logprobs;
  const tokens = (kept?.tokens ?? []).map((text, index) => ({
    text, logprob: kept.token_logprobs[index], others: Object.entries(kept.top_logprobs?.[index] ?? {}),
  }));
  return { text: choice.text ?? "", tokens };
}

export function show(column, part) {
  const answer = column.querySelector(".answer");
  if (!part.tokens.length) {
    answer.append(visible(part.text));
    return;
  }
  // a letter that several tokens make up is text only when its last token is there
  const isWhole = part.tokens.map((token) => token.text).join("") === part.text;
  const groups = isWhole ? part.tokens.map((token) => [token]) : [part.tokens];
  for (const group of groups) {
    const share = Math.min(...group.map((token) => Math.exp(token.logprob ?? 0)));
    const colour = share > 0.9 ? "" : share > 0.5 ? "p1" : share > 0.2 ? "p2" : "p3";
    const span = make("span", colour, isWhole ? group[0].text : part.text);
    const was = group.map((token) => quoted([token.text, token.logprob])).join(", ");
    const others = isWhole ? group[0].others.filter(([text]) => text !== group[0].text).map(quoted).join(", ") : "";
    lines.set(span, others ? `${was}; else ${others}` : was);
    span.title = lines.get(span);
    answer.append(span);
  }
  column.querySelector(".token-line").hidden = false;
}

// Ask, and show it while it comes; an answer that is `secret` is kept back, with all that would say whose it is.
export async function ask(column, model, set, signal, secret = false) {
  const facts = column.querySelector(".facts-line");
  column.querySelector(".answer").replaceChildren();
  column.querySelector(".token-line").hidden = true;
  column.querySelector(".token-line p").textContent = "";
  const found = { parts: [], facts: "", refused: null };
  const began = performance.now();
  const now = () => (performance.now() - began) / 1000;
  let first = 0, last = 0, count = 0, digest = "";
  const tell = (end) => {
    const isMeasured = count > 1 && last - first >= SHORTEST;
    const rate = isMeasured ? ` at ${((count - 1) / (last - first)).toFixed(1)} tokens/s` : "";
    const speed = first ? `first token after ${first.toFixed(2)} s` : "";
    const size = count ? `${count} token${count === 1 ? "" : "s"}${rate}` : "";
    found.facts = [digest, speed, size, end].filter(Boolean).join(" · ");
    facts.textContent = secret ? "being written" : visible(found.facts);
  };
  const refuse = (part) => {
    found.refused = part;
    if (!secret) column.querySelector(".answer").append(part);
  };
  facts.textContent = secret ? "being written" : "asked";
  try {
    const [path, body] = question(model, set);
    const headers = { "Content-Type": "application/json" };
    const reply = await fetch(path, { method: "POST", signal, headers, body: JSON.stringify(body) });
    if (!reply.ok) {
      const told = await reply.json().catch(() => null);
      facts.textContent = "";
      refuse(refusal(reply.status, told?.error?.message));
      return found;
    }
    const of = reply.headers.get("X-Qhub-Digest");
    const who = of ? `${reply.headers.get("X-Qhub-Adapter")} ${of}` : `the base ${reply.headers.get("X-Qhub-Base")}`;
    digest = `answered by ${who}`;
    for await (const event of events(reply)) {
      if (event.error) refuse(make("p", "message", event.error.message));
      count = event.usage?.completion_tokens ?? count;
      const part = event.choices?.[0] ? piece(event.choices[0]) : { text: "" };
      if (!part.text) continue;
      last = now();
      first ||= last;
      if (secret) found.parts.push(part);
      else show(column, part);
      tell("");
    }
    tell("done");
  } catch (error) {
    tell(error.name === "AbortError" ? "stopped" : "the connection broke off");
  }
  return found;
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const read = (rest + value).split("\n");
    rest = read.pop();
    for (const line of read) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}
