"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { places, colours } = data;
  const rows = places.length, columns = places[0].length;
  const frame = document.getElementById("picture");
  const canvas = frame.querySelector("canvas");
  const buttons = [...document.querySelectorAll("#words button")];
  const state = document.getElementById("state");
  const chosen = new Set();
  let patch = null, cursor = [0, 0];

  const number = (value) => value.toPrecision(2).replace("-", "\u2212");
  const largest = (values) => Math.max(...values.map(Math.abs)) || 1;
  const mostAcross = largest(data.across.flat()), mostAlone = largest(data.picture);
  const colour = (level) => colours[Math.round((Math.max(-1, Math.min(1, level)) + 1) / 2 * (colours.length - 1))];

  const shown = () => {
    if (!chosen.size) return [data.picture, mostAlone];
    const sum = data.picture.map((_, player) => [...chosen].reduce((total, word) => total + data.across[word][player], 0));
    return [sum, chosen.size > 1 ? largest(sum) : mostAcross];
  };

  const draw = () => {
    const [values, most] = shown();
    canvas.width = frame.clientWidth * devicePixelRatio;
    canvas.height = frame.clientHeight * devicePixelRatio;
    const ink = canvas.getContext("2d");
    const wide = canvas.width / columns, high = canvas.height / rows;
    for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
      const player = places[row][column];
      if (player < 0) continue;
      const level = values[player] / most;
      ink.globalAlpha = 0.85 * Math.min(1, Math.sqrt(Math.abs(level)));
      ink.fillStyle = colour(level);
      ink.fillRect(Math.round(column * wide), Math.round(row * high),
        Math.round((column + 1) * wide) - Math.round(column * wide),
        Math.round((row + 1) * high) - Math.round(row * high));
    }
    ink.globalAlpha = 1;
    ink.lineWidth = 2 * devicePixelRatio;
    const outline = (inside, style) => {
      ink.strokeStyle = style;
      ink.beginPath();
      for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
        if (!inside(row, column)) continue;
        const left = column * wide, top = row * high, right = left + wide, bottom = top + high;
        const edge = (other, x, y, u, v) => { if (!other) { ink.moveTo(x, y); ink.lineTo(u, v); } };
        edge(row > 0 && inside(row - 1, column), left, top, right, top);
        edge(row + 1 < rows && inside(row + 1, column), left, bottom, right, bottom);
        edge(column > 0 && inside(row, column - 1), left, top, left, bottom);
        edge(column + 1 < columns && inside(row, column + 1), right, top, right, bottom);
      }
      ink.stroke();
    };
    if (document.activeElement === frame) outline((row, column) => row === cursor[0] && column === cursor[1], "#8df");
    if (patch !== null) outline((row, column) => places[row][column] === patch, "#fff");
    document.querySelector(".low").textContent = number(-most);
    document.querySelector(".high").textContent = number(most);
  };

  const label = () => {
    const values = patch === null ? data.caption : data.across.map((row) => row[patch]);
    const most = patch === null ? largest(values) : mostAcross;
    buttons.forEach((button, word) => {
      const level = values[word] / most;
      button.setAttribute("aria-pressed", chosen.has(word));
      button.querySelector(".value").textContent = number(values[word]);
      const blue = level >= 0 ? [8, 81, 156] : [0, 109, 44];
      const strength = Math.min(1, Math.abs(level));
      button.style.setProperty("background-color", `rgb(${blue.map((part) => Math.round(255 + strength * (part - 255))).join(",")})`);
      button.classList.toggle("dark", strength > 0.55);
    });
    const words = [...chosen].sort((a, b) => a - b).map((word) => buttons[word].querySelector("bdi").textContent);
    const over = words.length ? `Over the picture: its patches with \u201c${words.join(" ")}\u201d.`
      : "Over the picture: what each patch adds on average.";
    const below = patch === null ? "Below the words: what each adds on average."
      : `Below the words: each with patch ${patch}, which adds ${number(data.picture[patch])} on average.`;
    state.textContent = `${over} ${below} Units of the score.`;
  };

  const update = () => { label(); draw(); };
  const select = (row, column) => {
    const player = places[row][column];
    patch = player < 0 || player === patch ? null : player;
    cursor = [row, column];
    update();
  };

  buttons.forEach((button, word) => button.addEventListener("click", () => {
    if (!chosen.delete(word)) chosen.add(word);
    update();
  }));
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    const at = (offset, length, count) => Math.max(0, Math.min(count - 1, Math.floor(offset / length * count)));
    select(at(event.clientY - box.top, box.height, rows), at(event.clientX - box.left, box.width, columns));
  });
  frame.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) {
      cursor = [Math.max(0, Math.min(rows - 1, cursor[0] + step[0])), Math.max(0, Math.min(columns - 1, cursor[1] + step[1]))];
      draw();
    } else if (event.key === "Enter" || event.key === " ") select(...cursor);
    else return;
    event.preventDefault();
  });
  frame.addEventListener("focus", draw);
  frame.addEventListener("blur", draw);
  document.getElementById("clear").addEventListener("click", () => { chosen.clear(); patch = null; update(); });
  addEventListener("resize", draw);

  const bar = document.querySelector(".bar canvas");
  bar.width = colours.length;
  bar.height = 1;
  colours.forEach((one, place) => {
    const ink = bar.getContext("2d");
    ink.fillStyle = one;
    ink.fillRect(place, 0, 1, 1);
  });
  const picture = frame.querySelector("img");
  picture.addEventListener("load", draw);
  update();
})();
