// Plays recordings of the GPU model: docs/demos/player.md. A classic script, because a page from disk cannot load modules.
"use strict";

const playerDemo = (() => {
  const {element, svg, table, select, choosable, given} = demo;
  const kBase = document.currentScript.src.replace(/[^/]*$/, "");
  const kGroups = ["cp.async", "bulk store", "product"];
  const kShown = {before: 48, after: 12};  // events of the lanes' picture
  const kCells = 40;                       // of a region, at most
  const lanesOf = mask => mask === -1 ? 0xffffffff : mask >>> 0;

  // ---- Files, each a script that calls take(), source() or list(), because a page from disk cannot load JSON.

  const recordings = new Map(), sources = new Map(), loading = new Map();
  let listed = {recordings: [], stories: []};
  function load(file) {
    if (!loading.has(file)) {
      loading.set(file, new Promise(done => {
        const script = element("script", {src: kBase + file, onload: done, onerror: done});
        document.head.append(script);
      }));
    }
    return loading.get(file);
  }
  async function recordingOf(name) {
    if (!recordings.has(name)) await load(`recording_${name}.js`);
    const recording = recordings.get(name);
    if (recording) await Promise.all(recording.files.map(file => load(`source_${file.replaceAll("/", "__")}.js`)));
    return recording;
  }

  // ---- A recording, as events with named fields, and what follows from them.

  function prepare(recording) {
    if (recording.schema !== "gpu_model recording" || recording.version !== 1) throw new Error("This is not a recording of version 1.");
    const prepared = {...recording};
    prepared.steps = recording.events.map(([kind, ...values]) => {
      const [name, ...fields] = recording.kinds[kind], event = {kind: name};
      fields.forEach((field, i) => { event[field] = values[i]; });
      return event;
    });
    prepared.launchOf = block => recording.launches[recording.blocks[block][0]];
    prepared.warpsOf = block => Math.ceil(prepared.launchOf(block).block.reduce((a, b) => a * b) / 32);
    const end = stateOf(prepared);
    go(prepared, end, prepared.steps.length);
    prepared.spans = end.spans.concat([...end.open.values()].flat());
    prepared.mistakes = end.mistakes;
    return prepared;
  }

  // Nothing has happened.
  function stateOf(recording) {
    return {at: 0, warps: new Map(), mbarriers: new Map(), named: new Map(), copies: new Map(), pending: new Map(),
            cells: new Map(), regs: new Map(), spans: [], open: new Map(), mistakes: [],
            blocks: new Set(), ended: new Set()};
  }

  // Spans of time, for the picture of the lanes: {lane, what, from, to, text}. A wait also has who ended it.
  function begin(state, key, span) {
    const open = state.open.get(key) ?? [];
    open.push({...span, from: state.at, to: Infinity});
    state.open.set(key, open);
  }
  function finish(state, key, ender) {
    for (const span of state.open.get(key) ?? []) state.spans.push(Object.assign(span, {to: state.at, ender}));
    state.open.delete(key);
  }

  const warpKey = (block, warp) => `${block} ${warp}`;
  function warpOf(state, block, warp) {
    const key = warpKey(block, warp);
    if (!state.warps.has(key)) state.warps.set(key, {block, warp, waits: [], returned: 0, last: null});
    return state.warps.get(key);
  }

  // Lanes begin to wait for what has this key.
  function wait(state, event, key, text) {
    const warp = warpOf(state, event.block, event.warp);
    const same = warp.waits.find(each => each.key === key);
    if (same) {  // more lanes of the same warp
      same.lanes = (same.lanes | lanesOf(event.lanes)) >>> 0;
      return;
    }
    warp.waits.push({lanes: lanesOf(event.lanes), key, text, since: state.at, place: event.place});
    begin(state, `wait ${warpKey(event.block, event.warp)} ${key}`, {lane: warpKey(event.block, event.warp), what: "wait", text});
  }
  // All that wait for it go on. The recording says how many threads these must be.
  function release(state, key, threads, ender) {
    let released = 0;
    for (const warp of state.warps.values()) {
      const own = warp.waits.filter(each => each.key === key);
      if (!own.length) continue;
      for (const each of own) released += bits(each.lanes);
      warp.waits = warp.waits.filter(each => each.key !== key);
      finish(state, `wait ${warpKey(warp.block, warp.warp)} ${key}`, ender);
    }
    if (threads !== undefined && released !== threads) state.mistakes.push(`event ${state.at}: ${released} threads wait for ${key}, and ${threads} are released`);
  }
  function bits(mask) { let n = 0; for (; mask; mask &= mask - 1) ++n; return n; }
  function laneList(mask) { return Array.from({length: 32}, (_, i) => i).filter(i => mask >>> i & 1); }

  // Shared memory by cells: who wrote there last, and who reads there asynchronously. A cell is 1 / kCells of a region or more.
  function cellsOf(recording, state, block) {
    if (!state.cells.has(block)) {
      state.cells.set(block, recording.launchOf(block).regions.map(([name, offset, bytes]) => {
        let size = 4;
        while (size * kCells < bytes) size *= 2;
        return {name, offset, bytes, size, cells: Array.from({length: Math.ceil(bytes / size)}, () => ({owner: null, way: "none", readers: 0, reader: null}))};
      }));
    }
    return state.cells.get(block);
  }
  function touch(recording, state, block, ranges, change) {
    if (block < 0 || !ranges) return;
    const list = recording.ranges[ranges];
    for (const region of cellsOf(recording, state, block)) {
      const done = new Set();
      for (let i = 0; i < list.length; i += 2) {
        const from = Math.max(list[i], region.offset), to = Math.min(list[i + 1], region.offset + region.bytes);
        for (let c = Math.floor((from - region.offset) / region.size); from < to && c * region.size + region.offset < to; ++c) {
          if (!done.has(c)) change(region.cells[c]);
          done.add(c);
        }
      }
    }
  }

  // What a warp has issued and not waited for, group by group: {lanes -> groups}.
  const groupKey = (event, lane) => `${event.block} ${event.warp} ${event.group} ${lane}`;
  function issue(state, event, lanes, item) {
    item.left = lanes.length;
    for (const lane of lanes) {
      const key = groupKey(event, lane);
      if (!state.pending.has(key)) state.pending.set(key, [[]]);
      state.pending.get(key).at(-1).push(item);
    }
  }
  function commit(state, event, lanes) {
    for (const lane of lanes) {
      const key = groupKey(event, lane);
      if (!state.pending.has(key)) state.pending.set(key, [[]]);
      state.pending.get(key).push([]);
    }
  }
  function settle(state, event, lanes, done) {
    for (const lane of lanes) {
      const groups = state.pending.get(groupKey(event, lane)) ?? [[]];
      for (const item of groups.splice(0, Math.max(0, groups.length - 1 - event.allowed)).flat()) {
        if (--item.left === 0) done(item);
      }
    }
  }

  const nameOfWarp = (recording, block, warp) => (recording.launchOf(block).cluster > 1 ? `block ${recording.blocks[block][1]}, ` : "") + `warp ${warp}`;
  function nameAt(recording, block, offset) {  // of a place in shared memory
    const region = recording.launchOf(block).regions.find(([, begin, bytes]) => offset >= begin && offset < begin + bytes);
    return region ? region[0] + (region[2] > 8 ? `[${(offset - region[1]) / 8}]` : "") : `byte ${offset}`;
  }
  const barrierName = number => number === 0 ? "__syncthreads" : `barrier ${number}`;

  function go(recording, state, until) {
    for (; state.at < until;) {
      const event = recording.steps[state.at], previous = recording.steps[state.at - 1];
      ++state.at;
      apply(recording, state, event, previous);
    }
  }

  // Who acts in an event, for an arrow: a lane of the picture.
  const actorOf = event => !event ? null : event.warp !== undefined ? warpKey(event.block, event.warp) : event.kind === "land" ? `${event.block} tma` : null;

  function apply(recording, state, event, previous) {
    const {block} = event, lanes = event.lanes === undefined ? 0 : lanesOf(event.lanes);
    const ender = {step: state.at - 1, lane: actorOf(previous), text: previous ? describe(recording, previous) : ""};
    const warp = event.warp !== undefined && event.kind !== "grant" ? warpOf(state, block, event.warp) : null;
    if (warp) {
      for (const each of warp.waits.filter(one => one.key === "warp" && one.lanes & lanes && event.place !== undefined)) {
        each.lanes = (each.lanes & ~lanes) >>> 0;
        if (each.lanes === 0) { warp.waits = warp.waits.filter(one => one !== each); finish(state, `wait ${warpKey(block, event.warp)} warp`, ender); }
      }
      warp.last = {...event, step: state.at};
    }
    const owner = warp ? warpKey(block, event.warp) : null;
    const mbarrier = offset => state.mbarriers.get(`${event.at ?? block} ${offset}`);
    switch (event.kind) {
      case "begin": state.blocks.add(block); break;
      case "end": state.ended.add(block); break;
      case "return": warp.returned |= lanes; break;
      case "run":
        touch(recording, state, block, event.writes, cell => Object.assign(cell, {owner, way: "written"}));
        touch(recording, state, block, event.reads, cell => { cell.reader = owner; });
        break;
      case "meet": {
        const key = `named ${block} ${event.barrier}`;
        state.named.set(key, {block, barrier: event.barrier, generation: event.generation, arrived: event.arrived, expected: event.expected});
        if (event.waits) wait(state, event, key, barrierName(event.barrier));
        break;
      }
      case "met": {
        const key = `named ${block} ${event.barrier}`;
        Object.assign(state.named.get(key) ?? {}, {arrived: 0, generation: event.generation + 1});
        release(state, key, event.released, ender);
        break;
      }
      case "warp_wait": wait(state, event, "warp", "lanes of the warp"); break;
      case "mbarrier": state.mbarriers.set(`${block} ${event.offset}`, {block, offset: event.offset, count: event.count, phase: 0, pending: event.count, missing: 0}); break;
      case "arrive": Object.assign(mbarrier(event.offset) ?? {}, {phase: event.phase, pending: event.pending, missing: event.missing}); break;
      case "phase": {
        const own = mbarrier(event.offset);
        if (own) Object.assign(own, {phase: event.phase + 1, pending: own.count, missing: 0});
        release(state, `mbarrier ${block} ${event.offset} ${event.phase}`, event.released, ender);
        break;
      }
      case "wait": wait(state, event, `mbarrier ${block} ${event.offset} ${event.phase}`, `${nameAt(recording, block, event.offset)}, phase ${event.phase}`); break;
      case "copy": {
        const item = {block, at: event.at, from: event.from, writes: event.writes, reads: event.reads, key: `copy ${state.at}`, barrier: event.barrier};
        const lane = `${event.at < 0 ? block : event.at} ${event.group === 0 ? "cp.async" : "tma"}`;
        touch(recording, state, event.at, event.writes, cell => Object.assign(cell, {owner: lane, way: "under way"}));
        touch(recording, state, event.from, event.reads, cell => { ++cell.readers; cell.reader = lane; });
        if (event.group === 0) issue(state, event, laneList(lanes), item);
        else state.copies.set(event.copy, item);
        begin(state, item.key, {lane, what: "copy", text: describe(recording, event)});
        break;
      }
      case "land": {
        const item = state.copies.get(event.copy);
        state.copies.delete(event.copy);
        if (item) {
          landed(recording, state, item, ender);
          const own = state.mbarriers.get(`${item.at} ${item.barrier}`);
          if (own) Object.assign(own, {phase: event.phase, pending: event.pending, missing: event.missing});
        }
        break;
      }
      case "commit": commit(state, event, event.group === 2 ? [0] : laneList(lanes)); break;
      case "settle":
        settle(state, event, event.group === 2 ? [0] : laneList(lanes), item => {
          if (event.group === 2) {
            touch(recording, state, block, item.reads, cell => { --cell.readers; });
            finish(state, item.key, ender);
          } else {
            landed(recording, state, item, ender);
          }
        });
        break;
      case "product": {
        const item = {reads: event.reads, key: `product ${state.at}`};
        touch(recording, state, block, event.reads, cell => { ++cell.readers; cell.reader = owner; });
        issue(state, {...event, group: 2}, [0], item);
        begin(state, item.key, {lane: owner, what: "product", text: describe(recording, event)});
        break;
      }
      case "registers":
        state.regs.set(owner, event.registers);
        if (event.wanted) wait(state, event, `registers ${owner}`, `${event.wanted} registers`);
        break;
      case "grant":
        state.regs.set(warpKey(block, event.warp), event.registers);
        release(state, `registers ${warpKey(block, event.warp)}`, undefined, ender);
        break;
      case "cluster_wait": if (event.waits) wait(state, event, "cluster", "the cluster's barrier"); break;
      case "cluster_met": release(state, "cluster", event.released, ender); break;
      case "counter_wait": wait(state, event, `counter ${owner}`, `${recording.counters[event.counter]} to be ${event.wanted}`); break;
      case "counter_met": release(state, `counter ${owner}`, undefined, ender); break;
    }
  }
  function landed(recording, state, item, ender) {
    touch(recording, state, item.at, item.writes, cell => { if (cell.way === "under way") cell.way = "landed"; });
    touch(recording, state, item.from, item.reads, cell => { --cell.readers; });
    finish(state, item.key, ender);
  }

  // ---- In words

  function describe(recording, event) {
    const place = event.place >= 0 ? recording.places[event.place] : null;
    const at = place ? `${place[0]}, line ${place[2]}` : "";
    const lanes = event.lanes === undefined || event.lanes === -1 ? "" : bits(lanesOf(event.lanes)) === 1 ? `, lane ${laneList(lanesOf(event.lanes))[0]}` : `, ${bits(lanesOf(event.lanes))} lanes`;
    const who = event.warp !== undefined ? nameOfWarp(recording, event.block, event.warp) + lanes : `block ${event.block}`;
    const name = offset => nameAt(recording, event.at >= 0 ? event.at : event.block, offset);
    const goOn = n => `${n} ${n === 1 ? "thread goes" : "threads go"} on`;
    const lacks = `${event.pending} arrivals and ${event.missing} bytes`;
    const text = {
      begin: () => `${who} begins, ${event.threads} threads`,
      end: () => `${who} has ended`,
      return: () => `${who} returns`,
      run: () => `${who}: ${at}${event.count > 1 ? `, ${event.count} times` : ""}`,
      meet: () => `${who} ${event.waits ? "waits" : "arrives"} at ${barrierName(event.barrier)}: ${event.arrived} of ${event.expected} threads (${at})`,
      met: () => `${barrierName(event.barrier)} is complete: ${goOn(event.released)}`,
      warp_wait: () => `${who}: waits for others of its warp (${at})`,
      mbarrier: () => `${who} makes ${name(event.offset)}, for ${event.count} arrivals (${at})`,
      arrive: () => `${who} arrives at ${name(event.offset)}${event.bytes ? ` and makes it expect ${event.bytes} bytes` : ""}: phase ${event.phase} lacks ${lacks} (${at})`,
      phase: () => `phase ${event.phase} of ${name(event.offset)} is complete: ${goOn(event.released)}`,
      wait: () => `${who} waits for phase ${event.phase} of ${name(event.offset)} (${at})`,
      pass: () => `${who} need not wait at ${name(event.offset)}: ${event.phase} phases are complete (${at})`,
      copy: () => `${who} begins a copy of ${event.bytes} bytes${event.barrier >= 0 ? `, for ${name(event.barrier)}` : ""} (${at})`,
      land: () => `copy ${event.copy} has landed${event.pending + event.missing > 0 ? `: its mbarrier lacks ${lacks}` : ""}`,
      commit: () => `${who} commits a group: ${kGroups[event.group]} (${at})`,
      settle: () => `${who} has waited for all groups but ${event.allowed}: ${kGroups[event.group]} (${at})`,
      product: () => `${who} issues ${event.count > 1 ? `${event.count} products` : "a product"} (${at})`,
      registers: () => `${who} has ${event.registers} registers${event.wanted ? `, and waits for ${event.wanted}` : ""} (${at})`,
      grant: () => `${who} gets ${event.registers} registers`,
      cluster_arrive: () => `${who} arrives at the cluster's barrier (${at})`,
      cluster_wait: () => `${who} ${event.waits ? "waits" : "need not wait"} at the cluster's barrier (${at})`,
      cluster_met: () => `the cluster's barrier is complete: ${goOn(event.released)}`,
      counter_wait: () => `${who} waits until ${recording.counters[event.counter]} is ${event.wanted} (${at})`,
      counter_met: () => `${who} goes on: ${recording.counters[event.counter]} is ${event.holds}`,
      counter: () => `${who}: ${recording.counters[event.counter]} is ${event.value} (${at})`,
    }[event.kind]();
    return text[0].toUpperCase() + text.slice(1);
  }

  // ---- Drawing

  // A warpgroup has a colour, and so have the copy engines.
  function hueOf(owner) {
    const [, who] = owner.split(" ");
    return who === "tma" ? 175 : who === "cp.async" ? 130 : [215, 30, 285, 330][Math.floor(Number(who) / 4) % 4] + Number(who) % 4 * 6;
  }

  // The blocks of the launch that this step belongs to.
  function blocksAt(recording, state) {
    const now = recording.steps[Math.max(0, state.at - 1)]?.block ?? 0, launch = recording.blocks[now]?.[0] ?? 0;
    return recording.blocks.flatMap(([own], block) => own === launch ? [block] : []);
  }

  function drawLanes(recording, state, jump, width) {
    const rows = [];
    for (const block of blocksAt(recording, state)) {
      const several = recording.launchOf(block).cluster > 1, own = recording.blocks[block][1];
      for (let w = 0; w < recording.warpsOf(block); ++w) rows.push([warpKey(block, w), `warp ${several ? `${own}.` : ""}${w}`]);
      for (const engine of ["cp.async", "tma"]) {
        if (recording.spans.some(span => span.lane === `${block} ${engine}`)) rows.push([`${block} ${engine}`, (engine === "tma" ? "TMA" : engine) + (several ? ` ${own}` : "")]);
      }
    }
    const first = Math.max(0, Math.min(state.at - kShown.before, recording.steps.length - kShown.before - kShown.after)), last = first + kShown.before + kShown.after;
    const kLabel = 62, kRow = 14, step = (width - kLabel) / (last - first), x = at => kLabel + (at - first) * step;
    const y = new Map(rows.map(([lane], i) => [lane, i * kRow]));
    const picture = svg("svg", {viewBox: `0 0 ${width} ${rows.length * kRow + 2}`, class: "lanes", role: "img", "aria-label": "a lane for each warp and each copy engine, event by event"});
    for (const [lane, label] of rows) {
      picture.append(svg("text", {x: 0, y: y.get(lane) + 11}, label),
                     svg("line", {x1: kLabel, x2: width, y1: y.get(lane) + kRow - 0.5, y2: y.get(lane) + kRow - 0.5, class: "rule"}));
    }
    const order = {wait: 0, product: 1, copy: 2};
    for (const span of recording.spans.filter(each => y.has(each.lane) && each.from < last && each.to > first).sort((a, b) => order[a.what] - order[b.what])) {
      const from = Math.max(first, span.from - 0.5), to = Math.min(last, span.to - 0.5);
      const bar = svg("rect", {x: x(from), width: Math.max(1, x(to) - x(from)), y: y.get(span.lane) + (span.what === "product" ? 9 : 2), height: span.what === "product" ? 3 : 8, class: span.what},
                      svg("title", {}, `${span.text}: steps ${span.from} to ${span.to === Infinity ? "the end" : span.to}`));
      if (span.what !== "wait") bar.style.setProperty("--hue", hueOf(span.lane));
      picture.append(bar);
      if (span.what === "wait" && span.to <= Math.min(last, state.at) && span.to > first && span.ender?.lane !== span.lane && y.has(span.ender?.lane)) {
        picture.append(svg("line", {x1: x(span.to - 1.5), x2: x(span.to - 0.5), y1: y.get(span.ender.lane) + 6, y2: y.get(span.lane) + 6, class: "arrow"}));
      }
    }
    for (let at = first + 1; at <= Math.min(last, recording.steps.length); ++at) {
      const event = recording.steps[at - 1], lane = actorOf(event);
      if (!y.has(lane) || ["wait", "warp_wait"].includes(event.kind)) continue;
      const mark = svg("rect", {x: x(at - 0.85), width: Math.max(1.5, step * 0.7), y: y.get(lane) + 1, height: 10, class: `mark ${event.kind}`},
                       svg("title", {}, `${at}: ${describe(recording, event)}`));
      mark.style.setProperty("--hue", hueOf(lane));
      picture.append(mark);
    }
    picture.append(svg("rect", {x: x(state.at), width: Math.max(0, width - x(state.at)), y: 0, height: rows.length * kRow, class: "future"}),
                   svg("line", {x1: x(state.at), x2: x(state.at), y1: 0, y2: rows.length * kRow, class: "now"}));
    picture.addEventListener("click", event => {
      const box = picture.getBoundingClientRect(), at = Math.round(first + ((event.clientX - box.left) / box.width * width - kLabel) / step + 0.5);
      jump(Math.max(0, Math.min(recording.steps.length, at)));
    });
    return picture;
  }

  // Who waits, for what, and who will end it.
  function drawWaits(recording, state, jump) {
    const rows = [];
    for (const block of blocksAt(recording, state)) {
      for (let w = 0; w < recording.warpsOf(block); ++w) {
        const warp = state.warps.get(warpKey(block, w));
        const cells = [];
        if (!warp) cells.push("has not begun", "");
        else if (bits(warp.returned) === 32) cells.push("has returned", "");
        else if (!warp.waits.length) cells.push("runs", "");
        else {
          const each = warp.waits[0], own = recording.spans.find(span => span.lane === warpKey(block, w) && span.what === "wait" && span.from === each.since);
          cells.push(`waits for ${each.text}${bits(each.lanes) === 1 ? " (one lane)" : bits(each.lanes) < 32 ? ` (${bits(each.lanes)} lanes)` : ""}`,
                     !own || own.to === Infinity ? (recording.error.startsWith("deadlock") ? "never" : "not in this recording")
                                                 : element("span", {}, element("a", {href: location.hash, onclick: event => { event.preventDefault(); jump(own.to); }}, `step ${own.to}`), element("span", {title: own.ender.text}, `: ${own.ender.text}`)));
        }
        rows.push([element("th", {}, nameOfWarp(recording, block, w)), element("td", {className: warp?.waits.length ? "waits" : ""}, cells[0]), cells[1]]);
      }
    }
    return table({className: "who"}, ["", "now", "goes on at"], rows);
  }

  function drawBarriers(recording, state) {
    const blocks = blocksAt(recording, state), chips = [];
    const chip = (key, title, name, text) => {
      const waited = [...state.warps.values()].some(warp => warp.waits.some(each => each.key.startsWith(key)));
      return element("span", {className: waited ? "chip waited" : "chip", title: title + (waited ? "; somebody waits" : "")}, element("b", {}, name), ` ${text}`);
    };
    const several = blocks.length > 1 ? block => `${recording.blocks[block][1]}: ` : () => "";
    for (const own of [...state.mbarriers.values()].filter(each => blocks.includes(each.block)).sort((a, b) => a.block - b.block || a.offset - b.offset)) {
      chips.push(chip(`mbarrier ${own.block} ${own.offset} ${own.phase}`, `phase ${own.phase} lacks ${own.pending} of ${own.count} arrivals and ${own.missing} bytes`,
                      several(own.block) + nameAt(recording, own.block, own.offset), `${own.phase} · ${own.pending}/${own.count}` + (own.missing ? ` · ${own.missing} B` : "")));
    }
    for (const own of [...state.named.values()].filter(each => blocks.includes(each.block)).sort((a, b) => a.block - b.block || a.barrier - b.barrier)) {
      chips.push(chip(`named ${own.block} ${own.barrier}`, `${own.arrived} of ${own.expected} threads have come; complete ${own.generation} times before`,
                      several(own.block) + barrierName(own.barrier), `${own.generation} · ${own.arrived}/${own.expected}`));
    }
    return element("div", {className: "chips"}, ...chips);
  }

  function drawMemory(recording, state) {
    const rows = [], nameOf = owner => owner.split(" ")[1].replace(/^(?=\d)/, "warp ");
    for (const block of blocksAt(recording, state)) {
      const several = recording.launchOf(block).cluster > 1 ? `${recording.blocks[block][1]}: ` : "";
      for (const region of cellsOf(recording, state, block)) {
        if ([...state.mbarriers.values()].some(each => each.block === block && each.offset === region.offset)) continue;  // a chip of its own
        const cells = region.cells.map((cell, i) => {
          const own = element("i", {className: cell.way.replace(" ", "-") + (cell.readers > 0 ? " read" : ""),
                                    title: `${region.name} from byte ${i * region.size}: ` + (cell.owner ? `${cell.way}, ${nameOf(cell.owner)}` : "nobody has written it")
                                           + (cell.readers > 0 ? `; read by ${cell.readers} under way, last by ${nameOf(cell.reader)}` : "")});
          if (cell.owner) own.style.setProperty("--hue", hueOf(cell.owner));
          if (cell.readers > 0) own.style.setProperty("--reader", hueOf(cell.reader));
          return own;
        });
        for (let first = 0, i = 1; i <= cells.length; ++i) {  // an owner is named where there is room
          const {owner} = region.cells[first];
          if (i < cells.length && region.cells[i].owner === owner) continue;
          if (owner && (i - first) / cells.length >= 0.1) cells[first].dataset.owner = nameOf(owner).replace("warp ", "w").replace("tma", "TMA");
          first = i;
        }
        rows.push(element("div", {className: "region"}, element("span", {}, several + region.name), element("div", {}, ...cells)));
      }
    }
    const told = element("p", {className: "told", role: "status"});
    const made = element("div", {className: "memory", role: "group", ariaLabel: "shared memory; arrow keys go from cell to cell"}, ...rows, told);
    choosable(made, [...made.querySelectorAll("i")], cell => { told.textContent = cell.title; });
    return made;
  }

  function drawSource(recording, state, change) {
    const event = recording.steps[state.at - 1];
    let at = event?.place >= 0 ? recording.places[event.place] : null;
    for (let i = state.at - 1; !at && i >= 0; --i) if (recording.steps[i].place >= 0) at = recording.places[recording.steps[i].place];
    if (!at) return element("pre", {className: "source"}, "");
    const [, file, line] = at, text = sources.get(recording.files[file]);
    if (!text) return element("p", {className: "file"}, `${recording.files[file]}, line ${line}`);
    const lines = text.split("\n"), first = Math.max(1, line - 4), shown = lines.slice(first - 1, line + 4).map((own, i) => {
      const here = first + i, faulty = change && change.file === recording.files[file] && here === change.line;
      return element("span", {className: (here === line && event?.place >= 0 ? "here" : "") + (faulty ? " faulty" : "")}, `${String(here).padStart(4)}  ${own}\n`);
    });
    return element("div", {}, element("p", {className: "file"}, `${recording.files[file]}, line ${line}`), element("pre", {className: "source"}, ...shown));
  }

  // ---- The page

  const kDefault = {a: "08-3", at: "400", b: "", bt: "0", story: ""};
  const write = state => demo.addressOf(Object.entries(state).filter(([key, value]) => value !== "" || key === "b"));
  function read(hash) {
    const known = given(hash), story = listed.stories.find(each => each.name === known.story);
    const state = {...kDefault, ...(story && !known.a ? stepOf(story, Number(known.k ?? 0)) : {})};
    for (const key in kDefault) if (known[key] !== undefined) state[key] = known[key];
    if (!story) state.story = "";
    return state;
  }
  function stepOf(story, k) {
    const [at, ...more] = story.steps[Math.max(0, Math.min(story.steps.length - 1, k))];
    return {a: story.left, at: String(at), b: story.right ?? "", bt: story.right ? String(more[0]) : "0", story: story.name};
  }

  const kSides = {a: "at", b: "bt"};  // the recording on a side, and its step
  const isQuiet = event => event.kind === "run" || event.kind === "pass" || event.kind === "commit" || event.kind === "warp_wait";
  const bounded = (text, recording) => Math.max(0, Math.min(recording.steps.length, /^\d+$/.test(text) ? Number(text) : 0));

  function form(page) {
    const {state} = page, own = recordings.has("own") ? [["own", "your own"]] : [];
    const choice = (id, label, key, none) =>
      select(id, label, [...none, ...own, ...listed.recordings.map(each => [each.name, each.title])], state[key],
             name => page.setAll({[key]: name, [kSides[key]]: "0", story: ""}));
    return [
      choice("left", "Recording", "a", []), choice("right", "beside it", "b", [["", "nothing"]]),
      select("race", "or a race to watch", [["", "choose"], ...listed.stories.map(each => [each.name, each.title])], state.story,
             name => { if (name) page.setAll(stepOf(listed.stories.find(each => each.name === name), 0)); }),
      element("p", {}, element("label", {htmlFor: "file"}, "Your own recording: "), element("input", {type: "file", id: "file", accept: ".json", onchange: event => open(page, event.target.files[0])}))];
  }
  function open(page, file) {
    file?.text().then(text => {
      take("own", JSON.parse(text));
      page.setAll({a: "own", at: "0", b: "", bt: "0", story: ""});
    }).catch(error => { recordings.set("own", {wrong: `${file.name}: ${error.message}`, files: []}); page.setAll({a: "own", b: "", story: ""}); });
  }

  // The steps of a story; the buttons stay, so that one keeps the focus.
  const told = element("div", {id: "story"});
  function tell(page) {
    const {state} = page, story = listed.stories.find(each => each.name === state.story);
    if (told.dataset.story !== state.story) {
      told.dataset.story = state.story;
      told.replaceChildren(...(!story ? [] : [element("p", {}, element("b", {}, story.title)), element("ol", {}, ...story.steps.map((step, k) =>
        element("li", {}, element("button", {type: "button", onclick: () => page.setAll(stepOf(story, k))}, `step ${step[0]}`), " ", step.at(-1))))]));
    }
    told.querySelectorAll("li").forEach((item, k) => {
      const here = stepOf(story, k), own = Object.keys(here).every(key => here[key] === state[key]);
      item.className = own ? "here" : "";
      item.ariaCurrent = own ? "step" : null;
    });
  }

  // Buttons for both sides: by one event, or by one that is not skipped.
  let quiet = true, timer = 0;
  function stepper(page) {
    const last = side => recordings.get(page.state[side])?.steps?.length ?? 0;
    function by(direction) {
      const changes = {};
      for (const [side, key] of Object.entries(kSides)) {
        const recording = recordings.get(page.state[side]);
        if (!recording?.steps) continue;
        let step = bounded(page.state[key], recording);
        do step += direction; while (quiet && step > 0 && step < recording.steps.length && isQuiet(recording.steps[step - 1]));
        changes[key] = String(Math.max(0, Math.min(recording.steps.length, step)));
      }
      return page.set(changes);
    }
    function play(button) {
      const interval = matchMedia("(prefers-reduced-motion: reduce)").matches ? 1000 : 250;
      if (timer) { clearInterval(timer); timer = 0; }
      else timer = setInterval(() => { by(1); if (Number(page.state.at) >= last("a")) play(button); }, interval);
      button.textContent = timer ? "stop" : "play";
    }
    const button = (text, title, onclick) => element("button", {type: "button", title, ariaLabel: title, onclick}, text);
    return element("p", {id: "steps"},
      button("|◀", "to the beginning", () => page.set({at: "0", bt: "0"})), " ", button("◀", "a step back", () => by(-1)), " ", button("▶", "a step on", () => by(1)), " ",
      button("▶|", "to the end", () => page.set({at: String(last("a")), bt: String(last("b"))})), " ", element("button", {type: "button", onclick: event => play(event.target)}, "play"), " ",
      element("label", {}, element("input", {type: "checkbox", id: "quiet", checked: quiet, onchange: event => { quiet = event.target.checked; }}), " skip what leaves nothing to wait for"));
  }

  // A recording, where it is, and what changes from step to step. The first part stays, so that the slider can be dragged.
  const panes = element("div", {className: "panes"}), shown = {};
  function paneOf(page, recording, side) {
    if (shown[side]?.recording === recording) return shown[side];
    const item = listed.recordings.find(each => each.name === page.state[side]), key = kSides[side], text = input => String(input.target.value);
    const slider = element("input", {type: "range", min: 0, max: recording.steps.length, ariaLabel: "step",
      oninput: input => { page.state[key] = text(input); draw(page); }, onchange: input => page.set({[key]: text(input)})});
    const body = element("div"), pane = element("div", {className: "pane", id: `pane-${side}`},
      element("p", {className: "title"}, element("b", {}, item?.title ?? `${recording.about.stage ?? "a recording"}, ${recording.about.shape ?? ""}`)),
      item?.change ? element("p", {className: "change"}, `The fault, line ${item.change.line}: `, element("code", {}, item.change.removed),
                             ...(item.change.instead ? [" is now ", element("code", {}, item.change.instead)] : [" is removed"]), ".") : element("p"),
      item ? element("details", {}, element("summary", {}, "Record it yourself"), element("code", {}, item.command)) : element("p"),
      element("p", {}, slider), body);
    return shown[side] = {recording, item, slider, body, pane, now: stateOf(recording)};
  }
  async function sideOf(page, side) {
    const name = page.state[side];
    if (!name) return null;
    const recording = await recordingOf(name), wrong = recording ? recording.wrong : `There is no recording '${name}'.`;
    if (wrong) return () => element("p", {className: "wrong"}, wrong);
    return width => {
      const own = paneOf(page, recording, side), key = kSides[side], at = bounded(page.state[key], recording), length = recording.steps.length;
      if (own.now.at > at) own.now = stateOf(recording);
      go(recording, own.now, at);
      const {now} = own, event = recording.steps[at - 1], over = at === length, jump = to => page.set({[key]: String(to)});
      own.slider.value = at;
      const part = (caption, made) => element("div", {}, element("p", {className: "heading"}, caption), made);
      own.body.replaceChildren(
        element("div", {},
          element("p", {className: "event"}, `Step ${at} of ${length}. `, event ? describe(recording, event) + "." : "Nothing has happened yet."),
          over && recording.error ? element("p", {className: "error wrong"}, `The model stops the kernel: ${recording.error}`) : "",
          over && recording.truncated ? element("p", {}, "The recording ends here, because it was bounded.") : ""),
        drawSource(recording, now, own.item?.change), part("Lanes: grey waits, and a line leads from what ends it", drawLanes(recording, now, jump, width)),
        part("Who waits", drawWaits(recording, now, jump)), part("Barriers: phase · what it lacks; somebody waits at a dashed one", drawBarriers(recording, now)),
        part("Shared memory: who wrote there last; hatched is under way", drawMemory(recording, now)));
      return own.pane;
    };
  }
  let drawing = 0;
  async function draw(page) {
    const turn = ++drawing, sides = (await Promise.all([sideOf(page, "a"), sideOf(page, "b")])).filter(Boolean);
    if (turn !== drawing) return;  // a later one is under way
    panes.className = sides.length > 1 ? "panes two" : "panes";
    if (!panes.isConnected) page.output.replaceChildren(told, stepper(page), panes);
    tell(page);
    const style = getComputedStyle(panes), columns = style.gridTemplateColumns.split(" ");  // so that a letter has its size whatever the screen is
    const made = sides.map(side => side(parseFloat(columns[0]) || 340));
    if (made.length !== panes.children.length || made.some((pane, i) => pane !== panes.children[i])) panes.replaceChildren(...made);
    document.getElementById("demo").dataset.drawn = location.hash;  // for the test
  }

  function take(name, recording) { recordings.set(name, prepare(recording)); }
  load("recordings.js").then(() => {
    let page;
    demo.begin({read, write, form, draw: own => draw(page = own)});
    addEventListener("resize", () => draw(page));
  });
  return {take, source: (path, text) => sources.set(path, text), list: what => { listed = what; }, listed: () => listed, recordingOf, stateOf, go};
})();
