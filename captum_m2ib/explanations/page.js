"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const { cells, box, part, interactions, colours } = JSON.parse(byId("data").textContent);
  const [rows, columns] = [cells.length, cells[0].length];
  const view = byId("view");
  const map = view.querySelector("img");
  const read = byId("read");
  const tokens = [...byId("tokens").children];
  const names = tokens.map((token) => token.querySelector("bdi").textContent);
  const title = byId("title");
  const bar = byId("bar");
  const [least, scale, most] = byId("scale").children;
  const usual = [title, least, scale, most].map((node) => node.textContent).concat(bar.getAttribute("style"));
  const hint = read.textContent;
  let pressed = -1;
  let at = null;

  // What lies under the map, so that the map can be made transparent.
  map.before(map.cloneNode());
  const ground = map.previousSibling;
  ground.src = byId("picture").src;
  ground.alt = "";
  const over = document.createElement("div");
  over.className = "under";
  const whole = map.cloneNode();
  whole.removeAttribute("class");
  whole.style.cssText = "width:100%;height:100%;max-height:none";
  over.append(whole);
  map.remove();
  view.append(over);
  const frame = document.createElement("div");
  frame.className = "cell";
  frame.hidden = true;
  view.append(frame);

  const percent = (share) => `${100 * share}%`;
  const signed = (value) => (value === 0 ? "0" : `${value < 0 ? "−" : "+"}${Number(Math.abs(value).toPrecision(2))}`);
  const width = (box[2] - box[0]) / columns;
  const height = (box[3] - box[1]) / rows;

  function place(node, row, column, across, down) {
    node.style.left = percent(box[0] + column * width);
    node.style.top = percent(box[1] + row * height);
    node.style.width = percent(across * width);
    node.style.height = percent(down * height);
  }

  function largest(values) {
    return values.flat().reduce((top, value) => Math.max(top, Math.abs(value)), 0);
  }

  function wordsAt(row, column) {
    if (!interactions) return "";
    const values = interactions.map((one) => one[row][column]);
    if (pressed >= 0) return `; with “${names[pressed]}” ${signed(values[pressed])}`;
    const order = names.map((_, i) => i).filter((i) => values[i] !== 0);
    order.sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]));
    const told = order.slice(0, 3).map((i) => `“${names[i]}” ${signed(values[i])}`);
    return told.length ? `; most with ${told.join(", ")}` : "";
  }

  function show(row, column) {
    at = [row, column];
    frame.hidden = false;
    place(frame, row, column, 1, 1);
    read.textContent = `${part}, row ${row + 1} of ${rows}, column ${column + 1} of ${columns}: ${cells[row][column]}${wordsAt(row, column)}`;
  }

  function leave() {
    at = null;
    frame.hidden = true;
    read.textContent = hint;
  }

  view.addEventListener("pointermove", (event) => {
    const edge = view.getBoundingClientRect();
    const column = Math.floor(((event.clientX - edge.left) / edge.width - box[0]) / width);
    const row = Math.floor(((event.clientY - edge.top) / edge.height - box[1]) / height);
    if (row >= 0 && row < rows && column >= 0 && column < columns) show(row, column);
    else leave();
  });
  view.addEventListener("pointerleave", leave);
  view.addEventListener("blur", leave);
  view.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [row, column] = at || [0, 0];
    if (!at) show(0, 0);
    else show(Math.min(Math.max(row + step[0], 0), rows - 1), Math.min(Math.max(column + step[1], 0), columns - 1));
  });

  byId("strength").addEventListener("input", (event) => {
    over.style.opacity = event.target.value / 100;
  });

  function heatOf(values, top) {
    const canvas = document.createElement("canvas");
    canvas.width = columns;
    canvas.height = rows;
    const image = new ImageData(columns, rows);
    values.flat().forEach((value, i) => {
      const side = value < 0 ? colours.cold : colours.heat;
      image.data.set(side[Math.round((255 * Math.abs(value)) / (top || 1))], 4 * i);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    place(canvas, 0, 0, columns, rows);
    return canvas;
  }

  function onGrey([red, green, blue, opacity]) {
    const mixed = [red, green, blue].map((one) => Math.round(70 + ((one - 70) * opacity) / 255));
    return `rgb(${mixed.join(" ")})`;
  }

  function press(index) {
    pressed = pressed === index ? -1 : index;
    tokens.forEach((token, i) => token.setAttribute("aria-pressed", i === pressed));
    if (pressed < 0) {
      over.replaceChildren(whole);
      [title, least, scale, most].forEach((node, i) => (node.textContent = usual[i]));
      bar.setAttribute("style", usual[4]);
    } else {
      const values = interactions[pressed];
      const top = largest(values);
      const dim = ground.cloneNode();
      dim.className = "dim";
      over.replaceChildren(dim, heatOf(values, top));
      title.textContent = `what acts together with “${names[pressed]}”`;
      const range = signed(top).replace("+", "");
      const steps = [255, 192, 128, 96, 64, 32, 16];
      const stops = [...steps.map((i) => colours.cold[i]), colours.heat[0], ...steps.map((i) => colours.heat[i]).reverse()];
      bar.style.background = `linear-gradient(to right,${stops.map(onGrey).join(",")})`;
      [least.textContent, scale.textContent, most.textContent] = [top ? `−${range}` : "0", "units of the score", range];
    }
    if (at) show(...at);
  }

  if (interactions) {
    byId("tokens").classList.add("clickable");
    tokens.forEach((token, i) => {
      token.tabIndex = 0;
      token.setAttribute("role", "button");
      token.setAttribute("aria-pressed", false);
      token.addEventListener("click", () => press(i));
      token.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        press(i);
      });
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && pressed >= 0) press(pressed);
    });
    byId("how").hidden = false;
  }

  view.tabIndex = 0;
  byId("tools").hidden = false;

  // Whoever shows the page in a frame can make that as high as the page.
  if (window.parent !== window) {
    const tell = () => window.parent.postMessage({ explanation: document.documentElement.offsetHeight }, "*");
    new ResizeObserver(tell).observe(document.documentElement);
  }
})();
