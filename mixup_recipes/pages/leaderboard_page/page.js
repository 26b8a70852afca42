/* The page itself: views, filters, and what is drawn when one of them changes. */
const form = document.getElementById("filters");
const FILTERS = ["text", "setting", "backbone", "method", "year", "status"];

/** The choices of a select: an empty one that takes everything, then those given as [value, words], perhaps in groups. */
function fill(name, all, options) {
  const select = form.elements[name];
  select.append(el("option", { value: "" }, all));
  for (const entry of options) {
    if (entry.group) select.append(el("optgroup", { label: entry.group }, entry.options.map(([v, words]) => el("option", { value: v }, words))));
    else select.append(el("option", { value: entry[0] }, entry[1]));
  }
}

function fillAll() {
  const groups = Object.entries(DATA.benchmarks).map(([key, title]) => {
    const own = Object.keys(DATA.settings).filter((s) => benchmarkOf[s] === key);
    return { group: title, options: [[`benchmark:${key}`, `all of: ${title}`], ...own.map((s) => [s, s])] };
  });
  const small = Object.keys(DATA.settings).filter((s) => !benchmarkOf[s]);
  if (small.length) groups.unshift({ group: "Without published numbers", options: small.map((s) => [s, s]) });
  const unique = (values) => [...new Set(values)].sort((a, b) => a.localeCompare(b, "en", { numeric: true, sensitivity: "base" }));
  fill("setting", "all settings", groups);
  fill("backbone", "all backbones", unique(Object.values(DATA.settings).map((s) => s.backbone)).map((b) => [b, b]));
  const methods = Object.entries(DATA.mixers).map(([m, about]) => [m, about.method]);
  fill("method", "all methods", methods.sort((a, b) => a[1].localeCompare(b[1], "en", { sensitivity: "base" })));
  fill("year", "all years", [...unique(Object.values(DATA.mixers).map((m) => m.year).filter(Boolean)).reverse().map((y) => [y, y]), ["none", "no paper"]]);
  fill("status", "all verdicts", unique(DATA.cells.map((c) => c.status)).map((s) => [s, SHOWN[s] || s]));
}

function drawn() {
  if (state.view === "published") {
    const rows = DATA.cells.filter(passes);
    return [rows.length, "cell", bySetting(rows).map(([name, own]) => publishedCard(name, own)), ""];
  }
  if (state.view === "trained") {
    const found = Object.entries(DATA.trained).map(([name, rows]) => [name, rows.filter((r) => passes({ ...r, setting: name }))]).filter(([, own]) => own.length);
    return [found.reduce((n, [, own]) => n + own.length, 0), "row", found.map(([name, own]) => trainedCard(name, own)), ""];
  }
  const cards = (state.view === "cost" ? costCards() : curveCards()).filter(Boolean);
  return [cards.length, "plot", cards.length ? [el("div", { class: "plots" }, cards)] : [], ""];
}

const EXPLAINED = {
  published: "Top-1 in percent; bold is the best number of a setting that OpenMixup trained. Open a row to see who measured it, how, and the command that repeats it.",
  trained: "Top-1 and ECE in percent, NLL in nats. Differences to vanilla are taken seed by seed. Open a row for each seed and the command that repeats it.",
  cost: "Methods in the accent colour stand on the line that nothing cheaper beats. Seconds depend on the machine and on what else ran on it.",
  curves: "Accuracy of the runs that were given to the command, over their epochs.",
};

/** Draw the view anew and keep the focus on the control that asked for it. */
function refresh(focus) {
  writeHash();
  for (const button of document.querySelectorAll("#views button")) button.setAttribute("aria-pressed", String(button.dataset.view === state.view));
  for (const name of FILTERS) {
    const control = form.elements[name];
    if (control.value !== state[name]) control.value = state[name];
    control.classList.toggle("set", Boolean(state[name]));
  }
  form.elements.status.closest(".field").hidden = state.view !== "published";
  const [number, word, cards] = drawn();
  document.getElementById("count").textContent = `${many(number, word)}. ${EXPLAINED[state.view]}`;
  const empty = el("p", { class: "empty" }, "Nothing passes these filters. ");
  document.getElementById("view").replaceChildren(...(cards.length ? cards : [empty]));
  if (focus) document.querySelector(focus)?.focus();
}

function start() {
  const numbered = DATA.cells.filter((c) => known(c.top1)).length;
  const trained = Object.values(DATA.trained).flat();
  const seeds = trained.reduce((n, r) => n + Object.keys(r.seeds).length, 0);
  document.getElementById("lead").textContent = `${many(numbered, "published number")} of mixup methods for image classification with their sources, ` +
    `our runs beside them, and ${many(seeds, "run")} of our own.`;
  for (const [key, title] of Object.entries(VIEWS)) {
    const button = el("button", { type: "button", "data-view": key, "aria-pressed": "false" }, title);
    button.addEventListener("click", () => { state.view = key; state.sort = ""; refresh(); });
    document.getElementById("views").append(button);
  }
  fillAll();
  form.addEventListener("input", (event) => { if (event.target.name in state) { state[event.target.name] = event.target.value; refresh(); } });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => { event.preventDefault(); for (const name of FILTERS) state[name] = ""; refresh(); });
  document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); document.getElementById("main").focus(); });
  addEventListener("hashchange", () => { readHash(); refresh(); });
  const marks = Object.entries(DATA.marks).map(([mark, meaning]) => `${mark} ${meaning}.`).join(" ");
  document.getElementById("foot").append(
    el("p", {}, `${marks} FLOPs are those of a training step relative to one without mixing.`),
    el("p", {}, "A verdict compares our finished seeds with the published number: within the band, the 95 % interval of what the seed alone does, the number is reproduced."),
    el("p", {}, "Written by ", el("code", {}, DATA.command), ` of Mixup Recipes ${DATA.version} from the published cells and the run records.`));
  readHash();
  refresh();
}

start();
