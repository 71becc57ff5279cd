// Plays recordings of the GPU model: docs/demos/player.md. A classic script, because a page from disk cannot load modules.
"use strict";

const playerDemo = (() => {
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
    const lacks = `${event.pending} arrivals and ${event.missing} bytes`;
    const text = {
      begin: () => `${who} begins, ${event.threads} threads`,
      end: () => `${who} has ended`,
      return: () => `${who} returns`,
      run: () => `${who}: ${at}${event.count > 1 ? `, ${event.count} times` : ""}`,
      meet: () => `${who} ${event.waits ? "waits" : "arrives"} at ${barrierName(event.barrier)}: ${event.arrived} of ${event.expected} threads (${at})`,
      met: () => `${barrierName(event.barrier)} is complete: ${event.released} threads go on`,
      warp_wait: () => `${who}: waits for others of its warp (${at})`,
      mbarrier: () => `${who} makes ${name(event.offset)}, for ${event.count} arrivals (${at})`,
      arrive: () => `${who} arrives at ${name(event.offset)}${event.bytes ? ` and makes it expect ${event.bytes} bytes` : ""}: phase ${event.phase} lacks ${lacks} (${at})`,
      phase: () => `phase ${event.phase} of ${name(event.offset)} is complete: ${event.released} threads go on`,
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
      cluster_met: () => `the cluster's barrier is complete: ${event.released} threads go on`,
      counter_wait: () => `${who} waits until ${recording.counters[event.counter]} is ${event.wanted} (${at})`,
      counter_met: () => `${who} goes on: ${recording.counters[event.counter]} is ${event.holds}`,
      counter: () => `${who}: ${recording.counters[event.counter]} is ${event.value} (${at})`,
    }[event.kind]();
    return text[0].toUpperCase() + text.slice(1);
  }

  // ---- Drawing

  function element(tag, attributes = {}, ...children) {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...children);
    return made;
  }
  function svg(tag, attributes = {}, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }
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
      const prefix = recording.launchOf(block).cluster > 1 ? `${recording.blocks[block][1]}.` : "";
      for (let w = 0; w < recording.warpsOf(block); ++w) rows.push([warpKey(block, w), `warp ${prefix}${w}`]);
      for (const engine of ["cp.async", "tma"]) {
        if (recording.spans.some(span => span.lane === `${block} ${engine}`)) rows.push([`${block} ${engine}`, engine === "tma" ? `TMA ${prefix}` : engine]);
      }
    }
    const first = Math.max(0, Math.min(state.at - kShown.before, recording.steps.length - kShown.before - kShown.after)), last = first + kShown.before + kShown.after;
    const kLabel = 62, kRow = 14, step = (width - kLabel) / (last - first), x = at => kLabel + (at - first) * step;
    const y = new Map(rows.map(([lane], i) => [lane, i * kRow]));
    const picture = svg("svg", {viewBox: `0 0 ${width} ${rows.length * kRow + 2}`, class: "lanes"});
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
                     !own || own.to === Infinity ? (recording.error.startsWith("deadlock") ? "never" : "not before the recording ends")
                                                 : element("span", {}, element("a", {href: location.hash, onclick: event => { event.preventDefault(); jump(own.to); }}, `step ${own.to}`), `: ${own.ender.text}`));
        }
        rows.push(element("tr", {className: warp?.waits.length ? "waits" : ""}, element("th", {}, nameOfWarp(recording, block, w)), ...cells.map(text => element("td", {}, text))));
      }
    }
    return element("div", {className: "table-wrapper"}, element("table", {className: "who"}, element("tr", {}, ...["", "now", "goes on at"].map(text => element("th", {}, text))), ...rows));
  }

  function drawBarriers(recording, state) {
    const blocks = blocksAt(recording, state), chips = [];
    const waited = key => [...state.warps.values()].some(warp => warp.waits.some(each => each.key.startsWith(key)));
    const several = blocks.length > 1 ? block => `${recording.blocks[block][1]}: ` : () => "";
    for (const own of [...state.mbarriers.values()].filter(each => blocks.includes(each.block)).sort((a, b) => a.block - b.block || a.offset - b.offset)) {
      chips.push(element("span", {className: waited(`mbarrier ${own.block} ${own.offset} ${own.phase}`) ? "chip waited" : "chip", title: `phase ${own.phase} lacks ${own.pending} of ${own.count} arrivals and ${own.missing} bytes`},
        element("b", {}, several(own.block) + nameAt(recording, own.block, own.offset)),
        ` ${own.phase} · ${own.pending}/${own.count}` + (own.missing ? ` · ${own.missing} B` : "")));
    }
    for (const own of [...state.named.values()].filter(each => blocks.includes(each.block)).sort((a, b) => a.block - b.block || a.barrier - b.barrier)) {
      chips.push(element("span", {className: waited(`named ${own.block} ${own.barrier}`) ? "chip waited" : "chip",
                                    title: `${own.arrived} of ${own.expected} threads have come; complete ${own.generation} times before`},
        element("b", {}, several(own.block) + barrierName(own.barrier)), ` ${own.generation} · ${own.arrived}/${own.expected}`));
    }
    return element("div", {className: "chips"}, ...chips);
  }

  function drawMemory(recording, state) {
    const rows = [];
    for (const block of blocksAt(recording, state)) {
      const several = recording.launchOf(block).cluster > 1 ? `${recording.blocks[block][1]}: ` : "";
      for (const region of cellsOf(recording, state, block)) {
        if ([...state.mbarriers.values()].some(each => each.block === block && each.offset === region.offset)) continue;  // a chip of its own
        const cells = region.cells.map((cell, i) => {
          const own = element("i", {className: cell.way.replace(" ", "-") + (cell.readers > 0 ? " read" : ""),
                                    title: `${region.name} from byte ${i * region.size}: ` + (cell.owner ? `${cell.way}, ${cell.owner.split(" ")[1].replace(/^(?=\d)/, "warp ")}` : "nobody has written it")
                                           + (cell.readers > 0 ? `; ${cell.readers} asynchronous ${cell.readers === 1 ? "read" : "reads"} under way, last by ${cell.reader.split(" ")[1].replace(/^(?=\d)/, "warp ")}` : "")});
          if (cell.owner) own.style.setProperty("--hue", hueOf(cell.owner));
          if (cell.readers > 0) own.style.setProperty("--reader", hueOf(cell.reader));
          return own;
        });
        rows.push(element("div", {className: "region"}, element("span", {}, several + region.name), element("div", {}, ...cells)));
      }
    }
    const told = element("p", {className: "told"});
    return element("div", {className: "memory", onclick: event => { told.textContent = event.target.title; }}, ...rows, told);
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
  const toHash = state => "#" + Object.entries(state).filter(([key, value]) => value !== "" || key === "b").map(([key, value]) => `${key}=${encodeURIComponent(value)}`).join("&");
  function fromHash(hash) {
    const given = Object.fromEntries(new URLSearchParams(hash.replace(/^#/, ""))), story = listed.stories.find(each => each.name === given.story);
    const state = {...kDefault, ...(story && !given.a ? stepOf(story, Number(given.k ?? 0)) : {})};
    for (const key in kDefault) if (given[key] !== undefined) state[key] = given[key];
    if (!story) state.story = "";
    return state;
  }
  function stepOf(story, k) {
    const [at, ...more] = story.steps[Math.max(0, Math.min(story.steps.length - 1, k))];
    return {a: story.left, at: String(at), b: story.right ?? "", bt: story.right ? String(more[0]) : "0", story: story.name};
  }

  function begin_(root) {
    const output = element("div", {className: "panes"}), told = element("div", {id: "story"}), head = element("div"), steps = element("p", {id: "steps"}), loaded = new Map();
    let state, quiet = true, timer = 0, drawing = 0;
    const isQuiet = event => event.kind === "run" || event.kind === "pass" || event.kind === "commit" || event.kind === "warp_wait";

    const paneWidth = () => {  // so that letters keep their size on any screen
      const all = root.clientWidth || 340;
      return Math.max(300, state.b && matchMedia("(min-width: 60rem)").matches ? (all - 20) / 2 : all);
    };
    function bounded(text, recording) { return Math.max(0, Math.min(recording.steps.length, /^\d+$/.test(text) ? Number(text) : 0)); }
    async function sideOf(name, text, key) {
      if (!name) return null;
      const recording = await recordingOf(name);
      if (!recording) return element("p", {className: "wrong"}, `There is no recording '${name}'.`);
      if (recording.wrong) return element("p", {className: "wrong"}, recording.wrong);
      const at = bounded(text, recording), item = listed.recordings.find(each => each.name === name);
      let own = loaded.get(key);
      if (!own || own.recording !== recording || own.state.at > at) loaded.set(key, own = {recording, state: stateOf(recording)});
      go(recording, own.state, at);
      return pane(recording, own.state, item, key);
    }
    function pane(recording, own, item, key) {
      const length = recording.steps.length, jump = at => { state[key === "a" ? "at" : "bt"] = String(at); changed(); };
      const event = recording.steps[own.at - 1], over = own.at === length;
      const parts = [
        element("p", {className: "title"}, element("b", {}, item?.title ?? `${recording.about.stage ?? "a recording"}, ${recording.about.shape ?? ""}`)),
        item?.change ? element("p", {className: "change"}, `The fault, line ${item.change.line}: `, element("code", {}, item.change.removed),
                               ...(item.change.instead ? [" is now ", element("code", {}, item.change.instead)] : [" is removed"]), ".") : "",
        element("p", {}, element("input", {type: "range", min: 0, max: length, value: own.at, ariaLabel: "step", oninput: input => jump(Number(input.target.value))})),
        element("p", {className: "event"}, `Step ${own.at} of ${length}. `, event ? describe(recording, event) + "." : "Nothing has happened yet."),
        item ? element("details", {}, element("summary", {}, "Record it yourself"), element("code", {}, item.command)) : "",
        over && recording.error ? element("p", {className: "error wrong"}, `The model stops the kernel: ${recording.error}`) : "",
        over && recording.truncated ? element("p", {}, "The recording ends here, because its length was limited.") : "",
        drawSource(recording, own, item?.change), drawLanes(recording, own, jump, paneWidth()), drawWaits(recording, own, jump), drawBarriers(recording, own), drawMemory(recording, own)];
      return element("div", {className: "pane", id: `pane-${key}`}, ...parts);
    }
    async function draw() {
      const turn = ++drawing;
      const sides = [await sideOf(state.a, state.at, "a"), await sideOf(state.b, state.bt, "b")].filter(Boolean);
      if (turn !== drawing) return;  // a later drawing is under way
      output.className = sides.length > 1 ? "panes two" : "panes";
      output.replaceChildren(...sides);
      const story = listed.stories.find(each => each.name === state.story);
      told.replaceChildren(...(!story ? [] : [element("p", {}, element("b", {}, story.title)), element("ol", {}, ...story.steps.map((step, k) => {
        const here = stepOf(story, k), own = Object.keys(here).every(key => here[key] === state[key]);
        return element("li", {className: own ? "here" : ""}, element("button", {onclick: () => { Object.assign(state, here); form(); changed(); }}, `step ${step[0]}`), " ", step.at(-1));
      }))]));
      root.dataset.drawn = location.hash;  // for the test
    }
    function changed() {
      location.replace(toHash(state));
      return draw();
    }
    // Moves both sides by one event, or to the next one that is not skipped.
    function by(direction) {
      for (const [key, name] of [["at", "a"], ["bt", "b"]]) {
        const recording = recordings.get(state[name]);
        if (!recording?.steps) continue;
        let at = bounded(state[key], recording);
        do at += direction; while (quiet && at > 0 && at < recording.steps.length && isQuiet(recording.steps[at - 1]));
        state[key] = String(Math.max(0, Math.min(recording.steps.length, at)));
      }
      return changed();
    }
    function ends(last) {
      for (const [key, name] of [["at", "a"], ["bt", "b"]]) state[key] = String(last ? recordings.get(state[name])?.steps?.length ?? 0 : 0);
      changed();
    }
    function play(button) {
      if (timer) { clearInterval(timer); timer = 0; }
      else timer = setInterval(() => { by(1); const own = recordings.get(state.a); if (!own || Number(state.at) >= own.steps.length) play(button); }, 250);
      button.textContent = timer ? "stop" : "play";
    }
    function own(file) {
      file?.text().then(text => {
        take("own", JSON.parse(text));
        loaded.clear();
        Object.assign(state, {a: "own", at: "0", b: "", bt: "0", story: ""});
        form();
        changed();
      }).catch(error => { recordings.set("own", {wrong: `${file.name}: ${error.message}`, files: []}); Object.assign(state, {a: "own", b: ""}); draw(); });
    }
    const button = (text, title, onclick) => element("button", {title, onclick}, text);
    function form() {
      const options = none => [...(none ? [element("option", {value: ""}, "nothing")] : []), ...(recordings.has("own") ? [element("option", {value: "own"}, "your own")] : []),
                               ...listed.recordings.map(each => element("option", {value: each.name}, each.title))];
      const choice = (id, label, key, none) => {
        const made = element("select", {id, onchange: event => { state[key] = event.target.value; state[key === "a" ? "at" : "bt"] = "0"; state.story = ""; changed(); }}, ...options(none));
        made.value = state[key];
        return element("p", {}, element("label", {htmlFor: id}, label), made);
      };
      head.replaceChildren(
        choice("left", "Recording ", "a", false), choice("right", "beside it ", "b", true),
        element("p", {}, element("label", {htmlFor: "file"}, "Your own recording: "), element("input", {type: "file", id: "file", accept: ".json", onchange: event => own(event.target.files[0])})));
    }
    load("recordings.js").then(() => {
      state = fromHash(location.hash);
      addEventListener("hashchange", () => {  // a link, or the back button
        if (location.hash !== toHash(state)) { state = fromHash(location.hash); form(); draw(); }
      });
      steps.replaceChildren(
        button("|◀", "to the beginning", () => ends(false)), " ", button("◀", "a step back", () => by(-1)), " ", button("▶", "a step on", () => by(1)), " ",
        button("▶|", "to the end", () => ends(true)), " ", button("play", "a step every quarter of a second", event => play(event.target)), " ",
        element("label", {}, element("input", {type: "checkbox", id: "quiet", checked: quiet, onchange: event => { quiet = event.target.checked; }}), " skip what leaves nothing to wait for"));
      root.replaceChildren(head, told, steps, output);
      form();
      return draw();
    });
  }

  function take(name, recording) { recordings.set(name, prepare(recording)); }
  return {take, source: (path, text) => sources.set(path, text), list: what => { listed = what; }, listed: () => listed, recordingOf, stateOf, go, begin: begin_};
})();

playerDemo.begin(document.getElementById("demo"));
