// Title, the choices that the kernel answers, the Save button, and the line that says what goes on.

const LATE = 5000; // ms
const NO_ANSWER = "The kernel has not answered for 5 seconds: it is busy, or gone. What is in view works without it.";
const GONE = "The kernel is gone. What is in view works without it; run the cell again for all else.";

function headerPanel(state) {
  const title = make("h3");
  const images = make("p", { class: "soft of" });
  const choices = { point: choice("point", "point"), split: choice("split", "images"), count: choice("count", "labels a class") };
  const help = "png, pdf, svg, csv and json of what is in view";
  const save = make("button", { type: "button", class: "plain main save", title: help }, "Save this view");
  const keep = make("button", { type: "button", class: "plain keep", title: "one HTML file that works offline" }, "Save as a page");
  const buttons = make("div", { class: "buttons" }, save, keep);
  const top = make("div", { class: "top" },
    make("div", {}, title, images),
    make("div", { class: "choices" }, ...Object.values(choices).map((select) => select.parentElement), buttons));
  const status = statusLine([save, keep]);
  const lose = () => {
    top.classList.add("gone");
    for (const select of Object.values(choices)) select.disabled = true;
    status.lose();
  };
  const note = make("p", { class: "note" });

  // Shows the choices that what is in view was computed for, whatever was asked of the kernel since.
  const restore = () => Object.entries(state.data.at).forEach(([key, value]) => { choices[key].value = value; });
  const fill = () => {
    const { data } = state;
    title.textContent = data.title;
    if (state.model.offline) top.lastElementChild.hidden = status.element.hidden = true; // there is no kernel to answer
    images.textContent = `${data.of}, ${data.at.point}, probes fitted on ${grouped(data.n_train)} · ${data.told}`;
    note.textContent = data.note + (data.no_pictures ? ` No pictures: ${data.no_pictures}.` : "");
    for (const [key, values] of Object.entries(data.choices))
      choices[key].replaceChildren(...values.map((value) => make("option", { value }, choiceText(key, value))));
    restore();
    status.ready();
    if (!state.fitted) status.wait("The probes are being fitted; pictures and neighbours are here already ...", false);
  };

  top.addEventListener("change", (event) => {
    const key = event.target.dataset.choice;
    if (!key) return;
    status.wait();
    state.choose(key, key === "count" ? +event.target.value : event.target.value);
  });
  const write = (what, words) => {
    if (!status.isOpen()) return;
    status.wait(words);
    state.ask({ do: what });
  };
  save.addEventListener("click", () => write("save", "writing figures ..."));
  keep.addEventListener("click", () => write("export", "writing a page ..."));
  return { top, status, note, fill, restore, lose };
}

// What goes on, in words. While a kernel is waited for, the buttons do nothing, and keep the focus.
function statusLine(buttons) {
  const element = make("p", { class: "status", role: "status", "aria-live": "polite" });
  let late = 0; // the timer that says that there is no answer
  let gone = false;

  const isOpen = () => buttons[0].getAttribute("aria-disabled") !== "true";
  const say = (text, bad = false) => {
    element.classList.toggle("bad", bad);
    element.replaceChildren(text);
  };
  const wait = (text = "waiting for the kernel ...", isShort = true) => {
    if (gone) return;
    for (const button of buttons) button.setAttribute("aria-disabled", "true");
    say(text);
    element.prepend(make("span", { class: "bar" }));
    clearTimeout(late);
    if (isShort) late = setTimeout(() => say(`${text} ${NO_ANSWER}`), LATE);
  };
  const ready = () => {
    clearTimeout(late);
    for (const button of buttons) {
      if (gone) button.setAttribute("aria-disabled", "true");
      else button.removeAttribute("aria-disabled");
    }
    say(gone ? GONE : "", gone);
  };
  const lose = () => {
    gone = true;
    ready();
  };
  return { element, say, wait, ready, lose, isOpen };
}

// A select in its label.
function choice(key, text) {
  const select = make("select", { "data-choice": key });
  make("label", { class: "choice" }, text, select);
  return select;
}

function choiceText(key, value) {
  if (key === "count") return String(value || "all");
  return value === "held out" ? "held out (validation)" : value;
}
