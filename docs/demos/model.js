// The GPU model in a browser: docs/demos/model.md. A classic script, because a page from disk cannot load modules. The model, with
// stages 01 to 03 and the reference, is in model_wasm.js.
"use strict";

const modelDemo = (() => {
  const {element, select, input, given} = demo;
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
  function read(hash) {
    const known = given(hash), state = {...kDefault};
    if (slugs.includes(known.stage)) state.stage = known.stage;
    if (modelKernels[state.stage].barriers.some(([line]) => String(line) === known.out)) state.out = known.out;
    if (known.races === "no") state.races = "no";
    for (const key in kBounds) state[key] = known[key] ?? state[key];
    return state;
  }
  function wrongWith(state) {
    for (const [key, [label, least, most]] of Object.entries(kBounds)) {
      if (!/^\d+$/.test(state[key]) || Number(state[key]) < least || Number(state[key]) > most) return `${label}: ${least} to ${most}`;
    }
    return "";
  }

  const result = element("p", {id: "result", role: "status"});
  function show(text, wrong = false) {
    result.textContent = text;
    result.className = wrong ? "wrong" : "";
  }
  async function runNow(button, state) {
    const wrong = wrongWith(state);
    if (wrong) { show(wrong, true); return; }
    button.disabled = true;
    show("Running …");
    await new Promise(painted => setTimeout(painted, 50));  // or nobody would see this
    const {text, wrong: fault} = await run(state);
    show(text, fault);
    button.disabled = false;
    button.focus({preventScroll: true});
  }

  function form(page) {
    const {state} = page;
    const choice = (key, label, options) => select(`set-${key}`, label, options, state[key], value => page.setAll({[key]: value, ...(key === "stage" ? {out: "0"} : {})}));
    const number = key => input(`set-${key}`, kBounds[key][0], state[key], value => page.set({[key]: value}), demo.digits);
    return [choice("stage", "stage", slugs.map(slug => [slug, slug])),
            choice("out", "barrier left out", [["0", "none"], ...modelKernels[state.stage].barriers.map(([line, why]) => [line, `line ${line}: ${why}`])]),
            choice("races", "race detector", [["yes", "on"], ["no", "off"]]), ...["heads", "tokens", "seed"].map(number),
            element("p", {}, element("button", {type: "button", id: "run", onclick: event => runNow(event.target, page.state)}, "Run"))];
  }
  function draw({output}) {
    show("");
    output.replaceChildren(result);
  }

  demo.begin({read, form, draw});
  return {run};
})();
