// Keeps the parts of a page that change up to date: by server-sent events, or by asking again.
const main = document.querySelector("main[data-live]");
const lost = document.getElementById("lost");
const said = document.getElementById("said");
const PAUSE_MS = 500; // at most twice a second
const AGAIN_MS = 2000;
const PATIENCE_MS = 1200; // before a broken connection is spoken of

const shown = new Map(); // id → the HTML that the server sent last
let waiting = false; // an update is planned
let running = false; // an update is under way
let missed = false; // something happened during it
let pressed = false; // what is under the pointer must not be replaced between press and click
let losing; // the timer of the banner

const parts = (root) => root.querySelectorAll("[data-part]");

function connected(yes) {
  if (yes) {
    clearTimeout(losing);
    losing = undefined;
    if (!lost.hidden) lost.hidden = true;
  } else {
    losing ??= setTimeout(() => { lost.hidden = false; }, PATIENCE_MS);
  }
}

function keep(old, fresh) {
  for (const details of old.querySelectorAll("details[id][open]")) {
    const same = fresh.querySelector(`#${CSS.escape(details.id)}`);
    if (same) same.open = true;
  }
  const boxes = [...old.querySelectorAll("[data-scroll][id]")].map((box) => [box.id, box.scrollTop]);
  const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
  return () => {
    for (const [id, top] of boxes) {
      const box = document.getElementById(id);
      if (box) box.scrollTop = top;
    }
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  };
}

function show(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html");
  let ended = false;
  for (const part of parts(fresh)) {
    const old = document.getElementById(part.id);
    const markup = part.outerHTML;
    ended ||= "ended" in part.dataset;
    if (part.dataset.say && said.textContent !== part.dataset.say) said.textContent = part.dataset.say;
    if (!old || shown.get(part.id) === markup) continue;
    shown.set(part.id, markup);
    const restore = keep(old, part);
    old.replaceWith(document.adoptNode(part));
    restore();
  }
  document.dispatchEvent(new CustomEvent("parts"));
  return ended;
}

async function update() {
  waiting = false;
  if (running || pressed) { missed = true; return; }
  running = true;
  missed = false;
  try {
    const answer = await fetch(main.dataset.live, { headers: { "X-Fragment": "1" } });
    if (answer.status === 401) { location.reload(); return; }
    if (!answer.ok) throw new Error(`${answer.status}`);
    const html = await answer.text();
    if (pressed) { missed = true; return; }
    if (show(html)) stop();
    connected(true);
  } catch {
    connected(false);
    setTimeout(plan, AGAIN_MS);
  } finally {
    running = false;
    if (missed && !pressed) plan();
  }
}

function plan() {
  if (waiting) return;
  waiting = true;
  setTimeout(update, PAUSE_MS);
}

let source;

function stop() {
  source?.close();
  source = undefined;
  delete main.dataset.events;
}

function listen() {
  if (!main.dataset.events) return;
  source?.close();
  source = new EventSource(main.dataset.events);
  source.addEventListener("open", () => { connected(true); plan(); });
  for (const kind of ["state", "trial", "progress"]) source.addEventListener(kind, plan);
  source.addEventListener("error", (event) => {
    if (event instanceof MessageEvent) { plan(); return; } // an event of the job's, of this name
    if (!main.dataset.events) return;
    if (source.readyState === EventSource.CLOSED) {
      plan(); // the job may have ended
      setTimeout(listen, AGAIN_MS);
    } else {
      connected(false);
    }
  });
}

function poll() {
  if (document.visibilityState === "visible") plan();
}

if (main) {
  for (const part of parts(document)) shown.set(part.id, part.outerHTML);
  addEventListener("pointerdown", () => { pressed = true; });
  for (const name of ["pointerup", "pointercancel"]) {
    addEventListener(name, () => setTimeout(() => { pressed = false; if (missed) plan(); }, 50));
  }
  document.addEventListener("visibilitychange", poll);
  listen();
  if (main.dataset.poll) setInterval(poll, Number(main.dataset.poll));
}
