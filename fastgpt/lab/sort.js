// Sorting: what is missing comes last, either way.
const words = new Intl.Collator("en", { numeric: true });
function key(row, column, numeric) {
  const cell = row.cells[column];
  if (!cell || cell.colSpan > 1) return null;
  if (numeric) return cell.dataset.v === undefined ? null : Number(cell.dataset.v);
  const text = cell.textContent.trim();
  return text === "–" ? null : text;
}
function sort(th) {
  const table = th.closest("table"), body = table.tBodies[0];
  const numeric = th.classList.contains("n"), column = th.cellIndex;
  const order = th.ariaSort === "ascending" ? "descending" : "ascending";
  for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const rows = [...body.rows].map((row) => [key(row, column, numeric), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (numeric ? a - b : words.compare(a, b));
  });
  body.append(...rows.map(([, row]) => row));
}
for (const th of all("table.sortable thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...th.childNodes);
  button.addEventListener("click", () => sort(th));
  th.append(button);
}
