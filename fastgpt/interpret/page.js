"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const T = D.tokens.length, L = D.layers.length, H = D.heads.length, MEAN = -1;
const $ = (id) => document.getElementById(id);
const clamp = (x) => Math.max(0, Math.min(1, x));
const percent = (p) => (100 * p).toFixed(p < 0.0995 ? 1 : 0) + " %";
const signed = (x, n = 2) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(n);

function make(tag, name, text, where) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text; // a token is text, whatever it holds
  if (where) where.append(made);
  return made;
}

// ---------------------------------------------------------------- weights, 16 bits each

function unpack(told) {
  const bytes = Uint8Array.from(atob(told), (c) => c.charCodeAt(0)), view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, n) => view.getUint16(2 * n, true) / 65535);
}
const weights = unpack(D.weights), rolled = unpack(D.rollout);
const starts = []; // where a row begins in its head
let size = 0;
for (const row of D.rows) { starts.push(size); size += row + 1; }

/** Weights of row D.rows[n] on the keys up to it. */
function rowOf(layer, head, n) {
  const length = D.rows[n] + 1;
  if (head !== MEAN) return weights.subarray((layer * H + head) * size + starts[n]).subarray(0, length);
  const sum = new Float32Array(length);
  for (let h = 0; h < H; h++) rowOf(layer, h, n).forEach((w, key) => { sum[key] += w / H; });
  return sum;
}
const rolloutRow = (row) => rolled.subarray(row * (row + 1) / 2, (row + 1) * (row + 2) / 2);

// ---------------------------------------------------------------- what is chosen

const ranked = []; // heads, from the one without which most is lost
D.lost.forEach((layer, l) => layer.forEach((lost, h) => ranked.push([lost, l, h])));
ranked.sort((a, b) => b[0] - a[0]);
const kept = ([, l, h]) => D.layers.includes(l) && D.heads.includes(h);
const first = ranked.find(kept);
const chosen = { layer: D.layers.indexOf(first[1]), head: D.heads.indexOf(first[2]), n: D.rows.length - 1, mode: "attention" };
let hovered = null; // a place in D.rows while the pointer is over a token
const current = () => (hovered === null ? chosen.n : hovered);
const nameOf = (layer, head) => `Layer ${D.layers[layer]}, ` + (head === MEAN ? `mean of ${H === 1 ? "its head" : H + " heads"}` : `head ${D.heads[head]}`);

// ---------------------------------------------------------------- the text

const strip = $("strip"), tokens = [];
const places = new Map(D.rows.map((row, n) => [row, n]));
if (/\p{Script=Hiragana}|\p{Script=Katakana}/u.test(D.text)) strip.lang = "ja";
else if (/\p{Script=Han}/u.test(D.text)) strip.lang = "zh";
D.tokens.forEach((text, t) => {
  const tok = make("button", "tok", undefined, strip);
  tok.type = "button";
  tok.tabIndex = -1;
  make("b", "", text, tok);
  tok.share = make("i", "", "", tok);
  if (/^[␣⏎⇥␍]+$/.test(text)) tok.classList.add("blank");
  if (text.includes("⏎")) make("span", "break", undefined, strip);
  tokens.push(tok);
  const n = places.get(t);
  if (n === undefined) { tok.setAttribute("aria-disabled", "true"); return; }
  tok.addEventListener("click", () => { chosen.n = n; hovered = null; show(); });
  tok.addEventListener("pointerenter", (e) => { if (e.pointerType === "mouse") { hovered = n; show(); } });
});
strip.addEventListener("pointerleave", () => { hovered = null; show(); });
strip.addEventListener("keydown", (e) => {
  const last = D.rows.length - 1;
  const to = { ArrowLeft: chosen.n - 1, ArrowRight: chosen.n + 1, Home: 0, End: last }[e.key];
  if (to === undefined) return;
  e.preventDefault();
  chosen.n = Math.max(0, Math.min(last, to));
  hovered = null;
  show();
  tokens[D.rows[chosen.n]].focus();
});
const goal = make("span", "tok goal", undefined, strip);
make("b", "", D.target[0], goal);
make("i", "", percent(D.target[1]), goal);
goal.title = "the token that is explained, and its probability";

function tint(tok, w, shade, share) {
  tok.style.setProperty("--w", w.toFixed(3));
  tok.style.setProperty("--tint", `var(--${shade})`);
  tok.classList.toggle("tinted", w > 0.05);
  tok.share.textContent = share;
}

function most(row, n = 3) {
  return Array.from(row, (w, key) => [w, key]).sort((a, b) => b[0] - a[0]).slice(0, n)
    .filter(([w]) => w >= 0.005).map(([w, key]) => `${D.tokens[key]} (${percent(w)})`).join(", ");
}

const HOW = {
  attention: "Hover, tap or move by arrow keys to a token: colours say where the chosen head looks from there.",
  rollout: "Rollout: how much of each token has arrived at the chosen position through all layers and residual connections.",
  scores: "Integrated gradients: nats that each token adds to the log-probability of the token that is explained.",
};

function showText() {
  const n = current(), at = D.rows[n], { mode, layer, head } = chosen;
  const row = mode === "rollout" ? rolloutRow(at) : rowOf(layer, head, n);
  const widest = Math.max(...D.scores.map(Math.abs), 1e-9);
  tokens.forEach((tok, t) => {
    if (mode === "scores") {
      const s = D.scores[t];
      tint(tok, Math.abs(s) / widest, s < 0 ? "minus" : "plus", signed(s));
    } else {
      const w = t < row.length ? row[t] : 0;
      tint(tok, Math.pow(clamp(w), 0.65), mode === "rollout" ? "roll" : "heat", w >= 0.005 ? percent(w) : "");
    }
    tok.classList.toggle("late", mode !== "scores" && t > at);
    tok.classList.toggle("on", mode !== "scores" && t === at);
    tok.tabIndex = places.get(t) === chosen.n ? 0 : -1;
    tok.setAttribute("aria-pressed", String(t === at));
  });
  const from = `“${D.tokens[at]}” (position ${at})`;
  if (mode === "attention") $("said").textContent = `${nameOf(layer, head)}: ${from} looks at ${most(row)}.`;
  else if (mode === "rollout") $("said").textContent = `Rollout: what is at ${from} after the last layer came from ${most(row)}.`;
  else {
    const sum = D.scores.reduce((a, b) => a + b, 0);
    $("said").textContent = `log p(“${D.target[0]}”) is ${D.value.toFixed(3)}, and ${D.baseline.toFixed(3)} when every token is the mean of all; the tokens' shares sum to ${signed(sum, 3)}.`;
  }
  $("how").textContent = HOW[mode];
}

for (const radio of document.querySelectorAll("#mode input")) {
  radio.addEventListener("change", () => { chosen.mode = radio.value; show(); });
}

// ---------------------------------------------------------------- colours of a canvas

let ramp = [];
function colours() {
  const style = getComputedStyle(document.documentElement);
  const hex = (name) => style.getPropertyValue(name).trim().match(/[0-9a-f]{2}/gi).map((x) => parseInt(x, 16));
  const low = hex("--card"), high = hex("--heat");
  ramp = Array.from({ length: 256 }, (_, n) => {
    const a = Math.pow(n / 255, 0.6);
    return low.map((c, i) => Math.round(c + (high[i] - c) * a));
  });
}

/** One pixel a weight. */
function pixels(canvas, layer, head) {
  const rows = D.rows.length;
  canvas.width = T; canvas.height = rows;
  const pen = canvas.getContext("2d"), image = pen.createImageData(T, rows);
  for (let n = 0; n < rows; n++) {
    rowOf(layer, head, n).forEach((w, key) => {
      image.data.set([...ramp[Math.round(255 * clamp(w))], 255], 4 * (n * T + key));
    });
  }
  pen.putImageData(image, 0, 0);
}

// ---------------------------------------------------------------- the heads

const grid = $("grid"), heads = new Map();
const columns = [MEAN, ...D.heads.map((_, h) => h)];
const side = Math.max(32, Math.min(84, Math.floor((grid.parentElement.clientWidth - 64) / columns.length) - 10));
const worst = Math.max(...D.lost.flat().map(Math.abs), 1e-9);
grid.style.gridTemplateColumns = `max-content repeat(${columns.length}, max-content)`;
const top_ = make("div", "", undefined, grid);
top_.setAttribute("role", "row");
make("span", "axis side over", "", top_).setAttribute("role", "columnheader");
for (const head of columns) {
  make("span", "axis over", head === MEAN ? "mean" : String(D.heads[head]), top_).setAttribute("role", "columnheader");
}
for (let layer = 0; layer < L; layer++) {
  const line = make("div", "", undefined, grid);
  line.setAttribute("role", "row");
  make("span", "axis side", `layer ${D.layers[layer]}`, line).setAttribute("role", "rowheader");
  for (const head of columns) {
    const cell = make("button", "head", undefined, line);
    cell.type = "button";
    cell.setAttribute("role", "gridcell");
    const canvas = make("canvas", "", undefined, cell);
    canvas.style.width = side + "px";
    canvas.style.height = Math.max(8, Math.round(side * Math.min(1, D.rows.length / T))) + "px";
    let said = nameOf(layer, head);
    if (head !== MEAN) {
      const lost = D.lost[D.layers[layer]][D.heads[head]];
      const bar = make("span", "lost", undefined, cell);
      bar.style.setProperty("--lost", clamp(Math.abs(lost) / worst));
      bar.style.setProperty("--tint", lost < 0 ? "var(--minus)" : "var(--plus)");
      said += `; ${signed(lost, 3)} nats lost without it`;
    }
    cell.title = said;
    cell.setAttribute("aria-label", said);
    cell.addEventListener("click", () => choose(layer, head));
    heads.set(`${layer} ${head}`, cell);
  }
}
grid.addEventListener("keydown", (e) => {
  let { layer, head } = chosen;
  if (e.key === "ArrowUp") layer -= 1;
  else if (e.key === "ArrowDown") layer += 1;
  else if (e.key === "ArrowLeft") head -= 1;
  else if (e.key === "ArrowRight") head += 1;
  else if (e.key === "Home") head = MEAN;
  else if (e.key === "End") head = H - 1;
  else return;
  e.preventDefault();
  choose(Math.max(0, Math.min(L - 1, layer)), Math.max(MEAN, Math.min(H - 1, head)));
  heads.get(`${chosen.layer} ${chosen.head}`).focus();
});

function choose(layer, head) {
  chosen.layer = layer;
  chosen.head = head;
  chosen.mode = "attention";
  document.querySelector("#mode input[value=attention]").checked = true;
  show();
}

// ---------------------------------------------------------------- one head, large

const map = $("map"), shapes = { left: 0, top: 0, cell: 1 };

function drawMap() {
  const rows = D.rows.length, labelled = T <= 40 && rows <= 40;
  const room = $("large").clientWidth;
  const pen = map.getContext("2d"), font = `12px ${getComputedStyle(document.body).fontFamily}`;
  pen.font = font;
  const cut = (text) => (pen.measureText(text).width <= 92 ? text : [...text].slice(0, 9).join("") + "…");
  const names = D.tokens.map(cut);
  const wide = labelled ? Math.ceil(Math.max(...D.rows.map((row) => pen.measureText(names[row]).width))) + 8 : 0;
  const high = labelled ? Math.ceil(Math.max(...names.map((name) => pen.measureText(name).width)) * 0.78) + 12 : 0;
  const slant = labelled ? Math.ceil(pen.measureText(names[T - 1]).width * 0.62) : 0;
  const cell = Math.max(1, Math.min(T > 12 ? 30 : 44, (room - wide - slant) / T));
  const scale = window.devicePixelRatio || 1;
  const width = Math.min(room, wide + T * cell + slant), height = high + rows * cell + 1;
  map.width = Math.round(width * scale); map.height = Math.round(height * scale);
  map.style.width = width + "px"; map.style.height = height + "px";
  Object.assign(shapes, { left: wide, top: high, cell });
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--fg");
  const small = document.createElement("canvas");
  pixels(small, chosen.layer, chosen.head);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, wide, high, T * cell, rows * cell);
  const n = current();
  if (labelled) {
    pen.font = font;
    pen.textBaseline = "middle";
    for (let at = 0; at < rows; at++) {
      pen.fillStyle = at === n ? ink : style.getPropertyValue("--muted");
      pen.textAlign = "right";
      pen.fillText(names[D.rows[at]], wide - 5, high + (at + 0.5) * cell);
    }
    pen.fillStyle = style.getPropertyValue("--muted");
    pen.textAlign = "left";
    for (let key = 0; key < T; key++) {
      pen.save();
      pen.translate(wide + (key + 0.5) * cell, high - 6);
      pen.rotate(-Math.PI / 3.4);
      pen.fillText(names[key], 0, 0);
      pen.restore();
    }
  }
  pen.strokeStyle = style.getPropertyValue("--rule");
  pen.lineWidth = 1;
  pen.strokeRect(wide + 0.5, high + 0.5, T * cell - 1, rows * cell - 1);
  pen.strokeStyle = ink;
  pen.lineWidth = 1.5;
  pen.strokeRect(wide + 0.75, high + n * cell + 0.75, (D.rows[n] + 1) * cell - 1.5, Math.max(cell - 1.5, 1));
  $("map-title").textContent = nameOf(chosen.layer, chosen.head);
  map.setAttribute("aria-label", `${nameOf(chosen.layer, chosen.head)}: attention weights, ${rows} rows by ${T} columns. ` + $("said").textContent);
}

function under(e) {
  const box = map.getBoundingClientRect();
  const n = Math.floor((e.clientY - box.top - shapes.top) / shapes.cell);
  const key = Math.floor((e.clientX - box.left - shapes.left) / shapes.cell);
  return n >= 0 && n < D.rows.length && key >= 0 && key <= D.rows[n] ? [n, key] : null;
}
map.addEventListener("pointermove", (e) => {
  const at = under(e);
  $("under").textContent = at === null ? "" :
    `${D.tokens[D.rows[at[0]]]} → ${D.tokens[at[1]]}: ${percent(rowOf(chosen.layer, chosen.head, at[0])[at[1]])}`;
});
map.addEventListener("pointerleave", () => { $("under").textContent = ""; });
map.addEventListener("click", (e) => {
  const at = under(e);
  if (at !== null) { chosen.n = at[0]; show(); }
});

// ---------------------------------------------------------------- bars

function bars(where, rows, low, high, shown, is) {
  where.style.setProperty("--zero", `${100 * -low / (high - low)}%`);
  for (const [name, value] of rows) {
    const label = make("span", "name" + (name === is ? " is" : ""), name, where);
    label.title = name;
    const fill = make("span", "fill", undefined, make("span", "track", undefined, where));
    const from = Math.min(0, value), length = Math.abs(value) / (high - low);
    fill.style.left = `${100 * (from - low) / (high - low)}%`;
    fill.style.width = `max(2px, ${100 * length}%)`;
    if (low < 0) fill.style.background = `var(--${value < 0 ? "minus" : "plus"})`;
    make("span", "num" + (name === is ? " is" : ""), shown(value), where);
  }
}
bars($("next"), D.next, 0, Math.max(...D.next.map(([, p]) => p)), percent, D.target[0]);
const parts = [["embedding", D.sum.embedding]];
D.sum.attention.forEach((value, n) => parts.push([`layer ${n} attention`, value], [`layer ${n} feed-forward`, D.sum.mlp[n]]));
if (D.sum.bias) parts.push(["last norm's bias", D.sum.bias]);
parts.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
const few = parts.length > 10 ? parts.slice(0, 9) : parts, rest = parts.slice(few.length);
if (rest.length) few.push([`${rest.length} others`, rest.reduce((sum, [, value]) => sum + value, 0)]);
bars($("sum"), few, Math.min(-1e-6, ...few.map(([, v]) => v)), Math.max(1e-6, ...few.map(([, v]) => v)), signed);
make("p", "muted small", `All of them sum to the logit, ${D.sum.logit.toFixed(2)}, with the divisor of the last norm held.`, $("sum").parentElement);

// ---------------------------------------------------------------- lens

const lens = $("lens"), firstColumn = Math.max(0, T - 64);
{
  const line = make("tr", "", undefined, make("thead", "", undefined, lens));
  make("th", "", "after", line).scope = "col";
  for (let t = firstColumn; t < T; t++) make("th", "", D.tokens[t], line).scope = "col";
  make("th", "num", `p(${D.target[0]})`, line).scope = "col";
  make("th", "num", "rank", line).scope = "col";
  const body = make("tbody", "", undefined, lens);
  D.lens.forEach((layer, n) => {
    const row = make("tr", "", undefined, body);
    make("th", "", n === 0 ? "embedding" : `layer ${n - 1}`, row).scope = "row";
    for (let t = firstColumn; t < T; t++) {
      const [text, p] = layer.each[t], cell = make("td", "", text, row);
      cell.style.setProperty("--w", Math.pow(p, 0.8).toFixed(3));
      if (t === T - 1 && text === D.target[0]) cell.classList.add("hit");
      cell.title = `after “${D.tokens[t]}”: ${text} ${percent(p)}`;
    }
    make("td", "num", percent(layer.p), row);
    make("td", "num", String(layer.rank), row);
  });
  lens.parentElement.scrollLeft = 1e6; // to the last position
}
function showLens() {
  const column = D.rows[current()] - firstColumn + 1;
  for (const row of lens.rows) {
    for (const cell of row.cells) cell.classList.toggle("col", column > 0 && cell.cellIndex === column);
  }
}

// ---------------------------------------------------------------- best heads

{
  const best = $("best"), line = make("tr", "", undefined, make("thead", "", undefined, best));
  for (const name of ["head", "nats lost without it", "adds to the logit", "the last position looks at"]) make("th", "", name, line).scope = "col";
  const body = make("tbody", "", undefined, best);
  for (const [lost, l, h] of ranked.slice(0, 10)) {
    const row = make("tr", "", undefined, body), name = make("th", "", undefined, row);
    name.scope = "row";
    const layer = D.layers.indexOf(l), head = D.heads.indexOf(h), last = places.get(T - 1);
    if (layer >= 0 && head >= 0) {
      const button = make("button", "", `layer ${l}, head ${h}`, name);
      button.type = "button";
      button.addEventListener("click", () => {
        choose(layer, head);
        $("reading").scrollIntoView({ block: "start" });
      });
    } else name.textContent = `layer ${l}, head ${h}`;
    make("td", "num", signed(lost, 3), row);
    make("td", "num", signed(D.direct[l][h], 3), row);
    make("td", "", layer >= 0 && head >= 0 && last !== undefined ? most(rowOf(layer, head, last)) : "–", row);
  }
}

// ---------------------------------------------------------------- all of it

function show() {
  showText();
  for (const [key, cell] of heads) {
    const on = key === `${chosen.layer} ${chosen.head}`;
    cell.setAttribute("aria-selected", String(on));
    cell.tabIndex = on ? 0 : -1;
  }
  drawMap();
  showLens();
}
function redraw() {
  colours();
  for (const [key, cell] of heads) pixels(cell.querySelector("canvas"), ...key.split(" ").map(Number));
  show();
}
$("goal").textContent = D.target[0];
$("facts").textContent = `${T} tokens; ${D.model}`;
document.title = `Why ${D.target[0]} comes next`;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
new ResizeObserver(() => drawMap()).observe($("large"));
redraw();
const whole = grid.parentElement, cell = heads.get(`${chosen.layer} ${chosen.head}`);
whole.scrollTop = cell.offsetTop - whole.clientHeight / 2;
whole.scrollLeft = cell.offsetLeft - whole.clientWidth / 2;
