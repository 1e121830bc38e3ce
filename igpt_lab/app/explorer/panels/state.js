// What all panels share: what the kernel sent, what is chosen, and what can be asked of both.

// Layers are positions in data.layers here, images are positions among the images shown.
class State {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.data = null; // what the kernel sent; see readData
    this.colours = null; // see readColours
    this.at = 0; // the layer in view
    this.other = 0; // the layer that it is compared with
    this.image = 0;
    this.lost = () => {}; // called when a kernel is found to be gone
    this.only = null; // {label} or {label, predicted} of the images that are not faded on the plane
  }

  // New data; false where the kernel has sent none.
  read() {
    if (!this.model.get("facts").layers) return false;
    this.data = readData(this.model);
    this.readAlone();
    return true;
  }

  // What is seen alone, as it was chosen in the browser or in the kernel.
  readAlone() {
    const alone = this.model.get("alone");
    this.only = "label" in alone ? alone : null;
  }

  // What was chosen, in the browser or in the kernel.
  follow() {
    const { layers, n } = this.data;
    this.at = Math.max(0, layers.indexOf(this.model.get("layer")));
    this.other = Math.max(0, layers.indexOf(this.model.get("other")));
    this.image = clamp(this.model.get("image"), 0, n - 1);
  }

  // Whether the probes of what is looked at are fitted.
  get fitted() {
    return this.data.curve.length > 0;
  }

  choose(key, value) {
    this.model.set(key, value); // draws
    this.reach(() => this.model.save_changes());
  }

  ask(message) {
    this.reach(() => this.model.send(message));
  }

  // What goes to the kernel fails where there is none any more.
  reach(send) {
    try {
      send();
    } catch {
      this.lost();
    }
  }

  predicted(layer, image) {
    return this.data.predicted[layer * this.data.n + image];
  }

  isRight(image, layer = this.at) {
    return this.predicted(layer, image) === this.data.labels[image];
  }

  isKept(image) {
    if (!this.only) return true;
    const { label, predicted } = this.only;
    return label === this.data.labels[image] && (predicted === undefined || predicted === this.predicted(this.at, image));
  }

  // The images that are not faded.
  keptImages() {
    return Array.from(this.data.labels.keys()).filter((i) => this.isKept(i));
  }

  // Whether this class, whatever is predicted of it, is seen alone.
  isAlone(label) {
    return this.only !== null && this.only.predicted === undefined && this.only.label === label;
  }

  nameOf(label) {
    return this.data.classes[label];
  }

  describe(image) {
    const name = `${this.fileOf(image) || `row ${this.data.rows[image]}`}: ${this.nameOf(this.data.labels[image])}`;
    return this.fitted ? `${name}, ${this.prediction(image)}` : name;
  }

  // Its file name, "" where it has none.
  fileOf(image) {
    return this.data.files[image] || "";
  }

  prediction(image, layer = this.at) {
    return `layer ${this.data.called[layer]} says ${this.nameOf(this.predicted(layer, image))}`;
  }

  // The images nearest to the chosen one by the features of the layer in view, nearest first.
  nearest() {
    const { near, n, k } = this.data;
    const start = (this.at * n + this.image) * k;
    return [...near.subarray(start, start + k)];
  }

  nearestInPixels() {
    const { pixelNear, pixelK } = this.data;
    return [...pixelNear.subarray(this.image * pixelK, (this.image + 1) * pixelK)];
  }
}

// What the kernel sent, as arrays; explorer.py says what each of them is.
function readData(model) {
  const array = (name, Kind) => {
    const view = model.get(name);
    return new Kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  };
  const facts = model.get("facts");
  return {
    ...facts, places: array("places", Float32Array), near: array("near", Int32Array), labels: array("labels", Uint16Array),
    pixelNear: array("pixel_near", Int32Array), predicted: array("predicted", Uint16Array), rows: array("rows", Int32Array),
    pictures: array("pictures", Uint8Array), k: facts.near[0], pixelK: facts.near[1],
  };
}
