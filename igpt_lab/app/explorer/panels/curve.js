// Accuracy over depth, as SVG. What does not depend on the layer in view is drawn once for new data.

const CURVE = { width: 520, height: 262, left: 40, right: 14, top: 22, bottom: 34 };
const CURVE_BASE = CURVE.height - CURVE.bottom;

function curvePanel(state) {
  const svg = make("svg", { viewBox: `0 0 ${CURVE.width} ${CURVE.height}`, role: "img" });
  const words = caption();
  const element = card("accuracy", "Accuracy over depth", words, svg);
  let scale = null;
  let lines = null; // that move with the sliders

  const fill = () => {
    const { data } = state;
    svg.toggleAttribute("hidden", !state.fitted);
    if (!state.fitted) {
      words.textContent = NOT_FITTED;
      return;
    }
    scale = curveScale(data);
    lines = {
      there: make("line", { class: "there", y1: CURVE.top, y2: CURVE_BASE }),
      here: make("line", { class: "here", y1: CURVE.top, y2: CURVE_BASE }),
      text: make("text", { class: "said", y: CURVE.top - 8 }),
    };
    svg.replaceChildren(
      ...axisElements(data, scale), ...lineElements(data, scale), ...peakElements(data, scale), lines.there, lines.here,
      ...dotElements(data, scale), lines.text);
    words.textContent = curveWords(data);
    svg.setAttribute("aria-label", curveText(data));
  };
  const draw = () => {
    if (!state.fitted) return;
    const { curve, layers, called } = state.data;
    const row = curve[state.at];
    moveLine(lines.there, scale.x(state.other));
    moveLine(lines.here, scale.x(state.at));
    lines.text.setAttribute("x", scale.x(state.at));
    lines.text.setAttribute("text-anchor", anchorOf(state.at, layers.length));
    lines.text.textContent = `layer ${called[state.at]}: ${percent(row.accuracy)} [${percent(row.low)}, ${percent(row.high)}]`;
  };

  svg.addEventListener("click", (event) => {
    const last = state.data.layers.length - 1;
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * CURVE.width;
    const share = (x - scale.x(0)) / (scale.x(Math.max(last, 1)) - scale.x(0));
    state.choose("layer", state.data.layers[clamp(Math.round(share * last), 0, last)]);
  });
  return { element, fill, draw };
}

// Position of a layer -> x, accuracy -> y, and the accuracies at which the axis has its ticks.
function curveScale({ curve, layers }) {
  const { width, height, left, right, top, bottom } = CURVE;
  const bounds = curve.flatMap((row) => [row.low, row.high]);
  const least = Math.min(...bounds);
  const most = Math.max(...bounds);
  const step = [0.01, 0.02, 0.05, 0.1, 0.2].find((size) => (most - least) / size <= 6) || 0.5;
  const low = Math.max(0, Math.floor(least / step) * step);
  const rounded = Math.min(1, Math.ceil(most / step) * step);
  const high = rounded > low ? rounded : low + step;
  const ticks = [];
  for (let value = low; value <= high + 1e-9; value += step) ticks.push(value);
  return {
    ticks,
    x: (l) => left + 8 + ((width - left - right - 16) * l) / Math.max(layers.length - 1, 1),
    y: (value) => top + ((height - top - bottom) * (high - value)) / (high - low),
  };
}

function axisElements({ layers, called }, { ticks, x, y }) {
  const { width, height, left, right } = CURVE;
  const rows = ticks.flatMap((value) => [
    make("line", { class: "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
    make("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, `${Math.round(100 * value)}%`),
  ]);
  const longest = Math.max(...called.map((name) => name.length));
  const every = Math.ceil((layers.length * Math.max(longest, 3)) / 54); // as many names as there is room for
  const numbers = called.map((name, l) => make("text", { x: x(l), y: CURVE_BASE + 16, "text-anchor": "middle" }, name));
  const title = make("text", { x: (width + left) / 2, y: height - 3, "text-anchor": "middle" }, "layer");
  return [...rows, ...numbers.filter((_, l) => l % every === 0), title];
}

function lineElements({ curve }, { x, y }) {
  const points = (column) => curve.map((row, l) => `${x(l)},${y(row[column])}`);
  return [
    make("path", { class: "band", d: `M${points("low").join("L")}L${points("high").reverse().join("L")}Z` }),
    make("path", { class: "curve", d: `M${points("accuracy").join("L")}` }),
  ];
}

function peakElements({ layers, peak }, { x }) {
  const half = layers.length > 1 ? Math.min((x(1) - x(0)) / 2 - 1, 13) : 6;
  return peak.map((layer) => {
    const middle = x(layers.indexOf(layer));
    const ends = { x1: middle - half, x2: middle + half, y1: CURVE_BASE, y2: CURVE_BASE };
    return make("line", { class: "peak", ...ends }, make("title", {}, "may be the best layer"));
  });
}

function dotElements({ curve, layers, chosen }, { x, y }) {
  const dots = curve.map((row, l) => make("circle", { class: row.converged ? "dot" : "dot unsure", cx: x(l), cy: y(row.accuracy), r: 3.5 }));
  const c = layers.indexOf(chosen);
  const ring = make("circle", { class: "ring", cx: x(c), cy: y(curve[c].accuracy), r: 8 }, make("title", {}, "chosen on validation"));
  return [...dots, ring];
}

// The curve for those who do not see it.
function curveText({ curve, called }) {
  return "accuracy over depth: " + curve.map((row, l) => `layer ${called[l]} ${percent(row.accuracy)}`).join(", ");
}

function curveWords({ chosen, layers, called, peak, curve, doubts, choice }) {
  return `Ring: layer ${called[layers.indexOf(chosen)]}, chosen ${choice}` + doubts.map((words) => `; ${words}`).join("") + "." +
    (peak.length ? " Bar on the axis: layers that may be the best (95%)." : "") +
    (curve.some((row) => !row.converged) ? " Hollow: not converged." : "");
}

function moveLine(line, x) {
  line.setAttribute("x1", x);
  line.setAttribute("x2", x);
}

// Keeps the words at a line inside the plot.
function anchorOf(l, layers) {
  if (l < layers / 4) return "start";
  return l > (3 * layers) / 4 ? "end" : "middle";
}
