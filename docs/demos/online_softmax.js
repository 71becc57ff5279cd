// The online softmax by hand: docs/demos/online_softmax.md. A classic script, because a page from disk cannot load modules.
"use strict";

const softmaxDemo = (() => {
  const {element, table, select, given} = demo;
  const kFltMax = 3.4028234663852886e38;

  // As merge_lse() of reference/lse_merge.h; a test compares the two. 2 in place of e is the mistake.
  function mergeLse(a, b, power = Math.exp, log = Math.log) {
    if (a === Infinity) a = -Infinity;
    if (b === Infinity) b = -Infinity;
    if (a === -Infinity && b === -Infinity) return {weightA: 0, weightB: 0, lse: Infinity};
    const larger = a > b ? a : b, x = power(a - larger), y = power(b - larger);
    return {weightA: x / (x + y), weightB: y / (x + y), lse: larger + log(x + y)};
  }

  // out and lse of what was summed up: O, l under m.
  function result(m, l, o) {
    return l === 0 ? {out: o.map(() => [0, 1]), lse: Infinity} : {out: o.map(x => [x, l]), lse: Math.LN2 * (m + Math.log2(l))};
  }

  // Tokens [from, to) at once.
  function atOnce(s, v, from = 0, to = s.length) {
    const own = s.slice(from, to), m = Math.max(-kFltMax, ...own), p = own.map(x => 2 ** (x - m));
    const l = p.reduce((sum, x) => sum + x, 0);
    const o = [0, 1].map(column => p.reduce((sum, x, t) => sum + x * v[from + t][column], 0));
    return {m, p, l, o, total: own.reduce((sum, x) => sum + 2 ** x, 0), ...result(m, l, o)};
  }

  // One token after the other, as in stage 03. start: -FLT_MAX, -infinity, or the first token is set and not added.
  function online(s, v, {sign, start}) {
    let m = start === "inf" ? -Infinity : -kFltMax, l = 0, o = [0, 0];
    const steps = s.map((score, t) => {
      const first = start === "first" && t === 0;
      const old = first ? score : m;
      m = first ? score : Math.max(m, score);
      const a = first ? 0 : 2 ** (sign === "old" ? old - m : m - old), p = first ? 1 : 2 ** (score - m);
      l = first ? p : a * l + p;
      o = o.map((x, column) => first ? v[t][column] : a * x + p * v[t][column]);
      return {m, a, p, l, o};
    });
    return {steps, ...result(m, l, o)};
  }

  function merge(s, v, {split, base, empty}) {
    const a = atOnce(s, v, 0, split), b = atOnce(s, v, split);
    const lse = part => part.lse === Infinity ? -Infinity : part.lse;
    const merged = base === "2" ? mergeLse(lse(a), lse(b), x => 2 ** x, Math.log2) : mergeLse(lse(a), lse(b));
    const share = (weight, part, column) => {
      if (part.l !== 0) return weight * part.out[column][0] / part.out[column][1];
      return empty === "skip" ? 0 : weight * NaN;  // an empty part's out holds anything
    };
    return {parts: [a, b], ...merged, out: [0, 1].map(c => share(merged.weightA, a, c) + share(merged.weightB, b, c))};
  }

  // [whole number, k] with x = whole number / 2^k; null where a double has no such form
  function whole(x) {
    for (let k = 0; k <= 60 && Number.isFinite(x); ++k) {
      const n = x * 2 ** k;
      if (Math.abs(n) > 2 ** 53) return null;
      if (Number.isInteger(n)) return [n, k];
    }
    return null;
  }
  function show(x) {
    if (x === -kFltMax) return "-FLT_MAX";
    if (!Number.isFinite(x)) return String(x).replace("Infinity", "∞");
    const form = whole(x);
    if (!form) return String(Number(x.toPrecision(5)));
    const [n, k] = form;
    return k === 0 ? String(n) : k <= 4 ? `${n}/${2 ** k}` : n === 1 ? `2^-${k}` : `${n} · 2^-${k}`;
  }
  function showRatio([x, y]) {
    const a = whole(x), b = whole(y);
    if (!a || !b || b[0] === 0) return show(x / y);
    const k = Math.max(a[1], b[1]), n = a[0] * 2 ** (k - a[1]), d = b[0] * 2 ** (k - b[1]);
    const gcd = (i, j) => j ? gcd(j, i % j) : Math.abs(i);
    const common = gcd(n, d);
    if (Math.max(Math.abs(n), Math.abs(d)) / common > 99999) return show(x / y);
    return d / common === 1 ? String(n / common) : `${n / common}/${d / common}`;
  }
  const pair = (values, one = show) => `(${values.map(one).join(", ")})`;
  const lseText = (lse, total) => Number.isFinite(lse) ? (whole(total) ? `ln ${show(total)} = ` : "") + lse.toFixed(4) : show(lse);

  // The state of the page is its hash.
  const kDefault = {s: ["1", "3", "2", "5"], v: [["1", "0"], ["0", "1"], ["2", "0"], ["1", "2"]],
                    sign: "old", start: "max", split: "2", base: "e", empty: "skip"};
  const kChoices = {
    sign: ["a = 2^(m - m'): the sign of the exponent", {old: "old minus new", new: "new minus old (wrong)"}],
    start: ["m starts at", {max: "-FLT_MAX", inf: "-∞ (wrong)", first: "the first score, set and not added"}],
    split: ["part B begins at token", {1: "1", 2: "2", 3: "3"}],
    base: ["weights of the merge", {e: "exp(lse_part - lse)", 2: "2^(lse_part - lse) (wrong)"}],
    empty: ["a part that saw nothing", {skip: "is skipped", use: "is multiplied by 0 (wrong)"}],
  };
  const write = state => demo.addressOf({...state, s: state.s.join(), v: state.v.join(";")});
  function read(hash) {
    const known = given(hash), state = structuredClone(kDefault);
    for (const key in kChoices) if (known[key] in kChoices[key][1]) state[key] = known[key];
    const s = known.s?.split(","), v = known.v?.split(";").map(row => row.split(","));
    if (s?.length === 4) state.s = s;
    if (v?.length === 4 && v.every(row => row.length === 2)) state.v = v;
    return state;
  }
  // Numbers as typed: "-inf", "-∞" and a Unicode minus, too. What is none is NaN.
  function number(text) {
    const plain = text.trim().replace("−", "-").replace(/∞|inf(inity)?$/i, "Infinity");
    return plain === "" ? NaN : Number(plain);
  }

  function draw({state, output}) {
    const s = state.s.map(number), v = state.v.map(row => row.map(number));
    const all = atOnce(s, v), one = online(s, v, state), split = Number(state.split), two = merge(s, v, {...state, split});
    const tokens = (from, to) => [...Array(to - from).keys()].map(t => t + from).join(" and ").replace(/ and (?=.* and )/g, ", ");
    const truth = [all.lse, ...all.out.map(([x, y]) => x / y)];
    const agrees = (lse, out) => [lse, ...out].every((x, i) => x === truth[i] || Math.abs(x - truth[i]) <= 1e-12 * Math.abs(truth[i]));
    const same = agrees(one.lse, one.out.map(([x, y]) => x / y)), right = agrees(two.lse, two.out);
    output.replaceChildren(
      element("h3", {}, "At once"),
      table({id: "at-once"}, ["token", "S", "2^S", `P = 2^(S - ${show(all.m)})`, "v"],
            s.map((score, t) => [String(t), show(score), show(2 ** score), show(all.p[t]), pair(v[t])])),
      element("p", {id: "at-once-result"}, `l = ${show(all.l)}, out = ${pair(all.out, showRatio)}, lse = ${lseText(all.lse, all.total)}`),
      element("h3", {}, "One after the other"),
      table({id: "online"}, ["token", "S", "m", "a", "P", "l = a l + P", "O = a O + P v"],
            one.steps.map((step, t) => [String(t), show(s[t]), show(step.m), show(step.a), show(step.p), show(step.l), pair(step.o)])),
      element("p", {id: "online-result", className: same ? "" : "wrong"},
              `out = O / l = ${pair(one.out, showRatio)}, lse = ${lseText(one.lse, NaN)}: ${same ? "as before" : "not as before"}`),
      element("h3", {}, "Two parts, and their merge"),
      table({id: "merge"}, ["part", "tokens", "Σ 2^S", "lse", "out"], two.parts.map((part, i) =>
        ["AB"[i], i ? tokens(split, 4) : tokens(0, split), show(part.total),
         part.l === 0 ? "-∞" : lseText(part.lse, part.total), part.l === 0 ? "anything" : pair(part.out, showRatio)])),
      element("p", {id: "merge-result", className: right ? "" : "wrong"}, `weights ${two.weightA.toFixed(4)} and ${two.weightB.toFixed(4)}, ` +
              `out = (${two.out.map(x => Number.isFinite(x) ? x.toFixed(4) : show(x)).join(", ")}), lse = ${lseText(two.lse, NaN)}: ${right ? "as before" : "not as before"}`));
  }

  function form(page) {
    const {state} = page;
    const field = (label, values, i) => element("input", {
      value: values[i], ariaLabel: label, autocomplete: "off", oninput: event => { values[i] = event.target.value; page.set(); }});
    const rows = state.s.map((_, t) => [String(t), field(`S of token ${t}`, state.s, t), ...[0, 1].map(c => field(`v of token ${t}, column ${c}`, state.v[t], c))]);
    return [table({id: "tokens"}, ["token", "S", "v[0]", "v[1]"], rows),
            ...Object.entries(kChoices).map(([key, [label, options]]) => select(key, label, Object.entries(options), state[key], value => page.set({[key]: value}))),
            element("button", {type: "button", onclick: () => page.setAll(structuredClone(kDefault))}, "As on the page")];
  }

  demo.begin({read, write, form, draw});
  return {mergeLse, atOnce, online, merge};
})();
