// Every word must occur. Words side by side count more, and even more in a heading.
const field = document.getElementById("q"), results = document.getElementById("results");

function search(query) {
  const words = query.toLowerCase().match(/[^\s]+/g) || [], phrase = words.join(" ");
  const found = [];
  if (phrase.length < 2) return found;
  for (const [address, title, heading, text] of pages) {
    const head = (title + " " + heading).toLowerCase(), body = text.toLowerCase(), all = head + " " + body;
    if (!words.every(word => all.includes(word))) continue;
    let score = words.every(word => head.includes(word)) ? 8 : 0;
    score += heading.toLowerCase().includes(phrase) ? 16 : 0;
    const times = body.split(phrase).length - 1;  // often in a short text: that is its place
    score += all.includes(phrase) ? 8 + Math.min(800 * times / (body.length + 200), 6) : 0;
    score -= /^(api|source)\/|^CHANGELOG/.test(address) ? 8 : 0;
    found.push({address, title, heading, text, score});
  }
  return found.sort((a, b) => b.score - a.score);  // stable: chapters stay before sources
}

// The text around the first of the words, with all of them marked.
function excerpt(text, query) {
  const words = query.toLowerCase().match(/[^\s]+/g), lower = text.toLowerCase();
  let at = lower.indexOf(words.join(" "));
  if (at < 0) at = Math.max(0, Math.min(...words.map(word => lower.indexOf(word)).filter(i => i >= 0), text.length));
  const from = at < 80 ? 0 : text.indexOf(" ", at - 80) + 1, part = text.slice(from, at + 140);
  const line = document.createElement("p");
  if (from > 0) line.append("… ");
  const pattern = new RegExp("(" + words.map(word => word.replace(/[^\w]/g, "\\$&")).join("|") + ")", "gi");
  for (const [i, piece] of part.split(pattern).entries()) {
    if (i % 2) {
      const mark = document.createElement("mark");
      mark.textContent = piece;
      line.append(mark);
    } else {
      line.append(piece);
    }
  }
  return line;
}

function show() {
  const query = field.value.trim(), found = search(query);
  const count = document.createElement("p");
  count.textContent = query ? `${found.length} places${found.length > 50 ? "; the first 50" : ""}` : "";
  results.replaceChildren(count);
  for (const {address, title, heading, text} of found.slice(0, 50)) {
    const link = document.createElement("a");
    link.href = address;
    link.textContent = heading && heading !== title ? `${title}: ${heading}` : title;
    const item = document.createElement("div");
    item.append(link, excerpt(text, query));
    results.append(item);
  }
}

field.value = new URLSearchParams(location.search).get("q") || "";
field.addEventListener("input", show);
show();
