// The explorer. All that a step of a slider needs is in the browser already: see explorer.py for what the kernel sends.
// The panel of the network alone asks the kernel, while it is open.
// explorer.py joins panels/*.js and this file to one module. A panel is a function of the state. It returns its elements,
// and two functions: fill() for new data, draw() for all that a step changes.

let explorers = 0;

function render({ model, el }) {
  const root = make("div", { class: "igx", id: `igx-${explorers++}`, role: "region", "aria-label": "explorer" });
  const state = new State(model, root);
  const panels = createPanels(state);
  el.append(root);

  const draw = () => {
    if (!state.data) return;
    state.follow();
    for (const panel of panels.drawn) panel.draw();
  };
  const renew = () => keepFocus(root, () => {
    if (!state.read()) return;
    state.colours = readColours(root);
    for (const panel of panels.filled) panel.fill();
    draw();
    if (!state.fitted) state.ask({ do: "fit" });
  });
  const dress = () => keepFocus(root, () => {
    if (!state.data) return;
    state.colours = readColours(root);
    panels.plane.dress();
    draw();
  });

  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.only) panels.plane.see(null);
  });
  state.lost = panels.header.lose;
  const forget = listen(model, kernelListeners(state, panels, renew, draw));
  const leave = watchKernel(model, panels.header.lose);
  renew();
  const unwatch = watchPage(state, panels, dress);
  return () => {
    forget();
    leave();
    unwatch();
    panels.plane.stop();
  };
}

function createPanels(state) {
  const header = headerPanel(state);
  const sliders = slidersPanel(state);
  const curve = curvePanel(state);
  const plane = planePanel(state);
  const confusion = confusionPanel(state, plane.see);
  const image = imagePanel(state);
  const changes = changesPanel(state);
  const network = networkPanel(state);
  state.root.append(
    header.top, header.status.element, sliders.element,
    make("div", { class: "grid" },
      make("div", { class: "column first" }, curve.element, plane.element),
      make("div", { class: "column second" }, confusion.element, image.element),
      changes.element, network.element),
    header.note);
  const filled = [sliders, curve, confusion, image, changes, plane];
  return { header, plane, confusion, image, network, drawn: [...filled, network], filled: [header, ...filled] };
}

// Events of the model, and what each of them does.
function kernelListeners(state, { header, plane, confusion, image, network }, renew, draw) {
  const { model } = state;
  const { status } = header;
  return {
    "change:facts": renew,
    "change:layer": draw,
    "change:other": draw,
    "change:image": draw,
    "change:alone": () => {
      if (!state.data) return;
      state.readAlone();
      plane.show();
      confusion.draw();
      image.draw();
    },
    "change:busy": () => {
      if (model.get("busy")) status.wait(model.get("busy"), false);
      else if (!model.get("problem")) status.ready();
    },
    "change:problem": () => {
      if (!model.get("problem")) return;
      status.ready();
      if (state.data) header.restore();
      status.say(model.get("problem"), true);
    },
    "msg:custom": (message, buffers) => {
      if (message.look) {
        network.hear(message.look, buffers);
        return;
      }
      if (message.original) {
        image.hear(message.original, buffers);
        return;
      }
      status.ready();
      if (message.failed) status.say(message.failed, true);
      else if (message.saved) status.say(`Saved ${counted(message.files.length, "file")} in ${message.saved}`);
    },
  };
}

// Calls lost() when the page knows that the kernel is gone. JupyterLab has the kernel at the widget manager.
function watchKernel(model, lost) {
  const kernel = model.widget_manager && model.widget_manager.kernel;
  if (!kernel || !kernel.statusChanged) return () => {};
  const hear = (_, status) => {
    if (["restarting", "autorestarting", "terminating", "dead"].includes(status)) lost();
  };
  kernel.statusChanged.connect(hear);
  kernel.disposed.connect(lost);
  return () => {
    kernel.statusChanged.disconnect(hear);
    kernel.disposed.disconnect(lost);
  };
}

function listen(model, listeners) {
  for (const [event, listener] of Object.entries(listeners)) model.on(event, listener);
  return () => {
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
  };
}

// Draws again when the size or the theme of the page changes.
function watchPage(state, panels, dress) {
  let dressed = state.root.isConnected; // colours are those of the page, so it must be on one
  const size = new ResizeObserver(() => {
    if (!state.data) return;
    if (dressed) {
      panels.confusion.draw();
      panels.plane.points();
      return;
    }
    dressed = true;
    dress();
  });
  size.observe(state.root);
  const scheme = window.matchMedia("(prefers-color-scheme: dark)"); // which a saved page follows
  scheme.addEventListener("change", dress);
  const theme = new MutationObserver(() => {
    dress();
    setTimeout(() => state.root.isConnected && dress(), 300); // its colours may come late
  });
  theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name", "data-jp-theme-light", "class"] });
  return () => {
    size.disconnect();
    theme.disconnect();
    scheme.removeEventListener("change", dress);
  };
}

export default { render };
