// The confusion matrix of the layer in view: a cell for each pair of a class and a prediction.

const CONFUSION_FONT = "11px system-ui, sans-serif";
const CONFUSION_KEYS = "Arrow keys walk through its cells, Enter shows a cell's images on the plane, Escape all.";

function confusionPanel(state, see) {
  const canvas = make("canvas", { class: "plot cells", tabindex: 0, role: "application" });
  const tip = createTip(canvas);
  const words = caption();
  const pairs = confusedPairs(state, see);
  const element = card("confusion", "What is taken for what", words, canvas, pairs.title, pairs.element, tip.element);
  const matrix = { canvas, tip, cell: null, layout: null, tally: null }; // cell: the chosen [row, column]

  const fill = () => { matrix.cell = null; };
  const draw = () => {
    canvas.hidden = pairs.element.hidden = pairs.title.hidden = !state.fitted;
    if (!state.fitted) {
      words.textContent = NOT_FITTED;
      return;
    }
    matrix.tally = confusions(state);
    words.textContent = confusionWords(state, matrix.tally);
    pairs.draw(matrix.tally);
    if (!canvas.clientWidth) return;
    matrix.layout = confusionLayout(canvas, state.data.classes);
    drawMatrix(matrix, state);
    canvas.setAttribute("aria-label", `confusion matrix, ${words.textContent} ${CONFUSION_KEYS}`);
  };

  addMatrixMouse(matrix, state, see, draw);
  addMatrixKeys(matrix, state, see, draw);
  return { element, fill, draw };
}

// The pairs that are confused most, each a button that shows its images alone on the plane.
function confusedPairs(state, see) {
  const title = make("h4", { class: "below" }, "Confused most often");
  const element = make("div", { class: "pairs", role: "group", "aria-label": "press a pair to see its images alone on the plane" });

  const draw = (tally) => {
    const pairs = mostConfused(tally);
    title.hidden = !pairs.length;
    while (element.children.length > pairs.length) element.lastChild.remove();
    while (element.children.length < pairs.length) element.append(make("button", { type: "button" }));
    pairs.forEach(({ label, predicted, count }, i) => {
      const button = element.children[i];
      const isPressed = state.only && state.only.label === label && state.only.predicted === predicted;
      button.textContent = `${state.nameOf(label)} taken for ${state.nameOf(predicted)}: ${grouped(count)} of ${grouped(tally.totals[label])}`;
      button.setAttribute("aria-pressed", String(Boolean(isPressed)));
      Object.assign(button.dataset, { label, predicted });
    });
  };

  element.addEventListener("click", (event) => {
    const button = event.target.closest("[data-predicted]");
    if (!button) return;
    button.focus(); // not every browser does so, and Escape is heard where the focus is
    toggleCell([+button.dataset.label, +button.dataset.predicted], state, see);
  });
  return { title, element, draw };
}

// [{ label, predicted, count }], the most frequent first; of many classes more of them.
function mostConfused({ k, counts }) {
  const wrong = Array.from(counts, (count, i) => ({ label: Math.floor(i / k), predicted: i % k, count }));
  const confused = wrong.filter(({ label, predicted, count }) => count && label !== predicted);
  return confused.sort((a, b) => b.count - a.count).slice(0, k > 12 ? 12 : 5);
}

function addMatrixMouse(matrix, state, see, draw) {
  const { canvas, tip } = matrix;
  canvas.addEventListener("mousemove", (event) => {
    const cell = cellAt(matrix.layout, event.offsetX, event.offsetY);
    if (cell) showCellTip(matrix, state, cell);
    else tip.hide();
  });
  canvas.addEventListener("click", (event) => {
    matrix.cell = cellAt(matrix.layout, event.offsetX, event.offsetY);
    if (matrix.cell) toggleCell(matrix.cell, state, see);
    if (!state.only) matrix.cell = null;
    draw();
  });
}

function addMatrixKeys(matrix, state, see, draw) {
  const { canvas, tip } = matrix;
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && matrix.cell) toggleCell(matrix.cell, state, see);
    if (event.key === "Escape") {
      matrix.cell = null;
      tip.hide();
      draw();
    }
    if (!ARROWS[event.key]) return;
    event.preventDefault();
    matrix.cell = nextCell(matrix.cell, ARROWS[event.key], state.data.classes.length - 1);
    draw();
    showCellTip(matrix, state, matrix.cell);
    canvas.setAttribute("aria-label", tip.element.textContent);
  });
}

// Shows the images of a cell alone on the plane, or all again.
function toggleCell([label, predicted], state, see) {
  const seen = state.only && state.only.label === label && state.only.predicted === predicted;
  see(seen ? null : { label, predicted });
}

function showCellTip({ tip, layout, tally }, state, [row, column]) {
  tip.show(layout.left + column * layout.size, layout.top + row * layout.size, cellWords(state, tally, row, column));
}

// counts[label * k + prediction] of k classes, and how many images each class has.
function confusions(state) {
  const { labels, n, classes } = state.data;
  const k = classes.length;
  const counts = new Uint32Array(k * k);
  const totals = new Uint32Array(k);
  for (let i = 0; i < n; i++) {
    counts[labels[i] * k + state.predicted(state.at, i)]++;
    totals[labels[i]]++;
  }
  return { k, counts, totals };
}

function confusionWords(state, { k, counts }) {
  let wrong = 0;
  let worst = { count: 0 };
  for (let row = 0; row < k; row++) {
    for (let column = 0; column < k; column++) {
      if (row === column) continue;
      const count = counts[row * k + column];
      wrong += count;
      if (count > worst.count) worst = { count, row, column };
    }
  }
  if (!wrong) return "Nothing is wrong.";
  const pair = `${state.nameOf(worst.row)} taken for ${state.nameOf(worst.column)}`;
  return `${grouped(wrong)} of ${grouped(state.data.n)} wrong; most often ${pair} (${grouped(worst.count)}).`;
}

// Where the cells are, in CSS pixels. Names of classes stand beside and below them where there is room for names.
function confusionLayout(canvas, classes) {
  const k = classes.length;
  const named = k <= 32;
  const context = canvas.getContext("2d");
  context.font = CONFUSION_FONT;
  const longest = named ? Math.min(Math.max(...classes.map((text) => context.measureText(text).width)), 84) : 0;
  const size = Math.max(3, Math.min((canvas.clientWidth - longest - 26) / k, 34));
  const top = 4;
  const bottom = top + size * k;
  const height = bottom + (longest + 24);
  return { k, named, longest, size, left: longest + 24, top, bottom, height, gap: size > 5 ? 1 : 0 };
}

function drawMatrix({ canvas, cell, layout, tally }, state) {
  const [context] = clearCanvas(canvas, layout.height);
  context.font = CONFUSION_FONT;
  drawCells(context, layout, tally, state.colours);
  context.fillStyle = solid(state.colours.soft);
  if (layout.named) drawClassNames(context, layout, state.data.classes);
  drawAxisTitles(context, layout);
  if (cell) drawCursor(context, layout, cell, state.colours);
}

function drawCells(context, { k, left, top, size, gap }, { counts, totals }, { ink, paper, soft, right, wrong }) {
  for (let row = 0; row < k; row++) {
    for (let column = 0; column < k; column++) {
      const count = counts[row * k + column];
      const depth = Math.sqrt(totals[row] ? count / totals[row] : 0);
      context.fillStyle = count ? mix(paper, row === column ? right : wrong, 0.06 + 0.94 * depth) : mix(paper, soft, 0.06);
      context.fillRect(left + column * size, top + row * size, size - gap, size - gap);
      if (size < 19 || !count) continue;
      context.fillStyle = solid(readableOn(mixed(paper, row === column ? right : wrong, 0.06 + 0.94 * depth), ink, paper));
      context.textAlign = "center";
      context.fillText(count, left + (column + 0.5) * size - gap / 2, top + (row + 0.5) * size + 4);
    }
  }
}

function drawClassNames(context, { left, bottom, top, size, longest }, classes) {
  context.textAlign = "right";
  classes.forEach((name, i) => {
    const text = shorten(context, name, longest + 1);
    context.fillText(text, left - 5, top + (i + 0.5) * size + 4);
    drawUpright(context, text, left + (i + 0.5) * size + 4, bottom + 5);
  });
}

function drawAxisTitles(context, { k, left, top, size, height }) {
  const half = (size * k) / 2;
  const rows = "what the image shows";
  context.textAlign = "center";
  context.fillText("what the probe says", left + half, height - 4);
  drawUpright(context, rows, 11, Math.max(top + half, context.measureText(rows).width / 2 + 4)); // whole, of few classes too
}

function drawUpright(context, text, x, y) {
  context.save();
  context.translate(x, y);
  context.rotate(-Math.PI / 2);
  context.fillText(text, 0, 0);
  context.restore();
}

function drawCursor(context, { left, top, size, gap }, [row, column], { ink }) {
  context.strokeStyle = solid(ink);
  context.lineWidth = 2;
  context.strokeRect(left + column * size, top + row * size, size - gap, size - gap);
}

function shorten(context, text, width) {
  while (text.length > 2 && context.measureText(text).width > width) text = text.slice(0, -2) + "…";
  return text;
}

// The [row, column] at a place of the canvas, or null outside the cells.
function cellAt({ left, top, size, k }, x, y) {
  const row = Math.floor((y - top) / size);
  const column = Math.floor((x - left) / size);
  return row >= 0 && column >= 0 && row < k && column < k ? [row, column] : null;
}

function nextCell(cell, [dx, dy], last) {
  return cell ? [clamp(cell[0] + dy, 0, last), clamp(cell[1] + dx, 0, last)] : [0, 0];
}

function cellWords(state, { k, counts, totals }, row, column) {
  const between = row === column ? " recognised: " : ` taken for ${state.nameOf(column)}: `;
  const numbers = `${grouped(counts[row * k + column])} of ${grouped(totals[row])}`;
  return make("div", {}, make("b", {}, state.nameOf(row)), between, numbers);
}
