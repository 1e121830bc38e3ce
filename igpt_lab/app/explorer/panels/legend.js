// The classes with their marks on the plane; a class that is pressed is seen alone.

function legendPanel(state, see) {
  const element = make("div", { class: "legend", role: "group", "aria-label": "classes: press one to see it alone" });

  const fill = () => {
    const button = (name, label) =>
      make("button", { type: "button", "data-label": label, "aria-pressed": "false" }, classIcon(markOf(state.colours, label)), name);
    element.replaceChildren(...state.data.classes.map(button));
  };
  const draw = () => {
    for (const button of element.children) button.setAttribute("aria-pressed", String(state.isAlone(+button.dataset.label)));
  };

  element.addEventListener("click", (event) => {
    const button = event.target.closest("[data-label]");
    if (!button) return;
    const label = +button.dataset.label;
    see(state.isAlone(label) ? null : { label });
  });
  return { element, fill, draw };
}

function classIcon([colour, shape]) {
  const canvas = make("canvas", { width: 24, height: 24, style: "width:12px;height:12px" });
  const context = canvas.getContext("2d");
  traceShape(context, shape, 12, 12, 9);
  context.fillStyle = colour;
  context.fill();
  return canvas;
}
