/**
 * What is on the board, as far as this window has received it.
 *
 * Every change carries the next version of the whole board. So the order in which changes arrive does not matter (a note keeps its
 * highest version), and a hole in the numbers shows that one was missed.
 */
export class BoardState {
  notes = new Map();
  version = 0; // everything up to here has been received
  #ahead = new Set(); // versions that came before their predecessors
  #gone = new Map(); // id -> version, so that a late edit does not bring a deleted note back

  /** A note as it is now. Returns whether that was news. */
  put(note) {
    const known = Math.max(this.notes.get(note.id)?.version ?? 0, this.#gone.get(note.id) ?? 0);
    this.#saw(note.version);
    if (note.version <= known) return false;
    this.notes.set(note.id, note);
    return true;
  }

  remove(id, version) {
    const note = this.notes.get(id);
    this.#saw(version);
    this.#gone.set(id, Math.max(version, this.#gone.get(id) ?? 0));
    if (!note || note.version > version) return false;
    this.notes.delete(id);
    return true;
  }

  /** The whole board at one version; later changes that have been received already stay. */
  replace(version, notes) {
    const there = new Set(notes.map((note) => note.id));
    for (const [id, note] of this.notes) {
      if (!there.has(id) && note.version <= version) this.notes.delete(id);
    }
    for (const note of notes) {
      const known = Math.max(this.notes.get(note.id)?.version ?? 0, this.#gone.get(note.id) ?? 0);
      if (note.version > known) this.notes.set(note.id, note);
    }
    // A lower version than the one here: Redis was emptied and its numbers begin anew.
    if (version < this.version) {
      this.notes = new Map(notes.map((note) => [note.id, note]));
      this.#ahead.clear();
      this.#gone.clear();
    }
    this.version = version;
    for (const [id, gone] of this.#gone) if (gone <= version) this.#gone.delete(id);
    this.#advance();
  }

  /** Whether a change was missed, or is still under way. */
  get hole() {
    return this.#ahead.size > 0;
  }

  #saw(version) {
    if (version > this.version) this.#ahead.add(version);
    this.#advance();
  }

  #advance() {
    for (const version of this.#ahead) if (version <= this.version) this.#ahead.delete(version);
    while (this.#ahead.delete(this.version + 1)) this.version += 1;
  }
}
