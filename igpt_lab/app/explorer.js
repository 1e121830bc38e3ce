// Draws the explorer. Everything a step of the slider needs is here already: see explorer.py for what each array is.

const COLOURS = {
  light: ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#767676", "#b8a800"],
  dark: ["#4aa3df", "#f0b429", "#2cc295", "#e29ac4", "#9ad7ff", "#f0783c", "#a8a8a8", "#f0e442"],
};
const SHAPES = ["circle", "square", "triangle", "diamond"];
const WIDTH = 520, HEIGHT = 262, LEFT = 40, RIGHT = 14, TOP = 22, BOTTOM = 34; // of the curve
const GLIDE = 60; // ms in which points go to their places in another layer
const SHOWN = 24; // images of a group, until more are asked for
const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "line", "path", "circle", "text", "title"].includes(tag);
  const it = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) it.setAttribute(name, value);
  // JupyterLab would take the arrow keys for the notebook's; it looks for this on what has the focus.
  if (["button", "input", "select"].includes(tag) || "tabindex" in attributes) it.setAttribute("data-lm-suppress-shortcuts", "true");
  it.append(...children);
  return it;
}

const percent = (value) => `${(100 * value).toFixed(1)}%`;
const count = (value) => value.toLocaleString("en");

function mix(a, b, share) {
  return `rgb(${a.map((value, i) => Math.round(value + share * (b[i] - value))).join()})`;
}

function rgb(colour) {
  const context = make("canvas").getContext("2d", { willReadFrequently: true });
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
}

function sharp(canvas, height) {
  const scale = Math.min(window.devicePixelRatio || 1, 2), width = canvas.clientWidth;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return [context, width, height];
}

function trace(context, shape, x, y, r) {
  context.beginPath();
  if (shape === "circle") context.arc(x, y, r, 0, 7);
  if (shape === "square") context.rect(x - 0.88 * r, y - 0.88 * r, 1.76 * r, 1.76 * r);
  const corners = { triangle: [[0, -1.15], [1.05, 0.8], [-1.05, 0.8]], diamond: [[0, -1.25], [1.1, 0], [0, 1.25], [-1.1, 0]] };
  (corners[shape] || []).forEach(([a, b], i) => context[i ? "lineTo" : "moveTo"](x + a * r, y + b * r));
  context.closePath();
}

// What the kernel sent, as arrays.
function read(model) {
  const array = (name, kind) => {
    const view = model.get(name);
    return new kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  };
  const facts = model.get("facts");
  return {
    ...facts, places: array("places", Float32Array), near: array("near", Int32Array), labels: array("labels", Uint16Array),
    pixelNear: array("pixel_near", Int32Array), predicted: array("predicted", Uint16Array), rows: array("rows", Int32Array),
    pictures: array("pictures", Uint8Array), k: facts.near[0], pixelK: facts.near[1],
  };
}

function skeleton(root) {
  const choice = (name, text) => make("label", { class: "choice" }, text, make("select", { "data-choice": name }));
  const card = (name, title, ...rest) =>
    make("section", { class: `card ${name}`, "aria-label": title }, make("h4", {}, title), make("p", { class: "soft said" }), ...rest);
  const slider = (name, text, help) => [
    make("label", { for: `${root.id}-${name}` }, text),
    make("input", { type: "range", id: `${root.id}-${name}`, class: name === "layer" ? "first" : "second", "data-slider": name, min: 0, step: 1, title: help }),
    make("output", { for: `${root.id}-${name}`, "data-of": name }),
  ];
  const map = make("canvas", { class: "plot map", tabindex: 0, role: "application" });
  const grid = make("canvas", { class: "plot cells", tabindex: 0, role: "application" });
  root.append(
    make("div", { class: "top" },
      make("div", {}, make("h3"), make("p", { class: "soft of" })),
      make("div", { class: "choices" },
        choice("point", "point"), choice("split", "images"), choice("count", "labels a class"),
        make("button", { type: "button", class: "plain main save", title: "png, pdf, svg, csv and json of what is in view" }, "Save this view"))),
    make("p", { class: "status", role: "status", "aria-live": "polite" }),
    make("div", { class: "depth" },
      ...slider("layer", "layer", "Arrow keys walk through depth"),
      ...slider("other", "compared with", "The layer whose predictions are compared with the first one's")),
    make("div", { class: "grid" },
      make("div", { class: "column" },
        card("accuracy", "Accuracy over depth", make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" })),
        card("features", "Features on a plane", map, make("div", { class: "legend", role: "group", "aria-label": "classes: press one to see it alone" }),
          make("div", { class: "tip", hidden: "" }))),
      make("div", { class: "column" },
        card("confusion", "What is taken for what", grid, make("div", { class: "tip", hidden: "" })),
        card("image", "One image", make("div", { class: "picked" }, make("canvas"), make("div", { class: "words" })),
        make("h4", {}, "What each layer says"), make("div", { class: "says", role: "group", "aria-label": "what each layer says of this image" }),
        make("h4", { class: "like" }), make("div", { class: "strip in-layer" }),
        make("h4", { class: "alike" }), make("div", { class: "strip in-pixels" }))),
      card("changes wide", "Predictions that change", make("div", { class: "groups" }))),
    make("p", { class: "note" }));
}

let made = 0;

function render({ model, el }) {
  const root = make("div", { class: "igx", id: `igx-${made++}`, role: "region", "aria-label": "explorer" });
  skeleton(root);
  el.append(root);
  const find = (selector) => root.querySelector(selector);
  const map = find(".map"), cells = find(".cells"), svg = find("svg"), status = find(".status");
  let d = null, at = 0, other = 0, image = 0; // what was sent; positions of both layers, and of the image
  let ink, paper, soft, right, wrong, palette, sprites = [], order = [], reach = [];
  let shown = null, from = null, begun = 0, frame = 0; // where points are, were, since when they move
  let only = null, cell = null, waiting = false, more = new Set(), layout = null, marks = [];

  const said = (layer, i) => d.predicted[layer * d.n + i];
  const good = (i, layer = at) => said(layer, i) === d.labels[i];
  const name = (label) => d.classes[label];
  const kept = (i) => !only || (only.label === d.labels[i] && (only.said === undefined || only.said === said(at, i)));
  const look = (label) => [palette[label % 8], SHAPES[(label + (label >> 3)) % 4]];
  const told = (i) => `row ${d.rows[i]}: ${name(d.labels[i])}, layer ${d.layers[at]} says ${name(said(at, i))}`;

  function set(key, value) {
    model.set(key, value);
    model.save_changes();
  }

  function colours() {
    const style = getComputedStyle(root), of = (key) => style.getPropertyValue(key).trim();
    const ground = rgb(of("--card"));
    const dark = ground[0] + ground[1] + ground[2] < 384;
    root.classList.toggle("dark", dark);
    const fresh = getComputedStyle(root);
    [ink, paper, soft, right, wrong] = ["--ink", "--card", "--soft", "--right", "--wrong"].map((key) => rgb(fresh.getPropertyValue(key).trim()));
    palette = COLOURS[dark ? "dark" : "light"];
    if (d) sprites = d.classes.map((_, label) => sprite(label));
  }

  function sprite(label) {
    const scale = Math.min(window.devicePixelRatio || 1, 2), r = d.n > 1500 ? 2.8 : 4;
    const half = 1.4 * r + 1, canvas = make("canvas", { width: Math.ceil(2 * half * scale), height: Math.ceil(2 * half * scale) });
    const context = canvas.getContext("2d"), [colour, shape] = look(label);
    context.scale(scale, scale);
    trace(context, shape, half, half, r);
    context.fillStyle = colour;
    context.globalAlpha = 0.85;
    context.fill();
    return { canvas, half };
  }

  // New data: everything that does not depend on the layer.
  function fill() {
    if (!model.get("facts").layers) return;
    d = read(model);
    only = cell = null;
    more = new Set();
    order = Array.from({ length: d.n }, (_, i) => i);
    for (let i = d.n - 1, seed = 7; i > 0; i--) { // the same mixed order each time, so that no class covers another
      seed = (seed * 48271) % 2147483647;
      const j = seed % (i + 1);
      [order[i], order[j]] = [order[j], order[i]];
    }
    reach = [0, 1].map((axis) => { // from, to along x and y, the same for all layers
      const sorted = d.places.filter((_, i) => i % 2 === axis).sort(), last = sorted.length - 1;
      return [sorted[Math.floor(0.002 * last)], sorted[Math.ceil(0.998 * last)]];
    });
    shown = null;
    colours();
    find("h3").textContent = d.title;
    find(".of").textContent = `${d.of}, probes fitted on ${count(d.n_train)} · ${d.told}`;
    find(".note").textContent = d.note + (d.no_pictures ? ` No pictures: ${d.no_pictures}.` : "");
    for (const [key, offered] of Object.entries(d.choices)) {
      const select = find(`[data-choice=${key}]`);
      select.replaceChildren(...offered.map((value) => make("option", { value }, key === "count" ? String(value || "all") : value === "held out" ? "held out (validation)" : value)));
      select.value = d.at[key];
    }
    for (const key of ["layer", "other"]) find(`[data-slider=${key}]`).max = d.layers.length - 1;
    fillCurve();
    fillLegend();
    find(".says").replaceChildren(...d.layers.map((layer, l) => make("button", { type: "button", "data-layer": l })));
    wait(false);
    draw();
  }

  function fillCurve() {
    const n = d.layers.length;
    const values = d.curve.flatMap((row) => [row.low, row.high]);
    let low = Math.min(...values), high = Math.max(...values);
    const step = [0.01, 0.02, 0.05, 0.1, 0.2].find((size) => (high - low) / size <= 6) || 0.5;
    [low, high] = [Math.max(0, Math.floor(low / step) * step), Math.min(1, Math.ceil(high / step) * step)];
    if (high <= low) high = low + step;
    const x = (l) => LEFT + 8 + ((WIDTH - LEFT - RIGHT - 16) * l) / Math.max(n - 1, 1);
    const y = (value) => TOP + ((HEIGHT - TOP - BOTTOM) * (high - value)) / (high - low);
    layout = { x, y };
    const parts = [];
    for (let value = low; value <= high + 1e-9; value += step) {
      parts.push(make("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
      parts.push(make("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, `${Math.round(100 * value)}%`));
    }
    const every = Math.ceil(n / 18), base = HEIGHT - BOTTOM;
    d.layers.forEach((layer, l) => l % every || parts.push(make("text", { x: x(l), y: base + 16, "text-anchor": "middle" }, String(layer))));
    parts.push(make("text", { x: (WIDTH + LEFT) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, "layer"));
    const path = (key) => d.curve.map((row, l) => `${x(l)},${y(row[key])}`);
    parts.push(make("path", { class: "band", d: `M${path("low").join("L")}L${path("high").reverse().join("L")}Z` }));
    parts.push(make("path", { class: "curve", d: `M${path("accuracy").join("L")}` }));
    const wide = n > 1 ? Math.min((x(1) - x(0)) / 2 - 1, 13) : 6;
    for (const layer of d.peak) {
      const l = d.layers.indexOf(layer);
      parts.push(make("line", { class: "peak", x1: x(l) - wide, x2: x(l) + wide, y1: base, y2: base }, make("title", {}, "may be the best layer")));
    }
    marks = [make("line", { class: "there", y1: TOP, y2: base }), make("line", { class: "here", y1: TOP, y2: base })];
    parts.push(...marks);
    d.curve.forEach((row, l) => parts.push(make("circle", { class: row.converged ? "dot" : "dot unsure", cx: x(l), cy: y(row.accuracy), r: 3.5 })));
    const c = d.layers.indexOf(d.chosen);
    parts.push(make("circle", { class: "ring", cx: x(c), cy: y(d.curve[c].accuracy), r: 8 }, make("title", {}, "chosen on validation")));
    marks.push(make("text", { class: "said", y: TOP - 8 }));
    svg.replaceChildren(...parts, marks[2]);
  }

  function fillLegend() {
    const icon = (label) => {
      const canvas = make("canvas", { width: 24, height: 24, style: "width:12px;height:12px" }), context = canvas.getContext("2d");
      const [colour, shape] = look(label);
      trace(context, shape, 12, 12, 9);
      context.fillStyle = colour;
      context.fill();
      return canvas;
    };
    find(".legend").replaceChildren(...d.classes.map((text, label) => make("button", { type: "button", "data-label": label, "aria-pressed": "false" }, icon(label), text)));
  }

  // All that a step changes.
  function draw() {
    if (!d) return;
    at = Math.max(0, d.layers.indexOf(model.get("layer")));
    other = Math.max(0, d.layers.indexOf(model.get("other")));
    image = Math.min(Math.max(model.get("image"), 0), d.n - 1);
    drawSliders();
    drawCurve();
    drawCells();
    drawImage();
    drawChanges();
    glide();
  }

  function drawSliders() {
    for (const [key, l] of [["layer", at], ["other", other]]) {
      const slider = find(`[data-slider=${key}]`), text = `${d.layers[l]} of ${d.layers[0]}..${d.layers[d.layers.length - 1]}`;
      slider.value = l;
      slider.setAttribute("aria-valuetext", `layer ${text}, accuracy ${percent(d.curve[l].accuracy)}`);
      const out = find(`[data-of=${key}]`);
      out.replaceChildren(make("b", {}, String(d.layers[l])), ` of ${d.layers[0]}..${d.layers[d.layers.length - 1]} · ${percent(d.curve[l].accuracy)} `);
      if (key === "layer" && d.layers[l] !== d.chosen)
        out.append(make("button", { type: "button", class: "link", "data-go": d.chosen }, `to the chosen, ${d.chosen}`));
      else if (key === "layer") out.append(make("span", { class: "soft" }, "chosen"));
    }
  }

  function drawCurve() {
    const row = d.curve[at], x = layout.x(at), [there, here, text] = marks;
    for (const [mark, l] of [[there, other], [here, at]]) for (const side of ["x1", "x2"]) mark.setAttribute(side, layout.x(l));
    text.setAttribute("x", x);
    text.setAttribute("text-anchor", at < d.layers.length / 4 ? "start" : at > (3 * d.layers.length) / 4 ? "end" : "middle");
    text.textContent = `layer ${d.layers[at]}: ${percent(row.accuracy)} [${percent(row.low)}, ${percent(row.high)}]`;
    find(".accuracy .said").textContent = `Ring: layer ${d.chosen}, chosen on validation.` +
      (d.peak.length ? " Bar on the axis: layers that may be the best (95%)." : "") +
      (d.curve.some((each) => !each.converged) ? " Hollow: not converged." : "");
    svg.setAttribute("aria-label", "accuracy over depth: " + d.curve.map((each, l) => `layer ${d.layers[l]} ${percent(each.accuracy)}`).join(", "));
  }

  function tally() {
    const k = d.classes.length, counts = new Uint32Array(k * k), totals = new Uint32Array(k);
    for (let i = 0; i < d.n; i++) {
      counts[d.labels[i] * k + said(at, i)]++;
      totals[d.labels[i]]++;
    }
    return { k, counts, totals };
  }

  function drawCells() {
    const { k, counts, totals } = tally(), named = k <= 32;
    let wrongs = 0, worst = [0, 0, 0];
    for (let r = 0; r < k; r++) for (let c = 0; c < k; c++) if (r !== c) {
      wrongs += counts[r * k + c];
      if (counts[r * k + c] > worst[0]) worst = [counts[r * k + c], r, c];
    }
    find(".confusion .said").textContent = worst[0]
      ? `${count(wrongs)} of ${count(d.n)} wrong; most often ${name(worst[1])} taken for ${name(worst[2])} (${count(worst[0])}).`
      : "Nothing is wrong.";
    if (!cells.clientWidth) return;
    const context = cells.getContext("2d");
    context.font = "11px system-ui, sans-serif";
    const longest = named ? Math.min(Math.max(...d.classes.map((text) => context.measureText(text).width)), 84) : 0;
    const size = Math.max(3, Math.min((cells.clientWidth - longest - 26) / k, 34)), foot = Math.min(longest, 84) + 24;
    const [g] = sharp(cells, 4 + size * k + foot), x0 = longest + 24, y0 = 4;
    cells.layout = { x0, y0, size, k, counts, totals };
    g.font = "11px system-ui, sans-serif";
    const short = (text) => {
      while (text.length > 2 && g.measureText(text).width > longest + 1) text = text.slice(0, -2) + "…";
      return text;
    };
    const grey = mix(soft, soft, 0), blank = size > 5 ? 1 : 0;
    for (let r = 0; r < k; r++) for (let c = 0; c < k; c++) {
      const value = counts[r * k + c], share = totals[r] ? value / totals[r] : 0, depth = Math.sqrt(share);
      g.fillStyle = value ? mix(paper, r === c ? right : wrong, 0.06 + 0.94 * depth) : mix(paper, soft, 0.06);
      g.fillRect(x0 + c * size, y0 + r * size, size - blank, size - blank);
      if (size >= 19 && value) {
        g.fillStyle = depth > 0.6 ? mix(paper, paper, 0) : mix(ink, ink, 0);
        g.textAlign = "center";
        g.fillText(value, x0 + (c + 0.5) * size - blank / 2, y0 + (r + 0.5) * size + 4);
      }
    }
    g.fillStyle = grey;
    for (let r = 0; named && r < k; r++) {
      g.textAlign = "right";
      g.fillText(short(name(r)), x0 - 5, y0 + (r + 0.5) * size + 4);
      g.save();
      g.translate(x0 + (r + 0.5) * size + 4, y0 + k * size + 5);
      g.rotate(-Math.PI / 2);
      g.fillText(short(name(r)), 0, 0);
      g.restore();
    }
    g.textAlign = "center";
    g.fillText("what the probe says", x0 + (size * k) / 2, y0 + k * size + foot - 4);
    g.save();
    g.translate(11, Math.max(y0 + (size * k) / 2, g.measureText("what the image shows").width / 2 + 4)); // whole, of few classes too
    g.rotate(-Math.PI / 2);
    g.fillText("what the image shows", 0, 0);
    g.restore();
    if (cell) {
      g.strokeStyle = mix(ink, ink, 0);
      g.lineWidth = 2;
      g.strokeRect(x0 + cell[1] * size, y0 + cell[0] * size, size - blank, size - blank);
    }
    cells.setAttribute("aria-label", `confusion matrix, ${find(".confusion .said").textContent} Arrow keys walk through its cells, Enter shows a cell's images on the plane, Escape all.`);
  }

  function glide() {
    const target = d.places.subarray(at * d.n * 2, (at + 1) * d.n * 2);
    cancelAnimationFrame(frame);
    delete root.dataset.settled;
    const still = !shown || window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    from = still ? target : shown.slice();
    shown = shown || new Float32Array(target);
    begun = performance.now();
    const move = (now) => {
      const part = still ? 1 : Math.min(1, Math.max(0, (now - begun) / GLIDE)), ease = part * (2 - part);
      for (let i = 0; i < target.length; i++) shown[i] = from[i] + (target[i] - from[i]) * ease;
      drawMap();
      if (part < 1) frame = requestAnimationFrame(move);
      else root.dataset.settled = d.layers[at];
    };
    frame = requestAnimationFrame(move);
  }

  function place(i) {
    const { width, height, scale } = map.layout;
    const fit = (value, size) => Math.min(Math.max(value, 7), size - 7);
    const [x, y] = reach.map(([low, high], axis) => (shown[2 * i + axis] - (low + high) / 2) * scale);
    return [fit(width / 2 + x, width), fit(height / 2 - y, height)];
  }

  function drawMap() {
    if (!map.clientWidth || !shown) return;
    const [g, width, height] = sharp(map, Math.min(0.8 * map.clientWidth, 420));
    const [wide, tall] = reach.map(([low, high]) => high - low || 1);
    map.layout = { width, height, scale: Math.min((width - 24) / wide, (height - 24) / tall) };
    for (const strong of only ? [false, true] : [true]) {
      g.globalAlpha = strong ? 1 : 0.09;
      for (const i of order) {
        if (only && kept(i) !== strong) continue;
        const [x, y] = place(i), { canvas, half } = sprites[d.labels[i]];
        g.drawImage(canvas, x - half, y - half, 2 * half, 2 * half);
      }
    }
    g.globalAlpha = 1;
    g.strokeStyle = mix(ink, ink, 0);
    g.lineWidth = 1;
    for (let j = 0; j < d.k; j++) {
      const [x, y] = place(d.near[(at * d.n + image) * d.k + j]);
      g.beginPath();
      g.arc(x, y, 5.5, 0, 7);
      g.stroke();
    }
    const [x, y] = place(image);
    for (const [colour, wide] of [[paper, 5], [ink, 2.2]]) {
      g.strokeStyle = mix(colour, colour, 0);
      g.lineWidth = wide;
      g.beginPath();
      g.arc(x, y, 9, 0, 7);
      g.stroke();
    }
  }

  function paint(canvas, i) {
    if (!d.shape.length) return;
    const [h, w, c] = d.shape, context = canvas.getContext("2d");
    if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
    const data = context.createImageData(w, h), start = i * h * w * c;
    for (let p = 0; p < h * w; p++) {
      for (let channel = 0; channel < 3; channel++) data.data[4 * p + channel] = d.pictures[start + p * c + (c === 3 ? channel : 0)];
      data.data[4 * p + 3] = 255;
    }
    context.putImageData(data, 0, 0);
  }

  function strip(place, images, isRight, words) {
    while (place.children.length > images.length) place.lastChild.remove();
    images.forEach((i, j) => {
      let it = place.children[j];
      if (!it) place.append((it = make("button", { type: "button", class: "thumb" }, d.shape.length ? make("canvas") : "")));
      it.dataset.image = i;
      it.className = "thumb" + (isRight(i) ? " right" : "") + (i === image ? " chosen" : "") + (d.shape.length ? "" : " bare");
      it.title = words(i);
      it.setAttribute("aria-label", words(i));
      if (d.shape.length) {
        if (!it.firstElementChild) it.replaceChildren(make("canvas"));
        paint(it.firstElementChild, i);
      } else it.textContent = name(d.labels[i]);
    });
  }

  function drawImage() {
    const label = d.labels[image], same = (i) => d.labels[i] === label;
    const near = [...d.near.subarray((at * d.n + image) * d.k, (at * d.n + image + 1) * d.k)];
    const alike = [...d.pixelNear.subarray(image * d.pixelK, (image + 1) * d.pixelK)];
    const words = (i) => `${same(i) ? "same class" : "another class"}, ${told(i)}`;
    find(".image .said").textContent = "Click a point or a picture. Solid frame: same class as this image; dashed: another.";
    find(".picked canvas").hidden = !d.shape.length;
    paint(find(".picked canvas"), image);
    const mark = good(image) ? "right" : "wrong";
    find(".words").replaceChildren(
      make("div", {}, make("b", {}, name(label)), ` · row ${d.rows[image]}`),
      make("div", {}, `layer ${d.layers[at]} says ${name(said(at, image))} (${mark})`),
      make("div", { class: "soft" }, `right in ${d.layers.filter((_, l) => good(image, l)).length} of ${d.layers.length} layers`));
    d.layers.forEach((layer, l) => {
      const it = find(".says").children[l], text = `layer ${layer} says ${name(said(l, image))}, ${good(image, l) ? "right" : "wrong"}`;
      it.className = (good(image, l) ? "right" : "") + (l === at ? " now" : "");
      it.textContent = good(image, l) ? "✓" : "✗";
      it.title = text;
      it.setAttribute("aria-label", text);
    });
    const of = (list) => (list.length ? `: ${list.filter(same).length} of ${list.length} share its class` : "");
    find(".like").textContent = `Nearest in layer ${d.layers[at]}${of(near)}`;
    find(".alike").textContent = alike.length ? `Nearest in pixels${of(alike)}` : "";
    strip(find(".in-layer"), near, same, words);
    strip(find(".in-pixels"), alike, same, words);
  }

  function drawChanges() {
    const groups = [[], [], []], [a, b] = [d.layers[at], d.layers[other]];
    for (let i = 0; i < d.n; i++) {
      if (said(at, i) === said(other, i)) continue;
      groups[good(i) ? 0 : good(i, other) ? 1 : 2].push(i);
    }
    const moved = groups[0].length + groups[1].length + groups[2].length;
    find(".changes .said").textContent = a === b
      ? `Both sliders are at layer ${a}; move one of them.`
      : `Layers ${a} and ${b} say different things of ${count(moved)} of ${count(d.n)} images (${percent(moved / d.n)}). Frame: solid where layer ${a} is right, dashed where it is wrong.`;
    const titles = [`Only layer ${a} is right`, `Only layer ${b} is right`, "Both wrong, differently"], place = find(".groups");
    place.hidden = a === b;
    groups.forEach((images, g) => {
      let it = place.children[g];
      if (!it) place.append((it = make("div", {}, make("h4"), make("div", { class: "strip" }), make("button", { type: "button", class: "link", "data-more": g }))));
      const [title, pictures, button] = it.children, few = more.has(g) ? images.slice(0, 10 * SHOWN) : images.slice(0, SHOWN);
      title.textContent = `${titles[g]} (${count(images.length)})`;
      strip(pictures, few, (i) => good(i), (i) => `${told(i)}, layer ${b} says ${name(said(other, i))}`);
      button.hidden = images.length <= few.length || more.has(g);
      button.textContent = "show more";
    });
  }

  function hit(event) {
    const [x, y] = [event.offsetX, event.offsetY];
    let best = -1, least = 144;
    for (let i = 0; i < d.n; i++) {
      if (only && !kept(i)) continue;
      const [a, b] = place(i), distance = (a - x) ** 2 + (b - y) ** 2;
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }

  function tip(card, x, y, ...content) {
    const it = find(`${card} .tip`), plot = find(`${card} .plot`);
    it.hidden = !content.length;
    if (!content.length) return;
    it.replaceChildren(...content);
    it.style.left = `${Math.max(4, Math.min(plot.offsetLeft + x + 12, it.parentElement.clientWidth - it.offsetWidth - 4))}px`;
    it.style.top = `${plot.offsetTop + Math.max(0, y - it.offsetHeight - 8)}px`;
  }

  function tipImage(i) {
    const [x, y] = place(i), words = make("div", {}, make("b", {}, name(d.labels[i])), make("br"), `layer ${d.layers[at]} says ${name(said(at, i))}`);
    const canvas = make("canvas", { style: "width:56px;height:auto" });
    paint(canvas, i);
    tip(".features", x, y, ...(d.shape.length ? [canvas, words] : [words]));
  }

  // The nearest image in the direction of an arrow key, among those that are not faded.
  function neighbourly(dx, dy) {
    const [x, y] = place(image);
    let best = image, least = Infinity;
    for (let i = 0; i < d.n; i++) {
      if (i === image || (only && !kept(i))) continue;
      const [a, b] = place(i), along = (a - x) * dx + (b - y) * dy, across = Math.abs((a - x) * dy - (b - y) * dx);
      if (along > 0.5 && across <= along && along + 2 * across < least) [best, least] = [i, along + 2 * across];
    }
    return best;
  }

  function see(which) {
    only = which;
    for (const it of find(".legend").children) it.setAttribute("aria-pressed", String(!!which && which.said === undefined && +it.dataset.label === which.label));
    drawMap();
    const of = which && Array.from(d.labels.keys()).filter(kept).length;
    find(".features .said").textContent = !which ? planeWords()
      : which.said === undefined ? `Only ${name(which.label)}: ${count(of)} images. Press it again for all.`
      : `Only ${name(which.label)} taken for ${name(which.said)}: ${count(of)} images. Escape, or the cell again, for all.`;
  }

  const planeWords = () => `Two leading principal components, ${percent(d.explained[at][0] + d.explained[at][1])} of the variance; turned to follow the layer before.`;

  function wait(on, text = "waiting for the kernel ...") {
    waiting = on;
    for (const it of root.querySelectorAll("select, .save")) it.disabled = on;
    status.classList.remove("bad");
    status.replaceChildren(...(on ? [make("span", { class: "bar" }), text] : []));
  }

  function say(text, bad = false) {
    status.classList.toggle("bad", bad);
    status.replaceChildren(text);
  }

  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  root.addEventListener("input", (event) => {
    const slider = event.target.dataset.slider;
    if (slider && d) set(slider, d.layers[+event.target.value]);
  });
  root.addEventListener("change", (event) => {
    const key = event.target.dataset.choice;
    if (!key) return;
    wait(true);
    set(key, key === "count" ? +event.target.value : event.target.value);
  });
  root.addEventListener("click", (event) => {
    const on = (selector) => event.target.closest(selector);
    if (on(".thumb")) set("image", +on(".thumb").dataset.image);
    else if (on("[data-layer]")) set("layer", d.layers[+on("[data-layer]").dataset.layer]);
    else if (on("[data-go]")) set("layer", +on("[data-go]").dataset.go);
    else if (on("[data-label]")) see(only && only.said === undefined && only.label === +on("[data-label]").dataset.label ? null : { label: +on("[data-label]").dataset.label });
    else if (on("[data-more]")) (more.add(+on("[data-more]").dataset.more), drawChanges());
    else if (on(".save")) (wait(true, "writing figures ..."), model.send({ do: "save" }));
  });
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * WIDTH;
    const l = Math.round(((x - layout.x(0)) / (layout.x(Math.max(d.layers.length - 1, 1)) - layout.x(0))) * (d.layers.length - 1));
    set("layer", d.layers[Math.min(Math.max(l, 0), d.layers.length - 1)]);
  });
  map.addEventListener("mousemove", (event) => {
    const i = hit(event);
    i < 0 ? tip(".features", 0, 0) : tipImage(i);
  });
  map.addEventListener("mouseleave", () => tip(".features", 0, 0));
  map.addEventListener("click", (event) => {
    const i = hit(event);
    if (i >= 0) set("image", i);
  });
  map.addEventListener("blur", () => tip(".features", 0, 0));
  map.addEventListener("keydown", (event) => {
    if (event.key === "Escape") see(null);
    if (!arrows[event.key]) return;
    event.preventDefault();
    set("image", neighbourly(...arrows[event.key]));
    tipImage(image);
    map.setAttribute("aria-label", `${told(image)}. Arrow keys go to the next image in that direction.`);
  });
  const cellAt = (event) => {
    const { x0, y0, size, k } = cells.layout, c = Math.floor((event.offsetX - x0) / size), r = Math.floor((event.offsetY - y0) / size);
    return r >= 0 && c >= 0 && r < k && c < k ? [r, c] : null;
  };
  const cellTip = ([r, c]) => {
    const { x0, y0, size, k, counts, totals } = cells.layout;
    tip(".confusion", x0 + c * size, y0 + r * size, make("div", {}, make("b", {}, name(r)), r === c ? " recognised: " : ` taken for ${name(c)}: `, `${count(counts[r * k + c])} of ${count(totals[r])}`));
  };
  const toggleCell = () => see(only && only.label === cell[0] && only.said === cell[1] ? null : { label: cell[0], said: cell[1] });
  cells.addEventListener("mousemove", (event) => {
    const found = cellAt(event);
    found ? cellTip(found) : tip(".confusion", 0, 0);
  });
  cells.addEventListener("mouseleave", () => tip(".confusion", 0, 0));
  cells.addEventListener("blur", () => tip(".confusion", 0, 0));
  cells.addEventListener("click", (event) => {
    if (!(cell = cellAt(event))) return drawCells();
    toggleCell();
    if (!only) cell = null;
    drawCells();
  });
  cells.addEventListener("keydown", (event) => {
    if (event.key === "Escape") (cell = null, see(null), tip(".confusion", 0, 0), drawCells());
    if (event.key === "Enter" && cell) toggleCell();
    if (!arrows[event.key]) return;
    event.preventDefault();
    const last = d.classes.length - 1, fit = (value) => Math.min(Math.max(value, 0), last), [dx, dy] = arrows[event.key];
    cell = cell ? [fit(cell[0] + dy), fit(cell[1] + dx)] : [0, 0];
    drawCells();
    cellTip(cell);
    cells.setAttribute("aria-label", find(".confusion .tip").textContent);
  });

  const again = () => d && (colours(), fillLegend(), draw());
  const plane = () => d && !only && (find(".features .said").textContent = planeWords());
  const step = () => (draw(), plane());
  const busy = () => model.get("busy") && wait(true, model.get("busy"));
  const problem = () => model.get("problem") && (wait(false), d && Object.entries(d.at).forEach(([key, value]) => (find(`[data-choice=${key}]`).value = value)), say(model.get("problem"), true));
  const heard = (message) => {
    wait(false);
    if (message.failed) say(message.failed, true);
    else if (message.saved) say(`Saved ${message.files.length} files in ${message.saved}`);
  };
  const renew = () => (fill(), plane());
  const listeners = [["change:facts", renew], ["change:layer", step], ["change:other", step], ["change:image", step], ["change:busy", busy], ["change:problem", problem], ["msg:custom", heard]];
  for (const [event, listener] of listeners) model.on(event, listener);
  let dressed = root.isConnected; // colours are those of the page, so it must be on one
  const size = new ResizeObserver(() => {
    if (!d) return;
    if (dressed) return drawCells(), drawMap();
    dressed = true;
    again();
  });
  size.observe(root);
  const theme = new MutationObserver(() => (again(), setTimeout(() => root.isConnected && again(), 300))); // its colours may come late
  theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "data-jp-theme-light", "class"] });
  renew();
  map.setAttribute("aria-label", "map of the images by their features. Arrow keys go to the next image in that direction.");
  return () => {
    for (const [event, listener] of listeners) model.off(event, listener);
    size.disconnect();
    theme.disconnect();
    cancelAnimationFrame(frame);
  };
}

export default { render };
