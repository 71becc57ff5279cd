// What a card can do for a shape, and what each stage asks of it: docs/demos/limits.md. A classic script, because a page from disk
// cannot load modules. The cost model is the library's own, in limits_wasm.js; cards and recordings come with the site, in
// limits_data.js.
"use strict";

const limitsDemo = (() => {
  const {element, svg, table, select, input, given} = demo;
  const kFormats = {"16bit": "16 bits", fp8_tile128: "fp8_tile128", fp8_tensor: "fp8_tensor", int8_tile128: "int8_tile128"};
  const {cards, recordings} = limitsData;

  // {explain(card, state, times)}, when the cost model is there. times: {slug: [median, p10, p90, runs, sustained]}
  async function load() {
    const bytes = Uint8Array.from(atob(limitsWasm), c => c.charCodeAt(0));
    let model;
    const view = () => new DataView(model.memory.buffer);
    const environ = (a, b) => { view().setUint32(a, 0, true); view().setUint32(b, 0, true); return 0; };  // there is none
    const {instance} = await WebAssembly.instantiate(bytes, {
      env: {emscripten_notify_memory_growth: () => {}},
      wasi_snapshot_preview1: {environ_sizes_get: environ, environ_get: () => 0, proc_exit: code => { throw Error(`the cost model ended: ${code}`); }},
    });
    model = instance.exports;
    model._initialize();
    const text = pointer => {
      const memory = new Uint8Array(model.memory.buffer);
      return new TextDecoder().decode(memory.subarray(pointer, memory.indexOf(0, pointer)));
    };
    const slugs = JSON.parse(text(model.limits_slugs()));

    function explain(card, state, times, origin = "") {
      const names = new TextEncoder().encode(`${card.name}\n${card.origin}\n${origin}\0`);
      new Uint8Array(model.memory.buffer).set(names, model.limits_names());
      slugs.forEach((slug, i) => {
        const [median, p10, p90, runs, sustained] = times[slug] ?? [NaN, NaN, NaN, 0, null];
        model.limits_time(i, median, p10, p90, runs, sustained ?? NaN);
      });
      return JSON.parse(text(model.limits_explain(
        card.capability, card.multiprocessors, card.read, card.fp32, card.matrix, card.sustained ?? NaN, card.shared, card.shared_clock, card.launch,
        Number(state.h), Number(state.q), Number(state.b), Number(state.k), state.causal === "yes" ? 1 : 0, state.dtype === "fp16" ? 1 : 0,
        Object.keys(kFormats).indexOf(state.format))));
    }
    return {explain, slugs};
  }

  // The shape's name in mla_bench: bench/measure/shapes.h.
  const shapeOf = s => `h${s.h}_q${s.q}_b${s.b}_k${s.k}${s.causal === "yes" ? "_causal" : ""}${s.format === "16bit" ? "" : "_" + s.format}` +
                       (s.dtype === "fp16" ? "_fp16" : "");
  function stateOf(shape) {
    const [, h, q, b, k, causal, format, fp16] = shape.match(/^h(\d+)_q(\d+)_b(\d+)_k(\d+)(_causal)?(?:_((?:fp8|int8)_[a-z0-9]+))?(_fp16)?$/);
    return {h, q, b, k, causal: causal ? "yes" : "no", format: format ?? "16bit", dtype: fp16 ? "fp16" : "bf16"};
  }
  // Times of a card: each stage's from the first recording that has it.
  function timesOf(card, shape) {
    const times = {}, dates = {};
    if (card.source !== "measured") return {times, dates};
    for (const {date, times: known} of recordings) {
      for (const [slug, time] of Object.entries(known[shape] ?? {})) {
        if (slug in times) continue;
        times[slug] = time;
        dates[slug] = date;
      }
    }
    return {times, dates};
  }

  const kNumbers = {h: ["h_q, query heads", 1, 1024], q: ["s_q, query tokens", 1, 4096], b: ["b, sequences", 1, 8192], k: ["s_k, tokens in the cache", 0, 1 << 20]};
  const kChoices = {
    card: ["card", Object.fromEntries(cards.map((card, i) => [String(i), card.source === "measured" ? `${card.name}, measured` : `${card.name}, data sheet`]))],
    causal: ["causal", {no: "no", yes: "yes"}],
    dtype: ["dtype", {bf16: "bf16", fp16: "fp16"}],
    format: ["cache", kFormats],
  };
  const kDefault = {card: "0", h: "128", q: "1", b: "128", k: "8192", causal: "no", dtype: "bf16", format: "16bit"};
  function read(hash) {
    const known = given(hash), state = {...kDefault};
    for (const key in kChoices) if (known[key] in kChoices[key][1]) state[key] = known[key];
    for (const key in kNumbers) state[key] = known[key] ?? state[key];
    return state;
  }
  // What is wrong with what was typed; nothing if all is right.
  function wrongWith(state) {
    for (const [key, [label, least, most]] of Object.entries(kNumbers)) {
      if (!/^\d+$/.test(state[key]) || Number(state[key]) < least || Number(state[key]) > most) return `${label}: ${least} to ${most}`;
    }
    return Number(state.b) * Number(state.k) > 2 ** 30 ? "b · s_k: at most 2^30 tokens" : "";
  }

  const us = seconds => seconds === null ? "—" : micro(1e6 * seconds);
  const micro = value => value < 100 ? value.toPrecision(3) : value < 1000 ? value.toFixed(1) : value.toFixed(0);
  const short = slug => slug.slice(0, 2);

  // Log by log: the roof of memory and products, and where the shape and its recorded stages are under it.
  function roofline(card, work, times) {
    const width = 340, height = 190, left = 34, bottom = 24, mostX = 4096, leastY = 1, mostY = 2000;
    const x = value => left + (width - left - 8) * Math.log(Math.min(Math.max(value, 1), mostX)) / Math.log(mostX);
    const y = value => height - bottom - (height - bottom - 8) * Math.log(Math.max(value, leastY) / leastY) / Math.log(mostY / leastY);
    const peak = card.matrix / 1e12, roof = value => Math.min(peak, card.read * value / 1e12);
    const made = svg("svg", {id: "roof", viewBox: `0 0 ${width} ${height}`, role: "img"},
                     svg("title", {}, `Roofline: at ${work.intensity.toPrecision(3)} FLOP per byte at most ${roof(work.intensity).toPrecision(3)} TFLOP/s; stages as in the table`));
    for (const tick of [1, 10, 100, 1000]) {
      made.append(svg("text", {x: x(tick), y: height - 10, "text-anchor": "middle"}, String(tick)),
                  svg("text", {x: left - 4, y: y(tick) + 3, "text-anchor": "end"}, String(tick)),
                  svg("line", {x1: x(tick), x2: x(tick), y1: 8, y2: height - bottom}), svg("line", {x1: left, x2: width - 8, y1: y(tick), y2: y(tick)}));
    }
    made.append(svg("text", {x: width - 8, y: height - 1, "text-anchor": "end"}, "FLOP per byte"), svg("text", {x: left + 3, y: 9}, "TFLOP/s"),
                svg("polyline", {points: [1, work.ridge, mostX].map(value => `${x(value)},${y(roof(value))}`).join(" ")}),
                svg("circle", {class: "shape", cx: x(work.intensity), cy: y(roof(work.intensity)), r: 5}));
    const free = [0, 0];  // where the next label of a side may be
    Object.entries(times).sort(([, a], [, b]) => a[0] - b[0]).forEach(([slug, [median]], i) => {
      const at = y(work.flop / median / 1e6), side = i % 2, label = Math.max(at + 3, free[side]);
      free[side] = label + 9;
      made.append(svg("circle", {cx: x(work.intensity), cy: at, r: 2.5}),
                  svg("text", {x: x(work.intensity) + (side ? -7 : 7), y: label, "text-anchor": side ? "end" : "start"}, short(slug)));
    });
    return made;
  }

  function floorText({work, floor}) {
    const side = {memory: "Reading", matrix: "The products", launch: "The launch"}[floor.bound];
    return `Floor ${us(floor.seconds)} µs. ${side} ${floor.bound === "matrix" ? "bind" : "binds"}: reading takes ${us(floor.memory_s)} µs, ` +
           `launch and products ${us(floor.launch_s)} + ${us(floor.matrix_s)} µs.`;
  }

  function draw(model, {state, output}) {
    const wrong = wrongWith(state), card = cards[Number(state.card)];
    const {times, dates} = timesOf(card, shapeOf(state));
    const days = [...new Set(Object.values(dates))], origin = `recorded: ${card.name}, ${days.join(" and ")}`;
    const found = wrong ? {error: wrong} : model.explain(card, state, times, origin);
    if (found.error) {
      output.replaceChildren(element("p", {id: "floor", className: "wrong"}, found.error));
      return;
    }
    const {work, floor, stages} = found;
    const head = ["stage", "own limit, µs", "by", "estimate, µs", "recorded, cold, µs", "recorded / estimate", "sustained, µs", "SMs with work", "what it spends, by µs"];
    const rows = stages.map(stage => {
      if (stage.why_not) return [stage.slug, element("td", {colSpan: head.length - 1}, stage.why_not.replace(`${stage.slug} `, ""))];
      const time = times[stage.slug], terms = {fp32: stage.fp32_s, matrix: stage.matrix_s, shared: stage.shared_s, DRAM: stage.dram_s};
      return [stage.slug, us(stage.own_limit_s), stage.own_limit_by, stage.estimate_s !== null ? us(stage.estimate_s) : "—", time ? micro(time[0]) : "—",
              time && stage.estimate_s !== null ? (time[0] / (1e6 * stage.estimate_s)).toFixed(2) : "—", time?.[4] ? micro(time[4]) : "—",
              `${(100 * stage.busy_fraction).toFixed(0)}%`,
              Object.entries(terms).filter(([, seconds]) => seconds !== 0).map(([name, seconds]) => `${name} ${us(seconds)}`).join(", ")];
    });
    output.replaceChildren(
      element("p", {id: "floor"}, floorText(found)),
      element("p", {id: "ridge"}, `${work.intensity.toPrecision(3)} FLOP per byte; the ridge of this card is at ${work.ridge.toPrecision(3)}.`),
      roofline(card, work, times),
      table({id: "stages"}, head, rows),
      element("p", {id: "origin"}, `Rates: ${card.origin}. ` + (days.length ? `Times: ${origin}.` : card.source === "measured" ? "This shape was not recorded." :
              "No times: nothing was measured on this card.")),
      element("details", {}, element("summary", {}, "All that mla_run explain says of it"), element("pre", {id: "explained"}, found.text)));
  }

  const shapes = [...new Set(recordings.flatMap(({times}) => Object.keys(times)))];
  function form(page) {
    const {state} = page, own = shapeOf(state);
    const choice = key => select(`set-${key}`, kChoices[key][0], Object.entries(kChoices[key][1]), state[key], value => page.set({[key]: value}));
    const number = key => input(`set-${key}`, kNumbers[key][0], state[key], value => page.set({[key]: value}), demo.digits);
    return [choice("card"), ...["h", "q", "b", "k"].map(number), ...["causal", "dtype", "format"].map(choice),
            select("recorded", "or a recorded shape", [["", "choose"], ...shapes.map(shape => [shape, shape])], shapes.includes(own) ? own : "",
                   shape => { if (shape) page.setAll(stateOf(shape)); })];
  }

  load().then(model => demo.begin({read, form, draw: page => draw(model, page)}));
  return {load, shapeOf, stateOf, timesOf, cards, recordings, kFormats};
})();
