// What the page shows: a token of the answer, a budget, and one or all of the layers and kv heads. (After reading.js.)
"use strict";

const SHOWN = Math.ceil(4096 / about.pageSize); // pages of the text that are in the document at once
const MAP_AREA = 180; // pixels of height that the map takes if it can
const NEAR_END = 300; // pixels from where more text is brought in
const numHeads = Math.max(...about.layers.map((layer) => layer.heads));
let seen = null; // what `tally` found last

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const number = (count) => count.toLocaleString("en", { maximumFractionDigits: 1 });
const limited = (value, low, high) => Math.max(low, Math.min(value, high));
const color = (name, alpha) => `rgba(${getComputedStyle(document.documentElement).getPropertyValue(name)}, ${alpha})`;

// The kind that most of the chosen cells have in a page, and how many have it.
function kindOf(page) {
  const kind = KINDS.reduce((best, other) => (seen[other][page] > seen[best][page] ? other : best));
  return { kind, share: seen[kind][page] };
}

// -- what is drawn

function canvasOf(id, width, height) {
  const canvas = $(id);
  const ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

function mapLayout() {
  const width = $("map").clientWidth;
  const side = limited(Math.floor(Math.sqrt((width * MAP_AREA) / about.pages.length)), 3, 16);
  const columns = Math.max(1, Math.floor(width / side));
  return { width, side, columns, height: Math.ceil(about.pages.length / columns) * side };
}

function drawMap() {
  const { width, side, columns, height } = mapLayout();
  const context = canvasOf("map", width, height);
  const colors = Object.fromEntries(KINDS.map((kind) => [kind, color(`--${kind}`, 1)]));
  const empty = `rgba(${getComputedStyle(document.documentElement).getPropertyValue("--empty")})`;
  for (let page = 0; page < seen.numPages; page++) {
    const { kind, share } = kindOf(page);
    const place = [(page % columns) * side, Math.floor(page / columns) * side, side - 1, side - 1];
    context.globalAlpha = share ? 0.15 + 0.85 * share : 1;
    context.fillStyle = share ? colors[kind] : empty;
    context.fillRect(...place);
  }
  context.globalAlpha = 1;
  context.strokeStyle = getComputedStyle(document.body).color;
  context.lineWidth = 2;
  context.strokeRect((view.here % columns) * side, Math.floor(view.here / columns) * side, side, side);
  $("map").setAttribute("aria-label", `Map of ${seen.numPages} pages. ${$("figures").textContent}`);
}

function drawGrid() {
  const side = limited(Math.floor(240 / about.layers.length), 6, 22);
  $("grid").style.width = `${numHeads * side + 1}px`;
  const context = canvasOf("grid", numHeads * side + 1, about.layers.length * side + 1);
  cells.forEach(({ place, head }, cell) => {
    context.fillStyle = color("--found", Math.max(0.05, shareOf(cell, 0)));
    context.fillRect(head * side, place * side, side - 1, side - 1);
  });
  context.strokeStyle = getComputedStyle(document.body).color;
  chosenCells()
    .filter(() => view.layer !== ALL || view.head !== ALL)
    .forEach((cell) => context.strokeRect(cells[cell].head * side, cells[cell].place * side, side - 1, side - 1));
  $("grid").setAttribute("aria-label", "Share of attention in the pages read, by layer and kv head: choose above");
  $("grid").onclick = (event) => {
    view.layer = limited(Math.floor(event.offsetY / side), 0, about.layers.length - 1);
    view.head = limited(Math.floor(event.offsetX / side), 0, about.layers[view.layer].heads - 1);
    draw();
  };
}

function tellFigures() {
  const layer = view.layer === ALL ? "all layers" : `layer ${about.layers[view.layer].index}`;
  const head = view.head === ALL ? "all kv heads" : `kv head ${view.head}`;
  const mean = chosenCells().length > 1 ? " on average" : "";
  $("figures").textContent =
    `“${about.answer[view.token]}”, ${layer}, ${head}: ${number(seen.numRead)} of ${number(seen.numPages)} pages ` +
    `read${mean}. They hold ${percent(seen.inside)} of the attention over all pages; as many pages could hold ` +
    `${percent(seen.most)}. Of the pages that dense attention wanted, ` +
    `${percent(seen.numWanted ? seen.numFound / seen.numWanted : 1)} were read.`;
  const place = budgetPlace();
  $("token-told").textContent = `${view.token + 1} of ${about.answer.length}`;
  $("budget-told").textContent =
    place === about.budgets.length ? about.budget : `${number(about.budgets[place])} tokens (what it would have read)`;
}

// -- the text: only some of its pages are in the document

function showText(first) {
  view.first = limited(first, 0, Math.max(0, about.pages.length - SHOWN));
  const spans = about.pages.slice(view.first, view.first + SHOWN).map((text) => {
    const span = document.createElement("span");
    span.textContent = text;
    return span;
  });
  $("text").replaceChildren(...spans);
  colorText();
}

function colorText() {
  [...$("text").children].forEach((span, i) => {
    const page = view.first + i;
    const { kind, share } = page < seen.numPages ? kindOf(page) : { share: 0 };
    span.className = `${share ? kind : ""} ${page === view.here ? "here" : ""}`.trim();
    span.style.setProperty("--share", share);
    const start = page * about.pageSize;
    const mass = seen.mass[page] ? percent(seen.mass[page]) : "hardly any";
    span.title = `page ${page}, tokens ${start} to ${start + about.pageSize - 1}: ${mass} of the attention`;
  });
}

const spanOf = (page) => $("text").children[page - view.first];

function slideText() {
  const text = $("text");
  const isNearStart = text.scrollTop < NEAR_END && view.first > 0;
  const isNearEnd = text.scrollHeight - text.scrollTop - text.clientHeight < NEAR_END;
  if (!isNearStart && !(isNearEnd && view.first + SHOWN < about.pages.length)) return;
  const before = view.first;
  const first = limited(before + Math.ceil(SHOWN / 4) * (isNearStart ? -1 : 1), 0, about.pages.length - SHOWN);
  const anchor = Math.max(before, first); // a page that is there before and after
  const place = spanOf(anchor).offsetTop;
  showText(first);
  text.scrollTop += spanOf(anchor).offsetTop - place;
}

function goTo(page) {
  view.here = page;
  showText(page - Math.floor(SHOWN / 2));
  $("text").scrollTop = spanOf(page).offsetTop - $("text").clientHeight / 3;
  drawMap();
}

function goToNext(kinds, by) {
  for (let i = 1; i <= seen.numPages; i++) {
    const page = (view.here + by * i + seen.numPages * 2) % seen.numPages;
    if (kinds.some((kind) => seen[kind][page] > 0)) return goTo(page);
  }
}

// -- what is chosen

function draw() {
  if (!loaded) return;
  if (view.layer !== ALL && view.head >= about.layers[view.layer].heads) view.head = ALL;
  $("layer").value = view.layer;
  $("head").value = view.head;
  seen = tally();
  tellFigures();
  drawMap();
  drawGrid();
  colorText();
}

async function chooseToken(token) {
  view.token = limited(token, 0, about.answer.length - 1);
  $("token").value = view.token;
  [...$("answer").children].forEach((button, i) => {
    button.setAttribute("aria-pressed", i === view.token);
    button.tabIndex = i === view.token ? 0 : -1;
  });
  if ($("answer").contains(document.activeElement)) $("answer").children[view.token].focus();
  const wanted = view.token;
  const bytes = new Uint8Array(await inflated(packedSteps[wanted]));
  if (wanted !== view.token) return; // another one was chosen meanwhile
  loaded = bytes;
  draw();
}

function chooseLayer(place) {
  view.layer = limited(place, ALL, about.layers.length - 1);
  draw();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
  const isVertical = event.key === "ArrowUp" || event.key === "ArrowDown";
  if (isVertical && event.target === $("text")) return; // it scrolls
  const by = event.shiftKey ? -1 : 1;
  const actions = {
    ArrowLeft: () => chooseToken(view.token - 1),
    ArrowRight: () => chooseToken(view.token + 1),
    ArrowUp: () => chooseLayer(view.layer - 1),
    ArrowDown: () => chooseLayer(view.layer + 1),
    n: () => goToNext(["found", "spare"], by),
    m: () => goToNext(["missed"], by),
  };
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function addOptions(id, names) {
  $(id).append(new Option("all", ALL), ...names.map((name, i) => new Option(name, i)));
}

async function start() {
  addOptions("layer", about.layers.map((layer) => layer.index));
  addOptions("head", [...Array(numHeads).keys()]);
  $("token").max = about.answer.length - 1;
  $("budget").max = about.budgets.length - 1;
  $("budget").value = Math.floor(about.budgets.length / 2);
  about.answer.forEach((piece, token) => {
    const button = document.createElement("button");
    button.textContent = piece.trim() ? piece : JSON.stringify(piece);
    button.onclick = () => chooseToken(token);
    $("answer").append(button);
  });
  $("token").oninput = () => chooseToken(Number($("token").value));
  $("budget").oninput = () => {
    $("decoded").checked = false;
    draw();
  };
  $("decoded").onchange = draw;
  $("layer").onchange = () => chooseLayer(Number($("layer").value));
  $("head").onchange = () => {
    view.head = Number($("head").value);
    draw();
  };
  $("next-read").onclick = () => goToNext(["found", "spare"], 1);
  $("next-missed").onclick = () => goToNext(["missed"], 1);
  $("map").onclick = (event) => {
    const { side, columns } = mapLayout();
    const page = Math.floor(event.offsetY / side) * columns + Math.floor(event.offsetX / side);
    if (page < about.pages.length) goTo(page);
  };
  $("text").onscroll = slideText;
  document.addEventListener("keydown", onKey);
  window.addEventListener("resize", draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  shares = new Float32Array(await inflated($("shares")));
  await chooseToken(0);
  showText(0);
}

start().catch((error) => ($("figures").textContent = `This browser cannot show the page: ${error}`));
