// The page: a current token, a chosen layer (-1: all), and maybe a pinned token.

const PASSAGES = 8;
const PRINTED_PASSAGES = 4;
const LONGEST_QUOTE = 70;
const SETTLING = 4; // Frames in which blocks that come into view get their true heights.
const SPEECH_DELAY = 250; // ms; a mouse that passes over tokens is not commented on.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const reads = new Reads(data, (source) => $(`rows-${source}`).textContent);
const map = new StripMap($("map"), reads);
const spans = [...document.querySelectorAll(".text span")];
const indexOf = new Map(spans.map((span, index) => [span, index]));
const marked = new Set(data.marked);
const state = { current: Math.max(0, data.prompt_tokens - 1), layer: -1, pinned: null };
let lit = [];
let speech = 0;

const number = (value) => value.toLocaleString("en");
const shown = () => state.pinned ?? state.current;
const piece = (index) => spans[index].textContent;
const isGenerated = (index) => index >= data.prompt_tokens;

function quote(start, end) {
  let text = "";
  for (let i = start; i <= end && text.length <= LONGEST_QUOTE; i += 1) text += piece(i);
  text = text.replace(/\s*\n\s*/g, " ⏎ ");
  return text.length > LONGEST_QUOTE ? `${text.slice(0, LONGEST_QUOTE)}…` : text || "▯";
}

function layerName(index) {
  if (index < 0) return "all layers";
  const { layer, source } = data.layers[index];
  return layer === source ? `layer ${layer}` : `layer ${layer} (reads layer ${source}'s selection)`;
}

function where({ start, end }) {
  return start === end ? number(start) : `${number(start)} to ${number(end)}`;
}

function readCount(strengths, row) {
  if (strengths === null) return "not kept";
  return row < data.index_topk
    ? `all ${number(row + 1)} tokens`
    : `${number(strengths.size)} of ${number(row + 1)}`;
}

function markedCount(strengths) {
  let count = 0;
  for (const position of strengths.keys()) count += marked.has(position);
  return count;
}

function markedBefore(row) {
  return data.marked.filter((position) => position <= row).length;
}

function light(strengths) {
  for (const span of lit) span.classList.remove("read1", "read2", "read3");
  lit = [];
  for (const [position, { level }] of strengths ?? []) {
    spans[position].classList.add(`read${level}`);
    lit.push(spans[position]);
  }
}

function followedBy(row) {
  if (row + 1 >= spans.length) return "nothing followed";
  return `then came “${quote(row + 1, row + 1)}”`;
}

function fillPanel(row, strengths) {
  $("token").textContent = `“${quote(row, row)}”`;
  const part = isGenerated(row) ? "generated" : "prompt";
  const pinned = state.pinned === null ? "" : "pinned, ";
  $("where").textContent = `${pinned}position ${number(row)}, ${part}; ${followedBy(row)}`;
  const body = $("by-layer").tBodies[0];
  data.layers.forEach((_, index) => {
    const own = reads.strengths(index, row);
    const line = body.rows[index];
    line.className = index === state.layer ? "chosen" : "";
    line.cells[1].textContent = readCount(own, row);
    if (marked.size) {
      line.cells[2].textContent = own ? `${markedCount(own)} of ${markedBefore(row)}` : "";
    }
  });
  const list = $("passages");
  list.replaceChildren();
  if (strengths === null) {
    $("passages-title").textContent =
      `This page holds what tokens from position ${number(data.first_row)} on read.`;
    return;
  }
  const runs = passages(strengths);
  const all = row < data.index_topk ? `, which see at most index_topk ${data.index_topk}` : "";
  $("passages-title").textContent =
    `Passages read in ${layerName(state.layer)}${all ? `: all${all}` : ", strongest first"}`;
  for (const run of runs.slice(0, PASSAGES)) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = quote(run.start, run.end);
    button.addEventListener("click", () => {
      pin(row);
      bring(spans[run.start], "center");
    });
    const item = document.createElement("li");
    item.append(button, ` ${where(run)}, ${run.count} read`);
    list.append(item);
  }
}

function describe(row, strengths) {
  const kind = isGenerated(row) ? "generated " : "";
  const start = `${kind}token ${number(row)}, “${quote(row, row)}”, ${layerName(state.layer)}: `;
  if (strengths === null) return `${start}its reads are not on this page.`;
  const places = passages(strengths).slice(0, 3);
  const text = places.map((run) => `“${quote(run.start, run.end)}” at ${where(run)}`).join("; ");
  const known = marked.size
    ? `, ${markedCount(strengths)} of ${markedBefore(row)} marked tokens` : "";
  const pinned = state.pinned === null ? "" : "pinned, ";
  return `${pinned}${start}read ${readCount(strengths, row)}${known}; strongest ${text}.`;
}

function show() {
  const row = shown();
  const strengths = reads.strengths(state.layer, row);
  light(strengths);
  map.draw(state.layer, row);
  fillPanel(row, strengths);
  clearTimeout(speech);
  speech = setTimeout(() => { $("live").textContent = describe(row, strengths); }, SPEECH_DELAY);
}

/** The current token alone can be tabbed to: one stop for the whole text. */
function mark(className, before, now) {
  if (before !== null) spans[before].classList.remove(className);
  if (now !== null) spans[now].classList.add(className);
}

function bring(span, block, frames = SETTLING) {
  span.scrollIntoView({ block });
  if (frames > 0) requestAnimationFrame(() => bring(span, "nearest", frames - 1));
}

function moveTo(index, { focus = false } = {}) {
  const target = Math.max(0, Math.min(spans.length - 1, index));
  for (const name of ["tabindex", "role", "aria-pressed"]) spans[state.current].removeAttribute(name);
  mark("current", state.current, target);
  state.current = target;
  spans[target].tabIndex = 0;
  spans[target].setAttribute("role", "button");
  spans[target].setAttribute("aria-pressed", String(state.pinned === target));
  if (focus) {
    spans[target].focus({ preventScroll: true });
    bring(spans[target], "nearest");
  }
  show();
}

function pin(index) {
  mark("pinned", state.pinned, index);
  state.pinned = index;
  spans[state.current].setAttribute("aria-pressed", String(index === state.current));
  show();
}

function chooseLayer(index) {
  const count = data.layers.length + 1;
  state.layer = ((index + 1 + count) % count) - 1;
  $("layer").value = String(state.layer);
  describeLegend();
  show();
}

function describeLegend() {
  const one = ["read", "best half of its scores", "best eighth"];
  const all = ["read in one layer", "in several", "in every layer"];
  const names = state.layer < 0 && data.layers.length > 1 ? all : one;
  names.forEach((name, index) => { $(`legend${index + 1}`).textContent = name; });
}

const KEYS = {
  ArrowLeft: () => moveTo(state.current - 1, { focus: true }),
  ArrowRight: () => moveTo(state.current + 1, { focus: true }),
  ArrowUp: () => chooseLayer(state.layer - 1),
  ArrowDown: () => chooseLayer(state.layer + 1),
  Home: () => moveTo(0, { focus: true }),
  End: () => moveTo(spans.length - 1, { focus: true }),
  Enter: () => pin(state.pinned === state.current ? null : state.current),
  " ": () => pin(state.pinned === state.current ? null : state.current),
};
const KEYS_ANYWHERE = {
  "[": () => chooseLayer(state.layer - 1),
  "]": () => chooseLayer(state.layer + 1),
  Escape: () => pin(null),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inText = event.target.closest?.(".text") !== null;
  const action = (inText && KEYS[event.key]) || KEYS_ANYWHERE[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

/** Where the mouse was last: text that scrolls under a resting mouse is not hovered. */
const mouse = { x: -1, y: -1, next: null };

function onHover(event) {
  const rests = event.screenX === mouse.x && event.screenY === mouse.y;
  Object.assign(mouse, { x: event.screenX, y: event.screenY });
  const index = indexOf.get(event.target);
  if (rests || index === undefined || state.pinned !== null) return;
  if (mouse.next === null) {
    requestAnimationFrame(() => {
      moveTo(mouse.next);
      mouse.next = null;
    });
  }
  mouse.next = index;
}

function onClick(event) {
  const index = indexOf.get(event.target);
  if (index === undefined) return;
  moveTo(index, { focus: true });
  pin(state.pinned === index ? null : index);
}

/** What print shows: the passages that each row which chose a generated token read. */
function fillReport() {
  const last = Math.max(data.prompt_tokens, data.tokens - 1);
  const rows = new Set();
  if (state.pinned !== null) rows.add(state.pinned);
  for (let row = data.prompt_tokens - 1; row < last; row += 1) rows.add(row);
  const title = document.createElement("h2");
  title.textContent = "What each row read before the token that follows it";
  const note = document.createElement("p");
  note.textContent = `The prompt's ${number(data.prompt_tokens)} tokens are left out. Of each layer `
    + `the ${PRINTED_PASSAGES} strongest passages, with their positions.`;
  const chosen = data.layers.map((_, index) => index)
    .filter((index) => state.layer < 0 || index === state.layer);
  $("report").replaceChildren(title, note, ...[...rows].map((row) => reportOf(row, chosen)));
}

function reportOf(row, layers) {
  const section = document.createElement("section");
  const title = document.createElement("h3");
  title.textContent = `“${quote(row, row)}” (position ${number(row)}), ${followedBy(row)}`;
  const list = document.createElement("ul");
  for (const index of layers) {
    const strengths = reads.strengths(index, row);
    const item = document.createElement("li");
    const known = strengths && marked.size
      ? `, ${markedCount(strengths)} of ${markedBefore(row)} marked` : "";
    item.append(`${layerName(index)}, ${readCount(strengths, row)}${known}: `);
    const runs = strengths ? passages(strengths).slice(0, PRINTED_PASSAGES) : [];
    runs.forEach((run, place) => {
      const text = document.createElement("q");
      text.textContent = quote(run.start, run.end);
      item.append(text, ` ${where(run)}${place + 1 < runs.length ? "; " : ""}`);
    });
    list.append(item);
  }
  section.append(title, list);
  return section;
}

function fillTable() {
  const body = $("by-layer").tBodies[0];
  data.layers.forEach(({ layer, source }) => {
    const line = body.insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = layer === source ? `${layer}` : `${layer}, reads layer ${source}'s selection`;
    line.append(head, document.createElement("td"));
    if (marked.size) line.append(document.createElement("td"));
  });
}

function measureHeader() {
  const height = document.querySelector("header").offsetHeight;
  document.documentElement.style.setProperty("--header", `${height + 12}px`);
}

function start() {
  fillTable();
  describeLegend();
  for (const text of document.querySelectorAll(".text")) {
    text.addEventListener("pointerover", onHover);
    text.addEventListener("click", onClick);
  }
  document.addEventListener("keydown", onKey);
  $("layer").addEventListener("change", (event) => chooseLayer(Number(event.target.value)));
  $("map").addEventListener("click", (event) => {
    bring(spans[map.position(event)], "center");
  });
  window.addEventListener("beforeprint", fillReport);
  window.addEventListener("resize", () => { measureHeader(); show(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  measureHeader();
  moveTo(state.current);
  measureHeader();
}

start();
