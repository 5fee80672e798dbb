// The playground: columns of models, each asked the same.
import { answerParts, ask } from "./answer.js";
import { askBlind, isHidden } from "./blind.js";
import { isBlind, remember as keep, settings } from "./fields.js";
import { byId, button, make, visible } from "./parts.js";

const columns = byId("columns");
const most = 6;
const asked = new WeakMap(); // a column -> the model and the settings that its answer is of
let running = null; // an AbortController while answers are written

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
  const mix = () => parts.map((one) => `${one.name}*${one.weight}`).join("+");
  parts.forEach((part, index) => {
    const row = make("label", "slider");
    const range = make("input");
    Object.assign(range, { type: "range", min: "-1", max: "2", step: "0.05", value: String(part.weight) });
    const shown = make("output", "", part.weight.toFixed(2));
    range.addEventListener("input", () => {
      parts[index].weight = Number(range.value);
      shown.textContent = Number(range.value).toFixed(2);
      mark(column, mix());
    });
    // each place of a slider is an adapter of its own for the server: it is asked when the slider rests
    range.addEventListener("change", () => {
      input.value = mix();
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
  input.addEventListener("input", () => mark(column));
  input.addEventListener("change", () => { sliders(column); mark(column); remember(); });
  label.append(input);
  const remove = button("Remove", () => {
    if (columns.children.length > 1) { column.remove(); remember(); }
  });
  const old = make("p", "message old");
  old.hidden = true;
  column.append(label, make("div", "sliders"), remove, old);
  answerParts(column, "Answer");
  sliders(column);
}

function add(model) {
  const column = make("section", "column");
  columns.append(column);
  fill(column, model);
  return column;
}

function models() {
  return [...columns.querySelectorAll("input[name=m]")].map((input) => input.value.trim());
}

function remember() {
  if (!isHidden()) keep(models());
}

// Say under an answer's model that it is of another one, or of other settings, than what is set now.
function mark(column, model = column.querySelector("input[name=m]")?.value.trim()) {
  const note = column.querySelector(".old"), of = asked.get(column);
  if (!note || !of) return;
  const isOther = of.model !== model, isChanged = of.settings !== JSON.stringify(settings());
  note.textContent = isOther
    ? `The answer below is of ${visible(of.model)}: ask again for what is set now.`
    : "The answer below is of another prompt or other settings: ask again.";
  note.hidden = !(isOther || isChanged);
}

const note = (column, model, set) => asked.set(column, { model, settings: JSON.stringify(set) });

async function askAll(wanted, set, secret = false) {
  running = new AbortController();
  byId("run").disabled = true;
  byId("stop").disabled = false;
  const found = await Promise.all([...columns.children].map((column, index) => {
    note(column, wanted[index], set);
    mark(column);
    return ask(column, wanted[index], set, running.signal, secret);
  }));
  byId("run").disabled = false;
  byId("stop").disabled = true;
  running = null;
  return found;
}

const legend = () => { byId("legend").hidden = !byId("probabilities").checked; };

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running || isHidden()) return;
  byId("vote").textContent = "";
  remember();
  if (isBlind()) askBlind(models().slice(0, 2), settings(), { askAll, add, note, remember });
  else askAll(models(), settings());
});
byId("ask").addEventListener("input", () => [...columns.children].forEach((column) => mark(column)));
byId("ask").addEventListener("change", () => { legend(); remember(); });
byId("stop").addEventListener("click", () => running?.abort());
byId("add").addEventListener("click", () => {
  if (columns.children.length >= most) return;
  const column = add(models().at(-1) ?? "");
  remember();
  column.querySelector("input").focus();
});
for (const column of columns.children) fill(column, column.dataset.model);
legend();
