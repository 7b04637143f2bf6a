"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const { pairs, colours, compared, chunk, kind } = JSON.parse(byId("data").textContent);
  const PAGE = 24;
  const STRIP = 6;
  const chunks = new Map();
  let shown = [];
  let page = 0;
  let open = -1;

  document.body.classList.toggle("compared", compared);

  function element(kind, className, text) {
    const made = document.createElement(kind);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function picture(index) {
    const block = Math.floor(index / chunk);
    if (!chunks.has(block)) chunks.set(block, JSON.parse(byId(`pictures-${block}`).textContent));
    return chunks.get(block)[index % chunk];
  }

  function number(value, digits) {
    if (value === null || value === undefined) return "–";
    return value.toFixed(digits).replace("-", "−");
  }

  function amount(value, unit) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    if (unit !== "bits") return String(Number(value.toPrecision(2))).replaceAll("-", "−");
    if (value < 0.005) return "<0.01";
    return value < 9.995 ? value.toFixed(2) : value < 99.95 ? value.toFixed(1) : value.toFixed(0);
  }

  function heatOf([rows, columns, data, signs]) {
    const levels = atob(data);
    const below = signs ? atob(signs) : "";
    const canvas = element("canvas");
    canvas.width = columns;
    canvas.height = rows;
    const image = new ImageData(columns, rows);
    for (let i = 0; i < levels.length; i++) {
      const side = below && below.charCodeAt(i) ? colours.cold : colours.heat;
      image.data.set(side[levels.charCodeAt(i)], 4 * i);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  function view(index, side, label, heat) {
    const box = element("span", "view");
    const data = picture(index);
    const fit = element("span", "fit");
    if (data) {
      const image = element("img");
      image.alt = "";
      image.addEventListener("load", () => fitInto(fit, image));
      image.src = `data:image/jpeg;base64,${data}`;
      fit.append(image);
    } else {
      fit.style.width = "100%";
      fit.style.height = "100%";
    }
    if (heat && side.map) {
      fit.append(heatOf(side.map));
      fit.classList.add("hot");
    }
    if (data || (heat && side.map)) box.append(fit);
    else box.append(element("span", "blank", "no picture"));
    if (label) box.append(element("b", `series series-${label === "A" ? 0 : 1}`, label));
    return box;
  }

  function fitInto(fit, image) {
    const wide = image.naturalWidth >= image.naturalHeight;
    fit.style.width = wide ? "100%" : `${(100 * image.naturalWidth) / image.naturalHeight}%`;
    fit.style.height = wide ? `${(100 * image.naturalHeight) / image.naturalWidth}%` : "100%";
  }

  function colour(node, level) {
    const side = level < 0 ? colours.below : colours.token;
    const [background, ink] = side[Math.round(255 * Math.min(Math.abs(level), 1))];
    node.style.background = background;
    node.style.color = ink;
  }

  function largest(values) {
    return values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  }

  function words(side) {
    const line = element("span", "words");
    const most = largest(side.bits);
    side.tokens.forEach((token, i) => {
      if (side.special[i]) return;
      const word = element("bdi", "word", token);
      if (most > 0) colour(word, side.bits[i] / most);
      line.append(word, " ");
    });
    return line;
  }

  function fact(name, value) {
    const part = element("span", "", `${name} `);
    part.append(element("b", "", value));
    return part;
  }

  function card(index, list) {
    const pair = pairs[index];
    const made = element("button", "card");
    made.type = "button";
    made.dataset.index = index;
    made.setAttribute("aria-label", `${pair.caption || "no caption"}, score ${number(pair.score, 3)}`);
    const pictures = element("span", "pictures");
    const heat = byId("heat").checked;
    pictures.append(view(index, pair, pair.other ? "A" : "", heat));
    if (pair.other) pictures.append(view(index, pair.other, "B", heat));
    made.append(pictures);
    if (pair.tokens) made.append(words(pair));
    else made.append(element("bdi", "words", pair.caption || "(no caption)"));
    if (pair.error) made.append(element("span", "bad", pair.error));
    const line = element("span", "line");
    if (pair.other && pair.change !== undefined) {
      line.append(fact("score", `${number(pair.score, 3)} → ${number(pair.other.score, 3)}`));
      line.append(fact("maps agree", number(pair.agreement, 2)));
    } else if (!pair.error) {
      line.append(fact("score", number(pair.score, 3)));
      if (pair.image_bits !== null) {
        line.append(fact(pair.unit, [pair.image_bits, pair.text_bits].map((value) => amount(value, pair.unit)).join(" + ")));
      }
    }
    if (pair.check === "fails") line.append(element("b", "bad", "check fails"));
    made.append(line);
    made.addEventListener("click", () => showDetail(list(), index));
    return made;
  }

  function matches(pair) {
    const filter = byId("filter").value;
    if (filter === "explained" && pair.error) return false;
    if (filter === "error" && !pair.error) return false;
    if (filter === "warning" && !pair.warning) return false;
    const verdict = filter.startsWith("check ") ? filter.slice(6) : null;
    if (verdict && pair.check !== verdict) return false;
    if (filter && !verdict && !["explained", "error", "warning"].includes(filter) && !(filter in pair.found)) return false;
    const least = byId("least").value;
    const most = byId("most").value;
    if (least !== "" && !(pair.score !== null && pair.score >= Number(least))) return false;
    if (most !== "" && !(pair.score !== null && pair.score <= Number(most))) return false;
    const wanted = byId("search").value.trim().toLowerCase();
    return !wanted || pair.caption.toLowerCase().includes(wanted) || pair.id.toLowerCase().includes(wanted);
  }

  function choose() {
    const key = byId("sort").value;
    const sign = byId("order").value === "down" ? -1 : 1;
    const value = (index) => pairs[index][key];
    const missing = (index) => (value(index) === null || value(index) === undefined ? 1 : 0);
    shown = [...pairs.keys()].filter((index) => matches(pairs[index]));
    // Pairs without the value come last in either order.
    shown.sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : sign * (value(a) - value(b))) || a - b);
    page = 0;
    draw();
  }

  function draw() {
    const pages = Math.max(Math.ceil(shown.length / PAGE), 1);
    page = Math.min(Math.max(page, 0), pages - 1);
    const part = shown.slice(page * PAGE, (page + 1) * PAGE);
    byId("cards").replaceChildren(...part.map((index) => card(index, () => shown)));
    const some = `${page * PAGE + 1}–${page * PAGE + part.length} of ${shown.length.toLocaleString("en")}`;
    byId("status").textContent = shown.length ? `${some} pairs, page ${page + 1} of ${pages}` : "no pair matches";
    byId("back").disabled = page === 0;
    byId("next").disabled = page >= pages - 1;
  }

  function turn(step) {
    page += step;
    draw();
  }

  function strips() {
    for (const strip of document.querySelectorAll("[data-finding]")) {
      const name = strip.dataset.finding;
      const members = [...pairs.keys()].filter((index) => name in pairs[index].found);
      members.sort((a, b) => place(name, a) - place(name, b));
      strip.replaceChildren(...members.slice(0, STRIP).map((index) => card(index, () => members)));
    }
  }

  function place(name, index) {
    return pairs[index].found[name];
  }

  function showDetail(list, index) {
    const dialog = byId("detail");
    const position = list.indexOf(index);
    const pair = pairs[index];
    open = index;
    byId("detail-id").textContent = `${pair.id} (row ${pair.row})`;
    byId("detail-back").disabled = position <= 0;
    byId("detail-next").disabled = position >= list.length - 1;
    byId("detail-back").onclick = () => position > 0 && showDetail(list, list[position - 1]);
    byId("detail-next").onclick = () => position < list.length - 1 && showDetail(list, list[position + 1]);
    const caption = element("h2");
    caption.id = "detail-caption";
    caption.append(element("bdi", "", pair.caption || "(no caption)"));
    const body = [caption];
    if (pair.error) body.push(element("p", "bad", `${pair.error_kind}: ${pair.error}`));
    if (pair.warning) body.push(element("p", "notice", pair.warning));
    const pictures = element("div", "pictures");
    pictures.append(view(index, pair, "", false));
    if (pair.map) pictures.append(view(index, pair, pair.other ? "A" : "", true));
    if (pair.other && pair.other.map) pictures.append(view(index, pair.other, "B", true));
    if (pictures.querySelector(".fit")) body.push(pictures);
    body.push(...sideDetail(pair, pair.other ? "A" : ""));
    if (pair.other) body.push(...sideDetail(pair.other, "B"));
    byId("detail-body").replaceChildren(...body);
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  }

  function scaleOf(side) {
    const line = element("div", "scale");
    const ramp = side.map.length > 3 ? [...colours.cold].reverse().concat(colours.heat) : colours.heat;
    const canvas = element("canvas");
    canvas.width = ramp.length;
    canvas.height = 1;
    const image = new ImageData(ramp.length, 1);
    ramp.forEach((heat, i) => image.data.set(heat, 4 * i));
    canvas.getContext("2d").putImageData(image, 0, 0);
    const top = amount(side.top, side.unit);
    line.append(ramp === colours.heat ? "0" : `−${top}`, canvas, `${top} ${side.unit}${side.unit === "relative values" ? "" : " per patch"}`);
    return line;
  }

  function verdictOf(side, name) {
    const verdict = side[`${name}_check`];
    if (!verdict) return null;
    const share = (value) => `${number(100 * value, 0)} %`;
    const told = `takes ${share(side[`${name}_margin`])} more than hiding as much at random`;
    const kept = side[`${name}_kept`];
    return `${verdict}: hiding what it marks ${told}${kept === null ? "" : `; it keeps ${share(kept)}`}`;
  }

  function sideDetail(side, label) {
    const box = element("div", "side");
    if (label) box.append(element("b", `series series-${label === "A" ? 0 : 1}`, label));
    if (side.map) box.append(scaleOf(side));
    if (side.tokens) {
      const most = largest(side.bits);
      const tokens = element("div", "tokens");
      side.tokens.forEach((token, i) => {
        const made = element("span", side.special[i] ? "token special" : "token");
        made.append(element("bdi", "", token), element("small", "", amount(side.bits[i], side.unit)));
        if (most > 0) colour(made, side.bits[i] / most);
        tokens.append(made);
      });
      box.append(tokens);
    } else if (label && side.error) {
      box.append(element("p", "bad", side.error));
    }
    const facts = element("dl", "facts");
    for (const [name, value] of [
      ["score", side.score === null ? null : number(side.score, 4)],
      [`${side.unit} of the ${kind}`, side.image_bits === null ? null : amount(side.image_bits, side.unit)],
      [`${side.unit} of the text`, side.text_bits === null ? null : amount(side.text_bits, side.unit)],
      [`score through the ${kind}'s gates`, side.image_score === null ? null : number(side.image_score, 4)],
      ["score through the text's gates", side.text_score === null ? null : number(side.text_score, 4)],
      [`check of the ${kind}'s map`, verdictOf(side, "image")],
      ["check of the text's map", verdictOf(side, "text")],
      ["score of the best half", side.best_half_score === null ? null : number(side.best_half_score, 4)],
      ["score of the other half", side.other_half_score === null ? null : number(side.other_half_score, 4)],
      ["share of the map inside", side.inside_share === null ? null : number(side.inside_share, 3)],
      ["share of the area inside", side.inside_area === null ? null : number(side.inside_area, 3)],
      ["likeness to the other caption's map", side.contrast_similarity === null ? null : number(side.contrast_similarity, 3)],
      ["other caption", side.contrast || null],
      ["time", side.time || null],
    ]) {
      if (value === null) continue;
      const entry = element("div");
      entry.append(element("dt", "", name), element("dd", "", value));
      facts.append(entry);
    }
    box.append(facts);
    return [box];
  }

  function moveFocus(event) {
    const current = document.activeElement;
    if (!current || !current.classList.contains("card")) return false;
    const cards = [...current.parentElement.children];
    const position = cards.indexOf(current);
    const top = cards[0].offsetTop;
    const columns = Math.max(cards.filter((other) => other.offsetTop === top).length, 1);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (step === undefined) return false;
    const target = cards[position + step];
    if (target) target.focus();
    return true;
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (byId("detail").open) {
      if (event.key === "ArrowLeft") byId("detail-back").click();
      else if (event.key === "ArrowRight") byId("detail-next").click();
      else return;
      event.preventDefault();
      return;
    }
    if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
    if (event.key === "/") byId("search").focus();
    else if (event.key === "]") turn(1);
    else if (event.key === "[") turn(-1);
    else if (!moveFocus(event)) return;
    event.preventDefault();
  });

  byId("detail-close").addEventListener("click", () => byId("detail").close());
  byId("detail").addEventListener("click", (event) => event.target === byId("detail") && byId("detail").close());
  byId("detail").addEventListener("close", () => {
    const origin = document.querySelector(`#cards [data-index="${open}"]`);
    if (origin) origin.focus();
  });
  byId("back").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("controls").addEventListener("input", (event) => {
    if (event.target.id === "heat") {
      draw();
      strips();
    } else choose();
  });
  for (const button of document.querySelectorAll("[data-show]")) {
    button.addEventListener("click", () => {
      byId("controls").reset();
      byId("filter").value = button.dataset.show;
      choose();
      byId("gallery").scrollIntoView();
    });
  }
  strips();
  choose();
})();
