/** The notes on the board: showing, dragging, editing them with mouse, finger and keyboard. */

import * as api from "./api.js";
import { $, between, element, hue, icon, toast } from "./dom.js";
import { BoardState } from "./state.js";

export const COLOURS = ["lemon", "mint", "sky", "rose", "lilac", "peach"];
const LONGEST_TEXT = 500;
const HOLE_PATIENCE = 500; // ms that a missing change may take before the board is read again

export class Notes {
  #state = new BoardState();
  #elements = new Map();
  #drafts = new Set(); // notes that are not on the board yet
  #area = $("notes");
  #top = 1;
  #live = null;
  #holeTimer = null;
  #loading = null;
  #reloadAgain = false;

  constructor() {
    $("board").addEventListener("dblclick", (event) => {
      if (event.target.closest(".note")) return;
      this.add(this.#at(event.clientX - this.#size() / 2, event.clientY - 30));
    });
  }

  /** Called with each drag while it lasts: a function, or null while signed out. */
  set live(publish) {
    this.#live = publish;
  }

  /** Read the whole board. */
  load() {
    if (this.#loading) {
      this.#reloadAgain = true; // the answer that is on its way may be older than the change that caused this call
      return this.#loading;
    }
    this.#loading = this.#load().finally(() => {
      this.#loading = null;
      if (!this.#reloadAgain) return;
      this.#reloadAgain = false;
      return this.load();
    });
    return this.#loading;
  }

  async #load() {
    try {
      const { version, notes } = await api.readBoard();
      this.#state.replace(version, notes);
      this.#renderAll();
    } catch (error) {
      if (error.status === 401) return; // the lock is shown
      this.#later(2000);
    }
  }

  #later(milliseconds) {
    clearTimeout(this.#holeTimer);
    this.#holeTimer = setTimeout(() => {
      this.#holeTimer = null;
      void this.load();
    }, milliseconds);
  }

  /** A change that the server announced. */
  changed(change) {
    if (change.type === "note") {
      if (this.#state.put(change.note)) this.#render(change.note);
    } else if (change.type === "gone") {
      if (this.#state.remove(change.id, change.version)) this.#takeDown(change.id);
    }
    if (!this.#state.hole) {
      clearTimeout(this.#holeTimer);
      this.#holeTimer = null;
    } else if (this.#holeTimer === null) {
      this.#later(HOLE_PATIENCE);
    }
    this.#count();
  }

  /** Another person is dragging a note. */
  dragged({ id, x, y, end }, who) {
    const shown = this.#elements.get(id);
    if (!shown || shown.classList.contains("held")) return;
    if (typeof x === "number" && typeof y === "number") this.#place(shown, between(0, x, 1), between(0, y, 1));
    clearTimeout(shown.releaseTimer);
    if (end) {
      delete shown.dataset.holder;
      return;
    }
    shown.dataset.holder = who;
    shown.style.setProperty("--hue", hue(who));
    shown.releaseTimer = setTimeout(() => {
      // Their last message may be lost; the board's position counts.
      delete shown.dataset.holder;
      const note = this.#state.notes.get(id);
      if (note) this.#place(shown, note.x, note.y);
    }, 1500);
  }

  /** Begin a note. It is this window's alone until it has a text: what is left empty was never on the board. */
  add(place) {
    const colour = document.querySelector("#colours input:checked")?.value ?? COLOURS[0];
    const { x, y } = rounded(place ?? { x: 0.08 + Math.random() * 0.84, y: 0.08 + Math.random() * 0.7 });
    const shown = this.#make();
    shown.dataset.colour = colour;
    shown.setAttribute("aria-label", "New note");
    this.#place(shown, x, y);
    this.#drafts.add(shown);
    this.#area.append(shown);
    this.#count();
    this.#edit(shown);
  }

  clear() {
    this.#state = new BoardState();
    clearTimeout(this.#holeTimer);
    this.#holeTimer = null;
    const all = [...this.#elements.values(), ...this.#drafts];
    this.#elements.clear(); // first, so that an editor that loses the focus here saves nothing
    this.#drafts.clear();
    for (const shown of all) shown.remove();
  }

  // Showing

  #renderAll() {
    for (const id of this.#elements.keys()) if (!this.#state.notes.has(id)) this.#takeDown(id);
    for (const note of this.#state.notes.values()) this.#render(note);
    this.#count();
  }

  #count() {
    $("empty").hidden = this.#state.notes.size + this.#drafts.size > 0;
  }

  #render(note) {
    let shown = this.#elements.get(note.id);
    if (!shown) {
      shown = this.#draftOf(note) ?? this.#make();
      this.#drafts.delete(shown);
      this.#elements.set(note.id, shown);
      shown.dataset.noteId = note.id;
      shown.style.setProperty("--tilt", tilt(note.id));
      if (!shown.isConnected) this.#area.append(shown);
    }
    const text = shown.querySelector(".text");
    if (text && text.textContent !== note.text) {
      if (text.textContent) {
        shown.classList.remove("flash");
        void shown.offsetWidth;
        shown.classList.add("flash");
      }
      text.textContent = note.text;
    }
    shown.dataset.colour = COLOURS.includes(note.colour) ? note.colour : COLOURS[0];
    shown.querySelector(".by").textContent = note.by;
    shown.title = note.edited_by && note.edited_by !== note.by ? `by ${note.by}, last changed by ${note.edited_by}` : `by ${note.by}`;
    shown.setAttribute("aria-label", `Note by ${note.by}: ${note.text || "empty"}`);
    if (!shown.classList.contains("held")) {
      this.#place(shown, note.x, note.y);
      delete shown.dataset.holder;
    }
  }

  /** The draft that has become this note: the announcement may come before the answer to the request. */
  #draftOf({ x, y, text }) {
    return [...this.#drafts].find((shown) => {
      const place = placeOf(shown);
      return shown.dataset.saving === text && place.x === x && place.y === y;
    });
  }

  #make() {
    const button = (name, label, act) => {
      const made = element("button", { type: "button", title: label, "aria-label": label }, icon(name));
      made.addEventListener("click", act);
      return made;
    };
    const shown = element(
      "article",
      { className: "note", tabIndex: 0 },
      element("div", { className: "text" }),
      element(
        "footer",
        {},
        element("span", { className: "by" }),
        button("colour", "Colour", () => this.#palette(shown)),
        button("edit", "Edit", () => this.#edit(shown)),
        button("remove", "Delete", () => void this.#delete(shown)),
      ),
    );
    shown.addEventListener("pointerdown", (event) => this.#grab(shown, event));
    shown.addEventListener("dblclick", (event) => {
      if (!event.target.closest("button, textarea")) this.#edit(shown);
    });
    shown.addEventListener("keydown", (event) => this.#key(shown, event));
    shown.addEventListener("animationend", () => shown.classList.remove("flash"));
    return shown;
  }

  #takeDown(id) {
    const shown = this.#elements.get(id);
    this.#elements.delete(id);
    if (!shown) return;
    shown.classList.add("leaving");
    shown.removeAttribute("data-note-id");
    setTimeout(() => shown.remove(), 260);
  }

  #place(shown, x, y) {
    shown.style.setProperty("--x", x);
    shown.style.setProperty("--y", y);
  }

  // Moving

  #size() {
    return parseFloat(getComputedStyle(this.#area.querySelector(".note") ?? this.#area).width) || 180;
  }

  /** A place on the page as fractions of the board, so that every screen shows the same picture. */
  #at(left, top, size = this.#elements.size ? this.#size() : 180) {
    const area = this.#area.getBoundingClientRect();
    return {
      x: between(0, (left - area.left) / Math.max(1, area.width - size), 1),
      y: between(0, (top - area.top) / Math.max(1, area.height - size * 0.95), 1),
    };
  }

  #grab(shown, event) {
    if (event.button !== 0 || event.target.closest("button, textarea, .palette")) return;
    const { left, top } = this.#origin(shown);
    const offset = { x: event.clientX - left, y: event.clientY - top };
    const size = shown.offsetWidth;
    let place = null;
    shown.style.zIndex = String(++this.#top);
    shown.setPointerCapture(event.pointerId);
    const move = ({ clientX, clientY }) => {
      if (!place && Math.hypot(clientX - event.clientX, clientY - event.clientY) < 4) return; // a click
      place = this.#at(clientX - offset.x, clientY - offset.y, size);
      shown.classList.add("held");
      this.#place(shown, place.x, place.y);
      this.#live?.({ type: "drag", id: shown.dataset.noteId, ...place });
    };
    const drop = () => {
      shown.removeEventListener("pointermove", move);
      shown.removeEventListener("pointerup", drop);
      shown.removeEventListener("pointercancel", drop);
      shown.classList.remove("held");
      if (place) void this.#move(shown, place);
    };
    shown.addEventListener("pointermove", move);
    shown.addEventListener("pointerup", drop);
    shown.addEventListener("pointercancel", drop);
  }

  /** Where the note's untilted corner is. */
  #origin(shown) {
    const area = this.#area.getBoundingClientRect();
    return { left: area.left + shown.offsetLeft, top: area.top + shown.offsetTop };
  }

  async #move(shown, place) {
    const id = shown.dataset.noteId;
    if (!id) return;
    const there = rounded(place);
    const note = await this.#try(api.editNote(id, there));
    this.#live?.({ type: "drag", id, ...there, end: true });
    if (note) this.changed({ type: "note", note });
    else this.#restore(id);
  }

  #key(shown, event) {
    if (event.target !== shown) return;
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in steps) {
      const step = event.shiftKey ? 0.1 : 0.02;
      const x = between(0, Number(shown.style.getPropertyValue("--x")) + steps[event.key][0] * step, 1);
      const y = between(0, Number(shown.style.getPropertyValue("--y")) + steps[event.key][1] * step, 1);
      this.#place(shown, x, y);
      clearTimeout(shown.moveTimer);
      shown.moveTimer = setTimeout(() => void this.#move(shown, { x, y }), 250);
    } else if (event.key === "Enter" || event.key === "F2") {
      this.#edit(shown);
    } else if (event.key === "Delete" || event.key === "Backspace") {
      void this.#delete(shown);
    } else if (event.key === "c") {
      this.#palette(shown);
    } else {
      return;
    }
    event.preventDefault();
  }

  // Changing

  /** `typed` is what could not be saved before, and is still there. */
  #edit(shown, typed = null) {
    if (!shown || shown.classList.contains("editing")) return;
    const before = this.#textOf(shown);
    const text = shown.querySelector(".text");
    const count = element("span", { className: "count" });
    const area = element("textarea", { value: typed ?? before, maxLength: LONGEST_TEXT, rows: 4, "aria-label": "Text of the note" });
    const tell = () => { count.textContent = area.value.length > LONGEST_TEXT - 100 ? `${LONGEST_TEXT - area.value.length}` : ""; };
    tell();
    shown.classList.add("editing");
    shown.style.zIndex = String(++this.#top);
    text.replaceWith(area);
    shown.querySelector(".by").after(count);
    const editing = new AbortController();
    const finish = () => {
      if (editing.signal.aborted) return;
      editing.abort();
      const wanted = area.value.trim();
      text.textContent = wanted || before;
      area.replaceWith(text);
      count.remove();
      shown.classList.remove("editing");
      if (wanted !== before || this.#drafts.has(shown)) void this.#save(shown, wanted);
      else this.#restore(shown.dataset.noteId); // others may have changed it meanwhile
    };
    area.addEventListener("input", tell);
    shown.addEventListener("focusout", ({ relatedTarget }) => {
      if (!shown.contains(relatedTarget)) finish(); // the focus went to one of the note's own buttons
    }, { signal: editing.signal });
    area.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" && !(event.key === "Enter" && (event.ctrlKey || event.metaKey))) return;
      event.stopPropagation();
      finish();
      shown.focus();
    });
    if (typed !== null) return; // the user may be editing another note by now
    area.focus();
    area.select();
  }

  #textOf(shown) {
    return this.#state.notes.get(shown.dataset.noteId)?.text ?? "";
  }

  /** Put on the board what was typed; without a text there is no note. What cannot be saved stays in its editor. */
  async #save(shown, text) {
    if (this.#drafts.has(shown)) {
      if (text === "") {
        this.#drafts.delete(shown);
        shown.remove();
        this.#count();
        return;
      }
      const place = rounded(placeOf(shown));
      this.#place(shown, place.x, place.y);
      shown.dataset.saving = text;
      const note = await this.#try(api.addNote({ text, colour: shown.dataset.colour, ...place }));
      if (note) this.changed({ type: "note", note }); // replaces the draft, unless the announcement has done it
      delete shown.dataset.saving;
      if (!note && this.#drafts.has(shown)) this.#edit(shown, text);
      return;
    }
    const id = shown.dataset.noteId;
    if (!this.#elements.has(id)) return;
    if (text === "") {
      await this.#delete(shown);
      return;
    }
    const note = await this.#try(api.editNote(id, { text }));
    if (note) this.changed({ type: "note", note });
    else if (this.#elements.get(id) === shown) this.#edit(shown, text);
  }

  #palette(shown) {
    if (shown.querySelector(".palette")) return; // it closes when it loses the focus
    const palette = element("div", { className: "palette", role: "group", "aria-label": "Colour" });
    let closed = false;
    const close = ({ refocus }) => {
      if (closed) return;
      closed = true; // moving the focus causes another focusout event, which would call this again
      if (refocus) (shown.querySelector("textarea") ?? shown).focus();
      palette.remove(); // after the focus has moved: otherwise the note would lose it, and the editing would end
    };
    for (const colour of COLOURS) {
      const swatch = element("button", { type: "button", className: "swatch", title: colour, "aria-label": colour });
      swatch.dataset.colour = colour;
      swatch.addEventListener("click", async () => {
        close({ refocus: true });
        if (this.#drafts.has(shown)) {
          shown.dataset.colour = colour;
          return;
        }
        const note = await this.#try(api.editNote(shown.dataset.noteId, { colour }));
        if (note) this.changed({ type: "note", note });
      });
      palette.append(swatch);
    }
    palette.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close({ refocus: true });
    });
    palette.addEventListener("focusout", (event) => {
      if (!palette.contains(event.relatedTarget)) close({ refocus: false });
    });
    shown.append(palette);
    shown.style.zIndex = String(++this.#top);
    palette.firstElementChild.focus();
  }

  async #delete(shown) {
    if (this.#drafts.has(shown)) {
      void this.#save(shown, "");
      return;
    }
    const gone = await this.#try(api.deleteNote(shown.dataset.noteId));
    if (gone) this.changed({ type: "gone", ...gone });
  }

  #restore(id) {
    const note = this.#state.notes.get(id);
    if (note) this.#render(note);
  }

  async #try(promise) {
    try {
      return await promise;
    } catch (error) {
      if (error.status === 404) void this.load();
      if (error.status !== 401) toast(error.message);
      return null;
    }
  }
}

function placeOf(shown) {
  const at = (axis) => Number(shown.style.getPropertyValue(axis));
  return { x: at("--x"), y: at("--y") };
}

/** As exact as the board needs it, and as Redis gives it back. */
function rounded({ x, y }) {
  return { x: Math.round(x * 1e4) / 1e4, y: Math.round(y * 1e4) / 1e4 };
}

/** How crooked a note hangs, the same in every window. */
function tilt(id) {
  let hash = 0;
  for (const character of id) hash = (hash * 31 + character.charCodeAt(0)) % 997;
  return `${(hash % 50) / 10 - 2.5}deg`;
}
