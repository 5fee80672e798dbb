// The playground: columns of models, each asked the same. Everything shown is set as text, never as HTML.
const byId = (id) => document.getElementById(id);
const columns = byId("columns");
const most = 6;
let running = null; // an AbortController while answers are written
let hidden = null; // the models behind A and B, until the vote

function make(tag, className, text) {
  const part = document.createElement(tag);
  if (className) part.className = className;
  if (text !== undefined) part.textContent = text;
  return part;
}

// A mix: a@1*0.7+b@1*0.3, perhaps with "base:" before it.
function terms(model) {
  if (!/[*+]/.test(model)) return [];
  return model.split("+").map((term) => {
    const [name, weight] = term.split("*");
    return { name, weight: weight === undefined ? 1 : Number(weight) };
  });
}

function sliders(column) {
  const place = column.querySelector(".sliders");
  const input = column.querySelector("input[name=m]");
  const parts = terms(input.value);
  place.replaceChildren();
  if (parts.length > 8 || parts.some((part) => !Number.isFinite(part.weight))) return;
  parts.forEach((part, index) => {
    const row = make("label", "slider");
    const range = make("input");
    Object.assign(range, { type: "range", min: "-1", max: "2", step: "0.05", value: String(part.weight) });
    const shown = make("output", "", part.weight.toFixed(2));
    range.addEventListener("input", () => (shown.textContent = Number(range.value).toFixed(2)));
    // each place of a slider is an adapter of its own for the server: it is asked when the slider rests
    range.addEventListener("change", () => {
      parts[index].weight = Number(range.value);
      input.value = parts.map((one) => `${one.name}*${one.weight}`).join("+");
      remember();
    });
    row.append(make("span", "", part.name), range, shown);
    place.append(row);
  });
}

function fill(column, model) {
  column.replaceChildren();
  const label = make("label", "", "Model, or a mix such as a@1*0.7+b@1*0.3");
  const input = make("input");
  Object.assign(input, { name: "m", value: model, required: true, maxLength: 600 });
  input.setAttribute("list", "choices");
  input.setAttribute("form", "ask");
  input.addEventListener("change", () => { sliders(column); remember(); });
  label.append(input);
  const remove = make("button", "quiet", "Remove");
  remove.type = "button";
  remove.addEventListener("click", () => { if (columns.children.length > 1) { column.remove(); remember(); } });
  column.append(label, make("div", "sliders"), remove);
  answerParts(column, "Answer");
  sliders(column);
}

function answerParts(column, title) {
  const answer = make("div", "answer");
  answer.setAttribute("role", "log");
  answer.setAttribute("aria-label", title);
  answer.tabIndex = 0;
  column.append(answer, make("p", "hint facts-line"));
}

function models() {
  return [...columns.querySelectorAll("input[name=m]")].map((input) => input.value.trim());
}

function remember() {
  if (hidden) return;
  const asked = new URLSearchParams();
  models().forEach((model) => asked.append("m", model));
  for (const name of ["system", "prompt"]) if (byId(name).value) asked.set(name, byId(name).value);
  history.replaceState(null, "", `?${asked}`);
}

function question(model) {
  const many = byId("probabilities").checked && !hidden;
  const body = { model, stream: true, temperature: Number(byId("temperature").value), max_tokens: Number(byId("tokens").value) };
  if (byId("form").value === "text") {
    return ["/v1/completions", { ...body, prompt: byId("prompt").value, ...(many ? { logprobs: 5 } : {}) }];
  }
  const messages = [{ role: "user", content: byId("prompt").value }];
  if (byId("system").value) messages.unshift({ role: "system", content: byId("system").value });
  return ["/v1/chat/completions", { ...body, messages, ...(many ? { logprobs: true, top_logprobs: 5 } : {}) }];
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

function show(answer, part) {
  // a letter that several tokens make up is text only when its last token is there
  if (part.tokens.map((token) => token.text).join("") !== part.text) {
    const span = make("span", "", part.text);
    span.title = part.tokens.map((token) => `${JSON.stringify(token.text)} ${(100 * Math.exp(token.logprob ?? 0)).toFixed(1)} %`).join("\n");
    answer.append(span);
    return;
  }
  for (const token of part.tokens) {
    const share = Math.exp(token.logprob ?? 0);
    const span = make("span", share > 0.9 ? "" : share > 0.5 ? "p1" : share > 0.2 ? "p2" : "p3", token.text);
    span.title = token.others.map(([text, logprob]) => `${JSON.stringify(text)} ${(100 * Math.exp(logprob)).toFixed(1)} %`).join("\n");
    answer.append(span);
  }
}

async function ask(column, model, signal) {
  const answer = column.querySelector(".answer");
  const facts = column.querySelector(".facts-line");
  answer.replaceChildren();
  facts.textContent = "asked";
  const began = performance.now();
  let first = 0, count = 0, digest = "", text = "";
  const tell = (end) => {
    const seconds = (performance.now() - began) / 1000;
    const rate = count > 1 && first ? `, ${((count - 1) / Math.max(0.001, seconds - first)).toFixed(1)} pieces/s` : "";
    const speed = first ? `first token after ${first.toFixed(2)} s${rate}` : "";
    facts.textContent = [hidden ? "" : digest, speed, end].filter(Boolean).join(" · ");
  };
  try {
    const [path, body] = question(model);
    const reply = await fetch(path, { method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    if (!reply.ok) {
      const told = await reply.json().catch(() => null);
      facts.textContent = "";
      answer.append(make("p", "message", told?.error?.message ?? `the server answered ${reply.status}`));
      return text;
    }
    const of = reply.headers.get("X-Qhub-Digest");
    digest = of ? `answered by ${reply.headers.get("X-Qhub-Adapter")} ${of}` : `answered by the base ${reply.headers.get("X-Qhub-Base")}`;
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      rest += value;
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const event = JSON.parse(line.slice(6));
        if (event.error) answer.append(make("p", "message", event.error.message));
        const choice = event.choices?.[0];
        if (!choice) continue;
        const part = piece(choice);
        if (!part.text) continue;
        first ||= (performance.now() - began) / 1000;
        count += 1;
        text += part.text;
        show(answer, part);
        tell("");
      }
    }
    tell("done");
  } catch (error) {
    tell(error.name === "AbortError" ? "stopped" : "the connection broke off");
  }
  return text;
}

async function askAll(wanted) {
  running = new AbortController();
  byId("run").disabled = true;
  byId("stop").disabled = false;
  await Promise.all([...columns.children].map((column, index) => ask(column, wanted[index], running.signal)));
  byId("run").disabled = false;
  byId("stop").disabled = true;
  running = null;
}

// Blind: the columns lose their names before the first word comes, and get them back with the vote.
async function askBlind() {
  const chosen = models().slice(0, 2);
  if (chosen.length < 2) {
    byId("vote").textContent = "A blind vote is between two columns: add one.";
    return;
  }
  const turned = crypto.getRandomValues(new Uint8Array(1))[0] % 2 === 1;
  hidden = { left: chosen[turned ? 1 : 0], right: chosen[turned ? 0 : 1], id: crypto.randomUUID(), prompt: byId("prompt").value };
  const offered = [...byId("choices").children];
  byId("choices").replaceChildren();
  history.replaceState(null, "", location.pathname);
  columns.replaceChildren();
  for (const letter of ["A", "B"]) {
    const column = make("section", "column");
    column.append(make("h2", "", letter));
    answerParts(column, `Answer ${letter}`);
    columns.append(column);
  }
  byId("add").disabled = byId("blind").disabled = true;
  await askAll([hidden.left, hidden.right]);
  byId("run").disabled = true;
  const place = byId("vote");
  place.replaceChildren("Which is better? ");
  for (const [winner, text] of [["left", "A"], ["tie", "both the same"], ["right", "B"]]) {
    const button = make("button", "", text);
    button.type = "button";
    button.addEventListener("click", () => vote(winner, offered));
    place.append(button, " ");
  }
}

async function vote(winner, offered) {
  if (!hidden) return; // a second click
  const { left, right, id, prompt } = hidden;
  hidden = null;
  byId("vote").textContent = "Keeping the vote";
  const body = JSON.stringify({ id, left, right, winner, prompt });
  let told = "the vote could not be kept: the server is away";
  try {
    const reply = await fetch("/v1/registry/votes", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    const answer = await reply.json();
    told = reply.ok
      ? Object.entries(answer.win_rates).map(([name, one]) => `${name} wins ${(100 * one.win_rate).toFixed(0)} % of ${one.rows}`).join(", ")
      : answer.error.message;
  } catch {
    // said already
  }
  const kept = [...columns.children].map((column) => column.querySelector(".answer"));
  byId("vote").textContent = `A was ${left}, B was ${right}. ${told}.`;
  byId("choices").replaceChildren(...offered);
  columns.replaceChildren();
  [left, right].forEach((model, index) => {
    const column = make("section", "column");
    columns.append(column);
    fill(column, model);
    column.querySelector(".answer").replaceWith(kept[index]);
  });
  byId("add").disabled = byId("blind").disabled = byId("run").disabled = false;
  remember();
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running || hidden) return;
  byId("vote").textContent = "";
  remember();
  if (byId("blind").checked) askBlind();
  else askAll(models());
});
byId("stop").addEventListener("click", () => running?.abort());
byId("add").addEventListener("click", () => {
  if (columns.children.length >= most) return;
  const column = make("section", "column");
  columns.append(column);
  fill(column, models().at(-1) ?? "");
  remember();
  column.querySelector("input").focus();
});
for (const column of columns.children) fill(column, column.dataset.model);
