// Parts of a page. All text is set as text, never as HTML, and what would hide or turn letters round is seen.
export const byId = (id) => document.getElementById(id);

// the same characters as adapterhub_local/visible.py
const HIDING = new RegExp(
  "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb"
  + "\\ud800-\\udfff\\u{e0000}-\\u{e007f}]", "gu",
);

function escaped(letter) {
  if (letter === "\r") return "\\r";
  const code = letter.codePointAt(0);
  const [mark, size] = code < 0x100 ? ["x", 2] : code < 0x10000 ? ["u", 4] : ["U", 8];
  return `\\${mark}${code.toString(16).padStart(size, "0")}`;
}

export function visible(text) {
  return String(text).replaceAll("\r\n", "\n").replace(HIDING, escaped);
}

export function make(tag, className, text) {
  const part = document.createElement(tag);
  if (className) part.className = className;
  if (text !== undefined) part.textContent = visible(text);
  return part;
}

export function button(text, does) {
  const part = make("button", "quiet", text);
  part.type = "button";
  part.addEventListener("click", does);
  return part;
}

// What a refusal says to a person; this page stays as it is while they sign in beside it.
export function refusal(status, message) {
  const part = make("p", "message");
  if (status !== 401) {
    part.textContent = visible(message ?? `the server answered ${status}`);
    return part;
  }
  const link = make("a", "", "sign in again");
  Object.assign(link, { href: "/console/login?next=/console/play", target: "_blank", rel: "noopener" });
  part.append("Your session has ended: ", link, ", then ask again here.");
  return part;
}
