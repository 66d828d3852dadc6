"use strict";
/* Paints the masks over the photos, and shows, hides and finds single ones.

   Masks come as COCO's compressed run lengths on the photo's own pixel grid, largest first. They are painted in that
   order into a map of mask numbers, so the smallest mask under the pointer is the one that is seen and found. Runs go
   down the columns, and so do the maps: pixel (x, y) is at x * height + y. */

{
  const kept = () => { try { return localStorage.getItem("samray-theme"); } catch { return null; } };
  const theme = kept();
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;  // before anything is seen
}

const $ = (selector, root = document) => root.querySelector(selector);
const node = (tag, text = "", className = "") => Object.assign(document.createElement(tag), { textContent: text, className });

// --- numbers in words ---

const count = (number) => number.toLocaleString("en");
const score = (value) => (value === null ? "none" : value.toFixed(3));
const percent = (part) => {
  const value = 100 * part;
  return value === 0 ? "0%" : `${value >= 1 ? Number(value.toFixed(1)) : value.toPrecision(2).replace(/e-0?/, "e-")}%`;
};

// --- colours ---

/** sRGB bytes of an OKLCH colour: hues of equal lightness also look equally light. Source: Ottosson, 2020. */
function oklch(lightness, chroma, turn) {
  const a = chroma * Math.cos(2 * Math.PI * turn), b = chroma * Math.sin(2 * Math.PI * turn);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((c) => Math.round(255 * (c <= 0.0031308 ? 12.92 * c : 1.055 * c ** (1 / 2.4) - 0.055)))
    .map((c) => Math.min(255, Math.max(0, c)));
}

/** Hues go round by the golden ratio, so that masks of about the same size differ. */
const objectColour = (index) => oklch([0.76, 0.66, 0.84][index % 3], 0.17, (0.06 + index * 0.618034) % 1);

let names = [];  // of the masks here, null for those without a name; empty in an output without names
const nameColour = (name) => (name === null ? [150, 150, 150] : objectColour(names.indexOf(name)));

const RAMP = [[68, 1, 84], [62, 73, 137], [38, 130, 142], [53, 183, 121], [181, 222, 43], [253, 231, 37]];  // viridis

function rampColour(part) {
  const at = Math.min(Math.max(part, 0), 1) * (RAMP.length - 1), low = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[low].map((c, i) => Math.round(c + (at - low) * (RAMP[low + 1][i] - c)));
}

const css = (rgb) => `rgb(${rgb.join(" ")})`;
const packed = ([red, green, blue], alpha) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;  // in the byte order of canvases

// --- masks ---

/** Run lengths of 0 and 1 in turn; see pycocotools, rleFrString. */
function decodeCounts(text) {
  const runs = [];
  for (let at = 0; at < text.length; ) {
    let value = 0, shift = 0, group;
    do {
      group = text.charCodeAt(at++) - 48;
      value |= (group & 31) << shift;
      shift += 5;
    } while (group & 32);
    if (group & 16) value |= -1 << shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

/** Calls fill(start, end) for each run of 1. */
function eachRun(runs, fill) {
  for (let i = 0, at = 0; i < runs.length; at += runs[i++]) if (i & 1) fill(at, at + runs[i]);
}

/** One image of the gallery: its frame, its masks, and which of them are shown. */
class Picture {
  constructor(tile, data) {
    this.tile = tile;
    this.frame = $(".frame", tile);
    this.stage = $(".stage", tile);
    this.base = $(".masks", tile);
    this.focus = $(".focus", tile);
    this.data = data;
    this.masks = data.masks;
    [this.width, this.height] = data.size;
    this.shown = this.masks.map(() => true);
    this.map = null;
    this.stale = true;
    this.near = false;
  }

  runsOf(index) {
    const mask = this.masks[index];
    return (mask.runs ??= decodeCounts(mask.counts));
  }

  colourOf(index) {
    const by = $("#colour").value, value = this.masks[index][by], range = ranges[by];
    if (by === "object") return objectColour(index);
    if (by === "name") return nameColour(this.masks[index].label);
    return value === null ? [150, 150, 150] : rampColour((value - range.low) / (range.high - range.low || 1));
  }

  /** Paint the shown masks, where that is due and anyone could see it. Returns whether it was. */
  paint() {
    if (!this.stale || !this.near) return false;
    this.stale = false;
    const { width, height } = this;
    const map = (this.map ??= new Uint16Array(width * height));
    map.fill(0);
    const fills = [0], edges = [0];
    this.masks.forEach((mask, index) => {
      const colour = this.colourOf(index);
      fills.push(packed(colour, 128));
      edges.push(packed(colour.map((c) => Math.round(c + 0.35 * (255 - c))), 240));
      if (this.shown[index]) eachRun(this.runsOf(index), (start, end) => map.fill(index + 1, start, end));
    });
    const context = this.base.getContext("2d"), image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    for (let x = 0, at = 0; x < width; x++) {
      for (let y = 0; y < height; y++, at++) {
        const own = map[at];
        if (!own) continue;
        const edge = (y && map[at - 1] !== own) || (y < height - 1 && map[at + 1] !== own)
          || (x && map[at - height] !== own) || (x < width - 1 && map[at + height] !== own);
        pixels[y * width + x] = edge ? edges[own] : fills[own];
      }
    }
    context.putImageData(image, 0, 0);
    return true;
  }

  /** The mask that is seen there, in the coordinates of the window; -1 for none. */
  maskAt(clientX, clientY) {
    this.near = true;  // somebody sees it: paint now what is still due
    this.paint();
    const box = this.base.getBoundingClientRect();
    const x = Math.floor(((clientX - box.left) / box.width) * this.width);
    const y = Math.floor(((clientY - box.top) / box.height) * this.height);
    const inside = x >= 0 && y >= 0 && x < this.width && y < this.height;
    return inside ? this.map[x * this.height + y] - 1 : -1;
  }

  /** Draw what is pointed at and what is isolated: the latter alone in the light, both with a white line around. */
  emphasise(pointed, isolated) {
    const { width, height } = this, context = this.focus.getContext("2d");
    context.clearRect(0, 0, width, height);
    this.frame.classList.toggle("isolating", isolated >= 0);
    if (pointed < 0 && isolated < 0) return;
    const image = context.createImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    if (isolated >= 0) pixels.fill(packed([8, 10, 14], 176));
    for (const index of new Set([isolated, pointed])) {
      if (index >= 0) this.drawMask(index, pixels, index === isolated);
    }
    context.putImageData(image, 0, 0);
    this.drawPoint(context, this.masks[pointed >= 0 ? pointed : isolated].point);
  }

  drawMask(index, pixels, isIsolated) {
    const { width, height } = this, inside = new Uint8Array(width * height);
    eachRun(this.runsOf(index), (start, end) => inside.fill(1, start, end));
    const thick = Math.max(1, Math.round((1.6 * width) / (this.base.clientWidth || width)));
    const fill = isIsolated ? 0 : packed(this.colourOf(index), 190), line = packed([255, 255, 255], 255);
    eachRun(this.runsOf(index), (start, end) => {
      for (let at = start; at < end; at++) {
        const y = at % height, x = (at - y) / height;
        let edge = false;
        for (let step = 1; step <= thick && !edge; step++) {
          edge = (y >= step && !inside[at - step]) || (y + step < height && !inside[at + step])
            || (x >= step && !inside[at - step * height]) || (x + step < width && !inside[at + step * height]);
        }
        pixels[y * width + x] = edge ? line : fill;
      }
    });
  }

  drawPoint(context, point) {
    if (!point) return;
    const [x, y] = this.fromOriginal(point), scale = this.width / (this.base.clientWidth || this.width);
    for (const [radius, colour] of [[6, "#fff"], [4.4, "#14171d"], [2.4, "#ffc857"]]) {
      context.beginPath();
      context.arc(x, y, radius * scale, 0, 2 * Math.PI);
      context.fillStyle = colour;
      context.fill();
    }
  }

  fromOriginal([x, y]) {
    const [width, height] = this.data.original;
    return [(x * this.width) / width, (y * this.height) / height];
  }
}

// --- state ---

let pictures = [];
const ranges = {};
const pointed = { picture: null, index: -1 };
const isolated = { picture: null, index: -1 };

function setPointed(picture, index, where = null) {
  if (index < 0) picture = null;
  const before = pointed.picture;
  if (before !== picture || pointed.index !== index) {
    pointed.picture = picture;
    pointed.index = index;
    for (const one of new Set([before, picture])) redraw(one);
  }
  if (picture) showMaskTip(picture, index, where);
  else hideTip();
}

function setIsolated(picture, index) {
  if (index < 0) picture = null;
  const before = isolated.picture;
  isolated.picture = picture;
  isolated.index = index;
  for (const one of new Set([before, picture])) redraw(one);
}

function redraw(picture) {
  if (!picture) return;
  const at = pointed.picture === picture ? pointed.index : -1, alone = isolated.picture === picture ? isolated.index : -1;
  picture.emphasise(at, alone);
  picture.frame.classList.toggle("over", at >= 0);
  if (large.picture === picture) markRow(at >= 0 ? at : alone);
}

// --- the tip ---

function hideTip() {
  $("#tip").hidden = true;
}

function showTip(content, x, y) {
  const tip = $("#tip");
  (large.picture ? $("#large") : document.body).append(tip);  // what is outside an open dialog is behind it
  tip.replaceChildren(...content);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const right = large.picture ? $("#large .room").getBoundingClientRect().right : innerWidth;
  const left = x + 18 + width > right ? x - 18 - width : x + 18;
  const top = Math.min(y + 14, innerHeight - height - 8);
  tip.style.transform = `translate(${Math.max(8, left)}px, ${Math.max(8, top)}px)`;
}

function showMaskTip(picture, index, where) {
  const mask = picture.masks[index], [width, height] = picture.data.original;
  const title = node("div", "", "title"), swatch = node("i"), list = node("dl");
  swatch.style.background = css(picture.colourOf(index));
  title.append(swatch, `Mask ${count(index + 1)} of ${count(picture.masks.length)}`);
  for (const [name, value] of [
    ...(names.length ? [["name", mask.label === null ? "none" : `${mask.label}, ${score(mask.label_score)}`]] : []),
    ["predicted IoU", score(mask.iou)],
    ["stability", score(mask.stability)],
    ["area", `${count(mask.area)} px, ${percent(mask.area / (width * height))}`],
    ["click point", mask.point ? mask.point.map((c) => +c.toFixed(1)).join(", ") : "none"],
    ["id", mask.id],
  ]) list.append(node("dt", name), node("dd", value));
  if (!where) {  // from the keyboard: next to the point that gave the mask, or the frame's middle
    const box = picture.base.getBoundingClientRect();
    const [x, y] = mask.point ? picture.fromOriginal(mask.point) : [picture.width / 2, picture.height / 2];
    where = [box.left + (x / picture.width) * box.width, box.top + (y / picture.height) * box.height];
  }
  showTip([title, list], ...where);
}

// --- which masks are shown ---

const FILTERS = {
  iou: { lets: (mask, value) => mask.iou === null || mask.iou >= value, show: (value) => value.toFixed(2) },
  stability: { lets: (mask, value) => mask.stability === null || mask.stability >= value, show: (value) => value.toFixed(2) },
  smallest: { lets: (mask, value) => mask.logArea >= value, show: (value) => percent(10 ** value) },
  largest: { lets: (mask, value) => mask.logArea <= value, show: (value) => percent(10 ** value) },
};

function filter() {
  const active = [];
  for (const [name, { lets, show }] of Object.entries(FILTERS)) {
    const input = $(`#${name}`), value = Number(input.value), open = name === "largest" ? input.max : input.min;
    const words = `${name === "largest" ? "≤" : "≥"} ${show(value)}`;
    $(`#${name}-value`).textContent = words;
    input.setAttribute("aria-valuetext", words);
    if (value !== Number(open)) active.push((mask) => lets(mask, value));
  }
  const chosen = $("#name")?.value;
  if (chosen) active.push((mask) => mask.label === names[Number(chosen) - 1]);
  let shown = 0;
  for (const picture of pictures) {
    const before = picture.shown;
    picture.shown = picture.masks.map((mask) => active.every((lets) => lets(mask)));
    const left = picture.shown.filter(Boolean).length, all = picture.masks.length;
    shown += left;
    $(".of", picture.tile).textContent = left < all ? `${count(left)} of ${count(all)} masks` : `${count(all)} mask${all === 1 ? "" : "s"}`;
    picture.stale ||= picture.shown.some((is, i) => is !== before[i]);
  }
  if (pointed.picture && !pointed.picture.shown[pointed.index]) setPointed(null, -1);
  if (isolated.picture && !isolated.picture.shown[isolated.index]) setIsolated(null, -1);
  $("#shown").textContent = count(shown);
  $("#reset").hidden = active.length === 0;
  if (large.picture) fillList();
  paintSoon();
}

const MS_PER_FRAME = 12;  // for painting, so that a slider can be dragged over many large images
let waiting = false;

function paintSoon() {
  if (waiting) return;
  waiting = true;
  $(".gallery").setAttribute("aria-busy", "true");
  requestAnimationFrame(() => {
    waiting = false;
    const end = performance.now() + MS_PER_FRAME;
    for (const picture of pictures) {
      if (picture.paint() && performance.now() > end) return paintSoon();
    }
    $(".gallery").setAttribute("aria-busy", "false");
  });
}

function setRanges() {
  for (const by of ["iou", "stability"]) {
    const values = pictures.flatMap((picture) => picture.masks.map((mask) => mask[by])).filter((value) => value !== null);
    ranges[by] = { low: values.reduce((a, b) => Math.min(a, b), 1), high: values.reduce((a, b) => Math.max(a, b), 0) };
    const input = $(`#${by}`);
    input.min = Math.floor(100 * ranges[by].low) / 100;
    input.max = Math.ceil(100 * Math.max(ranges[by].high, ranges[by].low)) / 100;
    input.value = input.min;
    input.closest("label").hidden = values.length === 0;
  }
  let least = 0;
  for (const picture of pictures) {
    const [width, height] = picture.data.original;
    for (const mask of picture.masks) {
      mask.logArea = Math.log10(Math.max(mask.area, 1) / (width * height));
      least = Math.min(least, mask.logArea);
    }
  }
  for (const name of ["smallest", "largest"]) $(`#${name}`).min = Math.floor(20 * least) / 20;
  reset();
}

function reset() {
  for (const name of Object.keys(FILTERS)) $(`#${name}`).value = name === "largest" ? $(`#${name}`).max : $(`#${name}`).min;
  if (names.length) $("#name").value = "";
  filter();
}

function recolour() {
  const by = $("#colour").value;
  $("#legend").hidden = !(by in ranges);
  if (by in ranges) {
    $("#legend i").style.background = `linear-gradient(90deg, ${RAMP.map(css).join(", ")})`;
    $("#legend-low").textContent = ranges[by].low.toFixed(2);
    $("#legend-high").textContent = ranges[by].high.toFixed(2);
  }
  for (const picture of pictures) picture.stale = true;
  paintSoon();
}

// --- one image, large ---

const large = { picture: null };

function enlarge(picture) {
  if (large.picture) putBack();
  large.picture = picture;
  $("#large .room").append(picture.frame);
  $("#large").style.setProperty("--image-ratio", picture.width / picture.height);
  $("#large .name").textContent = picture.data.name;
  $("#large .soft").textContent = `${count(pictures.indexOf(picture) + 1)} of ${count(pictures.length)}`;
  picture.near = true;
  picture.paint();
  fillList();
  if (!$("#large").open) $("#large").showModal();
  picture.frame.focus();
  redraw(picture);
}

function putBack() {
  const picture = large.picture;
  large.picture = null;
  setPointed(null, -1);
  setIsolated(null, -1);
  picture.stage.prepend(picture.frame);
}

function fillList() {
  const picture = large.picture, [width, height] = picture.data.original;
  const titles = node("li", "", "titles");
  titles.append(...["", "", "IoU", "stability", "area"].map((text) => node("span", text)));
  const rows = picture.masks.map((mask, index) => {
    const row = node("li"), button = node("button"), swatch = node("i");
    swatch.style.background = css(picture.colourOf(index));
    const cells = [index + 1, score(mask.iou), score(mask.stability), percent(mask.area / (width * height))];
    button.append(swatch, ...cells.map((text) => node("span", text)));
    button.type = "button";
    button.hidden = !picture.shown[index];
    button.setAttribute("aria-label", `Isolate mask ${index + 1}: predicted IoU ${cells[1]}, stability ${cells[2]}, area ${cells[3]}`);
    button.addEventListener("pointerenter", () => { setPointed(picture, index); hideTip(); });
    button.addEventListener("pointerleave", () => setPointed(null, -1));
    button.addEventListener("click", () => toggle(picture, index));
    row.append(button);
    return row;
  });
  $("#large .list").replaceChildren(titles, ...rows);
}

function markRow(index) {
  const rows = document.querySelectorAll("#large .list button");
  rows.forEach((row, i) => row.classList.toggle("on", i === index));
  if (index >= 0 && !rows[index]?.matches(":hover")) rows[index]?.scrollIntoView({ block: "nearest" });
}

function turn(step) {
  enlarge(pictures[(pictures.indexOf(large.picture) + step + pictures.length) % pictures.length]);
}

// --- pointer and keys ---

function toggle(picture, index) {
  const again = isolated.picture === picture && isolated.index === index;
  setIsolated(picture, again ? -1 : index);
}

/** The next shown mask from the one that is pointed at or isolated, largest first and round. */
function stepMask(picture, step) {
  const from = pointed.picture === picture ? pointed.index : isolated.picture === picture ? isolated.index : step > 0 ? -1 : picture.masks.length;
  for (let i = 1; i <= picture.masks.length; i++) {
    const index = (((from + step * i) % picture.masks.length) + picture.masks.length) % picture.masks.length;
    if (!picture.shown[index]) continue;
    if (isolated.picture === picture) setIsolated(picture, index);
    setPointed(picture, index);
    return;
  }
}

function onFrameKey(picture, event) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (step) stepMask(picture, step);
  else if (event.key === "Enter" || event.key === " ") {
    if (pointed.picture === picture) toggle(picture, pointed.index);
    else if (isolated.picture === picture) setIsolated(null, -1);
  } else if (event.key.toLowerCase() === "z" && !large.picture && !event.ctrlKey && !event.metaKey) enlarge(picture);
  else return;
  event.preventDefault();
}

function listen() {
  for (const picture of pictures) {
    const { frame } = picture;
    const follow = (event) => {
      const where = [event.clientX, event.clientY];
      setPointed(picture, picture.maskAt(...where), where);
    };
    frame.addEventListener("pointermove", follow);
    frame.addEventListener("pointerleave", () => setPointed(null, -1));
    frame.addEventListener("click", (event) => {
      follow(event);
      toggle(picture, picture.maskAt(event.clientX, event.clientY));
    });
    frame.addEventListener("dblclick", () => large.picture || enlarge(picture));
    frame.addEventListener("keydown", (event) => onFrameKey(picture, event));
    frame.addEventListener("blur", () => setPointed(null, -1));
    $(".enlarge", picture.tile).addEventListener("click", () => enlarge(picture));
  }
  document.addEventListener("click", (event) => {
    if (!event.target.closest(".frame, .list, .filters, .enlarge, .bar")) setIsolated(null, -1);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && (isolated.picture || pointed.picture)) {
      setPointed(null, -1);
      setIsolated(null, -1);
      event.preventDefault();  // the second Escape closes the large image
    } else if (large.picture && (event.key === "PageDown" || event.key === "PageUp")) {
      turn(event.key === "PageDown" ? 1 : -1);
      event.preventDefault();
    }
  });
  document.addEventListener("pointerover", (event) => {
    const place = event.target.closest("[data-tip]");
    if (place) showTip([node("span", place.dataset.tip)], event.clientX, event.clientY);
    else if (!pointed.picture) hideTip();
  });
  addEventListener("scroll", () => pointed.picture || hideTip(), { passive: true });
  addEventListener("beforeprint", () => pictures.forEach((picture) => { picture.near = true; picture.paint(); }));
  for (const name of Object.keys(FILTERS)) $(`#${name}`).addEventListener("input", filter);
  $("#name")?.addEventListener("change", filter);
  $("#reset").addEventListener("click", () => { reset(); $("#iou").focus(); });
  $("#colour").addEventListener("change", recolour);
  $("#opacity").addEventListener("input", setOpacity);
  $("#previous").addEventListener("click", () => turn(-1));
  $("#next").addEventListener("click", () => turn(1));
  $("#close").addEventListener("click", () => $("#large").close());
  $("#large").addEventListener("close", () => {
    const { tile } = large.picture;
    putBack();
    $(".enlarge", tile).focus();
  });
}

function setOpacity() {
  const value = Number($("#opacity").value);
  document.documentElement.style.setProperty("--masks", value / 100);
  $("#opacity-value").textContent = `${value}%`;
}

// --- light and dark ---

function isDark() {
  return (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
}

function listenToTheme() {
  const button = $("#theme");
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.setAttribute("aria-label", "Switch between light and dark");
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("samray-theme", document.documentElement.dataset.theme); } catch { /* not kept, then */ }
    name();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();
}

// --- start ---

document.addEventListener("DOMContentLoaded", () => {
  listenToTheme();
  const data = JSON.parse($("#images").textContent);
  if (data.length === 0) return;
  names = JSON.parse($("#names")?.textContent ?? "[]");
  pictures = [...document.querySelectorAll(".tile")].map((tile, i) => new Picture(tile, data[i]));
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) pictures.find((picture) => picture.tile === entry.target).near = entry.isIntersecting;
    paintSoon();
  }, { rootMargin: "400px" });
  for (const picture of pictures) watcher.observe(picture.tile);
  setRanges();
  setOpacity();
  listen();
});
