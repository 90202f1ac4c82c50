// Lets "3 min ago" go with the time. What it changes is text that the server wrote the same way.
const UNITS = [[86400, "d"], [3600, "h"], [60, "min"]];

function distance(moment) {
  const seconds = (Date.now() - moment) / 1000;
  for (const [unit, name] of UNITS) {
    if (Math.abs(seconds) >= unit) {
      const whole = Math.floor(Math.abs(seconds) / unit);
      return seconds > 0 ? `${whole} ${name} ago` : `in ${whole} ${name}`;
    }
  }
  return "just now";
}

function tick() {
  for (const time of document.querySelectorAll("time[data-ago]")) {
    const text = distance(Date.parse(time.dateTime));
    if (time.textContent !== text) time.textContent = text;
  }
}

setInterval(tick, 10000);
