// What tests/test_page.py asks the page's program, in Node and in a browser.
"use strict";
globalThis.gptWeights = (lines, checksum) => {
  try {
    globalThis.opened = gptPage.openWeights(lines, checksum);
  } catch (error) {
    globalThis.refused = String(error.message);
  }
};
globalThis.pageChecks = {
  header: () => [opened.header.parameters, opened.header.moments],
  encode: (texts) => texts.map((text) => opened.tokenizer.encode(text)),
  decode: (rows) => rows.map((ids) => opened.tokenizer.decode(ids)),
  async logits([moment, rows]) {
    const found = [];
    for (const ids of rows) {
      const text = new gptPage.PageText(opened.model(moment), opened.tokenizer, ids);
      found.push(Array.from(await text.logits()));
    }
    return found;
  },
  async greedy([moment, rows, n]) {
    const texts = [];
    for (const ids of rows) {
      const text = new gptPage.PageText(opened.model(moment), opened.tokenizer, ids);
      for (let i = 0; i < n; i++) await text.next({ temperature: 0 }, () => 0.5);
      texts.push(text.ids);
    }
    return texts;
  },
  // reading back for a panel must not change what is written afterwards
  async traced([moment, ids, n, back]) {
    const text = new gptPage.PageText(opened.model(moment), opened.tokenizer, ids);
    const greedy = () => text.next({ temperature: 0 }, () => 0.5);
    for (let i = 0; i < n; i++) await greedy();
    const trace = await text.trace(back);
    const heads = trace.layers.map((layer) => layer.heads.map((h) => Array.from(h.weights)));
    for (let i = 0; i < 5; i++) await greedy();
    return { ids: text.ids, heads, logits: Array.from(trace.logits), start: trace.start };
  },
  draws: ([rows, settings, darts]) =>
    rows.map((z, i) => {
      const options = { ...settings, nVocab: z.length };
      return gptPage.draw(gptPage.nextTokenProbs(Float32Array.from(z), options), darts[i]);
    }),
};
if (typeof process !== "undefined" && process.argv[2]) {
  const fs = require("fs"), vm = require("vm");
  const [, , name, program, weights] = process.argv;
  for (const path of [program, weights]) vm.runInThisContext(fs.readFileSync(path, "utf-8"));
  const input = JSON.parse(fs.readFileSync(0, "utf-8"));
  (async () => {
    const answer = globalThis.refused || await pageChecks[name](input);
    console.log(JSON.stringify(answer));
  })();
}
