// What the pages that move share: elements, labelled controls, and a state that is the page's address. A classic script, because a
// page from disk cannot load modules; docs/site/conf.py loads it first.
"use strict";

const demo = (() => {
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

  // A cell is what is in it, or a <td> or <th> of its own.
  function table(attributes, head, rows) {
    const row = (cells, tag) => element("tr", {}, ...cells.map(cell => cell instanceof HTMLTableCellElement ? cell : element(tag, {}, cell)));
    return element("div", {className: "table-wrapper"}, element("table", attributes, element("thead", {}, row(head, "th")),
                                                                element("tbody", {}, ...rows.map(cells => row(cells, "td")))));
  }

  // Controls: a label and what it is for. options: [[value, text]].
  function select(id, label, options, value, set) {
    const made = element("select", {id, onchange: event => set(event.target.value)},
                         ...options.map(([own, text]) => element("option", {value: own}, text)));
    made.value = value;
    return element("p", {}, element("label", {htmlFor: id}, label), " ", made);
  }
  function input(id, label, value, set, attributes = {}) {
    return element("p", {}, element("label", {htmlFor: id}, label), " ",
                   element("input", {id, value, size: 7, autocomplete: "off", oninput: event => set(event.target.value.trim(), event.target), ...attributes}));
  }
  const digits = {inputMode: "numeric"};

  // Of `items` in `container` one can be chosen, by a click or by arrow keys: tell(item).
  function choosable(container, items, tell) {
    let at = -1;
    function choose(to) {
      if (!items[to]) return;
      items[at]?.classList.remove("chosen");
      items[at = to].classList.add("chosen");
      tell(items[at]);
    }
    container.setAttribute("tabindex", 0);
    container.addEventListener("click", event => choose(items.indexOf(event.target)));
    container.addEventListener("keydown", event => {
      const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (!step) return;
      event.preventDefault();
      choose(at + step);
    });
  }

  // What the address says: {name: text}.
  const given = hash => Object.fromEntries(new URLSearchParams(hash.replace(/^#/, "")));
  const addressOf = state => "#" + new URLSearchParams(state);

  // Controls, and below them what follows. read(hash): the state; write(state): the hash; form(page): the controls; draw(page): fills
  // page.output. page.set(changes) draws anew and changes the address; page.setAll(changes) makes the controls anew, too.
  function begin({read, write = addressOf, form, draw}) {
    const inputs = element("div", {className: "inputs"}), output = element("div");
    const page = {output, state: read(location.hash), set: changes => change(changes, draw), setAll: changes => change(changes, show)};
    function show() {
      const focus = document.activeElement?.id;  // a control that is made anew keeps it
      inputs.replaceChildren(...form(page));
      if (focus) document.getElementById(focus)?.focus({preventScroll: true});
      return draw(page);
    }
    function change(changes, then) {
      Object.assign(page.state, changes);
      location.replace(write(page.state));
      return then(page);
    }
    addEventListener("hashchange", () => {  // a link, or back
      if (location.hash !== write(page.state)) { page.state = read(location.hash); show(); }
    });
    document.getElementById("demo").replaceChildren(inputs, output);
    return show();
  }

  // What the text proposes to try becomes a link to that state, and shows it.
  for (const link of document.querySelectorAll("a[data-state]")) {
    link.href = "#" + link.dataset.state;
    link.addEventListener("click", () => document.getElementById("demo").scrollIntoView());
  }

  return {element, svg, table, select, input, digits, choosable, given, addressOf, begin};
})();
