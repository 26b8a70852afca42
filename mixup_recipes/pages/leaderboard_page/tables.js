/* The two tables: published numbers with our runs beside them, and what was trained here, seed by seed. */
const KINDS = { "reproduced within the band": "good", off: "bad", "too early to say": "wait", run: "ran" };
const SHOWN = { published: "not run here", "not run": "no number, not run here",
  "reproduced within the band": "reproduced" };

/** A scale from values to pixels that holds all of them. */
function scale(values, width, margin = 6) {
  const low = Math.min(...values), high = Math.max(...values), range = high - low || 1;
  return (value) => margin + ((value - low) / range) * (width - 2 * margin);
}

/** A published number as a tick, our seeds as dots, our mean with its standard deviation. */
function strip(x, { published, mean, std, values = [], zero }, label) {
  const made = svg("svg", { class: "strip", viewBox: "0 0 130 20", preserveAspectRatio: "xMinYMid meet", role: "img", "aria-label": label });
  made.append(svg("line", { x1: 2, x2: 128, y1: 10, y2: 10, class: "grid" }));
  if (known(zero)) made.append(svg("line", { x1: x(zero), x2: x(zero), y1: 2, y2: 18, class: "zero" }));
  if (known(published)) made.append(svg("line", { x1: x(published), x2: x(published), y1: 5, y2: 15, class: "tick" }));
  for (const value of values) made.append(svg("circle", { cx: x(value), cy: 10, r: 3, class: "seed" }));
  if (known(std)) made.append(svg("line", { x1: x(mean - std), x2: x(mean + std), y1: 10, y2: 10, class: "bar" }));
  if (known(mean)) made.append(svg("circle", { cx: x(mean), cy: 10, r: 3.6, class: "dot" }));
  return made;
}

/** What a strip has to hold of some rows. */
const reach = (rows) => rows.flatMap((r) => [r.top1, r.published, r.mean, ...(r.values || []),
  ...(known(r.std) ? [r.mean - r.std, r.mean + r.std] : [])]).filter(known);

/** Facts as a list: where a key is empty the line goes on from the one before. Commands can be selected at once. */
function factList(facts) {
  const list = el("dl");
  for (const [key, place] of facts) {
    const said = text(place), command = key === "run" && /^(mixup-recipes|accelerate) /.test(said);
    list.append(el("dt", {}, key), el("dd", {}, command ? el("code", {}, said) : said));
  }
  return list;
}

let count = 0;
/** A row and, behind it, what opens below it. ``detail`` makes that when it is first asked for. */
function rowPair(cells, name, note, columns, detail) {
  const id = `detail-${++count}`;
  const button = el("button", { type: "button", class: "name", "aria-expanded": "false", "aria-controls": id }, name);
  const row = el("tr", { class: "row", role: "row" });
  const info = el("tr", { class: "info", id, hidden: "", role: "row" });
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(open));
    row.classList.toggle("open", open);
    if (open && !info.firstChild) info.append(el("td", { colspan: columns, class: "detail", role: "cell" }, detail()));
    info.hidden = !open;
  });
  cells[1] = el("td", { class: "text full", role: "cell" }, button, note ? el("span", { class: "note" }, note) : null);
  row.append(...cells);
  return [row, info];
}

/** A table whose heads sort it. ``columns``: key, title, class, how a row is sorted by it; rows as they stand first. */
function sortable(columns, rows, render, title) {
  const body = el("tbody", { role: "rowgroup" });
  const [sortKey, direction] = state.sort.split("-");
  const chosen = columns.find((column) => column.key === sortKey && column.value);
  let shown = rows;
  if (chosen) {
    const sign = direction === "down" ? -1 : 1;
    shown = [...rows].sort((a, b) => {
      const x = chosen.value(a), y = chosen.value(b);
      if (!known(x) || !known(y)) return known(y) - known(x);
      return sign * (typeof x === "string" ? x.localeCompare(y, "en") : x - y);
    });
  }
  const head = columns.map((column) => {
    if (!column.value) return el("th", { scope: "col", class: `nosort ${column.class || ""}`, role: "columnheader" }, column.title);
    const now = column === chosen ? (direction === "down" ? "descending" : "ascending") : null;
    const button = el("button", { type: "button", "data-sort": column.key }, column.title);
    button.addEventListener("click", () => {
      const first = column.down ? "down" : "up", other = first === "down" ? "up" : "down";
      state.sort = sortKey !== column.key ? `${column.key}-${first}` : direction === first ? `${column.key}-${other}` : "";
      refresh(`[data-card="${CSS.escape(title)}"] [data-sort="${column.key}"]`);
    });
    return el("th", { scope: "col", class: column.class || "", "aria-sort": now, role: "columnheader" }, button);
  });
  shown.forEach((row, i) => body.append(...render(row, i)));
  return el("div", { class: "scroll" }, el("table", { class: "main", role: "table", "aria-label": title },
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, head)), body));
}

function td(label, content, kind = "") {
  const nothing = content === "–" || content === "";
  return el("td", { "data-label": label || null, class: `${kind}${nothing ? " void quiet" : ""}`, role: "cell" }, content);
}

/* ------------------------------------------------------------------------------------------ published */

function publishedCard(name, own) {
  const whole = DATA.cells.filter((cell) => cell.setting === name);
  const upstream = whole.filter((cell) => cell.trained_upstream && known(cell.top1)).map((cell) => cell.top1);
  const best = Math.max(...upstream), x = scale(reach(whole), 130);
  const first = [...own].sort((a, b) => (b.top1 ?? -1) - (a.top1 ?? -1));
  const anyRuns = own.some((cell) => known(cell.mean)), anyCost = own.some((cell) => known(cell.flops));
  const columns = [
    { key: "rank", title: "", class: "rank" },
    { key: "method", title: "Method", class: "text", value: (c) => c.method.toLowerCase() },
    { key: "year", title: "Year", class: "wideonly", value: (c) => DATA.mixers[c.mixer].year || null, down: true },
    { key: "alpha", title: "Alpha", class: "wideonly" },
    { key: "top1", title: "Published", value: (c) => c.top1, down: true },
    ...(anyRuns ? [{ key: "mean", title: "Our runs", value: (c) => c.mean, down: true },
      { key: "difference", title: "Difference", value: (c) => c.difference, down: true }] : []),
    { key: "strip", title: "low to high", class: "wideonly" },
    ...(anyCost ? [{ key: "flops", title: "FLOPs", class: "wideonly", value: (c) => c.flops }] : []),
    { key: "status", title: "Verdict", class: "text", value: (c) => c.status },
  ];
  const render = (c, i) => {
    const seeds = known(c.mean) ? ` (${many(c.seeds, "seed")})` : "";
    const label = `published ${fixed(c.top1)}${known(c.mean) ? `, our runs ${spread(c.mean, c.std)}` : ""}`;
    const mark = c.mark ? el("sup", { title: DATA.marks[c.mark] }, c.mark) : null;
    const cells = [
      el("td", { class: "rank", role: "cell" }, String(i + 1)), null,
      td("Year", DATA.mixers[c.mixer].year || "–", "wideonly"), td("Alpha", c.alpha || "–", "wideonly"),
      el("td", { "data-label": "Published", class: c.trained_upstream && c.top1 === best ? "best" : "", role: "cell" }, fixed(c.top1), mark),
      ...(anyRuns ? [td("Our runs", known(c.mean) ? twoPart(c.mean, c.std, 2, seeds) : "–"),
        td("Difference", known(c.difference) ? [signed(c.difference), " ", el("span", { class: "small" }, `band ±${fixed(c.band)}`)] : "–")] : []),
      td("", strip(x, { published: c.top1, mean: c.mean, std: c.std, values: c.values }, label), "wideonly"),
      ...(anyCost ? [td("FLOPs", known(c.flops) ? `${fixed(c.flops)}×` : "–", "wideonly")] : []),
      el("td", { class: "text words", role: "cell" },
        el("span", { class: `chip ${KINDS[c.status] || ""}`, title: text(c.words) }, SHOWN[c.status] || c.status)),
    ];
    return rowPair(cells, c.method, null, columns.length, () => factList(c.facts));
  };
  const protocols = new Set(whole.map((c) => (c.facts.find(([key]) => key === "protocol") || [])[1]));
  const all = [...protocols].filter(known).map(text), said = all.filter((words) => !words.startsWith("not stated"));
  if (said.length < all.length) said.push(said.length ? "some sources state no protocol" : all[0]);
  return el("section", { class: "card", "data-card": name }, cardHead(name, `reported: ${said.join("; ")}`),
    sortable(columns, first, render, name));
}

/* ------------------------------------------------------------------------------------------ trained here */

function seedTable(row) {
  const head = ["seed", "top-1", "minus vanilla", "top-5", "NLL", "ECE", "seconds", "images/s"];
  const lines = Object.entries(row.seeds).map(([seed, s]) => [seed, fixed(s.top1), signed(row.gaps[seed]), fixed(s.top5), fixed(s.nll, 3),
    fixed(s.ece), fixed(s.seconds, 0), fixed(s.img_per_s, 0)]);
  return el("table", { class: "seeds" }, el("thead", {}, el("tr", {}, head.map((h) => el("th", { scope: "col" }, h)))),
    el("tbody", {}, lines.map((line) => el("tr", {}, line.map((value) => el("td", {}, value))))));
}

function trainedCard(name, own) {
  const whole = DATA.trained[name].map((r) => ({ ...r, ...gapOf(r) }));
  const x = scale([0, ...whole.flatMap((r) => [...Object.values(r.gaps), ...(known(r.gap_std) ? [r.gap - r.gap_std, r.gap + r.gap_std] : [])])], 130);
  const any = whole.some((r) => known(r.gap));
  const columns = [
    { key: "rank", title: "", class: "rank" },
    { key: "method", title: "Method", class: "text", value: (r) => r.label },
    { key: "seeds", title: "Seeds", class: "wideonly", value: (r) => Object.keys(r.seeds).length, down: true },
    { key: "top1", title: "Top-1", value: (r) => r.top1, down: true },
    ...(any ? [{ key: "difference", title: "Minus vanilla", value: (r) => r.gap, down: true }, { key: "strip", title: "seed by seed" }] : []),
    { key: "nll", title: "NLL", value: (r) => r.nll },
    { key: "ece", title: "ECE", value: (r) => r.ece },
    { key: "seconds", title: "Seconds", class: "wideonly", value: (r) => r.seconds },
  ];
  const best = (key, pick) => pick(...whole.map((r) => r[key]).filter(known));
  const top = { top1: best("top1", Math.max), nll: best("nll", Math.min), ece: best("ece", Math.min) };
  const bold = (row, key) => (row[key] === top[key] ? "best" : "");
  const render = (r, i) => {
    const gaps = Object.values(r.gaps), range = gaps.length > 1 ? ` (${signed(Math.min(...gaps))} to ${signed(Math.max(...gaps))})` : "";
    const picture = gaps.length ? strip(x, { zero: 0, mean: r.gap, std: r.gap_std, values: gaps }, `difference to vanilla ${signed(r.gap)}${range}`) : "–";
    const cells = [
      el("td", { class: "rank", role: "cell" }, String(i + 1)), null,
      td("Seeds", String(Object.keys(r.seeds).length), "wideonly"),
      td("Top-1", twoPart(r.top1, r.top1_std), bold(r, "top1")),
      ...(any ? [td("Minus vanilla", known(r.gap) ? [signed(r.gap), el("span", { class: "small" }, range)] : "–"), td("", picture, "picture")] : []),
      td("NLL", twoPart(r.nll, r.nll_std, 3), bold(r, "nll")), td("ECE", twoPart(r.ece, r.ece_std), bold(r, "ece")),
      td("Seconds", fixed(r.seconds, 0), "wideonly"),
    ];
    const detail = () => el("div", {}, factList(r.facts), seedTable(r));
    const at = r.label.indexOf(" (");
    return rowPair(cells, at < 0 ? r.label : r.label.slice(0, at), at < 0 ? "" : r.label.slice(at + 2, -1), columns.length, detail);
  };
  return el("section", { class: "card", "data-card": name },
    cardHead(name, "mean ± standard deviation over seeds"), sortable(columns, own.map((r) => ({ ...r, ...gapOf(r) })), render, name));
}

/** Mean and standard deviation of the differences to vanilla, over the seeds that both have. */
function gapOf(row) {
  const gaps = Object.values(row.gaps);
  if (!gaps.length) return { gap: null, gap_std: null };
  const gap = gaps.reduce((a, b) => a + b) / gaps.length;
  const gap_std = gaps.length > 1 ? Math.sqrt(gaps.reduce((s, g) => s + (g - gap) ** 2, 0) / (gaps.length - 1)) : null;
  return { gap, gap_std };
}
