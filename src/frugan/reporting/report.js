"use strict";

const narrow = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 });

// The slider: one picture of samples is shown at a time.

function slide(frames) {
  const pictures = [...frames.querySelectorAll("img")];
  const controls = frames.querySelector(".slider");
  if (!controls || pictures.length < 2) return;
  const [button, range] = controls.children;
  const told = frames.querySelector("output");
  let timer = 0;
  const show = () => {
    pictures.forEach((picture, i) => { picture.hidden = i !== Number(range.value); });
    told.textContent = pictures[range.value].alt.replace(/^.* (?=after )/, "");
    range.setAttribute("aria-valuetext", told.textContent);
  };
  const stop = () => { clearInterval(timer); timer = 0; button.textContent = "Play"; };
  const next = () => {
    range.value = Number(range.value) + 1;
    show();
    if (Number(range.value) === pictures.length - 1) stop();
  };
  range.max = pictures.length - 1;
  range.value = range.max;
  range.addEventListener("input", () => { stop(); show(); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (range.value === range.max) { range.value = 0; show(); }
    button.textContent = "Stop";
    timer = setInterval(next, 400);
  });
  document.addEventListener("keydown", event => {  // the arrows work wherever nothing else wants them
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.target !== document.body) return;
    range.value = Number(range.value) + step;
    stop();
    show();
  });
  controls.hidden = false;
  frames.classList.add("ready");
  show();
}

// Numbers in words.

function words(value, chart) {
  if (value === null) return "not finite";
  if (chart.bytes) return bytes(value);
  if (value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-3)) return value.toExponential(2);
  if (chart.digits === null) return String(Number(value.toPrecision(4)));
  return value.toLocaleString("en", { minimumFractionDigits: chart.digits, maximumFractionDigits: chart.digits });
}

function bytes(value) {
  return value < 2 ** 30 ? `${(value / 2 ** 20).toFixed(0)} MiB` : `${(value / 2 ** 30).toFixed(2)} GiB`;
}

function place(images, epoch) {
  return `${images.toLocaleString("en")} images${epoch ? `, epoch ${(images / epoch).toFixed(1)}` : ""}`;
}

// About `count` round numbers from `low` to `high`.
function rounds(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find(factor => factor * power >= rough * 0.999) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function decades(low, high) {
  const found = [];
  for (let power = Math.floor(low); power <= high; power += 1) {
    for (const factor of high - low > 2 ? [1] : [1, 2, 5]) {
      const value = Number((factor * 10 ** power).toPrecision(6));
      if (Math.log10(value) >= low && Math.log10(value) <= high) found.push(value);
    }
  }
  return found.length > 1 ? found : rounds(10 ** low, 10 ** high, 3).filter(value => value > 0);
}

// A chart: its legend tells the values where the pointer or the arrow keys are, else the last ones.

class Chart {
  constructor(chart, epoch) {
    this.chart = chart;
    this.epoch = epoch;
    this.log = false;
    this.height = 200;
    this.xs = [...new Set(chart.series.flatMap(series => series.points.map(point => point[0])))].sort((a, b) => a - b);
    this.at = this.xs.length - 1;
    this.figure = make("figure", "chart");
    const head = make("div", "head", this.figure);
    make("h3", "", head).textContent = chart.title;
    if (chart.title.startsWith("Loss") && this.values().every(value => value > 0) && this.values().length) this.offerLog(head);
    make("p", "note", this.figure).textContent = chart.note;
    this.legend = make("ul", "legend", this.figure);
    chart.series.forEach(series => {
      const item = make("li", "", this.legend);
      item.append(swatch(series.colour), chart.series.length > 1 ? `${series.name} ` : "", make("b"));
    });
    Object.entries(chart.lines || {}).forEach(([name, value]) => {
      const item = make("li", "", this.legend);
      item.append(make("i", `line ${name}`), `${name} ${words(value, chart)}`);
    });
    this.where = make("p", "where", this.figure);
    this.plot = make("div", "plot", this.figure);
    this.listen();
  }

  values() {
    return this.chart.series.flatMap(series => series.points.map(point => point[1])).filter(value => value !== null);
  }

  offerLog(head) {
    const label = make("label", "", head);
    const box = make("input", "", label);
    box.type = "checkbox";
    label.append(" log scale");
    box.addEventListener("change", () => { this.log = box.checked; this.draw(); });
  }

  listen() {
    const { plot } = this;
    Object.entries({
      role: "slider", tabindex: 0, "aria-label": `${this.chart.title}: images seen`, "aria-valuemin": 0, "aria-valuemax": this.xs.length - 1,
    }).forEach(([name, value]) => plot.setAttribute(name, value));
    plot.addEventListener("pointermove", event => {
      const images = this.left(event.clientX - plot.getBoundingClientRect().left);
      this.move(this.xs.reduce((best, x, i) => (Math.abs(x - images) < Math.abs(this.xs[best] - images) ? i : best), 0));
    });
    plot.addEventListener("pointerleave", () => this.move(this.xs.length - 1));
    plot.addEventListener("blur", () => this.move(this.xs.length - 1));
    plot.addEventListener("keydown", event => {
      const far = Math.ceil(this.xs.length / 10);
      const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: far, PageDown: -far, Home: -this.xs.length, End: this.xs.length };
      if (!(event.key in steps)) return;
      event.preventDefault();
      this.move(Math.min(this.xs.length - 1, Math.max(0, this.at + steps[event.key])));
    });
  }

  move(at) {
    this.at = at;
    this.tell();
    this.mark();
  }

  get idle() {
    return this.at === this.xs.length - 1;
  }

  // The point of a series that is nearest to the cursor, its last one where there is none; nothing beyond its end.
  near(series) {
    const x = this.xs[this.at];
    const last = series.points.at(-1);
    if (this.idle) return last;
    if (x > last[0] + this.xs.at(-1) / 50) return null;
    return series.points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
  }

  tell() {
    const told = this.chart.series.map((series, i) => {
      const point = this.near(series);
      const value = point ? words(point[1], this.chart) : "ended";
      this.legend.children[i].querySelector("b").textContent = value;
      return `${series.name} ${value}`;
    });
    const [only, ...others] = this.chart.series;
    const best = others.length || only.best === null ? null : only.points[only.best];
    const bestTold = best ? `; best ${words(best[1], this.chart)} at ${narrow.format(best[0])}` : "";
    const here = place(this.xs[this.at], this.epoch);
    const ends = new Set(this.chart.series.map(series => series.points.at(-1)[0]));
    this.where.textContent = (this.idle && ends.size > 1 ? "At the end of each" : `At ${here}`) + bestTold;
    this.plot.setAttribute("aria-valuenow", this.at);
    this.plot.setAttribute("aria-valuetext", `${here}: ${told.join(", ")}`);
  }

  // Finds the scales for the width there is, and draws.
  draw() {
    const { chart } = this;
    const lines = Object.values(chart.lines || {});
    const values = [...this.values(), ...lines];
    if (!values.length) {
      this.plot.textContent = "No finite value.";
      return;
    }
    const bend = this.log ? Math.log10 : value => value;
    let low = Math.min(...values.map(bend));
    let high = Math.max(...values.map(bend));
    if (chart.bytes || chart.title === "Speed") low = 0;
    const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    low -= low === 0 ? 0 : room;
    high += room;
    const unit = chart.bytes ? (high >= 2 ** 30 ? 2 ** 30 : 2 ** 20) : 1;
    const ticks = this.log ? decades(low, high) : rounds(low / unit, high / unit, 4).map(tick => tick * unit);
    const labels = ticks.map(tick => (chart.bytes ? `${Number((tick / unit).toPrecision(6))} ${unit === 2 ** 30 ? "GiB" : "MiB"}` : narrowed(tick)));
    const width = Math.max(this.plot.clientWidth, 120);
    const begin = 10 + 6.5 * Math.max(...labels.map(label => label.length));
    const end = width - 14;
    const [top, bottom] = [8, this.height - 24];
    const last = this.xs.at(-1) || 1;
    this.right = images => begin + (images / last) * (end - begin);
    this.left = pixels => ((pixels - begin) / (end - begin)) * last;
    this.down = value => bottom - ((bend(value) - low) / (high - low)) * (bottom - top);

    const parts = ticks.map((tick, i) =>
      `<line class="grid" x1="${begin}" x2="${end}" y1="${this.down(tick)}" y2="${this.down(tick)}"/>` +
      `<text x="${begin - 6}" y="${this.down(tick) + 4}" text-anchor="end">${labels[i]}</text>`);
    parts.push(...rounds(0, last, Math.max(2, width / 130)).map(tick =>
      `<text x="${this.right(tick)}" y="${this.height - 6}" text-anchor="middle">${narrow.format(tick)}</text>`));
    parts.push(...Object.entries(chart.lines || {}).map(([name, value]) =>
      `<line class="line ${name}" x1="${begin}" x2="${end}" y1="${this.down(value)}" y2="${this.down(value)}"/>`));
    parts.push(...chart.series.map(series => this.curve(series)));
    this.plot.innerHTML = `<svg width="${width}" height="${this.height}" aria-hidden="true">${parts.join("")}<g class="cursor"></g></svg>`;
    this.tell();
    this.mark();
  }

  curve(series) {
    const style = `style="--c:var(--c${series.colour % 8})"`;
    const dots = [];
    let path = "";
    let before = null;
    series.points.forEach(([x, y], i) => {
      if (y !== null) {
        const spot = `${this.right(x).toFixed(1)} ${this.down(y).toFixed(1)}`;
        const after = series.points[i + 1];
        path += `${before === null ? "M" : "L"}${spot}`;
        const alone = before === null && (!after || after[1] === null);
        if (alone || series.points.length <= 30) dots.push(this.dot(x, y, 2.5));
      }
      before = y;
    });
    if (series.best !== null) dots.push(this.dot(...series.points[series.best], 5.5, "best"));
    const dashed = series.colour >= 8 ? ' stroke-dasharray="5 3"' : "";
    return `<g ${style}><path d="${path}"${dashed}/>${dots.join("")}</g>`;
  }

  dot(x, y, radius, name = "") {
    return `<circle class="${name}" cx="${this.right(x).toFixed(1)}" cy="${this.down(y).toFixed(1)}" r="${radius}"/>`;
  }

  mark() {
    const cursor = this.plot.querySelector(".cursor");
    if (!cursor) return;
    if (this.idle) {
      cursor.innerHTML = "";
      return;
    }
    const x = this.right(this.xs[this.at]).toFixed(1);
    const dots = this.chart.series.map(series => {
      const [images, value] = this.near(series) || [0, null];
      return value === null ? "" : `<g style="--c:var(--c${series.colour % 8})">${this.dot(images, value, 3.5)}</g>`;
    });
    cursor.innerHTML = `<line x1="${x}" x2="${x}" y1="8" y2="${this.height - 24}"/>${dots.join("")}`;
  }
}

function narrowed(value) {
  return value !== 0 && Math.abs(value) < 1e-2 ? Number(value.toPrecision(3)).toExponential() : narrow.format(value);
}

function make(tag, name = "", parent = null) {
  const element = document.createElement(tag);
  element.className = name;
  parent?.append(element);
  return element;
}

function swatch(colour) {
  const mark = make("i");
  mark.style.background = `var(--c${colour % 8})`;
  return mark;
}

document.querySelectorAll(".frames").forEach(slide);
document.querySelectorAll(".charts").forEach(holder => {
  const { charts, epoch } = JSON.parse(holder.firstElementChild.textContent);
  const drawn = charts.map(chart => new Chart(chart, epoch));
  const draw = () => drawn.forEach(chart => chart.draw());
  holder.append(...drawn.map(chart => chart.figure));
  if (!charts.length) holder.append("Nothing is reported yet.");
  new ResizeObserver(draw).observe(holder);
  draw();
});
