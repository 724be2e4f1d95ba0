// The page around the model: fields, text and panels. Nothing here computes a logit.
"use strict";
{
const element = (tag, attributes, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);  // strings become text, never markup
  return made;
};
const shown = (text) => text.replace(/\n/g, "⏎").replace(/ /g, "␣") || "·";
const percent = (p) => (p >= 0.9995 ? "100" : (100 * p).toPrecision(p < 0.001 ? 1 : 3).slice(0, 4)) + "%";
const number = (v) => v.toFixed(Math.abs(v) < 10 ? 3 : 1);
const length = (x) => Math.sqrt(x.reduce((sum, v) => sum + v * v, 0));
const HEADING = document.querySelector(".gpt-alone") ? "h2" : "h3";  // below the page's own
const EXAMPLES = ["The river", "In the village of", ""];
const STAGES = ["embedding", "scores", "weights", "residual stream", "logits"];

// A mode says how a prompt becomes tokens, where a text ends and what is said of it.
// A moment of the weight file names its mode. Chapter 21 has the marks of a conversation.
const MARKS = { "\xfd": "user", "\xfe": "assistant", "\xff": "end" };
const DECLINE = "I do not know .";
gptPage.modes = {
  continue: {
    label: "Beginning of a text", legend: ({ step }) => `${step} steps`, marks: {}, temperature: 0.7,
    prompts: () => EXAMPLES,
    ids: (tokenizer, prompt) => [tokenizer.endOfText, ...tokenizer.encode(prompt)],
    verdict: () => "",
  },
  ask: {
    label: "A question about TinyWiki", legend: () => "to answer", marks: MARKS, temperature: 0,
    prompts: ({ known }) => Object.keys(known).filter((_, i, all) => i % Math.ceil(all.length / 24) === 0),
    ids: (tokenizer, prompt) => [
      tokenizer.endOfText, tokenizer.ranks.get("\xfd"), ...tokenizer.encode(" " + prompt.trim()),
      tokenizer.ranks.get("\xff"), tokenizer.ranks.get("\xfe")],
    verdict: ({ known }, prompt, reply, ended) => {
      const question = prompt.trim(), answer = Object.keys(known).includes(question) ? known[question] : "";
      if (!ended) return "The answer did not end.";
      if (!answer) return "This page does not know the answer to this question.";
      if (answer === reply) return reply === DECLINE ? "Right: no article tells this." : "Right.";
      if (reply === DECLINE) return `Not known to the model. An article tells it: ${answer}`;
      return answer === DECLINE ? "Invented: no article tells this." : `Wrong. The article says: ${answer}`;
    },
  },
};

// between two tokens: let the browser draw and listen, about 30 times a second
const channel = new MessageChannel(), waiting = [];
channel.port1.onmessage = () => waiting.shift()();
function pauses(before = () => {}) {
  let last = performance.now();
  return () => {
    if (performance.now() - last < 32) return undefined;
    before();
    return new Promise((done) => {
      waiting.push(() => { last = performance.now(); done(); });
      channel.port2.postMessage(0);
    });
  };
}

let arrived = null;  // what a weight file said: opened weights, or an error
const loading = new Map();
globalThis.gptWeights = (lines, checksum) => {
  try {
    arrived = { weights: gptPage.openWeights(lines, checksum) };
  } catch (error) {
    arrived = { error: `The weights are damaged (${error.message}). Get the file again.` };
  }
};
function loadWeights(address) {
  if (!address) {
    return Promise.resolve(arrived || { error: "The weights are damaged: the file is not whole." });
  }
  if (!loading.has(address)) {
    loading.set(address, new Promise((done) => {
      const missing = { error: "The weights cannot be read: the file is missing or not whole." };
      arrived = null;
      document.head.append(element("script", {
        src: address, onload: () => done(arrived || missing), onerror: () => done(missing),
      }));
    }));
  }
  return loading.get(address);
}

class View {
  constructor(root) {
    this.root = root;
    this.small = root.dataset.form === "small";
    this.pieces = [];
    const id = `gpt-${View.count = (View.count || 0) + 1}`;
    const field = (label, attributes) => {
      const input = element("input", { type: "number", ...attributes });
      return [input, element("label", {}, label, input)];
    };
    this.prompt = element("textarea", { id, maxlength: 4000, rows: 2, spellcheck: "false" });
    this.prompt.value = EXAMPLES[0];
    this.promptLabel = element("label", { for: id }, gptPage.modes.continue.label);
    this.others = element("select", { "aria-label": "examples", onchange: () => {
      this.prompt.value = this.others.value;
      this.write();
    } });
    this.button = element("button", { class: "gpt-main", type: "button", onclick: () => this.press() }, "Write");
    const labels = {};
    [this.temperature, labels.temperature] = field("temperature", { min: 0, max: 5, step: 0.1, value: 0.7 });
    [this.topK, labels.topK] = field("top-k", { min: 0, step: 1, value: 0 });
    [this.topP, labels.topP] = field("top-p", { min: 0.05, max: 1, step: 0.05, value: 1 });
    [this.seed, labels.seed] = field("seed", { min: 0, step: 1, value: 1 });
    [this.count, labels.count] = field("tokens", { min: 1, max: 1000, step: 1, value: this.small ? 80 : 120 });
    this.moments = element("fieldset", { hidden: "" }, element("legend", {}, "Trained for"));
    this.notice = element("p", {});
    this.status = element("p", { role: "status" });
    this.spoken = element("div", { class: "gpt-hidden", "aria-live": "polite" });
    this.output = element("div", {
      class: "gpt-text", role: "group", "aria-label": "text of the model", tabindex: 0,
      onkeydown: (event) => this.key(event),
    });
    this.panels = element("div", {});
    root.replaceChildren(
      this.promptLabel, this.prompt, ...(this.small ? [] : [this.others]),
      ...(this.small ? [] : [element("fieldset", {}, ...Object.values(labels))]),
      this.moments, element("p", {}, this.button), this.notice, this.output,
      this.status, this.spoken, this.panels);
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.press();
    });
    root.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.running = false;
    });
    if (!this.small) this.open().then((opened) => opened && this.warmUp());
    else {  // the weights come when somebody turns to the field
      for (const kind of ["pointerenter", "focusin"]) {
        root.addEventListener(kind, () => this.open(), { once: true });
      }
    }
  }

  /** Write a text that nobody sees: the browser compiles what the first press needs. */
  async warmUp() {
    const { tokenizer } = this.weights, model = this.weights.model(this.moment);
    const text = new gptPage.PageText(model, tokenizer, [tokenizer.endOfText]);
    const pause = pauses(), settings = { temperature: 0.7, topK: 0, topP: 1 };
    try {
      for (let i = 0; i < 60; i++) {
        await text.next(settings, () => 0.5, async () => {
          await pause();
          if (this.run) throw new Error("stopped");  // somebody pressed the button
        });
      }
    } catch (error) {
      if (error.message !== "stopped") throw error;
    }
  }

  async open() {
    const { weights, error } = await loadWeights(this.root.dataset.weights);
    if (error) {
      this.button.disabled = true;
      this.status.className = "gpt-error";
      this.status.textContent = error;
      return false;
    }
    if (this.weights) return true;
    this.weights = weights;
    const { moments } = weights.header, last = moments.map(({ mode }) => !mode).lastIndexOf(true);
    moments.forEach((moment, i) => {
      const radio = element("input", {
        type: "radio", name: `${this.prompt.id}-moment`, value: i,
        onchange: () => { this.turnTo(i); this.write(); },
      });
      radio.checked = i === last;
      this.moments.append(element("label", {}, radio, gptPage.modes[moment.mode || "continue"].legend(moment)));
    });
    this.turnTo(last);
    this.moments.hidden = false;
    weights.model(last);  // opened before it is asked for
    return true;
  }

  /** Choose a moment; another mode has other prompts. */
  turnTo(i) {
    const mode = gptPage.modes[this.weights.header.moments[i].mode || "continue"];
    this.moment = i;
    if (mode === this.mode) return;
    const prompts = mode.prompts(this.weights.header);
    this.others.replaceChildren(...prompts.map((text) =>
      element("option", { value: text }, text || "(the beginning of a text)")));
    if (this.mode) {
      this.prompt.value = prompts[0];
      this.temperature.value = mode.temperature;
    }
    this.mode = mode;
    this.promptLabel.textContent = mode.label;
  }

  press() {
    if (this.running) this.running = false;
    else this.write();
  }

  settings() {
    const value = (input, fallback) => {
      const v = input.valueAsNumber;
      const low = Number(input.min || 0), high = Number(input.max || Infinity);
      const kept = Number.isFinite(v) ? Math.min(high, Math.max(low, v)) : fallback;
      input.value = kept;
      return kept;
    };
    return {
      temperature: value(this.temperature, 1), topK: Math.floor(value(this.topK, 0)),
      topP: value(this.topP, 1), seed: Math.floor(value(this.seed, 1)), count: Math.floor(value(this.count, 100)),
    };
  }

  async write() {
    this.run = (this.run || 0) + 1;  // an earlier text stops at its next token
    const run = this.run, began = performance.now();
    if (!(await this.open()) || run !== this.run) return;
    const { tokenizer, header } = this.weights, prompt = this.prompt.value;
    const { mode } = this, end = tokenizer.ranks.get("\xff");
    const model = this.weights.model(this.moment), settings = this.settings();
    this.running = true;
    this.button.textContent = "Stop";
    this.status.textContent = "Reading ...";
    this.spoken.textContent = "";
    this.text = new gptPage.PageText(model, tokenizer, mode.ids(tokenizer, prompt));
    this.drawn = [];
    this.pieces = [];
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.fresh = [];
    this.output.replaceChildren();
    this.panels.replaceChildren();
    this.text.ids.forEach((id, i) => i && this.show(id, i, null));
    const alien = tokenizer.inBytes(prompt);
    this.aliens = alien.length
      ? `No token of their own: ${alien.slice(0, 8).join(" ")}${alien.length > 8 ? " ..." : ""}. The model reads their bytes. ` : "";
    this.say();
    this.draw();
    const dart = gptPage.darts(settings.seed), pause = pauses(() => this.draw());
    const rest = async () => {
      await pause();
      if (!this.running || run !== this.run) throw new Error("stopped");
    };
    let first = 0, ended = false, n = 0;
    try {
      for (; n < settings.count; n++) {
        const found = await this.text.next(settings, dart, rest);
        if (!n) first = performance.now() - began;
        ended = found.id === tokenizer.endOfText || (mode.marks === MARKS && found.id === end);
        this.drawn[this.text.ids.length - 1] = { ...found, settings };
        this.show(found.id, this.text.ids.length - 1, found);
        if (!n) this.draw();
        if (ended) { n++; break; }
      }
    } catch (error) {
      if (error.message !== "stopped") throw error;
    }
    if (run !== this.run) return;
    this.draw();
    const seconds = (performance.now() - began) / 1000;
    this.running = false;
    this.button.textContent = "Write";
    this.measured = { tokens: n, seconds, first };
    const words = this.text.ids.slice(-n || this.text.ids.length);
    const written = tokenizer.decode(words.filter((id) => id < tokenizer.endOfText && !this.mark(id)));
    const verdict = mode.verdict(header, prompt, written.trim(), ended);
    this.status.textContent = `${n} tokens, ${Math.round(n / seconds)} tokens/s, the first after ` +
      `${Math.round(first)} ms.${ended ? " The model ended the text." : ""}${verdict ? " " + verdict : ""}` +
      (this.small ? "" : " Choose a token to see where it came from.");
    this.spoken.textContent = written;
    this.root.dispatchEvent(new CustomEvent("gpt-written"));
  }

  say() {
    const { ids, model } = this.text, begin = gptPage.windowStart(ids.length, model.block_size);
    const notice = this.aliens + (begin
      ? `The text is longer than the block of ${model.block_size} tokens: the model reads the last ${ids.length - begin} of its ${ids.length} tokens. ` : "");
    if (this.notice.textContent !== notice) this.notice.textContent = notice;
    for (const piece of this.pieces) {
      if (piece && piece.outside !== piece.index < begin) {
        piece.outside = piece.index < begin;
        piece.span.classList.toggle("gpt-outside", piece.outside);
      }
    }
  }

  show(id, index, found) {
    const { tokenizer } = this.weights, mark = this.mark(id);
    const text = mark || this.decoder.decode(tokenizer.bytes([id]), { stream: true });
    const span = element("span", {
      class: found ? "gpt-token" : "gpt-token gpt-prompt", role: this.small ? false : "button", tabindex: this.small ? false : -1,
      "aria-label": !text.trim() && !this.small && (text ? "white space" : id === tokenizer.endOfText ? "end of text" : "part of a character"),
      onclick: () => this.small || this.choose(index),
    }, text || (id === tokenizer.endOfText ? "∎" : ""));
    this.pieces[index] = { span, index, outside: false };
    this.fresh.push(span);
  }

  /** Put what is new on the page, once for all tokens since the last pause. */
  draw() {
    if (!this.fresh.length) return;
    const low = this.output.scrollHeight - this.output.scrollTop - this.output.clientHeight < 40;
    this.output.append(...this.fresh);
    this.fresh = [];
    this.say();
    if (low) this.output.scrollTop = this.output.scrollHeight;
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (this.small || this.running || !this.text) return;
    if (step) {
      const last = this.text.ids.length - 1;
      const from = this.chosen || (step > 0 ? 0 : last + 1);
      event.preventDefault();
      this.choose(Math.min(last, Math.max(1, from + step)), true);
    }
  }

  /** How a token is shown that marks a turn of a conversation. */
  mark(id) {
    const name = this.mode.marks[this.weights.tokenizer.tokens[id]];
    return name && `‹${name}›`;
  }

  name(id) {
    return this.mark(id) || (id === this.weights.tokenizer.endOfText ? "∎" : shown(this.weights.tokenizer.decode([id])));
  }

  async choose(index, focus) {
    if (this.running) return;
    const before = this.pieces[this.chosen];
    if (before) before.span.classList.remove("gpt-chosen");
    this.chosen = index;
    this.pieces[index].span.classList.add("gpt-chosen");
    if (focus) this.pieces[index].span.focus();
    const trace = await this.text.trace(index, pauses());
    if (this.chosen !== index) return;
    this.trace = trace;
    this.layer = Math.min(this.layer || 0, trace.layers.length - 1);
    this.head = this.head || 0;
    this.stage = this.stage || 0;
    this.panel();
  }

  panel() {
    const { trace, chosen, text } = this, old = document.activeElement && document.activeElement.id;
    const drawn = this.drawn[chosen], nVocab = this.weights.tokenizer.endOfText + 1;
    const probs = gptPage.nextTokenProbs(trace.logits, { ...(drawn ? drawn.settings : {}), nVocab });
    this.panels.replaceChildren(
      this.distribution(probs, drawn), this.attention(), this.numbers(probs));
    const head = trace.layers[this.layer].heads[this.head];
    const most = head.weights.reduce((a, b) => Math.max(a, b));
    for (const piece of this.pieces) {
      if (!piece) continue;
      const read = piece.index < chosen && piece.index >= trace.start;
      const w = read ? head.weights[piece.index - trace.start] / most : 0;
      piece.span.style.setProperty("--w", w.toFixed(3));
    }
    const again = old && document.getElementById(old);
    if (again) again.focus();
    this.spoken.textContent = `${this.name(text.ids[chosen])}, probability ${percent(probs[text.ids[chosen]])}`;
  }

  table(head, rows, kind = "") {
    const cells = (tag, row) => row.map((cell) => element(tag, tag === "th" ? { scope: "col" } : {}, cell));
    return element("table", { class: kind },
      element("thead", {}, element("tr", {}, ...cells("th", head))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells("td", row)))));
  }

  distribution(probs, drawn) {
    const id = this.text.ids[this.chosen];
    const order = Array.from(probs.keys()).sort((a, b) => probs[b] - probs[a] || a - b).slice(0, 10);
    if (!order.includes(id)) order.push(id);
    const bar = (p) => element("meter", { min: 0, max: 1, value: p, "aria-label": percent(p) });
    const rows = order.filter((i) => probs[i] > 0 || i === id).map((i) => [
      (i === id ? "▸ " : "") + this.name(i), bar(probs[i]), percent(probs[i])]);
    const how = drawn
      ? `The dart fell on ${drawn.u.toFixed(4)} and drew this token, of ${probs.filter((p) => p > 0).length} that could be drawn.`
      : "This token stood in the prompt. The model would have drawn from this distribution.";
    return element("section", {}, element(HEADING, {}, `Where ${this.name(id)} came from`),
      element("p", {}, how), this.table(["token", "", "probability"], rows));
  }

  attention() {
    const { trace, text } = this, rows = [];
    trace.layers.forEach(({ heads }, layer) => heads.forEach(({ weights }, head) => {
      const canvas = element("canvas", { width: weights.length, height: 1, "aria-hidden": "true" });
      const paint = canvas.getContext("2d");
      const best = weights.reduce((a, b) => Math.max(a, b)), most = weights.indexOf(best);
      weights.forEach((w, i) => {
        paint.fillStyle = `rgba(224, 159, 31, ${Math.min(1, 0.08 + w / best)})`;
        paint.fillRect(i, 0, 1, 1);
      });
      const on = layer === this.layer && head === this.head;
      const button = element("button", {
        type: "button", id: `${this.prompt.id}-head-${layer}-${head}`, "aria-pressed": String(on),
        onclick: () => { Object.assign(this, { layer, head }); this.panel(); },
      }, `${layer + 1}.${head + 1}`);
      rows.push([button, canvas, `${this.name(text.ids[trace.start + most])} ${percent(best)}`]);
    }));
    return element("section", {}, element(HEADING, {}, "What each head read"),
      element("p", {}, "A row is a head, layer and number. From left to right: the text so far. The text above is tinted by the chosen head."),
      this.table(["head", "weights over the text", "most"], rows, "gpt-heads"));
  }

  numbers(probs) {
    const { trace, text, stage } = this, at = this.chosen - 1, layer = trace.layers[this.layer];
    const go = (step, label) => element("button", {
      type: "button", id: `${this.prompt.id}-go-${step}`,
      onclick: () => { this.stage = (stage + step + STAGES.length) % STAGES.length; this.panel(); },
    }, label);
    const choice = (label, key, n) => {
      const select = element("select", { id: `${this.prompt.id}-${key}`, onchange: () => { this[key] = Number(select.value); this.panel(); } },
        ...Array.from({ length: n }, (_, i) => element("option", { value: i }, String(i + 1))));
      select.value = this[key];
      return element("label", {}, label, select);
    };
    const { scores, weights } = layer.heads[this.head];
    const top = Array.from(weights.keys()).sort((a, b) => weights[b] - weights[a]).slice(0, 8).sort((a, b) => a - b);
    const row = (i) => [this.name(text.ids[trace.start + i]), String(i), number(scores[i])];
    const first = [0, 1, 2];
    const body = [
      () => [`The token and its position ${trace.position} each give ${trace.wte.length} numbers, which are added. The first three:`,
        this.table(["", ...first.map(String)], [
          ["token", ...first.map((i) => number(trace.wte[i]))],
          ["position", ...first.map((i) => number(trace.wpe[i]))],
          ["sum", ...first.map((i) => number(trace.wte[i] + trace.wpe[i]))]])],
      () => ["The query of this token times the key of each token so far, divided by the root of the head's width. The eight that count most:",
        this.table(["token", "position", "score"], top.map(row))],
      () => [`The softmax makes weights of the scores. These eight hold ${percent(top.reduce((s, i) => s + weights[i], 0))} of the weight:`,
        this.table(["token", "position", "score", "weight"], top.map((i) => [...row(i), percent(weights[i])]))],
      () => ["Attention and MLP each add to the residual stream. Lengths of the vectors:",
        this.table(["layer", "stream", "+ attention", "+ MLP", "= stream"], trace.layers.map((l, i) => [
          String(i + 1), ...[l.begin, l.attention, l.mlp, l.end].map((x) => number(length(x)))]))],
      () => {
        const best = Array.from(probs.keys()).sort((a, b) => trace.logits[b] - trace.logits[a]).slice(0, 8);
        return ["The head multiplies the stream by every token's row. The largest logits:",
          this.table(["token", "logit", "probability"], best.map((i) => [this.name(i), number(trace.logits[i]), percent(probs[i])]))];
      },
    ][stage]();
    return element("section", {}, element(HEADING, {}, `${this.name(text.ids[at])} through the model, ${stage + 1} of 5: ${STAGES[stage]}`),
      element("fieldset", {}, element("legend", { class: "gpt-hidden" }, "step and head"), go(-1, "Back"), go(1, "Next"),
        choice("layer", "layer", trace.layers.length), choice("head", "head", layer.heads.length)),
      element("p", {}, body[0]), body[1]);
  }
}

globalThis.gptView = View;
const mount = () => {
  for (const root of document.querySelectorAll(".gpt-page")) root.gptView = new View(root);
};
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", mount);
else mount();
}
