// What every panel is made of: elements, cards, tips, numbers in words.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = ["svg", "g", "line", "path", "circle", "text", "title"];
const FOCUSED_TAGS = ["button", "input", "select"];
const NOT_FITTED = "The probes are not fitted yet.";
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function make(tag, attributes = {}, ...children) {
  const element = SVG_TAGS.includes(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  // JupyterLab would take the arrow keys for the notebook's; it looks for this on what has the focus.
  if (FOCUSED_TAGS.includes(tag) || "tabindex" in attributes) element.setAttribute("data-lm-suppress-shortcuts", "true");
  element.append(...children);
  return element;
}

// Does work that may replace elements; the focus is then where it was.
function keepFocus(root, work) {
  const path = [];
  let element = document.activeElement;
  if (!root.contains(element) || element === root) {
    work();
    return;
  }
  for (; element !== root; element = element.parentElement) path.unshift([...element.parentElement.children].indexOf(element));
  const before = document.activeElement;
  work();
  if (document.activeElement === before && before.isConnected) return;
  const after = path.reduce((inside, position) => inside && inside.children[position], root);
  if (after) after.focus({ preventScroll: true });
}

function caption() {
  return make("p", { class: "soft said" });
}

function card(classes, title, ...content) {
  return make("section", { class: `card ${classes}`, "aria-label": title }, make("h4", {}, title), ...content);
}

function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}

function grouped(number) {
  return number.toLocaleString("en");
}

// "1 image", "2 images".
function counted(number, thing) {
  return `${grouped(number)} ${thing}${number === 1 ? "" : "s"}`;
}

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

// A box near a point of a plot, inside the plot's card. It goes when the mouse or the focus leaves the plot.
function createTip(plot) {
  const element = make("div", { class: "tip", hidden: "" });
  const hide = () => { element.hidden = true; };
  const show = (x, y, ...content) => {
    element.hidden = false;
    element.replaceChildren(...content);
    const rightmost = element.parentElement.clientWidth - element.offsetWidth - 4;
    element.style.left = `${Math.max(4, Math.min(plot.offsetLeft + x + 12, rightmost))}px`;
    element.style.top = `${plot.offsetTop + Math.max(0, y - element.offsetHeight - 8)}px`;
  };
  plot.addEventListener("mouseleave", hide);
  plot.addEventListener("blur", hide);
  return { element, show, hide };
}
