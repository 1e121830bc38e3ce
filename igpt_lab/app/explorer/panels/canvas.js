// Colours of the page, marks of the classes, and canvases.

const PALETTES = {
  light: ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#767676", "#b8a800", "#5b2a86", "#6b3d12"],
  dark: ["#4aa3df", "#f0b429", "#2cc295", "#e29ac4", "#9ad7ff", "#f0783c", "#a8a8a8", "#f0e442", "#a586ff", "#c08a5a"],
};
const SHAPES = ["circle", "square", "triangle", "diamond"];
const CORNERS = {
  triangle: [[0, -1.15], [1.05, 0.8], [-1.05, 0.8]],
  diamond: [[0, -1.25], [1.1, 0], [0, 1.25], [-1.1, 0]],
};

// A CSS colour as [red, green, blue].
function rgbOf(colour) {
  const context = make("canvas").getContext("2d", { willReadFrequently: true });
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
}

// The colours that the page gives to the explorer; on a dark page the root gets the class `dark` first.
function readColours(root) {
  const style = getComputedStyle(root);
  const read = (property) => rgbOf(style.getPropertyValue(property).trim());
  const [red, green, blue] = read("--card");
  const dark = red + green + blue < 384;
  root.classList.toggle("dark", dark);
  return {
    ink: read("--ink"), paper: read("--card"), soft: read("--soft"), right: read("--right"), wrong: read("--wrong"),
    palette: PALETTES[dark ? "dark" : "light"],
  };
}

function mix(from, to, share) {
  return solid(mixed(from, to, share));
}

function mixed(from, to, share) {
  return from.map((value, i) => Math.round(value + share * (to[i] - value)));
}

// The relative luminance of WCAG of [red, green, blue].
function luminance(colour) {
  const [red, green, blue] = colour.map((value) => (value > 10 ? ((value / 255 + 0.055) / 1.055) ** 2.4 : value / 3294.6));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

// Which of two colours stands out more on a ground.
function readableOn(ground, one, other) {
  const contrast = (colour) => {
    const [low, high] = [luminance(ground), luminance(colour)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  return contrast(one) >= contrast(other) ? one : other;
}

function solid(colour) {
  return `rgb(${colour.join()})`;
}

// Colour and shape of a class's points: no other of ten has its colour, and no other of twenty both.
function markOf(colours, label) {
  const { palette } = colours;
  return [palette[label % palette.length], SHAPES[(label + Math.floor(label / palette.length)) % 4]];
}

function traceShape(context, shape, x, y, radius) {
  context.beginPath();
  if (shape === "circle") context.arc(x, y, radius, 0, 7);
  if (shape === "square") context.rect(x - 0.88 * radius, y - 0.88 * radius, 1.76 * radius, 1.76 * radius);
  (CORNERS[shape] || []).forEach(([a, b], i) => context[i ? "lineTo" : "moveTo"](x + a * radius, y + b * radius));
  context.closePath();
}

function pixelScale() {
  return Math.min(window.devicePixelRatio || 1, 2);
}

// Clears a canvas and makes it as fine as the screen: its context, in CSS pixels, and its width.
function clearCanvas(canvas, height) {
  const scale = pixelScale();
  const width = canvas.clientWidth;
  resizeCanvas(canvas, Math.round(width * scale), Math.round(height * scale));
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return [context, width];
}

function resizeCanvas(canvas, width, height) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
}
