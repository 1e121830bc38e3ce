// The two sliders: the layer in view, and the layer that it is compared with.

function slidersPanel(state) {
  const layer = createSlider(state, "layer", "layer", "first", "Arrow keys walk through depth");
  const other = createSlider(state, "other", "compared with", "second", "The layer whose predictions are compared with the first one's");
  const element = make("div", { class: "depth" }, ...layer.elements, ...other.elements);

  const fill = () => {
    layer.fill();
    other.fill();
  };
  const draw = () => {
    layer.draw(state.at);
    other.draw(state.other);
    if (state.fitted) layer.output.append(chosenElement(state.data, state.at));
  };

  element.addEventListener("click", (event) => {
    const button = event.target.closest("[data-go]");
    if (!button) return;
    layer.input.focus(); // the button goes with this step
    state.choose("layer", +button.dataset.go);
  });
  return { element, fill, draw };
}

function createSlider(state, key, text, role, help) {
  const id = `${state.root.id}-${key}`;
  const label = make("label", { for: id }, text);
  const input = make("input", { type: "range", id, class: role, "data-slider": key, min: 0, step: 1, title: help });
  const output = make("output", { for: id, "data-of": key });

  const fill = () => { input.max = state.data.layers.length - 1; };
  const draw = (position) => {
    const { called, curve } = state.data;
    const range = `of ${called[0]}..${called[called.length - 1]}`;
    const accuracy = state.fitted ? percent(curve[position].accuracy) : "not fitted yet";
    input.value = position;
    input.setAttribute("aria-valuetext", `layer ${called[position]} ${range}, accuracy ${accuracy}`);
    output.replaceChildren(make("b", {}, called[position]), ` ${range} · ${accuracy} `);
  };

  input.addEventListener("input", () => {
    if (state.data) state.choose(key, state.data.layers[+input.value]);
  });
  return { elements: [label, input, output], input, output, fill, draw };
}

// Says that the layer in view is the one chosen on validation, or leads to that one.
function chosenElement({ layers, called, chosen }, position) {
  if (layers[position] === chosen) return make("span", { class: "soft" }, "chosen");
  return make("button", { type: "button", class: "link", "data-go": chosen }, `to the chosen, ${called[layers.indexOf(chosen)]}`);
}
