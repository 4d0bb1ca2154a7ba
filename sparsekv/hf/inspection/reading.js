// What was read, as the page holds it: sums over the layers and kv heads that are looked at.
"use strict";

const $ = (id) => document.getElementById(id);
const about = JSON.parse($("about").textContent);
const packedSteps = [...document.querySelectorAll("script.step")];
const ALL = -1;
const KINDS = ["found", "spare", "missed"]; // read and wanted, read alone, wanted alone
const MASS = Float32Array.from({ length: 256 }, (_, code) => code && 2 ** ((code / 255 - 1) * about.codes.octaves));

const cells = []; // a layer and a kv head each, as the arrays have them
about.layers.forEach((layer, place) => {
  for (let head = 0; head < layer.heads; head++) cells.push({ place, head });
});

const view = { token: 0, layer: ALL, head: ALL, first: 0, here: 0 }; // first: page of the text that is in the document
let shares = null; // [tokens, cells, budgets + 1, 2] as the recorder describes them
let loaded = null; // the bytes of one token, [cells, 2, pages]

async function inflated(element) {
  const bytes = Uint8Array.from(atob(element.textContent), (sign) => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

function budgetPlace() {
  return $("decoded").checked ? about.budgets.length : Number($("budget").value);
}

function chosenCells() {
  const isChosen = ({ place, head }) =>
    (view.layer === ALL || place === view.layer) && (view.head === ALL || head === view.head);
  return [...cells.keys()].filter((cell) => isChosen(cells[cell]));
}

function shareOf(cell, which) {
  return shares[((view.token * cells.length + cell) * (about.budgets.length + 1) + budgetPlace()) * 2 + which];
}

// Whether each page is read: by the bit of what was decoded, or by the least budget that reads it.
function readPages(levels) {
  const { read, noLevel } = about.codes;
  const place = budgetPlace();
  const isRead = new Uint8Array(256);
  for (let level = 0; level < 256; level++) {
    isRead[level] = place === about.budgets.length ? (level & read) > 0 : (level & noLevel) <= place;
  }
  return levels.map((level) => isRead[level]);
}

// The `count` pages of most attention; of equal ones the earlier.
function wantedPages(coded, count) {
  const held = new Uint32Array(256);
  for (const code of coded) held[code]++;
  let least = 255;
  for (; least > 0 && held[least] <= count; least--) count -= held[least];
  return coded.map((code) => (code > least || (code > 0 && code === least && count-- > 0) ? 1 : 0));
}

// By page, the share of the chosen cells in which it is of each kind, and the mean attention it has.
function tally() {
  const numPages = loaded.length / (2 * cells.length);
  const chosen = chosenCells();
  const result = { numPages, numRead: 0, numFound: 0, numWanted: 0, inside: 0, most: 0 };
  [...KINDS, "mass"].forEach((name) => (result[name] = new Float32Array(numPages)));
  for (const cell of chosen) {
    const [levels, coded] = [0, 1].map((row) => loaded.subarray((2 * cell + row) * numPages).subarray(0, numPages));
    addCell(result, levels, coded, 1 / chosen.length);
    result.inside += shareOf(cell, 0) / chosen.length;
    result.most += shareOf(cell, 1) / chosen.length;
  }
  return result;
}

function addCell(result, levels, coded, weight) {
  const read = readPages(levels);
  const count = read.reduce((sum, isRead) => sum + isRead, 0);
  const wanted = wantedPages(coded, count);
  const kinds = [null, result.spare, result.missed, result.found]; // by read + 2 * wanted
  result.numRead += count * weight;
  for (let page = 0; page < read.length; page++) {
    const kind = read[page] + 2 * wanted[page];
    if (kind) kinds[kind][page] += weight;
    if (kind >= 2) result.numWanted++;
    if (kind === 3) result.numFound++;
    result.mass[page] += MASS[coded[page]] * weight;
  }
}
