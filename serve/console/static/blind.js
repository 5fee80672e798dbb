// A blind vote: two answers without names, times or an order in which they come, until a person has chosen.
import { answerParts, show } from "./answer.js";
import { byId, button, make, visible } from "./parts.js";

let hidden = null; // the models behind A and B, until the vote

export const isHidden = () => hidden !== null;

// Ask the first two of `models` as A and B; `page` is how columns are asked, made and remembered.
export async function askBlind(models, set, page) {
  const place = byId("vote");
  if (models.length < 2) {
    place.textContent = "A blind vote is between two columns: add one.";
    return;
  }
  const turned = crypto.getRandomValues(new Uint8Array(1))[0] % 2 === 1;
  const [left, right] = turned ? [models[1], models[0]] : [models[0], models[1]];
  const columns = byId("columns");
  hidden = { left, right, id: crypto.randomUUID(), prompt: set.prompt, set, offered: [...byId("choices").children] };
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
  // probabilities would say which is which to who knows the models
  hidden.found = await page.askAll([left, right], { ...set, probabilities: false }, true);
  byId("run").disabled = true;
  if (hidden.found.some((one) => one.refused)) {
    end("There is no vote: one of the two did not answer.", page);
    return;
  }
  hidden.found.forEach((one, index) => {
    one.parts.forEach((part) => show(columns.children[index], part));
    columns.children[index].querySelector(".facts-line").textContent = "written";
  });
  place.replaceChildren("Which is better? ");
  for (const [winner, text] of [["left", "A"], ["tie", "both the same"], ["right", "B"]]) {
    const choice = button(text, () => vote(winner, page));
    choice.className = "";
    place.append(choice, " ");
  }
}

async function vote(winner, page) {
  if (!hidden || hidden.isGiven) return; // a second click
  hidden.isGiven = true;
  const { left, right, id, prompt } = hidden;
  byId("vote").textContent = "Keeping the vote";
  const body = JSON.stringify({ id, left, right, winner, prompt });
  let told = "the vote could not be kept: the server is away";
  try {
    const headers = { "Content-Type": "application/json" };
    const reply = await fetch("/v1/registry/votes", { method: "POST", headers, body });
    const answer = await reply.json();
    const rate = ([name, one]) => `${name} wins ${(100 * one.win_rate).toFixed(0)} % of ${one.rows}`;
    told = reply.ok
      ? Object.entries(answer.win_rates).map(rate).join(", ")
      : reply.status === 401 ? "the vote could not be kept: your session has ended" : answer.error.message;
  } catch {
    // said already
  }
  end(`A was ${left}, B was ${right}. ${told}.`, page);
}

// The columns get their names back, with what was written, when and by whom.
function end(text, page) {
  const { left, right, found, offered, set } = hidden;
  hidden = null;
  const columns = byId("columns");
  const kept = [...columns.children].map((column) => column.querySelector(".answer").childNodes);
  byId("vote").textContent = visible(text);
  byId("choices").replaceChildren(...offered);
  const nodes = kept.map((children) => [...children]);
  columns.replaceChildren();
  [left, right].forEach((model, index) => {
    const column = page.add(model);
    page.note(column, model, set);
    column.querySelector(".answer").append(...nodes[index], ...(found[index].refused ? [found[index].refused] : []));
    column.querySelector(".facts-line").textContent = visible(found[index].facts);
  });
  byId("add").disabled = byId("blind").disabled = byId("run").disabled = false;
  page.remember();
}
