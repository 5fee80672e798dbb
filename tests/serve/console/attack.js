// What a hostile page does to a server: each address by each way that a page has. Gives what succeeded.
// Of ways that are much alike, and slow, each address gets another one in each of three turns.
async ({ targets, patience, turn }) => {
  const found = [];
  const tell = (way, method, url, status = 0, text = "") => found.push({ way, method, url, status, text });
  const ended = (begin) => Promise.race([new Promise(begin), new Promise((done) => setTimeout(done, patience))]);

  async function inTurn(jobs, most = 12) {
    const left = jobs.values();
    await Promise.all(Array.from({ length: most }, async () => { for (const job of left) await job(); }));
  }

  async function ask(way, method, url, options) {
    try {
      const answer = await fetch(url, { method, credentials: "include", ...options });
      if (answer.type !== "opaque") tell(way, method, answer.url, answer.status, await answer.text());
    } catch { /* the browser, or the server, has refused */ }
  }

  const fields = (pairs, into) => { for (const [name, value] of pairs) into.append(name, value); return into; };
  const bodies = ({ json, form }) => ({
    text: json,
    "without a type": new Blob([json]),
    "another type": new Blob([json], { type: "text/plain; a=application/json" }),
    fields: fields(form, new URLSearchParams()),
    parts: fields(form, new FormData()),
    nothing: undefined,
  });

  await inTurn(targets.flatMap((target) => {
    const { method, url } = target;
    if (method === "GET") {
      return [
        () => ask("fetch", method, url, { mode: "cors" }),
        () => ask("fetch without cors", method, url, { mode: "no-cors" }),
      ];
    }
    const headers = { "Content-Type": "application/json" };
    const json = () => ask("fetch of JSON", method, url, { headers, body: target.json });
    if (method !== "POST") return [json];
    const made = bodies(target);
    return [
      json,
      ...Object.entries(made).map(([kind, body]) => () => ask(`fetch of ${kind}`, method, url, { mode: "no-cors", body })),
      () => ask("readable fetch", method, url, { mode: "cors", body: made.fields }),
      () => navigator.sendBeacon(url, made["without a type"]),
    ];
  }));

  function placed(tag, attributes) {
    const part = Object.assign(document.createElement(tag), attributes);
    document.body.append(part);
    return part;
  }

  const gets = targets.filter((target) => target.method === "GET");
  const posts = targets.filter((target) => target.method === "POST");
  const turned = (ways, index) => ways[(index + turn) % ways.length];

  const parts = [
    ["image", "img", (src) => ({ src })],
    ["script", "script", (src) => ({ src })],
    ["style", "link", (href) => ({ href, rel: "stylesheet" })],
  ];
  await inTurn(gets.map(({ url }, index) => () => ended((done) => {
    const [way, tag, attributes] = turned(parts, index);
    const part = placed(tag, attributes(url));
    part.onload = () => { tell(way, "GET", url); done(); };
    part.onerror = done;
  })));

  // whether a frame shows anything is seen from outside
  const frames = [
    ["iframe", (src) => ({ src })],
    ["embed", (src) => ({ src, type: "text/html" })],
    ["object", (data) => ({ data, type: "text/html" })],
  ];
  await inTurn(gets.map(({ url }, index) => () => ended((done) => {
    const [tag, attributes] = turned(frames, index);
    const part = placed(tag, attributes(url));
    part.onload = part.onerror = () => { part.remove(); done(); };
  })));

  await inTurn(gets.map(({ url }) => () => ended((done) => {
    const source = new EventSource(url, { withCredentials: true });
    source.onopen = source.onmessage = () => { tell("event source", "GET", url); source.close(); done(); };
    source.onerror = () => { source.close(); done(); };
  })));
  await ended((done) => { // one is enough: there is no route for sockets, and a browser slows down who tries many
    const socket = new WebSocket(gets[0].url.replace(/^http/, "ws"));
    socket.onopen = () => { tell("socket", "GET", gets[0].url); done(); };
    socket.onerror = done;
  });

  function post({ url, form, json }, enctype, target) {
    const part = placed("form", { method: "post", action: url, enctype, target });
    const pairs = enctype === "text/plain" ? [[json.slice(0, -1) + ', "ignored": "', '"}']] : form;
    for (const [name, value] of pairs) part.append(Object.assign(document.createElement("input"), { name, value }));
    part.submit();
  }

  const kinds = ["application/x-www-form-urlencoded", "multipart/form-data", "text/plain"];
  await inTurn(posts.map((target, index) => () => ended((done) => {
    const frame = placed("iframe", { name: `frame-${index}` });
    frame.onload = () => {
      if (frame.contentDocument?.URL === "about:blank") return; // it has not begun
      frame.remove();
      done();
    };
    post(target, turned(kinds, index), frame.name);
  })));
  await inTurn(posts.filter((_, index) => (index + turn) % 3 === 0).map((target, index) => () => ended((done) => {
    const opened = window.open("about:blank", `window-${index}`);
    post(target, kinds[0], `window-${index}`);
    const look = () => {
      let isBlank = false;
      try { isBlank = !opened.closed && opened.location.href === "about:blank"; } catch { /* it is another's now */ }
      if (isBlank) return setTimeout(look, 20);
      try {
        const { responseStatus } = opened.performance.getEntriesByType("navigation")[0];
        tell("window", "POST", opened.location.href, responseStatus, opened.document.body.innerText);
      } catch { /* it cannot be read */ }
      opened.close();
      done();
    };
    look();
  })), 4);
  return found;
}
