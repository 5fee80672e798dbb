// What goes on: the part of the page with the id "live" is fetched again while it says so, and nothing else changes.
async function again() {
  const part = document.getElementById("live");
  if (!part || !part.dataset.every) return;
  const seconds = Number(part.dataset.every);
  setTimeout(async () => {
    if (!document.hidden) {
      try {
        const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
        if (answer.ok && !answer.redirected) {
          const page = new DOMParser().parseFromString(await answer.text(), "text/html");
          const fresh = page.getElementById("live");
          const now = document.getElementById("live");
          if (fresh && now && !now.contains(document.activeElement)) now.replaceWith(fresh);
        }
      } catch {
        // the server is away: ask again later
      }
    }
    again();
  }, seconds * 1000);
}
again();
