// "/" goes to the filter; Escape closes an open "really?".
document.addEventListener("keydown", (event) => {
  const typing = event.target instanceof Element && event.target.closest("input, select, textarea");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    const filter = document.getElementById("filter");
    if (filter) { event.preventDefault(); filter.focus(); filter.select(); }
  }
  if (event.key === "Escape") {
    for (const open of document.querySelectorAll("details.sure[open]")) {
      open.open = false;
      open.querySelector("summary").focus();
    }
  }
});
document.addEventListener("click", (event) => {
  for (const open of document.querySelectorAll("details.sure[open]")) {
    if (!open.contains(event.target)) open.open = false;
  }
});
