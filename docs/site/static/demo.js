// Pages that move: what the text proposes to try becomes a link to that state.
for (const link of document.querySelectorAll("a[data-state]")) link.href = "#" + link.dataset.state;
