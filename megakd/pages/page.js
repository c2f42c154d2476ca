"use strict";
// Sorting tables by their heads. Without scripts the page has everything but this.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const first = head.classList.contains("num") ? "descending" : "ascending";
      const order = before === "none" ? first : before === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const compare = (one, other) => {
        const [a, b] = [one, other].map((row) => row.cells[column]);
        const [hasA, hasB] = [a, b].map((cell) => "value" in cell.dataset);
        if (!hasA || !hasB) return hasB - hasA; // what is not there comes last, in both orders
        const [x, y] = [a, b].map((cell) => Number(cell.dataset.value));
        const numbers = !Number.isNaN(x) && !Number.isNaN(y);
        return sign * (numbers ? x - y : a.dataset.value.localeCompare(b.dataset.value, undefined, { numeric: true }));
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
