// What each row read, from the page's data. Nothing here touches what is shown.

const GAP = 2; // Unread tokens that a passage may bridge.

/** Rows of layers, decoded a layer at a time when first asked for. */
class Reads {
  /** data: what page.py's _data() writes. rows: source layer -> base64 of its 16-bit positions. */
  constructor(data, rows) {
    this.data = data;
    this.rows = rows;
    this.decoded = new Map();
  }

  /** Positions that a row read in a layer, best score first; null where they were not kept. */
  read(layer, row) {
    const { index_topk: k, first_row: first } = this.data;
    if (row < k) return Uint16Array.from({ length: row + 1 }, (_, position) => position);
    if (row < first) return null;
    return this.layer(layer).subarray((row - first) * k, (row - first + 1) * k);
  }

  layer(index) {
    const { source } = this.data.layers[index];
    if (!this.decoded.has(source)) {
      const bytes = Uint8Array.from(atob(this.rows(source)), (character) => character.charCodeAt(0));
      const view = new DataView(bytes.buffer);
      const positions = new Uint16Array(bytes.length / 2);
      for (let i = 0; i < positions.length; i += 1) positions[i] = view.getUint16(2 * i, true);
      this.decoded.set(source, positions);
    }
    return this.decoded.get(source);
  }

  /**
   * Position -> strength 1 to 3, and its weight, for one layer or, with layer -1, for all of them.
   * Of one layer: 3 are the best eighth of the scores, 2 the best half. Of all: 3 is read by each
   * of them, 2 by several. null where the row was not kept.
   */
  strengths(layer, row) {
    const every = this.data.layers.map((_, index) => index);
    const chosen = layer < 0 ? every : [layer];
    const found = new Map();
    for (const index of chosen) {
      const positions = this.read(index, row);
      if (positions === null) return null;
      const dense = row < this.data.index_topk;
      positions.forEach((position, rank) => {
        const entry = found.get(position) ?? { layers: 0, best: Infinity, weight: 0 };
        entry.layers += 1;
        entry.best = Math.min(entry.best, rank / positions.length);
        entry.weight += dense ? 1 : 1 - rank / positions.length;
        found.set(position, entry);
      });
    }
    for (const entry of found.values()) {
      if (chosen.length > 1) {
        entry.level = entry.layers === chosen.length ? 3 : Math.min(entry.layers, 2);
      } else if (row < this.data.index_topk) {
        entry.level = 1;
      } else {
        entry.level = entry.best < 1 / 8 ? 3 : entry.best < 1 / 2 ? 2 : 1;
      }
    }
    return found;
  }
}

/** Runs of read positions, the heaviest first: {start, end (inclusive), count, weight}. */
function passages(strengths) {
  const runs = [];
  for (const position of [...strengths.keys()].sort((a, b) => a - b)) {
    const run = runs.at(-1);
    const { weight } = strengths.get(position);
    if (run && position - run.end <= GAP + 1) {
      run.end = position;
      run.count += 1;
      run.weight += weight;
    } else {
      runs.push({ start: position, end: position, count: 1, weight });
    }
  }
  return runs.sort((a, b) => b.weight - a.weight || a.start - b.start);
}
