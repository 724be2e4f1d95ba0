// The model answers inside the page. Tangled from book/chapters/15_page.md; change it there, not here.
"use strict";
{
const CRC = Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = (n >>> 1) ^ (0xedb88320 & -(n & 1));
  return n;
});

function crc32(text) {
  let crc = ~0;
  for (let i = 0; i < text.length; i++) {
    crc = (crc >>> 8) ^ CRC[(crc ^ text.charCodeAt(i)) & 255];
  }
  return ~crc >>> 0;
}

/** The tensors of a base64 line, by name; list: name, rows and columns of each. */
function readTensors(list, bits, line) {
  const text = atob(line), bytes = new Uint8Array(text.length), tensors = {};
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  const view = new DataView(bytes.buffer), half = 2 ** (bits - 1);
  let place = 0;
  for (const [name, rows, columns] of list) {
    const scales = new Float32Array(rows);
    for (let r = 0; r < rows; r++, place += 4) scales[r] = view.getFloat32(place, true);
    if (!columns) {  // a vector: its float32 numbers as they are
      tensors[name] = scales;
      continue;
    }
    const weights = new Float32Array(rows * columns);
    let held = 0, have = 0;
    for (let i = 0; i < weights.length; i++) {
      while (have < bits) {
        held = ((held << 8) | bytes[place++]) & 0xffff;
        have += 8;
      }
      have -= bits;
      const q = ((held >> have) & (2 * half - 1)) - half;
      weights[i] = q * scales[Math.floor(i / columns)];
    }
    tensors[name] = weights;
  }
  return tensors;
}

/** The tensors of a base with B times A added where `changes` has such a pair. */
function adapted(base, changes) {
  const tensors = { ...base };
  for (const pair of Object.keys(changes).filter((name) => name.endsWith(" B"))) {
    const name = pair.slice(0, -2), B = changes[pair], A = changes[name + " A"];
    const W = tensors[name] = base[name].slice();
    const rank = Math.sqrt(B.length * A.length / W.length), n = A.length / rank;
    for (let i = 0; i < B.length; i++) {
      const row = Math.floor(i / rank) * n, a = (i % rank) * n;
      for (let j = 0; j < n; j++) W[row + j] += B[i] * A[a + j];
    }
  }
  return tensors;
}

const WORDS = new RegExp(
  "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+" +
  "|\\p{White_Space}+$|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}", "gu");

class PageTokenizer {
  /** tokens: in the order of their ids, each byte as one character. */
  constructor(tokens) {
    this.tokens = tokens;
    this.ranks = new Map(tokens.map((token, id) => [token, id]));
    this.endOfText = tokens.length;
    this.words = new Map();  // what was encoded before
  }

  encodeWord(word) {
    let parts = Array.from(new TextEncoder().encode(word), (b) => String.fromCharCode(b));
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(parts[i] + parts[i + 1]);
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts.map((part) => this.ranks.get(part));
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  encode(text) {
    const ids = [];
    for (const word of text.match(WORDS) || []) {
      if (!this.words.has(word)) this.words.set(word, this.encodeWord(word));
      ids.push(...this.words.get(word));
    }
    return ids;
  }

  /** The bytes of ids; a streaming TextDecoder makes text of them. */
  bytes(ids) {
    const text = ids.map((id) => this.tokens[id] || "").join("");
    return Uint8Array.from(text, (c) => c.charCodeAt(0));
  }

  decode(ids) {
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(this.bytes(ids));
  }

  /** Characters that no single token holds: the model reads their bytes. */
  inBytes(text) {
    const lone = (c) => c > "\x7f" && this.encodeWord(c).length > 1;
    return [...new Set(text)].filter(lone);
  }
}

/** out[r] = bias[r] + the inner product of row r of W with x; eight rows at a time. */
function linear(W, bias, x, out) {
  const n = x.length, rows = out.length;
  let r = 0;
  for (; r + 7 < rows; r += 8) {
    let a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
    for (let i = 0, w = r * n; i < n; i++, w++) {
      const v = x[i];
      a += W[w] * v;
      b += W[w + n] * v;
      c += W[w + 2 * n] * v;
      d += W[w + 3 * n] * v;
      e += W[w + 4 * n] * v;
      f += W[w + 5 * n] * v;
      g += W[w + 6 * n] * v;
      h += W[w + 7 * n] * v;
    }
    out.set([a, b, c, d, e, f, g, h], r);
  }
  for (; r < rows; r++) {
    for (let i = 0; i < n; i++) out[r] += W[r * n + i] * x[i];
  }
  return bias ? out.map((v, i) => v + bias[i]) : out;
}

function layerNorm(x, weight, bias) {
  let mean = 0, variance = 0;
  for (const v of x) mean += v / x.length;
  for (const v of x) variance += (v - mean) ** 2 / x.length;
  const scale = 1 / Math.sqrt(variance + 1e-5);
  return x.map((v, i) => (v - mean) * scale * weight[i] + (bias ? bias[i] : 0));
}

/** The error function; Abramowitz and Stegun 7.1.26, wrong by 1.5e-7 at most. */
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 +
    t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - p * Math.exp(-x * x));
}

const GELU = {
  gelu: (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
  gelu_tanh: (x) =>
    0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
};

class PageModel {
  constructor(header, tensors) {
    Object.assign(this, header.config);  // n_layer, n_head, n_embd, block_size, ...
    this.tensors = tensors;
    this.gelu = GELU[this.activation];
    const room = () => new Float32Array(this.block_size * this.n_embd);
    this.cache = Array.from({ length: this.n_layer }, () => [room(), room()]);
  }

  linear(name, x, rows) {
    const t = this.tensors, out = new Float32Array(rows);
    return linear(t[name + ".weight"], t[name + ".bias"], x, out);
  }

  norm(name, x) {
    return layerNorm(x, this.tensors[name + ".weight"], this.tensors[name + ".bias"]);
  }

  /** Read one token at a position; returns what the head reads.
   *  trace: null, or an object that receives the numbers on the way. */
  read(token, position, trace) {
    const C = this.n_embd, t = this.tensors;
    const wte = t["wte.weight"].subarray(token * C, (token + 1) * C);
    const wpe = t["wpe.weight"].subarray(position * C, (position + 1) * C);
    let x = wte.map((v, i) => v + wpe[i]);
    if (trace) Object.assign(trace, { wte, wpe, layers: [] });
    for (let layer = 0; layer < this.n_layer; layer++) {
      const h = `h.${layer}.`, begin = x;
      const qkv = this.linear(h + "attn.c_attn", this.norm(h + "ln_1", x), 3 * C);
      this.cache[layer][0].set(qkv.subarray(C, 2 * C), position * C);
      this.cache[layer][1].set(qkv.subarray(2 * C), position * C);
      const { y, heads } = this.attend(qkv.subarray(0, C), layer, position);
      const attention = this.linear(h + "attn.c_proj", y, C);
      const between = begin.map((v, i) => v + attention[i]);
      const inner = this.linear(h + "mlp.c_fc", this.norm(h + "ln_2", between), 4 * C);
      const mlp = this.linear(h + "mlp.c_proj", inner.map(this.gelu), C);
      x = between.map((v, i) => v + mlp[i]);
      if (trace) trace.layers.push({ begin, qkv, heads, attention, mlp, end: x });
    }
    return this.norm("ln_f", x);
  }

  /** The weighted average of the past, head by head. */
  attend(q, layer, position) {
    const C = this.n_embd, size = C / this.n_head, [K, V] = this.cache[layer];
    const y = new Float32Array(C), heads = [];
    for (let head = 0; head < this.n_head; head++) {
      const from = head * size, scores = new Float32Array(position + 1);
      for (let s = 0; s <= position; s++) {
        let sum = 0;
        for (let i = from, k = s * C + from; i < from + size; i++, k++) sum += q[i] * K[k];
        scores[s] = sum / Math.sqrt(size);
      }
      const weights = softmax(scores);
      for (let s = 0; s <= position; s++) {
        const w = weights[s];
        for (let i = from, k = s * C + from; i < from + size; i++, k++) y[i] += w * V[k];
      }
      heads.push({ scores, weights });
    }
    return { y, heads };
  }

  logits(hidden) {
    const out = new Float32Array(this.vocab_size);
    return linear(this.tensors["wte.weight"], null, hidden, out);
  }
}

/** Of z / temperature; loops, because `map` calls a function for each number. */
function softmax(z, temperature = 1) {
  const e = new Float32Array(z.length);
  let best = -Infinity, sum = 0;
  for (let i = 0; i < z.length; i++) best = Math.max(best, z[i]);
  for (let i = 0; i < z.length; i++) sum += e[i] = Math.exp((z[i] - best) / temperature);
  for (let i = 0; i < z.length; i++) e[i] /= sum;
  return e;
}

/** Probabilities to draw the next token from: chapter 10's `next_token_probs`. */
function nextTokenProbs(logits, { temperature = 1, topK = 0, topP = 1, nVocab }) {
  const z = logits.slice(0, nVocab);
  if (temperature === 0) [topK, temperature] = [1, 1];
  const probs = softmax(z, temperature);
  if (!topK && topP >= 1) return probs;
  const order = Array.from(z.keys()).sort((a, b) => z[b] - z[a] || a - b);
  const kept = order.slice(0, topK || order.length);
  const total = kept.reduce((sum, id) => sum + probs[id], 0);
  const out = new Float32Array(probs.length);
  let before = 0, sum = 0;
  for (const id of kept) {
    if (before >= topP) break;
    out[id] = probs[id] / total;
    before += out[id];
  }
  for (const p of out) sum += p;
  return out.map((p) => p / sum);
}

/** The id on whose piece of the line from 0 to 1 the dart u falls. */
function draw(probs, u) {
  const total = probs.reduce((a, b) => a + b, 0);
  let end = 0, last = 0;
  for (let id = 0; id < probs.length; id++) {
    if (!probs[id]) continue;
    end += probs[id];
    last = id;
    if (u * total < end) return id;
  }
  return last;
}

/** Uniform numbers in [0, 1) from a seed: mulberry32. */
function darts(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Where the context of a text of so many tokens begins: chapter 10's rule. */
function windowStart(length, blockSize) {
  const jump = Math.max(1, Math.floor(blockSize / 2));
  return Math.ceil(Math.max(0, length - blockSize) / jump) * jump;
}

/** A text that grows: its tokens, and as much of it in the cache as was read. */
class PageText {
  constructor(model, tokenizer, ids) {
    Object.assign(this, { model, tokenizer, ids: [...ids], start: 0, read: 0 });
  }

  /** Read the first n tokens, as far as they are new; `rest` is awaited between. */
  async readTo(n, rest) {
    const begin = windowStart(n, this.model.block_size);
    if (begin !== this.start || this.model.reader !== this) {
      Object.assign(this, { start: begin, read: begin });
      this.model.reader = this;  // a model has one cache
    }
    for (; this.read < n; this.read++) {
      this.hidden = this.model.read(this.ids[this.read], this.read - begin);
      if (rest) await rest();
    }
  }

  async logits(rest) {
    await this.readTo(this.ids.length, rest);
    return this.model.logits(this.hidden);
  }

  /** Every number on the way to the logits after the first n tokens. */
  async trace(n, rest) {
    await this.readTo(n, rest);
    const trace = { start: this.start, position: n - 1 - this.start };
    const hidden = this.model.read(this.ids[n - 1], trace.position, trace);
    return Object.assign(trace, { logits: this.model.logits(hidden) });
  }

  /** Draw one token; returns it with its dart and its probability. */
  async next(settings, dart, rest) {
    const nVocab = this.tokenizer.endOfText + 1;
    const probs = nextTokenProbs(await this.logits(rest), { ...settings, nVocab });
    const u = dart(), id = draw(probs, u);
    this.ids.push(id);
    return { id, u, p: probs[id] };
  }
}

/** The argument of a weight file: header, tokenizer and a model for each moment. */
function openWeights(lines, checksum) {
  if (crc32(lines.join("\n")) !== checksum) throw new Error("the checksum is wrong");
  const header = JSON.parse(lines[0]), models = [];
  const open = (i) => {
    const { bits, changes } = header.moments[i];
    const tensors = readTensors(changes || header.tensors, bits, lines[i + 1]);
    return changes ? adapted(model(i - 1).tensors, tensors) : tensors;
  };
  const model = (i) => models[i] || (models[i] = new PageModel(header, open(i)));
  return { header, tokenizer: new PageTokenizer(header.tokens), model };
}

const gptPage = {
  PageTokenizer, PageModel, PageText, openWeights, nextTokenProbs, draw, darts,
  windowStart,
};
globalThis.gptPage = gptPage;
}
