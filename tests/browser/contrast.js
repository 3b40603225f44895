// Every text that is shown, with the contrast of its colours by WCAG 2.2 (1.4.3): [{ text, where, ratio }].
(() => {
  const pixel = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  /** Any CSS colour as [red, green, blue, alpha], each from 0 to 1. */
  const parse = (colour) => {
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = colour;
    pixel.fillRect(0, 0, 1, 1);
    return [...pixel.getImageData(0, 0, 1, 1).data].map((part) => part / 255);
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((part, i) => part * a + below[i] * (1 - a));
  const luminance = (colour) => {
    const [r, g, b] = colour.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, two) => {
    const [low, high] = [luminance(one), luminance(two)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  /** What may be behind an element's text. Behind a translucent panel that floats there may be anything: black, and white. */
  const backgrounds = (element) => {
    const layers = [];
    let floats = false;
    let opacity = 1;
    for (let each = element; each; each = each.parentElement) {
      const style = getComputedStyle(each);
      const colour = parse(style.backgroundColor);
      if (colour[3] === 1) return { bases: [layers.reduceRight((below, layer) => over(layer, below), colour.slice(0, 3))], opacity };
      layers.push(colour);
      opacity *= Number(style.opacity);
      floats ||= colour[3] > 0 && ["absolute", "fixed"].includes(style.position);
      if (floats) break;
    }
    const ends = floats ? [[0, 0, 0], [1, 1, 1]] : [parse("canvas").slice(0, 3)];
    return { bases: ends.map((end) => layers.reduceRight((below, layer) => over(layer, below), end)), opacity };
  };
  const measured = [];
  const measure = (element, text, style, pseudo = false) => {
    let { bases, opacity } = backgrounds(element);
    if (pseudo) {
      bases = bases.map((base) => over(parse(style.backgroundColor), base));
      opacity *= Number(style.opacity);
    }
    const [r, g, b, a] = parse(style.color);
    const lowest = Math.min(...bases.map((base) => ratio(over([r, g, b, a * opacity], base), base)));
    const where = `${element.tagName.toLowerCase()}.${element.getAttribute("class") ?? ""}#${element.id}`;
    measured.push({ text: text.trim().slice(0, 40), where, ratio: Math.round(lowest * 100) / 100 });
  };
  for (const element of document.body.querySelectorAll("*")) {
    if (element.closest("[inert], svg, noscript, :disabled, .unseen, .leaving") || !element.checkVisibility({ visibilityProperty: true })) continue;
    const own = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE).map((node) => node.data).join("").trim();
    const style = getComputedStyle(element);
    if (own) measure(element, own, style);
    if (element.matches("textarea, input:not([type=radio])")) {
      if (element.value) measure(element, element.value, style);
      if (element.placeholder) measure(element, element.placeholder, getComputedStyle(element, "::placeholder"));
    }
    for (const name of ["::before", "::after"]) {
      const pseudo = getComputedStyle(element, name);
      const content = pseudo.content.replace(/^"|"$/g, "");
      if (!["none", "normal", ""].includes(content)) measure(element, content, pseudo, true);
    }
  }
  return measured;
})()
