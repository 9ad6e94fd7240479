// The desk's page. The skeleton is built once; a tick changes texts, attributes and sizes, and adds no node.
// Whatever comes from the log is inserted as text, never as markup.

const ROWS = 40, BEFORE = 8, REASONS = 4, SAID = 6, DOTS = 700, SPARK = 120, SCORES = 16, CATEGORIES = 8;
const SILENCE_MS = 6000; // without a tick
const SVG = "http://www.w3.org/2000/svg";
const VIEWS = [["live", "Desk"]]; // a tab is one more pair, and a section with this id
const SCORE_LABELS = { 0: "<0.1 %", 4: "1 %", 7: "10 %", 11: "50 %", 15: ">90 %" };
const OUTCOMES = ["approve", "challenge", "review", "decline"];
const KEYS = [
  ["↑ ↓", "choose an alert"], ["Enter", "go to the case"], ["F", "it is fraud"], ["G", "it is genuine"], ["U", "take the verdict back"],
  ["N", "write a note"], ["R", "show the newest order"], ["T", "light or dark"], ["Esc", "back to the queue"], ["?  or  /", "this help"],
];

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function shape(tag, attributes = {}) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const many = (count, make) => Array.from({ length: count }, (_, place) => make(place));

function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function age(ms) {
  const seconds = Math.max(0, Math.round(ms / 1000));
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

function card(name, title, note = "") {
  const small = node("small", {}, note);
  const made = node("section", { class: `card ${name}`, "aria-label": title }, node("header", {}, node("h2", {}, title), small));
  return { made, small };
}

// ---- parts: each is built once and returns a function that fills it

function tile(title) {
  const value = node("strong", {}, "–"), about = node("span", { class: "quiet" });
  const made = node("div", { class: "tile" }, node("h2", {}, title), value, about);
  return { made, fill: ([says, explains]) => { say(value, says); say(about, explains); about.title = explains; } };
}

function tiles() {
  const parts = {
    decided: tile("Decisions"), rate: tile("Throughput"), latency: tile("Latency"),
    alerts: tile("Alert rate"), frauds: tile("Fraud rate"), risk: tile("At risk"),
  };
  const line = shape("path"), spark = shape("svg", { class: "spark", viewBox: `0 0 ${SPARK - 1} 30`, preserveAspectRatio: "none", role: "img" });
  spark.setAttribute("aria-label", "Decisions per second in the last two minutes");
  spark.append(line);
  parts.rate.made.append(spark);
  const made = node("section", { class: "tiles", "aria-label": "Key figures" }, ...Object.values(parts).map((part) => part.made));
  return {
    made,
    fill(tick) {
      for (const [name, part] of Object.entries(parts)) part.fill(tick.tiles[name]);
      const most = Math.max(1, ...tick.spark);
      line.setAttribute("d", "M" + tick.spark.map((count, at) => `${at} ${(29 - 27 * count / most).toFixed(1)}`).join("L"));
    },
  };
}

function scores() {
  const { made } = card("scores", "Scores", "by fraud probability, log scale");
  const bars = many(SCORES, (place) => {
    const all = node("i"), flagged = node("i", { class: "accent" });
    const column = node("div", { class: "column" }, all, flagged, node("span", {}, SCORE_LABELS[place] ?? ""));
    return { all, flagged, column };
  });
  const key = node("p", { class: "key quiet" }, node("i"), "all", node("i", { class: "accent" }), "alerts");
  made.append(node("div", { class: "columns", role: "img", "aria-label": "Histogram of fraud probabilities" }, ...bars.map((bar) => bar.column)), key);
  return {
    made,
    fill(tick) {
      const most = Math.log10(1 + Math.max(1, ...tick.scores.map(([count]) => count)));
      const height = (count) => `${(100 * Math.log10(1 + count) / most).toFixed(1)}%`;
      tick.scores.forEach(([count, alerts], place) => {
        bars[place].all.style.height = height(count);
        bars[place].flagged.style.height = height(alerts);
        bars[place].column.title = `${count.toLocaleString("en")} decisions, ${alerts.toLocaleString("en")} alerts`;
      });
    },
  };
}

function bars(name, title, note, count) {
  const { made } = card(name, title, note);
  const rows = many(count, () => {
    const label = node("span", { class: "name" }), bar = node("i"), number = node("span", { class: "number" }), part = node("span", { class: "number quiet" });
    const row = node("li", {}, label, node("div", { class: "track" }, bar), number, part);
    return { row, label, bar, number, part };
  });
  made.append(node("ul", { class: "bars" }, ...rows.map(({ row }) => row)));
  return {
    made,
    fill(lines) {
      const most = Math.max(1, ...lines.map(([, number]) => number));
      rows.forEach(({ row, label, bar, number, part }, place) => {
        row.hidden = place >= lines.length;
        if (row.hidden) return;
        const [text, size, told] = lines[place];
        say(label, text); say(number, size.toLocaleString("en")); say(part, told);
        bar.style.width = `${Math.max(size ? 0.6 : 0, 100 * size / most).toFixed(1)}%`;
      });
    },
  };
}

function map(land) {
  const { made } = card("map", "Where", "newest decisions, and alerts");
  const world = shape("g"), dots = many(DOTS, () => shape("circle", { visibility: "hidden" }));
  world.append(shape("path", { class: "land", d: land, transform: "scale(.1)" }));
  const picture = shape("svg", { role: "img", "aria-label": "Map of the newest decisions and alerts" });
  picture.append(world, ...dots);
  made.append(picture);
  let shown = "";
  return {
    made,
    fill({ frame, dots: points }) {
      const [west, south, east, north] = frame;
      const squeeze = Math.cos((south + north) / 2 * Math.PI / 180); // a degree of longitude is shorter up north
      const size = Math.max((east - west) * squeeze, 1.6 * (north - south));
      if (shown !== frame.join()) {
        shown = frame.join();
        picture.setAttribute("viewBox", `${west * squeeze} ${-north} ${(east - west) * squeeze} ${north - south}`);
        world.setAttribute("transform", `scale(${squeeze} -1)`);
      }
      dots.forEach((dot, place) => {
        const point = points[place];
        dot.setAttribute("visibility", point ? "visible" : "hidden");
        if (!point) return;
        dot.setAttribute("cx", (point[0] * squeeze).toFixed(4));
        dot.setAttribute("cy", (-point[1]).toFixed(4));
        dot.setAttribute("r", (size * (point[2] ? 0.009 : 0.004)).toFixed(4));
        dot.setAttribute("class", point[2] ? "alert" : "");
      });
    },
  };
}

function queue(choose) {
  const { made, small } = card("queue", "Alerts", "what may cost most comes first");
  const fresh = node("button", { class: "fresh", type: "button" });
  fresh.hidden = true;
  small.after(fresh);
  const rows = many(ROWS, () => {
    const cells = ["age", "amount number", "risk number", "loss number", "outcome", "what", "why", "verdict"].map((name) => node("td", { class: name, role: "gridcell" }));
    const meter = node("i"), risk = node("span");
    cells[2].append(node("div", { class: "meter" }, meter), risk);
    const row = node("tr", { tabindex: "-1", role: "row", "aria-selected": "false" }, ...cells);
    row.hidden = true;
    row.addEventListener("click", () => choose(row.dataset.id, row));
    return { row, cells, meter, risk };
  });
  const heads = ["Age", "Amount", "Risk", "Loss", "Decision", "What", "Why", "Verdict"];
  const head = node("tr", {}, ...heads.map((text, place) => node("th", { scope: "col", role: "columnheader", class: place > 0 && place < 4 ? "number" : "" }, text)));
  const table = node("table", { role: "grid", "aria-label": "Alerts" }, node("thead", {}, head), node("tbody", {}, ...rows.map(({ row }) => row)));
  const nothing = node("p", { class: "nothing quiet" }, "No alerts. What is not simply approved will stand here.");
  const frame = node("div", { class: "scroll" }, table, nothing);
  made.append(frame);

  const known = new Map(); // id -> what was last told about it
  let order = [], newest = [], chosen = "", now = 0;
  const mouse = matchMedia("(hover: hover)");
  const held = () => order.length > 0 && ((mouse.matches && frame.matches(":hover")) || frame.contains(document.activeElement));

  function draw() {
    rows.forEach(({ row, cells, meter, risk }, place) => {
      const alert = known.get(order[place]);
      row.hidden = !alert;
      if (!alert) { row.dataset.id = ""; return; }
      row.dataset.id = alert.id;
      row.dataset.outcome = alert.outcome;
      row.classList.toggle("said", alert.verdict !== "");
      row.setAttribute("aria-selected", String(alert.id === chosen));
      row.tabIndex = alert.id === chosen || (place === 0 && !order.includes(chosen)) ? 0 : -1;
      meter.style.width = `${(100 * alert.probability).toFixed(1)}%`;
      say(risk, alert.risk);
      say(cells[0], age(now - alert.recorded_ms)); say(cells[1], alert.amount); say(cells[3], alert.loss); say(cells[4], alert.told);
      say(cells[5], alert.what); say(cells[6], alert.why); say(cells[7], alert.verdict);
      cells[6].title = alert.why;
    });
    nothing.hidden = order.length > 0;
    table.hidden = order.length === 0;
  }

  function adopt() {
    order = newest;
    for (const id of known.keys()) if (!order.includes(id)) known.delete(id);
    fresh.hidden = true;
    draw();
  }

  fresh.addEventListener("click", adopt);
  return {
    made, adopt,
    fill(tick) {
      now = tick.now_ms;
      newest = tick.queue.map((alert) => alert.id);
      for (const alert of tick.queue) known.set(alert.id, alert);
      if (!held()) return adopt();
      const added = newest.filter((id) => !order.includes(id)).length;
      for (const id of known.keys()) if (!order.includes(id) && !newest.includes(id)) known.delete(id);
      fresh.hidden = added === 0;
      say(fresh, `${added} new · R`);
      draw();
    },
    mark(id) { chosen = id; draw(); },
    told(id, verdict) { if (known.has(id)) { known.get(id).verdict = verdict; draw(); } },
    step(by) {
      const at = order.indexOf(chosen), next = at < 0 ? 0 : Math.min(order.length - 1, Math.max(0, at + by));
      if (order[next]) { rows[next].row.focus(); choose(order[next], rows[next].row); }
    },
    focus() { (rows.find(({ row }) => row.dataset.id === chosen) ?? rows[0]).row.focus(); },
  };
}

function strip() { // amounts on a logarithmic line: the customer's, the middle half of them, and this one
  const picture = shape("svg", { class: "strip", role: "img", "aria-label": "This amount among the customer's earlier amounts" });
  const band = shape("rect", { class: "band", y: 6, height: 22, rx: 3 }), median = shape("line", { class: "median", y1: 6, y2: 28 });
  const dots = many(300, () => shape("circle", { cy: 17, r: 3, visibility: "hidden" })), mark = shape("circle", { class: "this", cy: 17, r: 6 });
  picture.append(band, median, ...dots, mark);
  const says = node("p");
  return {
    made: node("div", { class: "normal" }, says, picture),
    fill(normal) {
      say(says, normal.says);
      picture.toggleAttribute("hidden", normal.amounts.length === 0);
      picture.style.display = normal.amounts.length ? "" : "none";
      if (!normal.amounts.length) return;
      const all = [...normal.amounts, normal.this].map((amount) => Math.log(1 + amount));
      const low = Math.min(...all), span = Math.max(...all) - low || 1;
      const at = (amount) => 2 + 96 * (Math.log(1 + amount) - low) / span;
      band.setAttribute("x", `${at(normal.low)}%`);
      band.setAttribute("width", `${Math.max(0.5, at(normal.high) - at(normal.low))}%`);
      for (const end of ["x1", "x2"]) median.setAttribute(end, `${at(normal.median)}%`);
      dots.forEach((dot, place) => {
        const amount = normal.amounts[place];
        dot.setAttribute("visibility", amount === undefined ? "hidden" : "visible");
        if (amount !== undefined) dot.setAttribute("cx", `${at(amount)}%`);
      });
      mark.setAttribute("cx", `${at(normal.this)}%`);
    },
  };
}

function caseOf(give) {
  const made = node("section", { class: "card case", "aria-label": "Case", tabindex: "-1" });
  const nothing = node("div", { class: "nothing quiet" }, node("p", {}, "Choose an alert to see why it was flagged."),
    node("p", {}, "↑ ↓ choose · Enter opens · F fraud · G genuine · U undo · ? help"));
  const amount = node("h2", { class: "amount" }), outcome = node("span", { class: "outcome" }), about = node("p", { class: "quiet about" });
  const note = node("input", { type: "text", maxlength: "2000", placeholder: "Note (optional)", "aria-label": "Note to the verdict" });
  const buttons = [["fraud", "Fraud", "F"], ["genuine", "Genuine", "G"], ["undo", "Undo", "U"]].map(([says, text, key]) => {
    const button = node("button", { type: "button", "data-says": says }, text, node("kbd", {}, key));
    button.addEventListener("click", () => give(says, note.value));
    return button;
  });
  const problem = node("p", { class: "problem", role: "alert" });
  const said = many(SAID, () => node("li"));
  const verdicts = node("ol", { class: "said", "aria-label": "Verdicts, newest first" }, ...said);
  const reasons = many(REASONS, () => {
    const text = node("span"), bar = node("i"), part = node("span", { class: "number" });
    return { row: node("li", {}, text, part, node("div", { class: "track" }, bar)), text, bar, part };
  });
  const waterfall = node("ol", { class: "waterfall" }, ...reasons.map(({ row }) => row));
  const why = node("h3", {}, "Why ", node("small", {}, "each sign's share of all that pushed towards fraud (SHAP)"));
  const normal = strip();
  const before = many(BEFORE, () => node("tr", {}, ...many(4, (place) => node("td", { class: place === 1 ? "number" : "" }))));
  const purchases = node("table", { "aria-label": "The customer's last purchases" }, node("tbody", {}, ...before));
  const facts = node("dl"), features = node("dl", { class: "features" });
  const details = node("details", {}, node("summary", {}, "All features that were scored"), features);
  const body = node("div", { class: "body" },
    node("div", { class: "head" }, amount, outcome), about,
    node("div", { class: "acts" }, ...buttons, note), problem, verdicts,
    why, waterfall, node("h3", {}, "Amount against the customer's normal"), normal.made,
    node("h3", {}, "Last purchases"), purchases, node("h3", {}, "Facts"), facts, details);
  made.append(nothing, body);
  body.hidden = true;

  function pairs(list, lines) { // reuses its nodes; grows to the longest list once
    while (list.children.length < 2 * lines.length) list.append(node("dt"), node("dd"));
    [...list.children].forEach((child, place) => {
      const line = lines[place >> 1];
      child.hidden = !line;
      if (line) say(child, line[place % 2]);
    });
  }

  return {
    made, note,
    may(name) { // who may say something
      const why = name ? "" : "Nobody is signed in: set FRAUD_ANALYST, or open the desk through the proxy that signs you in.";
      for (const button of [...buttons, note]) { button.disabled = !name; button.title = why; }
      made.dataset.why = why;
      if (!name && !problem.textContent) say(problem, why);
    },
    waits() { made.dataset.state = "waits"; },
    gaveUp(id) { // no answer came; whether it was stored is not known
      if (made.dataset.state !== "waits" || made.dataset.id !== id) return;
      made.dataset.state = "";
      say(problem, "No answer. Open the case again to see whether the verdict was stored.");
    },
    opens() { made.dataset.state = "opens"; note.value = ""; },
    fill(shown) {
      made.dataset.state = "";
      nothing.hidden = true;
      body.hidden = false;
      say(problem, shown.problem || made.dataset.why || "");
      if (!shown.facts) { // it could not be read
        say(amount, shown.id); say(outcome, ""); say(about, "");
        return;
      }
      made.dataset.id = shown.id;
      made.dataset.verdict = shown.verdict;
      say(amount, shown.amount); say(outcome, shown.told);
      say(about, `${shown.risk} fraud probability · expected loss ${shown.loss} · ${shown.id}`);
      buttons.forEach((button) => button.setAttribute("aria-pressed", String(shown.verdict !== "" && button.dataset.says === shown.verdict)));
      if (!shown.problem && shown.said.length && shown.said[0][3] === note.value) note.value = "";
      said.forEach((line, place) => {
        line.hidden = place >= shown.said.length;
        if (line.hidden) return;
        const [says, analyst, when, words] = shown.said[place];
        say(line, `${says} · ${analyst} · ${when} UTC${words ? ` · “${words}”` : ""}`);
      });
      why.hidden = shown.waterfall.length === 0;
      reasons.forEach(({ row, text, bar, part }, place) => {
        const line = shown.waterfall[place];
        row.hidden = !line;
        if (!line) return;
        say(text, line[0]); say(part, `${Math.round(100 * line[2])} %`);
        bar.style.marginLeft = `${(100 * line[1]).toFixed(1)}%`;
        bar.style.width = `${Math.max(0.5, 100 * line[2]).toFixed(1)}%`;
        row.classList.toggle("rest", place === shown.waterfall.length - 1 && place > 0 && line[0] === "all other signs together");
      });
      normal.fill(shown.normal);
      before.forEach((row, place) => {
        const line = shown.before[place];
        row.hidden = !line;
        if (!line) return;
        [...row.children].forEach((cell, at) => say(cell, line[at]));
        row.classList.toggle("this", line[4]);
      });
      pairs(facts, shown.facts);
      pairs(features, shown.features);
    },
  };
}

function help() {
  const list = node("dl", {}, ...KEYS.flatMap(([key, text]) => [node("dt", {}, node("kbd", {}, key)), node("dd", {}, text)]));
  const close = node("button", { type: "button" }, "Close");
  const made = node("dialog", { class: "help", "aria-label": "Keyboard" }, node("h2", {}, "Keyboard"), list, close);
  close.addEventListener("click", () => made.close());
  return made;
}

// ---- the page

function themed(root) {
  const wanted = localStorage.getItem("fraud-desk-theme");
  const dark = wanted ? wanted === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "dark" : "light";
  for (const page of [document.documentElement, document.body]) page.style.background = getComputedStyle(root).backgroundColor;
}

function render({ model, el }) {
  document.title = "Fraud desk";
  document.documentElement.lang = "en";
  const root = node("div", { class: "desk", "data-face": "opening" });
  const figures = tiles(), score = scores(), where = map(model.get("land"));
  const outcome = bars("outcomes", "Decisions", "by outcome", OUTCOMES.length);
  const category = bars("categories", "Categories", "and their share of alerts", CATEGORIES);
  const keys = help();
  const face = node("span", { "aria-hidden": "true" }), spoken = node("span", { class: "spoken", role: "status" }); // once for each face
  const status = node("p", { class: "face" }, node("i", { class: "dot" }), face, spoken);
  const versions = node("span", { class: "quiet versions" }), analyst = node("span", { class: "quiet analyst" });
  const theme = node("button", { type: "button", "aria-label": "Light or dark", title: "Light or dark (T)", "data-act": "theme" }, "◐");
  const asking = node("button", { type: "button", "aria-label": "Keyboard help", title: "Keyboard (?)" }, "?");
  const reload = node("button", { type: "button", class: "reload" }, "Reload");
  reload.hidden = true;
  const tabs = node("nav", { role: "tablist", "aria-label": "Views" }, ...VIEWS.map(([id, name], place) =>
    node("button", { type: "button", role: "tab", id: `tab-${id}`, "aria-controls": id, "aria-selected": String(place === 0) }, name)));

  let chosen = "", ticked = Date.now(), opening = 0;
  const open = (id) => model.send({ type: "open", id });
  const list = queue((id) => {
    if (!id) return;
    if (id !== chosen) shown.opens();
    chosen = id;
    sessionStorage.setItem("fraud-desk-case", id);
    list.mark(id);
    clearTimeout(opening);
    opening = setTimeout(open, 60, id); // who holds the arrow key down is not asking for each
  });
  const shown = caseOf(give);
  function give(says, note) {
    if (!chosen || shown.made.dataset.id !== chosen || shown.made.dataset.state === "waits" || shown.made.dataset.why) return;
    shown.waits();
    setTimeout(shown.gaveUp, 8000, chosen);
    model.send({ type: "verdict", id: chosen, says, note });
  }

  const live = node("main", { id: "live", role: "tabpanel", "aria-labelledby": "tab-live" },
    figures.made, list.made, shown.made, node("div", { class: "charts" }, score.made, outcome.made, category.made, where.made));
  root.append(node("header", { class: "bar" }, node("h1", {}, "Fraud desk"), tabs, status, reload, node("span", { class: "grow" }), versions, analyst, theme, asking), live, keys);
  el.append(root);
  themed(root);

  function look(name, says) {
    if (root.dataset.face !== name) say(spoken, says);
    root.dataset.face = name;
    reload.hidden = name !== "lost";
    say(face, says);
  }

  function tick() {
    const told = model.get("tick");
    if (!told.face) return;
    ticked = Date.now();
    look(told.face, told.says);
    root.dataset.ticks = String(1 + Number(root.dataset.ticks ?? 0));
    if (!told.tiles) return; // the log is away: what is shown stays, and is dimmed
    figures.fill(told); score.fill(told); outcome.fill(told.outcomes); category.fill(told.categories); where.fill(told); list.fill(told);
    say(versions, told.model);
    say(analyst, told.analyst || "not signed in");
    shown.may(told.analyst);
  }

  function opened() {
    const told = model.get("case");
    if (!told.id || told.id !== chosen) return;
    shown.fill(told);
    if (told.facts) list.told(told.id, told.verdict);
  }

  function press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (keys.open) return;
    const typing = event.target instanceof HTMLInputElement;
    if (event.key === "Escape") return list.focus();
    if (typing) return;
    const acts = {
      ArrowDown: () => list.step(1), ArrowUp: () => list.step(-1),
      Enter: () => { if (event.target.closest?.("button, summary")) return false; shown.made.focus(); },
      f: () => give("fraud", shown.note.value), g: () => give("genuine", shown.note.value), u: () => give("undo", shown.note.value),
      n: () => shown.note.focus(), r: () => list.adopt(), t: () => theme.click(), "?": () => keys.showModal(), "/": () => keys.showModal(),
    };
    const act = acts[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (act && act() !== false) event.preventDefault();
  }

  const alive = () => model.send({ type: "alive" });
  const seen = () => { if (!document.hidden) { ticked = Math.max(ticked, Date.now() - SILENCE_MS / 2); alive(); } };
  const watch = () => {
    const silent = Date.now() - ticked;
    if (document.hidden || silent < SILENCE_MS || root.dataset.face === "opening") return;
    look("lost", `No word from the desk's server for ${age(silent)}`);
  };
  const preferred = matchMedia("(prefers-color-scheme: dark)"), follow = () => themed(root);
  theme.addEventListener("click", () => { localStorage.setItem("fraud-desk-theme", root.dataset.theme === "dark" ? "light" : "dark"); themed(root); });
  asking.addEventListener("click", () => keys.showModal());
  reload.addEventListener("click", () => location.reload());
  document.addEventListener("keydown", press);
  document.addEventListener("visibilitychange", seen);
  preferred.addEventListener("change", follow);
  model.on("change:tick", tick);
  model.on("change:case", opened);
  const clocks = [setInterval(alive, 5000), setInterval(watch, 1000)];
  say(face, "Opening the log");
  alive();
  const last = sessionStorage.getItem("fraud-desk-case");
  if (last) { chosen = last; list.mark(last); open(last); }
  return () => {
    clocks.forEach(clearInterval);
    document.removeEventListener("keydown", press);
    document.removeEventListener("visibilitychange", seen);
    preferred.removeEventListener("change", follow);
  };
}

export default { render };
