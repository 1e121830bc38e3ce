// The images of which the two layers say different things, in three groups.

const FEW_IMAGES = 24; // of a group, until more are asked for
const MANY_IMAGES = 240;

function changesPanel(state) {
  const groups = [0, 1, 2].map((number) => changeGroup(state, number));
  const place = make("div", { class: "groups", hidden: "" }, ...groups.map((group) => group.element));
  const words = caption();
  const element = card("changes wide", "Predictions that change", words, place);

  const fill = () => groups.forEach((group) => group.fill());
  const draw = () => {
    const { called } = state.data;
    place.hidden = state.at === state.other || !state.fitted;
    if (!state.fitted) {
      words.textContent = NOT_FITTED;
      return;
    }
    const titles = [`Only layer ${called[state.at]} is right`, `Only layer ${called[state.other]} is right`, "Both wrong, differently"];
    const changed = changedImages(state);
    words.textContent = changeWords(state, changed.flat().length);
    groups.forEach((group, i) => group.draw(titles[i], changed[i]));
  };
  return { element, fill, draw };
}

function changeGroup(state, number) {
  const heading = make("h4");
  const strip = thumbnailStrip(state);
  const button = make("button", { type: "button", class: "link", "data-more": number }, "show more");
  const element = make("div", {}, heading, strip.element, button);
  let long = false;
  let redraw = null; // of what was drawn last

  const fill = () => { long = false; };
  const describe = (image) => `${state.describe(image)}, ${state.prediction(image, state.other)}`;
  const draw = (title, images) => {
    heading.textContent = `${title} (${grouped(images.length)})`;
    strip.draw(images.slice(0, long ? MANY_IMAGES : FEW_IMAGES), (image) => state.isRight(image), describe);
    button.hidden = images.length <= FEW_IMAGES || long;
    redraw = () => draw(title, images);
  };

  button.addEventListener("click", () => {
    long = true;
    redraw();
    strip.element.children[FEW_IMAGES].focus(); // the button is gone
  });
  return { element, fill, draw };
}

// Images that only the layer in view has right, that only the other has, and that both have wrong, differently.
function changedImages(state) {
  const groups = [[], [], []];
  for (let i = 0; i < state.data.n; i++) {
    if (state.predicted(state.at, i) === state.predicted(state.other, i)) continue;
    if (state.isRight(i)) groups[0].push(i);
    else groups[state.isRight(i, state.other) ? 1 : 2].push(i);
  }
  return groups;
}

function changeWords({ data, at, other }, changed) {
  const a = data.called[at];
  const b = data.called[other];
  if (at === other) return `Both sliders are at layer ${a}; move one of them.`;
  return `Layers ${a} and ${b} say different things of ${grouped(changed)} of ${grouped(data.n)} images (${percent(changed / data.n)}). ` +
    `Frame: solid where layer ${a} is right, dashed where it is wrong.`;
}
