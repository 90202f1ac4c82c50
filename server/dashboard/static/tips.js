// Shows what a row of a bit map tells in its title, at once, and for the keyboard, too.
const tip = document.createElement("div");
tip.id = "tip";
tip.setAttribute("role", "tooltip");
tip.hidden = true;
document.body.append(tip);
let owner;

function place(x, y) {
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, x + 14), innerWidth - width - 8);
  const below = y + 18;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below + height < innerHeight - 8 ? below : Math.max(8, y - height - 12)}px`;
}

function show(row, x, y) {
  if (row.title) {
    row.dataset.tip = row.title;
    row.removeAttribute("title");
  }
  owner = row;
  tip.textContent = row.dataset.tip ?? "";
  tip.hidden = !tip.textContent;
  row.setAttribute("aria-describedby", "tip");
  place(x, y);
}

function hide() {
  owner?.removeAttribute("aria-describedby");
  owner = undefined;
  tip.hidden = true;
}

const rowOf = (target) => target instanceof Element ? target.closest("[data-rows] tbody tr") : null;

document.addEventListener("pointermove", (event) => {
  const row = rowOf(event.target);
  if (row) show(row, event.clientX, event.clientY);
  else if (owner && owner !== document.activeElement) hide();
});
function showAt(row) {
  const box = row.getBoundingClientRect();
  show(row, box.left + Math.min(box.width / 3, 240), box.bottom - 10);
}

document.addEventListener("focusin", (event) => {
  const row = rowOf(event.target);
  if (row) showAt(row); else hide();
});
document.addEventListener("focusout", hide);
// To focus a row may scroll to it: then what it tells goes along.
document.addEventListener("scroll", () => {
  if (!owner) return;
  if (owner === document.activeElement) showAt(owner); else hide();
}, true);
document.addEventListener("parts", () => { if (owner && !owner.isConnected) hide(); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

// One row of a bit map can be reached by Tab; the arrows lead to the others.
document.addEventListener("keydown", (event) => {
  const row = rowOf(event.target);
  if (!row || row !== document.activeElement) return;
  const rows = [...row.parentElement.rows];
  const at = rows.indexOf(row);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
  if (to === undefined || !rows[to]) return;
  event.preventDefault();
  row.tabIndex = -1;
  rows[to].tabIndex = 0;
  rows[to].scrollIntoView({ block: "nearest" });
  rows[to].focus({ preventScroll: true });
});
