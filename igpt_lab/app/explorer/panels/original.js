// The chosen image as it is in its file, and as the network reads it. The kernel is asked for both, one image at a time.

function originalPanel(state) {
  const pictures = ["original", "read"].map((name) => {
    const canvas = make("canvas", { role: "img", "data-original": name });
    const title = make("figcaption", { class: "soft" });
    return { name, canvas, title, element: make("figure", {}, canvas, title) };
  });
  const element = make("div", { class: "originals", hidden: "" }, ...pictures.map((picture) => picture.element));
  let have = null; // the last answer
  let asking = false;

  const isOf = (answer) => answer && answer.image === state.image && answer.split === state.data.at.split;
  const draw = () => {
    if (!state.data.shape.length || state.model.offline) return;
    if (!isOf(have) && !asking) {
      asking = true;
      state.ask({ do: "original", image: state.image, split: state.data.at.split });
    }
    element.hidden = !have || !have.shapes.length;
    element.classList.toggle("old", !isOf(have));
  };
  const hear = (answer, buffers) => {
    asking = false;
    have = answer;
    pictures.forEach(({ name, canvas, title, element: figure }, i) => {
      figure.hidden = !buffers[i];
      if (!buffers[i]) return;
      const { buffer, byteOffset, byteLength } = buffers[i];
      const shape = answer.shapes[i];
      paintImage(canvas, { shape, pictures: new Uint8Array(buffer, byteOffset, byteLength) }, 0);
      title.textContent = originalTitle(name, answer, shape);
      canvas.setAttribute("aria-label", title.textContent);
    });
    draw();
  };
  return { element, draw, hear };
}

function originalTitle(name, { size }, [height, width]) {
  if (name === "read") return `as the network reads it, ${width} by ${height} colours of its palette`;
  return `the original, ${size[0]} by ${size[1]} pixels`;
}
