// One image: what each layer says of it, and the images nearest to it.

function imagePanel(state) {
  const picked = pickedImage(state);
  const walk = walkButtons(state);
  const original = originalPanel(state);
  const verdicts = layerVerdicts(state);
  const layerTitle = make("h4", { class: "like" });
  const layerStrip = thumbnailStrip(state, "strip in-layer");
  const pixelTitle = make("h4", { class: "alike" });
  const pixelStrip = thumbnailStrip(state, "strip in-pixels");
  const words = caption();
  words.textContent = "Click a point or a picture. Solid frame: same class as this image; dashed: another.";
  const element = card("image", "One image", words, walk.element, picked.element, original.element, verdicts.title, verdicts.element,
    layerTitle, layerStrip.element, pixelTitle, pixelStrip.element);

  const draw = () => {
    const { labels, called } = state.data;
    const isSame = (i) => labels[i] === labels[state.image];
    const describe = (i) => `${isSame(i) ? "same class" : "another class"}, ${state.describe(i)}`;
    const share = (images) => (images.length ? `: ${images.filter(isSame).length} of ${images.length} share its class` : "");
    const near = state.nearest();
    const nearInPixels = state.nearestInPixels();
    picked.draw();
    walk.draw();
    original.draw();
    verdicts.draw();
    layerTitle.textContent = `Nearest in layer ${called[state.at]}${share(near)}`;
    pixelTitle.textContent = nearInPixels.length ? `Nearest in pixels${share(nearInPixels)}` : "";
    layerStrip.draw(near, isSame, describe);
    pixelStrip.draw(nearInPixels, isSame, describe);
  };
  return { element, fill: verdicts.fill, draw, hear: original.hear };
}

function pickedImage(state) {
  const canvas = make("canvas");
  const words = make("div", { class: "words" });
  const element = make("div", { class: "picked" }, canvas, words);

  const draw = () => {
    const { data, image } = state;
    const timesRight = state.fitted && data.layers.filter((_, l) => state.isRight(image, l)).length;
    canvas.hidden = !data.shape.length;
    paintImage(canvas, data, image);
    words.replaceChildren(
      make("div", {}, make("b", {}, state.nameOf(data.labels[image])), ` · row ${data.rows[image]}`),
      ...(state.fileOf(image) ? [make("div", { class: "soft file" }, state.fileOf(image))] : []),
      ...(state.fitted ? [
        make("div", {}, `${state.prediction(image)} (${state.isRight(image) ? "right" : "wrong"})`),
        make("div", { class: "soft" }, `right in ${timesRight} of ${data.layers.length} layers`)] : []));
  };
  return { element, draw };
}

// Buttons that walk through the images that are seen alone.
function walkButtons(state) {
  const button = (step, text) => make("button", { type: "button", class: "plain", "data-step": step }, text);
  const words = make("span", { class: "soft" });
  const element = make("div", { class: "buttons walk", hidden: "" }, button(-1, "previous"), button(1, "next"), words);

  const draw = () => {
    const images = state.only ? state.keptImages() : [];
    const at = images.indexOf(state.image);
    element.hidden = !images.length;
    words.textContent = at < 0 ? `${grouped(images.length)} seen alone` : `${grouped(at + 1)} of ${grouped(images.length)} seen alone`;
  };

  element.addEventListener("click", (event) => {
    const pressed = event.target.closest("[data-step]");
    if (!pressed) return;
    const images = state.keptImages();
    const at = images.indexOf(state.image);
    const next = at < 0 ? 0 : (at + +pressed.dataset.step + images.length) % images.length;
    state.choose("image", images[next]);
  });
  return { element, draw };
}

// A button for each layer, which says whether that layer is right and leads to it.
function layerVerdicts(state) {
  const title = make("h4", {}, "What each layer says");
  const element = make("div", { class: "says", role: "group", "aria-label": "what each layer says of this image" });

  const fill = () => {
    title.hidden = element.hidden = !state.fitted;
    element.replaceChildren(...state.data.layers.map((_, l) => make("button", { type: "button", "data-layer": l })));
  };
  const draw = () => state.fitted && state.data.layers.forEach((_, l) => {
    const button = element.children[l];
    const isRight = state.isRight(state.image, l);
    const text = `${state.prediction(state.image, l)}, ${isRight ? "right" : "wrong"}`;
    button.className = (isRight ? "right" : "") + (l === state.at ? " now" : "");
    button.textContent = isRight ? "✓" : "✗";
    button.title = text;
    button.setAttribute("aria-label", text);
  });

  element.addEventListener("click", (event) => {
    const button = event.target.closest("[data-layer]");
    if (button) state.choose("layer", state.data.layers[+button.dataset.layer]);
  });
  return { title, element, fill, draw };
}
