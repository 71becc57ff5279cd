// Lengths in, a plan out: docs/demos/plan.md. A classic script, because a page from disk cannot load modules.
"use strict";

const planDemo = (() => {
  const {element, table, input, given} = demo;
  const kGrain = 64;  // tokens
  const up = (a, b) => Math.floor((a + b - 1) / b);
  const intervalBegin = (length, worker, workers) => Math.floor(length / workers) * worker + Math.floor(length % workers * worker / workers);

  // As make_plan_on_host() of stages/common/split/make_plan.cpp, for teams of one, and pieces_of(); a test compares the two.
  // lengths in tokens; returns {rule, fixed, workers: [[{sequence, begin, end, slot}]]}, in grains, slot -1 for a whole sequence.
  function planOf({lengths, workers, fixed, min, combine, split}) {
    const batch = lengths.length, grains = lengths.map(length => Math.max(1, up(length, kGrain)));
    const pieceGrains = split / kGrain;  // 0: anywhere
    const piecesIn = grains.map(g => pieceGrains > 0 ? up(g, pieceGrains) : 1);
    const sum = values => values.reduce((a, b) => a + b, 0);
    const total = sum(grains), longest = Math.max(...grains);
    const alike = pieceGrains === 0 && (batch === 1 || total <= workers);
    if (alike) fixed = 0;
    const length = total + fixed * sum(piecesIn), aWorker = up(batch, workers);
    const whole = pieceGrains === 0 && aWorker * (longest + fixed) <= Math.floor(length / workers) + fixed + combine;
    const each = Math.min(Math.floor(workers / batch), Math.floor(longest / min));
    const even = pieceGrains === 0 && !whole && !alike && each >= 2 && up(longest, each) <= Math.floor(length / workers);
    const used = whole ? up(batch, aWorker) : even ? batch * each : Math.min(Math.max(Math.floor(length / min), 1), workers);

    const begins = [], slotBegin = [0];
    let worker = 0, start = 0;
    grains.forEach((g, i) => {
      const end = start + g + fixed * piecesIn[i];
      let splits = pieceGrains > 0 ? piecesIn[i] : 1;
      const before = () => whole ? worker * aWorker <= i : even ? worker < (i + 1) * each : intervalBegin(length, worker, used) < end;
      for (; worker < used && before(); ++worker) {
        const offset = intervalBegin(length, worker, used) - start;
        if (whole) {
          begins.push([i, 0, 0]);
        } else if (even && worker % each >= g) {  // a short sequence has fewer pieces
          begins.push([i + 1, 0, 0]);
        } else if (pieceGrains === 0) {
          const grain = even ? intervalBegin(g, worker % each, Math.min(each, g)) : Math.max(0, offset - fixed);
          begins.push([i, grain, grain > 0 ? splits++ : 0]);
        } else {
          const piece = Math.floor((offset + fixed + pieceGrains - 1) / (fixed + pieceGrains));
          begins.push(piece < piecesIn[i] ? [i, piece * pieceGrains, piece] : [i + 1, 0, 0]);
        }
      }
      slotBegin.push(slotBegin[i] + (splits > 1 ? splits : 0));
      start = end;
    });
    while (begins.length <= workers) begins.push([batch, 0, 0]);

    const result = [];
    for (let w = 0; w < workers; ++w) {
      let [sequence, grain, part] = begins[w];
      const [last, lastGrain] = begins[w + 1], pieces = [];
      while (sequence < last || (sequence === last && grain < lastGrain)) {
        const limit = sequence === last ? lastGrain : grains[sequence];
        const until = grain + Math.min(limit - grain, pieceGrains || Infinity);
        const slot = slotBegin[sequence + 1] > slotBegin[sequence] ? slotBegin[sequence] + part : -1;
        pieces.push({sequence, begin: grain, end: until, slot});
        [sequence, grain, part] = until < grains[sequence] ? [sequence, until, part + 1] : [sequence + 1, 0, 0];
      }
      result.push(pieces);
    }
    const rule = pieceGrains > 0 ? "Each sequence is cut every " + split + " tokens, whatever the batch." :
                 whole ? "Whole sequences balance well enough: nothing is cut." :
                 even ? "Every sequence is cut into equally many pieces, which balances as well as cutting anywhere." :
                 "Every worker gets an equally long interval of the line.";
    return {rule, fixed, workers: result};
  }

  const kFields = {lengths: "lengths, in tokens", workers: "workers", fixed: "what a piece costs beside its tokens, in grains of 64 tokens",
                   min: "least load of a worker, in grains", combine: "imbalance that is cheaper than a combine, in grains",
                   split: "cut every … tokens (0: anywhere)"};
  const kDefault = {lengths: "4096,512,1024,256", workers: "8", fixed: "2", min: "4", combine: "1", split: "0"};
  function read(hash) {
    const known = given(hash);
    return Object.fromEntries(Object.entries(kDefault).map(([key, value]) => [key, known[key] ?? value]));
  }
  // What was typed, or what is wrong with it.
  function settingsOf(state) {
    const bounds = {workers: [1, 264], fixed: [0, 100], min: [1, 1000], combine: [0, 1000], split: [0, 65536]}, settings = {};
    for (const key in bounds) {
      settings[key] = /^\d+$/.test(state[key].trim()) ? Number(state[key]) : NaN;
      if (!(settings[key] >= bounds[key][0] && settings[key] <= bounds[key][1])) return `${kFields[key]}: ${bounds[key].join(" to ")}`;
    }
    if (settings.split % kGrain) return `${kFields.split}: a multiple of ${kGrain}`;
    settings.lengths = state.lengths.split(",").map(text => /^\s*\d+\s*$/.test(text) ? Number(text) : NaN);
    if (settings.lengths.length > 128 || !settings.lengths.every(length => length <= 1 << 20)) return `${kFields.lengths}: 1 to 128 numbers up to ${1 << 20}`;
    return settings;
  }

  function draw({state, output}) {
    const settings = settingsOf(state);
    if (typeof settings === "string") {
      output.replaceChildren(element("p", {id: "rule", className: "wrong"}, settings));
      return;
    }
    const plan = planOf(settings), loads = plan.workers.map(pieces => pieces.reduce((sum, piece) => sum + piece.end - piece.begin + plan.fixed, 0));
    const largest = Math.max(...loads), mean = loads.reduce((a, b) => a + b, 0) / loads.length;
    const tokensOf = ({sequence, begin, end}) => `${begin * kGrain}–${Math.min(end * kGrain, settings.lengths[sequence])}`;
    const bars = plan.workers.map((pieces, w) => element("div", {className: "bar"}, element("span", {}, String(w)), ...pieces.map(piece => {
      const text = `${piece.sequence}${piece.slot < 0 ? "" : "′"}: ${tokensOf(piece)}${piece.slot < 0 ? "" : ` → ${piece.slot}`}`, own = element("i", {title: text}, text);
      own.style.width = `${(piece.end - piece.begin + plan.fixed) / largest * 88}%`;
      own.style.setProperty("--hue", piece.sequence * 137 % 360);
      return own;
    })));
    const parts = new Map();
    plan.workers.forEach((pieces, w) => pieces.forEach(({sequence, slot}) => slot >= 0 && parts.set(sequence, [...parts.get(sequence) ?? [], `${slot} (worker ${w})`])));
    const combined = [...parts].map(([sequence, slots]) => element("li", {}, `sequence ${sequence}: slots ${slots.join(", ")}`));
    output.replaceChildren(
      element("p", {id: "rule"}, plan.rule),
      element("p", {id: "load"}, `Largest load ${largest} grains, mean ${mean.toFixed(1)}. Each line is a worker. A piece says its sequence (′: a part of it), ` +
              "its tokens, and → the slot of the part."),
      element("div", {id: "bars"}, ...bars),
      element("p", {}, combined.length ? "The combine merges:" : "There is nothing to combine."),
      element("ul", {id: "combine"}, ...combined), list);
    list.replaceChildren(element("summary", {}, "The plan as a table"), table({id: "pieces"}, ["worker", "sequence", "tokens", "slot"],
      plan.workers.flatMap((pieces, w) => pieces.map(piece => [String(w), String(piece.sequence), tokensOf(piece), piece.slot < 0 ? "whole" : String(piece.slot)]))));
  }
  const list = element("details");  // stays open

  function form(page) {
    return Object.entries(kFields).map(([key, label]) => input(key, label, page.state[key], value => page.set({[key]: value}), {size: key === "lengths" ? 30 : 6}));
  }

  demo.begin({read, form, draw});
  return {planOf};
})();
