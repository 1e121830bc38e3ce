// What the network itself says of the image: the colours that the layer in view expects, and where a head looks from a
// pixel. The kernel is asked only while the panel is open, and one thing at a time.

const NETWORK_KEYS = "Arrow keys choose another predicted pixel.";

function networkPanel(state) {
  const words = caption();
  const pictures = ["true", "expected", "weights"].map(networkPicture);
  const head = make("select", { "data-head": "" });
  const place = make("div", { class: "network" }, ...pictures.map((picture) => picture.element));
  const choices = make("label", { class: "choice" }, "head", head);
  const summary = make("summary", { "data-lm-suppress-shortcuts": "true" }, "Inside the network");
  const element = make("details", { class: "card wide inside" }, summary, words, place, choices);
  // have: the kernel's last answer; asking: whether another is on its way
  const network = { have: null, asking: false, pixel: null, head: 0 };

  const draw = () => {
    element.hidden = Boolean(state.model.offline);
    if (!element.open) return;
    const { have } = network;
    const isNew = !have || askedOf(state, network).some(([name, value]) => have[name] !== value);
    if (isNew && !network.asking) {
      network.asking = true;
      state.ask({ do: "look", ...Object.fromEntries(askedOf(state, network)) });
    }
    const canShow = Boolean(have && !have.problem);
    element.classList.toggle("old", isNew);
    place.hidden = choices.hidden = !canShow;
    words.textContent = have ? have.problem || networkWords(have, network) : "The model is being loaded ...";
    if (canShow) pictures.forEach((picture) => picture.draw(have, network, state.colours));
  };
  const hear = (answer, buffers) => {
    network.asking = false;
    network.have = { ...answer, ...readLook(buffers) };
    if (!answer.problem) {
      if (network.pixel === null) network.pixel = answer.pixel;
      fillHeads(head, answer.heads, network);
    }
    draw();
  };
  const choosePixel = (pixel) => {
    network.pixel = pixel;
    draw();
  };

  element.addEventListener("toggle", () => {
    network.asking = false; // an answer that was lost must not stop the panel for ever
    draw();
  });
  head.addEventListener("change", () => {
    network.head = +head.value;
    draw();
  });
  addNetworkEvents(place, network, choosePixel);
  return { element, draw, hear };
}

// What the panel should show, as [name, value].
function askedOf(state, { pixel }) {
  const layer = state.data.layers[state.at];
  return Object.entries({ split: state.data.at.split, image: state.image, layer, pixel });
}

// The arrays of an answer; network.py says what each of them is.
function readLook(buffers) {
  if (!buffers.length) return {};
  const arrays = [Uint8Array, Uint8Array, Float32Array, Float32Array, Float32Array].map((Kind, i) => {
    const { buffer, byteOffset, byteLength } = buffers[i];
    return new Kind(buffer.slice(byteOffset, byteOffset + byteLength));
  });
  return Object.fromEntries(["true", "expected", "nats", "weights", "sos"].map((name, i) => [name, arrays[i]]));
}

// As many heads as the network has; after its last block, where there are none, the choice stays.
function fillHeads(select, heads, network) {
  if (heads && select.options.length !== heads)
    select.replaceChildren(...Array.from({ length: heads }, (_, i) => make("option", { value: i }, String(i))));
  select.disabled = !heads;
  select.value = network.head;
}

function addNetworkEvents(place, network, choosePixel) {
  place.addEventListener("click", (event) => {
    if (event.target.tagName !== "CANVAS") return;
    const { side } = network.have;
    const size = event.target.clientWidth / side;
    const [row, column] = [event.offsetY, event.offsetX].map((at) => clamp(Math.floor(at / size), 0, side - 1));
    choosePixel(row * side + column);
  });
  place.addEventListener("keydown", (event) => {
    if (!ARROWS[event.key]) return;
    event.preventDefault();
    const { side } = network.have;
    const [row, column] = nextCell([Math.floor(network.pixel / side), network.pixel % side], ARROWS[event.key], side - 1);
    choosePixel(row * side + column);
  });
}

// One of the three pictures, a square of the network's pixels, with a title below.
function networkPicture(name) {
  const focus = name === "weights" ? { tabindex: 0, role: "application" } : { role: "img" };
  const canvas = make("canvas", { "data-picture": name, ...focus });
  const title = make("figcaption", { class: "soft" });
  const element = make("figure", {}, canvas, title);

  const draw = (look, network, colours) => {
    title.textContent = networkTitle(name, look, network);
    canvas.setAttribute("aria-label", name === "weights" ? `${title.textContent}. ${NETWORK_KEYS}` : title.textContent);
    const [context, width] = clearCanvas(canvas, canvas.clientWidth);
    const edges = Array.from({ length: look.side + 1 }, (_, i) => Math.round((i * width) / look.side));
    const fillPixel = (pixel, colour) => {
      const [x, y] = [pixel % look.side, Math.floor(pixel / look.side)];
      context.fillStyle = colour;
      context.fillRect(edges[x], edges[y], edges[x + 1] - edges[x], edges[y + 1] - edges[y]);
    };
    if (name === "weights") drawLooks(context, look, network, colours, edges, fillPixel);
    else for (let p = 0; p < look.nats.length; p++) fillPixel(p, solid(look[name].subarray(3 * p, 3 * p + 3)));
    markPixel(context, look, colours, edges);
  };
  return { element, draw };
}

// A head's weights, the highest darkest. What comes later, and the predicted pixel itself, is hatched.
function drawLooks(context, look, { head }, { paper, ink, soft, right }, edges, fillPixel) {
  const weights = headWeights(look, head);
  const highest = Math.max(...weights);
  weights.forEach((weight, p) => fillPixel(p, mix(paper, right, highest ? weight / highest : 0)));
  const width = edges[look.side];
  const [x, y] = [look.pixel % look.side, Math.floor(look.pixel / look.side)];
  context.save();
  context.beginPath();
  context.rect(edges[x], edges[y], width - edges[x], edges[y + 1] - edges[y]);
  context.rect(0, edges[y + 1], width, width - edges[y + 1]);
  context.clip();
  context.beginPath();
  for (let start = -width; start < width; start += 7) {
    context.moveTo(start, width);
    context.lineTo(start + width, 0);
  }
  context.strokeStyle = solid(soft);
  context.lineWidth = 1;
  context.stroke();
  context.restore();
  context.strokeStyle = mix(paper, ink, 0.3);
  context.strokeRect(0.5, 0.5, width - 1, width - 1);
}

// The weights of a head on the pixels before the predicted one.
function headWeights({ weights, nats, pixel, heads }, head) {
  const start = head * nats.length;
  return heads ? weights.subarray(start, start + pixel) : new Float32Array(0);
}

function markPixel(context, { pixel, side }, { ink, paper }, edges) {
  const [x, y] = [pixel % side, Math.floor(pixel / side)];
  const size = edges[x + 1] - edges[x];
  for (const [colour, width] of [[paper, 4], [ink, 2]]) {
    context.strokeStyle = solid(colour);
    context.lineWidth = width;
    context.strokeRect(edges[x], edges[y], size, edges[y + 1] - edges[y]);
  }
}

function networkTitle(name, look, { head }) {
  if (name === "true") return "the image, as the network reads it";
  if (name === "expected") return `what layer ${look.layer} expects`;
  if (!look.heads) return `no block after layer ${look.layer}`;
  const highest = Math.max(0, ...headWeights(look, head));
  return `where head ${head} of block ${look.layer} looks; darkest ${percent(highest)}, start token ${percent(look.sos[head])}`;
}

function networkWords({ layer, pixel, side, nats }) {
  const mean = nats.reduce((sum, value) => sum + value, 0) / nats.length;
  return `Layer ${layer} read by the network's own last norm and head (logit lens): ${mean.toFixed(2)} nats a pixel, ` +
    `${nats[pixel].toFixed(2)} at row ${Math.floor(pixel / side)}, column ${pixel % side}. ` +
    "Click a pixel: where a head looks to predict it. Hatched is what comes later.";
}
