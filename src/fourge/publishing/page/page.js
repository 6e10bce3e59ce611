// Three things that the page does beyond being read: the theme, the heat map's answers, the search through the flips.
// Texts from files are only ever set as text, never as HTML.
"use strict";

// The browser may refuse a page from a file its storage; then the choice holds until the page is closed.
function remembered(key) {
  try { return localStorage.getItem(key); } catch (error) { return null; }
}

function remember(key, value) {
  try { localStorage.setItem(key, value); } catch (error) { return; }
}

function startTheme() {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  const before = remembered("fourge-theme");
  if (before === "light" || before === "dark") root.dataset.theme = before;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remember("fourge-theme", root.dataset.theme);
    label();
  });
  system.addEventListener("change", label);
  button.hidden = false;
  label();
}

function startHeatMap() {
  const heat = document.getElementById("heat");
  if (!heat) return;
  const facts = JSON.parse(document.getElementById("cells").textContent);
  const panel = document.getElementById("cell");
  const rows = [...heat.querySelectorAll('[role="row"]')].map((row) => [...row.querySelectorAll(".cell")]);

  function show(cell) {
    for (const other of heat.querySelectorAll('[aria-selected="true"]')) other.removeAttribute("aria-selected");
    cell.setAttribute("aria-selected", "true");
    const [layer, linear] = cell.dataset.cell.split(/\/(.*)/s);
    const heading = document.createElement("h3");
    heading.textContent = `Layer ${layer}, ${linear}`;
    const list = document.createElement("dl");
    for (const [name, value] of facts[cell.dataset.cell]) {
      const pair = document.createElement("div");
      const term = document.createElement("dt");
      const description = document.createElement("dd");
      term.textContent = name;
      description.textContent = value;
      pair.append(term, description);
      list.append(pair);
    }
    panel.replaceChildren(heading, list);
  }

  function move(cell) {
    for (const other of heat.querySelectorAll('[tabindex="0"]')) other.setAttribute("tabindex", "-1");
    cell.setAttribute("tabindex", "0");
    cell.focus();
  }

  function neighbour(cell, key) {
    const row = rows.findIndex((cells) => cells.includes(cell));
    const column = rows[row].indexOf(cell);
    const places = {
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      Home: [row, 0], End: [row, rows[row].length - 1],
    };
    const place = places[key];
    return place && rows[place[0]] && rows[place[0]][place[1]];
  }

  heat.addEventListener("click", (event) => {
    const cell = event.target.closest(".cell");
    if (cell) { move(cell); show(cell); }
  });
  heat.addEventListener("keydown", (event) => {
    const cell = event.target.closest(".cell");
    if (!cell) return;
    const next = neighbour(cell, event.key);
    if (next) move(next);
    else if (event.key === "Enter" || event.key === " ") show(cell);
    else return;
    event.preventDefault();
  });
}

function startFlips() {
  const list = document.getElementById("flip-list");
  if (!list) return;
  const search = document.getElementById("flip-search");
  const task = document.getElementById("flip-task");
  const side = document.getElementById("flip-side");
  const count = document.getElementById("flip-count");
  const flips = [...list.children].map((element) => ({ element, text: element.textContent.toLowerCase() }));

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { element, text } of flips) {
      const fits = (!task.value || element.dataset.task === task.value)
        && (!side.value || element.dataset.side === side.value)
        && words.every((word) => text.includes(word));
      element.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown.toLocaleString("en")} shown`;
  }

  for (const control of [search, task, side]) control.addEventListener("input", filter);
  search.closest(".controls").hidden = false;
}

startTheme();
startHeatMap();
startFlips();
