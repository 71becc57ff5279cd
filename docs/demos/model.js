// The GPU model in a browser: docs/demos/model.md. A classic script, because a page from disk cannot load modules. The model, with
// stages 01 to 03 and the reference, is in model_wasm.js.
"use strict";

const modelDemo = (() => {
  const slugs = Object.keys(modelKernels);

  // Runs one decode: {text, wrong}. A model that found a fault is stopped in the middle of a kernel, so each run has a new one.
  async function run(state) {
    const model = await gpuModel();
    const began = performance.now();
    try {
      model._model_run(slugs.indexOf(state.stage), Number(state.heads), Number(state.tokens), Number(state.seed), state.races === "yes" ? 1 : 0,
                       Number(state.out));
    } catch (error) {
      return {text: typeof error === "number" ? model.UTF8ToString(model._model_what(error)) : `The model broke: ${error.message}`, wrong: true};
    }
    const text = model.UTF8ToString(model._model_result());
    return {text: `${text} ${((performance.now() - began) / 1000).toFixed(1)} s.`, wrong: !text.startsWith("Right")};
  }

  const kBounds = {heads: ["query heads", 1, 16], tokens: ["tokens", 0, 200], seed: ["seed of the schedule, 0: in order", 0, 1e6]};
  const kDefault = {stage: "03_online_softmax", out: "0", heads: "4", tokens: "70", seed: "1", races: "yes"};
  const toHash = state => "#" + new URLSearchParams(state);
  function fromHash(hash) {
    const given = Object.fromEntries(new URLSearchParams(hash.replace(/^#/, ""))), state = {...kDefault};
    if (slugs.includes(given.stage)) state.stage = given.stage;
    if (modelKernels[state.stage].barriers.some(([line]) => String(line) === given.out)) state.out = given.out;
    if (given.races === "no") state.races = "no";
    for (const key in kBounds) state[key] = given[key] ?? state[key];
    return state;
  }
  function wrongWith(state) {
    for (const [key, [label, least, most]] of Object.entries(kBounds)) {
      if (!/^\d+$/.test(state[key]) || Number(state[key]) < least || Number(state[key]) > most) return `${label}: ${least} to ${most}`;
    }
    return "";
  }

  function element(tag, attributes = {}, ...children) {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...children);
    return made;
  }

  function begin(root) {
    let state = fromHash(location.hash);
    const inputs = element("div"), result = element("p", {id: "result"});
    function show(text, wrong = false) {
      result.textContent = text;
      result.className = wrong ? "wrong" : "";
    }
    async function runNow(event) {
      const wrong = wrongWith(state);
      if (wrong) { show(wrong, true); return; }
      event.target.disabled = true;
      show("Running …");
      await new Promise(painted => setTimeout(painted, 50));  // otherwise the browser would not show the text before
      const {text, wrong: fault} = await run(state);
      show(text, fault);
      event.target.disabled = false;
    }

    function form() {
      const select = (key, label, options) => {
        const made = element("select", {id: `set-${key}`, onchange: event => {
          state[key] = event.target.value;
          if (key === "stage") state.out = "0";
          location.replace(toHash(state));
          form();
        }}, ...Object.entries(options).map(([value, text]) => element("option", {value}, text)));
        made.value = state[key];
        return element("p", {}, element("label", {htmlFor: `set-${key}`}, `${label} `), made);
      };
      const number = key => element("p", {}, element("label", {htmlFor: `set-${key}`}, `${kBounds[key][0]} `), element("input", {
        id: `set-${key}`, value: state[key], size: 6, autocomplete: "off", inputMode: "numeric", oninput: event => {
          state[key] = event.target.value.trim();
          location.replace(toHash(state));
        }}));
      const barriers = modelKernels[state.stage].barriers;
      inputs.replaceChildren(
        select("stage", "stage", Object.fromEntries(slugs.map(slug => [slug, slug]))),
        select("out", "barrier left out", {0: "none", ...Object.fromEntries(barriers.map(([line, why]) => [line, `line ${line}: ${why}`]))}),
        select("races", "race detector", {yes: "on", no: "off"}), number("heads"), number("tokens"), number("seed"),
        element("p", {}, element("button", {type: "button", id: "run", onclick: runNow}, "Run")));
      show("");
    }
    addEventListener("hashchange", () => {  // a link, or the back button
      if (location.hash !== toHash(state)) { state = fromHash(location.hash); form(); }
    });
    root.replaceChildren(inputs, result);
    form();
  }

  return {run, begin};
})();

modelDemo.begin(document.getElementById("demo"));
