// What goes on: the part of the page with the id "live" is fetched again while it says so. Only what has changed in it is
// changed, so that the focus, what is being typed and what was opened stay.

// Make `old` what `fresh` is.
function become(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !(name === "open" && old.nodeName === "DETAILS")) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const before = [...old.childNodes];
  const after = [...fresh.childNodes];
  const isSame = (one, other) => one.nodeName === other.nodeName && one.getAttribute?.("action") === other.getAttribute?.("action");
  let start = 0;
  let end = 0; // both count what is alike, from the first and from the last
  const most = Math.min(before.length, after.length);
  while (start < most && isSame(before[start], after[start])) start++;
  while (end < most - start && isSame(before.at(-1 - end), after.at(-1 - end))) end++;
  for (let i = 0; i < start; i++) become(before[i], after[i]);
  for (let i = 1; i <= end; i++) become(before.at(-i), after.at(-i));
  const next = before[before.length - end] ?? null;
  for (const gone of before.slice(start, before.length - end)) gone.remove();
  for (const one of after.slice(start, after.length - end)) old.insertBefore(document.importNode(one, true), next);
}

function again() {
  const part = document.getElementById("live");
  if (!part?.dataset.every) return;
  setTimeout(async () => {
    if (!document.hidden) {
      try {
        const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
        if (answer.ok && !answer.redirected) {
          const page = new DOMParser().parseFromString(await answer.text(), "text/html");
          const fresh = page.getElementById("live");
          const had = part.contains(document.activeElement);
          if (fresh) become(part, fresh);
          // a button that is gone takes the focus with it: the keyboard goes on from here, not from the top
          if (had && !part.contains(document.activeElement)) part.focus();
        }
      } catch {
        // the server is away: ask again later
      }
    }
    again();
  }, Number(part.dataset.every) * 1000);
}
again();
