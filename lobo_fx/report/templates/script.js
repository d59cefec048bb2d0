"use strict";
const value = (row, column) => {
  const cell = row.cells[column], figure = cell.querySelector("data");
  if (figure) return { inf: Infinity, "-inf": -Infinity, nan: NaN }[figure.value] ?? Number(figure.value);
  return cell.querySelector(".missing") || !cell.textContent.trim() ? NaN : cell.textContent.trim();
};
const order = (a, b) => {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
};
const sort = (button) => {
  const heading = button.closest("th"), body = heading.closest("table").tBodies[0];
  const next = heading.ariaSort === "ascending" ? "descending" : "ascending", sign = next === "ascending" ? 1 : -1;
  for (const other of heading.parentElement.cells) other.ariaSort = other === heading ? next : "none";
  const rows = [...body.rows].map((row) => [value(row, heading.cellIndex), row]);
  const known = rows.filter(([key]) => !Number.isNaN(key)).sort((a, b) => sign * order(a[0], b[0]));
  body.append(...[...known, ...rows.filter(([key]) => Number.isNaN(key))].map(([, row]) => row));
};
const filter = (input) => {
  const grid = input.closest(".grid"), rows = [...grid.querySelector("tbody").rows], wanted = input.value.toLowerCase();
  for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  const shown = rows.filter((row) => !row.hidden).length;
  grid.querySelector("[role=status]").textContent = wanted ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
};
const tip = (point) => {
  const plot = point.closest(".plot"), box = plot.querySelector(".tip"), around = plot.getBoundingClientRect();
  const dot = point.querySelector(".dot").getBoundingClientRect();
  box.textContent = point.getAttribute("aria-label");
  box.hidden = false;
  const left = dot.left - around.left + dot.width / 2 - box.offsetWidth / 2;
  box.style.left = `${Math.max(0, Math.min(left, around.width - box.offsetWidth))}px`;
  const above = dot.top - around.top - box.offsetHeight - 8;
  box.style.top = `${above < 0 ? dot.bottom - around.top + 8 : above}px`;
};
for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => sort(button));
for (const input of document.querySelectorAll(".filter input")) input.addEventListener("input", () => filter(input));
for (const point of document.querySelectorAll(".point")) {
  const hide = () => { point.closest(".plot").querySelector(".tip").hidden = true; };
  for (const event of ["pointerenter", "focus"]) point.addEventListener(event, () => tip(point));
  for (const event of ["pointerleave", "blur"]) point.addEventListener(event, hide);
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") for (const box of document.querySelectorAll(".tip")) box.hidden = true;
});
const folds = [...document.querySelectorAll("#network details")];
for (const button of document.querySelectorAll("[data-fold]")) {
  button.parentElement.hidden = false;
  button.addEventListener("click", () => folds.forEach((fold, at) => { fold.open = at === 0 || Boolean(button.dataset.fold); }));
}
let unprinted = [];
addEventListener("beforeprint", () => {
  unprinted = folds.filter((fold) => !fold.open);
  for (const fold of unprinted) fold.open = true;
});
addEventListener("afterprint", () => { for (const fold of unprinted) fold.open = false; });
