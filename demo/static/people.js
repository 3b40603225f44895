/** Who is here, and where their pointers are. */

import { $, between, element, hue, icon } from "./dom.js";

const FORGET_CURSOR = 4000;
const NARROW = matchMedia("(max-width: 720px)"); // as in style.css
const ROOM = { wide: 9, narrow: 4 };

export class People {
  #connections = new Map(); // connection id -> name
  #cursors = new Map();
  #me = null;

  constructor() {
    NARROW.addEventListener("change", () => this.#render());
  }

  set me(name) {
    this.#me = name;
    this.#render();
  }

  /** More than this window, so that it is worth telling where the pointer is. */
  get company() {
    return this.#connections.size > 1;
  }

  replace(presence) {
    this.#connections = new Map([...presence].map(([id, info]) => [id, info.user || "someone"]));
    for (const id of this.#cursors.keys()) if (!this.#connections.has(id)) this.#dropCursor(id);
    this.#render();
  }

  joined({ client, user }) {
    this.#connections.set(client, user || "someone");
    this.#render();
  }

  left({ client }) {
    this.#connections.delete(client);
    this.#dropCursor(client);
    this.#render();
  }

  clear() {
    this.replace(new Map());
  }

  pointer({ x, y }, { client, user }) {
    if (typeof x !== "number" || typeof y !== "number") return;
    let cursor = this.#cursors.get(client);
    if (!cursor) {
      cursor = element("div", { className: "cursor" }, icon("pointer"), element("span", {}, element("b", {}, user || "someone")));
      cursor.style.setProperty("--hue", hue(user || ""));
      this.#cursors.set(client, cursor);
      $("cursors").append(cursor);
    }
    cursor.style.setProperty("--x", between(0, x, 1));
    cursor.style.setProperty("--y", between(0, y, 1));
    clearTimeout(cursor.timer);
    cursor.timer = setTimeout(() => this.#dropCursor(client), FORGET_CURSOR);
  }

  #dropCursor(client) {
    const cursor = this.#cursors.get(client);
    if (!cursor) return;
    clearTimeout(cursor.timer);
    this.#cursors.delete(client);
    cursor.remove();
  }

  #render() {
    const windows = new Map();
    for (const name of this.#connections.values()) windows.set(name, (windows.get(name) ?? 0) + 1);
    const names = [...windows.keys()].sort((a, b) => (b === this.#me) - (a === this.#me) || a.localeCompare(b));
    const list = $("people");
    const shown = new Map([...list.children].map((item) => [item.dataset.name, item]));
    const room = NARROW.matches ? ROOM.narrow : ROOM.wide;
    const rest = names.length > room ? names.splice(room - 1) : [];
    const items = names.map((name) => {
      const item = shown.get(name) ?? element("li", {}, [...name][0].toUpperCase());
      item.dataset.name = name;
      item.style.setProperty("--hue", hue(name));
      item.classList.toggle("me", name === this.#me);
      const count = windows.get(name);
      item.title = `${name}${name === this.#me ? " (you)" : ""}${count > 1 ? `, ${count} windows` : ""}`;
      item.setAttribute("aria-label", item.title);
      if (count > 1) item.dataset.more = `×${count}`;
      else delete item.dataset.more;
      return item;
    });
    if (rest.length) {
      const title = `${rest.length} more: ${rest.join(", ")}`;
      items.push(element("li", { className: "rest", title, "aria-label": title }, `+${rest.length}`));
    }
    list.replaceChildren(...items);
  }
}
