/** What the node that answers says about itself and the cluster. */

import * as api from "./api.js";
import { $, element } from "./dom.js";

const EVERY = 2000;

export class Panel {
  #timer = null;
  #box = $("stats");
  #toggle = $("stats-toggle");

  constructor() {
    this.#toggle.addEventListener("click", () => this.show(this.#box.hidden));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !this.#box.hidden) this.show(false);
    });
  }

  show(visible) {
    this.#box.hidden = !visible;
    this.#toggle.setAttribute("aria-expanded", String(visible));
    clearTimeout(this.#timer);
    if (visible) void this.#update();
  }

  async #update() {
    clearTimeout(this.#timer);
    if (!document.hidden) {
      try {
        this.#render(await api.stats());
      } catch (error) {
        this.#box.replaceChildren(element("h2", {}, "Cluster"), element("p", {}, error.message));
      }
    }
    if (!this.#box.hidden) this.#timer = setTimeout(() => void this.#update(), EVERY);
  }

  #render({ node, cache, bus, realtime, nodes }) {
    const rows = (pairs) =>
      element("dl", {}, ...pairs.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]));
    const bar = (name, value, max, text) =>
      element("div", { className: "bar" }, element("span", {}, name), element("meter", { min: 0, max, value, "aria-label": name }), element("b", {}, text));
    const most = Math.max(4, ...nodes.map(({ sockets }) => sockets));
    this.#box.replaceChildren(
      element("h2", {}, "What the cluster is doing"),
      element("h3", {}, "Sockets per node"),
      ...(nodes.length ? nodes.map((each) => bar(each.node, each.sockets, most, String(each.sockets))) : [element("p", {}, "Redis does not answer.")]),
      element("h3", {}, `Session cache of ${node}`),
      bar("hit rate", cache.hit_rate, 1, `${Math.round(cache.hit_rate * 100)}%`),
      bar("lease", Math.max(0, bus.lease_remaining), 2, `${Math.max(0, bus.lease_remaining).toFixed(1)}s`),
      rows([["hits", cache.hits], ["asked Redis", cache.misses], ["sessions kept", `${cache.size} of ${cache.max_entries}`], ["invalidated", cache.invalidations]]),
      element("h3", {}, `Bus and rooms of ${node}`),
      rows([["messages received", bus.received], ["messages sent", realtime.sent], ["rooms", realtime.rooms], ["gaps survived", bus.gaps]]),
    );
  }
}
