/** Small things for building pages. Text goes in as text, never as markup. */

export const $ = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && name !== "style") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

const ICONS = {
  edit: "M4 20l1-4L16.500 4.500a2.100 2.100 0 0 1 3 3L8 19z",
  colour: "M12 3.500c4 5 6 7.600 6 10.500a6 6 0 0 1-12 0c0-2.900 2-5.500 6-10.500z",
  remove: "M5 7h14M10 7V4.500h4V7M7 7l1 13h8l1-13",
  heart: "M12 20.500C5 15.500 2.500 12 2.500 8.500a5 5 0 0 1 9.500-2.200 5 5 0 0 1 9.500 2.200c0 3.500-2.500 7-9.500 12z",
  pointer: "M3 2l14 6.500-6 1.800-2.200 6z",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", name === "pointer" ? "0 0 20 20" : "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A colour for a name, the same in every window. */
export function hue(name) {
  let hash = 7;
  for (const character of name) hash = (hash * 31 + character.codePointAt(0)) % 9973;
  return String((hash * 47) % 360);
}

export function showNode(where, name) {
  where.textContent = name ?? "–";
  // Neighbouring numbers get colours that are far apart.
  where.style.setProperty("--hue", String((Number(/\d+$/.exec(name ?? "")?.[0] ?? 0) * 137 + 40) % 360));
}

export function toast(text, milliseconds = 4000) {
  const message = element("p", {}, text);
  $("toasts").append(message);
  setTimeout(() => message.remove(), milliseconds);
}

export const between = (low, value, high) => Math.min(high, Math.max(low, value));
