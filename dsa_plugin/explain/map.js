// The strip at the top: layers by positions, for the token that is shown.

const ROW = { most: 12, least: 3, all: 96, marks: 6 };

class StripMap {
  constructor(canvas, reads) {
    this.canvas = canvas;
    this.reads = reads;
    this.marks = new Set(reads.data.marked);
  }

  /** Draws what `row` read; `layer` stands out, and all do where it is -1. */
  draw(layer, row) {
    const { layers, tokens } = this.reads.data;
    const style = getComputedStyle(this.canvas);
    const colour = (name) => style.getPropertyValue(name);
    const height = Math.max(ROW.least, Math.min(ROW.most, Math.floor(ROW.all / layers.length)));
    const scale = window.devicePixelRatio || 1;
    const width = this.canvas.clientWidth;
    this.canvas.style.height = `${ROW.marks + height * layers.length}px`;
    this.canvas.width = width * scale;
    this.canvas.height = (ROW.marks + height * layers.length) * scale;
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    context.fillStyle = colour("--raised");
    context.fillRect(0, ROW.marks, width, height * layers.length);
    const wide = Math.max(width / tokens, 1.2);
    const at = (position) => (position / tokens) * width;
    context.fillStyle = colour("--mark");
    for (const position of this.marks) context.fillRect(at(position), 0, wide, ROW.marks - 2);
    layers.forEach((_, index) => {
      const shown = layer < 0 || layer === index;
      context.fillStyle = colour(shown ? "--accent" : "--map-quiet");
      const positions = this.reads.read(index, row) ?? [];
      const top = ROW.marks + index * height;
      for (const position of positions) context.fillRect(at(position), top, wide, height - 1);
    });
    context.fillStyle = colour("--ink");
    context.fillRect(at(row), 0, 2, ROW.marks + height * layers.length);
  }

  /** The position under a mouse event. */
  position(event) {
    const box = this.canvas.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    const last = this.reads.data.tokens - 1;
    return Math.max(0, Math.min(last, Math.floor(share * this.reads.data.tokens)));
  }
}
