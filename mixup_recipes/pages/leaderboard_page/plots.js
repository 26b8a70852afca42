/* The plots: accuracy against cost, and accuracy over the epochs. */
const WIDE = innerWidth < 672 ? 340 : 460, HIGH = 300, LEFT = 56, RIGHT = 16, TOP = 12, BOTTOM = 40;
const HUES = [232, 18, 152, 42, 285, 195, 340, 95];

/** Round steps of an axis, about ``n`` of them. */
function steps(low, high, n = 5) {
  const raw = (high - low) / n || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= raw * 0.7);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) found.push(Number(at.toPrecision(12)));
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

/** The same on a logarithmic axis: 1, 2 and 5 of each power of ten. ``low`` and ``high`` are logarithms. */
function powers(low, high) {
  const found = [];
  for (let power = Math.floor(low); power <= high; power++) for (const k of [1, 2, 5]) found.push(k * 10 ** power);
  return { found: found.filter((v) => Math.log10(v) >= low && Math.log10(v) <= high), digits: 0 };
}

/** Axes with their grid, and where a value is drawn. ``log``: whether the values of x are on a logarithmic axis. */
function axes(xs, ys, xTitle, yTitle, log = false) {
  const put = log ? Math.log10 : (v) => v;
  const widen = (values) => {
    const low = Math.min(...values), high = Math.max(...values), room = (high - low || 1) * 0.08;
    return [low - room, high + room];
  };
  const [x0, x1] = widen(xs.map(put)), [y0, y1] = widen(ys);
  const x = (v) => LEFT + ((put(v) - x0) / (x1 - x0)) * (WIDE - LEFT - RIGHT);
  const y = (v) => HIGH - BOTTOM - ((v - y0) / (y1 - y0)) * (HIGH - TOP - BOTTOM);
  const made = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img" });
  const down = steps(y0, y1), along = log ? powers(x0, x1) : steps(x0, x1);
  for (const v of down.found) {
    made.append(svg("line", { x1: LEFT, x2: WIDE - RIGHT, y1: y(v), y2: y(v), class: "grid" }));
    made.append(svg("text", { x: LEFT - 6, y: y(v) + 4, "text-anchor": "end" }, v.toFixed(down.digits)));
  }
  for (const v of along.found) made.append(svg("text", { x: x(v), y: HIGH - BOTTOM + 16, "text-anchor": "middle" }, v.toFixed(along.digits)));
  made.append(svg("text", { x: (LEFT + WIDE - RIGHT) / 2, y: HIGH - 6, "text-anchor": "middle" }, xTitle));
  made.append(svg("text", { x: 12, y: (HIGH - BOTTOM) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(HIGH - BOTTOM) / 2})` }, yTitle));
  return { made, x, y };
}

/** A name beside a point, on whichever side nothing stands yet; false where there is no room. */
function nameBeside(made, taken, px, py, name, strong) {
  const width = name.length * 6.1, places = [[7, 4, "start"], [-7, 4, "end"], [7, -5, "start"], [7, 13, "start"], [-7, -5, "end"], [-7, 13, "end"], [0, -8, "middle"], [0, 17, "middle"]];
  for (const [dx, dy, anchor] of places) {
    const left = px + dx - (anchor === "end" ? width : anchor === "middle" ? width / 2 : 0), top = py + dy - 9;
    const box = [left, top, left + width, top + 12];
    const free = !taken.some((b) => box[0] < b[2] && b[0] < box[2] && box[1] < b[3] && b[1] < box[3]);
    if (!free || box[0] < LEFT || box[2] > WIDE - 2 || box[1] < 0 || box[3] > HIGH - BOTTOM) continue;
    taken.push(box);
    made.append(svg("text", { x: px + dx, y: py + dy, "text-anchor": anchor, class: strong ? "beside strong" : "beside" }, name));
    return true;
  }
  return false;
}

/** Points of cost and accuracy; those that nothing cheaper beats stand on a line. */
function costPlot(points, xTitle, title, log) {
  const reachOf = (p) => (known(p.std) ? [p.y - p.std, p.y + p.std] : [p.y]);
  const { made, x, y } = axes(points.map((p) => p.x), points.flatMap(reachOf), xTitle, "top-1, %", log);
  made.setAttribute("aria-label", `${title}: ${points.map((p) => `${p.name} ${fixed(p.y)} at ${fixed(p.x)}`).join(", ")}`);
  const sorted = [...points].sort((a, b) => a.x - b.x || b.y - a.y), front = [];
  for (const p of sorted) if (!front.length || p.y > front[front.length - 1].y) front.push(p);
  made.append(svg("path", { class: "front", d: front.map((p, i) => `${i ? "L" : "M"}${x(p.x).toFixed(1)} ${y(p.y).toFixed(1)}`).join("") }));
  const taken = points.map((p) => [x(p.x) - 4, y(p.y) - 4, x(p.x) + 4, y(p.y) + 4]);
  for (const p of [...points].sort((a, b) => front.includes(b) - front.includes(a) || b.y - a.y)) {
    const on = front.includes(p), about = `${p.name}: ${spread(p.y, p.std)} at ${p.cost}`;
    if (known(p.std)) made.append(svg("line", { x1: x(p.x), x2: x(p.x), y1: y(p.y - p.std), y2: y(p.y + p.std), class: on ? "bar" : "whisker" }));
    made.append(svg("circle", { cx: x(p.x), cy: y(p.y), r: 4, class: on ? "dot" : "plain", "data-name": p.name }, svg("title", {}, about)));
    nameBeside(made, taken, x(p.x), y(p.y), p.name.replace(/ \(.*/, "…"), on);
  }
  return made;
}

/** The cards of accuracy against cost: of published numbers, and of what was trained here. */
function costCards() {
  const cards = [];
  const published = DATA.cells.filter((c) => known(c.top1) && known(c.flops) && passes(c));
  for (const [name, own] of bySetting(published)) {
    const best = new Map();  // of a method with several alphas the best number
    for (const c of own) if (!best.has(c.mixer) || best.get(c.mixer).y < c.top1) best.set(c.mixer, { name: c.method, x: c.flops, y: c.top1, cost: `${fixed(c.flops)} times the FLOPs` });
    if (best.size > 1) cards.push(costCard(name, [...best.values()], "FLOPs of a training step, relative to no mixing", "published numbers, counted FLOPs"));
  }
  for (const [name, rows] of Object.entries(DATA.trained)) {
    const own = rows.filter((r) => passes({ ...r, setting: name }));
    const points = own.filter((r) => r.seconds > 0).map((r) => ({ name: r.label, x: r.seconds, y: r.top1, std: r.top1_std, cost: `${fixed(r.seconds, 0)} seconds` }));
    if (points.length > 1) cards.push(costCard(name, points, "seconds of a run, median over seeds (log scale)", "trained here, times as the records have them", true));
  }
  return cards;
}

function costCard(name, points, xTitle, about, log = false) {
  return el("section", { class: "card", "data-card": name }, cardHead(name, about), costPlot(points, xTitle, name, log));
}

/* ------------------------------------------------------------------------------------------ curves */

function curveCards() {
  const rows = DATA.curves.filter(passes);
  return bySetting(rows).flatMap(([name, own]) =>
    [...new Set(own.map((r) => r.metric))].map((metric) => curveCard(name, own.filter((r) => r.metric === metric), metric)));
}

function curveCard(name, own, metric) {
  const lines = own.flatMap((r) => Object.entries(r.heads).map(([head, points]) =>
    ({ name: [r.run, head].filter(Boolean).join(", "), mixer: r.mixer, points: points.filter(([, v]) => known(v)) })));
  const all = lines.flatMap((line) => line.points), mixers = [...new Set(own.map((r) => r.mixer))];
  if (!all.length) return null;
  const { made, x, y } = axes(all.map(([e]) => e), all.map(([, v]) => v), "epoch", `${metric}, %`);
  made.setAttribute("aria-label", `${metric} over the epochs: ${lines.map((l) => `${l.name} ends at ${fixed(l.points.at(-1)?.[1])}`).join(", ")}`);
  const colour = (i) => `oklch(0.62 0.15 ${HUES[i % HUES.length]})`, dash = (i) => (i < HUES.length ? "none" : i < 2 * HUES.length ? "6 3" : "2 3");
  const legend = el("ul", { class: "legend" });
  mixers.forEach((mixer, i) => {
    for (const line of lines.filter((l) => l.mixer === mixer)) {
      const d = line.points.map(([e, v], k) => `${k ? "L" : "M"}${x(e).toFixed(1)} ${y(v).toFixed(1)}`).join("");
      made.append(svg("path", { d, class: "line", stroke: colour(i), "stroke-dasharray": dash(i) }, svg("title", {}, line.name)));
    }
    const runs = own.filter((r) => r.mixer === mixer).map((r) => r.run).join(", ");
    const key = svg("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: colour(i), "stroke-width": 2, "stroke-dasharray": dash(i) }));
    legend.append(el("li", {}, key, `${mixer} `, el("span", { class: "quiet" }, `(${runs})`)));
  });
  return el("section", { class: "card", "data-card": name }, cardHead(name, many(own.length, "run")), made, legend);
}
