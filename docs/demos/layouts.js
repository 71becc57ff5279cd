// Rows of 16-byte chunks in shared memory: docs/demos/layouts.md. A classic script, because a page from disk cannot load modules.
"use strict";

const layoutsDemo = (() => {
  const kBanks = 32, kWord = 4, kChunk = 16, kRows = 32, kColumns = 8;  // values of 16 bits per chunk

  // `pitch`: bytes from row to row; chunk c of row r lies where chunk c ^ (r / divide % modulo) would.
  const chunksOf = ({pitch}) => pitch === 64 ? 4 : 8;
  const placeOf = ({divide, modulo}, row, chunk) => chunk ^ Math.floor(row / divide) % modulo;
  const addressOf = (layout, row, chunk) => row * layout.pitch + placeOf(layout, row, chunk) * kChunk;

  // What lanes of a warp do at once: {bytes of each, cells: [[row, chunk, byte of the chunk]]}.
  const kPatterns = {
    matrix: ["ldmatrix: a chunk of 8 rows", (layout, row, chunk) => ({bytes: 16, cells: count(8, i => [row - row % 8 + i, chunk, 0])})],
    rows: ["32 lanes store whole rows, 16 bytes each", (layout, row) => {
      const chunks = chunksOf(layout), first = row - row % (32 / chunks);
      return {bytes: 16, cells: count(32, i => [first + Math.floor(i / chunks), i % chunks, 0])};
    }],
    column: ["32 lanes load 4 bytes of a column, a row each",
             (layout, row, chunk, column) => ({bytes: 4, cells: count(32, i => [i, chunk, (column % kColumns >> 1) * 4])})],
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

  const kChoices = {
    pitch: ["bytes from row to row", {64: "64", 128: "128", 144: "144: 128 and 16 of padding", 1152: "1152: a row of K"}],
    divide: ["chunk c of row r lies at c ^ (r /", {1: "1", 2: "2", 4: "4"}],
    modulo: ["%", {1: "1) — no swizzle", 2: "2)", 4: "4)", 8: "8)"}],
    pattern: ["access", Object.fromEntries(Object.entries(kPatterns).map(([key, [text]]) => [key, text]))],
  };
  const kDefault = {pitch: "128", divide: "1", modulo: "8", pattern: "matrix", row: "3", column: "16"};
  const toHash = state => "#" + new URLSearchParams(state);
  function fromHash(hash) {
    const given = Object.fromEntries(new URLSearchParams(hash.replace(/^#/, ""))), state = {...kDefault};
    for (const key in kChoices) if (given[key] in kChoices[key][1]) state[key] = given[key];
    for (const [key, end] of [["row", kRows], ["column", 64]]) {
      if (/^\d+$/.test(given[key] ?? "") && Number(given[key]) < end) state[key] = given[key];
    }
    return state;
  }
  // A row of 4 chunks has no chunk 4 to swizzle with, and no column 32.
  function layoutOf(state) {
    const layout = {pitch: Number(state.pitch), divide: Number(state.divide), modulo: Number(state.modulo)};
    layout.modulo = Math.min(layout.modulo, chunksOf(layout));
    return layout;
  }

  function element(tag, attributes = {}, ...children) {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...children);
    return made;
  }

  function begin(root) {
    let state = fromHash(location.hash);
    const output = element("div"), inputs = element("div");
    const changed = () => {
      draw();
      location.replace(toHash(state));
    };

    function draw() {
      const layout = layoutOf(state), chunks = chunksOf(layout), row = Number(state.row), column = Number(state.column) % (chunks * kColumns);
      const chunk = Math.floor(column / kColumns), own = access(layout, state.pattern, row, column), {taken, needed} = passes(own);
      const asked = new Set(own.cells.map(([r, c]) => `${r},${c}`));
      const grid = element("table", {id: "layout"});
      grid.append(element("tr", {}, element("th", {}, "row"), ...count(chunks, p => element("th", {}, String(p)))));
      for (let r = 0; r < kRows; ++r) {
        const line = element("tr", {}, element("th", {}, String(r)));
        for (let p = 0; p < chunks; ++p) {
          const c = placeOf(layout, r, p);  // the swizzle is its own inverse
          const cell = element("td", {className: (asked.has(`${r},${c}`) ? "asked" : "") + (r === row && c === chunk ? " chosen" : ""),
                                      onclick: () => { state.row = String(r); state.column = String(c * kColumns + column % kColumns); changed(); }},
                               String(c));
          cell.style.setProperty("--hue", addressOf(layout, r, c) / kChunk % 8 * 45);
          line.append(cell);
        }
        grid.append(line);
      }
      const address = addressOf(layout, row, chunk) + column % kColumns * 2;
      output.replaceChildren(
        element("p", {id: "where"}, `Row ${row}, column ${column}: chunk ${chunk}, at place ${placeOf(layout, row, chunk)} of its row; ` +
                `byte ${address}, bank ${Math.floor(address / kWord) % kBanks}.`),
        element("p", {id: "passes", className: taken > needed ? "wrong" : ""},
                `The access takes ${taken} ${taken === 1 ? "pass" : "passes"}; ${needed} without bank conflicts.`),
        element("div", {className: "table-wrapper"}, grid));
    }

    function form() {
      const select = ([key, [label, options]]) => {
        const made = element("select", {id: key, onchange: event => { state[key] = event.target.value; changed(); }},
                             ...Object.entries(options).map(([value, text]) => element("option", {value}, text)));
        made.value = state[key];
        return [element("label", {htmlFor: key}, ` ${label} `), made];
      };
      const parts = Object.fromEntries(Object.entries(kChoices).map(entry => [entry[0], select(entry)]));
      inputs.replaceChildren(element("p", {}, ...parts.pitch), element("p", {}, ...parts.divide, ...parts.modulo), element("p", {}, ...parts.pattern));
      draw();
    }
    addEventListener("hashchange", () => {  // a link, or back
      if (location.hash !== toHash(state)) { state = fromHash(location.hash); form(); }
    });
    root.replaceChildren(inputs, output);
    form();
  }

  return {placeOf, addressOf, chunksOf, access, passes, layoutOf, kChoices, begin};
})();

layoutsDemo.begin(document.getElementById("demo"));
