// An ideal schedule over a measured one: docs/demos/seesaw.md. A classic script, because a page from disk cannot load modules.
"use strict";

const seesawDemo = (() => {
  const {element, svg, table, select, input, choosable, given} = demo;
  // Clocks of the tensor cores at their peak, per tile of 64 tokens: S [64, 64], and half of P V [64, 256]. In 07 S is bound by shared
  // memory, which brings Q to each warpgroup for 32 tokens: 864 clocks each.
  const kQk = 1152, kHalfPv = 512, kQk07 = 864;
  const kPhases = ["idle", "wait for copy", "Q K^T", "softmax", "P V", "wait for other", "rescale O", "write out", "issue copy", "wait for slot"];
  const kTracks = ["warpgroup 0", "warpgroup 1", "TMA"];
  const kSoftmax = {"07": 256, "08": 490, "09": 490};  // without a pause, as the chapters predict it

  // ---- The ideal: products of the two warpgroups, in order within each, share the tensor cores while both have some.

  // What each warpgroup does: ["issue", product, work, phase], ["wait", product], ["do", phase, clocks], ["set", flag], ["need", flag, phase].
  // `after`: a product that begins no earlier than another ends.
  function programs(stage, tiles, softmax) {
    const own = [[], []], after = {};
    if (stage === "07") {
      for (let tile = 0; tile < tiles; ++tile) {
        own.forEach((program, w) => program.push(["issue", `S${tile} ${w}`, kQk07, "Q K^T"], ["wait", `S${tile} ${w}`, "Q K^T"], ["need", `P read ${tile - 1} ${1 - w}`, "wait for other"],
          ["do", "softmax", softmax], ["set", `P${tile} ${w}`], ["need", `P${tile} ${1 - w}`, "wait for other"], ["issue", `O${tile} ${w}`, kHalfPv, "P V"], ["wait", `O${tile} ${w}`, "P V"],
          ["set", `P read ${tile} ${w}`]));
      }
      return {own, after};
    }
    for (let tile = 0; tile < tiles; tile += 2) {
      const pair = tile + 1 < tiles, [even, odd] = own, next = tile + 1;
      even.push(["issue", `S${tile}`, kQk, "Q K^T"], ["wait", `S${tile}`, "Q K^T"], ["do", "softmax", softmax], ["set", `P${tile}`],
                ["issue", `O${tile} L`, kHalfPv, "P V"], ["wait", `O${tile} L`, "P V"]);
      if (pair) {
        after[`S${next}`] = `S${tile}`;  // its tile comes later
        odd.push(["issue", `S${next}`, kQk, "Q K^T"], ["need", `P${tile}`, "wait for other"], ["issue", `O${tile} R`, kHalfPv, "P V"], ["wait", `S${next}`, "Q K^T"],
                 ["do", "softmax", softmax], ["set", `P${next}`], ["wait", `O${tile} R`, "P V"], ["issue", `O${next} R`, kHalfPv, "P V"], ["wait", `O${next} R`, "P V"]);
        even.push(["need", `P${next}`, "wait for other"], ["issue", `O${next} L`, kHalfPv, "P V"], ["wait", `O${next} L`, "P V"]);
      } else {
        odd.push(["need", `P${tile}`, "wait for other"], ["issue", `O${tile} R`, kHalfPv, "P V"], ["wait", `O${tile} R`, "P V"]);
      }
    }
    return {own, after};
  }
  // {does: [[track, phase, begin, end]], products: [[track, phase, begin, end, name]], length}
  function ideal(stage, tiles, softmax) {
    const {own, after} = programs(stage, tiles, softmax), does = [], products = [];
    const ended = new Set(["P read -1 0", "P read -1 1"]), queues = [[], []], at = [0, 0], until = [0, 0], since = [0, 0];
    let now = 0;
    const say = (w, phase) => { if (phase && now > since[w]) does.push([w, phase, since[w], now]); since[w] = now; };
    const activeOf = () => queues.flatMap(queue => queue.length && (!after[queue[0].name] || ended.has(after[queue[0].name])) ? [queue[0]] : []);
    for (;;) {
      for (let moved = true; moved;) {
        moved = false;
        for (const w of [0, 1]) {
          const step = own[w][at[w]];
          if (!step) continue;
          const [what, name, amount, phase] = step;
          if (what === "issue") queues[w].push({name, left: amount, phase, w, from: -1});
          else if (what === "set") ended.add(name);
          else if (what === "do") {
            if (until[w] === 0) { until[w] = now + amount; since[w] = now; }
            if (until[w] > now) continue;
            say(w, name);
            until[w] = 0;
          } else {
            if (!ended.has(name)) continue;
            say(w, amount);
          }
          if (what !== "do") since[w] = now;
          ++at[w];
          moved = true;
        }
      }
      const active = activeOf(), waits = [0, 1].filter(w => until[w] > now).map(w => until[w] - now);
      for (const product of active) if (product.from < 0) product.from = now;
      const steps = [...waits, ...active.map(product => product.left * active.length)];
      if (!steps.length) return {does, products, length: now, stuck: own.some((program, w) => at[w] < program.length)};
      const step = Math.min(...steps);
      now += step;
      for (const product of active) {
        product.left -= step / active.length;
        if (product.left < 1e-6) {
          queues[product.w].shift();
          ended.add(product.name);
          products.push([product.w, product.phase, product.from, now, product.name]);
        }
      }
    }
  }

  // ---- The measured: from where warpgroup 0 begins a product with K, to where it begins the next.

  // Turns of warpgroup 0, [from, to]: a pair of tiles or a tile. The last of a piece ends where both warpgroups have begun to write out.
  function turnsOf(timeline) {
    const begins = (track, what) => timeline.intervals.filter(each => each[0] === track && each[1] === what).map(([, , begin]) => begin);
    const products = begins(0, "Q K^T"), outs = [0, 1].map(track => begins(track, "write out"));
    return products.flatMap((from, i) => {
      const next = products[i + 1] ?? Infinity, [own, other] = outs.map(each => each.find(end => end > from) ?? 0);
      const to = own && own < next ? Math.max(own, other) : next;
      return to === Infinity ? [] : [[from, to]];
    });
  }
  const isOdd = (timeline, [from, to]) => !timeline.intervals.some(([track, phase, begin, end]) => track === 1 && phase === "softmax" && begin < to && end > from);
  // Clocks of each phase of a warpgroup in [from, to).
  function sums(intervals, track, from, to) {
    const result = new Map();
    for (const [own, phase, begin, end] of intervals) {
      const clocks = Math.min(end, to) - Math.max(begin, from);
      if (own === track && clocks > 0) result.set(phase, (result.get(phase) ?? 0) + clocks);
    }
    return result;
  }
  // A pair of the seesaw, cut where one waits for the other: the last column of the page's table is made from it.
  function cuts(timeline, from, to) {
    const inside = (track, phase, a, b) => timeline.intervals.filter(([own, what, begin]) => own === track && what === phase && begin >= a && begin < b);
    const qk0 = inside(0, "Q K^T", from, to)[0], softmax1 = inside(1, "softmax", qk0[3], to)[0];
    if (!softmax1) return null;
    const qk1 = timeline.intervals.filter(([own, what, , end]) => own === 1 && what === "Q K^T" && end <= softmax1[2]).at(-1);
    const pv1 = inside(1, "P V", softmax1[3], to).at(-1), pv1l = inside(0, "P V", qk1[3], to).at(-1);
    return [qk0[3] - from, qk1[3] - qk0[3], pv1[2] - qk1[3], pv1l[3] - pv1[2], to - pv1l[3]];
  }
  function idealCuts(schedule) {
    const of = name => schedule.products.find(product => product[4] === name);
    const [s0, s1, o1r, o1l] = ["S0", "S1", "O1 R", "O1 L"].map(of);
    return [s0[3], s1[3] - s0[3], o1r[2] - s1[3], Math.max(o1l[3], o1r[3]) - o1r[2], 0];
  }

  // ---- The page

  const kDefault = {timeline: "08", from: "0", tiles: "3", softmax: ""};
  function read(hash) {
    const known = given(hash);
    return Object.fromEntries(Object.entries(kDefault).map(([key, value]) => [key, known[key] ?? value]));
  }

  function drawTime(schedule, timeline, from, length, tell) {
    const kLabel = 76, kLane = 26, kTop = 14, width = Math.max(720, Math.min(1100, length / 9));
    const x = clock => kLabel + (clock / length) * (width - kLabel - 4);
    const lanes = [...(schedule ? ["ideal, wg 0", "ideal, wg 1"] : []), ...kTracks.map((name, i) => i < 2 ? `wg ${i}` : name)];
    const picture = svg("svg", {viewBox: `0 0 ${width} ${kTop + lanes.length * kLane + 24}`, width, class: "time", role: "img",
                                "aria-label": "what each warpgroup is in, over time; arrow keys go from bar to bar"});
    const bars = [];
    lanes.forEach((name, i) => picture.append(svg("text", {x: 0, y: kTop + i * kLane + 16}, name)));
    const bar = (lane, [, phase, begin, end], thin, what) => {
      if (end <= 0 || begin >= length) return;
      const left = x(Math.max(0, begin)), text = `${what}${phase}: ${Math.round(end - begin)} clocks, ${Math.round(begin)} to ${Math.round(end)}`;
      const rect = svg("rect", {x: left, width: Math.max(0.5, x(Math.min(length, end)) - left), y: kTop + lane * kLane + (thin ? 20 : 2), height: thin ? 4 : 17, class: `p${kPhases.indexOf(phase)}`}, svg("title", {}, text));
      bars.push(rect);
      picture.append(rect);
      const short = phase.replace(/^wait.*/, "wait"), room = x(Math.min(length, end)) - left;  // a name where there is room
      if (!thin && room > short.length * 6.5) picture.append(svg("text", {x: left + room / 2, y: kTop + lane * kLane + 14, class: "name"}, short));
    };
    if (schedule) {
      for (const one of schedule.does) bar(one[0], one, false, "ideal, ");
      for (const one of schedule.products) bar(one[0], one, true, `ideal, at work for ${one[4]}: `);
    }
    for (const [track, phase, begin, end, flies] of timeline.intervals) {
      const own = [track, phase, begin - from, end - from];
      bar(lanes.length - 3 + track, own, false, "");
      if (flies) bar(lanes.length - 3 + track, [track, "Q K^T", ...own.slice(2)], true, "a product in flight, ");
    }
    const tick = length > 9000 ? 2000 : 1000;
    for (let clock = 0; clock <= length; clock += tick) {
      picture.append(svg("line", {x1: x(clock), x2: x(clock), y1: kTop - 4, y2: kTop + lanes.length * kLane, class: "rule"}), svg("text", {x: x(clock), y: kTop + lanes.length * kLane + 14, "text-anchor": "middle"}, String(clock)));
    }
    if (schedule) picture.append(svg("line", {x1: x(schedule.length), x2: x(schedule.length), y1: kTop - 4, y2: kTop + 2 * kLane, class: "end"}));
    choosable(picture, bars, rect => tell(rect.textContent));
    return picture;
  }

  function draw({state, output}) {
    const wrong = text => output.replaceChildren(element("p", {className: "wrong", id: "wrong"}, text));
    const timeline = seesawTimelines.find(each => each.name === state.timeline);
    if (!timeline) return wrong(`There is no timeline '${state.timeline}'.`);
    const turns = turnsOf(timeline), turnAt = turns[state.from], {stage} = timeline;
    if (!turnAt) return wrong(`turn: 0 to ${turns.length - 1}`);
    const tiles = Number(state.tiles), softmax = state.softmax === "" ? kSoftmax[stage] : Number(state.softmax);
    if (!(Number.isInteger(tiles) && tiles >= 1 && tiles <= 16)) return wrong("tiles: 1 to 16");
    if (kSoftmax[stage] && !(softmax >= 0 && softmax <= 5000)) return wrong("softmax: 0 to 5000 clocks");
    const [from, to] = turnAt, inTurns = stage !== "07" && kSoftmax[stage] > 0, isPairs = inTurns && !isOdd(timeline, turnAt), perTurn = isPairs ? 2 : 1;
    const schedule = kSoftmax[stage] ? ideal(stage, tiles, softmax) : null, turn = schedule && ideal(stage, perTurn, softmax);
    const whole = schedule ? schedule.length : 0, last = Math.max(...timeline.intervals.map(([, , , end]) => end)) - from;
    const told = element("p", {id: "told", role: "status"}, "Choose a bar, by a click or by arrow keys, for its clocks.");
    const turnName = isPairs ? "a pair of tiles" : inTurns ? "the unpaired tile" : "a tile";
    const rows = [];
    for (const track of [0, 1]) {
      const measured = sums(timeline.intervals, track, from, to), wanted = turn ? sums(turn.does, track, 0, turn.length) : new Map();
      for (const phase of kPhases) {
        if (measured.has(phase) || wanted.has(phase)) rows.push([kTracks[track], phase, ...(turn ? [Math.round(wanted.get(phase) ?? 0)] : []), measured.get(phase) ?? 0]);
      }
    }
    const present = new Set([...timeline.intervals, ...(schedule?.does ?? [])].map(([, phase]) => phase));
    const own = isPairs && cuts(timeline, from, to), best = isPairs && idealCuts(turn);
    const names = ["QK0, from its beginning to its end", "from there to the end of QK1, with PV0_L in between", "from there to PV1_R: take P0, softmax 1, give P1", "PV1_L, to the end of the wait for it", "wait for the next K0"];
    output.replaceChildren(
      element("p", {id: "sum"}, (schedule ? `Ideal: ${tiles} ${tiles === 1 ? "tile takes" : "tiles take"} ${Math.round(whole)} clocks, ${Math.round(whole / tiles)} each. ` : "There is no ideal schedule of this stage here. ")
                                + `Measured: ${turnName} takes ${to - from} clocks, at ${timeline.megahertz} MHz.`),
      element("div", {className: "scroll"}, drawTime(schedule, timeline, from, Math.max(whole, Math.min(last, 2 * (to - from))), text => { told.textContent = text; })),
      told,
      element("p", {id: "legend"}, ...kPhases.flatMap((name, i) => present.has(name) ? [element("span", {}, element("i", {className: `p${i}`}), ` ${name}`), " "] : [])),
      ...(own ? [element("p", {}, "A pair, cut where one warpgroup waits for the other, in clocks:"),
                 table({id: "cuts"}, ["", "ideal", "measured", "more"], [...names.map((name, i) => [name, Math.round(best[i]), own[i], own[i] - Math.round(best[i])]),
                   ["a pair", Math.round(turn.length), to - from, to - from - Math.round(turn.length)]])] : []),
      element("p", {}, `What each warpgroup is in, in clocks of ${turnName}:`),
      table({id: "phases"}, ["", "phase", ...(turn ? ["ideal"] : []), "measured"], rows));
  }

  function form(page) {
    const {state} = page, stage = seesawTimelines.find(each => each.name === state.timeline)?.stage;
    const number = (key, label, placeholder) => input(key, label, state[key], value => page.set({[key]: value}), {placeholder, ...demo.digits});
    return [select("timeline", "Measured", seesawTimelines.map(each => [each.name, each.title]), state.timeline, timeline => page.setAll({timeline, from: "0"})),
            number("from", "shown from turn", "0"),
            ...(kSoftmax[stage] ? [number("tiles", "tiles of the ideal schedule", "3"), number("softmax", "clocks of its softmax", String(kSoftmax[stage]))] : [])];
  }

  demo.begin({read, form, draw});
  return {ideal};
})();
