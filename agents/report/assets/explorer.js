"use strict";

/** The decision explorer: what a policy saw of each candidate, its scores, and how the request fared under each policy. */
(function () {
  const source = document.getElementById("decisions-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const root = document.getElementById("explorer");
  const [policies, decisions, view] = ["policy", "decision", "view"].map((name) => root.querySelector(`[data-explorer="${name}"]`));

  function make(tag, text, className) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  }

  function shown(value) {
    if (value === null) return "-";
    return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(4)));
  }

  function headings(table, first, names, chosen) {
    const row = table.createTHead().insertRow();
    const corner = make("th", first, "name");
    corner.scope = "col";
    row.append(corner);
    names.forEach((name, place) => {
      const cell = make("th", name, place === chosen ? "chosen" : "");
      cell.scope = "col";
      if (place === chosen) cell.append(make("span", "▸ chosen", "unit"));
      row.append(cell);
    });
  }

  function line(table, name, values, chosen, text) {
    const row = table.insertRow();
    const heading = make("th", name, "name");
    heading.scope = "row";
    row.append(heading);
    values.forEach((value, place) => {
      const cell = make("td", text ? text(value) : shown(value), place === chosen ? "chosen" : "");
      row.append(cell);
    });
    return row;
  }

  /** Bars of the scores: the longer, the better. */
  function bars(row, scores) {
    const known = scores.filter((score) => score !== null);
    const [least, most] = [Math.min(...known), Math.max(...known)];
    scores.forEach((score, place) => {
      if (score === null) return;
      const bar = make("span", undefined, "bar");
      const fill = make("i");
      fill.style.width = `${most > least ? (100 * (most - score)) / (most - least) : 100}%`;
      bar.append(fill);
      row.cells[place + 1].append(bar);
    });
  }

  function box(table, name) {
    const div = make("div", undefined, "scroll");
    div.tabIndex = 0;
    div.setAttribute("role", "region");
    div.setAttribute("aria-label", name);
    div.append(table);
    return div;
  }

  function candidates(one) {
    const table = make("table");
    headings(table, "", one.candidates, one.chosen);
    const body = table.createTBody();
    bars(line(body, "score, lowest wins; the longer the bar, the better", one.scores, one.chosen, (value) => (value === null ? "not allowed" : shown(value))), one.scores);
    one.seen.filter(([, values]) => values.some((value) => value !== null)).forEach(([name, values]) => line(body, name, values, one.chosen));
    return box(table, "Candidates");
  }

  function features(one) {
    const details = make("details");
    details.append(make("summary", `The same as a learned policy sees it: ${one.features.length} features`));
    const table = make("table");
    headings(table, "feature", one.candidates, one.chosen);
    const body = table.createTBody();
    one.features.forEach(([name, values]) => line(body, name, values, one.chosen));
    details.append(box(table, "Features"));
    return details;
  }

  function outcomes(one) {
    if (one.outcomes.length === 0) return [];
    const table = make("table");
    headings(table, "policy", ["engine", "TTFT, ms", "TPOT, ms", "E2E, s"], -1);
    const body = table.createTBody();
    one.outcomes.forEach((outcome) => {
      const row = line(body, outcome.policy, [outcome.engine, outcome.ttft_ms, outcome.tpot_ms, outcome.e2e_s], -1);
      if (outcome.policy === policies.value) row.className = "chosen";
    });
    return [make("h3", `How request ${one.request} fared under each policy`), box(table, "Outcomes")];
  }

  function show() {
    const one = data.policies[policies.value][Number(decisions.value)];
    if (!one) {
      view.replaceChildren(make("p", "No decision was sampled: never did two requests wait.", "absent"));
      return;
    }
    const what = one.request >= 0 ? `Request ${one.request}` : "Queue";
    view.replaceChildren(make("p", `${what} at ${one.time_s} s: ${one.facts}.`), candidates(one), features(one), ...outcomes(one));
  }

  function fill() {
    const before = decisions.value;
    const options = data.policies[policies.value].map((one, number) => {
      const name = one.request >= 0 ? `${one.time_s} s, request ${one.request} → ${one.candidates[one.chosen] || "none"}` : `${one.time_s} s`;
      return new Option(name, String(number));
    });
    decisions.replaceChildren(...options);
    decisions.value = before !== "" && options[Number(before)] ? before : "0";
    show();
  }

  Object.keys(data.policies).forEach((name) => policies.append(new Option(name, name)));
  policies.addEventListener("change", fill);
  decisions.addEventListener("change", show);
  root.querySelectorAll("[data-step]").forEach((button) =>
    button.addEventListener("click", () => {
      const count = decisions.options.length;
      decisions.selectedIndex = (decisions.selectedIndex + Number(button.dataset.step) + count) % count;
      show();
    })
  );
  fill();
})();
