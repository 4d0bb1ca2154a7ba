// What a page's script finds, as JSON, without a browser: node page_stand_in.js PAGE '[[token, budget, layer, head], ...]'
// where budget null is the one it was decoded with, and -1 is all layers or heads.
"use strict";
const text = require("fs").readFileSync(process.argv[2], "utf8");
const contents = (attribute) => {
  const found = text.matchAll(new RegExp(`<script type="[^"]*" ${attribute}>([^]*?)</script>`, "g"));
  return [...found].map((match) => ({ textContent: match[1] }));
};
const elements = { decoded: {}, budget: {}, about: contents('id="about"')[0], shares: contents('id="shares"')[0] };
globalThis.document = { getElementById: (id) => elements[id], querySelectorAll: () => contents('class="step"') };

const script = text.slice(text.lastIndexOf("<script>") + 8, text.lastIndexOf("start()"));
const find = new Function(`${script}
  return async (token, budget, layer, head) => {
    shares ??= new Float32Array(await inflated($("shares")));
    $("decoded").checked = budget === null;
    $("budget").value = budget;
    Object.assign(view, { token, layer, head });
    loaded = new Uint8Array(await inflated(packedSteps[token]));
    const found = tally();
    return { ...found, ...Object.fromEntries([...KINDS, "mass"].map((name) => [name, [...found[name]]])) };
  };`)();

(async () => {
  const found = [];
  for (const view of JSON.parse(process.argv[3])) found.push(await find(...view));
  console.log(JSON.stringify(found));
})();
