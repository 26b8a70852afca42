"use strict";
/* What all views share: the data, elements, numbers, and the state that the address holds behind its #. */
const DATA = JSON.parse(document.getElementById("data").textContent);

/** An element with attributes and children; a text becomes a text node, so that no data is ever read as HTML. */
function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(key, value);
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

/** The same for a picture. */
function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const text = (place) => DATA.texts[place];
const known = (value) => value !== null && value !== undefined;
const fixed = (value, digits = 2) => (known(value) ? value.toFixed(digits) : "–");
const signed = (value, digits = 2) => (known(value) ? (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits) : "–");
const many = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
/** A number, and its standard deviation in small. */
const twoPart = (value, std, digits = 2, more = "") => [fixed(value, digits), " ",
  el("span", { class: "small" }, (known(std) ? `± ${fixed(std, digits)}` : "") + more)];
const spread = (value, std, digits = 2) => fixed(value, digits) + (known(std) ? ` ± ${fixed(std, digits)}` : "");
const benchmarkOf = {};
for (const cell of DATA.cells) benchmarkOf[cell.setting] = cell.benchmark;

/* ------------------------------------------------------------------------------------------ state */

const VIEWS = {
  published: "Published",
  trained: "Trained here",
  cost: "Cost",
  ...(DATA.curves.length ? { curves: "Curves" } : {}),
};
const EMPTY = { view: "published", text: "", setting: "", backbone: "", method: "", year: "", status: "", sort: "" };
let state = { ...EMPTY };

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = { ...EMPTY };
  for (const key of Object.keys(EMPTY)) if (given.has(key)) state[key] = given.get(key);
  if (!(state.view in VIEWS)) state.view = EMPTY.view;
}

function writeHash() {
  const given = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) if (value !== EMPTY[key]) given.set(key, value);
  history.replaceState(null, "", `#${given}`);
}

/** Whether a row of any view passes the filters. ``row``: setting, mixer, and perhaps status and label. */
function passes(row) {
  const setting = DATA.settings[row.setting], mixer = DATA.mixers[row.mixer];
  const wanted = state.setting;
  if (wanted.startsWith("benchmark:") ? benchmarkOf[row.setting] !== wanted.slice(10) : wanted && row.setting !== wanted) return false;
  if (state.backbone && setting.backbone !== state.backbone) return false;
  if (state.method && row.mixer !== state.method) return false;
  if (state.year && (mixer.year || "none") !== state.year) return false;
  if (state.status && state.view === "published" && row.status !== state.status) return false;
  if (!state.text) return true;
  const words = [row.name, row.recipe, row.label, row.run, row.method, row.mixer, mixer.method, mixer.year, row.setting, setting.title,
    setting.backbone, DATA.benchmarks[benchmarkOf[row.setting]]].join(" ").toLowerCase();
  return state.text.toLowerCase().split(/\s+/).every((word) => words.includes(word));
}

/** Rows by their setting, in the order of the settings. */
function bySetting(rows) {
  const found = new Map(Object.keys(DATA.settings).map((name) => [name, []]));
  for (const row of rows) found.get(row.setting).push(row);
  return [...found].filter(([, own]) => own.length);
}

/** The head of a card: what a setting is. */
function cardHead(name, ...more) {
  const setting = DATA.settings[name];
  const plain = [setting.backbone, known(setting.epochs) ? many(setting.epochs, "epoch") : ""].filter((words) => !setting.title.includes(words));
  const about = [...plain, ...more];
  return el("header", {}, el("h2", {}, el("code", {}, name)),
    el("p", {}, setting.title), el("p", {}, about.filter(Boolean).join(" · ")));
}
