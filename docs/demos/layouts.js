// Rows of 16-byte chunks in shared memory: docs/demos/layouts.md. A classic script, because a page from disk cannot load modules.
"use strict";

const layoutsDemo = (() => {
  const {element, select, input, given} = demo;
  const kBanks = 32, kWord = 4, kChunk = 16, kRows = 32, kColumns = 8;  // values of 16 bits per chunk

  // `pitch`: bytes from row to row; chunk c of row r lies where chunk own(r, c) would, or c ^ (r / divide % modulo).
  const chunksOf = ({pitch}) => pitch === 64 ? 4 : 8;
  const placeOf = ({divide, modulo, own}, row, chunk) => own ? own(row, chunk) : chunk ^ Math.floor(row / divide) % modulo;
  const addressOf = (layout, row, chunk) => row * layout.pitch + placeOf(layout, row, chunk) * kChunk;

  // A swizzle that was typed: {own}, or {error}. It knows no names but r and c, so it can only compute.
  function ownSwizzle(text, chunks) {
    if (text.trim() === "") return {};
    if (!/^[\drc\s()+\-*/%&|^~<>]*$/.test(text)) return {error: "r, c, numbers, + - * / % & | ^ ~ << >> and parentheses"};
    try {
      const value = Function("r", "c", `"use strict"; return (${text});`), own = (row, chunk) => Math.floor(value(row, chunk));
      for (let row = 0; row < kRows; ++row) {
        const taken = new Map();
        for (let chunk = 0; chunk < chunks; ++chunk) {
          const place = own(row, chunk);
          if (!(place >= 0 && place < chunks)) return {error: `row ${row}: chunk ${chunk} gets place ${place}, and there are 0 to ${chunks - 1}`};
          if (taken.has(place)) return {error: `row ${row}: chunks ${taken.get(place)} and ${chunk} both get place ${place}`};
          taken.set(place, chunk);
        }
      }
      return {own};
    } catch {
      return {error: "this is no expression"};
    }
  }

  // What lanes of a warp do at once: {bytes of each, cells: [[row, chunk, byte of the chunk]]}; and who gets an element by it.
  const kPatterns = {
    matrix: ["ldmatrix: a chunk of 8 rows", (layout, row, chunk) => ({bytes: 16, cells: count(8, i => [row - row % 8 + i, chunk, 0])}), (layout, row, column) => {
      const {lane, half} = fragmentOf("ldmatrix", row % 8, column % kColumns);
      return `ldmatrix brings it to lane ${lane}, the ${["low", "high"][half]} half of a register`;
    }],
    rows: ["32 lanes store whole rows, 16 bytes each", (layout, row) => {
      const chunks = chunksOf(layout), first = row - row % (32 / chunks);
      return {bytes: 16, cells: count(32, i => [first + Math.floor(i / chunks), i % chunks, 0])};
    }, (layout, row, column) => {
      const chunks = chunksOf(layout);
      return `lane ${row % (32 / chunks) * chunks + Math.floor(column / kColumns)} stores it`;
    }],
    column: ["32 lanes load 4 bytes of a column, a row each",
             (layout, row, chunk, column) => ({bytes: 4, cells: count(32, i => [i, chunk, (column % kColumns >> 1) * 4])}),
             (layout, row, column) => `lane ${row} loads it, the ${["low", "high"][column % 2]} half of a register`],
  };
  function count(n, make) { return Array.from({length: n}, (_, i) => make(i)); }

  function access(layout, pattern, row, column) {
    const {bytes, cells} = kPatterns[pattern][1](layout, row, Math.floor(column / kColumns), column);
    return {bytes, cells, addresses: cells.map(([r, c, byte]) => addressOf(layout, r, c) + byte)};
  }

  // As count_wavefronts() of reference/gpu_model/counters.cpp counts stores; a test compares the two. Accesses of 16 bytes take
  // a quarter of the warp at a time; in each, the bank with most words decides.
  function passes({bytes, addresses}) {
    const words = bytes / kWord, lanes = 32 / words;
    let taken = 0, needed = 0;
    for (let first = 0; first < addresses.length; first += lanes) {
      const banks = count(kBanks, () => new Set());
      for (const address of addresses.slice(first, first + lanes)) {
        for (let i = 0; i < words; ++i) {
          const word = address / kWord + i;
          banks[word % kBanks].add(word);
        }
      }
      taken += Math.max(...banks.map(bank => bank.size));
      ++needed;
    }
    return {taken, needed};
  }

  // The walk of wgmma over a matrix of 16-bit elements with a 128-byte swizzle, in one step of 16 k, as in for_each_granule() of
  // reference/gpu_model/wgmma.cpp. Gives the byte of element (k, n) of B. If B is K-major, n counts rows; otherwise n runs along them.
  const swizzled = address => address ^ (address >> 3 & 112);
  function walkByte({operand, begin, lbo, sbo}, k, n) {
    const address = operand === "k" ? begin + Math.floor(n / 8) * sbo + n % 8 * 128 + Math.floor(k / 8) * kChunk
                                    : begin + Math.floor(n / 64) * lbo + Math.floor(k / 8) * sbo + k % 8 * 128 + Math.floor(n % 64 / 8) * kChunk;
    return swizzled(address) + (operand === "k" ? k : n) % 8 * 2;
  }
  const descriptorOf = ({begin, lbo, sbo}) => BigInt(begin >> 4) | BigInt(lbo >> 4) << 16n | BigInt(sbo >> 4) << 32n | 1n << 62n;

  // Who holds an element: {lane, register, half}; half: which 16 bits of the register, -1 for a register of fp32. Lanes of wgmma
  // are counted in the warpgroup. As tensor_core.cpp and wgmma.cpp of reference/gpu_model; a test compares them.
  const kFragments = {
    ldmatrix: ["ldmatrix.x4: rows in shared memory", 32, 8, (row, column) => ({lane: row % 8 * 4 + (column >> 1), register: row >> 3, half: column % 2})],
    ldmatrix_trans: ["ldmatrix.x4.trans", 32, 8, (row, column) => ({lane: column * 4 + (row % 8 >> 1), register: row >> 3, half: row % 2})],
    mma_a: ["mma m16n8k16: A [16 rows, k]", 16, 16, (row, k) => ({lane: row % 8 * 4 + (k % 8 >> 1), register: (row >> 3) + (k >> 3) * 2, half: k % 2})],
    mma_b: ["mma m16n8k16: B [k, 8 columns]", 16, 8, (k, column) => ({lane: column * 4 + (k % 8 >> 1), register: k >> 3, half: k % 2})],
    mma_d: ["mma m16n8k16: D [16 rows, 8 columns]", 16, 8, (row, column) => ({lane: row % 8 * 4 + (column >> 1), register: (row >> 3) * 2 + column % 2, half: -1})],
    wgmma_a: ["wgmma m64nNk16: A in registers [64 rows, k]", 64, 16, (row, k) => {
      const {lane, ...rest} = kFragments.mma_a[3](row % 16, k);
      return {lane: (row >> 4) * 32 + lane, ...rest};
    }],
    wgmma_d: ["wgmma m64nNk16: D [64 rows, 16 of N columns]", 64, 16, (row, column) => {
      const {lane, register} = kFragments.mma_d[3](row % 16, column % 8);
      return {lane: (row >> 4) * 32 + lane, register: (column >> 3) * 4 + register, half: -1};
    }],
  };
  const fragmentOf = (kind, row, column) => kFragments[kind][3](row, column);

  // How P[row][token] of a tile of 64 rows and 64 tokens gets from S's registers to A's. The steps are in words; `byte` is its place
  // in shared memory, if it goes there.
  function pathOf(how, row, token) {
    const a = fragmentOf("wgmma_a", row, token % 16), halves = ["low", "high"], of = lane => `warp ${lane >> 5}, lane ${lane % 32}`;
    const bank = byte => `byte ${byte}, bank ${(byte >> 2) % kBanks}`;
    if (how === "08") {
      const d = fragmentOf("wgmma_d", row, token), byte = (token >> 4) * 2048 + a.lane * 16 + a.register * 4 + a.half * 2;
      return {byte, steps: [
        `S: fp32 in ${of(d.lane)}, s[${token >> 3}][${d.register % 4}].`,
        `P: with its neighbour in one register of the same lane, the ${halves[a.half]} half of a${a.register} of step ${token >> 4}. Nothing moves between lanes.`,
        `To the other warpgroup: the lane stores its a0 … a3 of a step as 16 bytes, smem.p[${token >> 4}][${a.lane}]; this element: ${bank(byte)}.`,
        `${of(a.lane)} of the other warpgroup loads these 16 bytes: a${a.register} again, as wgmma takes A. Its own products take A from where P was made.`]};
    }
    if (how === "06") {
      const own = token % 32, d = fragmentOf("wgmma_d", row, own), matrix = (row % 16 >> 3) + (own >> 3) % 2 * 2;
      const byte = swizzled(row * 128 + (token >> 3) * kChunk) + token % 8 * 2;
      return {byte, steps: [
        `S: fp32 in warpgroup ${token >> 5}, which has 32 of the tokens: ${of(d.lane)}, s[${own >> 3}][${d.register % 4}].`,
        `P: with its neighbour in p[${own >> 3}][${row % 16 >> 3}], the ${halves[own % 2]} half.`,
        `stmatrix.x4: register ${matrix} is matrix ${matrix}, whose row ${row % 8} goes where lane ${matrix * 8 + row % 8} says: row ${row}, place ${token >> 3} ^ ${row} % 8 = ` +
          `${(token >> 3) ^ row % 8}; this element: ${bank(byte)}.`,
        `Step ${token >> 4} of P V, in both warpgroups: the descriptor of A, K-major, begins ${(token >> 4) * 32} bytes further on; A[${row}][${token % 16}] is there.`]};
    }
    const d = fragmentOf("mma_d", row % 16, token % 8), pitch = (64 + 8) * 2, byte = row * pitch + token * 2;
    return {byte, steps: [
      `S: fp32 in lane ${d.lane} of the warp that has row ${row} and token ${token}, register ${d.register} of a tile of 8 tokens.`,
      `P: the lane stores it with its neighbour, 4 bytes, to smem.p[${row}][${token}]. Rows are 64 + 8 tokens, ${pitch} bytes, apart: ${bank(byte)}.`,
      `ldmatrix.x4 of rows ${row - row % 16} to ${row - row % 16 + 15}, step ${token >> 4}: lane ${(token % 16 >> 3) * 16 + row % 16} gives the address of this row's 16 bytes.`,
      `A: every warp has it in lane ${a.lane % 32}, the ${halves[a.half]} half of a${a.register}.`]};
  }

  const kViews = {rows: "rows and bank conflicts", walk: "a descriptor's walk, wgmma", fragment: "fragments: who holds what", path: "P's path, from S to A"};
  const kChoices = {
    pitch: ["bytes from row to row", {64: "64", 128: "128", 144: "144: 128 and 16 of padding", 1152: "1152: a row of K"}],
    divide: ["chunk c of row r lies at c ^ (r /", {1: "1", 2: "2", 4: "4"}],
    modulo: ["%", {1: "1) — no swizzle", 2: "2)", 4: "4)", 8: "8)"}],
    pattern: ["access", Object.fromEntries(Object.entries(kPatterns).map(([key, [text]]) => [key, text]))],
    operand: ["operand", {k: "K-major: K, for S = Q Kᵀ", mn: "MN-major: V, for O = P V"}],
    kind: ["fragment", Object.fromEntries(Object.entries(kFragments).map(([key, [text]]) => [key, text]))],
    how: ["stage", {"05": "05: stored, padded, ldmatrix", "06": "06 and 07: stmatrix, swizzled", "08": "08: as registers"}],
  };
  const kNumbers = {begin: "begin", lbo: "leading dimension byte offset, LBO", sbo: "stride dimension byte offset, SBO"};
  // The state of each view. kEnds has, for each number, the least value that is too large.
  const kOf = {
    rows: {pitch: "128", divide: "1", modulo: "8", own: "", pattern: "matrix", row: "3", column: "16"},
    walk: {operand: "k", begin: "0", lbo: "0", sbo: "1024", byte: "0"},
    fragment: {kind: "mma_a", row: "3", column: "5"},
    path: {how: "08", row: "3", column: "21"},
  };
  const kEnds = {row: 64, column: 64, begin: 16384, lbo: 65536, sbo: 65536, byte: 16384};
  function read(hash) {
    const known = given(hash), view = known.view in kViews ? known.view : "rows";
    const state = {view, ...kOf[view]};
    if (view === "walk" && known.operand === "mn") state.lbo = "8192";
    for (const key in kOf[view]) {
      if (key in kChoices ? known[key] in kChoices[key][1] : key in kEnds ? /^\d+$/.test(known[key] ?? "") && Number(known[key]) < kEnds[key] : key in known) {
        state[key] = known[key];
      }
    }
    if (view === "walk") state.byte = known.byte && state.byte === known.byte ? known.byte : state.begin;
    if (view === "rows") state.row = String(state.row % kRows);
    return state;
  }
  // A row of 4 chunks has no chunk 4 to swizzle with, and no column 32.
  function layoutOf(state) {
    const layout = {pitch: Number(state.pitch), divide: Number(state.divide), modulo: Number(state.modulo)};
    layout.modulo = Math.min(layout.modulo, chunksOf(layout));
    return {...layout, ...ownSwizzle(state.own ?? "", chunksOf(layout))};
  }

  // A grid of cells: [[{text, hue, asked, chosen, pick}]], pick: what to set when it is chosen. Arrow keys choose, too.
  function gridOf(id, head, rows, change) {
    const made = element("table", {id: "layout", className: id});
    const choose = pick => {
      change(pick);
      document.querySelector("#layout .chosen")?.focus();
    };
    made.append(element("tr", {}, ...head.map(text => element("th", {}, text))));
    for (const [title, cells] of rows) {
      made.append(element("tr", {}, element("th", {}, title), ...cells.map(({text, hue, asked, chosen, pick}) => {
        const cell = element("td", {className: (asked ? "asked" : "") + (chosen ? " chosen" : ""), tabIndex: chosen ? 0 : -1, onclick: () => choose(pick)}, text);
        if (hue !== undefined) cell.style.setProperty("--hue", hue);
        return cell;
      })));
    }
    made.addEventListener("keydown", event => {
      const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key], cell = event.target.closest("td");
      const next = step && made.rows[cell.parentElement.rowIndex + step[0]]?.cells[cell.cellIndex + step[1]];
      if (next?.tagName !== "TD") return;
      event.preventDefault();
      next.click();
    });
    return element("div", {className: "table-wrapper"}, made);
  }
  const small = digit => "₀₁₂₃₄₅₆₇"[digit];
  const bankOf = byte => Math.floor(byte / kWord) % kBanks;

  const kDraw = {
    rows(state, change) {
      const layout = layoutOf(state), chunks = chunksOf(layout), row = Number(state.row), column = Number(state.column) % (chunks * kColumns);
      if (layout.error) return [element("p", {id: "passes", className: "wrong"}, `Your swizzle: ${layout.error}.`)];
      const chunk = Math.floor(column / kColumns), own = access(layout, state.pattern, row, column), {taken, needed} = passes(own);
      const asked = new Set(own.cells.map(([r, c]) => `${r},${c}`));
      const rows = count(kRows, r => {
        const cells = [];
        for (let c = 0; c < chunks; ++c) {
          const banks = addressOf(layout, r, c) / kChunk % 8;
          cells[placeOf(layout, r, c)] = {text: c + small(banks), hue: banks * 45, asked: asked.has(`${r},${c}`),
                                          chosen: r === row && c === chunk, pick: {row: r, column: c * kColumns + column % kColumns}};
        }
        return [String(r), cells];
      });
      const address = addressOf(layout, row, chunk) + column % kColumns * 2;
      return [
        element("p", {id: "where"}, `Row ${row}, column ${column}: chunk ${chunk}, at place ${placeOf(layout, row, chunk)} of its row; ` +
                `byte ${address}, bank ${bankOf(address)}; ${kPatterns[state.pattern][2](layout, row, column)}.`),
        element("p", {id: "passes", className: taken > needed ? "wrong" : ""},
                `The access takes ${taken} ${taken === 1 ? "pass" : "passes"}; ${needed} without bank conflicts.`),
        gridOf("rows", ["row", ...count(chunks, String)], rows, change)];
    },

    walk(state, change) {
      const walk = {operand: state.operand, begin: Number(state.begin), lbo: Number(state.lbo), sbo: Number(state.sbo)}, byte = Number(state.byte);
      const columns = walk.operand === "k" ? 64 : 128, tile = 16384;
      const taken = new Map();  // granule: the first (k, n) in it
      for (let k = 0; k < 16; ++k) {
        for (let n = 0; n < columns; ++n) {
          const granule = walkByte(walk, k, n) >> 4;
          if (!taken.has(granule)) taken.set(granule, [k, n]);
        }
      }
      const outside = [...taken.keys()].filter(granule => granule * kChunk >= tile).length;
      const rows = count(64, r => [String(r), count(16, p => {
        const at = (p >> 3) * 8192 + r * 128 + p % 8 * kChunk;
        return {text: String((p >> 3) * 8 + (p % 8 ^ r % 8)), hue: taken.has(at >> 4) ? at / kChunk % 8 * 45 : undefined, asked: taken.has(at >> 4),
                chosen: at >> 4 === byte >> 4, pick: {byte: at}};
      })]);
      const box = byte >> 13, row = byte % 8192 >> 7, chunk = (byte % 128 >> 4) ^ row % 8, first = box * 64 + chunk * 8, found = taken.get(byte >> 4);
      const role = !found ? "This step does not read it."
                 : walk.operand === "k" ? `This step reads it as B[k = ${found[0]} … ${found[0] + 7}][n = ${found[1]}].`
                                        : `This step reads it as B[k = ${found[0]}][n = ${found[1]} … ${found[1] + 7}].`;
      return [
        element("p", {id: "where"}, `Byte ${byte}: token ${row}, columns ${first} … ${first + 7}, box ${box}, place ${byte % 128 >> 4}; banks ${bankOf(byte)} … ${bankOf(byte) + 3}. ${role}`),
        element("p", {id: "descriptor"}, `Descriptor 0x${descriptorOf(walk).toString(16)}: bits 0–13 begin / 16 = ${walk.begin >> 4}, 16–29 LBO / 16 = ${walk.lbo >> 4}` +
                `${walk.operand === "k" ? " (not used)" : ""}, 32–45 SBO / 16 = ${walk.sbo >> 4}, 62–63 layout = 1, 128-byte swizzle.`),
        element("p", {id: "passes", className: outside ? "wrong" : ""}, `The step reads ${taken.size} granules of 16 bytes` +
                (outside ? `; ${outside} of them are outside of these two boxes.` : ".")),
        gridOf("walk", ["token", ...count(16, p => String(p % 8))], rows, change)];
    },

    fragment(state, change) {
      const [, height, width] = kFragments[state.kind], row = Number(state.row) % height, column = Number(state.column) % width;
      const own = fragmentOf(state.kind, row, column), group = state.kind.startsWith("wgmma");
      const lane = group ? `warp ${own.lane >> 5}, lane ${own.lane % 32}` : `lane ${own.lane}`;
      const register = own.half < 0 ? `d${own.register}, fp32` : `register ${own.register}, the ${["low", "high"][own.half]} half`;
      const gives = state.kind.startsWith("ldmatrix") ? ` The row's address comes from lane ${row}.` : "";
      const rows = count(height, r => [String(r), count(width, c => {
        const {lane: holder, register: its} = fragmentOf(state.kind, r, c);
        return {text: holder % 32 + small(its), hue: its % 8 * 45, asked: holder === own.lane, chosen: r === row && c === column, pick: {row: r, column: c}};
      })]);
      return [element("p", {id: "where"}, `Row ${row}, column ${column}: ${lane}, ${register}.${gives}`),
              element("p", {}, "A cell says which lane of its warp holds it, and small, in which register; so does the colour. Outlined is all that this lane has."),
              gridOf("fragment", ["row", ...count(width, String)], rows, change)];
    },

    path(state, change) {
      const row = Number(state.row), token = Number(state.column), {steps} = pathOf(state.how, row, token);
      const top = row - row % 16, left = token - token % 16, own = fragmentOf("wgmma_a", row, token % 16);
      const rows = count(16, r => [String(top + r), count(16, c => {
        const {lane, register} = fragmentOf("wgmma_a", top + r, c);
        return {text: lane % 32 + small(register), hue: register * 90, asked: lane === own.lane, chosen: r === row % 16 && c === token % 16, pick: {row: top + r, column: left + c}};
      })]);
      const go = (text, by) => element("button", {type: "button", onclick: () => change(by)}, text);
      return [element("p", {}, `P[${row}][${token}]: row ${row} of the tile, token ${token}.`),
              element("ol", {id: "steps"}, ...steps.map(text => element("li", {}, text))),
              element("p", {}, "Rows and tokens of one A: which lane has them, and small, in which register; so does the colour."),
              element("p", {}, go("16 tokens on", {column: (token + 16) % 64}), " ", go("16 rows on", {row: (row + 16) % 64})),
              gridOf("path", ["row", ...count(16, c => String(left + c))], rows, change)];
    },
  };

  function form(page) {
    const {state} = page;
    const choice = key => select(key, kChoices[key][0], Object.entries(kChoices[key][1]), state[key], value => page.set({[key]: value}));
    const typed = (key, label, size) => input(key, label, state[key], (value, field) => {
      const good = key === "own" || (/^\d+$/.test(value) && Number(value) < kEnds[key] && Number(value) % 16 === 0);
      const wrong = good ? "" : ` a multiple of 16 below ${kEnds[key]}`;
      field.setCustomValidity(wrong);
      field.parentElement.dataset.wrong = wrong;
      if (good) page.set({[key]: value});
    }, {size});
    const button = (id, text, changes) => element("button", {type: "button", id, onclick: () => page.setAll(changes())}, text);
    const parts = {
      rows: () => [choice("pitch"), element("p", {}, ...choice("divide").childNodes, " ", ...choice("modulo").childNodes), typed("own", "or your own, of r and c:", 16), choice("pattern")],
      walk: () => [select("operand", kChoices.operand[0], Object.entries(kChoices.operand[1]), state.operand,
                          operand => page.setAll({operand, begin: "0", byte: "0", lbo: operand === "mn" ? "8192" : "0", sbo: "1024"})),
                   ...Object.keys(kNumbers).map(key => typed(key, kNumbers[key], 6)),
                   element("p", {}, button("next", "next 16 of k", () => {
                     const begin = Number(state.begin);
                     const next = String(state.operand === "mn" ? (begin + 2048) % 8192 : begin % 128 < 96 ? begin + 32 : (begin - 96 + 8192) % 16384);
                     return {begin: next, byte: next};
                   }), " ", button("exchange", "exchange LBO and SBO", () => ({lbo: state.sbo, sbo: state.lbo})))],
      fragment: () => [choice("kind")],
      path: () => [choice("how")],
    };
    return [select("view", "what to see", Object.entries(kViews), state.view, view => { page.state = read(`#view=${view}`); page.setAll(); }), ...parts[state.view]()];
  }
  function draw(page) {
    const change = by => page.set(Object.fromEntries(Object.entries(by).map(([key, value]) => [key, String(value)])));
    page.output.replaceChildren(...kDraw[page.state.view](page.state, change));
  }

  demo.begin({read, form, draw});
  return {placeOf, addressOf, chunksOf, access, passes, layoutOf, ownSwizzle, walkByte, descriptorOf, fragmentOf, kFragments, pathOf, kChoices};
})();
