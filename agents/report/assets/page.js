"use strict";

const dark = window.matchMedia("(prefers-color-scheme: dark)");
const narrow = window.matchMedia("(max-width: 40rem)");
const palette = JSON.parse(document.getElementById("palette").textContent);

/** A figure in the colours of the reader's theme. */
function themed(figure) {
  const text = JSON.stringify(figure);
  return JSON.parse(dark.matches ? text.replace(/#[0-9a-f]{6}/g, (color) => palette[color] || color) : text);
}

/** Leave out ticks whose labels would touch on a narrow screen; 0 % stays. */
function spread(axis) {
  const place = (value) => (axis.type === "log" ? Math.log10(value) : value);
  const places = axis.tickvals.map(place);
  const gap = axis.range ? 0.18 * Math.abs(axis.range[1] - axis.range[0]) : 0;
  const zero = axis.ticktext.indexOf("0 %");
  const kept = zero < 0 ? [] : [zero];
  places.forEach((one, number) => {
    if (kept.every((other) => number !== other && Math.abs(places[other] - one) >= gap)) kept.push(number);
  });
  kept.sort((a, b) => a - b);
  axis.tickvals = kept.map((number) => axis.tickvals[number]);
  axis.ticktext = kept.map((number) => axis.ticktext[number]);
  axis.tickangle = 0;
}

function draw(plot) {
  const key = plot.dataset.plot;
  const chosen = [...document.querySelectorAll(`select[data-picture="${key}"]`)].map((select) => select.value);
  const versions = JSON.parse(document.querySelector(`script[data-versions="${key}"]`).textContent);
  const [, found] = versions.find(([names]) => names.every((name, place) => name === chosen[place])) || versions[0];
  const figure = themed(found);
  if (narrow.matches) {
    figure.layout.font.size = 11;
    // A finger scrolls the page, and does not zoom into the picture.
    figure.layout.dragmode = false;
    if (figure.layout.xaxis.ticktext) spread(figure.layout.xaxis);
  }
  Plotly.react(plot, figure.data, figure.layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: narrow.matches || document.body.classList.contains("only") ? false : "hover",
    modeBarButtonsToRemove: ["lasso2d", "select2d"],
  });
}

function drawAll() {
  document.querySelectorAll(".plot").forEach(draw);
}

function sortBy(button) {
  const heading = button.closest("th");
  const table = button.closest("table");
  const column = Number(button.dataset.sort);
  const up = heading.getAttribute("aria-sort") !== "ascending";
  table.querySelectorAll("th").forEach((one) => one.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = (row) => row.children[column].dataset.value;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    const order = column === 0 ? x.localeCompare(y) : Number(x) - Number(y);
    return up ? order : -order;
  });
  table.tBodies[0].append(...rows);
}

/** `#only=leaderboard,differences` in the address shows these sections alone. */
function showOnly() {
  const wanted = /^#only=(.+)$/.exec(location.hash);
  document.body.classList.toggle("only", Boolean(wanted));
  if (!wanted) return;
  const keep = wanted[1].split(",");
  document.querySelectorAll("section").forEach((one) => one.classList.toggle("kept", keep.includes(one.id)));
}

document.querySelectorAll("[data-sort]").forEach((button) => button.addEventListener("click", () => sortBy(button)));
document.querySelectorAll("select[data-picture]").forEach((select) =>
  select.addEventListener("change", () => draw(document.querySelector(`.plot[data-plot="${select.dataset.picture}"]`)))
);
document.querySelectorAll("select[data-table]").forEach((select) =>
  select.addEventListener("change", () =>
    select.closest("section").querySelectorAll("[data-version]").forEach((one) => {
      one.hidden = one.dataset.version !== select.value;
    })
  )
);
window.addEventListener("hashchange", showOnly);
showOnly();
drawAll();
dark.addEventListener("change", drawAll);
narrow.addEventListener("change", drawAll);
