// Pictures of the images, one by one and in rows.

// Draws an image on a canvas, a pixel for a pixel.
function paintImage(canvas, { shape, pictures }, image) {
  if (!shape.length) return;
  const [height, width, channels] = shape;
  const context = canvas.getContext("2d");
  resizeCanvas(canvas, width, height);
  const pixels = context.createImageData(width, height);
  const start = image * height * width * channels;
  for (let p = 0; p < height * width; p++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * p + c] = pictures[start + p * channels + (channels === 3 ? c : 0)];
    pixels.data[4 * p + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
}

// A row of images to press. draw(images, isSolid, words): which they are, which frames are solid, what is said of each.
function thumbnailStrip(state, classes = "strip") {
  const element = make("div", { class: classes });

  const draw = (images, isSolid, words) => {
    while (element.children.length > images.length) element.lastChild.remove();
    while (element.children.length < images.length) element.append(make("button", { type: "button" }));
    images.forEach((image, i) => drawThumbnail(element.children[i], state, image, isSolid(image), words(image)));
  };

  element.addEventListener("click", (event) => {
    const button = event.target.closest(".thumb");
    if (button) state.choose("image", +button.dataset.image);
  });
  return { element, draw };
}

function drawThumbnail(button, state, image, isSolid, words) {
  const bare = !state.data.shape.length; // without a picture
  button.dataset.image = image;
  button.className = "thumb" + (isSolid ? " right" : "") + (image === state.image ? " chosen" : "") + (bare ? " bare" : "");
  button.title = words;
  button.setAttribute("aria-label", words);
  if (bare) {
    button.textContent = state.nameOf(state.data.labels[image]);
    return;
  }
  if (!button.firstElementChild) button.replaceChildren(make("canvas"));
  paintImage(button.firstElementChild, state.data, image);
}
