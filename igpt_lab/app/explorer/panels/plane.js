// The images on a plane by their features, in the layer in view; the points glide to their places in another layer.

const GLIDE = 60; // ms

function planePanel(state) {
  const canvas = make("canvas", {
    class: "plot map", tabindex: 0, role: "application",
    "aria-label": "map of the images by their features. Arrow keys go to the next image in that direction.",
  });
  const tip = createTip(canvas);
  const words = caption();
  const legend = legendPanel(state, see);
  const element = card("features", "Features on a plane", words, canvas, legend.element, tip.element);
  const plane = { canvas, order: [], reach: [], sprites: [], shown: null, layout: null };
  const points = () => drawPlane(plane, state);
  const glide = createGlide(plane, points, () => { state.root.dataset.settled = state.data.layers[state.at]; });

  // The images of a class, of a class and a prediction, or all of them (null); the chosen image is one of them.
  function see(only) {
    state.choose("alone", only || {});
    if (!only || state.isKept(state.image)) return;
    const [first] = state.keptImages();
    if (first !== undefined) state.choose("image", first);
  }
  const show = () => {
    legend.draw();
    points();
    words.textContent = planeWords(state);
  };
  const dress = () => {
    plane.sprites = state.data.classes.map((_, label) => classSprite(markOf(state.colours, label), state.data.n));
    legend.fill();
  };
  const fill = () => {
    plane.order = mixedOrder(state.data.n);
    plane.reach = [0, 1].map((axis) => reachAlong(axis, state.data.places));
    plane.shown = null;
    dress();
  };
  const draw = () => {
    words.textContent = planeWords(state);
    legend.draw();
    delete state.root.dataset.settled;
    glide.start(placesIn(state.data, state.at));
  };

  addPlaneEvents(plane, state, tip);
  return { element, fill, dress, draw, points, see, show, stop: glide.stop };
}

function addPlaneEvents(plane, state, tip) {
  const { canvas } = plane;
  const showTip = (image) => tip.show(...placeOf(plane, image), ...tipContent(state, image));
  canvas.addEventListener("mousemove", (event) => {
    const image = imageAt(plane, state, event.offsetX, event.offsetY);
    if (image < 0) tip.hide();
    else showTip(image);
  });
  canvas.addEventListener("click", (event) => {
    const image = imageAt(plane, state, event.offsetX, event.offsetY);
    if (image >= 0) state.choose("image", image);
  });
  canvas.addEventListener("keydown", (event) => {
    if (!ARROWS[event.key]) return;
    event.preventDefault();
    state.choose("image", imageTowards(plane, state, ...ARROWS[event.key]));
    showTip(state.image);
    canvas.setAttribute("aria-label", `${state.describe(state.image)}. Arrow keys go to the next image in that direction.`);
  });
}

function tipContent(state, image) {
  const name = make("b", {}, state.nameOf(state.data.labels[image]));
  const words = make("div", {}, name, ...(state.fitted ? [make("br"), state.prediction(image)] : []));
  if (!state.data.shape.length) return [words];
  const picture = make("canvas", { style: "width:56px;height:auto" });
  paintImage(picture, state.data, image);
  return [picture, words];
}

function planeWords(state) {
  const { data, at, only } = state;
  if (!only) {
    const explained = percent(data.explained[at][0] + data.explained[at][1]);
    const isFaded = data.classes.length > state.colours.palette.length;
    return `Two leading principal components, ${explained} of the variance; turned to follow the layer before.` +
      (isFaded ? " The class of the chosen image is drawn full." : "");
  }
  const kept = counted(state.keptImages().length, "image");
  const name = state.nameOf(only.label);
  if (only.predicted === undefined) return `Only ${name}: ${kept}. Press it again for all.`;
  return `Only ${name} taken for ${state.nameOf(only.predicted)}: ${kept}. Escape, or the same again, for all.`;
}

// Moves plane.shown to the places of another layer, with draw() for each frame and end() after the last.
function createGlide(plane, draw, end) {
  let frame = 0;

  const stop = () => cancelAnimationFrame(frame);
  const start = (target) => {
    stop();
    const still = !plane.shown || window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    const from = still ? target : plane.shown.slice();
    const begun = performance.now();
    const shown = plane.shown || new Float32Array(target);
    plane.shown = shown;
    const move = (now) => {
      const part = still ? 1 : clamp((now - begun) / GLIDE, 0, 1);
      const ease = part * (2 - part);
      for (let i = 0; i < target.length; i++) shown[i] = from[i] + (target[i] - from[i]) * ease;
      draw();
      if (part < 1) frame = requestAnimationFrame(move);
      else end();
    };
    frame = requestAnimationFrame(move);
  };
  return { start, stop };
}

// x0, y0, x1, y1, ... of the images in a layer.
function placesIn({ places, n }, layer) {
  return places.subarray(layer * n * 2, (layer + 1) * n * 2);
}

// The same mixed order each time, so that no class covers another.
function mixedOrder(n) {
  const order = Array.from({ length: n }, (_, i) => i);
  let seed = 7;
  for (let i = n - 1; i > 0; i--) {
    seed = (seed * 48271) % 2147483647;
    const j = seed % (i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

// From where to where the plane reaches along x (0) or y (1), the same in all layers; a few far points may lie outside.
function reachAlong(axis, places) {
  const sorted = places.filter((_, i) => i % 2 === axis).sort();
  const last = sorted.length - 1;
  return [sorted[Math.floor(0.002 * last)], sorted[Math.ceil(0.998 * last)]];
}

// A point of a class, drawn once: copying it is faster than drawing each point.
function classSprite([colour, shape], n) {
  const scale = pixelScale();
  const radius = n > 1500 ? 2.8 : 4;
  const half = 1.4 * radius + 1;
  const side = Math.ceil(2 * half * scale);
  const canvas = make("canvas", { width: side, height: side });
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  traceShape(context, shape, half, half, radius);
  context.fillStyle = colour;
  context.globalAlpha = 0.85;
  context.fill();
  return { canvas, half };
}

function drawPlane(plane, state) {
  if (!plane.canvas.clientWidth || !plane.shown) return;
  const height = Math.min(0.8 * plane.canvas.clientWidth, 540);
  const [context, width] = clearCanvas(plane.canvas, height);
  const [wide, tall] = plane.reach.map(([low, high]) => high - low || 1);
  plane.layout = { width, height, scale: Math.min((width - 24) / wide, (height - 24) / tall) };
  if (state.only) {
    drawPoints(context, plane, state, 0.09, (i) => !state.isKept(i));
    drawPoints(context, plane, state, 1, (i) => state.isKept(i));
  } else if (state.data.classes.length > state.colours.palette.length) { // too many to tell apart
    const isOfClass = (i) => state.data.labels[i] === state.data.labels[state.image];
    drawPoints(context, plane, state, 0.25, (i) => !isOfClass(i));
    drawPoints(context, plane, state, 1, isOfClass);
  } else drawPoints(context, plane, state, 1, () => true);
  const { ink, paper } = state.colours;
  for (const i of state.nearest()) drawRing(context, placeOf(plane, i), 5.5, ink, 1);
  drawRing(context, placeOf(plane, state.image), 9, paper, 5);
  drawRing(context, placeOf(plane, state.image), 9, ink, 2.2);
}

function drawPoints(context, plane, state, alpha, isDrawn) {
  const { labels } = state.data;
  context.globalAlpha = alpha;
  for (const i of plane.order) {
    if (!isDrawn(i)) continue;
    const [x, y] = placeOf(plane, i);
    const { canvas, half } = plane.sprites[labels[i]];
    context.drawImage(canvas, x - half, y - half, 2 * half, 2 * half);
  }
}

function drawRing(context, [x, y], radius, colour, width) {
  context.strokeStyle = solid(colour);
  context.lineWidth = width;
  context.beginPath();
  context.arc(x, y, radius, 0, 7);
  context.stroke();
}

// Where an image is on the canvas; one that lies outside is at the edge.
function placeOf({ shown, reach, layout }, image) {
  const { width, height, scale } = layout;
  const [x, y] = reach.map(([low, high], axis) => (shown[2 * image + axis] - (low + high) / 2) * scale);
  return [clamp(width / 2 + x, 7, width - 7), clamp(height / 2 - y, 7, height - 7)];
}

// The image nearest to a place of the canvas, within 12 pixels and not faded; -1 where there is none.
function imageAt(plane, state, x, y) {
  let best = -1;
  let least = 144;
  for (let i = 0; i < state.data.n; i++) {
    if (!state.isKept(i)) continue;
    const [a, b] = placeOf(plane, i);
    const distance = (a - x) ** 2 + (b - y) ** 2;
    if (distance < least) [best, least] = [i, distance];
  }
  return best;
}

// The nearest image in the direction of an arrow key, among those that are not faded.
function imageTowards(plane, state, dx, dy) {
  const [x, y] = placeOf(plane, state.image);
  let best = state.image;
  let least = Infinity;
  for (let i = 0; i < state.data.n; i++) {
    if (i === state.image || !state.isKept(i)) continue;
    const [a, b] = placeOf(plane, i);
    const along = (a - x) * dx + (b - y) * dy;
    const across = Math.abs((a - x) * dy - (b - y) * dx);
    const cost = along + 2 * across;
    if (along > 0.5 && across <= along && cost < least) [best, least] = [i, cost];
  }
  return best;
}
